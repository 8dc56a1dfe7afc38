"""What joins the text in a sequence, and comes out of it again: tokens before it, padding, masks, caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.values import has_values


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
        raise unknown_attention(name, found)


def unknown_attention(name: str, found: str | None) -> ValueError:
    """The error of ``name`` beside a kind of attention whose masks, or keys, are out of reach."""
    return ValueError(
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


def expect_growing(cache: Any, name: str) -> None:
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
