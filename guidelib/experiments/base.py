"""What all experiments have in common: what is tuned together, which learning rate is taken, what a run is.

A run trains one method on one task with one rate and one seed.  An arm is what shares a learning rate.  Its
rates are its first one times powers of 2: the first, half and twice of it are tried with some of the seeds,
and as long as the best is the lowest or the highest that was tried, the next one is tried as well, but no
more than ``MOST``.  The best has the highest validation score, on average over those seeds; the other seeds
are run with it alone.  The test split takes no part in the choice.
"""

from __future__ import annotations

import base64
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guidelib.core.attaching import attached
from guidelib.core.method import expect

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from guidelib.materials.tasks import Task

Row = dict[str, Any]  # a result, a run, what names one, scores: as JSON has them
KEY = ("task", "method", "lr", "seed")  # what names a run
MOST = 9  # rates of an arm


@dataclass(frozen=True)
class Arm:
    """A method on a task, or on several that share its learning rate.

    rate: the first one to try; 0 where nothing is trained.  after: labels of methods that must be complete
    before.
    """

    method: str
    tasks: tuple[str, ...]
    rate: float
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment(ABC):
    """Runs of training and evaluation on one backbone, with the same settings and several seeds.

    seeds: how many; the first ``tuning_seeds`` of them choose the learning rates.  head_lr: the rate of a
    task head beside a method.
    """

    backbone: str
    _: KW_ONLY
    head_lr: float = 1e-2
    batch_size: int = 32
    max_length: int = 64
    seeds: int = 8
    tuning_seeds: int = 3
    mixed_precision: str = "no"

    def to_json(self) -> Row:
        return json.loads(json.dumps(vars(self), default=lambda value: value.to_json()))

    @abstractmethod
    def arms(self) -> list[Arm]:
        """What is tuned, in the order in which it is run."""

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
        head_lr: float | None = None,
    ) -> Row:
        """Train what is attached, and what the training says of itself; the count is that of what is left
        then.  A training that diverged says only that."""
        from guidelib.training.fit import fit

        settings = {
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "mixed_precision": self.mixed_precision,
        }
        settings |= {"head_lr": head_lr or self.head_lr, "lr": lr, "epochs": epochs, "seed": seed}
        try:
            trained = fit(model, task, tokenizer, progress=False, **settings)
        except FloatingPointError:
            return {"diverged": True}
        tenths = [part for part in np.array_split(trained.losses, 10) if part.size]
        return {
            "steps": trained.steps,
            "losses": [round(float(part.mean()), 4) for part in tenths],
            "seconds": round(trained.seconds, 1),
            "count": asdict(attached(model).count()),
        }

    def evaluate(
        self, model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, write: bool = True
    ) -> Row:
        """The scores on the two splits that are not trained on, and for the test split those of each item.
        Texts are written for the test split alone, if at all."""
        from guidelib.training.fit import evaluate

        settings = {"max_length": self.max_length, "mixed_precision": self.mixed_precision}
        found = {}
        for split in ("validation", "test"):
            last = split == "test"
            scores = evaluate(
                model, task, tokenizer, split=split, each=last, write=last and write, **settings
            )
            each = scores.pop("each", None)
            found[split] = {name: round(value, 6) for name, value in scores.items()}
            if each is not None:
                found[split]["each"] = pack(each)
        return found


def pack(each: np.ndarray) -> str:
    """The result of each item as text: a bit for right or wrong, a byte (to half a point) for chrF."""
    data = np.packbits(each) if each.dtype == bool else np.round(2 * each).astype(np.uint8)
    return base64.b64encode(data.tobytes()).decode()


def unpack(text: str, items: int) -> np.ndarray:
    """The result of each of ``items`` items (two or more), in per cent: what ``pack`` has packed."""
    expect(items > 1, "items", items, "two or more: of one, a bit and a byte look alike")
    data = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    return data / 2 if len(data) == items else 100.0 * np.unpackbits(data)[:items]


