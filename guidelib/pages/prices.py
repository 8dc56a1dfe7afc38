"""What a page shows of costs: one table of what its methods cost, one of the survey's claims beside it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from guidelib.core.attaching import Count, attach
from guidelib.core.method import Method, expect, is_whole
from guidelib.costs import operations, saved_bytes
from guidelib.costs.benchmark import ratio, take_turns
from guidelib.costs.measure import Costs, measure
from guidelib.costs.predict import expect_room
from guidelib.materials.backbones import load_backbone
from guidelib.pages.viz import Output, live, table
from guidelib.selective.anchors import FullFineTuning
from guidelib.survey import claims

MiB = 2**20
TERMS = ("weights", "gradients", "optimiser", "saved activations")


@dataclass(frozen=True)
class Price:
    """What one method costs.  memory: for each batch size the bytes of the four `TERMS` of a training step.
    forward_flops, backward_flops: of a step at the first batch size.  operations: of one forward pass at
    inference with the method attached; merged: the same once merged, None where it cannot be; base: without
    it.  exact: whether what the sizes alone predict is what was measured."""

    count: Count
    file_bytes: int
    memory: tuple[dict[str, int], ...]
    forward_flops: int
    backward_flops: int
    operations: int
    merged: int | None
    base: int
    exact: bool

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes of a training step, for each batch size."""
        return tuple(sum(terms.values()) for terms in self.memory)


class CostTable(Output):
    """A table of costs, which gives the `Price` of a method by its label.  full: the label of full
    fine-tuning, None where it is not among the methods."""

    def __init__(self, prices: Mapping[str, Price], full: str | None, batches: Sequence[int], length: int):
        self.prices, self.full = dict(prices), full
        self.exact = {price.exact for price in prices.values()} == {True}
        rows = [_row(label, price, self.prices.get(full), batches) for label, price in prices.items()]
        if len(rows) <= 5:  # a quantity a row: that fits a page
            names = list(rows[0])[1:]
            rows = [{"": name} | {each["method"]: each[name] for each in rows} for name in names]
        sizes = " or ".join(map(str, batches))
        caption = (
            f"Parameters; memory in MiB and GFLOPs of one training step on {sizes} texts of {length} tokens, "
            "where activations are those that autograd saves; operations of one forward pass. In brackets: "
            "of full."
        )
        if self.exact:
            caption += " Activations and FLOPs are exactly what the sizes alone predict."
        super().__init__(**{k.replace("/", "_"): v for k, v in table(rows, caption=caption).bundle.items()})

    def __getitem__(self, label: str) -> Price:
        expect(label in self.prices, "label", label, f"one of {', '.join(self.prices)}")
        return self.prices[label]


def cost_table(
    methods: Mapping[str, Method],
    *,
    backbone: str = "minilm",
    task: str | None = "movie-reviews",
    batches: Sequence[int] = (8, 32),
    length: int = 32,
) -> CostTable:
    """Measure what each method costs on ``backbone`` with the head of ``task``: the three counts, the file,
    the four terms of memory at each size of batch, floating-point operations, operations of a forward pass.

    Every figure is the same on every machine.  In a live notebook, the latency of each method is printed as
    well, as a ratio of paired times.  Raises ValueError for no methods or impossible sizes.
    """
    expect(isinstance(methods, Mapping) and methods, "methods", methods, "a mapping of labels to methods")
    right = isinstance(batches, Sequence) and batches and all(is_whole(n) for n in [*batches, length])
    expect(right, "batches, length", (batches, length), "whole numbers of at least 1, a list of them and one")
    model, _ = load_backbone(backbone, task)
    expect_room(model, length, length)
    inputs = [token_batch(model, size, length) for size in batches]
    base = operations(model, inputs[0])
    prices = {label: _price(model, method, base, inputs) for label, method in methods.items()}
    if live():
        for label, method in methods.items():
            ratio = _latency(model, method, token_batch(model, 1, length))
            print(f"{label}: a forward pass of one text takes {ratio:.2f} times as long as the base's")
    full = next((label for label, method in methods.items() if method == FullFineTuning()), None)
    return CostTable(prices, full, batches, length)


