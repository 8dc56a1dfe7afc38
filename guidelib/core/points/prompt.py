"""ContextInjector - a prompt of a method's own in the sequence that a model attends to, beside the text.

A prompt is l vectors (l, d) in the sequence of a stack, right before the embedded tokens of a text.  It takes
positions and mask entries, and every block sees it.  What comes out of the stack is the text's again, so
heads, poolers, labels and logits are none the wiser; only a decoder that attends to an encoder sees its
prompt.

With padding on the left, a prompt stands behind it.  Where a model is told its positions, they are counted
from the text's first token, and the vectors themselves may stand before the padding, which nobody can tell.

With a cache, a prompt is in it after the first pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from guidelib.core.anatomy import Body
from guidelib.core.method import Method
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call
from guidelib.core.points.sequence import arguments, cache_in, expect_growing, join, padding, text_of, without
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
        expect_growing(cache, self.name)
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
