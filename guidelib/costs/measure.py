"""What a method costs: bytes that autograd keeps, operations, kernels, gradients, optimiser state and file
size.

All figures are deterministic: they do not depend on the machine's speed, the number of threads or the
repeat.  Where a closed form is known (closed_form.py) the prediction stands beside the measurement.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from guidelib.core.anatomy import ADDED
from guidelib.core.attaching import Attachment, Count
from guidelib.core.method import expect
from guidelib.costs import closed_form
from guidelib.training import recompute

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Costs:
    """Costs of one training step on one batch, and of the stored file.

    saved_bytes: what autograd keeps from forward to backward, without parameters, buffers and inputs.
    forward_flops, backward_flops: matrix multiplications, a multiply-add counted as two, with eager
    attention. predicted: the same three numbers from the closed form, None where there is none yet.
    gradient_bytes, optimizer_bytes: of the trainable parameters; Adam holds two moments.  file_bytes: the
    safetensors file that ``save`` writes (the whole model where nothing is attached).  kernels: operations
    that one forward pass dispatches in inference mode.
    """

    count: Count | None
    saved_bytes: int
    forward_flops: int
    backward_flops: int
    predicted: closed_form.Prediction | None
    gradient_bytes: int
    optimizer_bytes: int
    file_bytes: int
    kernels: int


def measure(model: PreTrainedModel, batch: Batch, *, dropout: bool = False, keep_less: bool = False) -> Costs:
    """Measure one step of ``model`` as it stands on ``batch`` (its forward's keyword arguments, labels
    included).

    Without labels the sum of the first output stands in for the loss.  ``dropout`` leaves the model's
    dropout on, ``keep_less`` recomputes what is cheap (see ``guidelib.training.recompute``); the closed forms
    are for both off.  The model, its gradients and the random state are left as they were.  Raises ValueError
    if nothing is trainable.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    expect(bool(trainable), "model", type(model).__name__, "a model with trainable parameters")
    attachment: Attachment | None = getattr(getattr(model, ADDED, None), "attachment", None)
    forward, backward = flops(model, batch, keep_less=keep_less)
    gradient_bytes = sum(p.numel() * p.element_size() for p in trainable)
    state = attachment.state() if attachment else {n: p.detach() for n, p in model.named_parameters()}
    return Costs(
        count=attachment.count() if attachment else None,
        saved_bytes=saved_bytes(model, batch, dropout=dropout, keep_less=keep_less),
        forward_flops=forward,
        backward_flops=backward,
        predicted=None if dropout or keep_less else closed_form.predict(model, batch),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=2 * gradient_bytes,
        file_bytes=len(safetensors.torch.save(state, attachment.metadata() if attachment else None)),
        kernels=kernels(model, batch),
    )


def saved_bytes(
    model: PreTrainedModel, batch: Batch, *, dropout: bool = False, keep_less: bool = False
) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of one step.

    A view keeps its whole storage alive, so each storage counts once and in full.  Parameters, buffers and
    the batch are there anyway and do not count.
    """
    there = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(model.parameters(), model.buffers(), batch.values())
    }
    # by address; the storages are held, or an address could be freed and used again
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # the tensor itself would hold its own graph, and never be freed

    hooks = recompute.keep_less(pack) if keep_less else saved_tensors_hooks(pack, lambda tensor: tensor)
    with _step(model, dropout=dropout), hooks:
        loss = _loss(model, batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss  # it owns the graph, and the graph owns what was counted
    return total


def flops(model: PreTrainedModel, batch: Batch, *, keep_less: bool = False) -> tuple[int, int]:
    """Floating-point operations of the matrix products of one forward and one backward pass.

    Attention runs eagerly for the count, because torch's counter does not see the fused CPU kernel.
    """
    with _step(model), _eager_attention(model):
        with FlopCounterMode(display=False) as counter, recompute.keep_less() if keep_less else nullcontext():
            loss = _loss(model, batch)
        forward = counter.get_total_flops()
        # a real backward pass: torch.autograd.grad would leave out what no wanted gradient needs
        before = {p: p.grad for p in model.parameters()}
        model.zero_grad()  # sets them to None, so that nothing is added to what stood there
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        for parameter, gradient in before.items():
            parameter.grad = gradient
        return forward, counter.get_total_flops()


def kernels(model: PreTrainedModel, batch: Batch) -> int:
    """Operations dispatched by one forward pass in inference mode: what latency at batch size 1 follows."""

    class Counter(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += 1
            return function(*args, **(kwargs or {}))

    # without the loss; an encoder-decoder reads the labels as its decoder's input
    drop = () if model.config.is_encoder_decoder else ("labels",)
    inputs = {name: tensor for name, tensor in batch.items() if name not in drop}
    with _step(model), torch.inference_mode(), Counter() as counter:
        model(**inputs)
    return counter.n


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device in training, by purpose.  ``total`` adds them up; ``multiple`` divides by the
    weights of the model in its serving precision."""

    weights: int
    gradients: int
    master: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.master + self.optimizer + self.activations

    @property
    def multiple(self) -> float:
        return self.total / self.weights


def memory_plan(
    parameters: int, trainable: int, *, activations: int = 0, precision: str = "fp32"
) -> MemoryPlan:
    """Bytes to train ``trainable`` of ``parameters`` with Adam, plus ``activations`` bytes that autograd
    keeps.

    precision "fp32": weights, gradients and both moments in 4 bytes.  "mixed": weights and gradients in 2
    bytes, and for each trainable parameter a 4-byte master copy and two 4-byte moments (Micikevicius et al.
    2018, arXiv:1710.03740).  "bf16": everything in 2 bytes.  Raises ValueError for another precision or
    impossible numbers.
    """
    expect(precision in ("fp32", "mixed", "bf16"), "precision", precision, "one of fp32, mixed, bf16")
    expect(parameters > 0, "parameters", parameters, "positive")
    expect(0 <= trainable, "trainable", trainable, "at least 0")
    expect(activations >= 0, "activations", activations, "at least 0")
    size = 4 if precision == "fp32" else 2
    moment = 2 if precision == "bf16" else 4
    return MemoryPlan(
        weights=size * parameters,
        gradients=size * trainable,
        master=4 * trainable if precision == "mixed" else 0,
        optimizer=2 * moment * trainable,
        activations=activations,
    )


def _loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    output = model(**batch)
    return output[0] if "labels" in batch else output[0].sum()


@contextmanager
def _step(model: PreTrainedModel, *, dropout: bool = False) -> Iterator[None]:
    """Training mode (so that gradient checkpointing acts), with dropout off unless asked for."""
    modes, switched_off = [(module, module.training) for module in model.modules()], []
    model.train()
    if not dropout:
        for module in model.modules():
            for name in ("p",) if isinstance(module, nn.Dropout) else DROPOUTS:
                if isinstance(getattr(module, name, None), float):
                    switched_off.append((module, name, getattr(module, name)))
                    setattr(module, name, 0.0)
    try:
        with torch.random.fork_rng(devices=[]):  # a method may draw at random without dropout, too
            yield
    finally:
        for module, name, value in switched_off:
            setattr(module, name, value)
        for module, training in modes:
            module.training = training


# transformers keeps some dropout probabilities as numbers and applies them by function
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
