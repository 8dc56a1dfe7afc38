"""The exercises of notebooks/additive/soft_prompts.ipynb."""

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(
    hint="A prompt makes queries and keys longer, and what the weights multiply; a prefix only the keys.",
    inputs=[
        (places, T, 12 * 64**2, 64)
        for places, T in (
            (("prompt", 20), 32),
            (("prefix", 20), 32),
            (("prompt", 7), 128),
            (("prefix", 9), 64),
        )
    ],
)
def flops(added, T, N, d):
    """Product by product: forward, and backward without the weights' gradients."""
    kind, n = added
    rows, keys = (T + n if kind == "prompt" else T), T + n
    weights = 2 * rows * N
    scores = values = 2 * rows * keys * d
    return weights + scores + values + weights + 2 * (scores + values)


@exercise(hint="Keys and values: two for each layer, each as wide as the model, two bytes a number.")
def held():
    """Counted: two bytes for each number of a prefix of 20 on LLaMA-7B."""
    from transformers import LlamaConfig

    return 2 * gl.count(LlamaConfig(), gl.PrefixTuning(length=20)).trainable
