"""Batches that a method looks at before it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

Batch = Mapping[str, torch.Tensor]


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Of a batch without labels the sum of the first output stands in for it."""
    output = model(**{name: rows.to(model.device) for name, rows in batch.items()})[0]
    return output if "labels" in batch else output.sum()


def singles(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The examples of the batches, as batches of one on ``device``."""
    for batch in batches:
        for i in range(len(next(iter(batch.values())))):
            yield {name: rows[i : i + 1].to(device) for name, rows in batch.items()}
