"""Times of methods as ratios.  Times depend on the machine, so nothing tests or stores them: a command prints
them.

The runs that are compared take turns, and each is divided by the reference beside it.  A machine that slows
down for a while slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForSequenceClassification

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.additive.other.lst import LST
from guidelib.core.attaching import attach
from guidelib.core.method import Method, expect, is_whole
from guidelib.machine import device
from guidelib.materials.backbones import load_backbone
from guidelib.materials.tasks import load_task
from guidelib.reparametrization.adalora import AdaLoRA
from guidelib.reparametrization.dora import DoRA
from guidelib.reparametrization.krona import KronA
from guidelib.reparametrization.lora import LoRA
from guidelib.reparametrization.nf4 import NF4
from guidelib.selective.anchors import FullFineTuning, HeadOnly
from guidelib.training.fit import fit

METHODS: dict[str, Method] = {
    "full fine-tuning": FullFineTuning(),
    "full, again (the noise)": FullFineTuning(),
    "head only": HeadOnly(),
    "LoRA r=8 on q, v": LoRA(r=8),
    "LoRA r=8 on all": LoRA(r=8, targets="all"),
    "LoRA-FA r=8 on q, v": LoRA(r=8, freeze_A=True),
    "DoRA r=8 on q, v": DoRA(r=8, targets=("q", "v")),
    "AdaLoRA r=8 on q, v": AdaLoRA(r=8, targets=("q", "v")),
    "KronA on q, v": KronA(),
    "NF4 with LoRA on q, v": NF4() + LoRA(r=8),
    "Pfeiffer adapter r=24": PfeifferAdapter(r=24),
}
SIDE = LST()
# wide enough for the products to outweigh what starting an operation takes
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 8}


@dataclass(frozen=True)
class Ratio:
    """The median over all pairs, and an interval that holds the true median with 95 % (from order
    statistics, so no distribution is assumed)."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(seconds: list[float], reference: list[float]) -> Ratio:
    """Of times over those of the reference that they are paired with, at least 6 of them."""
    quotients = np.array(seconds) / np.array(reference)
    interval = stats.quantile_test(quotients, p=0.5).confidence_interval(0.95)
    return Ratio(float(np.median(quotients)), float(interval.low), float(interval.high))


def step_ratios(
    backbone: str = "minilm", *, pairs: int = 15, rows: int = 16, length: int = 64
) -> dict[str, Ratio]:
    """Forward, backward and AdamW step of each method over that of full fine-tuning, on ``rows`` x
    ``length`` tokens."""
    batch = _batch(rows, length)
    times = take_turns({label: _step(backbone, method, batch) for label, method in METHODS.items()}, pairs)
    return {label: ratio(seconds, times["full fine-tuning"]) for label, seconds in times.items()}


def latency_ratios(
    backbone: str = "minilm", *, pairs: int = 60, length: int = 16
) -> dict[str, tuple[Ratio, Ratio | None]]:
    """One forward pass on a single text of ``length`` tokens over that of the base: with the method attached,
    and with it merged, None where it cannot be.  A method without parts leaves the base as it was."""
    batch = _batch(1, length)
    del batch["labels"]
    base, result = _model(backbone), {}
    for label, method in METHODS.items():
        model = _model(backbone)
        attachment = attach(model, method)
        if not attachment.parts:
            continue
        runs = {"base": _inference(base, batch), "method": _inference(model, batch)}
        attached, merged = _ratio_of(take_turns(runs, pairs)), None
        if attachment.mergeable:
            attachment.merge()
            merged = _ratio_of(take_turns(runs, pairs))
        result[label] = attached, merged
    return result


def kept_ratio(
    method: Method = SIDE, sizes: Mapping[str, int] = WIDE, *, pairs: int = 6, epochs: int = 5
) -> Ratio:
    """A training of several epochs that runs the frozen blocks in each of them, over one that keeps what they
    give (``frozen`` of `fit`): a LLaMA of these sizes with random weights, on 32 texts of 64 bytes."""
    task = load_task("movie-reviews").subset(train=32)
    config = LlamaConfig(**sizes, vocab_size=384, pad_token_id=0)

    def training(frozen: str) -> float:
        model = LlamaForSequenceClassification(config)
        attach(model, method)
        settings = {"epochs": epochs, "batch_size": 16, "max_length": 64, "progress": False}
        return fit(model, task, ByT5Tokenizer(), frozen=frozen, **settings).seconds

    times = take_turns({frozen: partial(training, frozen) for frozen in ("still", "memory")}, pairs)
    return ratio(times["still"], times["memory"])


def take_turns(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every run in each of ``pairs`` turns; one that returns a float has timed itself."""
    expect(is_whole(pairs, 6), "pairs", pairs, "a whole number of at least 6")
    times = {label: [] for label in runs}
    for turn in range(pairs + 1):
        for label, run in runs.items():
            start = time.perf_counter()
            own = run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            if turn:  # the first one warms up
                times[label].append(own if isinstance(own, float) else time.perf_counter() - start)
    return times


def _ratio_of(times: dict[str, list[float]]) -> Ratio:
    return ratio(times["method"], times["base"])


def _batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(3, 259, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.arange(rows) % 2,
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def _model(backbone: str) -> torch.nn.Module:
    return load_backbone(backbone, task="movie-reviews")[0].to(device())


def _step(backbone: str, method: Method, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    model = _model(backbone).train()
    attach(model, method)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _inference(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return torch.inference_mode()(lambda: model(**batch))
