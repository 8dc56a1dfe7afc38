"""The exercises of notebooks/foundations/anatomy.ipynb."""

import math

import torch
from transformers import MistralConfig, MistralModel

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(
    hint="Add up outputs times inputs of seven weights. The width of a head is d_model / heads.",
    inputs=[(4096, 14336, 32, 8), (256, 700, 8, 2), (64, 100, 4, 4)],
)
def gated_block(d_model, d_ff, heads, kv_heads):
    """Counted on a model of one block, on shapes alone."""
    sizes = dict(hidden_size=d_model, intermediate_size=d_ff, num_hidden_layers=1, vocab_size=8)
    heads = dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    with torch.device("meta"):
        model = MistralModel(MistralConfig(**sizes, **heads))
    return sum(math.prod(site.shape) for site in gl.anatomy.Anatomy(model).linears())


@exercise(
    hint="The paths are among those that are printed. The projections stand within self_attn, behind a dot; "
    "the feed-forward network has no level of its own."
)
def row():
    """Of OPT, by the names that transformers gives its layers."""
    attention = {f"self.{role}": f"self_attn.{role}_proj" for role in "qkv"}
    return attention | {"self.o": "self_attn.out_proj", "ffn.in": "fc1", "ffn.out": "fc2"}


@exercise(
    hint="A state is passed if what trains stands below it. Does the encoder stand above anything that the "
    "decoder trains? And where does each block of the decoder read?"
)
def passed():
    """Measured: by which states, of the encoder and of the decoder, autograd goes back."""
    trained = {
        "cross": gl.LoRA(targets="cross.k").on(layers=0),
        "last": gl.LoRA(targets="self.v").on(layers=3, stack="encoder"),
    }
    found = {}
    for name, method in trained.items():
        model, _ = gl.load_backbone("tiny-t5")
        gl.attach(model, method)
        output = model(**gl.token_batch(model, 2, 8), output_hidden_states=True)
        stacks = output.encoder_hidden_states, output.decoder_hidden_states
        found[name] = tuple(sum(state.requires_grad for state in states) for states in stacks)
    return found
