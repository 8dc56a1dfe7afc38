"""SparseDelta - a few entries of the base parameters are trained, and no other moves.

    theta' = theta + scatter(indices, values)        values, indices: (k,);  values zero at the start

theta are the parameters of any kind that a method chooses from.  What is trained are the k values, so weight
decay and an optimiser's moments have nothing else to act on.  A gradient that is masked keeps neither away.

Beside a linear map autograd keeps the input alone.  It would keep W' as well, which is no parameter and as
large as W; here W' is made again for the gradient of the input.  The gradient of W is formed only where the
support is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from guidelib.core.anatomy import ADDED, PLAIN, Anatomy, Targets
from guidelib.core.method import Attached, Method, expect, is_number
from guidelib.core.points.part import Part, Place, where
from guidelib.core.points.passes import Call
from guidelib.core.points.weight_delta import added_dtype
from guidelib.core.points.weight_space import WeightSpacePart

DENSE = 50  # where one entry in so many or more is trained, a whole product takes less time than the entries
GATHERED = 2**20  # numbers that are gathered at once


@dataclass(frozen=True)
class Selecting(Method):
    """Base of the methods that train a share ``keep`` of the entries of the base parameters.

    targets: the roles (see anatomy.py) of the linear maps to choose from, of a fused layer all of its maps;
    None: every parameter of the base.  The task head is never chosen from, since all of it is trained.

    Before data were seen, the support is random.  It is chosen anew as long as no value was trained.
    """

    keep: float = 0.005
    targets: Targets | None = None

    def __post_init__(self):
        share = is_number(self.keep) and 0 < self.keep <= 1
        expect(share, "keep", self.keep, "a share of the entries, more than 0 and at most 1")
        if self.targets is not None:
            self.several("targets")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        part = SparseDelta(self, anatomy.model, self.choices(anatomy), self.keep, saved)
        if part.open_in(saved):
            part.open()
        return [part]

    def choices(self, anatomy: Anatomy) -> dict[str, nn.Parameter]:
        """The parameters to choose entries from, by name."""
        head, parameters = anatomy.head(), anatomy.parameters()
        if self.targets is not None:
            sites = anatomy.linears(self.targets)
            for layer in dict.fromkeys(site.module for site in sites):
                mine = [site for site in sites if site.module is layer]
                whole = sum(site.weight.numel() for site in mine) == mine[0].parameter.numel()
                accepted = f"all maps of the layer that holds {mine[0].name}"
                expect(whole, "targets", self.targets, accepted)
            chosen = {id(p) for site in sites for p in site.module._parameters.values() if p is not None}
            parameters = {name: p for name, p in parameters.items() if id(p) in chosen}
        return {name: p for name, p in parameters.items() if name not in head}

    def part(self, attachment: Attached) -> SparseDelta:
        (part,) = attachment.parts_of(self)
        return part


@dataclass(frozen=True)
class Narrowing(Selecting):
    """Base of the methods that train all entries before they train the few.

    dense_lr: the learning rate meanwhile; None: the same.  A few entries may take a much higher one.
    """

    dense_lr: float | None = None

    def __post_init__(self):
        super().__post_init__()
        number = is_number(self.dense_lr) and self.dense_lr > 0
        expect(self.dense_lr is None or number, "dense_lr", self.dense_lr, "a positive number or None")

    def prepare(self, attachment: Attached, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        part = self.part(attachment)
        if part.dense is None and not part.trained:
            part.open()

    def rates(self, attachment: Attached) -> dict[nn.Parameter, float]:
        dense = self.part(attachment).dense
        return {} if dense is None or self.dense_lr is None else dict.fromkeys(dense, self.dense_lr)


class Support(Part):
    """Base of the parts that hold k entries of several tensors, each of which has a name.

    values: (k,), trained.  indices: places in the flattened tensors, ascending in each.  sizes: how many of
    them are in which tensor.
    """

    def spread_over(
        self,
        numels: Mapping[str, int],
        keep: float,
        saved: Mapping[str, torch.Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Begin with the share ``keep`` of tensors of these sizes, at random places or at those of a file."""
        self._index = {name: i for i, name in enumerate(numels)}
        self._numels = [*numels.values()]
        total = sum(self._numels)
        k = max(1, round(keep * total))
        mine = f"{ADDED}.{self.name}."
        stored = {name.removeprefix(mine): t for name, t in saved.items() if name.startswith(mine)}
        if {"indices", "sizes"} <= stored.keys():
            sizes, indices = stored["sizes"].tolist(), stored["indices"]
            self._expect_support(k, sizes, indices)
        else:  # as many in each as its share
            ends = [0, *(end * k // total for end in accumulate(self._numels))]
            sizes = [end - start for start, end in pairwise(ends)]
            like = "meta" if device.type == "meta" else "cpu"
            pairs = zip(sizes, self._numels, strict=True)
            indices = torch.cat([spread(n, size, like) for n, size in pairs])
        self.values = nn.Parameter(torch.zeros(k, device=device, dtype=dtype))
        self.register_buffer("indices", indices.to(device=device, dtype=torch.int32))
        self.register_buffer("sizes", torch.tensor(sizes, dtype=torch.int32, device=device))
        self._divide(sizes)

    def _expect_support(self, k: int, sizes: list[int], indices: torch.Tensor) -> None:
        right = len(sizes) == len(self._numels) and sum(sizes) == k and indices.shape == (k,)
        right = right and all(0 <= n <= size for n, size in zip(sizes, self._numels, strict=True))
        for chosen, size in zip(indices.split(sizes), self._numels, strict=True) if right else ():
            rising = bool((chosen[1:] > chosen[:-1]).all())
            right = right and (not len(chosen) or rising and 0 <= int(chosen[0]) and int(chosen[-1]) < size)
        expect(right, "indices", f"{tuple(indices.shape)} of them", f"{k} ascending places in the parameters")

    def _divide(self, sizes: Iterable[int]) -> None:
        spans = pairwise([0, *accumulate(sizes)])
        self._spans = {name: slice(*span) for name, span in zip(self._index, spans, strict=True)}

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._divide(self.sizes.tolist())

    @property
    def k(self) -> int:
        """How many entries are trained in the end."""
        return len(self.values)

    @torch.no_grad()
    def choose(self, scores: Iterable[torch.Tensor]) -> torch.Tensor:
        """Let the support be the k entries of the highest scores, a tensor for each.  Returns their places
        where all are laid end to end."""
        flat = torch.cat([score.flatten() for score in scores])
        chosen = flat.topk(self.k, sorted=False).indices.sort().values
        numels = torch.tensor(self._numels, device=chosen.device)
        ends = numels.cumsum(0)
        sizes = torch.searchsorted(chosen, ends).diff(prepend=ends.new_zeros(1))
        self.support(chosen - (ends - numels).repeat_interleave(sizes), sizes)
        return chosen

    @torch.no_grad()
    def support(self, indices: torch.Tensor, sizes: torch.Tensor) -> None:
        """Let the k ``indices`` be the support, ``sizes`` of them in each tensor, and the values zero."""
        self.values.zero_()
        self.indices.copy_(indices)
        self.sizes.copy_(sizes)
        self._divide(sizes.tolist())


class SparseDelta(WeightSpacePart, Support):
    """The support and the values of one method, in the order of ``parameters``.

    dense: while it is open, all entries are trained in the place of the few, to see which ones matter; None
    otherwise.  start: what else a method gives back when it closes, by name; it is not saved.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        keep: float,
        saved: Mapping[str, torch.Tensor],
    ):
        super().__init__(method, model, parameters)
        expect(bool(parameters), "model", type(model).__name__, "one with parameters beside its head")
        first = next(iter(parameters.values()))
        numels = {name: p.numel() for name, p in parameters.items()}
        self.spread_over(numels, keep, saved, device=first.device, dtype=added_dtype(first))
        self.dense: nn.ParameterList | None = None
        self.start: dict[str, torch.Tensor] = {}

    def open_in(self, saved: Mapping[str, torch.Tensor]) -> bool:
        """Whether it is open in a file, of a training that was broken off."""
        return f"{ADDED}.{self.name}.dense.0" in saved

    @property
    def trained(self) -> bool:
        """Whether a value was trained already."""
        return bool(self.values.any())

    @property
    def chosen_from(self) -> list[nn.Parameter]:
        """The parameters in their order."""
        present = self.present
        return [present[name] for name in self._index]

    def moves(self, name: str) -> bool:
        """Whether anything is added to a parameter."""
        return self.dense is not None or self._spans[name].start < self._spans[name].stop

    def update(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is added to a parameter: values and their places, or numbers for all entries and None."""
        if self.dense is not None:
            return self.dense[self._index[name]], None
        span = self._spans[name]
        return self.values[span], self.indices[span]

    def effective(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        self._expect_size(name, weight)
        return moved(weight, *self.update(name)) if self.moves(name) else weight

    def _expect_size(self, name: str, weight: torch.Tensor) -> None:
        if weight.numel() != self._numels[self._index[name]]:
            raise ValueError(
                f"model: {name} was resized to {tuple(weight.shape)} after {self.name} was attached; "
                "detach() and attach again"
            )

    @property
    def places(self) -> dict[Place, int | torch.Tensor]:
        found: dict[Place, int | torch.Tensor] = {}
        for name, p in self.present.items():
            if self.moves(name):
                few = p.numel() if self.dense is not None else self.indices[self._spans[name]]
                found[where(p)] = 0 if p.requires_grad else few
        return found

    def _forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        owned = {a: name for a, name in self._owners[call.module].items() if self.moves(name)}
        if not owned:
            return call(*args, **kwargs)
        linear = "weight" in owned and type(call.layer) in PLAIN and not kwargs
        if not linear or call.behind:  # which wants a weight
            return super()._forward(call, *args, **kwargs)
        layer, function = call.layer, _Compiled if torch.compiler.is_compiling() else _Linear
        self._expect_size(owned["weight"], layer.weight)
        bias = layer.bias
        if "bias" in owned:
            bias = self.effective(owned["bias"], bias)
        update = self.update(owned["weight"])
        return function.apply(*args, layer.weight, bias, *update, isinstance(layer, Conv1D))

    def open(self) -> None:
        """Train all entries in the place of the few, from zero."""
        like = {"device": self.values.device, "dtype": self.values.dtype}
        self.dense = nn.ParameterList(torch.zeros(p.shape, **like) for p in self.chosen_from)
        self.values.requires_grad_(False)

    def close(self) -> None:
        """Train the few again."""
        self.dense = None
        self.values.requires_grad_(True)
        self.values.grad = None


def spread(n: int, size: int, device: str) -> torch.Tensor:
    """n random places of ``size``: one in each of n equal stretches."""
    like = {"dtype": torch.float64, "device": device}
    edges = (torch.arange(n + 1, **like) * size / max(n, 1)).floor()
    return edges[:-1] + (torch.rand(n, **like) * edges.diff()).floor()


def moved(weight: torch.Tensor, values: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """``weight`` with ``values`` added at ``indices``, or everywhere.  Added in 32 bits at least, and then
    rounded to the type of ``weight``."""
    dtype = torch.promote_types(weight.dtype, values.dtype)
    if indices is None:
        return (weight.to(dtype) + values).to(weight.dtype)
    flat = weight.flatten().to(dtype).index_add(0, indices, values.to(dtype))
    return flat.to(weight.dtype).view(weight.shape)


class _Linear(torch.autograd.Function):
    """y = W' x + b.  Autograd keeps x; W' is made again for the gradient of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, values, indices, turned):
        return _product(x, moved(weight, values, indices), bias, turned)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, values, indices, ctx.turned = inputs
        ctx.save_for_backward(x, weight, values, indices)
        ctx.save_for_forward(x, weight, values, indices)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, values, indices = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_values, *_ = ctx.needs_input_grad
        of_x = of_weight = of_bias = of_values = None
        if needs_x:
            changed = moved(weight, values, indices).to(gradient.dtype)  # autocast may have changed the type
            of_x = F.linear(gradient, changed if ctx.turned else changed.t()).to(x.dtype)
        y, x = (t.to(gradient.dtype).reshape(-1, t.shape[-1]) for t in (gradient, x))
        left, right = (x, y) if ctx.turned else (y, x)  # the gradient of the weight is left^T right
        few = indices is not None and DENSE * len(indices) < weight.numel()
        if needs_weight or (needs_values and not few):
            of_weight = of_values = left.t() @ right
            of_values = of_values if indices is None else of_values.flatten().index_select(0, indices)
        elif needs_values:
            of_values = _entries(left, right, indices)
        if needs_bias:
            of_bias = y.sum(0)
        return (
            of_x,
            of_weight.to(weight.dtype) if needs_weight else None,
            of_bias,
            of_values.to(values.dtype) if needs_values else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx, along_x, along_weight, along_bias, along_values, *others):
        x, weight, values, indices = ctx.saved_tensors
        along = torch.zeros_like(weight) if along_weight is None else along_weight
        along = along if along_values is None else moved(along, along_values, indices)
        bias = along.new_zeros(along.shape[1]) if ctx.turned else None
        out = _product(x, along, bias, ctx.turned)
        if along_x is not None:
            out = out + _product(along_x, moved(weight, values, indices), bias, ctx.turned)
        return out if along_bias is None else out + along_bias


class _Compiled(_Linear):
    """The same for torch.compile, which takes no function with a ``jvp``."""

    jvp = torch.autograd.Function.jvp


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, turned: bool) -> torch.Tensor:
    """What the layer computes, by its own operation and so to the bit."""
    if turned:
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])
    return F.linear(x, weight, bias)


def _entries(left: torch.Tensor, right: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Entries of left^T right, (n, a) and (n, b), which is never formed: entry (i, j) is a product of two
    columns."""
    rows, columns = indices // right.shape[1], indices % right.shape[1]
    left, right = left.t().contiguous(), right.t().contiguous()
    n = len(rows) if left.is_meta else max(1, GATHERED // max(left.shape[1], 1))  # shapes take no memory
    pairs = zip(rows.split(n), columns.split(n), strict=True)
    return torch.cat([(left.index_select(0, i) * right.index_select(0, j)).sum(1) for i, j in pairs])
