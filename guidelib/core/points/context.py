"""ContextInjector - something of a method's own that a model attends to beside the text.

A prompt is l vectors (l, d) in the sequence of a stack, right before the embedded tokens of a text.  It takes
positions and mask entries, and every block sees it.  What comes out of the stack is the text's again, so
heads, poolers, labels and logits are none the wiser; only a decoder that attends to an encoder sees its
prompt.  A prefix is P keys and values in one attention, before those of the text.  It takes no position.

With padding on the left, a prompt stands behind it.  Where a model is told its positions, they are counted
from the text's first token, and the vectors themselves may stand before the padding, which nobody can tell.

With a cache, a prompt is in it after the first pass; a prefix never is, and joins the keys at every step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from guidelib.core.anatomy import Attention, Body
from guidelib.core.method import Method
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call
from guidelib.core.values import has_values


class PromptPart(Part):
    """A prompt before the tokens of one stack.

    prompt: a module that gives it for so many texts, (l, d) or one for each, (B, l, d), and says its
    ``length`` l.
    """

    why_not = "it stands in the sequence, beside the text"

    def __init__(self, method: Method, body: Body, prompt: nn.Module):
        super().__init__()
        self.name, self.method = f"{type(method).__name__}_{body.stack}", method
        self.prompt = prompt
        self._body = (body,)  # in a tuple, so that the backbone's modules are not children of this one
        self._arguments = arguments(body.module)

    @property
    def body(self) -> Body:
        return self._body[0]

    @property
    def length(self) -> int:
        return self.prompt.length

    @property
    def counted(self) -> bool:
        """Whether the model is told the positions of its tokens, and does not count them itself."""
        return "position_ids" in self._arguments

    def plug(self) -> None:
        self.around(self.body.module, self._before)
        if isinstance(pooler := getattr(self.body.module, "pooler", None), nn.Module):
            self.hook(pooler, self._pool, before=True, first=True)
        if self.body.follower is not None:
            self.around(self.body.follower, self._behind)

    def _before(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Around the body: the prompt goes in, and what comes out is the text's."""
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        tokens, embedded = given.get("input_ids"), given.get("inputs_embeds")
        if (tokens is None) == (embedded is None):
            return call(*args, **kwargs)  # which says what is wrong
        given.pop("input_ids", None)
        if embedded is None:
            embedded = self.body.embedding(tokens)
        mask, cache = given.get("attention_mask"), cache_in(given)
        _expect_growing(cache, self.name)
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be (texts, tokens), ones and zeros, beside {self.name}, got shape "
                f"{tuple(mask.shape)}"
            )
        inside = cache.get_seq_length() if cache is not None else 0  # the prompt is among them
        most, n = self.body.places, self.body.first + embedded.shape[1] + (inside or self.length)
        if most is not None and n > most:
            raise ValueError(
                f"length: {self.name} and a text of {embedded.shape[1]} tokens need {n} positions, and this "
                f"model has {most}; give it a shorter text or prompt"
            )
        new = not inside
        start = None if mask is None or self.counted else padding(mask)
        if mask is not None:
            mask = given["attention_mask"] = join(mask.new_ones(len(mask), self.length), mask, start)
        if self.counted:
            told = given.get("position_ids")
            self._expect_whole(call, embedded, mask, told, inside)
            given["position_ids"] = self._positions(told, embedded, mask, inside)
        if new:
            prompt = self.prompt(len(embedded)).to(embedded.dtype)
            prompt = prompt.expand(len(embedded), -1, -1) if prompt.dim() == 2 else prompt
            embedded = join(prompt, embedded, start)
            if (kinds := given.get("token_type_ids")) is not None:
                given["token_type_ids"] = join(kinds.new_zeros(len(kinds), self.length), kinds, start)
        given["inputs_embeds"] = embedded
        if not new:
            return call(**given)
        with passes.noted({self: start}):
            output = call(**given)
        return output if self.body.follower is not None else self._text(output, start)

    def _expect_whole(
        self,
        call: Call,
        embedded: torch.Tensor,
        mask: torch.Tensor | None,
        told: torch.Tensor | None,
        inside: int,
    ) -> None:
        """Raise ValueError if the text does not join what is in the cache, as in a further call of generate:
        transformers counts the prompt among what the cache has read, and leaves out as many tokens."""
        if not inside or any(isinstance(function.__self__, PromptPart) for function in call.behind):
            return  # the last of several prompts knows how long they are together
        n, due = embedded.shape[1], inside + self.body.first - self.length
        lost = mask.shape[1] - inside - n if mask is not None else 0
        if mask is None and told is not None and has_values(told) and not torch.compiler.is_compiling():
            lost = max(0, int(told[0, 0]) - due)
        if lost:
            raise ValueError(
                f"past_key_values: between the {inside} places of the cache and the {n} new tokens {lost} "
                f"are missing beside {self.name}; generate without a cache of an earlier call"
            )

    def _text(self, output: Any, start: torch.Tensor | None) -> Any:
        """The body's output for the text alone."""
        n = output[0].shape[1]  # of all states: a late prompt stands in front of some of them
        return text_of(output, lambda states: without(states[:, -n:], self.length, start))

    def _positions(
        self, told: torch.Tensor | None, embedded: torch.Tensor, mask: torch.Tensor | None, inside: int
    ) -> torch.Tensor:
        """The positions of what is computed now, (B, n) or (1, n): of the prompt, unless it is ``inside`` the
        cache, and of the text behind it.  ``mask`` is that of both."""
        first, length, device = self.body.first, self.length, embedded.device
        n = embedded.shape[1] + (0 if inside else length)
        if told is not None:
            if inside:
                return told + length
            own = torch.arange(first, first + length, device=device)
            return torch.cat((own.expand(len(told), -1), told + length), 1)
        if mask is None:
            return torch.arange(first + inside, first + inside + n, device=device).unsqueeze(0)
        return (mask.long().cumsum(1) + (first - 1))[:, -n:]

    def _pool(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self not in passes.notes():
            return args
        return (without(args[0], self.length, passes.notes()[self]), *args[1:])

    def _behind(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Around a decoder: it may attend to the encoder's prompt."""
        given = dict(zip(arguments(call.module), args, strict=False)) | kwargs
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None and states.shape[1] >= mask.shape[1] + self.length:
            given["encoder_attention_mask"] = join(mask.new_ones(len(mask), self.length), mask, padding(mask))
        return call(**given)


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
        _expect_growing(cache, self.name)
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


class PrefixPart(Part):
    """Keys and values of one attention, before those of the text.

    prefix: a module that gives both for so many texts, (P, 2, width) or (B, P, 2, width), with the width of
    all heads together.
    """

    why_not = "it takes part in a softmax, and no weight can"

    def __init__(self, method: Method, attention: Attention, prefix: nn.Module):
        super().__init__()
        self.name = f"{type(method).__name__}_{attention.name.replace('.', '_')}"
        self.method, self.prefix = method, prefix
        self._attention = (attention,)
        self._eager = sys.modules[type(attention.module).__module__].eager_attention_forward

    @property
    def attention(self) -> Attention:
        return self._attention[0]

    @property
    def place(self) -> str:
        return self.attention.name

    def plug(self) -> None:
        self.around(self.attention.block, self.frame)
        self.around(self.attention.module, self._attend)

    def _attend(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        found = call.layer.config
        whole, others = (found.whole, found.parts) if isinstance(found, _Config) else (found, ())
        config = _Config(whole, self._eager, (*others, self))
        call = call.on(passes.twin(call.layer, config=config))
        if self.gating is None:
            return call(*args, **kwargs)
        with passes.noted({self: self.gating(args[0] if args else kwargs["hidden_states"])}):
            return call(*args, **kwargs)

    def forward(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Its keys and values (B, heads, P, width of a head), in the form of the text's ``key``, and their
        gates (B, 1, T, 1) where each query has its own; a text's one has multiplied them already."""
        rows, heads, _, width = key.shape
        prefix = self.prefix(rows)  # (P, 2, heads * width)
        if prefix.dim() == 3:
            prefix = prefix.expand(rows, -1, -1, -1)
        gate = None if self.gating is None else passes.notes()[self].unsqueeze(1)
        if gate is not None and self.gating.mask is not None:
            prefix, gate = gate * prefix, None
        keys, values = prefix.to(key.dtype).view(rows, -1, 2, heads, width).permute(2, 0, 3, 1, 4)
        return keys, values, None if gate is None else gate.to(key.dtype)


class _Config:
    """An attention's configuration, which names ``_attend`` as the function to attend with."""

    _attn_implementation = "guidelib"

    def __init__(self, whole: Any, eager: Any, parts: tuple[PrefixPart, ...]):
        self.whole, self.eager, self.parts = whole, eager, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls to attend: with prefixes, and then as the model does."""
    config, (n, kept) = module.config, (query.shape[2], key.shape[2])
    name = config.whole._attn_implementation
    if name not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation must be 'sdpa' or 'eager' beside {type(config.parts[0].method).__name__}, "
            f"got {name!r}; model.set_attn_implementation('sdpa') changes it"
        )
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if (
        attention_mask is None and causal and n > 1
    ):  # it was left to the kernel, which counts from the first key
        attention_mask = torch.ones(n, kept, dtype=torch.bool, device=key.device).tril()[None, None]
    width, text, gates = query.shape[-1], key, []
    for part in config.parts:
        keys, values, gate = part(text)
        if gate is not None:
            # a query's gate multiplies its scores and the values that it takes: so the prefix meets a gated
            # copy of the query, beside the own one, and what it gives comes out beside what the text does
            kwargs["scaling"] = width**-0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
            beside = query.shape[-1]
            query = torch.cat((query, gate * query[..., :width]), -1)
            key, value = F.pad(key, (0, width)), F.pad(value, (0, width))
            keys, values = F.pad(keys, (beside, 0)), F.pad(values, (beside, 0))
            gates.append(gate.transpose(1, 2))
        elif key.shape[-1] > width:
            keys, values = (F.pad(made, (0, key.shape[-1] - width)) for made in (keys, values))
        key, value = torch.cat((keys, key), 2), torch.cat((values, value), 2)
    p = key.shape[2] - kept
    if attention_mask is not None:
        seen = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (p, 0), value=seen)
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = F.pad(bias, (p, 0))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, config.eager)
    output, weights = attend(module, query, key, value, attention_mask, is_causal=False, **kwargs)
    if not gates:
        return output, weights
    own, *others = output.split(width, -1)  # (B, T, heads, width) each
    for gate, other in zip(gates, others, strict=True):
        own = own + gate * other
    return own, weights


ALL_ATTENTION_FUNCTIONS.register(_Config._attn_implementation, _attend)


def text_of(output: Any, out: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A body's output with ``out`` of its states."""
    if isinstance(output, tuple):  # with the states of all layers behind it, (B, T, d) each
        states = (isinstance(x, tuple) and x and x[0] is not None and x[0].dim() == 3 for x in output[1:])
        rest = zip(output[1:], states, strict=True)
        return (out(output[0]), *(tuple(map(out, x)) if mine else x for x, mine in rest))
    output.last_hidden_state = out(output.last_hidden_state)
    if (states := getattr(output, "hidden_states", None)) is not None:
        output.hidden_states = tuple(map(out, states))
    return output


def arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of the module's own forward, in order."""
    return _arguments(type(module))


@cache
def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def expect_places(mask: Any, module: nn.Module, name: str) -> None:
    """Raise ValueError unless the mask that is made for ``module`` says for each token what it sees."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        configs = (getattr(m, "config", None) for m in module.modules())
        found = next((c._attn_implementation for c in configs if hasattr(c, "_attn_implementation")), None)
        raise ValueError(
            f"attn_implementation must be 'sdpa' or 'eager' beside {name}, got {found!r}; "
            "model.set_attn_implementation('sdpa') changes it"
        )


def text_in(mask: torch.Tensor) -> torch.Tensor:
    """(B, T, 1): what is text and no padding, by what the last token sees in a block's mask."""
    last = mask[:, 0, -1]
    return (last if last.dtype == torch.bool else last == 0).unsqueeze(-1)


def with_front(text: torch.Tensor, n: int) -> torch.Tensor:
    """``text`` (B, T, 1) for n places: what stands in front, of late prompts, is no padding."""
    return F.pad(text, (0, 0, n - text.shape[1], 0), value=1.0)


def cache_in(given: dict[str, Any]) -> Any:
    """The cache among the arguments; it is called so since transformers 5.24."""
    cache = given.get("past_key_values")
    return given.get("cache") if cache is None else cache


def _expect_growing(cache: Any, name: str) -> None:
    """Raise ValueError for a cache that `generate` has made as long as the text, and no longer."""
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"cache_implementation: {name} joins the sequence, for which a static cache has no room; "
            "'dynamic', transformers' default, is accepted"
        )


def padding(mask: torch.Tensor) -> torch.Tensor | None:
    """How many places of each text are padding on its left, (B, 1); None if none is, or nobody can tell."""
    compiling = torch.compiler.is_compiling()  # then no value may decide
    if not compiling and not (has_values(mask) and (mask[:, 0] == 0).any()):
        return None
    return (mask.cumsum(1) == 0).sum(1, keepdim=True)


def join(own: torch.Tensor, text: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """``own`` (B, l, ...) right before the text (B, T, ...), ``start`` places of which are padding; None:
    there is none.  Returns (B, l + T, ...)."""
    both = torch.cat((own, text), 1)
    if start is None:
        return both
    length, at = own.shape[1], torch.arange(both.shape[1], device=both.device)
    source = torch.where(at < start, at + length, torch.where(at < start + length, at - start, at))
    return _taken(both, source)


def without(both: torch.Tensor, length: int, start: torch.Tensor | None) -> torch.Tensor:
    """The text (B, T, ...) of what ``join`` has joined."""
    if start is None:
        return both[:, length:]
    at = torch.arange(both.shape[1] - length, device=both.device)
    return _taken(both, torch.where(at < start, at, at + length))


def _taken(tensor: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    index = source.view(*source.shape, *(1,) * (tensor.dim() - 2)).expand(-1, -1, *tensor.shape[2:])
    return tensor.gather(1, index)
