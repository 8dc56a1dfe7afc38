"""Looking at a model while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


@contextmanager
def recording(look: Callable[[], T]) -> Iterator[list[T]]:
    """What ``look()`` returns at the start and after each step of any optimiser, as a list that grows.

    with gl.recording(lambda: float(weight.norm())) as norms:
        gl.fit(model, task, tokenizer)
    """
    looking = torch.no_grad()(look)
    seen = [looking()]
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(looking()))
    try:
        yield seen
    finally:
        handle.remove()