def token_batch(model: PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random texts without padding, the same ones every time, with labels where ``model`` takes any: classes
    where it has a head for them, else the texts themselves."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, min(2000, model.config.vocab_size), (rows, length), generator=generator)
    classes = getattr(model, "classifier", None) or getattr(model, "score", None)
    labels = torch.arange(rows) % model.config.num_labels if classes else ids.clone()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if "labels" not in inspect.signature(model.forward).parameters:
        del batch["labels"]
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def count(config: PretrainedConfig, method: Method) -> Count:
    """The counts of ``method`` on a bare model of that configuration, made without weights: GPT-3 fits.

    Raises ValueError for what is no configuration, and as `attach` does.
    """
    right = isinstance(config, PretrainedConfig)
    expect(right, "config", config, "a transformers configuration such as BertConfig()")
    with torch.device("meta"):
        return attach(AutoModel.from_config(config), method).count()


def survey_table(method: str, found: CostTable, *labels: str) -> Output:
    """The survey's rows for ``method`` (by the name that it prints) beside what was measured, a column for
    each of the ``labels`` of a cost table that holds full fine-tuning.

    Raises ValueError for a name that the survey or the table does not have.
    """
    expect(found.full is not None, "found", list(found.prices), "a cost table with full fine-tuning")
    expect(bool(labels), "labels", labels, f"one or more of {', '.join(found.prices)}")
    full = found[found.full]
    measured = {label: _measured(found[label], full) for label in labels}
    rows = [
        {"": claim, "survey v1": one, "survey v2": two} | {label: measured[label][claim] for label in labels}
        for claim, one, two in claims(method)
    ]
    caption = f"{method}: the survey's claims, and what was measured above (backward FLOPs)."
    return table(rows, caption=caption)


def _measured(price: Price, full: Price) -> dict[str, str]:
    count, less = price.count, price.file_bytes < full.file_bytes
    memory = [mine / whole for mine, whole in zip(price.totals, full.totals, strict=True)]
    more = f"+{price.operations - price.base} operations on {price.base}"
    if price.merged is not None:
        more += f", +{price.merged - price.base} once merged"
    return {
        "trained, %": f"{100 * count.trainable / count.total:.2f}",
        "changed, %": f"{100 * count.changed / count.total:.2f}",
        "storage efficient": f"{_yes(less)}: {price.file_bytes / MiB:.2f} of {full.file_bytes / MiB:.1f} MiB",
        "memory efficient": f"{_yes(max(memory) < 1)}: {' and '.join(f'{m:.2f}' for m in memory)} of full",
        "reduces backpropagation": f"{price.backward_flops / full.backward_flops:.2f} of full's FLOPs",
        "overhead at inference": more,
    }


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _row(label: str, price: Price, full: Price | None, batches: Sequence[int]) -> dict[str, str | int]:
    def of(value: float, whole: float | None) -> str:
        return "" if full is None else f" ({value / whole:.2f})"

    def mib(size: int) -> str:
        return f"{size / MiB:.2f}" if size < 100 * MiB else f"{size / MiB:.1f}"

    memory = {term: mib(price.memory[0][term]) for term in TERMS[:-1]}
    memory |= {
        f"activations, batch {n}": mib(m[TERMS[-1]]) for n, m in zip(batches, price.memory, strict=True)
    }
    for i, size in enumerate(batches):
        memory[f"total, batch {size}"] = mib(price.totals[i]) + of(price.totals[i], full and full.totals[i])
    flops = price.forward_flops + price.backward_flops
    return {
        "method": label,
        "trained": price.count.trainable,
        "stored": price.count.stored,
        "changed": price.count.changed,
        "file": mib(price.file_bytes),
        **memory,
        f"GFLOPs, batch {batches[0]}": f"{flops / 1e9:.1f}"
        + of(flops, full and full.forward_flops + full.backward_flops),
        "operations": price.operations,
        "once merged": price.merged,
    }


def _price(model: PreTrainedModel, method: Method, base: int, inputs: Sequence[dict]) -> Price:
    attachment = attach(model, method)
    try:
        cost = measure(model, inputs[0])
        terms, merged = _terms(cost), None
        kept = [cost.saved_bytes, *(saved_bytes(model, batch) for batch in inputs[1:])]
        if attachment.parts and attachment.mergeable:
            attachment.merge()
            merged = operations(model, inputs[0])
        return Price(
            count=cost.count,
            file_bytes=cost.file_bytes,
            memory=tuple(terms | {TERMS[-1]: size} for size in kept),
            forward_flops=cost.forward_flops,
            backward_flops=cost.backward_flops,
            operations=cost.operations,
            merged=merged,
            base=base,
            exact=_exact(cost),
        )
    finally:
        attachment.detach()


def _terms(cost: Costs) -> dict[str, int]:
    """Bytes of the terms that do not depend on the batch."""
    return {
        "weights": cost.memory.weights,
        "gradients": cost.gradient_bytes,
        "optimiser": cost.optimizer_bytes,
    }


def _exact(cost: Costs) -> bool:
    names = ("saved_bytes", "forward_flops", "backward_flops")
    return all(getattr(cost.predicted, name) == getattr(cost, name) for name in names)


def _latency(model: PreTrainedModel, method: Method, batch: dict, pairs: int = 30) -> float:
    """The median of paired times, with the method attached over without."""
    acting = copy.deepcopy(model)
    attach(acting, method)
    runs = {"method": partial(_pass, acting, batch), "base": partial(_pass, model, batch)}
    times = take_turns(runs, pairs)
    return ratio(times["method"], times["base"]).median


@torch.inference_mode()
def _pass(model: PreTrainedModel, batch: dict) -> None:
    model(**batch)
