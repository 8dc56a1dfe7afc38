"""The exercises of notebooks/hybrid/sparse_adapter.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


def cases():
    for d, r in ((5, 3), (4, 6)):
        x, W_down, y = draw((20, d), (r, d), (20, d))
        W_up = draw((r, d))[0].T.clone().requires_grad_()
        loss = (torch.relu(x @ W_down.T) @ W_up.T - y).square().sum()
        yield W_up.detach(), torch.autograd.grad(loss, W_up)[0]


@exercise(
    hint="Multiply all that enters a unit by c > 0. What could you multiply on its other side instead, for "
    "the same output? Take the derivative at c = 1 both ways.",
    inputs=[*cases()],
    tolerance=1e-4,
)
def entering(W_up, G_up):
    """The sum of g w over the entries that enter each hidden unit, as it leaves the unit: (r,)."""
    return torch.einsum("or,or->r", W_up, G_up)


@exercise(
    hint="With positive weights and ones as inputs relu does nothing, and R is the sum of all that "
    "W_up W_down has. What does it change by, with one entry?",
    inputs=[draw((3, 5), (5, 3)), draw((6, 4), (4, 6))],
    tolerance=1e-4,
)
def synflow(W_down, W_up):
    """|w| dR/d|w| of both maps, by autograd."""
    down, up = (w.abs().requires_grad_() for w in (W_down, W_up))
    flow = torch.relu(torch.ones(down.shape[1]) @ down.T) @ up.T
    gradients = torch.autograd.grad(flow.sum(), (down, up))
    return tuple((g * w).detach() for g, w in zip(gradients, (down, up), strict=True))


@exercise(
    hint="Dense matrices are parameters. What is a sparse one, where something is multiplied with it? And of "
    "which of the twelve does nobody want the gradient of the input?"
)
def saved():
    return more_saved(gl.PfeifferAdapter(64), gl.SparseAdapter(64))
