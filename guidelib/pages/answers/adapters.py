"""The exercises of notebooks/additive/adapters.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="Write h + W_up (W_down h + b_down) + b_up with W x + b for h, and collect what stands before x.",
    inputs=[draw((d, d_in), (d,), (r, d), (r,), (d, r), (d,)) for d, d_in, r in ((6, 6, 2), (4, 7, 3))],
    tolerance=1e-4,
)
def straight(W, b, W_down, b_down, W_up, b_up):
    """Found by running the layer and the adapter on the unit vectors and on zero."""

    def adapted(x):
        h = x @ W.T + b
        return h + (h @ W_down.T + b_down) @ W_up.T + b_up

    bias = adapted(torch.zeros(W.shape[1]))
    return (adapted(torch.eye(W.shape[1])) - bias).T, bias


@exercise(
    hint="down[task] is a map for each text. A product of batches, or an einsum, applies each to its own.",
    inputs=[
        (h, torch.tensor(task), down, up)
        for h, down, up in [draw((4, 5, 6), (3, 2, 6), (3, 6, 2))]
        for task in ([0, 2, 2, 1], [1, 1, 1, 1])
    ],
    tolerance=1e-4,
)
def mixed(h, task, down, up):
    texts = zip(h, task.tolist(), strict=True)
    return torch.stack([x + torch.relu(x @ down[t].T) @ up[t].T for x, t in texts])


@exercise(
    hint="Only the lowest block differs. Through which of its layers does the gradient pass now, and what do "
    "a norm and GELU keep for that? A frozen linear map keeps nothing."
)
def moved():
    """Measured: by how many bytes what autograd keeps grows, on 8 x 32 tokens."""
    return more_saved(*(gl.PfeifferAdapter(r=16, sublayers=place) for place in ("ffn", "self")))
