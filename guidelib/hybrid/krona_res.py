"""KronA^B_res - a Kronecker product beside the feed-forward network, with a residual of its own.  Edalati et
al. 2022, arXiv:2212.10650.

    h <- h + s (A (x) B) x + s_res x           A: (o1, i1) random,  B: (o2, i2) zero,  o1 o2 = i1 i2 = d

x (..., d) is the sub-layer's input, h its output.  Without ``residual`` it is KronA^B.  count = o1 i1 +
o2 i2, and 1 for s_res.  The map is linear, and still nothing can be merged: beside it the network bends.

There is no public code.  Our reading: s_res is trained and starts at zero, so that nothing is added at first;
shapes and start of the factors as for KronA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from guidelib.core.anatomy import Sublayer, Targets
from guidelib.core.method import expect
from guidelib.core.points.sublayer import SublayerHook
from guidelib.reparametrization.krona import KronA, Kronecker


@dataclass(frozen=True)
class KronARes(SublayerHook):
    """A Kronecker product beside each of the ``sublayers``.

    s, shape: as for `KronA`.  residual: whether s_res x is added, too.  point: see `Adapter`.
    """

    reads: ClassVar[str] = "input"

    s: float = 1.0
    shape: tuple[int, int] | None = None
    sublayers: Targets = ("ffn",)
    residual: bool = True
    point: str = "after dropout"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "shape", KronA(self.s, self.shape).shape)  # refuses what is impossible
        expect(isinstance(self.residual, bool), "residual", self.residual, "True or False")

    def build(self, sublayer: Sublayer) -> nn.Module:
        square = sublayer.out.like.new_empty(1).expand(sublayer.width, sublayer.width)  # its size and type
        return KroneckerBranch(KronA(self.s, self.shape).product(square, sublayer.name), self.residual)


class KroneckerBranch(nn.Module):
    """x (..., d) -> s (A (x) B) x + s_res x (..., d)."""

    def __init__(self, product: Kronecker, residual: bool):
        super().__init__()
        self.product = product
        self.residual = nn.Parameter(product.A.new_zeros(())) if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change = self.product(x)
        return change if self.residual is None else change + self.residual * x
