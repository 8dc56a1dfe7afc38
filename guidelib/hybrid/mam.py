"""MAM, the mix-and-match adapter - a prefix in each attention, an adapter beside each feed-forward network.
He et al. 2022, arXiv:2110.04366, section 4.6.

    MAM = PrefixTuning(30) + ParallelAdapter(512, scale=4)

From the paper's comparison of the parts: attention is changed best by a small prefix, the feed-forward
network by a large parallel adapter, scaled.  count: the sum of both; nothing can be merged.
"""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.additive.adapters.bottleneck import ParallelAdapter
from guidelib.additive.soft_prompts.prefix import PrefixTuning
from guidelib.core.method import Expression, Method


@dataclass(frozen=True)
class MAM(Expression):
    """length: of the prefixes.  mlp: the width of the MLP that gives them while they are trained, or None.
    r, scale: width and factor of the adapters."""

    length: int = 30
    mlp: int | None = 800
    r: int = 512
    scale: float | str = 4.0

    def expression(self) -> Method:
        return PrefixTuning(self.length, self.mlp) + ParallelAdapter(self.r, scale=self.scale)
