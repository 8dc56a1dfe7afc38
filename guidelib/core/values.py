"""Tensors without values: those of torch's meta device and of its FakeTensorMode, which runs operations on
shapes alone.

Costs follow from shapes, so a model without values has the costs of a real one.  What looks at values asks
here first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


def has_values(tensor: torch.Tensor) -> bool:
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def mode_of(model: nn.Module) -> AbstractContextManager:
    """The FakeTensorMode that the parameters of ``model`` belong to, so that new tensors can stand beside
    them; a context that does nothing for any other model."""
    first = next(model.parameters(), None)
    return first.fake_mode if isinstance(first, FakeTensor) else nullcontext()


def beside(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``other`` as an operation with ``tensor`` takes it: without values where ``tensor`` is in a
    FakeTensorMode."""
    convert = isinstance(tensor, FakeTensor) and has_values(other)
    return tensor.fake_mode.from_tensor(other) if convert else other


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast acts on operations with ``tensor``; on the meta device there is none."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def draw(n: int) -> int:
    """A whole number from 0 to n - 1 from torch's generator, also where tensors have no values.

    Gradient checkpointing restores that generator, and so repeats the draw.
    """
    with unset_fake_temporarily():
        return int(torch.randint(n, (), device="cpu"))
