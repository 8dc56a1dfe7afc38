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
from guidelib.core.method import Method, Wrapper, expect
from guidelib.core.points.part import Part
from guidelib.core.points.sublayer import SublayerPart


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
        whole = isinstance(self.drop, int) and self.drop >= 0
        expect(whole, "drop", self.drop, "a whole number of at least 0")
        expect(isinstance(self.method, Method), "method", self.method, "a method such as PfeifferAdapter()")
        expect(isinstance(self.random, bool), "random", self.random, "True or False")

    def restrictions(self, anatomy: Anatomy) -> list[Anatomy]:
        """The anatomy of each stack without its first layers."""
        stacks: dict[str, list[int]] = {}
        for stack, layer, _ in anatomy.blocks():
            stacks.setdefault(stack, []).append(layer)
        depth = min(max(layers) + 1 for layers in stacks.values())
        expect(self.drop < depth, "drop", self.drop, f"less than {depth}, the number of layers")
        if self.random:
            return [anatomy]
        return [anatomy.restrict([n for n in layers if n >= self.drop], s) for s, layers in stacks.items()]

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        parts = [part for kept in self.restrictions(anatomy) for part in self.method.parts(kept, saved)]
        if self.random:
            adapters = [part for part in parts if isinstance(part, SublayerPart)]
            parts.append(RandomDrop(self, anatomy.base, adapters))
        return parts

    def select(self, anatomy: Anatomy) -> set[str]:
        return set().union(*(self.method.select(kept) for kept in self.restrictions(anatomy)))

    def rewrites(self, anatomy: Anatomy) -> set[str]:
        return set().union(*(self.method.rewrites(kept) for kept in self.restrictions(anatomy)))


class RandomDrop(Part):
    """Draws n before each forward pass in training, and lets the adapters from layer n on act.

    It is drawn outside of the blocks, since a block may be computed again for its gradient and must then find
    the same n.
    """

    why_not = "the adapters that it switches cannot"

    def __init__(self, method: AdapterDrop, backbone: nn.Module, adapters: list[SublayerPart]):
        super().__init__()
        self.name, self.method = "AdapterDrop", method
        self._places = backbone, adapters
        self._handle: Any = None

    def plug(self) -> None:
        self._handle = self._places[0].register_forward_pre_hook(self._draw)

    def unplug(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _draw(self, module: nn.Module, args: Any) -> None:
        if self.training:
            n = int(torch.randint(self.method.drop + 1, ()))
            for part in self._places[1]:
                part.skipped = part.sublayer.layer < n
