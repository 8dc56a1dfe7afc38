"""The exercises of notebooks/additive/prompt_tuning.ipynb."""

import torch

import guidelib as gl
from guidelib.core.points.sequence import join, padding
from guidelib.pages.answers import draw
from guidelib.pages.exercises import exercise


@exercise(
    hint="Each of the d numbers of the vector moves by lr in one step. How long is that step as a whole?",
    inputs=[(42.0, 0.4, 128), (42.0, 0.004, 128), (10.0, 0.3, 768)],
    tolerance=1e-3,
)
def steps(D, lr, d):
    step = torch.full((d,), float(lr)).norm()
    return float(D / step)


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    return *draw((2, 4), (3, 5, 4)), mask


@exercise(
    hint="A text's padding is the zeros at the start of its row of the mask. The prompt comes after them.",
    inputs=[_batch()],
)
def prepend(P, embedded, mask):
    own, start = P.expand(len(embedded), -1, -1), padding(mask)
    return join(own, embedded, start), join(mask.new_ones(len(mask), len(P)), mask, start)


@exercise(
    hint="An encoder layer: 20 tokens more through seven matrices, and attention of 52 tokens to 52, which "
    "was 32 to 32, twice over. A decoder layer: the keys and values of 20 states more, read by 32 tokens.",
    tolerance=1e-9,
)
def flops():
    """Measured: with 20 vectors and without any."""
    model, _ = gl.load_backbone("tiny-t5", task="modern-bible")
    batch = gl.token_batch(model, 8, 32)
    bare = gl.measure(model, batch).forward_flops
    gl.attach(model, gl.PromptTuning(length=20))
    return gl.measure(model, batch).forward_flops - bare
