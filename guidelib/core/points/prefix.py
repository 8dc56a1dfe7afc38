"""ContextInjector - a prefix: P keys and values of a method's own in one attention, before those of the text.

It takes no position.  With a cache it is never in there, and joins the keys at every step.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from guidelib.core.anatomy import Attention
from guidelib.core.method import Method
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call
from guidelib.core.points.sequence import unknown_attention


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
        raise unknown_attention(type(config.parts[0].method).__name__, name)
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal and n > 1:  # the kernel's own would count from the first key
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
