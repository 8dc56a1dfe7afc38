"""UniPELT - a prefix, an adapter and LoRA in every layer, each behind a gate.  Mao et al. 2022,
arXiv:2110.07577.

    UniPELT = Gated(PrefixTuning(10, 512) + PfeifferAdapter(48) + LoRA(8, alpha=8))

Each gate is a number between 0 and 1 for each text, so the text decides what is used for it, and where.
LoRA's has the place of its alpha / r.  count: the sum of the parts, and d + 1 for each gate; nothing can be
merged.

A gate of 0 takes an adapter and LoRA away.  It does not take a prefix away: its keys are zero then, have the
score 0 and not minus infinity, and draw attention to values of zero.
"""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.additive.soft_prompts.prefix import PrefixTuning
from guidelib.core.method import Expression, Method, expect, is_whole
from guidelib.core.points.gate import Gated
from guidelib.reparametrization.lora import LoRA


@dataclass(frozen=True)
class UniPELT(Expression):
    """length: of the prefixes.  mlp: the width of the MLP that gives them while they are trained, or None.
    bottleneck: the width of the adapters.  r: LoRA's rank.  lora: whether LoRA is there ("AP" without)."""

    length: int = 10
    mlp: int | None = 512
    bottleneck: int = 48
    r: int = 8
    lora: bool = True

    def expression(self) -> Method:
        expect(is_whole(self.bottleneck), "bottleneck", self.bottleneck, "a whole number of at least 1")
        expect(isinstance(self.lora, bool), "lora", self.lora, "True or False")
        parts = PrefixTuning(self.length, self.mlp) + PfeifferAdapter(self.bottleneck)
        return Gated(parts + LoRA(self.r, alpha=self.r) if self.lora else parts)
