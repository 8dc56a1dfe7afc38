"""Experiments that take longer than a notebook may: run by a command, stored with their provenance, shown
on the pages.

``guidelib compare minilm`` runs the experiment of that name, or what is left of it; ``guidelib compare
my.yaml`` one of your own.  What it has made stands in a file, which grows with each run.
"""

from __future__ import annotations

from pathlib import Path

from guidelib.core.method import expect
from guidelib.experiments.base import Experiment, Results, Row
from guidelib.experiments.comparison import Comparison, Setting, read_plan
from guidelib.experiments.transfer import DOMAINS, PROMPTS, Transfer, across, overall
from guidelib.experiments.verdict import Verdict, best_runs, compare
from guidelib.experiments.work import read, work

__all__ = [
    "Comparison",
    "Experiment",
    "Results",
    "Setting",
    "Transfer",
    "Verdict",
    "across",
    "best_runs",
    "compare",
    "experiment",
    "load_results",
    "names",
    "overall",
    "read_plan",
    "run",
]
PLANS, RESULTS = Path(__file__).parent / "plans", Path(__file__).parent / "results"
TRANSFERS = {"domains": DOMAINS, "prompts": PROMPTS}


def names() -> list[str]:
    """The experiments of this book."""
    return [*sorted(path.stem for path in PLANS.glob("*.yaml")), *TRANSFERS]


def experiment(name: str) -> Experiment:
    """An experiment of this book by its name, or that of a YAML file.  Raises ValueError for another name."""
    if str(name).endswith((".yaml", ".yml")) and Path(name).is_file():
        return read_plan(Path(name))
    expect(name in names(), "name", name, f"one of {', '.join(names())}, or a YAML file that is there")
    return TRANSFERS.get(name) or read_plan(PLANS / f"{name}.yaml")


def run(name: str, folder: Path | None = None, *, jobs: int = 1, progress: bool = True) -> Path:
    """Run what is missing of an experiment, with ``jobs`` processes; returns the file.

    The file stands in ``folder``: the package's for an experiment of this book, else beside the YAML file.
    Raises ValueError for an unknown name, or if the file was made with other settings or versions.
    """
    planned = experiment(name)
    own = str(name).endswith((".yaml", ".yml"))
    folder = folder or (Path(name).parent if own else RESULTS)
    return work(planned, folder / f"{Path(name).stem}.json", jobs=jobs, progress=progress)


def load_results(name: str) -> Row:
    """A stored result: its settings, provenance and runs.  ``name``: of this book, or a file of your own.

    Raises FileNotFoundError with the command to make it, ValueError for a name that is none of this book's.
    """
    own = str(name).endswith(".json")
    path = Path(name) if own else RESULTS / f"{name}.json"
    if not path.exists():
        plan = path.with_suffix(".yaml") if own else name
        expect(own or name in names(), "name", name, f"one of {', '.join(names())}, or a JSON file")
        raise FileNotFoundError(
            f"name: no result {str(name)!r} is stored; `guidelib compare {plan}` makes it"
        )
    return read(path)
