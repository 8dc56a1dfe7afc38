"""The exercises of notebooks/additive/lets.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import difference, draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="Number n stands in row i and column j, and adds its product with a_j to output i. So its gradient "
    "is a sum over the tokens, of G at i times A at j.",
    inputs=[(*draw((6, 5), (6, 4)), torch.tensor(index)) for index in ([0, 3, 4, 19], [7])],
    tolerance=1e-5,
)
def gradient(G, A, index):
    """The gradient (k,) of the numbers at the places ``index`` of a matrix (d, d_in)."""
    delta = torch.zeros(G.shape[1], A.shape[1], requires_grad=True)
    (G * (A @ delta.T)).sum().backward()
    return delta.grad.flatten()[index]


@exercise(
    hint="The score of a place is |W * G|. Flatten it row after row, and take the largest.",
    inputs=[(*draw((6, 5), (6, 5)), keep) for keep in (0.1, 0.5)],
)
def places(W, G, keep):
    """The places (k,) with the largest |W * G|, in order."""
    order = (W * G).abs().flatten().argsort(descending=True)
    return order[: round(keep * W.numel())].sort().values


@exercise(
    hint="Five layers lose one product with a matrix (384, 384) each. Its input is the frozen model's, so "
    "what has a gradient? Tokens 8 x 32, and a multiplication with its addition counts as two."
)
def saved():
    """Measured: by how many FLOPs a step is cheaper if the top layer alone may have a part."""
    whole, top = gl.LeTS(), gl.LeTS().on(layers=-1)
    return difference(lambda model: sum(gl.costs.flops(model, gl.token_batch(model, 8, 32))), top, whole)
