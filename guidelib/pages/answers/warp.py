"""The exercises of notebooks/additive/warp.ipynb."""

import torch
import torch.nn.functional as F

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="The gradient of the scores is softmax - one-hot. V^T carries it to r, and a mean shares it out.",
    inputs=[(*draw((3, 6), (3,), (5, 6)), label, mean) for label, mean in ((0, True), (2, False), (1, True))],
    tolerance=1e-5,
)
def pull(V, b, states, label, mean):
    """By autograd."""
    states = states.clone().requires_grad_()
    read = states.mean(0) if mean else states[0]
    (gradient,) = torch.autograd.grad(F.cross_entropy(V @ read + b, torch.tensor(label)), states)
    return gradient


def _body(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    scores = (x @ x.mT).masked_fill(mask[:, None] == 0, -torch.inf)
    return x + scores.softmax(-1) @ x


@exercise(
    hint="The mask grows by l + 1 ones on the left, and the masked token stands at place l, counted from 0.",
    inputs=[
        (_body, E, torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), P, m, V, b)
        for E, P, m, V, b in (
            draw((2, 5, 4), (3, 4), (4,), (2, 4), (2,)),
            draw((2, 5, 6), (1, 6), (6,), (3, 6), (3,)),
        )
    ],
    tolerance=1e-5,
)
def ask(body, E, mask, P, m, V, b):
    """Text by text, without padding."""
    rows = [torch.cat((P, m[None], text[seen.bool()])) for text, seen in zip(E, mask, strict=True)]
    states = [body(row[None], row.new_ones(1, len(row)))[0, len(P)] for row in rows]
    return torch.stack(states) @ V.T + b


@exercise(hint="For each new place a block keeps 10 d numbers and a few crumbs, and the first norm d and 2.")
def grown():
    """Measured: by how many bytes what autograd keeps grows from 10 vectors to 20, on 8 x 32 tokens."""
    return more_saved(gl.WARP(length=10, mask=103), gl.WARP(length=20, mask=103))
