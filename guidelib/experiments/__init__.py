"""Experiments that take longer than a notebook may: run by a command, stored with their provenance, shown
on the pages.

``guidelib compare lora`` runs the experiment of that name, or what is left of it, and writes
guidelib/experiments/results/lora.json after every run, so that an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guidelib.additive.adapters.adamix import AdaMix
from guidelib.additive.adapters.bottleneck import Adapter, ParallelAdapter, PfeifferAdapter
from guidelib.additive.adapters.drop import AdapterDrop
from guidelib.core.method import expect
from guidelib.experiments.base import at_best_rate, best_rate
from guidelib.experiments.comparison import Comparison, summary
from guidelib.experiments.transfer import FEW, MANY, OWN, Transfer, Way
from guidelib.reparametrization.adalora import AdaLoRA
from guidelib.reparametrization.dora import DoRA
from guidelib.reparametrization.flora import FLoRA
from guidelib.reparametrization.glora import GLoRA
from guidelib.reparametrization.krona import KronA
from guidelib.reparametrization.lora import LoRA
from guidelib.reparametrization.nf4 import NF4
from guidelib.reparametrization.relora import ReLoRA
from guidelib.reparametrization.said import IntrinsicSAID
from guidelib.selective.anchors import FullFineTuning, HeadOnly

__all__ = [
    "COMPARISONS",
    "RESULTS",
    "adapters",
    "at_best_rate",
    "best_rate",
    "load_results",
    "run",
    "summary",
]
RESULTS = Path(__file__).parent / "results"

_HEAD, _FULL = HeadOnly(), FullFineTuning()
_QV, _RATES, _HIGHER = ("q", "v"), (2e-3, 4e-3, 8e-3), (4e-3, 8e-3, 16e-3)
_MORE = (*_RATES, 16e-3)
_LORA, _LORA_ALL = LoRA(r=8, alpha=16), LoRA(r=8, alpha=16, targets="all")

REWRITING = dict(
    methods={"full fine-tuning": (FullFineTuning(), (1e-3, 3e-3))}, train=12288, batch_size=16, max_length=80
)
COMPARISONS = {
    "lora": Comparison(
        "minilm",
        "movie-reviews",
        {
            "head only": (_HEAD, (1e-2,)),
            "LoRA r=8 on q, v": (_LORA, (1e-3, 2e-3, 4e-3)),
            "LoRA r=8 on all": (_LORA_ALL, (1e-3, 2e-3, 4e-3)),
            "full fine-tuning": (_FULL, (5e-5, 1e-4, 2e-4, 4e-4)),
        },
    ),
    "lora-2000": Comparison(  # the same with a quarter of the data
        "minilm",
        "movie-reviews",
        {
            "head only": (_HEAD, (1e-2,)),
            "LoRA r=8 on q, v": (_LORA, (2e-3, 4e-3, 8e-3)),
            "LoRA r=8 on all": (_LORA_ALL, (2e-3, 4e-3, 8e-3)),
            "full fine-tuning": (_FULL, (1e-4, 2e-4, 4e-4)),
        },
        train=2000,
    ),
    "lora-sample": Comparison(  # what the notebook runs live
        "minilm",
        "movie-reviews",
        {"head only": (_HEAD, (1e-2,)), "LoRA r=8 on q, v": (_LORA, (2e-3,))},
        train=1024,
    ),
    # The family of LoRA with about as many trained numbers as LoRA with r=8 on q, v has, and on the same task
    # as "lora-2000", which holds that and the anchors.
    "family": Comparison(
        "minilm",
        "movie-reviews",
        {
            "LoRA r=2 on all": (LoRA(r=2, alpha=4, targets="all"), _RATES),
            "LoRA-FA r=16": (LoRA(r=16, alpha=32, freeze_A=True), _RATES),
            "DoRA r=8": (DoRA(r=8, alpha=16, targets=_QV), _RATES),
            "AdaLoRA r=12 to 8": (AdaLoRA(r=12, target_r=8, alpha=24, targets=_QV), _MORE),
            "GLoRA r=3": (GLoRA(r=3, targets=_QV), (1e-3, 2e-3, 4e-3)),
            "KronA 96 x 64": (KronA(shape=(96, 64)), (1e-3, 4e-3, 16e-3)),
            "KronA near-square": (KronA(), (1e-3, 4e-3, 16e-3)),
            "ReLoRA r=8": (ReLoRA(r=8, alpha=16, targets=_QV, restarts=1), _RATES),
            "NF4 with LoRA r=8": (NF4() + _LORA, _RATES),
            "FLoRA r=8": (FLoRA(r=8, tasks=1, targets=_QV), _MORE),
            "Intrinsic SAID": (IntrinsicSAID(d=73_728), (3e-5, 1e-4, 3e-4)),
        },
        train=2000,
    ),
    # Adapters with about as many stored numbers as that, on the same task.
    "adapters": Comparison(
        "minilm",
        "movie-reviews",
        {
            "Houlsby r=8": (Adapter(r=8), _MORE),
            "Pfeiffer r=16": (PfeifferAdapter(r=16), _HIGHER),
            "parallel r=16": (ParallelAdapter(r=16, scale=1.0), _MORE),
            "scaled parallel r=16": (ParallelAdapter(r=16, scale=4.0), (1e-3, *_RATES)),
            "AdaMix r=16": (AdaMix(r=16), _MORE),
            "AdaMix r=16, one pass": (AdaMix(r=16, consistency=0.0), _HIGHER),
            "AdapterDrop n=3, r=32": (AdapterDrop(PfeifferAdapter(r=32), drop=3), _HIGHER),
        },
        train=2000,
    ),
    "transfer": Transfer(
        "minilm",
        {
            OWN: Way("new", MANY, 1, _HIGHER),
            "head only": Way("head", MANY, 1, (1e-2,)),
            "few: head only": Way("head", FEW, 8, (1e-2,)),
            "few: a new adapter": Way("new", FEW, 8, _MORE),
            "few: the nearest adapter": Way("nearest", FEW, 8, (2e-4, 1e-3, 4e-3, 8e-3)),
            "few: fusion of the others": Way("fusion of others", FEW, 8, (1e-4, 5e-4, 2e-3)),
            "fusion of all four": Way("fusion of all", MANY, 1, (5e-5, 2e-4, 1e-3)),
            "one adapter for all": Way("pooled", MANY, 1, _RATES),
        },
    ),
    # What the pretraining of tiny-t5 is worth: the same model and task with and without it.
    "tiny-t5": Comparison("tiny-t5", "modern-bible", **REWRITING),
    "tiny-t5-untrained": Comparison("tiny-t5-untrained", "modern-bible", **REWRITING),
}


def run(name: str, folder: Path = RESULTS) -> Path:
    """Run what is missing of an experiment; returns the file.  Raises ValueError for an unknown name, or if
    the file was made with other settings or versions."""
    expect(name in COMPARISONS, "name", name, f"one of {', '.join(COMPARISONS)}")
    experiment, path = COMPARISONS[name], folder / f"{name}.json"
    from guidelib.machine import versions

    result = {"settings": experiment.to_json(), "provenance": versions(), "runs": []}
    if path.exists():
        stored = json.loads(path.read_text())
        for key in ("settings", "provenance"):
            if stored[key] != result[key]:
                raise ValueError(f"{path.name} was made with other {key}; move it away to start again")
        result["runs"] = stored["runs"]
    result |= experiment.facts()

    for key in experiment.runs(result):
        if not any(key.items() <= made.items() for made in result["runs"]):
            result["runs"].append(key | experiment.run(key, result, folder / name))
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(path)
            print(json.dumps(result["runs"][-1]), flush=True)
    experiment.tidy(result, folder / name)
    return path


def load_results(name: str) -> dict[str, Any]:
    """A stored comparison: its settings, provenance and runs.  Raises FileNotFoundError with the command to
    make it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"name: no result {name!r} is stored; `guidelib compare {name}` makes it")
    return json.loads(path.read_text())


def adapters(name: str = "transfer") -> dict[str, Path]:
    """The trained adapters that are stored beside a result, by domain."""
    return COMPARISONS[name].kept(load_results(name), RESULTS / name)
