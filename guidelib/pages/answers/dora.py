"""The exercises of notebooks/reparametrization/dora.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="A change dV of a row changes its direction V / |V| by dV / |V|, less the part along the row.",
    inputs=[(*draw((5, 7), (5, 7)), m[:, 0]) for m in (draw((5, 1))[0].exp(), draw((5, 1))[0].cosh())],
    tolerance=1e-5,
)
def exact(G, V, m):
    """By automatic differentiation of the loss sum(G * W')."""
    V = V.clone().requires_grad_()
    (G * m[:, None] * V / V.norm(dim=1, keepdim=True)).sum().backward()
    return V.grad


@exercise(
    hint="One length belongs to one output. In which direction of what is stored do the outputs run?",
    inputs=[
        (*draw((6, 10), (2, 6), (10, 2)), scale, m[:, 0].exp())
        for scale, m in ((0.5, *draw((10, 1))), (2.0, *draw((10, 1))))
    ],
    tolerance=1e-5,
)
def merge(stored, A, B, scale, m):
    """Output by output."""
    rows = [stored[:, i] + scale * B[i] @ A for i in range(len(m))]
    return torch.stack([m[i] * row / row.norm() for i, row in enumerate(rows)], 1)


@exercise(
    hint="DoRA keeps V x of each target besides, one number an output: q, k, v and ffn.out are 384 wide, "
    "ffn.in is 1,536. There are 6 layers. What is kept once in a step does not grow with the tokens."
)
def token():
    """Measured: by how many bytes more than with LoRA what autograd keeps grows with one more token."""
    lora, dora = gl.LoRA(r=8, targets=gl.DoRA().targets), gl.DoRA(r=8)
    short, long = (more_saved(lora, dora, length=length) for length in (32, 33))
    return (long - short) // 8
