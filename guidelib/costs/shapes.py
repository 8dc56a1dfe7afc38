"""Models without values: what a step costs follows from the shapes, so it can be found without weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from guidelib.core.values import beside, mode_of

Model = TypeVar("Model", bound=nn.Module)

# the types that a safetensors file may hold, in its order
TYPES = {
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16"},
    **{torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64"},
    torch.int64: "I64",
}


def on_shapes(model: Model, *, meta: bool = False) -> Model:
    """A copy of ``model``, with what is attached to it, whose tensors have shapes and types but no values,
    and take no memory.

    They belong to torch's FakeTensorMode, which chooses the kernels of the device where ``model`` is (the CPU
    for one on the meta device); or with ``meta`` to the meta device, which is faster and knows no kernels.
    """
    with _Copies(None if meta else FakeTensorMode(allow_non_fake_inputs=True)):
        return copy.deepcopy(model)


class _Copies(TorchFunctionMode):
    def __init__(self, mode: FakeTensorMode | None):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                twin = self.twin(tensor)
                if isinstance(tensor, nn.Parameter):
                    twin = nn.Parameter(twin, tensor.requires_grad)
                memo[id(tensor)] = twin
            return memo[id(tensor)]
        if function is torch._C.TensorBase.clone:  # how a parameter with values is copied
            return self.twin(args[0])
        return function(*args, **(kwargs or {}))

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        device = "meta" if self.mode is None else "cpu" if tensor.is_meta else tensor.device
        with self.mode or nullcontext():
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


class LooksHold(TorchFunctionMode):
    """On the meta device, whatever is looked at holds: that a mask has no padding, for one.  And there is no
    padding among tokens, where they come without a mask."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if function is torch.Tensor.__contains__ and args[0].is_meta:
            return False
        return function(*args, **(kwargs or {}))


class NumbersOnShapes(TorchFunctionMode):
    """Beside weights without values, new floating-point numbers have none either: there may be one for each
    entry of a weight or of an attention.  Whole numbers and ones keep theirs: masks are made of them, and
    looked at.  What is looked at without a value holds, as on the meta device: that states are finite."""

    MAKERS = {torch.empty, torch.zeros, torch.rand, torch.randn, torch.eye}

    def __init__(self, model: nn.Module):
        super().__init__()
        self.mode = mode_of(model)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.__bool__ and isinstance(args[0], FakeTensor):
            return True
        floating = (kwargs.get("dtype") or torch.get_default_dtype()).is_floating_point
        with self.mode if floating and function in self.MAKERS else nullcontext():
            return function(*args, **kwargs)


class MasksOnShapes(TorchFunctionMode):
    """Beside weights without values, transformers looks at the mask of the real batch; fused attention then
    gets one without values, since what every layer makes of it would take memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask") if function is F.scaled_dot_product_attention else None
        if mask is not None and isinstance(args[0], FakeTensor) and not mask.requires_grad:  # T5's may
            kwargs = kwargs | {"attn_mask": beside(args[0], mask)}
        return function(*args, **kwargs)


def file_size(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the safetensors file with these tensors: eight, a header in JSON, and the numbers."""
    order = list(TYPES)
    header, end = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-order.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + -(-len(text) // 8) * 8 + end
