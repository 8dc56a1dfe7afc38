"""Methods on one backbone and task."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guidelib.core.attaching import attach
from guidelib.core.method import Method
from guidelib.experiments.base import Experiment, Row, at_best_rate, best_rate, score


@dataclass(frozen=True)
class Comparison(Experiment):
    """Methods on one backbone and task, each at the learning rate that is best on validation data, several
    seeds.

    methods: label -> (method, learning rates to try).  With more than one rate, each is run with the first
    seed, and the best on validation data is run with the others: by accuracy (by chrF, where the task is
    text2text), and by the loss where that ties.
    The test split takes no part in the choice.
    """

    task: str
    methods: dict[str, tuple[Method, tuple[float, ...]]]
    train: int | None = None
    epochs: float = 1

    def runs(self, result: Row) -> Iterator[Row]:
        for label, (_, rates) in self.methods.items():
            for lr in rates:
                yield {"method": label, "lr": lr, "seed": self.seeds[0]}
        for label in self.methods:
            for seed in self.seeds[1:]:
                yield {"method": label, "lr": best_rate(result, label), "seed": seed}

    def run(self, key: Row, result: Row, folder: Path) -> Row:
        from guidelib.materials.backbones import load_backbone
        from guidelib.materials.tasks import load_task

        lr, seed = key["lr"], key["seed"]
        task = load_task(self.task).subset(train=self.train, seed=seed)
        model, tokenizer = load_backbone(self.backbone, task, seed=seed)
        attach(model, self.methods[key["method"]][0], seed=seed)
        trained = self.fit(model, task, tokenizer, lr, self.epochs, seed)
        return self.evaluate(model, task, tokenizer) | trained

    def facts(self) -> Row:
        from guidelib.materials.tasks import load_task
        from guidelib.training.text2text import score

        if (task := load_task(self.task)).kind != "text2text":
            return {}
        splits = {split: getattr(task, split) for split in ("validation", "test")}
        return {"copy": {k: score(d["source"], d["target"], d["source"]) for k, d in splits.items()}}


def summary(result: Row) -> list[Row]:
    """A row per method: learning rate, seeds, mean and standard deviation of the test score (0 to 100)."""
    rows = []
    for label in result["settings"]["methods"]:
        scores = [score(run["test"]) for run in at_best_rate(result, label)]
        rows.append(
            {
                "method": label,
                "lr": best_rate(result, label),
                "seeds": len(scores),
                "mean": statistics.mean(scores),
                "deviation": statistics.stdev(scores) if len(scores) > 1 else float("nan"),
            }
        )
    return rows
