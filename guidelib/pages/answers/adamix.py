"""The exercises of notebooks/additive/adamix.ipynb."""

import torch

import guidelib as gl
from guidelib.additive.adapters.adamix import disagreement
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="The mean is 1/M of the way. How far is it from the expert that moved, and from each that stayed?",
    inputs=[(2,), (4,), (9,)],
)
def first_step(M):
    """Measured on experts of M numbers, of which the first moves by a unit vector."""
    experts = torch.zeros(M, M, dtype=torch.float64)
    experts[0, 0] = 1
    mean = experts.mean(0)
    return float(mean.norm()), float((experts - mean).norm()) / M**0.5


@exercise(
    hint="KL(p || q) is the sum over C of p log(p / q). Sum over C, take the mean over N.",
    inputs=[tuple(logits.softmax(-1) for logits in draw((n, 3), (n, 3))) for n in (5, 8)],
    tolerance=1e-5,
)
def disagree(p, q):
    """By the library's own, from logarithms."""
    return disagreement(p.log(), q.log()).mean()


@exercise(
    hint="Activations grow in proportion to the batch, the rest stays. Where do the two lines of the totals "
    "cross?",
    tolerance=0.03,
)
def too_large():
    """Where the lines through the totals that were measured for one and for two sentences cross."""
    methods = {"AdaMix": gl.AdaMix(r=16), "full": gl.FullFineTuning()}
    costs = gl.cost_table(methods, batches=(1, 2))
    totals = zip(costs["AdaMix"].totals, costs["full"].totals, strict=True)
    one, two = (whole - mine for mine, whole in totals)
    return 1 + one / (one - two)
