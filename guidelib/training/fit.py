"""Training and evaluation on the Hugging Face Trainer.

``fit`` adds four things to it and nothing else: a method's phases, 32-bit copies of what is trained in 16
bits, a clear stop when the loss is no longer a number, and a progress bar that leaves nothing behind in a
notebook.
"""

from __future__ import annotations

import inspect
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import nn
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

from guidelib.core.anatomy import Anatomy
from guidelib.core.attaching import Attachment, attached
from guidelib.core.method import expect, expect_seed, is_number, is_whole
from guidelib.core.modes import modes_kept
from guidelib.machine import device
from guidelib.materials.tasks import SPLITS, Task
from guidelib.training import recompute
from guidelib.training.states import SameBatches, frozen_states
from guidelib.training.text2text import chrf_of_each, generate, score

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # as transformers and accelerate call them


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
    mixed_precision: str | None = None,
    frozen: str | Path | None = None,
    progress: bool = True,
) -> Fit:
    """Train what is attached to ``model`` on the task's training split, with AdamW and a linear schedule.
    Where all gradients together are longer than 1, they are shortened to it.

    batch_size: texts of a step, of each process where torchrun has started several.
    lr: peak learning rate.  head_lr: that of the task head, ``lr`` where it is not given.  warmup: share of
    the steps over which the rate rises.  max_length: tokens kept of each text.  Batches hold texts of
    similar length.  ``seed`` fixes the order of the data and the dropout.  keep_less: recompute what is cheap
    in the backward pass instead of keeping it (see ``guidelib.training.recompute``); the losses stay the
    same.  mixed_precision: "no"; "bf16" or "fp16" to run the model under autocast, so that its products take
    16 bits.  With "fp16" the loss is scaled besides, or small gradients would be zero; a step whose gradients
    overflow is left out.  None: "fp16" for a model in float16, otherwise "no".
    frozen: what becomes of the blocks below the lowest one in which something is trained, which are all of
    them beside a side network.  "memory" runs them once per batch and keeps what is read of them, of which a
    long training has much; a folder keeps it in files there, which go when the training ends.  For that,
    batches are composed once and there is no dropout in those blocks; "still" does this and keeps nothing,
    with the same result to the bit.  None does nothing of it.

    A parameter that is itself in 16 bits, of the base or of the method, would round most steps away.  AdamW
    moves a 32-bit copy of it, and the model gets the copy's value, rounded, after every step.  That takes 4
    bytes for the copy and 8 for the two moments; the gradient has 2 bytes, and 4 during the step.

    Raises ValueError if nothing is attached, the method is merged, or the data or a number is impossible;
    FloatingPointError if the loss is no longer finite, the last step included, or no step's gradients are.
    The parameters are then what they were before, those that the method rewrites included.  What the method
    has settled by then stays settled, such as which entries it trains.
    """
    attachment = attached(model)
    attachment.check()
    _expect_task(model, task)
    expect_seed(seed, 32)
    expect(not attachment.merged, "model", "a merged one", "unmerged while it trains; call unmerge() first")
    for name, value in (("lr", lr), ("head_lr", lr if head_lr is None else head_lr), ("epochs", epochs)):
        expect(is_number(value) and value > 0, name, value, "a positive number")
    expect(
        is_number(warmup) and 0 <= warmup < 1,
        "warmup",
        warmup,
        "a share of the steps, at least 0 and less than 1",
    )
    expect(
        is_number(weight_decay) and weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0"
    )
    expect(is_whole(batch_size), "batch_size", batch_size, "a whole number of at least 1")
    mixed_precision = _mixed_precision(model, mixed_precision)
    expect(
        len(task.train) > 0, "task", f"{task.name} with an empty training split", "a task with training data"
    )

    data = task.encode(tokenizer, "train", max_length)
    _expect_data(model, task, data)
    collate = _collator(model, task, tokenizer)
    some = collate([data[i] for i in range(min(batch_size, len(data)))])
    with frozen_states(attachment, frozen, some):
        pass  # if it cannot be, that is said before anything is done
    attachment.method.prepare(attachment, DataLoader(data, batch_size=batch_size, collate_fn=collate))

    before = {n: t.cpu().clone() for n, t in attachment.state().items() if t.is_floating_point()}
    steps = _steps(len(data), batch_size, epochs)
    optimizer = _optimizer(attachment, lr, lr if head_lr is None else head_lr, weight_decay)
    phases = _Phases(attachment, steps, progress)
    with (
        tempfile.TemporaryDirectory() as folder,
        frozen_states(attachment, frozen, some) as states,
        _ready(model),
    ):
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
                **{name: name == mixed_precision for name in HALF},
            ),
            train_dataset=data,
            data_collator=collate,
            callbacks=[phases],
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(PrinterCallback)
        # or it multiplies losses by the number of processes, where a model's forward takes any keyword: all
        # of these losses are means already
        trainer.model_accepts_loss_kwargs = False
        trainer.attachment, trainer.losses, trainer.keep_less = attachment, [], keep_less
        trainer.states = states
        # not before the Trainer has put the model on its device
        trainer.copies = phases.copies = _Copies(p for p in model.parameters() if p.requires_grad)
        if trainer.copies:
            trainer.copies.take_over(optimizer, trainer.args.max_grad_norm)
            trainer.args.max_grad_norm = 0.0
        if mixed_precision == "fp16" and trainer.accelerator.device.type == "cpu":
            # where accelerate leaves fp16 out without a word, though torch has all that it takes
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        start = time.perf_counter()
        try:
            trainer.train()
            seconds = time.perf_counter() - start
            if phases.left_out == steps:
                raise FloatingPointError(f"the gradients overflow at each of the {steps} steps; {WIDER}")
            trainer.look_again()
        except FloatingPointError:
            model.zero_grad()
            model.load_state_dict(before, strict=False)
            raise
        finally:
            phases.bar.close()
            model.eval()
    attachment.method.finish(attachment)
    return Fit(tuple(trainer.losses), seconds)


