"""One step of a model, counted: what autograd keeps, floating-point operations, and operations.

All of it depends on shapes alone: not on the machine's speed, the number of threads or the repeat.  So it can
be counted on a model without values as well (see shapes.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from guidelib.core.anatomy import ADDED
from guidelib.core.modes import modes_kept
from guidelib.core.values import has_values
from guidelib.costs.shapes import LooksHold, MasksOnShapes, NumbersOnShapes, on_shapes
from guidelib.training import recompute

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """saved_bytes: what autograd keeps from forward to backward, without parameters, buffers and inputs.
    forward_flops, backward_flops: matrix products, a multiply-add counted as two, with eager attention.
    operations: those of one forward pass at inference that make or change a tensor."""

    saved_bytes: int
    forward_flops: int
    backward_flops: int
    operations: int


def count_step(
    model: nn.Module, batch: Batch, *, dropout: bool = False, keep_less: bool = False, values: bool = True
) -> Step:
    """The counts of one step of ``model`` on ``batch``, without ``values`` on its shapes alone."""
    forward, backward = flops(model if values else on_shapes(model, meta=True), batch, keep_less=keep_less)
    model = model if values else on_shapes(model)
    return Step(
        saved_bytes=saved_bytes(model, batch, dropout=dropout, keep_less=keep_less),
        forward_flops=forward,
        backward_flops=backward,
        operations=operations(model, batch),
    )


def saved_bytes(model: nn.Module, batch: Batch, *, dropout: bool = False, keep_less: bool = False) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of one step.

    A view keeps its whole storage alive, so each storage counts once and in full.  Parameters, buffers and
    the batch are there anyway and do not count.
    """
    # weakly: what is in the graph of no loss goes again.  While a reference lives, its key is not used again
    kept: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there and storage._cdata not in kept:
            kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph, and never be freed

    hooks = recompute.keep_less(pack) if keep_less else saved_tensors_hooks(pack, lambda tensor: tensor)
    # with keep_less no layer keeps what it makes of the mask
    masks = nullcontext() if keep_less or has_values(next(model.parameters())) else MasksOnShapes()
    with prepared(model, batch, dropout=dropout) as inputs:
        tensors = itertools.chain(model.parameters(), model.buffers(), inputs.values())
        there = {tensor.untyped_storage()._cdata for tensor in tensors}
        with hooks, masks:
            loss = step_loss(model, inputs)
    total = sum(n for storage, n in kept.values() if not storage.expired())
    del loss  # it owns the graph, and the graph owns what was counted
    return total


def flops(model: nn.Module, batch: Batch, *, keep_less: bool = False) -> tuple[int, int]:
    """Floating-point operations of the matrix products of one forward and one backward pass.

    Attention runs eagerly for the count, because torch's counter does not see the fused CPU kernel.
    """
    with prepared(model, batch) as inputs, _eager_attention(model):
        with FlopCounterMode(display=False) as counter, recompute.keep_less() if keep_less else nullcontext():
            loss = step_loss(model, inputs)
        forward = counter.get_total_flops()
        # a real backward pass: torch.autograd.grad would leave out what no wanted gradient needs
        before = {p: p.grad for p in model.parameters()}
        try:
            model.zero_grad()  # sets them to None, so that nothing is added to what stood there
            with FlopCounterMode(display=False) as counter:
                loss.backward()
        finally:
            for parameter, gradient in before.items():
                parameter.grad = gradient
        return forward, counter.get_total_flops()


def operations(model: nn.Module, batch: Batch) -> int:
    """How many operations of one forward pass at inference make or change a tensor: what latency at batch
    size 1 follows.

    A view makes none, nor does a cast to the type that a tensor has already, or a dropout at rest.
    """
    # without the loss; an encoder-decoder reads the labels as its decoder's input
    drop = () if model.config.is_encoder_decoder else ("labels",)
    with prepared(model, batch, train=False) as inputs, torch.inference_mode(), _Operations() as counter:
        model(**{name: tensor for name, tensor in inputs.items() if name not in drop})
    return counter.n


class _Operations(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {_storage(x) for x in args if isinstance(x, torch.Tensor)}
        outs = out if isinstance(out, tuple | list) else (out,)
        made = any(isinstance(x, torch.Tensor) and _storage(x) not in given for x in outs)
        changed = function._schema.is_mutable and torch.Tag.inplace_view not in function.tags
        # without values even a dropout at rest makes a tensor
        rests = function is torch.ops.aten.dropout.default and not (args[1] and args[2])
        self.n += (made or changed) and not rests
        return out


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def step_loss(model: nn.Module, inputs: Batch) -> torch.Tensor:
    """The loss that ``fit`` trains, with the method's own terms; without labels the sum of the first output
    stands in for it."""
    output = model(**inputs)
    if "labels" not in inputs:
        return output[0].sum()
    attachment = getattr(getattr(model, ADDED, None), "attachment", None)
    if attachment is None or attachment.merged:
        return output[0]
    return output[0] + sum(attachment.method.loss_terms(attachment, inputs, output))


@contextmanager
def prepared(
    model: nn.Module, batch: Batch, *, train: bool = True, dropout: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """The model as it is counted; yields the batch for it.

    Training mode (so that gradient checkpointing acts) or not, with dropout off unless asked for, with no
    layer left out, and with the draws of a method that needs some fixed.
    """
    inputs = _inputs(model, batch)
    first = next(model.parameters())
    shapes = LooksHold() if first.is_meta else nullcontext() if has_values(first) else NumbersOnShapes(model)
    random, switched_off = torch.random.fork_rng(devices=range(torch.cuda.device_count())), []
    with modes_kept(model):
        try:
            model.train(train)
            for module in model.modules():
                names = ("p",) if isinstance(module, nn.Dropout) else DROPOUTS
                for name in ("layerdrop",) if dropout else names:
                    if isinstance(getattr(module, name, None), float):
                        switched_off.append((module, name, getattr(module, name)))
                        setattr(module, name, 0.0)
            with torch.set_grad_enabled(train), random, shapes:
                torch.manual_seed(0)
                yield inputs
        finally:
            for module, name, value in switched_off:
                setattr(module, name, value)


# transformers keeps some dropout probabilities as numbers and applies them by function
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


def _inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The batch where ``model`` is; a model in a FakeTensorMode takes one with values."""
    if next(model.parameters()).is_meta:
        return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in batch.items()}
    return {n: t if has_values(t) else torch.ones(t.shape, dtype=t.dtype) for n, t in batch.items()}


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    # one by one: older transformers do not hand the choice on to the two stacks of T5
    stacks = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [stack.config._attn_implementation for stack in stacks]
    try:
        for stack in stacks:
            stack.set_attn_implementation("eager")
        yield
    finally:
        for stack, implementation in zip(stacks, before, strict=True):
            stack.set_attn_implementation(implementation)
