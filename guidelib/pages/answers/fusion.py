"""The exercises of notebooks/additive/fusion.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import difference, draw
from guidelib.pages.exercises import exercise


def _shares(*shape: int) -> torch.Tensor:
    return draw(shape)[0].softmax(-1)


@exercise(
    hint="dp_m / ds_n is p_n (1 - p_n) for m = n, and -p_m p_n otherwise. What does the sum over m hold?",
    inputs=[(*draw((6,)), _shares(4), *draw((4, 6))), (*draw((3,)), _shares(2), *draw((2, 3)))],
    tolerance=1e-4,
)
def by_score(G, p, added):
    """By autograd."""
    s = p.log().requires_grad_()
    (G @ (s.softmax(0) @ added)).backward()
    return s.grad


@exercise(
    hint="Softmax over fewer scores: the same powers of e, and a smaller sum under them.",
    inputs=[(_shares(5, 4), *draw((5, 4, 6)), keep) for keep in ([0, 2, 3], [1])],
    tolerance=1e-4,
)
def pruned(p, added, keep):
    """From the scores, which p gives but for what is added to all."""
    return torch.einsum("tn,tnd->td", p.log()[:, keep].softmax(1), added[:, keep])


@exercise(
    hint="A product of a token's vector with a matrix (m, d) takes 2 m d. Which products are made for each "
    "adapter: its own two, K, V, a score, a part of the mixture?"
)
def one_more():
    """Measured: by how many FLOPs the forward pass grows with a third adapter."""
    two, three = (gl.AdapterFusion(n, gl.PfeifferAdapter(r=16)) for n in (2, 3))
    return difference(lambda model: gl.costs.flops(model, gl.token_batch(model, 8, 32))[0], two, three)
