"""Which module of which architecture plays which role.  To support a further architecture, add a row to
``ARCHITECTURES``.

A path is relative to a block of its stack.  This table is the only place where names of modules stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import transformers

ATTENTION_ROLES = ("q", "k", "v", "o")
FFN_ROLES = ("ffn.in", "ffn.gate", "ffn.out")
GROUPS = {  # a target name that stands for several roles
    "all": lambda role: True,
    "attn": lambda role: not role.startswith("ffn"),
    "self": lambda role: role.startswith("self."),
    "cross": lambda role: role.startswith("cross."),
    "ffn": lambda role: role.startswith("ffn."),
}
TARGET_NAMES = (
    *ATTENTION_ROLES,
    *(f"{kind}.{role}" for kind in ("self", "cross") for role in ATTENTION_ROLES),
    *FFN_ROLES,
    *GROUPS,
)
LOADED = "_is_hf_initialized"  # transformers' mark of a parameter that a checkpoint held
PRETRAINED = ("MODEL", "MODEL_FOR_PRETRAINING", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM")
PRETRAINED += ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",)


Ends = dict[str, tuple[str, str | None]]


@dataclass(frozen=True)
class Stack:
    """One stack of blocks: where its list is, and where each role is inside a block.

    A path that a model does not have (the gate of an ungated feed-forward network, the cross-attention of a
    BERT that is no decoder) is simply not there.  ``path[i/n]`` is the i-th of n equal parts of a fused
    projection's outputs.

    ``body`` is the module that embeds the tokens and runs the blocks, ``closing`` the norm behind the last of
    them, seen from there; ``rotary``: whether it turns queries and keys by their position.

    ``ends`` gives each sub-layer's norm and the dropout that acts on its output before the residual is added:
    a path, None where there is none, "" where the block calls it as a function.  Where the norm is missing,
    so is the sub-layer.  ``pre_norm``: whether the norm stands at the sub-layer's start instead of behind the
    residual sum.
    """

    blocks: str
    linears: dict[str, str]
    ends: Ends = field(default_factory=dict)
    pre_norm: bool = False
    body: str = ""
    closing: str = ""
    rotary: bool = False


def _stack(
    blocks: str,
    attention: dict[str, tuple[str, str, str, str, str]],
    ffn: dict[str, str],
    ends: Ends,
    **more: Any,
) -> Stack:
    linears = {
        f"{kind}.{role}": f"{module}.{name}" if module else name
        for kind, (module, *names) in attention.items()
        for role, name in zip(ATTENTION_ROLES, names, strict=True)
    }
    return Stack(blocks, linears | ffn, ends, **more)


_BERT_MAPS = ("self.query", "self.key", "self.value", "output.dense")
_BERT = {
    "encoder": _stack(
        "encoder.layer",
        {"self": ("attention", *_BERT_MAPS), "cross": ("crossattention", *_BERT_MAPS)},
        {"ffn.in": "intermediate.dense", "ffn.out": "output.dense"},
        {
            "self": ("attention.output.LayerNorm", "attention.output.dropout"),
            "cross": ("crossattention.output.LayerNorm", "crossattention.output.dropout"),
            "ffn": ("output.LayerNorm", "output.dropout"),
        },
    )
}
_DISTILBERT = {
    "encoder": _stack(
        "transformer.layer",
        {"self": ("attention", "q_lin", "k_lin", "v_lin", "out_lin")},
        {"ffn.in": "ffn.lin1", "ffn.out": "ffn.lin2"},
        {"self": ("sa_layer_norm", None), "ffn": ("output_layer_norm", "ffn.dropout")},
    )
}
_GPT2 = {
    "decoder": _stack(
        "h",
        {
            "self": ("attn", "c_attn[0/3]", "c_attn[1/3]", "c_attn[2/3]", "c_proj"),
            "cross": ("crossattention", "q_attn", "c_attn[0/2]", "c_attn[1/2]", "c_proj"),
        },
        {"ffn.in": "mlp.c_fc", "ffn.out": "mlp.c_proj"},
        {
            "self": ("ln_1", "attn.resid_dropout"),
            "cross": ("ln_cross_attn", "crossattention.resid_dropout"),
            "ffn": ("ln_2", "mlp.dropout"),
        },
        pre_norm=True,
        closing="ln_f",
    )
}
_LLAMA = {
    "decoder": _stack(
        "layers",
        {"self": ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")},
        {"ffn.in": "mlp.up_proj", "ffn.gate": "mlp.gate_proj", "ffn.out": "mlp.down_proj"},
        {"self": ("input_layernorm", None), "ffn": ("post_attention_layernorm", None)},
        pre_norm=True,
        closing="norm",
        rotary=True,
    )
}


def _t5_ffn(layer: int) -> dict[str, str]:
    path = f"layer.{layer}.DenseReluDense"
    return {"ffn.in": f"{path}.wi|{path}.wi_1", "ffn.gate": f"{path}.wi_0", "ffn.out": f"{path}.wo"}


def _t5_ends(*kinds: str) -> Ends:
    return {kind: (f"layer.{i}.layer_norm", f"layer.{i}.dropout") for i, kind in enumerate(kinds)}


_T5_SELF = {"self": ("layer.0.SelfAttention", "q", "k", "v", "o")}
_T5_CROSS = {"cross": ("layer.1.EncDecAttention", "q", "k", "v", "o")}
_T5_NORMS = {"pre_norm": True, "closing": "final_layer_norm"}
_T5 = {
    "encoder": _stack(
        *("encoder.block", _T5_SELF, _t5_ffn(1), _t5_ends("self", "ffn")), **_T5_NORMS, body="encoder"
    ),
    "decoder": _stack(
        *("decoder.block", _T5_SELF | _T5_CROSS, _t5_ffn(2), _t5_ends("self", "cross", "ffn")),
        **_T5_NORMS,
        body="decoder",
    ),
}
_BART_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_BART_FFN = {"ffn.in": "fc1", "ffn.out": "fc2"}
_BART_SELF = {"self": ("self_attn", *_BART_PROJECTIONS)}
_BART_CROSS = {"cross": ("encoder_attn", *_BART_PROJECTIONS)}
_BART_ENDS = {"self": ("self_attn_layer_norm", ""), "ffn": ("final_layer_norm", "")}
_BART_CROSS_ENDS = {  # in the order of the block
    "self": _BART_ENDS["self"],
    "cross": ("encoder_attn_layer_norm", ""),
    "ffn": _BART_ENDS["ffn"],
}
_BART = {
    "encoder": _stack("encoder.layers", _BART_SELF, _BART_FFN, _BART_ENDS, body="encoder"),
    "decoder": _stack(
        "decoder.layers", _BART_SELF | _BART_CROSS, _BART_FFN, _BART_CROSS_ENDS, body="decoder"
    ),
}

ARCHITECTURES: dict[str, dict[str, Stack]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("t5", "mt5"), _T5),
    "bart": _BART,
    "mbart": {name: replace(stack, pre_norm=True, closing="layer_norm") for name, stack in _BART.items()},
}


POSITION_TABLES = ("position_embeddings", "wpe", "embed_positions")
WIDTHS = (  # the fields of a configuration that a narrower copy of a block divides
    *("hidden_size", "d_model", "n_embd", "dim", "head_dim", "d_kv"),
    *("intermediate_size", "d_ff", "n_inner", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"),
)
# by one of these an attention says how wide a head is
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")
COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")  # the first token has position padding id + 1


def is_pretrained(model: transformers.PreTrainedModel) -> bool:
    """Whether transformers has the class of ``model`` for pretraining or for a bare backbone, so that none of
    its layers belong to a task."""
    classes = (getattr(transformers, f"{name}_MAPPING").get(type(model.config), None) for name in PRETRAINED)
    return type(model) in classes
