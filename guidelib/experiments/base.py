"""What all experiments have in common: runs with names, the choice of a rate, training and evaluation."""

from __future__ import annotations

import json
import statistics
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guidelib.core.attaching import attached
from guidelib.core.method import expect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from guidelib.materials.tasks import Task

Row = dict[str, Any]  # a result, a run, what names one, scores: as JSON has them


@dataclass(frozen=True)
class Experiment(ABC):
    """Runs of training and evaluation on one backbone, with the same settings and several seeds."""

    backbone: str
    _: KW_ONLY
    head_lr: float = 1e-2
    batch_size: int = 32
    max_length: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)

    def to_json(self) -> Row:
        return json.loads(json.dumps(vars(self), default=lambda value: value.to_json()))

    @abstractmethod
    def runs(self, result: Row) -> Iterator[Row]:
        """What names each run, in the order in which they are made: a rate can so depend on the runs before
        it."""

    @abstractmethod
    def run(self, key: Row, result: Row, folder: Path) -> Row:
        """Make the run of that name; ``folder`` is for files that later runs need."""

    def facts(self) -> Row:
        """What the result says besides its runs."""
        return {}

    def tidy(self, result: Row, folder: Path) -> None:  # noqa: B027 (most leave nothing behind)
        """Remove what no one needs once all runs are made."""

    def fit(
        self,
        model: PreTrainedModel,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        lr: float,
        epochs: float,
        seed: int,
    ) -> Row:
        """Train what is attached, and what the training says of itself; the count is that of what is left
        then."""
        from guidelib.training.fit import fit

        settings = {"head_lr": self.head_lr, "batch_size": self.batch_size, "max_length": self.max_length}
        trained = fit(model, task, tokenizer, lr=lr, epochs=epochs, seed=seed, **settings)
        return {
            "steps": trained.steps,
            "last_losses": round(statistics.mean(trained.losses[-20:]), 4),
            "seconds": round(trained.seconds, 1),
            "count": asdict(attached(model).count()),
        }

    def evaluate(self, model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Row:
        """The scores on the two splits that are not trained on."""
        from guidelib.training.fit import evaluate

        return {
            split: evaluate(model, task, tokenizer, split=split, max_length=self.max_length)
            for split in ("validation", "test")
        }


def best_rate(result: Row, label: str) -> float:
    """The learning rate of ``label`` with the highest validation score at the first seed: the mean over the
    tasks, where there are several; where scores tie, the one with the lowest loss."""
    first, tried = result["settings"]["seeds"][0], defaultdict(list)
    for run in result["runs"]:
        if run["method"] == label and run["seed"] == first:
            tried[run["lr"]].append((score(run["validation"]), -run["validation"]["loss"]))
    expect(bool(tried), "label", label, "a method that the result holds runs of")
    return max(tried, key=lambda lr: [statistics.mean(values) for values in zip(*tried[lr], strict=True)])


def at_best_rate(result: Row, label: str) -> list[Row]:
    """The runs of ``label`` at its best learning rate, all seeds."""
    lr = best_rate(result, label)
    return [run for run in result["runs"] if (run["method"], run["lr"]) == (label, lr)]


def score(scores: dict[str, float]) -> float:
    """Accuracy in per cent, or chrF, which goes to 100, too."""
    return 100 * scores["accuracy"] if "accuracy" in scores else scores["chrf"]
