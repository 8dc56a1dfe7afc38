"""The exercises of notebooks/reparametrization/family.ipynb."""

from scipy import stats

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(
    hint="The interval's half-width is a quantile of Student's t with n - 1 degrees of freedom, times the "
    "standard error. Try n = 2, 3, ...",
    inputs=[(1.2, 1.0), (2.0, 1.0), (0.5, 0.5), (0.1, 1.0), (1.5, 0.4)],
)
def seeds(deviation, width):
    """The interval is asked of scipy, and the other way round: from many down to few."""
    n = 2000
    while n > 2 and stats.t.interval(0.95, n - 2, scale=deviation / (n - 1) ** 0.5)[1] <= width:
        n -= 1
    return n


_square, _block = [(384, 384)] * 12, [(384, 384)] * 4 + [(1536, 384), (384, 1536)]


@exercise(
    hint="Count what one more rank costs on all of the weights together, and what has to be paid before the "
    "first.",
    inputs=[(73_728, _square), (82_944, _block * 6), (100_000, _block), (3_000, _square)],
)
def ranks(budget, shapes):
    """The largest that fits is looked for."""

    def fits(r, own, other, once):
        return r * sum(own * out + other * into for out, into in shapes) + once <= budget

    lengths = sum(out for out, _ in shapes)
    ways = {"LoRA": (1, 1, 0), "LoRA-FA": (1, 0, 0), "DoRA": (1, 1, lengths)}
    return {name: max([0, *(r for r in range(1, 2000) if fits(r, *way))]) for name, way in ways.items()}


@exercise(hint="Count a weight's entries and those of its two factors. Which of them are in each file?")
def files():
    """Counted."""
    from transformers import LlamaConfig

    methods = gl.ReLoRA(r=8, targets=("q", "v")), gl.LoRA(r=8, targets=("q", "v"))
    large, small = (gl.predict(LlamaConfig(), m, batch=1, length=1).count.stored for m in methods)
    return large // small
