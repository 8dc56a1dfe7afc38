"""DoRA - magnitude and direction of a weight, trained apart.  Liu et al. 2024, arXiv:2402.09353, section 4.

    V = W + (alpha / r) B A         A: (r, d_in) random,  B: (d_out, r) zero
    W' = m * V / ||V||              one m and one norm per row of V; m = ||W|| at the start, so W' = W

The norm is a constant in the backward pass (section 4.3), and the bias is not scaled.  count =
r (d_in + d_out) + d_out per target.  Merges exactly.  The authors adapt q, k, v and the feed-forward
network's up and down maps, with alpha = 2 r.

Behind NF4, m is the length of a row before it was quantised: there W' = m W / ||W|| of the quantised W at the
start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from guidelib.core.anatomy import Site, Targets
from guidelib.core.points.weight_delta import BranchCost, Delta
from guidelib.reparametrization.lora import LoRA, LowRank


@dataclass(frozen=True)
class DoRA(LoRA):
    """A rank-``r`` update of every target's direction and a trained length of every row.

    r: rank, at least 1 and at most the smaller side of the weight.  alpha: the update's scale is
    ``alpha / r``.  targets: roles (see anatomy.py).  dropout: applied to the update's input while training.
    rank_stabilized, freeze_A: as in LoRA.
    """

    r: int = 8
    alpha: float = 16.0
    targets: Targets = ("q", "k", "v", "ffn.in", "ffn.out")
    dropout: float = 0.0

    def build(self, site: Site) -> Directed:
        return Directed(super().build(site), site.weight)


class Directed(Delta):
    """m * V / ||V|| with V = W + update for one weight (d_out, d_in)."""

    additive = False

    def __init__(self, update: LowRank, weight: torch.Tensor):
        super().__init__()
        self.update = update
        self.m = nn.Parameter(self.norm(weight))

    @torch.no_grad()
    def norm(self, weight: torch.Tensor) -> torch.Tensor:
        """The length of every row of V, (d_out,).  Nowhere else does the fast path form V."""
        norm = (weight + self.update.delta()).norm(dim=1).detach()  # no_grad does not reach forward mode
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)  # a row of zeros has no direction

    def effective(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (self.m / self.norm(weight)).unsqueeze(1) * (weight + self.update.delta()), bias

    def adjust(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """y' = y + (g - 1) V x + (V - W) x with g = m / ||V||: at the start both terms are exactly zero."""
        update = self.update(x)
        v = (y if bias is None else y - bias) + update  # V x, (..., d_out)
        return y + ((self.m / self.norm(weight) - 1) * v + update).to(y.dtype)

    def cost(self) -> BranchCost:
        cost, (r, d_in), d_out = self.update.cost(), self.update.A.shape, len(self.m)
        return replace(
            cost,
            kept=cost.kept + d_out,  # V x, for the gradient of m
            kept_once=2 * d_out,  # ||V||, for the gradient of m; g - 1, for that of V x
            forward_once=2 * r * d_in * d_out,  # B A, for the norm
        )
