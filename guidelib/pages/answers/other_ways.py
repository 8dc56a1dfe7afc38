"""The exercises of notebooks/additive/other_ways.ipynb."""

import math

from guidelib.pages.exercises import exercise


@exercise(
    hint="Write down both trainings' FLOPs after n epochs, and solve for n.",
    inputs=[(10.0, 1.0, 3.0), (100.0, 1.0, 5.0), (10.0, 5.0, 2.0), (4.0, 1.0, 5.0), (4.0, 1.0, 4.0)],
)
def epochs(F, S, times):
    """By trying: the first number of epochs that is fast enough, if there is one."""
    enough = (n for n in range(1, 10_000) if n * (F + S) >= times * (F + n * S))
    return next(enough, math.inf)


@exercise(hint="A state of each layer for every token, two bytes a number.")
def room():
    """Counted: what a fusion of LLaMA-7B's layers reads of a text, times the texts."""
    from transformers import LlamaConfig

    config = LlamaConfig()
    return 1000 * 1024 * config.num_hidden_layers * config.hidden_size * 2
