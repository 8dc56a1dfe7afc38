"""The exercises of notebooks/additive/parallel.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="W_up is zero, so W_down has no gradient yet. Write the gradients of W_up and b_up, which hold an "
    "s, take the step, and put both into s (W_up phi(...) + b_up).",
    inputs=[(*draw((7, 5), (3, 5), (3,), (7, 5)), s, lr) for s, lr in ((1.0, 0.1), (4.0, 0.05))],
    tolerance=1e-4,
)
def first_step(x, W_down, b_down, G, s, lr):
    """What an adapter adds after one step of SGD, by autograd."""
    W_down, b_down = W_down.requires_grad_(), b_down.requires_grad_()
    W_up, b_up = torch.zeros(W_down.T.shape, requires_grad=True), torch.zeros(G.shape[1], requires_grad=True)
    parameters = [W_down, b_down, W_up, b_up]

    def added(down, bias, up, last):
        return s * (torch.relu(x @ down.T + bias) @ up.T + last)

    gradients = torch.autograd.grad((G * added(*parameters)).sum(), parameters)
    return added(*(p - lr * gradient for p, gradient in zip(parameters, gradients, strict=True))).detach()


@exercise(
    hint="The first maps are stacked: more rows. The second maps stand side by side: more columns. The scale "
    "goes into what is linear.",
    inputs=[
        (*draw((12, 6), (12,), (6, 12), (6,), (2, 6), (2,), (6, 2), (6,)), 1.0),
        (*draw((8, 4), (8,), (4, 8), (4,), (3, 4), (3,), (4, 3), (4,)), 4.0),
    ],
)
def widen(W1, b1, W2, b2, down, b_down, up, b_up, s):
    """The wider network, its own units first."""
    return torch.vstack((W1, down)), torch.hstack((b1, b_down)), torch.hstack((W2, s * up)), b2 + s * b_up


@exercise(
    hint="What does the gradient of s need of each token? A fixed one needs nothing. 6 layers, 8 x 32 tokens."
)
def learned():
    """Measured: by how many bytes what autograd keeps grows with a trained scale."""
    return more_saved(*(gl.ParallelAdapter(r=16, scale=scale) for scale in (4.0, "learned")))
