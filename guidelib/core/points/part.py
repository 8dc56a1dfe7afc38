"""What a method adds at one place of the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from guidelib.core.method import Method


class Part(nn.Module):
    """Added parameters, and how they take effect.

    A subclass fills in ``plug`` (start to act) and ``unplug`` (stop, leaving no trace).  One whose effect
    can be written into the base weights also fills in ``merge``, ``unmerge`` and sets ``mergeable``; what
    cannot be merged costs something at inference.
    """

    name: str  # unique within an attachment; without dots
    method: Method  # the one that made it
    mergeable: bool = False
    why_not: str = "it computes something that no base weight can"
    first: bool = False  # whether it must come first at its place, since it reads what stands there

    def plug(self) -> None:
        raise NotImplementedError

    def unplug(self) -> None:
        raise NotImplementedError

    def merge(self) -> None:
        """Write the effect into the base weights and keep a copy of what stood there."""
        raise NotImplementedError

    def unmerge(self) -> None:
        """Put the kept copy back, bit for bit."""
        raise NotImplementedError

    def take_over(self, layer: nn.Module, forward: Callable) -> None:
        """Let ``layer`` compute ``forward``, a method of this part, which a deep copy binds to the copied
        part."""
        self._before = {name: value for name, value in vars(layer).items() if name == "forward"}
        layer.forward = forward

    def give_back(self, layer: nn.Module, forward: Callable) -> bool:
        """Undo ``take_over``; whether there was anything to undo."""
        taken = vars(layer).get("forward") == forward
        if taken:
            del layer.forward
            vars(layer).update(self._before)
        return taken

    @property
    def place(self) -> str:
        """What this part changes: two parts with the same place change the same entries."""
        return self.name

    @property
    def changed(self) -> int:
        """How many entries of the effective model this part can make differ from the base."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write ``value`` into ``parameter``; where that was resized meanwhile, into the rows that both have."""
    if parameter.shape == value.shape:
        parameter.copy_(value)
    else:
        rows = min(len(parameter), len(value))
        parameter[:rows].copy_(value[:rows])
