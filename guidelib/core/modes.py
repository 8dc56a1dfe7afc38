"""Training and evaluation mode, which a model has module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Each module has the mode again that it has now, however the block ends."""
    modes = [(module, module.training, getattr(module, "held", None)) for module in model.modules()]
    try:
        yield
    finally:
        for module, training, held in modes:
            module.training = training
            if held is not None:  # by a part, which will give them back to others: see side.py
                module.held = held
