"""Step times of methods as ratios.  Times depend on the machine, so nothing tests or stores them: a command
prints them.

The methods take turns, step by step, and each step is divided by the full fine-tuning step beside it.  A
machine that slows down for a while slows both.
"""

from __future__ import annotations

import statistics
import time

import torch

from guidelib.core.attaching import attach
from guidelib.core.method import Method, expect
from guidelib.materials.backbones import load_backbone
from guidelib.reparametrization.adalora import AdaLoRA
from guidelib.reparametrization.dora import DoRA
from guidelib.reparametrization.krona import KronA
from guidelib.reparametrization.lora import LoRA
from guidelib.reparametrization.nf4 import NF4
from guidelib.selective.anchors import FullFineTuning, HeadOnly

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
}


def step_ratios(backbone: str = "minilm", *, pairs: int = 15, rows: int = 16, length: int = 64) -> list[dict]:
    """Forward, backward and AdamW step of each method over that of full fine-tuning, on ``rows`` x
    ``length`` tokens.

    Returns a row per method: the median ratio and the quartiles over ``pairs`` turns.
    """
    expect(pairs >= 3, "pairs", pairs, "at least 3")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 2000, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.arange(rows) % 2,
    }
    runs = {}
    for label, method in METHODS.items():
        model, _ = load_backbone(backbone, task="movie-reviews")
        attach(model, method)
        trained = [p for p in model.parameters() if p.requires_grad]
        runs[label] = model.train(), torch.optim.AdamW(trained)
    times = {label: [] for label in runs}
    for turn in range(pairs + 1):
        for label, (model, optimizer) in runs.items():
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if turn:  # the first one warms up
                times[label].append(time.perf_counter() - start)
    reference = times["full fine-tuning"]
    result = []
    for label, seconds in times.items():
        low, middle, high = statistics.quantiles(
            [a / b for a, b in zip(seconds, reference, strict=True)], n=4
        )
        result.append({"method": label, "median": middle, "quartiles": (low, high)})
    return result
