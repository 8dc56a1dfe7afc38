"""The exercises of notebooks/hybrid/compacter.ipynb."""

import torch
from transformers import BertConfig, T5Config

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(hint="Multiply out. Which rows of H does u meet, and in which columns does the real part stand?")
def complex():
    """The first factors (2, 2, 2) with which a PHM layer multiplies complex numbers."""
    i = torch.tensor([[0, 1], [-1, 0]])  # the row [u, v] of u + iv times it is that of i (u + iv)
    return torch.stack([-i @ i, i])


@exercise(
    hint="nn.Sequential(nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out)) is one map. BERT-base has "
    "12 layers, and Pfeiffer's r is 48."
)
def low_rank():
    """Measured: as many as with one Kronecker product a map, whose first factor is a single number."""
    found = gl.count(BertConfig(), gl.PfeifferAdapter(linear=gl.PHM(n=1, rank=2)))
    return found.trainable - 2 * 12


@exercise(hint="A map has d r / n + n^3 parameters besides its bias. Where is the slope of that zero?")
def smallest():
    """Measured: the n of the smallest PHM adapter on T5-base with r = 24."""
    config = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
    sizes = {
        n: gl.count(config, gl.PHMAdapter(linear=gl.PHM(n=n))).trainable for n in (1, 2, 3, 4, 6, 8, 12, 24)
    }
    return min(sizes, key=sizes.get)
