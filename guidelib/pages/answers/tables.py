"""The exercises of notebooks/survey/tables.ipynb."""

import math

import guidelib as gl
from guidelib.pages.exercises import exercise

_GB = 10**9


@exercise(
    hint="Beside the weights there are a gradient and two moments for what is trained. What is left of the "
    "card is for activations.",
    inputs=[
        (24 * _GB, 14 * _GB, 0.1 * _GB, 8 * _GB),
        (80 * _GB, 13 * _GB, 13 * _GB, 12 * _GB),
        (16 * _GB, 13 * _GB, 0, 1.5 * _GB),
        (12 * _GB, 13 * _GB, 0.01 * _GB, 9 * _GB),
    ],
)
def tokens(card, weights, trained, kept):
    """Looked for by halving."""

    def fits(n):
        return weights + 3 * trained + n * kept / 2048 <= card

    low, high = 0, 10**9  # low fits, unless nothing does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@exercise(
    hint="A layer's matrices have d times d entries. What of each method does it have in both directions?"
)
def factors():
    """Counted on two wide models, as the nearest power of two."""
    from transformers import BertConfig

    methods = {"LoRA": gl.LoRA(), "BitFit": gl.BitFit(), "prompt": gl.PromptTuning(), "KronA": gl.KronA()}
    methods |= {"ladder": gl.LST(), "SAID": gl.IntrinsicSAID()}

    def share(method, d):
        sizes = dict(vocab_size=2, max_position_embeddings=2, num_hidden_layers=2)
        config = BertConfig(hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // 64, **sizes)
        count = gl.count(config, method)
        return count.trainable / count.total

    ratios = {name: share(method, 8192) / share(method, 4096) for name, method in methods.items()}
    return {name: 2.0 ** round(math.log2(ratio)) for name, ratio in ratios.items()}


@exercise(hint="Which shape does the matrix of the values have, and which that of the queries?")
def seventy():
    """Counted without weights."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    config = LlamaConfig(num_attention_heads=64, num_key_value_heads=8, **sizes)
    return gl.count(config, gl.LoRA(r=8)).trainable
