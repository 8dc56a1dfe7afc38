"""The exercises of notebooks/foundations/first_run.ipynb."""

import guidelib as gl
from guidelib.pages.exercises import exercise


def _counts(*ranks: int) -> dict[int, gl.Count]:
    model, _ = gl.load_backbone("minilm", task="movie-reviews")
    found = {}
    for r in ranks:
        peft = gl.attach(model, gl.LoRA(r=r))
        found[r] = peft.count()
        peft.detach()
    return found


@exercise(hint="The head has 384 * 2 + 2 parameters, whatever the rank. The rest doubles.")
def trained():
    return _counts(16)[16].trainable


@exercise(hint="4 bytes for each number: those of the head, and r times what one rank costs.")
def rank():
    return max(r for r, count in _counts(*range(1, 9)).items() if 4 * count.stored <= 100_000)
