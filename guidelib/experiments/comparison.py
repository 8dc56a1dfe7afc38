"""Methods on one backbone and its tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from guidelib.core.attaching import attach
from guidelib.core.method import Method, Spec, Sum, expect, is_number, is_whole
from guidelib.experiments.base import Arm, Experiment, Row
from guidelib.selective.anchors import HeadOnly

if TYPE_CHECKING:
    from guidelib.materials.tasks import Task


@dataclass(frozen=True)
class Setting(Spec):
    """How a task is trained and scored.  train: number of items drawn by the seed, None for all.  validation,
    test: how many there are, the same ones in every run.  question, answers: see `Task.ask`.  books: of a
    text to text, those that its training items are from, () for all.  back: from target to source."""

    task: str
    train: int | None = None
    epochs: float = 1
    validation: int | None = None
    test: int | None = None
    question: str | None = None
    answers: tuple[str, ...] = ()
    books: tuple[str, ...] = ()
    back: bool = False

    def data(self, seed: int = 0) -> Task:
        """The task with as many items."""
        from guidelib.materials.tasks import load_task

        task = load_task(self.task).subset(validation=self.validation, test=self.test)
        task = task.only(self.books) if self.books else task
        task = task.back() if self.back else task
        task = task.subset(train=self.train, seed=seed)
        return task if self.question is None else task.ask(self.question, self.answers)

    def to_json(self) -> Row:
        """Without what is as usual, so that a result goes on when something that may be set is added."""
        usual = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        return {name: value for name, value in super().to_json().items() if name not in usual}


@dataclass(frozen=True)
class Comparison(Experiment):
    """Methods on one backbone, each on each task.

    tasks: name -> setting.  methods: label -> (method, the first learning rate to try).  Where the head alone
    is trained, the rate is the head's.  Without a method, and with a rate of 0, nothing is trained.
    """

    tasks: dict[str, Setting]
    methods: dict[str, tuple[Method | None, float]]

    def check(self) -> None:
        """Raise ValueError for what no run could be made with."""
        from guidelib.materials.configs import expect_name

        expect_name(self.backbone)
        for name in ("seeds", "tuning_seeds", "batch_size", "max_length"):
            value = getattr(self, name)
            expect(is_whole(value), name, value, "a whole number of at least 1")
        number = is_number(self.head_lr) and self.head_lr > 0
        expect(number, "head_lr", self.head_lr, "a learning rate such as 1.0e-2")
        for name, setting in self.tasks.items():
            number = is_number(setting.epochs) and setting.epochs > 0
            expect(number, f"{name}: epochs", setting.epochs, "a positive number")
        precisions = ("no", "bf16", "fp16")
        expect(
            self.mixed_precision in precisions, "mixed_precision", self.mixed_precision, "no, bf16 or fp16"
        )

    def arms(self) -> list[Arm]:
        return [Arm(label, (task,), rate) for task in self.tasks for label, (_, rate) in self.methods.items()]

    def run(self, key: Row, result: Row, folder: Path) -> Row:
        from guidelib.materials.backbones import load_backbone

        lr, seed, setting = key["lr"], key["seed"], self.tasks[key["task"]]
        method, _ = self.methods[key["method"]]
        task = setting.data(seed)
        model, tokenizer = load_backbone(self.backbone, task, seed=seed)
        if method is None:
            return self.evaluate(model, task, tokenizer)
        attach(model, method, seed=seed)
        head_lr = lr if isinstance(method, HeadOnly) else None
        trained = self.fit(model, task, tokenizer, lr, setting.epochs, seed, head_lr)
        return trained if "diverged" in trained else self.evaluate(model, task, tokenizer) | trained

    def facts(self) -> Row:
        """The scores of copying, where a task is text to text, and the sizes of the test splits.  Raises
        ValueError for a method that does not fit the backbone."""
        from guidelib.training.text2text import score

        copy, items = {}, {}
        for name, setting in self.tasks.items():
            task = setting.data()
            self._expect_fit(task)
            items[name] = len(task.test)
            if task.kind == "text2text":
                splits = {split: getattr(task, split) for split in ("validation", "test")}
                copy[name] = {k: score(d["source"], d["target"], d["source"]) for k, d in splits.items()}
        return {"items": items} | ({"copy": copy} if copy else {})

    def _expect_fit(self, task: Task) -> None:
        from guidelib.materials.backbones import blank_backbone
        from guidelib.materials.configs import load_config

        for label, (method, _) in self.methods.items():
            if method is None:
                continue
            with torch.device("meta"):
                blank = blank_backbone(load_config(self.backbone), task)
            try:
                attach(blank, method)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{label}: {error}") from error


def read_plan(path: Path) -> Comparison:
    """A comparison from a YAML file.

        backbone: minilm
        tasks:
          movie-reviews: {train: 2000, epochs: 3}
        methods:
          head only: {type: HeadOnly, rate: 1.0e-2}
          LoRA r=8: {type: LoRA, r: 8, alpha: 16, rate: 4.0e-3}
          NF4 with LoRA: {sum: [{type: NF4}, {type: LoRA, r: 8}], rate: 4.0e-3}
          no tuning: {}

    ``seeds``, ``tuning_seeds``, ``batch_size``, ``max_length``, ``head_lr`` and ``mixed_precision`` may stand
    beside ``backbone``.  A task's name may differ from that of its data: ``{task: movie-reviews}``.  Raises
    ValueError that names the file and what is wrong in it.
    """
    path = Path(path)
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        expect(isinstance(settings, dict), "plan", settings, "a mapping with backbone, tasks and methods")
        if settings.get("mixed_precision") is False:  # as YAML reads "no"
            settings["mixed_precision"] = "no"
        tasks = {name: _setting(name, given) for name, given in _entries(settings, "tasks")}
        methods = {label: _method(label, given) for label, given in _entries(settings, "methods")}
        plan = Comparison(**settings | {"tasks": tasks, "methods": methods})
        plan.check()
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"path: {path.name} is not a plan of a comparison: {error}") from error
    return plan


def _entries(settings: dict[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    """What stands under ``name``.  YAML reads some labels as numbers or truth values; JSON has texts only."""
    found = settings.get(name)
    expect(isinstance(found, dict) and found, name, found, "a mapping with one entry or more")
    for label in found:
        expect(isinstance(label, str), f"{name}: label", label, "a text: put it in quotes")
    return found.items()


def _setting(name: str, given: Any) -> Setting:
    expect(given is None or isinstance(given, dict), name, given, "a mapping such as {train: 2000}")
    return Setting(**{"task": name} | (given or {}))


def _method(label: str, given: Any) -> tuple[Method | None, float]:
    expect(isinstance(given, dict), label, given, "a mapping such as {type: LoRA, r: 8, rate: 4.0e-3}")
    if not given:
        return None, 0.0
    given = dict(given)
    rate = given.pop("rate", None)
    number = isinstance(rate, float) and is_number(rate) and rate > 0
    expect(number, f"{label}: rate", rate, "a learning rate such as 4.0e-3")
    members = given.pop("sum", None)
    listed = members is None or (isinstance(members, list) and members)
    expect(listed, f"{label}: sum", members, "a list such as [{type: NF4}, {type: LoRA, r: 8}]")
    expect(not (members and given), f"{label}: beside sum and rate", given, "nothing")
    method = Sum(tuple(map(Spec.from_json, members))) if members else Spec.from_json(given)
    expect(isinstance(method, Method), label, given, "a method such as {type: LoRA, r: 8}")
    return method, rate