def evaluate(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "test",
    batch_size: int = 64,
    max_length: int = 64,
    mixed_precision: str = "no",
    each: bool = False,
    write: bool = True,
) -> dict[str, Any]:
    """Mean loss of ``model`` on a split (of a text per text, of text2text per token), and how well it does.

    For classification that is ``accuracy`` (0 to 1); for text2text the scores of
    `guidelib.training.text2text.score` for what it writes greedily, unless ``write`` is False.  ``each`` adds
    an array with one entry per item, in the order of the data: whether the answer is right, or the chrF of
    the text, where one is written.
    mixed_precision: "no", "bf16" or "fp16", as in ``fit``.  The model's mode and all random numbers stay what
    they are: it may be looked at while it trains.  Raises ValueError for a task that is not the model's, an
    empty split or an impossible number.
    """
    _expect_task(model, task)
    expect(is_whole(batch_size), "batch_size", batch_size, "a whole number of at least 1")
    fits = mixed_precision in ("no", *HALF)
    expect(fits, "mixed_precision", mixed_precision, f"one of no, {', '.join(HALF)}")
    full = split not in SPLITS or len(getattr(task, split)) > 0
    expect(full, "task", f"{task.name} with an empty {split} split", "a task with data there")
    data = task.encode(tokenizer, split, max_length)
    _expect_data(model, task, data)
    lengths = np.array([len(ids) for ids in data["input_ids"]])
    order = np.argsort(lengths, kind="stable")
    data = data.select(order)  # little padding
    mixed = torch.autocast(  # on the device to which the Trainer takes the model
        device(), HALF.get(mixed_precision, torch.bfloat16), enabled=mixed_precision != "no"
    )
    with tempfile.TemporaryDirectory() as folder, modes_kept(model), _ready(model), _own_numbers(), mixed:
        arguments = _one_device(
            folder,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device() == "cpu",
        )
        trainer = Trainer(model, arguments, data_collator=_collator(model, task, tokenizer))
        if task.kind == "text2text":
            # not the Trainer's, in which each of several processes would have a part
            batches = DataLoader(data, batch_size, collate_fn=_collator(model, task, tokenizer))
            loss = _token_loss(model, batches)
            if not write:
                return {"loss": loss}
            texts = getattr(task, split)
            written = generate(
                model, tokenizer, texts["source"], max_length=max_length, batch_size=batch_size
            )
            found = {"loss": loss} | score(written, texts["target"], texts["source"])
            return found | ({"each": chrf_of_each(written, texts["target"])} if each else {})
        result = trainer.predict(data)
    right = np.empty(len(order), dtype=bool)
    logits = result.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # before what the model puts out besides
    right[order] = logits.argmax(-1) == result.label_ids
    # not the metrics' loss, to which each of several processes would give the same weight
    loss = F.cross_entropy(torch.tensor(logits).float(), torch.tensor(result.label_ids))
    found = {"accuracy": float(right.mean()), "loss": float(loss)}
    return found | ({"each": right} if each else {})


def _steps(items: int, batch_size: int, epochs: float) -> int:
    """How many there are, of each process where torchrun has started several."""
    # a scheduler may set the first alone, which does not make a process one of several
    processes = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    batches = math.ceil(math.ceil(items / batch_size) / processes)
    return math.ceil(round(epochs * batches, 9))  # 1.1 * 10 is a little more than 11


