"""The exercises of notebooks/selective/norms.ipynb."""

import torch
import torch.nn.functional as F

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="The gain meets the normed input, feature by feature, and both are summed over the tokens. "
    "The variance divides by d, not by d - 1.",
    inputs=[(*draw((6, 5), (6, 5)), eps) for eps in (1e-5, 0.5)],
    tolerance=1e-5,
)
def gradients(x, delta, eps):
    """Of gain and bias, from the input and the gradient of the output, (T, d) each."""
    gain, bias = (torch.ones(x.shape[1], requires_grad=True) for _ in range(2))
    output = F.layer_norm(x, x.shape[1:], gain, bias, eps)
    return torch.autograd.grad(output, (gain, bias), delta)


def _folded(rows, columns):
    W, b, gain, bias = draw((rows, columns), (rows,), (columns,), (columns,))
    return W * gain, b + W @ bias, W, b


@exercise(
    hint="Folding multiplies column i of W with g_i, and adds W b_norm to the bias: for b_norm that is a "
    "system with more equations than unknowns.",
    inputs=[_folded(7, 4), _folded(9, 3)],
    tolerance=1e-4,
)
def recover(W_new, b_new, W, b):
    """Gain and bias of the norm, from the layer behind it before and after folding."""
    return (W_new / W).median(0).values, torch.linalg.pinv(W) @ (b_new - b)


@exercise(
    hint="What stands below the norm behind the last attention keeps nothing. Above it there are two norms, "
    "two frozen maps, an activation function and the mean."
)
def kept():
    """Measured: by how many bytes more autograd keeps with the norms of the last block than with the head."""
    return more_saved(gl.HeadOnly(), gl.NormTuning().on(layers=-1))
