"""PHM adapters and Compacter - adapters whose maps are sums of Kronecker products.  Karimi Mahabadi et al.
2021, arXiv:2106.04647, sections 4.1 and 4.2; the maps are those of Zhang et al. 2021, arXiv:2102.08597.

    y = x H + b,   H = sum_{i=1..n} A_i (x) B_i           A_i: (n, n),  B_i: (d_in / n, d_out / n)

    PHMAdapter           A_i and B_i of each map its own
    Compacter            B_i = S_i T_i, S_i: (d_in / n, rank), T_i: (rank, d_out / n);  the A_i are shared
    CompacterPlusPlus    the same, behind the feed-forward network only

count of a map d_in -> d_out: d_in d_out / n + n^3 + d_out;  with low rank rank (d_in + d_out) + d_out, and
n^3 once for all maps that share the A_i.  Like all adapters, none of them can be merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.additive.adapters.bottleneck import Adapter
from guidelib.additive.adapters.linear import Linears, Pair
from guidelib.core.anatomy import Sublayer, Targets
from guidelib.core.method import expect, is_whole
from guidelib.core.points.weight_delta import added_dtype
from guidelib.core.values import has_values


@dataclass(frozen=True)
class PHM(Linears):
    """Sums of ``n`` Kronecker products.

    rank: that of the second factors; None: they are whole.  shared: whether all maps of a method have the
    same first factors.  The start is that of the authors' code: first factors normal, with standard deviation
    1e-4 where they are shared and 0.01 otherwise; second ones Glorot uniform with a gain of sqrt 2; biases
    zero.
    """

    n: int = 4
    rank: int | None = None
    shared: bool = False

    def __post_init__(self):
        for name, value in {"n": self.n, "rank": 1 if self.rank is None else self.rank}.items():
            expect(is_whole(value), name, value, "a whole number of at least 1")
        expect(isinstance(self.shared, bool), "shared", self.shared, "True or False")

    def pairs(self, sublayers: list[Sublayer], r: int) -> list[Pair]:
        pairs, A = [], None
        for sublayer in sublayers:
            weight, d = sublayer.out.like, sublayer.width
            for name, width in {"r": r, f"the width of {sublayer.name}": d}.items():
                expect(width % self.n == 0, "n", self.n, f"a divisor of {name}, {width}")
            like = {"device": weight.device, "dtype": added_dtype(weight)}
            maps = []
            for d_in, d_out in ((d, r), (r, d)):
                if A is None or not self.shared:
                    A = nn.Parameter(torch.empty(self.n, self.n, self.n, **like))
                    nn.init.normal_(A, std=1e-4 if self.shared else 1e-2)
                maps.append(PHMLinear(A, d_in, d_out, self.rank))
            pairs.append(tuple(maps))
        return pairs


class PHMLinear(nn.Module):
    """x (..., d_in) -> x H + b (..., d_out), with H as above; A (n, n, n)."""

    def __init__(self, A: nn.Parameter, d_in: int, d_out: int, rank: int | None = None):
        super().__init__()
        n, like = len(A), {"device": A.device, "dtype": A.dtype}
        shapes = {"B": (d_in // n, d_out // n)}
        if rank is not None:
            shapes = {"S": (d_in // n, rank), "T": (rank, d_out // n)}
        self.A, self.rank = A, rank
        for name, shape in shapes.items():
            factors = torch.empty(n, *shape, **like)
            if has_values(factors):
                for factor in factors:
                    nn.init.xavier_uniform_(factor, gain=math.sqrt(2))
            setattr(self, name, nn.Parameter(factors))
        self.bias = nn.Parameter(torch.zeros(d_out, **like))

    def weight(self) -> torch.Tensor:
        """H (d_in, d_out)."""
        B = self.B if self.rank is None else self.S @ self.T
        return torch.einsum("iab,icd->acbd", self.A, B).flatten(2, 3).flatten(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rank is None:
            return F.linear(x, self.weight().t(), self.bias)
        x = x.unflatten(-1, (len(self.A), -1))  # of low rank: H is never formed
        inner = torch.einsum("...ac,icr->...iar", x, self.S)
        inner = torch.einsum("...iar,iab->...ibr", inner, self.A)
        return torch.einsum("...ibr,ird->...bd", inner, self.T).flatten(-2) + self.bias


@dataclass(frozen=True)
class PHMAdapter(Adapter):
    """Houlsby's adapter, whose maps are sums of Kronecker products.  n = 4 divides the widths of all of this
    book's models; the paper's smallest one has n = 12."""

    r: int = 24  # the width of T5-base, 768, divided by 32
    activation: str = "gelu_new"
    linear: Linears = PHM()


@dataclass(frozen=True)
class Compacter(Adapter):
    """Houlsby's adapter, whose maps are sums of Kronecker products of shared factors and of rank-1 ones."""

    r: int = 24
    activation: str = "gelu_new"
    linear: Linears = PHM(rank=1, shared=True)


@dataclass(frozen=True)
class CompacterPlusPlus(Compacter):
    """Compacter behind the feed-forward network only."""

    sublayers: Targets = ("ffn",)
