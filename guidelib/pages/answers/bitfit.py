"""The exercises of notebooks/selective/bitfit.ipynb."""

from torch import nn

import guidelib as gl
from guidelib.pages.answers import draw, more_saved
from guidelib.pages.exercises import exercise


class _Misleading(nn.Module):
    """Names that hold "bias" for what is none, a bias that is none, and a layer without one."""

    def __init__(self, bias: bool):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(4, 2)
        self.bias_map = nn.Linear(2, 3, bias=bias)
        self.inner = nn.ModuleDict({"norm": nn.LayerNorm(3), "debiased": nn.Linear(3, 2)})
        self.inner.bias = nn.Parameter(nn.Linear(2, 3).weight)


@exercise(
    hint="Go through named_modules and look at the type of each. A layer may have no bias: it is None then.",
    inputs=[(_Misleading(bias),) for bias in (True, False)],
)
def biases(model):
    """The names of the biases of linear maps and norms."""
    found = model.named_modules()
    layers = {n: m for n, m in found if isinstance(m, nn.Linear | nn.LayerNorm) and m.bias is not None}
    return {f"{name}.bias" for name in layers}


@exercise(
    hint="What does sum_j p_j (v_j + b_v) become if the p_j sum to 1? Then the output's map comes.",
    inputs=[draw((3, 5), (5,), (3,))],
    tolerance=1e-5,
)
def fold(W_o, b_v, b_o):
    """The bias of the output with that of the values in it."""
    return nn.functional.linear(b_v, W_o, b_o)


@exercise(
    hint="Both let the gradient run down to the first block, and biases keep no inputs. What does only one "
    "of the two train below the first block, and what does autograd keep for that?"
)
def kept():
    """Measured: by how many bytes more autograd keeps with all biases than with the subset."""
    return more_saved(gl.BitFit(only=("q", "ffn.in")), gl.BitFit())
