"""The exercises of notebooks/selective/diff_pruning.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="z is 1 where the stretched s is at least 1. Solve that for s, then for the log-odds of u, which is "
    "below x with probability sigmoid(x).",
    inputs=[(0.0, -1.5, 1.5), (2.0, -1.5, 1.5), (-1.0, -0.1, 1.1)],
)
def wide_open(alpha, left, right):
    """P(z = 1)."""
    edge = torch.tensor((1 - left) / (right - left), dtype=torch.float64)
    return 1 - float(torch.sigmoid(edge.logit() - alpha))


@exercise(
    hint="Lay the absolute values of all tensors end to end and take the k largest of them, not k of each.",
    inputs=[(list(draw((3, 4), (5,), (2, 2, 2))), k) for k in (1, 6, 25)],
)
def project(differences, k):
    """The tensors with all but the k largest entries of all set to zero."""
    flat = torch.cat([each.flatten() for each in differences])
    kept = torch.zeros_like(flat).scatter(0, flat.abs().argsort(descending=True)[:k], 1)
    parts = (flat * kept).split([each.numel() for each in differences])
    return [p.view_as(each) for p, each in zip(parts, differences, strict=True)]


@exercise(
    hint="Go through it line by line: a sigmoid keeps its result, a clamp its input, a product both factors, "
    "and a trained parameter is there anyway. Then the layer: what does it add to W in the backward pass? A "
    "bias does not need that. The penalty has a sigmoid, too."
)
def kept():
    """Measured: the saved bytes of gates on all queries that do not depend on the batch."""
    few, more = (more_saved(gl.HeadOnly(), gl.DiffPruning(targets="q"), rows=n, length=8) for n in (1, 2))
    return 2 * few - more
