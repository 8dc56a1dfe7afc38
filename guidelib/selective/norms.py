"""Norm tuning - train the normalisation layers and nothing else.  Qi et al. 2022, arXiv:2211.08682.

    LN(x) = g * (x - mean) / sd + b,    RMS(x) = g * x / rms        g and b trained        * element-wise

count = 2 d for each LayerNorm, d for each RMS norm: on BERT 2 d (2 L + 1) with the norm of the embedding.
They are the model's own, so there is nothing to merge.
"""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.core.anatomy import Anatomy, expect_numbers
from guidelib.core.points.selection import Selection


@dataclass(frozen=True)
class NormTuning(Selection):
    """Train gains and biases of all norms, whatever they are called in the model; restricted with ``on``,
    those of the blocks, without the one of the embedding or the one that closes a stack."""

    def select(self, anatomy: Anatomy) -> set[str]:
        names = anatomy.norms().keys() & (anatomy.parameters().keys() - anatomy.task_head())
        expect_numbers({name: anatomy.norms()[name] for name in names})
        return names
