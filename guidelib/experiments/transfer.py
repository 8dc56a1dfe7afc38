"""From domain to domain: an adapter for each, and what those of the others are worth to one with few
sentences.

The adapters of the first seed stay in a folder beside the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.additive.adapters.fusion import AdapterFusion
from guidelib.core.attaching import Attachment, attach, load
from guidelib.core.method import Spec
from guidelib.experiments.base import Experiment, Row, at_best_rate, best_rate, score
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
    train: sentences of the domain.  rates: learning rates to try.
    """

    start: str
    train: int
    epochs: float
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Transfer(Experiment):
    """Each way on each domain.  The rate of a way is the best by its mean accuracy on the validation data of
    all domains, with the first seed."""

    ways: dict[str, Way]
    domains: tuple[str, ...] = DOMAINS
    adapter: PfeifferAdapter = PfeifferAdapter(r=16)

    def runs(self, result: Row) -> Iterator[Row]:
        for label, way in self.ways.items():
            domains = (ALL,) if way.start == "pooled" else self.domains
            for lr in way.rates:
                for domain in domains:
                    yield {"method": label, "domain": domain, "lr": lr, "seed": self.seeds[0]}
            for seed in self.seeds[1:]:
                for domain in domains:
                    yield {"method": label, "domain": domain, "lr": best_rate(result, label), "seed": seed}

    def run(self, key: Row, result: Row, folder: Path) -> Row:
        from guidelib.materials.backbones import load_backbone
        from guidelib.materials.tasks import load_task

        way, domain, lr, seed = self.ways[key["method"]], key["domain"], key["lr"], key["seed"]
        tasks = {name: load_task(name).subset(train=way.train, seed=seed) for name in self.domains}
        task = _pool(list(tasks.values())) if domain == ALL else tasks[domain]
        model, tokenizer = load_backbone(self.backbone, task, seed=seed)
        attachment, row = self._start(model, way, domain, seed, result, folder)
        trained = self.fit(model, task, tokenizer, lr, way.epochs, seed)
        across = {}
        if key["method"] == OWN or domain == ALL:
            across = {name: self.evaluate(model, other, tokenizer) for name, other in tasks.items()}
            row["across"] = across
        row |= across[domain] if domain in across else self.evaluate(model, task, tokenizer)
        row |= trained
        if isinstance(attachment.method, AdapterFusion):
            row["weights"] = _mean_weights(attachment, task, tokenizer, self.max_length)
        if key["method"] == OWN:
            folder.mkdir(exist_ok=True)
            attachment.save(_file(folder, domain, seed, lr))
        return row

    def _start(
        self, model: PreTrainedModel, way: Way, domain: str, seed: int, result: Row, folder: Path
    ) -> tuple[Attachment, Row]:
        """Attach what the way starts from; and what the run has to say of it."""
        if way.start in ("new", "pooled"):
            return attach(model, self.adapter, seed=seed), {}
        if way.start == "head":
            return attach(model, HeadOnly(), seed=seed), {}
        lr = best_rate(result, OWN)
        if way.start == "nearest":
            fits = {
                run["domain"]: score(run["across"][domain]["validation"])
                for run in at_best_rate(result, OWN)
                if run["seed"] == seed and run["domain"] != domain
            }
            nearest = max(fits, key=fits.get)
            return load(model, _file(folder, nearest, seed, lr)), {"nearest": nearest}
        names = [name for name in self.domains if way.start == "fusion of all" or name != domain]
        fusion = AdapterFusion(tuple(_file(folder, name, seed, lr) for name in names), self.adapter)
        return attach(model, fusion, seed=seed), {}

    def tidy(self, result: Row, folder: Path) -> None:
        for path in set(folder.glob("*.safetensors")) - set(self.kept(result, folder).values()):
            path.unlink()

    def kept(self, result: Row, folder: Path) -> dict[str, Path]:
        """The adapters of the first seed at the best rate, by domain."""
        lr = best_rate(result, OWN)
        return {domain: _file(folder, domain, self.seeds[0], lr) for domain in self.domains}


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


def _file(folder: Path, domain: str, seed: int, lr: float) -> Path:
    """Where the adapter of a run is kept."""
    return folder / f"{domain}-{seed}-{lr:g}.safetensors"


def _pool(tasks: list[Task]) -> Task:
    """The tasks as one."""
    from datasets import concatenate_datasets

    from guidelib.materials.tasks import SPLITS

    splits = {split: concatenate_datasets([getattr(task, split) for task in tasks]) for split in SPLITS}
    return replace(tasks[0], name=ALL, **splits)


def scores(result: Row) -> dict[str, dict[str, list[float]]]:
    """Test accuracy in per cent by way and domain, one for each seed."""
    domains = result["settings"]["domains"]
    found = {label: {domain: [] for domain in domains} for label in result["settings"]["ways"]}
    for label in found:
        for run in at_best_rate(result, label):
            tests = {run["domain"]: run["test"]}
            if run["domain"] == ALL:
                tests = {domain: run["across"][domain]["test"] for domain in domains}
            for domain, test in tests.items():
                found[label][domain].append(score(test))
    return found


def across(result: Row) -> dict[str, dict[str, list[float]]]:
    """Test accuracy in per cent of each domain's adapter (and head) on each domain, one for each seed."""
    domains = result["settings"]["domains"]
    found = {trained: {tested: [] for tested in domains} for trained in domains}
    for run in at_best_rate(result, OWN):
        for tested in domains:
            found[run["domain"]][tested].append(score(run["across"][tested]["test"]))
    return found