def score(run: Row, split: str = "test") -> float:
    """Accuracy in per cent; for text to text the probability of the right token in per cent, the geometric
    mean over the tokens.  (By chrF, a model that copies is hard to beat where most words stay.)  A run that
    diverged has 0."""
    scores = run.get(split)
    if scores is None:
        return 0.0
    return 100 * (scores["accuracy"] if "accuracy" in scores else math.exp(-scores["loss"]))


def preference(runs: list[Row]) -> tuple[float, float]:
    """What a rate is chosen by, from its runs: the mean validation score, rounded so that equal sums of right
    answers tie (each is stored with six digits), then the negative mean loss."""
    losses = [run["validation"]["loss"] if "validation" in run else math.inf for run in runs]
    mean = statistics.mean(score(run, "validation") for run in runs)
    return round(mean, 3), -statistics.mean(losses)


class Results:
    """The runs of an experiment so far, and what they decide."""

    def __init__(self, experiment: Experiment, runs: Iterable[Row]):
        self.experiment = experiment
        self.made = {tuple(run[name] for name in KEY): run for run in runs}

    def rates(self, arm: Arm) -> tuple[list[float], float | None]:
        """The rates to try in ascending order, and the best of them, None as long as runs are missing."""
        if arm.rate == 0:
            return [0.0], 0.0
        tried = [arm.rate / 2, arm.rate, arm.rate * 2]
        while True:
            values = [self.validation(arm, lr) for lr in tried]
            if None in values:
                return tried, None
            best = values.index(max(values))
            if best == 0 and len(tried) < MOST:
                tried.insert(0, tried[0] / 2)
            elif best == len(tried) - 1 and len(tried) < MOST:
                tried.append(tried[-1] * 2)
            else:
                return tried, tried[best]

    def validation(self, arm: Arm, lr: float) -> tuple[float, float] | None:
        """Its `preference`, None if a run is missing."""
        keys = [(task, arm.method, lr, seed) for task in arm.tasks for seed in range(self.tuning)]
        if any(key not in self.made for key in keys):
            return None
        return preference([self.made[key] for key in keys])

    @property
    def tuning(self) -> int:
        return min(self.experiment.tuning_seeds, self.experiment.seeds)

    def missing(self, arm: Arm) -> Iterator[Row]:
        """What names the runs of ``arm`` that are not made yet, as far as they are known."""
        rates, best = self.rates(arm)
        seeds = {lr: self.experiment.seeds if lr == best else self.tuning for lr in rates}
        for lr in rates:
            for seed in range(seeds[lr]):
                for task in arm.tasks:
                    if (task, arm.method, lr, seed) not in self.made:
                        yield dict(zip(KEY, (task, arm.method, lr, seed), strict=True))

    def complete(self, arm: Arm) -> bool:
        return self.rates(arm)[1] is not None and next(self.missing(arm), None) is None

    def to_do(self) -> Iterator[Row]:
        """The runs that can be made now."""
        arms = self.experiment.arms()
        done = {arm.method for arm in arms} - {arm.method for arm in arms if not self.complete(arm)}
        for arm in arms:
            if done.issuperset(arm.after):
                yield from self.missing(arm)

    def expected(self) -> int:
        """How many runs are missing at the least, those included that are not known yet."""
        arms, n = self.experiment.arms(), self.experiment.seeds
        left = sum(len(list(self.missing(arm))) for arm in arms)
        return left + sum((n - self.tuning) * len(arm.tasks) for arm in arms if self.rates(arm)[1] is None)

    def sorted(self) -> list[Row]:
        """The runs in an order that does not depend on when they were made."""
        place = {(task, arm.method): i for i, arm in enumerate(self.experiment.arms()) for task in arm.tasks}
        return sorted(
            self.made.values(),
            key=lambda run: (place[run["task"], run["method"]], run["lr"], run["seed"], run["task"]),
        )
