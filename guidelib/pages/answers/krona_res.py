"""The exercises of notebooks/hybrid/krona_res.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="A norm gives the same for z and for c z, if c is above zero. Take the factor of x out of the sum.",
    inputs=[(*draw((6, 12), (6,)), s_res) for s_res in (0.25, -0.5)],
)
def fold(W2, b2, s_res):
    """The last map and bias of the network with which norm(x + F(x)) is norm(x + F(x) + s_res x)."""
    return W2 / (1 + s_res), b2 / (1 + s_res)


@exercise(
    hint="gelu(z) - gelu(-z) is z, exactly. So two units carry a number through the bend: one reads it, the "
    "other its negative. K stands behind.",
    inputs=[draw((12, 6), (12,), (6, 12), (6, 6)), draw((8, 4), (8,), (4, 8), (4, 4))],
)
def widen(W1, b1, W2, K):
    """The three tensors of the network that is 2 d units wider and adds K x."""
    d = len(K)
    wider = torch.vstack((W1, torch.eye(d), -torch.eye(d)))
    return wider, torch.hstack((b1, torch.zeros(2 * d))), torch.hstack((W2, K, -K))


@exercise(
    hint="The gradient of s_res is the sum of G x over all tokens, where G is the gradient of what is added. "
    "What of that does the product's gradient need as well?"
)
def kept():
    """Measured: by how many bytes what autograd keeps grows with the residual."""
    return more_saved(gl.KronARes(residual=False), gl.KronARes())
