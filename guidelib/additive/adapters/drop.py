"""AdapterDrop - no adapters in the first layers.  Rücklé et al. 2021, arXiv:2010.11918, sections 3 and 4.

With the first n layers bare, nothing below layer n is trained: no gradient has to flow there, and nothing is
kept for it.  As an expression, AdapterDrop(m, n) is ``m.on(layers=range(n, L))``.

In the random variant n is drawn anew for each forward pass in training, from 0 to ``drop``, so that one
training serves every n: unplug the parts of the first layers when you use the model.  On an encoder-decoder,
the first layers of both stacks are bare, but cross-attention still carries a gradient through the decoder's.

count: that of the method, on the layers kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Method, Wrapper, expect, is_whole
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call, noted, notes, remember
from guidelib.core.points.sublayer import SKIPPED, SublayerPart
from guidelib.core.values import draw


@dataclass(frozen=True)
class AdapterDrop(Wrapper):
    """``method`` without the first ``drop`` layers of each stack.

    random: keep adapters in all layers, and in each forward pass in training leave out those of the first n,
    where n is drawn from 0 to ``drop``.
    """

    method: Method = PfeifferAdapter()
    drop: int = 5
    random: bool = False

    def __post_init__(self):
        super().__post_init__()
        expect(is_whole(self.drop, 0), "drop", self.drop, "a whole number of at least 0")
        expect(isinstance(self.random, bool), "random", self.random, "True or False")

    def restriction(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy without the first layers of each stack, or all of it if they are left out at random."""
        last = {stack: layer for stack, layer, _ in anatomy.blocks()}
        depth = min(last.values(), default=-1) + 1
        expect(self.drop < depth, "drop", self.drop, f"less than {depth}, the number of layers")
        return anatomy if self.random else anatomy.without_first(self.drop)

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        parts = self.method.parts(self.restriction(anatomy), saved)
        if self.random:
            adapters = all(isinstance(part, SublayerPart) for part in parts)
            expect(adapters, "random", True, f"False for {self.method!r}, which adds more than adapters")
            parts.append(RandomDrop(self, anatomy.base, list(parts)))
        return parts

    def select(self, anatomy: Anatomy) -> set[str]:
        return self.method.select(self.restriction(anatomy))

    def rewrites(self, anatomy: Anatomy) -> set[str]:
        return self.method.rewrites(self.restriction(anatomy))


class RandomDrop(Part):
    """Draws n for each forward pass in training, and notes for that pass which adapters are left out.

    It is drawn outside of the blocks, since a block may be computed again for its gradient and must then find
    the same n.
    """

    serves = True
    why_not = "the adapters that it switches cannot"

    def __init__(self, method: AdapterDrop, backbone: nn.Module, adapters: list[SublayerPart]):
        super().__init__()
        self.name, self.method = "AdapterDrop", method
        self._places = backbone, adapters

    def plug(self) -> None:
        backbone, adapters = self._places
        self.around(backbone, self._draw)
        for block in {part.sublayer.block: None for part in adapters}:
            self.around(block, self.frame)

    def _draw(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return call(*args, **kwargs)
        n = draw(self.method.drop + 1)
        remember(self._places[0])
        left_out = {part for part in self._places[1] if part.sublayer.layer < n}
        with noted({SKIPPED: left_out | notes().get(SKIPPED, set())}):
            return call(*args, **kwargs)
