"""The exercises of notebooks/additive/late_prompts.ipynb."""

import functools

import torch
from transformers import BertConfig

import guidelib as gl
from guidelib.additive.soft_prompts.late import Generator
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="A block with n tokens multiplies them by 12 matrices of d x d, and n x n scores twice by n x d.",
    inputs=[(3, 2, 32, 10, 3), (2, 1, 64, 16, 5), (4, 1, 32, 24, 20)],
)
@functools.cache
def more_flops(L, k, d, T, length):
    """Predicted on shapes: what the forward pass takes with a late prompt, less what it takes without."""
    config = BertConfig(
        hidden_size=d, num_hidden_layers=L, num_attention_heads=4, intermediate_size=4 * d, vocab_size=50
    )
    with_it, without = (
        gl.predict(config, method, batch=1, length=T).forward_flops
        for method in (gl.LatePromptTuning(length, layer=k), gl.HeadOnly())
    )
    return with_it - without


def _draw(B: int, T: int, d: int, m: int, length: int) -> tuple[torch.Tensor, ...]:
    states, *weights = draw((B, T, d), (m, d), (m,), (length * d, m), (length * d,))
    lengths = torch.arange(1, B + 1).clamp(max=T)
    return states, (torch.arange(T) < lengths[:, None]).long(), *weights


@exercise(
    hint="Multiply by the mask before you sum, and divide by the number of tokens, not by T.",
    inputs=[_draw(3, 5, 4, 6, 2), _draw(2, 4, 6, 3, 5)],
    tolerance=1e-5,
)
def generate(states, mask, W1, b1, W2, b2):
    """By guidelib's own generator, from the mean over each text without its padding."""
    d = states.shape[-1]
    made = Generator(len(W2) // d, d, len(W1))
    for p, value in zip(made.parameters(), (W1, b1, W2, b2), strict=True):
        p.data.copy_(value)
    mean = torch.stack([text[seen.bool()].mean(0) for text, seen in zip(states, mask, strict=True)])
    return made(mean).detach()


@exercise(
    hint="The block keeps 10 d numbers for each token, of the prompt as well, and a few crumbs: two for each "
    "norm, one for each head."
)
def darkened():
    """Measured: by how many bytes what autograd keeps falls from block 2 to block 3, on 8 x 32 tokens."""
    return more_saved(*(gl.LatePromptTuning(length=20, layer=layer) for layer in (3, 2)))
