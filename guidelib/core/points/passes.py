"""What belongs to one pass through the model, and functions that stand around the forward of a module.

A pass leaves nothing behind, and several may run at once, each in a thread of its own.  So what a part has to
remember from one module to the next, or for a whole pass, is never an attribute of the part: it is a note,
which its thread alone sees and which goes with the call, or the block of code, that it was made for.  And a
base parameter is never exchanged: a module that has to compute with other tensors does so as a twin.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn


class _Thread(threading.local):
    def __init__(self):
        self.notes: Mapping[Any, Any] = {}  # exchanged, never changed, so that it can be handed on


_thread = _Thread()


def notes() -> Mapping[Any, Any]:
    """What is noted in this thread now."""
    return _thread.notes


def note(key: Any, value: Any) -> None:
    """Note it until it is taken, or the call ends that `framed` stands around."""
    _thread.notes = {**_thread.notes, key: value}


def take(key: Any) -> Any:
    """What was noted, and is then no longer; None if nothing was."""
    left = dict(_thread.notes)
    value = left.pop(key, None)
    _thread.notes = left
    return value


@contextmanager
def noted(more: Mapping[Any, Any]) -> Iterator[None]:
    """Within the block, ``more`` is noted besides; what others note there stays."""
    before = _thread.notes
    _thread.notes = {**before, **more}
    try:
        yield
    finally:
        others = {key: value for key, value in _thread.notes.items() if key not in more}
        _thread.notes = others | {key: before[key] for key in more if key in before}


def framed(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Around the forward of a transformer block: what is noted in there goes when it ends, however it ends.

    With gradient checkpointing the block is computed again, in the backward pass, perhaps after other passes
    and in another thread.  It then finds the notes of its own pass.
    """
    before, block = _thread.notes, call.layer
    if getattr(block, "gradient_checkpointing", False) and block.training:
        checkpoint = partial(_checkpoint, block._gradient_checkpointing_func, before)
        call = call.on(twin(block, _gradient_checkpointing_func=checkpoint))
    try:
        return call(*args, **kwargs)
    finally:
        _thread.notes = before


def remember(model: nn.Module) -> None:
    """For transformers before 5.23, which checkpoints a block's call and not its forward, so that `framed`
    sees only what is within: call it where notes are made for a whole pass."""
    for block in model.modules():
        checkpoint = vars(block).get("_gradient_checkpointing_func")
        if checkpoint is None or type(block).__call__ is nn.Module.__call__:
            continue
        if getattr(checkpoint, "func", None) is not _remembering:
            block._gradient_checkpointing_func = partial(_remembering, checkpoint)


def reentrant(model: nn.Module) -> bool:
    """Whether blocks are checkpointed in the way that goes back through each by itself, and so cannot share
    what is made for all of them."""
    for block in model.modules():
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if getattr(checkpoint, "func", None) is _remembering:
            checkpoint = checkpoint.args[0]
        if getattr(block, "gradient_checkpointing", False):
            if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
                return True
    return False


def _remembering(checkpoint: Callable, function: Callable, *args: Any) -> Any:
    return _checkpoint(checkpoint, _thread.notes, function, *args)


def _checkpoint(checkpoint: Callable, mine: Mapping[Any, Any], function: Callable, *args: Any) -> Any:
    return checkpoint(partial(_with_notes, mine, function), *args)


def _with_notes(mine: Mapping[Any, Any], function: Callable, *args: Any) -> Any:
    before = _thread.notes
    _thread.notes = mine
    try:
        return function(*args)
    finally:
        _thread.notes = before


def twin(
    module: nn.Module, tensors: Mapping[str, torch.Tensor] | None = None, **attributes: Any
) -> nn.Module:
    """A shallow copy of ``module`` with ``tensors`` in the places of the parameters of these (dotted) names.

    The module and its parameters stay as they are; the copy is for one call of its forward.
    """
    own, inner = {}, {}
    for name, tensor in (tensors or {}).items():
        child, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = tensor
        else:
            own[name] = tensor
    state = module.__dict__.copy()
    state.pop("forward", None)  # it would compute with the module
    state["_parameters"] = {**module._parameters, **own}
    if inner:
        children = {name: twin(module._modules[name], values) for name, values in inner.items()}
        state["_modules"] = {**module._modules, **children}
    state.update(attributes)
    copy = object.__new__(type(module))
    copy.__dict__ = state
    return copy


class Call:
    """What is left of a module's call: the functions ``behind`` this one, then the module's own forward.

    module: the one that was called.  layer: it, or a twin that stands for it.  own: a forward that the module
    had as an attribute, None if it has its class's.
    """

    def __init__(
        self, module: nn.Module, layer: nn.Module, behind: tuple[Callable, ...], own: Callable | None
    ):
        self.module, self.layer, self.behind, self.own = module, layer, behind, own

    def on(self, layer: nn.Module) -> Call:
        """The same with ``layer`` in the module's place."""
        return Call(self.module, layer, self.behind, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.behind:
            rest = Call(self.module, self.layer, self.behind[1:], self.own)
            return self.behind[0](rest, *args, **kwargs)
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)


def stock(module: nn.Module, forward: Callable | None) -> bool:
    """Whether ``forward``, an attribute of ``module`` or None, is its class's own all the same; accelerate
    leaves such a one behind."""
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


class Detour:
    """The forward of one module with functions around it, the first outermost.

    They are bound methods of parts, ``(call, *args, **kwargs) -> output``.  The module keeps its class, its
    name and its keys.  Each change is one assignment, so that nothing is ever half done.
    """

    def __init__(self, module: nn.Module):
        self.module, self.own = module, vars(module).get("forward")
        self.around: tuple[Callable, ...] = ()

    @staticmethod
    def of(module: nn.Module) -> Detour | None:
        """The one that ``module`` takes."""
        taken = getattr(module.__dict__.get("forward"), "__self__", None)
        return taken if isinstance(taken, Detour) else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = None if stock(self.module, self.own) else self.own
        return Call(self.module, self.module, self.around, own)(*args, **kwargs)

    def add(self, function: Callable) -> None:
        self.around = (*self.around, function)

        def forward(detour: Detour, *args: Any, **kwargs: Any) -> Any:
            return Detour.forward(detour, *args, **kwargs)

        # the Trainer leaves out what a forward has no argument for
        forward.__signature__ = inspect.signature(type(self.module).forward)
        self.module.__dict__["forward"] = MethodType(forward, self)

    def remove(self, part: object) -> None:
        """Let go of the functions of ``part``.  Somebody else may have put a forward over this one by now; it
        then goes on without a function."""
        self.around = tuple(function for function in self.around if function.__self__ is not part)
        if not self.around and Detour.of(self.module) is self:
            if self.own is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.own
