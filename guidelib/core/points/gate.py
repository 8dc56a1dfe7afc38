"""Gated - a method whose every part is multiplied by a number between 0 and 1, which the text decides.

    g = mean over the text of sigmoid(w x_t + b)        x: (T, d), what the part reads;  w: (d,), b: a number

Mao et al. 2022, arXiv:2110.07577, section 3.  A map's branch and an adapter's are multiplied by g, of a
prefix both the keys and the values.  count: d + 1 for each part.  A gate that depends on what is read cannot
be merged.

A token of a decoder must not see those behind it, so there the gate of a token is its own sigmoid; a prefix
then has keys and values of its own for every token.  That, and that padding takes no part in the mean, is our
reading: the authors tune an encoder, and their code has the padding in its mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Wrapper, expect
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call
from guidelib.core.points.prefix import PrefixPart
from guidelib.core.points.sequence import arguments, expect_places, text_in, with_front
from guidelib.core.points.sublayer import SublayerPart
from guidelib.core.points.weight_delta import DeltaPart, added_dtype

OWN, OTHER = "attention_mask", "encoder_attention_mask"  # of a block: its own text, and the encoder's


@dataclass(frozen=True)
class Gated(Wrapper):
    """Give each part of a method a gate of its own.

    Its w starts from N(0, 0.02) and its b at zero, so it starts near 1/2.  Raises ValueError for a method
    that trains or rewrites parameters of the base, replaces a weight by one that depends on it, or adds to
    the text: nothing is added there that could be multiplied; and for one that is gated already.
    """

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        name = type(self.method).__name__
        members = getattr(self.method, "methods", (self.method,))
        mine = [type(m).__name__ for m in members if m.select(anatomy) or m.rewrites(anatomy)]
        if mine:
            raise ValueError(f"method must train or rewrite nothing of the base to be gated, got {mine[0]}")
        backwards = {each.stack for each in anatomy.attentions("self") if each.looks_back}
        texts, parts = Texts(self, anatomy), self.method.parts(anatomy, saved)
        for part in parts:
            if part.serves:
                continue
            expect(part.gating is None, "method", self.method, "one that is not gated already")
            if (reads := _reads(part)) is None:
                raise ValueError(
                    f"method must add something beside a map to be gated, got {name}: {part.name}"
                )
            stack, like, mask = reads
            part.gating = Gate(like, texts, None if stack in backwards and mask == OWN else mask)
            part.why_not = "its gate depends on the text"
        return [texts, *parts]


def _reads(part: Part) -> tuple[str, torch.Tensor, str] | None:
    """The stack that ``part`` stands in, a tensor (..., d) like what it reads, and which text that is."""
    if isinstance(part, PrefixPart):
        return part.attention.stack, part.attention.key.like, OWN  # the queries, also where they look across
    if isinstance(part, SublayerPart):
        return part.sublayer.stack, part.sublayer.out.like.t(), OWN
    if isinstance(part, DeltaPart) and part.delta.additive and not part.delta.last:
        across = part.site.role in ("cross.k", "cross.v")
        return part.site.stack, part.site.like, OTHER if across else OWN
    return None


class Texts(Part):
    """Notes for each block which places are text and which are padding."""

    serves = True

    def __init__(self, method: Gated, anatomy: Anatomy):
        super().__init__()
        self.name, self.method = type(method).__name__, method
        self._blocks = tuple(block for _, _, block in anatomy.blocks())

    def plug(self) -> None:
        for block in self._blocks:
            self.around(block, self._see)

    def _see(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(arguments(call.module), args, strict=False)) | kwargs
        masks = {name: given[name] for name in (OWN, OTHER) if given.get(name) is not None}
        for mask in masks.values():
            expect_places(mask, call.module, self.name)
        with passes.noted({self: {name: text_in(mask) for name, mask in masks.items()}}):
            return self.frame(call, *args, **kwargs)


class Gate(nn.Module):
    """x (B, T, d) -> g (B, 1, 1), one for each text; without ``mask`` (B, T, 1), one for each token.

    mask: which of a block's texts x is.
    """

    def __init__(self, like: torch.Tensor, texts: Texts, mask: str | None):
        super().__init__()
        made = {"device": like.device, "dtype": added_dtype(like)}
        self.weight = nn.Parameter(torch.empty(1, like.shape[-1], **made).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(1, **made))
        self._texts, self.mask = (texts,), mask  # in a tuple, so that it is not registered as a child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # beside a 16-bit base x stays in 16 bits, or autograd would keep a 32-bit copy of it
        score = F.linear(x, self.weight.to(x.dtype)).to(self.weight.dtype) + self.bias
        g = score.sigmoid()
        if self.mask is None:
            return g
        seen = passes.notes().get(self._texts[0], {}).get(self.mask)
        if seen is None:
            return g.mean(1, keepdim=True)
        seen = with_front(seen.to(g.dtype), g.shape[1])
        return (g * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