def _one_device(folder: str, **arguments: Any) -> TrainingArguments:
    """The Trainer's arguments for one device a process; by itself it takes ``torch.nn.DataParallel`` where it
    sees several, whose replicas would all act with the first one's parts.  torchrun and accelerate start a
    process for each device."""
    # each column is an input, which the Trainer cannot see where a part stands around the model's own forward
    chosen = TrainingArguments(folder, remove_unused_columns=False, **arguments)
    chosen._n_gpu = min(chosen.n_gpu, 1)
    return chosen


@contextmanager
def _own_numbers() -> Iterator[None]:
    """The Trainer seeds all generators as it is made; outside they go on as if nothing had been drawn."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


@contextmanager
def _ready(model: PreTrainedModel) -> Iterator[None]:
    """Let the Trainer take ``model`` as it is, and take back what the Trainer and accelerate leave on it and
    on its configuration."""
    before, config = dict(vars(model)), dict(vars(model.config))
    state = dict(AcceleratorState._shared_state)  # of a run during which this one is made
    vars(model).pop("_is_accelerate_prepared", None)  # or this run's autocast would not act
    if "_original_forward" in vars(model):  # and that run's would
        model.forward = vars(model).pop("_original_forward")
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # or the Trainer refuses it as a model without adapters
    try:
        yield
    finally:
        training = model.training
        vars(model).clear()  # autocast around the forward pass would act for ever
        vars(model).update(before, training=training)
        vars(model.config).update(config)
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(state)


def _expect_data(model: PreTrainedModel, task: Task, data: Dataset) -> None:
    """Raise ValueError for what the model would stumble over in the middle: texts or targets too long for its
    positions, tokens or labels that it does not have."""
    ids, labels = list(data["input_ids"]), list(data["labels"])
    for name, body in Anatomy(model).bodies().items():
        longest = max(map(len, labels if task.kind == "text2text" and name == "decoder" else ids))
        accepted = f"at most {body.room}, the positions of the {name}"
        expect(longest <= body.room, "max_length", longest, accepted)
    highest = max(max(row, default=0) for row in ids)
    own = highest < model.get_input_embeddings().num_embeddings
    expect(own, "tokenizer", f"one with a token {highest}", "the model's own")
    if task.kind == "classification":
        found = {*labels}
        named = found <= {*range(len(task.labels))}
        expect(named, "task", f"{task.name} with labels {sorted(found)}", "one with all its labels named")


def _expect_task(model: PreTrainedModel, task: Task) -> None:
    """Raise ValueError if the model has no head for the task."""
    expect(isinstance(task, Task), "task", task, "a Task, such as load_task() gives")
    writes = model.get_output_embeddings() is not None
    if task.kind == "text2text":
        right = writes and model.config.is_encoder_decoder
        expect(right, "task", task.name, "a classification task, or an encoder-decoder that writes")
    else:
        right = "labels" in inspect.signature(model.forward).parameters and not writes
        right = right and model.config.num_labels >= len(task.labels)
        what = f"{task.name} with {len(task.labels)} labels"
        expect(right, "task", what, "a task that the model has a head for: load_backbone(name, task)")


def _mixed_precision(model: PreTrainedModel, chosen: str | None) -> str:
    """What is chosen, or the default, if it goes with the types of the model's parameters."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point() and p.itemsize > 1}
    fits = ["no", *(name for name, half in HALF.items() if types <= {torch.float32, half})]
    if chosen is None:
        chosen = "fp16" if torch.float16 in types and "fp16" in fits else "no"
    held = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
    expect(chosen in fits, "mixed_precision", chosen, f"one of {', '.join(fits)} for a model in {held}")
    return chosen


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
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += float(model.eval()(**inputs).loss) * tokens
        count += tokens
    return total / count


