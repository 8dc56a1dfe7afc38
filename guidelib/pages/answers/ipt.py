"""The exercises of notebooks/additive/ipt.ipynb."""

import torch

import guidelib as gl
from guidelib.pages.answers import more_saved
from guidelib.pages.exercises import exercise


@exercise(
    hint="T prompts take T n numbers, n = l times the width. The decoder takes (d + 1) h + (h + 1) n, once, "
    "and then each task takes d.",
    inputs=[(100, 768, 250, 768), (20, 128, 2, 64), (5, 128, 4, 64)],
)
def tasks(length, width, d, hidden):
    """The smallest number of tasks at which the decoder and d numbers a task are less than the prompts."""
    n = length * width
    with torch.device("meta"):
        space = gl.PromptSpace(length, width, d, hidden)
    shared = sum(p.numel() for p in space.decoder.parameters())
    return shared // (n - d) + 1


def _prompts(n: int, *shape: int) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


@exercise(
    hint="Take the mean off, keep d directions of torch.linalg.svd of what is left, and put the mean back.",
    inputs=[(_prompts(8, 3, 5), 2), (_prompts(5, 2, 4), 1), (_prompts(6, 2, 3), 4)],
    tolerance=1e-4,
)
def best(prompts, d):
    """The nearest prompts (n, l, width) that a linear auto-encoder with d numbers gives back."""
    flat = prompts.flatten(1)
    mean = flat.mean(0)
    _, _, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    kept = directions[:d]
    return (mean + (flat - mean) @ kept.T @ kept).view(prompts.shape)


@exercise(hint="The rest keeps the same. Which tensor of the decoder does the gradient of z need?")
def kept():
    """Measured: how many bytes more autograd keeps for IPT than for a prompt of its length."""
    methods = (gl.PromptTuning(length=5), gl.IPT(length=5, d=2, hidden=64))
    return more_saved(*methods, backbone="tiny-t5", task="modern-bible")
