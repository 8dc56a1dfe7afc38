"""The exercises of notebooks/selective/far.ipynb."""

import torch
import torch.nn.functional as F

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="The gradient of W is delta^T x, summed over the tokens, and that of b is the sum of delta. SGD "
    "moves each number by the rate times its gradient.",
    inputs=[(*draw((7, 4), (7, 5)), lr) for lr in (0.1, 2.0)],
    tolerance=1e-5,
)
def first_distance(x, delta, lr):
    """How far each row of a map moves in a step of SGD, from its input and the gradient of its output."""
    W, b = torch.zeros(delta.shape[1], x.shape[1]), torch.zeros(delta.shape[1])
    moved = torch.autograd.grad(F.linear(x, W.requires_grad_(), b.requires_grad_()), (W, b), delta)
    return sum((lr * g).abs().reshape(len(W), -1).sum(1) for g in moved)


@exercise(
    hint="If unit 5 of the inner map becomes unit 0, then column 5 of the outer map has to become column 0.",
    inputs=[(*draw((6, 3), (6,), (2, 6)), torch.tensor(rows)) for rows in ([4, 1], [5, 0, 3])],
)
def gathered(W_in, b_in, W_out, rows):
    """The maps of a feed-forward network whose first inner units are ``rows``."""
    mine = torch.zeros(len(W_in), dtype=torch.bool)
    mine[rows] = True
    rest = ~mine
    joined = torch.cat((W_in, b_in[:, None], W_out.T), 1)  # all that belongs to a unit
    sorted_ = torch.cat((joined[rows], joined[rest]))
    d = W_in.shape[1]
    return sorted_[:, :d], sorted_[:, d], sorted_[:, d + 1 :].T


@exercise(
    hint="Frozen maps and biases keep no inputs. What has to be there for the gradient of a single row of "
    "the inner map, and of the outer one? Layers 6, tokens 8 x 32."
)
def kept():
    """Measured: by how many bytes more autograd keeps with FAR than with the biases of the same maps."""
    return more_saved(gl.BitFit(only=("ffn.in", "ffn.out")), gl.FAR())
