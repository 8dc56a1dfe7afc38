"""The exercises of notebooks/hybrid/more_than_parts.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="Write down what is left as a function of the share, and ask where its slope is zero. If that is "
    "outside of the budget, one part gets it all.",
    inputs=[(1.0, 1.0, 3.0), (2.0, 1.0, 10.0), (3.0, 1.0, 0.5), (0.2, 1.0, 2.0), (1.0, 3.0, 30.0)],
    tolerance=1e-5,
)
def share(p, q, t):
    """The lowest point of a convex function, which thirds close in on."""

    def left(s):
        return p**2 / (1 + t * s) + q**2 / (1 + t * (1 - s))

    low, high = 0.0, 1.0
    while high - low > 1e-7:
        third = (high - low) / 3
        if left(low + third) < left(high - third):
            high -= third
        else:
            low += third
    return (low + high) / 2


_x, _W, _B, _C, _D = draw((5, 4), (6, 4), (6, 4), (6, 6), (6, 6))


@exercise(
    hint="Go through the parts in order. What does each read: the map's input, or what is there by now?",
    inputs=[
        (_x, _W, []),
        (_x, _W, [("beside", _B), ("behind", _C)]),
        (_x, _W, [("behind", _C), ("beside", _B)]),
        (_x, _W, [("behind", _D), ("beside", _B), ("behind", _C)]),
    ],
    tolerance=1e-4,
)
def plugged(x, W, parts):
    """All of it is one linear map."""
    M = W.T
    for where, matrix in parts:
        M = M + matrix.T if where == "beside" else M @ (torch.eye(len(matrix)) + matrix.T)
    return x @ M


@exercise(hint="An update of low rank changes all of its matrix. Which matrices are there, and how often?")
def changed():
    """Counted."""
    model, _ = gl.load_backbone("minilm", task="movie-reviews")
    count = gl.attach(model, gl.LoRA(targets=("q", "v")) + gl.LoRA(targets=("k", "v"))).count()
    return count.changed - count.head
