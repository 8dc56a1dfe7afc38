"""The exercises of notebooks/reparametrization/glora.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


def _layer(d_out: int, d_in: int, r: int) -> tuple[torch.Tensor, ...]:
    """x, what the layer makes of it, its bias, and the supports A (a vector) and B (low-rank)."""
    W, b, x, A, up, down = draw((d_out, d_in), (d_out,), (5, d_in), (d_out,), (d_out, r), (r, d_in))
    return x, x @ W.T + b, b, A, up, down


@exercise(
    hint="Multiply out s * (W (x + c) + b) + e, and sort by what stands before x, before b, and alone.",
    inputs=[draw((4, 6), (4,), (6,), (4,)), draw((7, 3), (7,), (3,), (7,))],
    tolerance=1e-5,
)
def fold(W, s, c, e):
    """A and D scale; E is what the layer without a bias makes of the input 0."""
    return [s - 1, s - 1, s * (W @ (torch.zeros_like(c) + c)) + e]


@exercise(
    hint="A scales W x. What leaves the layer is W x + b.",
    inputs=[_layer(4, 6, 2), _layer(6, 3, 1)],
    tolerance=1e-4,
)
def fast(x, y, b, A, B_up, B_down):
    """With the change of the output as a whole."""
    return y + torch.einsum("no,o->no", y - b, A) + torch.einsum("ni,ri,or->no", x, B_down, B_up)


@exercise(
    hint="Of the two reasons on the page, a softmax and a norm, one concerns a scalar alone. Does the other "
    "one depend on where the norms are?"
)
def no_gradient():
    """Measured on a random GPT-2: the roles in which a vector E gets no gradient."""
    found, nothing = [], dict.fromkeys("ABCD", "none")
    for role in ("q", "k", "v", "o", "ffn.in", "ffn.out"):
        model, _ = gl.load_backbone("tiny-gpt2", dtype=torch.float64)
        (part,) = gl.attach(model, gl.GLoRA(**nothing, E="vector", targets=role).on(layers=0)).parts
        logits = model(torch.arange(3, 13)[None]).logits
        (logits * draw(logits.shape)[0]).sum().backward()
        if part.delta.E.grad.abs().max() < 1e-10:
            found.append(role)
    return found
