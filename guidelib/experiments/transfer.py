"""From domain to domain: an adapter for each, and what those of the others are worth to one with few
sentences.

The adapters of the first seed stay in a folder beside the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.additive.adapters.fusion import AdapterFusion
from guidelib.core.attaching import Attachment, attach, load
from guidelib.core.method import Spec
from guidelib.experiments.base import Arm, Experiment, Results, Row, score
from guidelib.selective.anchors import HeadOnly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from guidelib.materials.tasks import Task

DOMAINS = ("movie-reviews", "amazon", "news-comments", "tweets")  # one question, the same two labels
ALL = "all"  # the domain of a run that is trained on all of them
OWN, FEW, MANY = "its own adapter", 256, 2000


@dataclass(frozen=True)
class Way(Spec):
    """One way to learn a domain.

    start: "head", a new head on the frozen model; "new", a new adapter; "pooled", one for all domains;
    "fusion of all" adapters that way OWN has made, or "fusion of others", without the domain's own;
    "nearest", the other domains' adapter that is best on this one's validation data, head included.
    train: sentences of the domain.  rate: the first learning rate to try.
    """

    start: str
    train: int
    epochs: float
    rate: float


@dataclass(frozen=True)
class Transfer(Experiment):
    """Each way on each domain.  A way has one rate for all domains."""

    ways: dict[str, Way]
    domains: tuple[str, ...] = DOMAINS
    adapter: PfeifferAdapter = PfeifferAdapter(r=16)

    def arms(self) -> list[Arm]:
        reuse = ("nearest", "fusion of others", "fusion of all")
        return [
            Arm(
                label,
                (ALL,) if way.start == "pooled" else self.domains,
                way.rate,
                after=(OWN,) if way.start in reuse else (),
            )
            for label, way in self.ways.items()
        ]

    def run(self, key: Row, result: Row, folder: Path) -> Row:
        from guidelib.materials.backbones import load_backbone
        from guidelib.materials.tasks import load_task

        way, domain, lr, seed = self.ways[key["method"]], key["task"], key["lr"], key["seed"]
        tasks = {name: load_task(name).subset(train=way.train, seed=seed) for name in self.domains}
        task = _pool(list(tasks.values())) if domain == ALL else tasks[domain]
        model, tokenizer = load_backbone(self.backbone, task, seed=seed)
        attachment, row = self._start(model, way, domain, seed, result, folder)
        head_lr = lr if way.start == "head" else None
        trained = self.fit(model, task, tokenizer, lr, way.epochs, seed, head_lr)
        if "diverged" in trained:
            return trained
        across = {}
        if key["method"] == OWN or domain == ALL:
            across = {name: self.evaluate(model, other, tokenizer) for name, other in tasks.items()}
            row["across"] = across
        row |= across[domain] if domain in across else self.evaluate(model, task, tokenizer)
        row |= trained
        if isinstance(attachment.method, AdapterFusion):
            row["weights"] = _mean_weights(attachment, task, tokenizer, self.max_length)
        if key["method"] == OWN:
            folder.mkdir(parents=True, exist_ok=True)
            attachment.save(file_of(folder, domain, seed, lr))
        return row

    def _start(
        self, model: PreTrainedModel, way: Way, domain: str, seed: int, result: Row, folder: Path
    ) -> tuple[Attachment, Row]:
        """Attach what the way starts from; and what the run has to say of it."""
        if way.start in ("new", "pooled"):
            return attach(model, self.adapter, seed=seed), {}
        if way.start == "head":
            return attach(model, HeadOnly(), seed=seed), {}
        if way.start == "nearest":
            fits = {
                run["task"]: score(run["across"][domain], "validation")
                for run in self.own(result)
                if run["seed"] == seed and run["task"] != domain
            }
            nearest = max(fits, key=fits.get)
            return load(model, self._made(nearest, seed, result, folder)), {"nearest": nearest}
        names = [name for name in self.domains if way.start == "fusion of all" or name != domain]
        files = tuple(self._made(name, seed, result, folder) for name in names)
        return attach(model, AdapterFusion(files, self.adapter), seed=seed), {}

    def _made(self, domain: str, seed: int, result: Row, folder: Path) -> Path:
        """The adapter of a domain; made again if its file is gone."""
        lr = self.best_rate(result, OWN)
        path = file_of(folder, domain, seed, lr)
        if not path.exists():
            self.run({"task": domain, "method": OWN, "lr": lr, "seed": seed}, result, folder)
        return path

    def best_rate(self, result: Row, label: str) -> float:
        """The learning rate that was chosen for a way."""
        arm = next(arm for arm in self.arms() if arm.method == label)
        return Results(self, result["runs"]).rates(arm)[1]

    def own(self, result: Row) -> list[Row]:
        """The runs of way OWN at its best rate."""
        lr = self.best_rate(result, OWN)
        return [run for run in result["runs"] if (run["method"], run["lr"]) == (OWN, lr)]

    def tidy(self, result: Row, folder: Path) -> None:
        for path in set(folder.glob("*.safetensors")) - set(self.kept(result, folder).values()):
            path.unlink()

    def kept(self, result: Row, folder: Path) -> dict[str, Path]:
        """The adapters of the first seed at the best rate, by domain."""
        lr = self.best_rate(result, OWN)
        return {domain: file_of(folder, domain, 0, lr) for domain in self.domains}


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


def file_of(folder: Path, domain: str, seed: int, lr: float) -> Path:
    """Where the adapter of a run is kept."""
    return folder / f"{domain}-{seed}-{lr:g}.safetensors"


def _pool(tasks: list[Task]) -> Task:
    """The tasks as one."""
    from datasets import concatenate_datasets

    from guidelib.materials.tasks import SPLITS

    splits = {split: concatenate_datasets([getattr(task, split) for task in tasks]) for split in SPLITS}
    return replace(tasks[0], name=ALL, **splits)


TRANSFER = Transfer(
    "minilm",
    mixed_precision="bf16",
    ways={
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


def across(result: Row) -> dict[str, dict[str, list[float]]]:
    """Test accuracy in per cent of each domain's adapter (and head) on each domain, one for each seed."""
    domains = result["settings"]["domains"]
    found = {trained: {tested: [] for tested in domains} for trained in domains}
    for run in TRANSFER.own(result):
        for tested in domains:
            found[run["task"]][tested].append(score(run["across"][tested]))
    return found
