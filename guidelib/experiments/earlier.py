"""Reading the transfer between domains as it was made before the present plan: one seed chose the rate.

The page on fusion reads it until the runs of the present plan are in; then this file and that result go.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from guidelib.core.method import expect
from guidelib.experiments.base import Row, score
from guidelib.experiments.transfer import ALL, file_of

OWN = "its own adapter"


def best_rate(result: Row, label: str) -> float:
    """The learning rate of ``label`` with the highest validation score at the first seed: the mean over the
    tasks, where there are several; where scores tie, the one with the lowest loss."""
    first, tried = result["settings"]["seeds"][0], defaultdict(list)
    for run in result["runs"]:
        if run["method"] == label and run["seed"] == first:
            tried[run["lr"]].append((score(run, "validation"), -run["validation"]["loss"]))
    expect(bool(tried), "label", label, "a method that the result holds runs of")
    return max(tried, key=lambda lr: [statistics.mean(values) for values in zip(*tried[lr], strict=True)])


def at_best_rate(result: Row, label: str) -> list[Row]:
    """The runs of ``label`` at its best learning rate, all seeds."""
    lr = best_rate(result, label)
    return [run for run in result["runs"] if (run["method"], run["lr"]) == (label, lr)]


def of_domains(result: Row) -> Row:
    """The transfer between domains in the present form, for `compare`: one task, whose score is the mean over
    the domains."""
    settings, same = result["settings"], defaultdict(dict)
    for run in result["runs"]:
        tests = run["across"] if run["domain"] == ALL else {run["domain"]: run}
        same[run["method"], run["lr"], run["seed"]] |= tests
    runs = []
    for (method, lr, seed), tests in same.items():
        row = {"task": ALL, "method": method, "lr": lr, "seed": seed}
        for split in ("validation", "test"):
            each = [test[split] for test in tests.values()]
            row[split] = {name: statistics.mean(x[name] for x in each) for name in ("accuracy", "loss")}
        runs.append(row)
    plan = {"tasks": {ALL: {}}, "methods": settings["ways"], "tuning_seeds": 1}
    return {"settings": settings | plan | {"seeds": len(settings["seeds"])}, "runs": runs}


def across(result: Row) -> dict[str, dict[str, list[float]]]:
    """Test accuracy in per cent of each domain's adapter (and head) on each domain, one for each seed."""
    domains = result["settings"]["domains"]
    found = {trained: {tested: [] for tested in domains} for trained in domains}
    for run in at_best_rate(result, OWN):
        for tested in domains:
            found[run["domain"]][tested].append(score(run["across"][tested]))
    return found


def adapters(result: Row, folder: Path) -> dict[str, Path]:
    """The trained adapters that are stored beside the transfer, by domain."""
    lr = best_rate(result, OWN)
    return {domain: file_of(folder, domain, 0, lr) for domain in result["settings"]["domains"]}
