"""From task to task: what has been learned for each, and what that of the others is worth to one with few
items.

What the first seed has learned for each task stays in a folder beside the result.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.additive.adapters.fusion import AdapterFusion
from guidelib.additive.soft_prompts.ipt import IPT, fit_space
from guidelib.additive.soft_prompts.prompt import PromptTuning
from guidelib.additive.soft_prompts.spot import SPoT, read_prompt
from guidelib.core.anatomy import Anatomy
from guidelib.core.attaching import Attachment, attach, load
from guidelib.core.method import Method, Spec, expect
from guidelib.experiments.base import Arm, Experiment, Results, Row, score
from guidelib.experiments.comparison import Setting
from guidelib.selective.anchors import HeadOnly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from guidelib.materials.tasks import Task

ALL = "all"  # the task of a run that is trained on all of them
OWN = "its own"  # the way whose results the others start from
REUSE = ("nearest", "fusion of others", "fusion of all", "SPoT", "IPT")


@dataclass(frozen=True)
class Way(Spec):
    """One way to learn a task.

    start: "head", a new head on the frozen model; "new", what is tuned, anew; "pooled", one for all tasks;
    "fusion of all" adapters that way OWN has made, or "fusion of others", without the task's own; "nearest",
    the one of another task that is best on this one's validation data, head included; "SPoT", a prompt that
    starts there; "IPT", one in the space of the other tasks' prompts, and "IPT, random", in a random one.
    train: items of the task.  rate: the first learning rate to try.
    """

    start: str
    train: int
    epochs: float
    rate: float


@dataclass(frozen=True)
class Transfer(Experiment):
    """Each way on each task.  A way has one rate for all of them.

    methods: label -> way.  tuned: what way OWN attaches.  targets: the tasks that the other ways are tried
    on, all without.
    """

    tasks: dict[str, Setting]
    methods: dict[str, Way]
    tuned: Method = PfeifferAdapter(r=16)
    targets: tuple[str, ...] = ()

    def arms(self) -> list[Arm]:
        every, targets = tuple(self.tasks), self.targets or tuple(self.tasks)
        return [
            Arm(
                label,
                (ALL,) if way.start == "pooled" else every if label == OWN else targets,
                way.rate,
                after=(OWN,) if way.start in REUSE else (),
            )
            for label, way in self.methods.items()
        ]

    def run(self, key: Row, result: Row, folder: Path) -> Row:
        from guidelib.materials.backbones import load_backbone

        way, name, lr, seed = self.methods[key["method"]], key["task"], key["lr"], key["seed"]

        def data(each: str) -> Task:
            return replace(self.tasks[each], train=way.train).data(seed)

        task = _pool([data(each) for each in self.tasks]) if name == ALL else data(name)
        model, tokenizer = load_backbone(self.backbone, task, seed=seed)
        started = self._start(model, way, name, seed, result, folder)
        if started is None:
            return {"diverged": True}
        attachment, row = started
        head_lr = lr if way.start == "head" else None
        trained = self.fit(model, task, tokenizer, lr, way.epochs, seed, head_lr)
        if "diverged" in trained:
            return trained
        scores = self.evaluate(model, task, tokenizer)
        if key["method"] == OWN or name == ALL:
            row["across"] = {
                to: scores if to == name else self.evaluate(model, data(to), tokenizer, write=False)
                for to in self.targets or self.tasks
            }
        row |= scores | trained
        if isinstance(attachment.method, AdapterFusion):
            row["weights"] = _mean_weights(attachment, task, tokenizer, self.max_length)
        if key["method"] == OWN:
            folder.mkdir(parents=True, exist_ok=True)
            attachment.save(file_of(folder, name, seed, lr))
        return row

    def _start(
        self, model: PreTrainedModel, way: Way, name: str, seed: int, result: Row, folder: Path
    ) -> tuple[Attachment, Row] | None:
        """Attach what the way starts from; and what the run has to say of it.  None if that has diverged."""
        if way.start in ("new", "pooled"):
            return attach(model, self.tuned, seed=seed), {}
        if way.start == "head":
            return attach(model, HeadOnly(), seed=seed), {}
        if way.start == "IPT, random":
            return attach(model, IPT(self.tuned.length), seed=seed), {}
        if way.start in ("nearest", "SPoT"):
            fits = {
                run["task"]: score(run["across"][name], "validation")
                for run in self.chosen(result, OWN)
                if run["seed"] == seed and run["task"] != name and "across" in run
            }
            if not fits:
                return None
            nearest = max(fits, key=fits.get)
            file = self._made(nearest, seed, result, folder)
            if way.start == "nearest":
                return load(model, file), {"nearest": nearest}
            spot = SPoT(self.tuned.length, sources=(file,))
            return attach(model, spot, seed=seed), {"nearest": nearest}
        names = [each for each in self.tasks if way.start == "fusion of all" or each != name]
        files = tuple(self._made(each, seed, result, folder) for each in names)
        if not all(file.exists() for file in files):
            return None
        if way.start == "IPT":
            prompts = [read_prompt(Anatomy(model), file) for file in files]
            ipt = IPT(self.tuned.length)
            with tempfile.TemporaryDirectory() as place:
                space = fit_space(prompts, ipt.d, hidden=ipt.hidden, seed=seed).save(Path(place, "space"))
                return attach(model, replace(ipt, space=space), seed=seed), {}
        return attach(model, AdapterFusion(files, self.tuned), seed=seed), {}

    def _made(self, name: str, seed: int, result: Row, folder: Path) -> Path:
        """The file of what has been learned for a task, made again if it is gone; there is none if that
        diverges."""
        lr = self.best_rate(result, OWN)
        path = file_of(folder, name, seed, lr)
        if not path.exists():
            self.run({"task": name, "method": OWN, "lr": lr, "seed": seed}, result, folder)
        return path

    def best_rate(self, result: Row, label: str) -> float:
        """The learning rate that was chosen for a way."""
        arm = next(arm for arm in self.arms() if arm.method == label)
        return Results(self, result["runs"]).rates(arm)[1]

    def chosen(self, result: Row, label: str) -> list[Row]:
        """The runs of a way at the learning rate that was chosen for it."""
        lr = self.best_rate(result, label)
        return [run for run in result["runs"] if (run["method"], run["lr"]) == (label, lr)]

    def facts(self) -> Row:
        """The sizes of the test splits."""
        return {"items": {name: len(setting.data().test) for name, setting in self.tasks.items()}}

    def tidy(self, result: Row, folder: Path) -> None:
        for path in set(folder.glob("*.safetensors")) - set(self.kept(result, folder).values()):
            path.unlink()

    def kept(self, result: Row, folder: Path) -> dict[str, Path]:
        """What the first seed has learned at the best rate, by task."""
        lr = self.best_rate(result, OWN)
        return {name: file_of(folder, name, 0, lr) for name in self.tasks}


def _mean_weights(
    attachment: Attachment, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[float]]:
    """For each layer, how much of which adapter a token takes: the mean over 100 sentences of the test
    split."""
    sentences = task.subset(test=min(100, len(task.test))).test["text"]
    inputs = tokenizer(
        list(sentences), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    inputs = inputs.to(attachment.model.device)
    tokens = inputs["attention_mask"].bool()
    layers = attachment.method.weights(attachment, inputs)
    return [[round(share, 4) for share in weights[tokens].mean(0).tolist()] for weights in layers]


def file_of(folder: Path, name: str, seed: int, lr: float) -> Path:
    """Where what a run has learned is kept."""
    return folder / f"{name}-{seed}-{lr:g}.safetensors"


def _pool(tasks: list[Task]) -> Task:
    """The tasks as one."""
    from datasets import concatenate_datasets

    from guidelib.materials.tasks import SPLITS

    splits = {split: concatenate_datasets([getattr(task, split) for task in tasks]) for split in SPLITS}
    return replace(tasks[0], name=ALL, **splits)


FEW, MANY = 256, 2000
DOMAINS = Transfer(  # one question, the same two labels
    "minilm",
    mixed_precision="bf16",
    tasks={name: Setting(name) for name in ("movie-reviews", "amazon", "news-comments", "tweets")},
    methods={
        OWN: Way("new", MANY, 1, 8e-3),
        "head only": Way("head", MANY, 1, 1e-2),
        "few: head only": Way("head", FEW, 8, 1e-2),
        "few: a new adapter": Way("new", FEW, 8, 8e-3),
        "few: the nearest adapter": Way("nearest", FEW, 8, 4e-3),
        "few: fusion of the others": Way("fusion of others", FEW, 8, 5e-4),
        "fusion of all four": Way("fusion of all", MANY, 1, 2e-4),
        "one adapter for all": Way("pooled", MANY, 1, 4e-3),
    },
)

PROPHETS = ("Isaiah", "Jeremiah", "Ezekiel")
LAW, POETRY = ("Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy"), ("Psalms", "Job", "Proverbs")
BOOKS = {"law": LAW, "poetry": POETRY, "prophets": PROPHETS}
SPLITS = {"validation": 300, "test": 300}
OLD = {name: Setting("modern-bible", books=books, **SPLITS) for name, books in BOOKS.items()}
PROMPTS = Transfer(  # English of 1611 into that of today, and back; all are scored on the Gospels
    "tiny-t5",
    batch_size=16,
    max_length=80,
    tasks=OLD
    | {f"{name}, back": replace(to, back=True) for name, to in OLD.items()}
    | {"Acts": Setting("modern-bible", books=("Acts",), **SPLITS)},
    methods={
        OWN: Way("new", 480, 1, 3.2),
        "few: a new prompt": Way("new", 128, 1, 3.2),
        "few: SPoT": Way("SPoT", 128, 1, 1.6),
        "few: IPT": Way("IPT", 128, 1, 0.4),
        "few: IPT, a random space": Way("IPT, random", 128, 1, 0.2),
    },
    tuned=PromptTuning(length=20),
    targets=("Acts",),
)


def across(result: Row) -> dict[str, dict[str, list[float]]]:
    """Test accuracy in per cent of what was learned for each domain on each domain, one for each seed.
    ``result``: of `DOMAINS`."""
    domains = result["settings"]["tasks"]
    expect(list(domains) == list(DOMAINS.tasks), "result", list(domains), "the transfer between domains")
    found = {trained: {tested: [] for tested in domains} for trained in domains}
    for run in DOMAINS.chosen(result, OWN):
        for tested in domains:
            found[run["task"]][tested].append(score(run.get("across", {}).get(tested, {})))
    return found


def overall(result: Row) -> Row:
    """The transfer between domains with ALL as its one task, for `compare`: its scores are the means over
    the domains.  (A way that is trained on all of them together has the validation score of all items.)
    Where a domain is missing, so is the run.
    """
    domains, same, runs = list(result["settings"]["tasks"]), defaultdict(dict), []
    for run in result["runs"]:
        same[run["method"], run["lr"], run["seed"]][run["task"]] = run
    for (method, lr, seed), made in same.items():
        key = {"task": ALL, "method": method, "lr": lr, "seed": seed}
        if ALL in made:
            tested = [made[ALL].get("across", {}).get(name, {}) for name in domains]
            runs.append(key | _mean([made[ALL]], "validation") | _mean(tested, "test"))
        elif len(made) == len(domains):
            runs.append(key | _mean(made.values(), "validation") | _mean(made.values(), "test"))
    return result | {"settings": result["settings"] | {"tasks": {ALL: {}}}, "runs": runs}


def _mean(runs: Collection[Row], split: str) -> Row:
    """The mean accuracy and loss of runs, one that diverged among them."""
    accuracy = statistics.mean(score(run, split) / 100 for run in runs)
    losses = [run[split]["loss"] if split in run else math.inf for run in runs]
    return {split: {"accuracy": accuracy, "loss": statistics.mean(losses)}}
