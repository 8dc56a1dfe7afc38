"""The exercises of notebooks/hybrid/unipelt.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="Write the share as the prefix's sum of e^score over all sums, and multiply the one sum by g. Only "
    "the proportion of the two sums counts.",
    inputs=[(0.3, 1.0), (0.3, 0.5), (0.8, 0.1), (0.6, 0.0)],
)
def share(lam, g):
    """By a softmax of two scores, to one of which log g is added."""
    scores = torch.tensor([lam, 1 - lam], dtype=torch.float64).log()
    return float((scores + torch.tensor([g, 1.0], dtype=torch.float64).log()).softmax(0)[0])


@exercise(
    hint="A running sum is cumsum. The first token divides by 1, the last by T.",
    inputs=[(*draw((5, 3), (3,)), 0.5), (*draw((2, 4), (4,)), -1.0)],
    tolerance=1e-5,
)
def gate_of_each(x, w, b):
    """A mean for each token over itself and those before it."""
    each = torch.sigmoid(x @ w + b)
    return torch.stack([each[: t + 1].mean() for t in range(len(x))])


@exercise(
    hint="A product keeps both factors: the gate, a number for each text, and what it multiplies, d numbers "
    "a token. The sigmoid keeps its outputs, a number a token. The mean keeps nothing."
)
def kept():
    """Measured: by how many bytes what autograd keeps grows with a gate on LoRA beside the queries."""
    lora = gl.LoRA(r=2, targets="q")
    return more_saved(lora, gl.Gated(lora))
