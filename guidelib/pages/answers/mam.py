"""The exercises of notebooks/hybrid/mam.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="A share is what a group weighs over what all weigh. Let the text weigh 1. What do A and B weigh "
    "then?",
    inputs=[(0.5, 0.5), (0.2, 0.4), (0.9, 0.1)],
    tolerance=1e-6,
)
def shares(a, b):
    """Of a softmax over the text and both prefixes, what A and B get."""
    scores = torch.logit(torch.tensor([a, b, 0.5], dtype=torch.float64))  # against a text that scores 0
    return tuple(scores.softmax(0)[:2].tolist())


@exercise(
    hint="A head reads its own rows of W_q and writes through its own columns of W_o. For each head there "
    "are l rows of W_down, and l columns of W_up.",
    inputs=[(*draw((8, 8), (8, 8), (3, 8), (3, 8)), 2), (*draw((12, 12), (12, 12), (2, 12), (2, 12)), 3)],
    tolerance=1e-5,
)
def as_adapter(W_q, W_o, P_K, P_V, heads):
    """W_down (heads l, d) and W_up (d, heads l), by what they do with the unit vectors."""
    queries, keys, values = (t.unflatten(-1, (heads, -1)) for t in (W_q.T, P_K, P_V))
    scores = torch.einsum("nhc,lhc->nhl", queries, keys) / keys.shape[-1] ** 0.5  # n: the unit vectors
    unit = torch.eye(scores[0].numel()).unflatten(-1, scores.shape[1:])
    output = torch.einsum("nhl,lhc->nhc", unit, values).flatten(1) @ W_o.T
    return scores.flatten(1).T, output.T


@exercise(
    hint="The prefix has opened the way back through all layers, and that is paid. The gradient of W_down "
    "needs the adapter's input, that of W_up what ReLU gives: 384 and 8 numbers a token, in 6 layers."
)
def beside():
    """Measured: by how many bytes what autograd keeps grows when the adapters join the prefixes."""
    return more_saved(gl.PrefixTuning(8), gl.MAM(length=8, mlp=None, r=8))
