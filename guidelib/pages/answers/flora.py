"""The exercises of notebooks/reparametrization/flora.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="Merging pays 2 r d_out d_in FLOPs once. What do the two thin products cost for each token?",
    inputs=[(384, 384), (768, 3072), (3072, 768)],
)
def crossing(d_out, d_in):
    """After how many tokens forming B A has cost as much as applying the factors to each of them."""
    r = 4  # any
    once = 2 * r * d_out * d_in
    per_token = 2 * r * d_in + 2 * r * d_out
    return once / per_token


@exercise(
    hint="Scale the input, multiply by W, scale the output, for each k, and sum. What is one row's own must "
    "meet all of its tokens.",
    inputs=[draw((3, 7, 5), (4, 5), (3, r, 5), (3, 4, r)) for r in (1, 2, 3)],
    tolerance=1e-4,
)
def fast(x, W, A, B):
    """With a weight for each row."""
    return torch.einsum("noj,ntj->nto", W * (B @ A), x)


@exercise(hint="The gradient of b_k needs what b_k scales. And that of a_k? Is it more for a larger r?")
def kept():
    """Measured: by how many bytes what autograd keeps grows from rank 1 to rank 4, on 8 x 32 tokens."""
    return more_saved(gl.FLoRA(r=1), gl.FLoRA(r=4))
