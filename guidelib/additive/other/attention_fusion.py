"""Attention Fusion - each token attends to its own states in all layers.  Cao, Satya Prakash and Hamza 2022,
Findings of NAACL, pp. 857-866.

    a_l = softmax over l of (q . h_l / tau),   h = sum over l of a_l h_l        q: (d,), for each token

h takes the place of the last block's states.  Our reading, since the paper's code is not public: one query q
for all layers and tokens, and nothing else.  count = d, 0.0009 % of BERT-base's blocks, as the paper says.

With q = 0 it is the mean over the layers, and the training starts there.  Weights that are the same for every
token, ELMo's scalar mix, are the case in which all states of a layer have the same product with q.

In an encoder-decoder the decoder's layers are fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, sites_in
from guidelib.core.method import Method, expect, is_number
from guidelib.core.points.part import Part
from guidelib.core.points.side import SideNetwork, SidePart, Trail
from guidelib.core.points.weight_delta import added_dtype


@dataclass(frozen=True)
class AttentionFusion(Method):
    """Fuse the states of all layers, or of those that ``.on(layers=...)`` leaves.

    temperature: tau.
    """

    temperature: float = 1.0

    def __post_init__(self):
        number = is_number(self.temperature) and self.temperature > 0
        expect(number, "temperature", self.temperature, "a positive number")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        blocks = [*anatomy.blocks()]
        last = blocks[-1][0]
        layers = tuple(layer for stack, layer, _ in blocks if stack == last)
        like = next(sites_in(blocks[-1][2], anatomy.stacks[last])).like
        query = torch.zeros(like.shape[1], device=like.device, dtype=added_dtype(like))
        return [SidePart(self, anatomy, {last: Fusion(query, layers, self.temperature)})]


class Fusion(SideNetwork):
    """The states of ``layers`` -> one."""

    def __init__(self, query: torch.Tensor, layers: tuple[int, ...], temperature: float):
        super().__init__()
        self.q, self.layers, self.temperature = nn.Parameter(query), layers, temperature

    def forward(self, trail: Trail) -> torch.Tensor:
        states = torch.stack([trail.states[layer] for layer in self.layers])  # (L, B, T, d)
        a = torch.softmax(states @ self.q / self.temperature, 0)  # (L, B, T)
        return trail.close((a.unsqueeze(-1) * states).sum(0))
