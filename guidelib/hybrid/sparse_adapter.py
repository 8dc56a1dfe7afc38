"""SparseAdapter and Sparse LoRA - adapters of which few entries are there.  He et al. 2022, arXiv:2210.04284.

    SparseAdapter = Sparse(PfeifferAdapter(r))
    SparseLoRA    = Sparse(LoRA(r)), where A and B are drawn alike

"Large-sparse" is the paper's advice: with the share ``keep``, make the adapter 1 / keep times as wide, for as
many parameters.  count of a matrix: keep times its entries; biases stay.  Sparse LoRA merges, as LoRA does.

The paper prunes five methods, LoRA among them, and the survey's figure has a name for that one.  Which
adapter the name SparseAdapter means is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.core.anatomy import Site, Targets
from guidelib.core.method import Expression, Method
from guidelib.hybrid.sparse import Sparse
from guidelib.reparametrization.lora import LoRA, LowRank


@dataclass(frozen=True)
class SparseAdapter(Expression):
    """r: width of the adapters.  keep, score: see `Sparse`."""

    r: int = 64
    keep: float = 0.25
    score: str = "snip"

    def expression(self) -> Method:
        return Sparse(PfeifferAdapter(self.r), self.keep, self.score)


@dataclass(frozen=True)
class SparseLoRA(Expression):
    """r, alpha, targets: LoRA's.  keep, score: see `Sparse`."""

    r: int = 32
    alpha: float = 32.0
    targets: Targets = ("q", "v")
    keep: float = 0.25
    score: str = "snip"

    def expression(self) -> Method:
        return Sparse(DrawnLoRA(self.r, self.alpha, self.targets), self.keep, self.score)


class DrawnLoRA(LoRA):
    """LoRA whose factors both start normal with standard deviation 0.02: ``lora_init="bert"`` in the authors'
    code.  Its default, B = 0, leaves a score nothing to tell entries apart by."""

    def build(self, site: Site) -> LowRank:
        low_rank = super().build(site)
        for factor in low_rank.parameters():
            nn.init.normal_(factor, std=0.02)
        return low_rank
