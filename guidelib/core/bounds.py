"""A bound on what a method makes, checked before it is made.

A method is a few numbers, and one of them too large would fill the memory or take hours: a bottleneck of
10**12, or 100,000 adapters in a file of a few kilobytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from guidelib.core.method import Method

ENTRIES = 3 * 10**7  # that a method may make, beside ten times those of its model
CALLS = 1000  # of torch's functions, for each tensor of the model
SAVED = 100  # for each tensor of the model and of a file
PLAIN = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}  # whose arguments are the shape
MAKERS = PLAIN | {torch.full, torch.randint, torch.randperm, torch.eye, torch.arange}


class Bounded(TorchFunctionMode):
    """Within the block, ``method`` may make parts of a sane size for a model with the parameters ``base``;
    and, if it comes from a file, not more than the file holds: ``saved``.

    Raises ValueError before the memory is taken.  What stands on the meta device takes none.
    """

    def __init__(
        self, method: Method, base: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor] | None
    ):
        super().__init__()
        self.handle = None
        sizes = [p.numel() for p in base.values()]
        self.method, self.most = method, ENTRIES + 10 * sum(sizes)
        self.entries, self.calls, self.trained = self.most, CALLS * len(sizes), math.inf
        self.file = saved is not None
        if saved is not None:
            self.calls = SAVED * (len(sizes) + len(saved))
            # some are made more than once: experts are copies of a first one
            self.trained = 3 * sum(tensor.numel() for tensor in saved.values()) / method.density

    def __enter__(self) -> Bounded:
        self.thread = threading.get_ident()  # the hook would see the modules of others, too
        self.handle = register_module_parameter_registration_hook(self._register)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.handle.remove()
        super().__exit__(*error)

    def end(self) -> None:
        """Stop to act, from wherever entering or leaving the block was interrupted."""
        if self.handle is not None:
            self.handle.remove()
        others = []
        while self in _get_current_function_mode_stack():
            others.append(_pop_mode())
        for mode in reversed([mode for mode in others if mode is not self]):
            _push_mode(mode)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls -= 1
        if function in MAKERS:
            self.entries -= _size(function, args, kwargs)
        elif function is torch.Tensor.clone:
            self.entries -= args[0].numel()
        if self.entries < 0:
            raise ValueError(
                f"method must make at most {self.most:,} numbers beside this model, got {self.method!r}"
            )
        if self.calls < 0 and self.file:
            self._too_small()
        if self.calls < 0:
            raise ValueError(f"method must make fewer tensors beside this model, got {self.method!r}")
        return function(*args, **kwargs)

    def _register(self, module: Any, name: str, parameter: torch.Tensor | None) -> None:
        if parameter is not None and not parameter.is_meta and threading.get_ident() == self.thread:
            self.trained -= parameter.numel()
            if self.trained < 0:
                self._too_small()

    def _too_small(self) -> None:
        raise ValueError(f"the file holds less than {self.method!r} has")


def _size(function: Any, args: Any, kwargs: Any) -> float:
    """How many entries the call makes."""
    meta = str(kwargs.get("device")) == "meta"
    if function in PLAIN and args:
        n = math.prod(args[0] if isinstance(args[0], Sequence) else args)
    else:
        try:
            n = function(*args, **kwargs | {"device": "meta"}).numel()
        except (TypeError, RuntimeError, OverflowError):  # a size that is no number for torch
            n = math.inf
    return n if not meta or n >= 2**63 else 0
