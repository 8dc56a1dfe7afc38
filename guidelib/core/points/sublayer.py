"""SublayerHook - a method that adds g(.) to what a sub-layer adds to the residual stream.

Let x be a sub-layer's input on the residual stream, h its output and D the residual dropout, so that the
block goes on with x + D(h).  A hook makes this x + D(h) + g(.), where g reads one of three things:

    "output"   D(h)                  in sequence: Houlsby's and Pfeiffer's adapters
    "input"    x                     in parallel.  In pre-norm models x is the stream before the norm
    "normed"   norm(x + D(h))        in sequence, behind the block's own norm (post-norm models only)

At the point "before dropout" the same happens to h itself: D(h + g(.)).

Where g needs x, a hook at the sub-layer's first module makes a note of it (see passes.py), and the one at its
last takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, Sublayer
from guidelib.core.method import Method, expect
from guidelib.core.points import passes
from guidelib.core.points.part import Part, Place, map_of
from guidelib.core.points.weight_delta import computed_dtype
from guidelib.core.values import autocasts

POINTS = ("after dropout", "before dropout")
SKIPPED = "skipped"  # a note: the parts that a pass in training leaves out


@dataclass(frozen=True)
class SublayerHook(Method):
    """Base of the methods that act on the output of sub-layers: they cost something at inference.

    A subclass has the fields ``sublayers`` (see `Anatomy.sublayers`) and ``point``, says in ``reads`` what
    its modules get, and fills in ``build``; one whose modules share parameters overrides ``build_all``.
    """

    reads: ClassVar[str] = "output"

    def __post_init__(self):
        self.several("sublayers", "name")
        expect(self.point in POINTS, "point", self.point, f"one of {', '.join(POINTS)}")

    def build(self, sublayer: Sublayer) -> nn.Module:
        """A module that maps (..., d) to (..., d): what is added."""
        raise NotImplementedError

    def build_all(self, sublayers: list[Sublayer], saved: Mapping[str, torch.Tensor]) -> list[nn.Module]:
        return [self.build(sublayer) for sublayer in sublayers]

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        sublayers = anatomy.sublayers(self.sublayers)
        return [
            SublayerPart(self, sublayer, module)
            for sublayer, module in zip(sublayers, self.build_all(sublayers, saved), strict=True)
        ]


def part_name(method: Method, sublayer: Sublayer) -> str:
    return f"{type(method).__name__}_{sublayer.name.replace('.', '_')}"


class SublayerPart(Part):
    """One module at one sub-layer, as hooks: the model's own modules and keys stay what they were."""

    why_not = "it acts on activations, between the base model's layers"

    def __init__(self, method: Method, sublayer: Sublayer, module: nn.Module):
        super().__init__()
        name, reads, point = part_name(method, sublayer), method.reads, method.point
        if reads == "normed" and sublayer.pre_norm:
            raise ValueError(
                f"{name}: there is no norm behind {sublayer.name} in this model, whose norms stand before "
                "the sub-layers; use the plain form"
            )
        if point == "after dropout" and sublayer.dropout_function and sublayer.pre_norm:
            raise ValueError(
                f"{name}: the dropout behind {sublayer.name} is out of reach in this model; use point="
                '"before dropout"'
            )
        self.name, self.method, self.module, self.point = name, method, module, point
        # in a tuple, so that the backbone's layers are not registered as children of this module
        self._sublayer = (sublayer,)

    @property
    def sublayer(self) -> Sublayer:
        return self._sublayer[0]

    @property
    def _acts(self) -> bool:
        return not (self.training and self in passes.notes().get(SKIPPED, ()))

    @property
    def _last(self) -> nn.Module | None:
        """The module whose output is h; None behind BART's dropout, which is no module: see _behind_sum."""
        at, before = self.sublayer, self.point == "before dropout"
        if at.dropout_function and not before:
            return None
        return at.out.module if before or at.dropout is None else at.dropout

    @property
    def acts_on(self) -> tuple[Place, ...]:
        out = self.sublayer.out.module
        return (map_of(out),) if self._last is out else ()

    def plug(self) -> None:
        at, last = self.sublayer, self._last
        if last is None or self.method.reads != "output":
            self.around(at.block, self.frame)
            self.hook(at.source, self._remember, before=True)
        if last is None:
            self.hook(at.norm, self._behind_sum, before=True)
        else:
            self.hook(last, self._behind)

    def _remember(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        passes.note(self, args[0])

    def _behind(self, module: nn.Module, args: tuple[torch.Tensor, ...], h: torch.Tensor) -> torch.Tensor:
        x = None if self.method.reads == "output" else passes.take(self)
        return h + self._change(x, h) if self._acts else h

    def _behind_sum(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The norm's input is x + D(h), from which D(h) is found by subtraction, up to rounding."""
        (total, *rest), x = args, passes.take(self)
        return (total + self._change(x, total - x) if self._acts else total, *rest)

    def _change(self, x: torch.Tensor | None, h: torch.Tensor) -> torch.Tensor:
        if self.method.reads == "output":
            read = h
        elif self.method.reads == "input":
            read = x
        else:  # forward, not a call: a call would run the hooks of the norm
            read = self.sublayer.norm.forward(x + h)
        # the added parameters stay in 32 bits beside a 16-bit base, which would round small updates away
        dtype = computed_dtype(self.module)
        inner = read if autocasts(read) else read.to(dtype)
        change = self.module(inner)
        if self.gating is not None:
            change = self.gating(read) * change
        return change.to(read.dtype)
