"""AdaMix - a mixture of adapters that ends as one.  Wang et al. 2022, arXiv:2205.12410, sections 3.1 to 3.4.

    training    h <- h + W_up^(j) phi(W_down^(i) h)      i, j drawn at random, once per layer and forward pass
    afterwards  h <- h + mean_j W_up^(j) phi(mean_i W_down^(i) h)             one adapter, at no further cost

W_down (r, d), W_up (d, r), both with biases; behind the feed-forward network.  All experts start as copies
of one another, so that routing alone tells them apart.  To the loss of a pass comes its disagreement with a
second pass, whose experts are drawn anew:

    consistency * (KL(p1 || p2) + KL(p2 || p1)) / 2      in each term the first argument gets no gradient

stored count = 2 d r + r + d per adapter, as for one expert, once training has ended.  Trained are M times the
maps that are not shared.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.additive.adapters.bottleneck import Adapter
from guidelib.core.anatomy import Sublayer, Targets
from guidelib.core.method import Attached, expect, is_number, is_whole
from guidelib.core.points.passes import twin
from guidelib.core.points.sublayer import part_name
from guidelib.core.values import draw

SHARED = ("up", "down", "none")


@dataclass(frozen=True)
class AdaMix(Adapter):
    """``experts`` adapters behind each feed-forward network, routed at random and averaged when ``fit`` ends.

    shared: the map that all experts have in common, "up" (the authors' default), "down" or "none".
    consistency: weight of the disagreement of two passes; 0 saves the second one.  The rest as for
    `Adapter`.  In evaluation mode the experts' weights are averaged already.  The starting values are our
    choice.
    """

    r: int = 48
    sublayers: Targets = ("ffn",)
    norms: bool = False
    experts: int = 4
    shared: str = "up"
    consistency: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        expect(is_whole(self.experts), "experts", self.experts, "a whole number of at least 1")
        expect(self.shared in SHARED, "shared", self.shared, f"one of {', '.join(SHARED)}")
        number = is_number(self.consistency)
        expect(number and self.consistency >= 0, "consistency", self.consistency, "a number of at least 0")

    def build_all(self, sublayers: list[Sublayer], saved: Mapping[str, torch.Tensor]) -> list[nn.Module]:
        pairs = self.linear.pairs(sublayers, self.r)
        held = [p for pair in pairs for layer in pair for p in layer.parameters()]
        often = Counter(map(id, held))
        common = {id(p): p for p in held if often[id(p)] > 1}  # stays so among the copies

        def experts(layer: nn.Module, side: str, sublayer: Sublayer) -> Experts:
            n = 1 if side == self.shared else self.experts
            if saved:  # a file written after training holds the mean alone
                start = f"guidelib.{part_name(self, sublayer)}.module.{side}."
                numbers = {name[len(start) :].split(".")[0] for name in saved if name.startswith(start)}
                n = max(1, len(numbers))
            return Experts(copy.deepcopy(layer, dict(common)) for _ in range(n))

        return [
            self.bottleneck(experts(down, "down", sublayer), experts(up, "up", sublayer))
            for sublayer, (down, up) in zip(sublayers, pairs, strict=True)
        ]

    def batch_loss(
        self, attachment: Attached, batch: Mapping[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor | None:
        if not self.consistency or all(len(experts) == 1 for experts in self.experts_of(attachment)):
            return None
        first, second = outputs.logits, attachment.model(**batch).logits
        if first.dim() == 2:
            return self.consistency * disagreement(first, second).mean()
        labels = batch["labels"]  # per token: where there is one, which a decoder predicts a step ahead
        if attachment.anatomy.predicts_next:
            first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
        labelled = (labels != -100).to(first.dtype)  # as weights: choosing rows would make a GPU wait
        return self.consistency * (disagreement(first, second) * labelled).sum() / labelled.sum().clamp(min=1)

    def finish(self, attachment: Attached) -> None:
        """Replace the experts by one with their mean weights."""
        for experts in self.experts_of(attachment):
            experts.average()

    def experts_of(self, attachment: Attached) -> list[Experts]:
        parts = attachment.parts_of(self)
        return [module for part in parts for module in part.modules() if isinstance(module, Experts)]


def disagreement(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Half the symmetric KL divergence of two sets of logits (..., C): one number for each, (...)."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return (_kl(p.detach(), q) + _kl(q.detach(), p)) / 2


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


class Experts(nn.ModuleList):
    """Copies of one map, of which a random one acts in training, and the mean of their weights otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self) == 1:
            return self[0](x)
        if self.training:
            return self[draw(len(self))](x)
        return twin(self[0], self.mean())(x)

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean of each parameter over the experts, by name.  Not the mean of what the experts compute."""
        each = [dict(expert.named_parameters()) for expert in self]
        return {name: torch.stack([expert[name] for expert in each]).mean(0) for name in each[0]}

    @torch.no_grad()
    def average(self) -> None:
        for name, value in self.mean().items():
            self[0].get_parameter(name).copy_(value)
        del self[1:]
