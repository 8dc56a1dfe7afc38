"""Comparisons that take longer than a notebook may: run by a command, stored with their provenance, shown
on the pages.

``guidelib compare lora`` runs the comparison of that name, or what is left of it, and writes
guidelib/results/lora.json after every run, so that an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guidelib.attaching import attach
from guidelib.method import Method, expect
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

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Methods on one backbone and task, each at the learning rate that is best on validation data, several
    seeds.

    methods: label -> (method, learning rates to try).  With more than one rate, each is run with the first
    seed, and the best on validation data is run with the others: by accuracy (by chrF, where the task is
    text2text), and by the loss where that ties.
    The test split takes no part in the choice.
    """

    backbone: str
    task: str
    methods: dict[str, tuple[Method, tuple[float, ...]]]
    train: int | None = None
    head_lr: float = 1e-2
    epochs: float = 1
    batch_size: int = 32
    max_length: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)

    def to_json(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k != "methods"}
        methods = {label: [method.to_json(), rates] for label, (method, rates) in self.methods.items()}
        return json.loads(json.dumps(plain | {"methods": methods}))


_HEAD, _FULL = HeadOnly(), FullFineTuning()
_QV, _RATES = ("q", "v"), (2e-3, 4e-3, 8e-3)
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
            "AdaLoRA r=12 to 8": (AdaLoRA(r=12, target_r=8, alpha=24, targets=_QV), (*_RATES, 16e-3)),
            "GLoRA r=3": (GLoRA(r=3, targets=_QV), (1e-3, 2e-3, 4e-3)),
            "KronA 96 x 64": (KronA(shape=(96, 64)), (1e-3, 4e-3, 16e-3)),
            "KronA near-square": (KronA(), (1e-3, 4e-3, 16e-3)),
            "ReLoRA r=8": (ReLoRA(r=8, alpha=16, targets=_QV, restarts=1), _RATES),
            "NF4 with LoRA r=8": (NF4() + _LORA, _RATES),
            "FLoRA r=8": (FLoRA(r=8, tasks=1, targets=_QV), (*_RATES, 16e-3)),
            "Intrinsic SAID": (IntrinsicSAID(d=73_728), (3e-5, 1e-4, 3e-4)),
        },
        train=2000,
    ),
    # What the pretraining of tiny-t5 is worth: the same model and task with and without it.
    "tiny-t5": Comparison("tiny-t5", "modern-bible", **REWRITING),
    "tiny-t5-untrained": Comparison("tiny-t5-untrained", "modern-bible", **REWRITING),
}


def run(name: str, folder: Path = RESULTS) -> Path:
    """Run what is missing of a comparison; returns the file.  Raises ValueError for an unknown name, or if
    the file was made with other settings or versions."""
    expect(name in COMPARISONS, "name", name, f"one of {', '.join(COMPARISONS)}")
    comparison, path = COMPARISONS[name], folder / f"{name}.json"
    from guidelib.environment import versions  # heavy imports only where something is run
    from guidelib.tasks import load_task
    from guidelib.text2text import score

    result = {"settings": comparison.to_json(), "provenance": versions(), "runs": []}
    if path.exists():
        stored = json.loads(path.read_text())
        for key in ("settings", "provenance"):
            if stored[key] != result[key]:
                raise ValueError(f"{path.name} was made with other {key}; move it away to start again")
        result["runs"] = stored["runs"]

    if (task := load_task(comparison.task)).kind == "text2text":  # what doing nothing is worth
        splits = {split: getattr(task, split) for split in ("validation", "test")}
        result["copy"] = {k: score(d["source"], d["target"], d["source"]) for k, d in splits.items()}

    def once(label: str, method: Method, lr: float, seed: int) -> None:
        known = any((r["method"], r["lr"], r["seed"]) == (label, lr, seed) for r in result["runs"])
        if not known:
            result["runs"].append(_run(comparison, label, method, lr, seed))
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(path)
            print(json.dumps(result["runs"][-1]), flush=True)

    for label, (method, rates) in comparison.methods.items():
        for lr in rates:
            once(label, method, lr, comparison.seeds[0])
    for label, (method, _) in comparison.methods.items():
        for seed in comparison.seeds[1:]:
            once(label, method, best_rate(result, label), seed)
    return path


def _run(comparison: Comparison, label: str, method: Method, lr: float, seed: int) -> dict[str, Any]:
    from guidelib.backbones import load_backbone
    from guidelib.tasks import load_task
    from guidelib.training import evaluate, fit

    task = load_task(comparison.task).subset(train=comparison.train, seed=seed)
    model, tokenizer = load_backbone(comparison.backbone, task, seed=seed)
    attachment = attach(model, method, seed=seed)
    trained = fit(
        model,
        task,
        tokenizer,
        lr=lr,
        head_lr=comparison.head_lr,
        epochs=comparison.epochs,
        batch_size=comparison.batch_size,
        max_length=comparison.max_length,
        seed=seed,
    )
    scores = {
        split: evaluate(model, task, tokenizer, split=split, max_length=comparison.max_length)
        for split in ("validation", "test")
    }
    return {
        "method": label,
        "lr": lr,
        "seed": seed,
        **scores,
        "steps": trained.steps,
        "last_losses": round(statistics.mean(trained.losses[-20:]), 4),
        "seconds": round(trained.seconds, 1),
        "count": asdict(attachment.count()),
    }


def load_results(name: str) -> dict[str, Any]:
    """A stored comparison: its settings, provenance and runs.  Raises FileNotFoundError with the command to
    make it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"name: no result {name!r} is stored; `guidelib compare {name}` makes it")
    return json.loads(path.read_text())


def best_rate(result: dict[str, Any], label: str) -> float:
    """The learning rate of ``label`` with the highest validation score at the first seed."""
    first = result["settings"]["seeds"][0]
    tried = [run for run in result["runs"] if run["method"] == label and run["seed"] == first]
    expect(bool(tried), "label", label, "a method that the result holds runs of")
    return max(tried, key=lambda run: (_score(run["validation"]), -run["validation"]["loss"]))["lr"]


def _score(scores: dict[str, float]) -> float:
    """Accuracy in per cent, or chrF, which goes to 100, too."""
    return 100 * scores["accuracy"] if "accuracy" in scores else scores["chrf"]


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per method: learning rate, seeds, mean and standard deviation of the test score (0 to 100)."""
    rows = []
    for label in result["settings"]["methods"]:
        lr = best_rate(result, label)
        scores = [_score(r["test"]) for r in result["runs"] if (r["method"], r["lr"]) == (label, lr)]
        rows.append(
            {
                "method": label,
                "lr": lr,
                "seeds": len(scores),
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else float("nan"),
            }
        )
    return rows
