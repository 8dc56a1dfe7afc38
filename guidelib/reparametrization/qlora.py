"""QLoRA - LoRA beside a base in four bits.  Dettmers et al. 2023, arXiv:2305.14314.

    y = W_deq x + (alpha / r) B A x        W_deq: the frozen weight in NF4 (see nf4.py), A and B as in LoRA

Every linear map of the blocks is quantised, and by default every one has its LoRA.  So this is the sum
NF4() + LoRA(r=64, alpha=16, targets="all", dropout=0.1) under its own name.  count = that of LoRA; a file
holds A and B alone, and loading quantises the base again.  Merging writes W_deq + (alpha / r) B A in the
base's own type.  Put back into four bits, a small update is mostly rounded away.

The paper's paged optimiser moves Adam's state off a full GPU; it changes no number and is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.core.anatomy import Targets
from guidelib.reparametrization.lora import LoRA
from guidelib.reparametrization.nf4 import NF4


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA of the targets beside a base whose linear maps are all in NF4.

    r, alpha, targets, dropout: LoRA's, with the defaults of the paper's models up to 13 B.  block, double:
    NF4's.  To adapt some layers of a base that is quantised everywhere, write NF4() + LoRA().on(layers=...).
    """

    r: int = 64
    alpha: float = 16.0
    targets: Targets = "all"
    dropout: float = 0.1
    block: int = 64
    double: bool = True

    def __post_init__(self):
        super().__post_init__()
        NF4(block=self.block, double=self.double)  # refuses what is impossible

    def parts(self, anatomy, saved):
        base = NF4(block=self.block, double=self.double)
        return [*base.parts(anatomy, saved), *super().parts(anatomy, saved)]
