"""LoRA - a low-rank update beside a frozen weight.  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    W' = W + (alpha / r) B A        A: (r, d_in) random,  B: (d_out, r) zero  ->  W' = W at the start

count = r (d_in + d_out) per target.  Merges exactly.  The paper's targets are the query and value
projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.anatomy import Site, Targets
from guidelib.attachment.weight_delta import BranchCost, Delta, WeightDelta, added_dtype
from guidelib.method import expect


@dataclass(frozen=True)
class LoRA(WeightDelta):
    """A rank-``r`` update of every target, scaled by ``alpha / r``.

    r: rank, at least 1 and at most the smaller side of the weight.  alpha: scale.  targets: roles (see
    anatomy.py). dropout: applied to the branch's input while training.
    """

    r: int = 8
    alpha: float = 8.0
    targets: Targets = ("q", "v")
    dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        expect(isinstance(self.r, int) and self.r >= 1, "r", self.r, "a whole number of at least 1")
        number = isinstance(self.alpha, int | float)
        expect(number and math.isfinite(self.alpha), "alpha", self.alpha, "a finite number")
        number = isinstance(self.dropout, int | float)
        expect(number and 0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")

    def build(self, site: Site) -> LowRank:
        expect(
            self.r <= min(site.shape),
            "r",
            self.r,
            f"at most {min(site.shape)}, the smaller side of {site.name}",
        )
        return LowRank(site.weight, self.r, self.alpha / self.r, self.dropout)


class LowRank(Delta):
    """scale * B A for one weight (d_out, d_in), on its device and in its type (32 bits at least)."""

    def __init__(self, weight: torch.Tensor, r: int, scale: float, dropout: float = 0.0):
        super().__init__()
        d_out, d_in = weight.shape
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        self.A = nn.Parameter(torch.empty(r, d_in, **like))
        self.B = nn.Parameter(torch.zeros(d_out, r, **like))
        # the authors' code; the paper says Gaussian.  With a = sqrt(5) it is uniform within 1 / sqrt(d_in)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale, self.dropout = scale, dropout

    def delta(self) -> torch.Tensor:
        return self.scale * self.B @ self.A  # (d_out, d_in)

    def cost(self) -> BranchCost:
        (r, d_in), d_out = self.A.shape, self.B.shape[0]
        return BranchCost(
            keeps_input=True,  # for the gradient of A
            kept=r,  # scale * A x, for the gradient of B
            forward=2 * r * (d_in + d_out),
            backward=2 * r * (d_in + 2 * d_out),  # of A; of B and of A x
            backward_input=2 * r * d_in,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(F.linear(x, self.A) * self.scale, self.B)  # (..., d_in) -> (..., r) -> (..., d_out)
