"""The exercises of notebooks/additive/attention_fusion.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="Of a softmax, the derivative of a_l by the score of layer m is a_l (1[l = m] - a_m). Write what is "
    "left as a sum over the layers of how far h_l is from the mixture, twice.",
    inputs=[(*draw((5, 4), (4,), (4,)), tau) for tau in (1.0, 0.5)],
    tolerance=1e-5,
)
def pull(states, q, G, tau):
    """The gradient (d,) of the loss with respect to q, of one token with ``states`` (L, d)."""
    q = q.clone().requires_grad_()
    h = torch.softmax(states @ q / tau, 0) @ states
    h.backward(G)
    return q.grad


def _halves() -> list[tuple]:
    c, d, h, g = draw((6,), (6,), (6, 3), (6, 3))
    return [(c, h, d, g), (1000 * c, h, 1000 * d, g)]


@exercise(
    hint="Of all weight, the first half has the share e^c1 / (e^c1 + e^c2). That is a sigmoid, which needs "
    "no exponential of a large number. For c there is torch.logaddexp.",
    inputs=_halves(),
    tolerance=1e-5,
)
def join(c1, h1, c2, h2):
    """What two halves of the layers give together: (T,) the logarithm, (T, d) the mixture."""
    c = torch.stack((c1, c2))
    return c.logsumexp(0), (c.softmax(0).unsqueeze(-1) * torch.stack((h1, h2))).sum(0)


@exercise(
    hint="Autograd keeps what the products need: the states of the layers that are read, and their weights. "
    "Three layers more, 8 x 32 tokens, 4 bytes a number."
)
def kept():
    """Measured: by how many bytes what autograd keeps grows from the upper three layers to all six."""
    return more_saved(gl.AttentionFusion().on(layers=(3, 4, 5)), gl.AttentionFusion())
