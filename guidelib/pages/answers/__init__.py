"""What is right and what helps in the exercises, a file per page.  Reading them gives the answers away."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

import guidelib as gl


def draw(*shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Random tensors, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


def difference(
    measured: Callable[[PreTrainedModel], int],
    first: gl.Method,
    second: gl.Method,
    *,
    backbone: str = "minilm",
    task: str = "movie-reviews",
) -> int:
    """By how much more is ``measured`` with the second method than with the first."""
    model, _ = gl.load_backbone(backbone, task=task)
    found = []
    for method in (first, second):
        peft = gl.attach(model, method)
        found.append(measured(model))
        peft.detach()
    return found[1] - found[0]


def more_saved(
    first: gl.Method,
    second: gl.Method,
    *,
    backbone: str = "minilm",
    task: str = "movie-reviews",
    rows: int = 8,
    length: int = 32,
) -> int:
    """Measured: by how many bytes more autograd keeps with the second method than with the first."""

    def saved(model: PreTrainedModel) -> int:
        return gl.measure(model, gl.token_batch(model, rows, length)).saved_bytes

    return difference(saved, first, second, backbone=backbone, task=task)
