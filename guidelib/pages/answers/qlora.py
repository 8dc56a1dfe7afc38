"""The exercises of notebooks/reparametrization/qlora.ipynb."""

from unittest.mock import patch

import torch
import torch.nn.functional as F

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise
from guidelib.reparametrization.nf4 import NF4Part, Quantized, levels


@exercise(
    hint="The entry stands exactly on its level. Where is the border to the next one, in units of the scale?",
    inputs=[(code, s, levels()) for code, s in ((7, 1.0), (0, 0.5), (14, 0.02), (3, 2.0))],
    tolerance=1e-5,
)
def least(code, s, levels):
    """Found by trying, closer and closer."""
    low, high = 0.0, 2 * s
    for _ in range(60):
        middle = (low + high) / 2
        new = int((s * levels - (s * levels[code] + middle)).abs().argmin())
        low, high = (middle, high) if new == code else (low, middle)
    return high


_WEIGHTS = [Quantized(weight, double=False) for weight in draw((64, 4), (8, 16), (64, 1))]


@exercise(
    hint="byte >> 4 is the first code of a byte, byte & 15 the second. A scale stands for 64 weights.",
    inputs=[(w.codes, w.scales, levels().float()) for w in _WEIGHTS],
    tolerance=1e-5,
)
def dequantise(codes, scales, levels):
    names = [name for byte in codes.tolist() for name in divmod(byte, 16)]
    return torch.stack([scales[i // 64] * levels[name] for i, name in enumerate(names)])


@exercise(
    hint="A product keeps its weight for the gradient of its input. Below the lowest LoRA no input needs one."
)
def kept():
    """Measured: by how many bytes more autograd keeps if plain layers multiply by W_deq."""

    def plain(self, call, x):
        return F.linear(x, self.quantized.dequantize(), call.layer.bias)

    method = gl.NF4() + gl.LoRA(r=8).on(layers=-1)
    again = more_saved(gl.HeadOnly(), method)
    with patch.object(NF4Part, "_forward", plain):
        return more_saved(gl.HeadOnly(), method) - again
