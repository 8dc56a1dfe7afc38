"""The exercises of notebooks/reparametrization/lora.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="With W' = W + s B A and the gradient G of W', the gradient of B is s G A^T. And that of A?",
    inputs=[(*draw((10, 6), (2, 6)), scale, lr) for scale, lr in ((2.0, 0.1), (0.5, 0.1), (1.0, 0.3))],
    tolerance=1e-5,
)
def first_step(G, A, scale, lr):
    """What the first step of SGD adds to the weight.  At B = 0 the gradient of A is zero."""
    B = -lr * scale * G @ A.T
    return scale * B @ A


@exercise(
    hint="B A has the shape (d_out, d_in). What is stored is a transpose.",
    inputs=[(*draw((6, 10), (2, 6), (10, 2)), scale) for scale in (0.5, 1.0, 2.0)],
    tolerance=1e-5,
)
def merge(stored, A, B, scale):
    return stored + scale * torch.einsum("or,ri->io", B, A)


@exercise(hint="A branch keeps scale * A x, which has r numbers for each token. There are 12 branches.")
def kept():
    """Measured: by how many bytes what autograd keeps grows from rank 8 to rank 64, on 8 x 32 tokens."""
    return more_saved(gl.LoRA(r=8), gl.LoRA(r=64))
