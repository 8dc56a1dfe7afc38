"""Configurations: what a backbone is, without its weights."""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from guidelib.materials.checkpoints import minilm_folder, smollm2_config, tiny_t5_folder

# Byte tokens need no file: 0 is padding, 1 the end, 2 unknown, and byte b is b + 3.
_IDS = dict(vocab_size=384, pad_token_id=0, bos_token_id=1, eos_token_id=1)
# At d = 32 the usual standard deviation of 0.02 gives nearly constant outputs: a test would see nothing.
_SIZE = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=256)
_BASE = _IDS | _SIZE | dict(initializer_range=0.1)
_T5 = _IDS | dict(d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64, decoder_start_token_id=0)
_BART = _BASE | dict(decoder_layers=2, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64)
TINY = {  # dropout is 0.1 by default, except where it is given here
    "tiny-bert": _BASE | dict(model_type="bert", intermediate_size=64),
    # RoBERTa counts positions from pad_token_id + 1.
    "tiny-roberta": _BASE | dict(model_type="roberta", intermediate_size=64, max_position_embeddings=257),
    "tiny-distilbert": _BASE | dict(model_type="distilbert", hidden_dim=64),
    "tiny-gpt2": _BASE | dict(model_type="gpt2", n_inner=64),
    # Two heads share a key and a value, as three do in smollm2.
    "tiny-llama": _BASE
    | dict(model_type="llama", intermediate_size=64, num_key_value_heads=2, attention_dropout=0.1),
    # A new T5 always has a tied head; False only leaves the head's input unscaled, as in T5 v1.1.
    "tiny-t5-random": _T5 | dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "tiny-t5v1-random": _T5 | dict(model_type="t5", feed_forward_proj="relu"),
    "tiny-bart": _BART
    | dict(model_type="bart", init_std=0.1, attention_dropout=0.1)
    | dict(decoder_start_token_id=1, forced_eos_token_id=1),
}


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a backbone, by the short name or hub id that `load_backbone` takes.

    No weights are read or fetched.  Raises as `load_backbone` does.
    """
    expect_name(name)
    if name in SHORT:
        return SHORT[name]()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise unreachable(name, error) from error


def _tiny_t5() -> PreTrainedConfig:
    return AutoConfig.from_pretrained(tiny_t5_folder("config.json"))


SHORT: dict[str, Callable[[], PreTrainedConfig]] = {
    "minilm": lambda: AutoConfig.from_pretrained(minilm_folder("config.json")),
    "smollm2": smollm2_config,
    "tiny-t5": _tiny_t5,
    "tiny-t5-untrained": _tiny_t5,
    **{name: lambda fields=fields: AutoConfig.for_model(**fields) for name, fields in TINY.items()},
}


def expect_name(name: object) -> None:
    """Raise ValueError for what is neither a short name nor a hub id."""
    if not (isinstance(name, str) and (name in SHORT or "/" in name)):
        accepted = ", ".join(SHORT)
        raise ValueError(
            f"name: {name!r} is not a backbone; accepted are {accepted}, or a hub id 'owner/name'"
        )


def unreachable(name: str, error: OSError) -> OSError:
    reason = str(error).strip().splitlines()[0]
    return OSError(f"name: {name!r} could not be loaded ({reason}); offline, these can: {', '.join(SHORT)}")


def architecture(config: PreTrainedConfig) -> tuple[str, type[PreTrainedModel], dict[str, Any]]:
    """Kind of backbone, class to load it with, and the arguments that leave an encoder's pooler out."""
    family, options = type(config), {}
    if config.is_encoder_decoder:
        kind, classes = "encoder-decoder", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    elif family in transformers.MODEL_FOR_MASKED_LM_MAPPING:  # before decoder, which BERT can be, too
        kind, classes = "encoder", transformers.MODEL_MAPPING
        if "add_pooling_layer" in inspect.signature(classes[family]).parameters:
            options = {"add_pooling_layer": False}
    else:
        kind, classes = "decoder", transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if family not in classes:
        raise ValueError(
            f"name: a {config.model_type} model is not an encoder, decoder or encoder-decoder of text"
        )
    return kind, classes[family], options
