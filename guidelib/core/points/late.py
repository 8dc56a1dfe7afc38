"""ContextInjector - a late prompt: one that joins the states of the text before a block halfway up.

It is in the sequence from there on, as a prompt is that stands before the embedded tokens, and is left where
the body ends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import Body
from guidelib.core.method import Method
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call
from guidelib.core.points.sequence import (
    arguments,
    cache_in,
    expect_growing,
    expect_places,
    join,
    text_in,
    text_of,
    with_front,
)


class LatePart(Part):
    """A prompt that joins the text before one block, and leaves it where the body ends.

    blocks: that block, whose number is ``layer``, and those above it.  causal: whether tokens see only those
    before them.  prompt: a module that gives it for so many texts or, if it ``reads``, for the mean of each
    text's states.
    """

    why_not = "it stands in the sequence, beside the text"

    def __init__(
        self,
        method: Method,
        body: Body,
        blocks: list[nn.Module],
        layer: int,
        causal: bool,
        prompt: nn.Module,
        reads: bool,
    ):
        super().__init__()
        self.name, self.method = f"{type(method).__name__}_{body.stack}", method
        self.prompt, self.layer, self.causal, self.reads_text = prompt, layer, causal, reads
        # in tuples, so that they are not children of this module
        self._blocks, self._body = tuple(blocks), (body,)
        self._arguments = arguments(blocks[0])

    @property
    def length(self) -> int:
        return self.prompt.length

    def plug(self) -> None:
        self.around(self._body[0].module, self._around)
        if isinstance(pooler := getattr(self._body[0].module, "pooler", None), nn.Module):
            self.hook(pooler, self._pool, before=True, first=True)
        for block in self._blocks:
            self.around(block, self.frame)
            self.around(block, self._longer)

    def _around(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Around the body: a note of how long the text is, and of the block before which the prompt joins it,
        since a block may be left out."""
        given = dict(zip(arguments(call.module), args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if tokens is None:
            return call(*args, **kwargs)  # which says what is wrong
        passes.remember(call.module)
        with passes.noted({self: _Seat(tokens.shape[1])}):
            return text_of(call(*args, **kwargs), self._out)

    def _out(self, states: torch.Tensor) -> torch.Tensor:
        return states[:, -passes.notes()[self].text :]

    def _pool(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._out(args[0]), *args[1:]) if self in passes.notes() else args

    def _longer(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        layer, length = self.layer + self._blocks.index(call.module), self.length
        seat = passes.notes()[self]
        states, mask, cache = given.get("hidden_states"), given.get("attention_mask"), cache_in(given)
        expect_growing(cache, self.name)
        if cache is not None and layer < len(cache.layers):
            window = getattr(cache.layers[layer], "sliding_window", None)
            seen = cache.get_seq_length(layer)
            if window is not None and seen >= window:  # the layer has dropped the prompt first
                raise ValueError(
                    f"use_cache: {self.name} and {seen - length} tokens do not fit into the {window} places "
                    "of this model's sliding window, to which a cache is cut; use_cache=False is accepted"
                )
        new = cache is None or not cache.get_seq_length(layer)  # or the prompt is in the cache already
        if new and seat.layer in (None, layer):  # this one, when it is computed again
            seat.layer, seat.text = layer, states.shape[1]  # beside another part's prompt
            given["hidden_states"] = join(self._made(states, mask), states, None)
        if mask is not None:
            expect_places(mask, call.module, self.name)
            given["attention_mask"] = self._seen(mask, new)
        if (bias := given.get("position_bias")) is not None:
            given["position_bias"] = F.pad(bias, (length, 0, length if new else 0, 0))
        if new and given.get("position_ids") is not None:
            given["position_ids"] = F.pad(given["position_ids"], (length, 0))
        if new and (turns := given.get("position_embeddings")) is not None:
            given["position_embeddings"] = tuple(
                F.pad(turn, (0, 0, length, 0), value=value) for turn, value in zip(turns, (1, 0), strict=True)
            )  # cosines of 1 and sines of 0
        # as they came: reentrant checkpointing has gradients for what it is given by position
        output = call(*[given.pop(name) for name in self._arguments[: len(args)]], **given)
        single = not isinstance(output, tuple)
        states, *rest = (output,) if single else output
        if bias is not None:  # T5's is handed on to the next block
            rest[0] = bias
        if call.module is self._blocks[-1]:
            states = self._out(states)
        return states if single else (states, *rest)

    def _made(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The prompt (B, l, d)."""
        if self.reads_text:
            seen = torch.ones_like(states[..., :1])
            if mask is not None:
                seen = with_front(text_in(mask).to(states.dtype), states.shape[1])
            mean = (states * seen).sum(1) / seen.sum(1)
            prompt = self.prompt(mean.to(next(self.prompt.parameters()).dtype))  # 32 bits beside 16
        else:
            prompt = self.prompt(len(states)).expand(len(states), -1, -1)
        return prompt.to(states.dtype)

    def _seen(self, mask: torch.Tensor, new: bool) -> torch.Tensor:
        """The mask (B, 1, queries, keys) with the prompt among the keys and, if it is new, the queries."""
        shown, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
        longer, n = F.pad(mask, (self.length, 0), value=shown), self.length
        if not new or mask.shape[2] == 1 and not self.causal:
            return longer
        if not self.causal:
            own = longer[:, :, :1].expand(-1, -1, n, -1)
        else:
            own = longer.new_full((n, n), hidden).masked_fill(
                torch.ones(n, n, dtype=torch.bool, device=mask.device).tril(), shown
            )
            own = F.pad(own, (0, mask.shape[3]), value=hidden).expand(*mask.shape[:2], -1, -1)
        return torch.cat((own, longer), 2)


class _Seat:
    """Of one pass: how many places the text has, and before which block a late prompt joined it."""

    def __init__(self, text: int):
        self.text, self.layer = text, None
