"""The exercises of notebooks/reparametrization/adalora.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="With all lambdas at zero, what are the gradients of P and of Q? And a change of lambda_i by 1 adds "
    "scale * P_i Q_i to the weight.",
    inputs=[(*draw((10, 6), (10, 2), (2, 6)), scale, lr) for scale, lr in ((2.0, 0.1), (0.5, 0.3))],
    tolerance=1e-5,
)
def first_step(G, P, Q, scale, lr):
    """By automatic differentiation of the loss sum(G * W'), all three trained."""
    P, Q, lam = (x.clone().requires_grad_() for x in (P, Q, torch.zeros(len(Q))))
    (G * (scale * (P * lam) @ Q)).sum().backward()
    new = [(x - lr * x.grad).detach() for x in (P, lam, Q)]
    return scale * (new[0] * new[1]) @ new[2]


@exercise(
    hint="There is one ranking for all weights. How many of the highest fall into each row?",
    inputs=[(*draw((3, 4)), budget) for budget in (12, 7, 3, 1)],
)
def allocate(scores, budget):
    """Counted against the lowest score that may stay."""
    line = scores.flatten().sort(descending=True).values[budget - 1]
    return (scores >= line).sum(1).tolist()


@exercise(
    hint="LoRA's factors are parameters, which are there anyway. scale * diag(Lambda) Q is computed, and the "
    "gradient of x needs it. Which of the 12 weights need no gradient of x?"
)
def kept():
    """Measured: by how many bytes more autograd keeps with AdaLoRA than with LoRA of the same rank."""
    return more_saved(gl.LoRA(r=12), gl.AdaLoRA(r=12, gamma=0.0, targets=("q", "v")))