def _optimizer(
    attachment: Attachment, lr: float, head_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    head = {id(p) for p in attachment.anatomy.head().values()}
    own = attachment.method.rates(attachment)
    trained = [p for p in attachment.model.parameters() if p.requires_grad and p not in own]
    groups = [
        {"params": [p for p in trained if id(p) not in head], "lr": lr},
        {"params": [p for p in trained if id(p) in head], "lr": head_lr},
        *({"params": [p], "lr": rate, "weight_decay": 0.0} for p, rate in own.items()),
    ]
    first, *others = groups  # what a method exchanges comes into the first, also where it is empty
    groups = [first, *(group for group in others if group["params"])]
    return torch.optim.AdamW(groups, weight_decay=weight_decay)


class _Copies(dict[nn.Parameter, nn.Parameter]):
    """A 32-bit copy for the optimiser of each of the ``parameters`` that has 16 bits."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(
            (p, nn.Parameter(p.detach().float())) for p in parameters if p.dtype in HALF.values()
        )

    def take_over(self, optimizer: torch.optim.Optimizer, longest: float) -> None:
        """Let ``optimizer`` move the copies, and clip the gradients, which the Trainer would look for on the
        parameters: to the length ``longest``, taken together."""
        for group in optimizer.param_groups:
            group["params"] = [self.get(p, p) for p in group["params"]]

        def clip(*_) -> None:
            nn.utils.clip_grad_norm_(
                [p for group in optimizer.param_groups for p in group["params"]], longest
            )

        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(lambda *_: self.give())  # before anyone else looks at the model

    @torch.no_grad()
    def take(self) -> None:
        """After a backward pass: the gradients, and what a method has written to since the last step."""
        for p, copy in self.items():
            if p.grad is not None:
                copy.copy_(torch.where(copy.to(p.dtype) == p, copy, p))
                copy.grad, p.grad = p.grad.float(), None

    @torch.no_grad()
    def give(self) -> None:
        """After a step: the values, rounded, and the gradients that the step was made with."""
        for p, copy in self.items():
            if copy.grad is not None:
                p.copy_(copy)
                p.grad, copy.grad = copy.grad.to(p.dtype), None


class _Trainer(Trainer):
    """The Trainer with a method's regulariser and learning rate, 32-bit copies, and a watch on the loss."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler, method = super().create_scheduler(num_training_steps, optimizer), self.attachment.method
        scheduler.lr_lambdas = [
            lambda step, usual=usual: usual(step) * method.lr_factor(step, num_training_steps)
            for usual in scheduler.lr_lambdas
        ]
        for group in scheduler.optimizer.param_groups:  # the first step's rate is already set
            group["lr"] *= method.lr_factor(0, num_training_steps)
        return scheduler

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.copies.take()
        return loss

    def _get_train_sampler(self, train_dataset=None):
        if self.states is None:
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return SameBatches(lengths, self.args.per_device_train_batch_size, self.args.seed)

    def below(self, inputs) -> AbstractContextManager:
        """What is done with the frozen blocks in a pass."""
        return nullcontext() if self.states is None else self.states.of(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        with self.below(inputs), recompute.keep_less() if self.keep_less else nullcontext():
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
        with self.compute_loss_context_manager(), self.below(self.seen):
            loss = super().compute_loss(self.model.eval(), self.seen)
        self._expect_finite("loss", float(loss), "after the last step")

    def _expect_finite(self, what: str, value: float, when: str) -> None:
        if not math.isfinite(value):
            half = self.args.fp16 or any(p.dtype == torch.float16 for p in self.model.parameters())
            raise FloatingPointError(
                f"the {what} is {value} {when}; lr must be lower than {self.args.learning_rate:g} here"
                + (f", or {WIDER}" if half else "")
            )


WIDER = "float16, which ends at 65504, is too narrow for this model: train it in bfloat16 or float32"


class _Phases(TrainerCallback):
    """Takes the values from the copies and calls a method after each optimiser step, and moves the bar."""

    def __init__(self, attachment: Attachment, steps: int, progress: bool):
        self.attachment, self.copies, self.left_out = attachment, _Copies(()), 0
        self.bar = tqdm(total=steps, disable=not progress, leave=False, file=sys.stderr, unit="step")

    def on_optimizer_step(self, args, state, control, **kwargs):
        step, optimizer = state.global_step + 1, kwargs["optimizer"]
        self.copies.give()
        if optimizer.step_was_skipped:  # its gradients are infinite, and no method may learn from them
            self.left_out += 1
            for p in self.attachment.model.parameters():
                if p.grad is not None:
                    p.grad.zero_()
        moments = {p: optimizer.state[copy] for p, copy in self.copies.items() if copy in optimizer.state}
        optimizer.state.update(moments)  # under the names that the method knows
        self.attachment.method.after_step(self.attachment, step, state.max_steps, optimizer)
        for p in moments:
            del optimizer.state[p]
        self.exchange(optimizer)
        self.bar.update()

    def exchange(self, optimizer: torch.optim.Optimizer) -> None:
        """Hand over what a method trains from now on, and let go of what it no longer does."""
        trained = [p for p in self.attachment.model.parameters() if p.requires_grad]
        held = {p for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in trained if self.copies.get(p, p) not in held]
        for p in self.copies.keys() - {*trained}:
            del self.copies[p]
        self.copies.update(_Copies(new))
        gone = held - {self.copies.get(p, p) for p in trained}
        for group in optimizer.param_groups if new or gone else ():
            group["params"] = [p for p in group["params"] if p not in gone]
        for p in gone:
            optimizer.state.pop(p, None)
        optimizer.param_groups[0]["params"] += [self.copies.get(p, p) for p in new]
