"""LoRA - a low-rank update beside a frozen weight.  Hu et al. 2021, arXiv:2106.09685, section 4.1.

    W' = W + (alpha / r) B A        A: (r, d_in) random,  B: (d_out, r) zero  ->  W' = W at the start

count = r (d_in + d_out) per target.  Merges exactly.  The paper's targets are the query and value
projections.

Two later papers change one thing each.
rsLoRA: alpha / sqrt(r) for alpha / r, so that the first steps are as large at a high rank as at a low one.
Kalajdzievski 2023, arXiv:2312.03732.
LoRA-FA: A stays as it was drawn.  count = r d_out per target, and the layer's input is not kept for the
backward pass, only the r numbers A x per token.  Zhang et al. 2023, arXiv:2308.03303; the gradient of B is
used as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import Site, Targets
from guidelib.core.method import expect, is_number, is_whole
from guidelib.core.points.weight_delta import BranchCost, Delta, WeightDelta, added_dtype


@dataclass(frozen=True)
class LoRA(WeightDelta):
    """A rank-``r`` update of every target, scaled by ``alpha / r``.

    r: rank, at least 1 and at most the smaller side of the weight.  alpha: scale.  targets: roles (see
    anatomy.py). dropout: applied to the branch's input while training.  rank_stabilized: scale by
    ``alpha / sqrt(r)`` (rsLoRA).  freeze_A: train B alone (LoRA-FA).
    """

    r: int = 8
    alpha: float = 8.0
    targets: Targets = ("q", "v")
    dropout: float = 0.0
    rank_stabilized: bool = False
    freeze_A: bool = False

    def __post_init__(self):
        super().__post_init__()
        expect(is_whole(self.r), "r", self.r, "a whole number of at least 1")
        expect(is_number(self.alpha), "alpha", self.alpha, "a finite number")
        number = is_number(self.dropout)
        expect(number and 0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        for name in ("rank_stabilized", "freeze_A"):
            expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")

    def build(self, site: Site) -> LowRank:
        expect(
            self.r <= min(site.shape),
            "r",
            self.r,
            f"at most {min(site.shape)}, the smaller side of {site.name}",
        )
        scale = self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)
        return LowRank(site.like, self.r, scale, self.dropout, self.freeze_A)


class LowRank(Delta):
    """scale * B A for one weight (d_out, d_in), on its device and in its type (32 bits at least)."""

    def __init__(
        self, weight: torch.Tensor, r: int, scale: float, dropout: float = 0.0, freeze_A: bool = False
    ):
        super().__init__()
        d_out, d_in = weight.shape
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        # the authors' code; the paper says Gaussian.  With a = sqrt(5) it is uniform within 1 / sqrt(d_in)
        A = nn.init.kaiming_uniform_(torch.empty(r, d_in, **like), a=math.sqrt(5))
        if freeze_A:
            self.register_buffer("A", A)  # in the file all the same: a seed draws other numbers elsewhere
        else:
            self.A = nn.Parameter(A)
        self.B = nn.Parameter(torch.zeros(d_out, r, **like))
        self.scale, self.dropout = scale, dropout

    def delta(self) -> torch.Tensor:
        return self.scale * self.B @ self.A  # (d_out, d_in)

    def cost(self) -> BranchCost:
        (r, d_in), d_out = self.A.shape, self.B.shape[0]
        down, up = 2 * r * d_in, 2 * r * d_out  # A x, and B times that
        return BranchCost(
            keeps_input=self.A.requires_grad,  # for the gradient of A
            kept=r,  # scale * A x, for the gradient of B
            forward=down + up,
            # of B, of A x and of A; with A frozen the second is only a step on the way to the gradient of x
            backward=up + up + down if self.A.requires_grad else up,
            backward_input=down if self.A.requires_grad else up + down,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)  # for the product alone; what is trained is self.A
        return F.linear(F.linear(x, A) * self.scale, B)  # (..., d_in) -> (..., r) -> (..., d_out)

    def adjust(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # beside a 16-bit base x stays in 16 bits, or autograd would keep a 32-bit copy of it for each target
        return y + self(x)
