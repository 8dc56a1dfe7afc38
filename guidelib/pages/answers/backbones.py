"""The exercises of notebooks/foundations/backbones.ipynb."""

import numpy as np
import torch

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(hint="Rows times d_model, over all parameters.")
def table():
    """Measured on the model."""
    model, _ = gl.load_backbone("tiny-t5")
    return model.shared.weight.numel() / sum(p.numel() for p in model.parameters())


def _batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator, batches = torch.Generator().manual_seed(0), []
    for lengths in ([3, 5], [1, 2, 6], [4]):
        mask = (torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]).long()
        batches.append((torch.randn(*mask.shape, 8, generator=generator) - 1, mask))
    return batches


@exercise(
    hint="A zero at the padding's places would win wherever all real states are negative: what never can?",
    inputs=_batches(),
)
def max_pool(hidden, mask):
    """Sentence by sentence, over its real tokens alone."""
    pairs = zip(hidden, mask, strict=True)
    return torch.stack([states[: int(own.sum())].amax(0) for states, own in pairs])


@exercise(hint="Count the labels of train, then compare those of validation.")
def trivial():
    """The share of the commonest training label in the validation split."""
    task = gl.load_task("topics")
    commonest = np.bincount(task.train["label"]).argmax()
    return float(np.mean(np.array(task.validation["label"]) == commonest))
