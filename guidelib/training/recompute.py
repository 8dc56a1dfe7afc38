"""Keep less: recompute cheap tensors in the backward pass instead of keeping them until then.

Autograd keeps the input of a GELU for the GELU's own gradient and its output for the next weight's, though
the second follows from the first.  Here a tensor that autograd wants to keep is replaced by the operations
that made it, if elementwise operations and layer norms lead to it from tensors that are there anyway: what
is kept already, parameters, buffers, the batch.  Such a recipe holds nothing new, so no method keeps more
than before, and no matrix product is repeated.

The forward pass itself does not change: its loss and its random draws are the same to the bit.  The same
kernel on the same input then gives the same tensor again, so the gradients are the same too.

Korthikanti et al. 2022, arXiv:2205.05198, section 5, recompute only what is cheap for its size; which
tensors those are is found here from the operations, not listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
CHEAP = (aten.native_layer_norm.default, aten._to_copy.default)  # beside what is elementwise
DEPTH = 16  # operations in a row; GPT-2's GELU is one of eight


@contextmanager
def keep_less(hold: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach) -> Iterator[None]:
    """Around a forward pass: autograd keeps less of it for the backward pass, which comes after.

    ``hold`` is called with each tensor that is kept all the same and returns an alias of it outside the
    graph.  Gradient checkpointing keeps what it kept before.  The backward pass raises RuntimeError if a
    tensor that it needs was changed in place since.
    """
    record = _Record(hold)
    try:
        with record, saved_tensors_hooks(record.pack, _View.value):
            yield
    finally:
        record.forget()


class _Record(TorchDispatchMode):
    """How each storage of a forward pass was made, without keeping it alive."""

    def __init__(self, hold: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.hold = hold
        self.made: dict[Any, _Made] = {}
        self.sources: dict[Any, _Kept | _Recipe] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        outs = out if isinstance(out, tuple | list) else (out,)
        given = {
            _key(x) for x in args if isinstance(x, torch.Tensor)
        }  # a view is not made, nor changed in place
        for i, tensor in enumerate(outs):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := _key(tensor)) not in given
                and key not in self.made
            ):
                # the statistics of a layer norm are small, and cost as much as its output
                cheap = i == 0 and _cheap(function)
                self.made[key] = _Made(
                    StorageWeakRef(tensor.untyped_storage()),
                    _version(tensor),
                    (function, [self.argument(x) for x in args], kwargs) if cheap else None,
                )
        return out

    def forget(self) -> None:
        """The graph holds on to the hooks, and would so hold each tensor until the last is done with."""
        self.made.clear()
        self.sources.clear()

    def argument(self, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        there = _key(value) not in self.made  # so it was there before the pass
        return _Argument(_key(value), _version(value), _geometry(value), value if there else None)

    def pack(self, tensor: torch.Tensor) -> _View:
        key, version = _key(tensor), _version(tensor)
        source = self.source(key, version)
        if source is None:
            source = self.sources[key] = _Kept(self.hold(tensor), version)
        source.uses += 1
        return _View(source, _geometry(tensor))

    def source(self, key: Any, version: int) -> _Kept | _Recipe | None:
        """What gives the storage of ``key`` in the backward pass; None if it would have to be kept."""
        known, made = self.sources.get(key), self.made.get(key)
        if known is not None and known.version == version:
            return known
        if made is None or made.operation is None or made.version != version:
            return None
        function, arguments, kwargs = made.operation
        views = []
        for argument in arguments:
            if isinstance(argument, _Argument):
                source = self.source(argument.key, argument.version)
                if source is None and argument.there is not None:
                    source = self.sources[argument.key] = _Kept(self.hold(argument.there), argument.version)
                if source is None or source.depth == DEPTH:
                    return None
                argument = _View(source, argument.geometry)
            views.append(argument)
        self.sources[key] = _Recipe(function, views, kwargs, version)
        return self.sources[key]


@dataclass
class _Made:
    storage: StorageWeakRef  # its address, and so its key, is not used again while this lives
    version: int
    operation: tuple[Callable, list, dict] | None  # None: not cheap


@dataclass
class _Argument:
    key: Any
    version: int
    geometry: tuple
    there: torch.Tensor | None


@dataclass
class _View:
    """What autograd holds in a tensor's place."""

    source: _Kept | _Recipe
    geometry: tuple

    def value(self) -> torch.Tensor:
        return self.source.value().as_strided(*self.geometry)


class _Kept:
    depth = 0

    def __init__(self, tensor: torch.Tensor, version: int):
        self.tensor, self.version, self.uses = tensor, version, 0

    def value(self) -> torch.Tensor:
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place since the forward pass"
            )
        return self.tensor


class _Recipe:
    """An operation and its inputs.  Its output lives from the first of its uses to the last."""

    def __init__(self, function: Callable, arguments: list, kwargs: dict, version: int):
        self.function, self.arguments, self.kwargs, self.version = function, arguments, kwargs, version
        self.uses, self.output = 0, None
        sources = [x.source for x in arguments if isinstance(x, _View)]
        self.depth = 1 + max((source.depth for source in sources), default=0)
        for source in sources:
            source.uses += 1

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        output = self.output
        if output is None:
            inputs = [x.value() if isinstance(x, _View) else x for x in self.arguments]
            output = self.function(*inputs, **self.kwargs)
            output = output[0] if isinstance(output, tuple) else output
        self.uses -= 1
        self.output = output if self.uses > 0 else None
        return output


def _key(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage()._cdata, tensor.dtype


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _geometry(tensor: torch.Tensor) -> tuple:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


@cache
def _cheap(function: torch._ops.OpOverload) -> bool:
    pure = not function._schema.is_mutable and torch.Tag.nondeterministic_seeded not in function.tags
    return pure and (torch.Tag.pointwise in function.tags or function in CHEAP)
