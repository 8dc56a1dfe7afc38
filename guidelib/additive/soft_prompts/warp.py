"""WARP - prompt vectors around a masked token, and the classes are read there.
Hambardzumyan, Khachatrian and May 2021, arXiv:2101.00121.

    E' = [P; mask; E(x)],    scores = V h_mask        P: (l, d),  V: (C, d), both trained

h_mask is the last state of the masked token, V has a vector for each of C classes: the head.  count = (l + C)
d, and d more where the mask is trained; and C biases, which the head of transformers has besides.  The model
was pretrained to say at such a place what is missing there, and the prompt asks it in a way that the classes
can be read off.

Our reading: the vectors stand before the text, where the authors' stand around it as well; and a backbone
that has lost its mask token in later training gets one to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guidelib.additive.soft_prompts.prompt import Vectors, first_body, frequent
from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Method, expect, is_whole
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.prompt import PromptPart
from guidelib.core.points.sequence import text_of
from guidelib.core.points.weight_delta import added_dtype


@dataclass(frozen=True)
class WARP(Method):
    """``length`` trained vectors and a masked token before the text of an encoder, whose head reads the
    masked token.

    mask: the id of the mask token, which stays frozen; None: its vector is trained as the others are.
    """

    length: int = 20
    mask: int | None = None

    def __post_init__(self):
        expect(is_whole(self.length), "length", self.length, "a whole number of at least 1")
        right = self.mask is None or is_whole(self.mask, 0)
        expect(right, "mask", self.mask, "a token's id or None")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        body = first_body(anatomy)
        classes = bool(anatomy.task_head()) and body.follower is None
        expect(
            classes and not any(attention.looks_back for attention in anatomy.attentions()),
            "model",
            f"a {type(anatomy.model).__name__}",
            "an encoder with a task head, which reads the masked token",
        )
        table = body.embedding.weight
        own = Vectors(frequent(body, self.length + (self.mask is None)))
        if self.mask is None:
            return [Masked(self, body, own)]
        fits = self.mask < len(table)
        expect(fits, "mask", self.mask, f"a token's id below {len(table)}, the size of the vocabulary")
        return [Masked(self, body, WithMask(own, table[self.mask].detach().to(added_dtype(table))))]


class Masked(PromptPart):
    """A prompt whose last vector is the masked token.  Its state stands at each of the text's places when the
    body ends, so that every head reads it, whatever it makes of a text."""

    def _text(self, output: Any, start: torch.Tensor | None) -> Any:
        return text_of(output, lambda states: self._read(states, start))

    def _pool(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._read(args[0], passes.notes().get(self)), *args[1:])

    def _read(self, states: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        """``start``: how many places of each text are padding, before which the prompt does not stand."""
        n = self.length
        if start is None:
            masked = states[:, n - 1 : n]
        else:
            at = (start + n - 1).unsqueeze(-1).expand(-1, 1, states.shape[2])
            masked = states.gather(1, at)
        return masked.expand(-1, states.shape[1] - n, -1)


class WithMask(nn.Module):
    """Trained vectors, and behind them a frozen one."""

    def __init__(self, vectors: Vectors, mask: torch.Tensor):
        super().__init__()
        self.vectors = vectors
        self.register_buffer("mask", mask[None].clone(), persistent=False)

    @property
    def length(self) -> int:
        return self.vectors.length + 1

    def forward(self, rows: int = 1) -> torch.Tensor:
        return torch.cat((self.vectors(rows), self.mask))
