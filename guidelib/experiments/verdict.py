"""One verdict for the whole book: is a method better than another, as good, worse, or is that open?

The seed draws the training items, their order and the head, so runs with equal seeds are pairs, and only the
differences within pairs say something.  For each method there is the mean difference from the reference with
its 95 % interval and p-value (paired t-test).  The verdict is then

    above, below   the p-value is less than 0.01
    equal          it is not, and the interval lies within the margin
    open           neither
    none           the best rate of one of the two was at the edge of the rates tried, or seeds are missing

0.01 is 0.05 corrected for five comparisons (Bonferroni), about as many as a page makes.  Corrected for those
that a page really makes, the same two runs would be told apart on one page and not on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from guidelib.core.method import expect
from guidelib.experiments.base import Row, preference, score

LEVEL, SIGNIFICANT = 0.95, 0.01


@dataclass(frozen=True)
class Verdict:
    """A method on a task beside the reference; scores in per cent, one for each seed.

    rates: learning rate -> mean validation score.  difference, low, high: of the paired differences, None for
    the reference.  p: of the paired t-test.  edge: whether the best rate is the lowest or highest tried.
    A rate of 0, where nothing is trained, is at none.
    """

    task: str
    method: str
    lr: float
    rates: dict[float, float]
    scores: tuple[float, ...]
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: str = "none"

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))

    @property
    def deviation(self) -> float:
        """The standard deviation over the seeds."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else float("nan")

    @property
    def edge(self) -> bool:
        return self.lr > 0 and self.lr in (min(self.rates), max(self.rates))


def compare(
    result: Row,
    reference: str,
    *,
    task: str | None = None,
    methods: Sequence[str] | None = None,
    margin: float = 1.0,
) -> list[Verdict]:
    """The verdict on each method of a result on one task, in the order of its settings, the reference
    included.

    reference: the label to compare with.  task: its name, the result's first one without it.  methods: the
    labels to compare, which the verdict on each does not depend on.  margin: in points of the score.  Raises
    ValueError for a name that the result does not have.
    """
    tasks = list(result["settings"]["tasks"])
    task = tasks[0] if task is None else task
    expect(task in tasks, "task", task, f"one of {', '.join(tasks)}")
    labels = list(result["settings"]["methods"])
    for label in (reference, *(methods or ())):
        expect(label in labels, "method", label, f"one of {', '.join(labels)}")
    chosen = [label for label in labels if methods is None or label in methods or label == reference]
    found = {label: _best(result, task, label) for label in chosen}
    found = {label: row for label, row in found.items() if row is not None}
    if reference not in found:
        return list(found.values())
    base = found[reference]
    seeds = result["settings"]["seeds"]
    for row in found.values():
        if row is base or not _comparable(row, base, seeds):
            continue
        test = stats.ttest_rel(row.scores, base.scores)
        interval = test.confidence_interval(LEVEL)
        difference = float(np.mean(np.subtract(row.scores, base.scores)))
        low, high = (float(np.nan_to_num(x, nan=difference)) for x in interval)  # nan: all pairs the same
        p, verdict = float(np.nan_to_num(test.pvalue, nan=1.0)), "open"
        if p < SIGNIFICANT:
            verdict = "above" if difference > 0 else "below"
        elif -margin <= low and high <= margin:
            verdict = "equal"
        found[row.method] = replace(row, difference=difference, low=low, high=high, p=p, verdict=verdict)
    return list(found.values())


def best_runs(result: Row, label: str, *, task: str | None = None) -> list[Row]:
    """The runs of a method on a task at its best rate; none if that is not chosen yet.  Raises ValueError as
    `compare` does."""
    best = {(row.task, row.method, row.lr) for row in compare(result, label, task=task, methods=())}
    return [run for run in result["runs"] if (run["task"], run["method"], run["lr"]) in best]


def _best(result: Row, task: str, label: str) -> Verdict | None:
    """What the runs say of a method alone; None if its rate is not chosen yet."""
    settings = result["settings"]
    tuning = min(settings["tuning_seeds"], settings["seeds"])
    shared = "targets" in settings  # a way of a Transfer has one rate for all of its tasks
    runs = [run for run in result["runs"] if run["method"] == label and (shared or run["task"] == task)]
    tasks, tried = {run["task"] for run in runs}, {}
    if task not in tasks:
        return None
    for lr in sorted({run["lr"] for run in runs}):
        first = [run for run in runs if run["lr"] == lr and run["seed"] < tuning]
        if len(first) == tuning * len(tasks):
            tried[lr] = preference(first)
    if not tried:
        return None
    lr = max(tried, key=tried.get)
    rates = {lr: mean for lr, (mean, _) in tried.items()}
    scores = {run["seed"]: score(run) for run in runs if (run["task"], run["lr"]) == (task, lr)}
    return Verdict(task, label, lr, rates, tuple(scores[seed] for seed in sorted(scores)))


def _comparable(row: Verdict, base: Verdict, seeds: int) -> bool:
    """Whether both are at a rate of their own with all seeds, which then are the same ones.  Of two seeds the
    differences often coincide, since scores come in steps, and would look certain."""
    return not row.edge and not base.edge and len(row.scores) == len(base.scores) == seeds > 2
