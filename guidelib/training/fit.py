"""Training and evaluation on the Hugging Face Trainer.

``fit`` adds three things to it and nothing else: a method's phases, a clear stop when the loss is no longer
a number, and a progress bar that leaves nothing behind in a notebook.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader
from tqdm.std import tqdm  # the text bar: the notebook one saves a widget that is dead on a page
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from guidelib.core.attaching import Attachment, attached
from guidelib.core.method import expect
from guidelib.machine import device
from guidelib.materials.tasks import SPLITS, Task
from guidelib.training import recompute
from guidelib.training.text2text import chrf_of_each, generate, score


@dataclass(frozen=True)
class Fit:
    """losses: the training loss of each step.  seconds: wall time of the training alone."""

    losses: tuple[float, ...]
    seconds: float

    @property
    def steps(self) -> int:
        return len(self.losses)


def fit(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lr: float = 1e-3,
    head_lr: float | None = None,
    epochs: float = 1,
    batch_size: int = 32,
    max_length: int = 64,
    warmup: float = 0.06,
    weight_decay: float = 0.0,
    seed: int = 0,
    keep_less: bool = False,
    precision: str = "fp32",
    progress: bool = True,
) -> Fit:
    """Train what is attached to ``model`` on the task's training split, with AdamW and a linear schedule.

    lr: peak learning rate.  head_lr: that of the task head, ``lr`` where it is not given.  warmup: share of
    the steps over which the rate rises.  max_length: tokens kept of each text.  Batches hold texts of
    similar length.  ``seed`` fixes the order of the data and the dropout.  keep_less: recompute what is cheap
    in the backward pass instead of keeping it (see ``guidelib.training.recompute``); the losses stay the
    same.  precision: "fp32", or "bf16" for mixed precision (products in bfloat16, parameters in 32 bits).

    Raises ValueError if nothing is attached, the method is merged, or the data or a number is impossible;
    FloatingPointError if the loss is no longer finite, the last step included.  The parameters are then what
    they were before, those that the method rewrites included.
    """
    attachment = attached(model)
    attachment.check()
    expect(not attachment.merged, "model", "a merged one", "unmerged while it trains; call unmerge() first")
    for name, value in (("lr", lr), ("head_lr", lr if head_lr is None else head_lr), ("epochs", epochs)):
        expect(_finite(value) and value > 0, name, value, "a positive number")
    expect(
        _finite(warmup) and 0 <= warmup < 1,
        "warmup",
        warmup,
        "a share of the steps, at least 0 and less than 1",
    )
    expect(
        _finite(weight_decay) and weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0"
    )
    whole = isinstance(batch_size, int) and batch_size >= 1
    expect(whole, "batch_size", batch_size, "a whole number of at least 1")
    expect(
        len(task.train) > 0, "task", f"{task.name} with an empty training split", "a task with training data"
    )

    _expect_precision(precision)
    data = task.encode(tokenizer, "train", max_length)
    collate = _collator(model, task, tokenizer)
    attachment.method.prepare(attachment, DataLoader(data, batch_size=batch_size, collate_fn=collate))

    own = attachment.method.rewrites(attachment.anatomy)
    before = {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad or n in own}
    steps = math.ceil(epochs * math.ceil(len(data) / batch_size))
    phases = _Phases(attachment, steps, progress)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Trainer(
            model,
            _one_device(
                folder,
                learning_rate=lr,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                warmup_steps=round(warmup * steps),
                weight_decay=weight_decay,
                train_sampling_strategy="group_by_length",
                seed=seed,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=device() == "cpu",
            ),
            train_dataset=data,
            data_collator=collate,
            callbacks=[phases],
            optimizers=(_optimizer(attachment, lr, lr if head_lr is None else head_lr, weight_decay), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.attachment, trainer.losses, trainer.keep_less = attachment, [], keep_less
        trainer.precision = precision
        start = time.perf_counter()
        try:
            trainer.train()
            trainer.look_again()
        except FloatingPointError:
            model.zero_grad()
            model.load_state_dict(before, strict=False)
            raise
        finally:
            phases.bar.close()
            model.eval()
    attachment.method.finish(attachment)
    return Fit(tuple(trainer.losses), time.perf_counter() - start)


def evaluate(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "test",
    batch_size: int = 64,
    max_length: int = 64,
    precision: str = "fp32",
    each: bool = False,
) -> dict[str, Any]:
    """Mean loss of ``model`` on a split (of a text per text, of text2text per token), and how well it does.

    For classification that is ``accuracy`` (0 to 1); for text2text the scores of
    `guidelib.training.text2text.score` for what it writes greedily.  ``each`` adds an array with one entry
    per item, in the order of the data: whether the answer is right, or the chrF of the text.  precision: as
    in ``fit``.
    """
    _expect_precision(precision)
    full = split not in SPLITS or len(getattr(task, split)) > 0
    expect(full, "task", f"{task.name} with an empty {split} split", "a task with data there")
    data = task.encode(tokenizer, split, max_length)
    lengths = np.array([len(ids) for ids in data["input_ids"]])
    order = np.argsort(lengths, kind="stable")
    data = data.select(order)  # little padding
    with tempfile.TemporaryDirectory() as folder, _mixed(model, precision):
        arguments = _one_device(
            folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device() == "cpu",
        )
        trainer = Trainer(model, arguments, data_collator=_collator(model, task, tokenizer))
        if task.kind == "text2text":
            loss = _token_loss(model, trainer.get_eval_dataloader(data))
            texts = getattr(task, split)
            written = generate(
                model, tokenizer, texts["source"], max_length=max_length, batch_size=batch_size
            )
            found = {"loss": loss} | score(written, texts["target"], texts["source"])
            return found | ({"each": chrf_of_each(written, texts["target"])} if each else {})
        result = trainer.predict(data)
    right = np.empty(len(order), dtype=bool)
    right[order] = result.predictions.argmax(-1) == result.label_ids
    found = {"accuracy": float(right.mean()), "loss": float(result.metrics["test_loss"])}
    return found | ({"each": right} if each else {})


def _expect_precision(precision: object) -> None:
    expect(precision in ("fp32", "bf16"), "precision", precision, "fp32 or bf16")


def _mixed(model: PreTrainedModel, precision: str) -> torch.autocast:
    return torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")


def _one_device(folder: str, **arguments: Any) -> TrainingArguments:
    """The Trainer's arguments for one device a process; by itself it takes ``torch.nn.DataParallel`` where it
    sees several, whose replicas would all act with the first one's parts.  torchrun and accelerate start a
    process for each device."""
    chosen = TrainingArguments(folder, **arguments)
    chosen._n_gpu = min(chosen.n_gpu, 1)
    return chosen


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _collator(model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable:
    if task.kind == "text2text":
        return DataCollatorForSeq2Seq(tokenizer, model)
    return DataCollatorWithPadding(tokenizer)


@torch.no_grad()
def _token_loss(model: PreTrainedModel, batches: DataLoader) -> float:
    """Cross-entropy per target token.  A mean over batches would depend on their size."""
    total = count = 0
    for batch in batches:
        tokens = int((batch["labels"] != -100).sum())
        total += float(model.eval()(**batch).loss) * tokens
        count += tokens
    return total / count


def _optimizer(
    attachment: Attachment, lr: float, head_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    head = {id(p) for p in attachment.anatomy.head().values()}
    trained = [p for p in attachment.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in head], "lr": lr},
        {"params": [p for p in trained if id(p) in head], "lr": head_lr},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=weight_decay)


class _Trainer(Trainer):
    """The Trainer with a method's regulariser and learning rate, and a watch on the loss."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler, method = super().create_scheduler(num_training_steps, optimizer), self.attachment.method
        scheduler.lr_lambdas = [
            lambda step, usual=usual: usual(step) * method.lr_factor(step, num_training_steps)
            for usual in scheduler.lr_lambdas
        ]
        for group in scheduler.optimizer.param_groups:  # the first step's rate is already set
            group["lr"] *= method.lr_factor(0, num_training_steps)
        return scheduler

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with _mixed(model, self.precision), recompute.keep_less() if self.keep_less else nullcontext():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + sum(self.attachment.method.loss_terms(self.attachment, inputs, outputs))
        self.seen = inputs
        self.losses.append(float(loss.detach()))
        self._expect_finite("loss", self.losses[-1], f"at step {len(self.losses)}")
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def look_again(self) -> None:
        """Compute the last loss once more, since no further step would notice what the last one has done."""
        trained = [p.float() for p in self.model.parameters() if p.requires_grad]
        self._expect_finite("weights' norm", float(get_total_norm(trained)), "after the last step")
        with self.compute_loss_context_manager():
            loss = super().compute_loss(self.model.eval(), self.seen)
        self._expect_finite("loss", float(loss), "after the last step")

    def _expect_finite(self, what: str, value: float, when: str) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} {when}; lr must be lower than {self.args.learning_rate:g} here"
            )


class _Phases(TrainerCallback):
    """Calls a method after each optimiser step, and moves the bar."""

    def __init__(self, attachment: Attachment, steps: int, progress: bool):
        self.attachment = attachment
        self.bar = tqdm(total=steps, disable=not progress, leave=False, file=sys.stderr, unit="step")

    def on_optimizer_step(self, args, state, control, **kwargs):
        step, optimizer = state.global_step + 1, kwargs["optimizer"]
        self.attachment.method.after_step(self.attachment, step, state.max_steps, optimizer)
        self.bar.update()
