"""The exercises of notebooks/additive/ia3.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="A number multiplies its whole row. So its gradient is a sum over that row, of G times W.",
    inputs=[(*draw((5, 3), (5, 3)), lr) for lr in (0.1, 1.0)],
    tolerance=1e-5,
)
def first_step(G, W, lr):
    """What the first step of SGD adds to diag(l) W, from l = 1."""
    vector = torch.ones(len(W), requires_grad=True)
    (G * (vector[:, None] * W)).sum().backward()
    return -lr * vector.grad[:, None] * W


@exercise(
    hint="Stored transposed, an output is a column of the weight. The first third, the queries, stays.",
    inputs=[draw((4, 12), (12,), (4,), (4,))],
)
def merge(weight, bias, l_k, l_v):
    """The weight (d, 3d) and the bias (3d,) of GPT-2's fused layer, with both vectors in them."""
    d = len(l_k)
    weight, bias = weight.clone(), bias.clone()
    for thirds in (weight, bias):
        thirds[..., d : 2 * d] *= l_k
        thirds[..., 2 * d :] *= l_v
    return weight, bias


@exercise(
    hint="(IA)^3 keeps what it scales. LoRA keeps the input of a weight for A, once where two weights share "
    "it, and A x for B. Layers 6, tokens 8 x 32."
)
def kept():
    """Measured: by how many bytes more autograd keeps with (IA)^3 than with LoRA on the same weights."""
    return more_saved(gl.LoRA(r=8, targets=("k", "v", "ffn.out")), gl.IA3())
