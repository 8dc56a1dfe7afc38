"""FLoRA - one batch, and each example its own adapter.  Wen & Chaudhuri 2023, arXiv:2312.05677.

    multiply ("fast LoRA"):  W_i = W * (B_i A_i)              y = sum_k b_ik * (W (a_ik * x)) + b
    add ("batched LoRA"):    W_i = W + (alpha / r) B_i A_i    y = W x + b + (alpha / r) B_i (A_i x)

A: (n, r, d_in), B: (n, d_out, r) for n adapters; i is the example's one, a_ik a row of A_i, b_ik a column of
B_i, * element-wise.  Neither forms a weight per example.  Multiplying runs the base's product r times and
nothing else; adding runs it once, and two thin products per example: fewer operations, of a kind that is slow
on some hardware.  At the start W_i = W: B = 0 for add; for multiply a_i1 = b_i1 = 1 and further b_ik = 0 (our
reading).  Weight decay would pull those ones, and with them W_i, to zero: train multiply without it.  count =
n r (d_in + d_out) per target.  The adapter in use merges if all examples share it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from guidelib.core.anatomy import Site, Targets
from guidelib.core.attaching import Attachment, attach_saved, load
from guidelib.core.method import expect, is_number, is_whole
from guidelib.core.points.choice import Choosing
from guidelib.core.points.passes import Call
from guidelib.core.points.weight_delta import BranchCost, ChoosingPart, Delta, WeightDelta, added_dtype
from guidelib.reparametrization.lora import LoRA


@dataclass(frozen=True)
class FLoRA(WeightDelta):
    """``tasks`` adapters of rank ``r`` at every target; ``using`` chooses one per example, the first acts by
    itself.

    form: "multiply" or "add".  alpha: the update of "add" is scaled by alpha / r, None means by 1; "multiply"
    has no scale.  targets: roles (see anatomy.py).  The paper leaves the rank to the task; 4 is our choice.
    """

    r: int = 4
    tasks: int = 2
    form: str = "multiply"
    alpha: float | None = None
    targets: Targets = ("q", "v")

    def __post_init__(self):
        super().__post_init__()
        for name in ("r", "tasks"):
            value = getattr(self, name)
            expect(is_whole(value), name, value, "a whole number of at least 1")
        expect(self.form in ("multiply", "add"), "form", self.form, "'multiply' or 'add'")
        if self.alpha is not None:
            expect(self.form == "add", "alpha", self.alpha, "None for form='multiply', which has no scale")
            expect(is_number(self.alpha), "alpha", self.alpha, "a finite number or None")

    def parts(self, anatomy, saved):
        blocks = {(stack, layer): block for stack, layer, block in anatomy.blocks()}
        return [
            PerExamplePart(self, site, self.build(site), blocks.pop((site.stack, site.layer), None))
            for site in anatomy.linears(self.targets)
        ]

    def build(self, site: Site) -> PerExample:
        smaller = min(site.shape)
        expect(self.r <= smaller, "r", self.r, f"at most {smaller}, the smaller side of {site.name}")
        if self.form == "multiply":
            return Fast(site.weight, self.r, self.tasks)
        return Batched(site.like, self.r, self.tasks, 1.0 if self.alpha is None else self.alpha / self.r)


class PerExample(Delta, Choosing):
    """The factors of all adapters of one weight, and which of them are in use."""

    def __init__(self, weight: torch.Tensor, r: int, tasks: int):
        super().__init__()
        d_out, d_in = weight.shape
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        self.A = nn.Parameter(torch.empty(tasks, r, d_in, **like))
        self.B = nn.Parameter(torch.zeros(tasks, d_out, r, **like))
        nn.init.kaiming_uniform_(self.A.view(-1, d_in), a=math.sqrt(5))  # each as LoRA's
        self.tasks = tasks

    def chosen(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, d_in) and B (d_out, r) for the whole batch, or one of each in front per row of x."""
        index = self.index(len(x), self.A.device)
        return self.A[index], self.B[index]

    def product(self) -> torch.Tensor:
        """B_i A_i (d_out, d_in) of the one adapter in use."""
        ids, _ = self.choice
        expect(isinstance(ids, int), "ids", ids, "one adapter where a single weight is asked for")
        return self.B[ids] @ self.A[ids]


class Batched(PerExample):
    """y + scale * B_i A_i x."""

    def __init__(self, weight: torch.Tensor, r: int, tasks: int, scale: float):
        super().__init__(weight, r, tasks)
        self.scale = scale

    def delta(self) -> torch.Tensor:
        return self.scale * self.product()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.chosen(x)
        if a.dim() == 2:
            return F.linear(F.linear(x, a) * self.scale, b)
        rows = x.reshape(len(x), -1, x.shape[-1])  # (B, T, d_in)
        return (rows @ a.mT * self.scale @ b.mT).view(*x.shape[:-1], -1)

    def cost(self) -> BranchCost:
        """Of one adapter for the whole batch: LoRA's."""
        (_, r, d_in), d_out = self.A.shape, self.B.shape[1]
        return BranchCost(
            keeps_input=True,
            kept=r,
            forward=2 * r * (d_in + d_out),
            backward=2 * r * (d_in + 2 * d_out),
            backward_input=2 * r * d_in,
        )


class Fast(PerExample):
    """sum_k b_ik * (W (a_ik * x)) + b."""

    additive = False

    def __init__(self, weight: torch.Tensor, r: int, tasks: int):
        super().__init__(weight, r, tasks)
        with torch.no_grad():
            self.A[:, 0] = 1
            self.B[:, :, 0] = 1

    def effective(self, weight, bias):
        return (weight * self.product()).to(weight.dtype), bias

    def adjust(self, x, y, weight, bias):
        """Where the layer has run, its output y is corrected; y is None where this takes its place."""
        a, b = self.chosen(x)
        per_row = () if a.dim() == 2 else (len(x), *(1 for _ in x.shape[1:-1]))
        total = None
        for k in range(a.shape[-2]):
            beside = k == 0 and y is not None
            scaled = x * a[..., k, :].view(*per_row, -1)
            scaled = (scaled - x if beside else scaled).to(weight.dtype)
            inner = F.linear(scaled, weight, bias if k == 0 and not beside else None)
            dtype, outer, factor = inner.dtype, inner.to(b.dtype), b[..., k].view(*per_row, -1)
            if beside:  # to the bit y where a_1 = b_1 = 1; a product with a slice of W may round otherwise
                whole = (y if bias is None else y - bias) + outer  # W (a_1 * x)
                outer = y + (factor * whole - whole + outer)
            elif k == 0 and bias is not None:
                outer = torch.lerp(bias.to(b.dtype), outer, factor)  # to the bit outer where the factor is 1
            else:
                outer = outer * factor
            total = outer if total is None else total + outer
        return total.to(dtype)

    def cost(self) -> BranchCost:
        """Of one adapter for the whole batch.  The layer's own product is the first of the r."""
        (_, r, d_in), d_out = self.A.shape, self.B.shape[1]
        one = 2 * d_in * d_out
        return BranchCost(
            keeps_input=True,  # for the gradients of the a_k
            kept=r * d_out,  # W (a_k * x), for those of the b_k
            forward=(r - 1) * one,
            backward=r * one,  # to the a_k, whether or not anything below is trained
            backward_input=-one,
        )


class PerExamplePart(ChoosingPart):
    """Fast stands in the place of its layer's own product; one map of a fused layer stands beside that
    instead, which costs one product more."""

    why_not = "each example has its own adapter; choose one for all with using(model, id)"

    def plug(self) -> None:
        if isinstance(self.delta, Fast) and self.site.rows is None:
            self.around(self.site.module, self._instead)
            self.frame_block()
        else:
            super().plug()

    def _instead(self, call: Call, x: torch.Tensor) -> torch.Tensor:
        return self.delta.adjust(x, None, *self.found(call.layer))


def load_loras(model: PreTrainedModel, paths: Sequence[str | os.PathLike]) -> Attachment:
    """Attach one FLoRA(form="add") whose adapters are the saved LoRAs ``paths``, in their order.

    Raises what ``load`` raises, and ValueError if a file holds something else than a LoRA of the first one's
    rank, scale and targets, or a task head other than the first one's: a batch has one head.  The model is
    then as it was.
    """
    several = isinstance(paths, Sequence) and not isinstance(paths, str | bytes)
    expect(several and len(paths) > 0, "paths", paths, "a list of one or more files")
    first, states = None, []
    for path in map(os.fspath, paths):
        attachment = load(model, path)
        try:
            method = attachment.method
            expect(type(method) is LoRA, "paths", f"{path} with {method!r}", "files of LoRA")
            method = replace(method, dropout=0.0, freeze_A=False)  # they concern the training alone
            first = first or method
            expect(method == first, "paths", f"{path} with {method!r}", f"files like the first, {first!r}")
            # as FLoRA's parts are called
            states.append({n.replace("LoRA_", "FLoRA_", 1): t.clone() for n, t in attachment.state().items()})
        finally:
            attachment.detach()
        mine, other = ({n: t for n, t in s.items() if ".delta." not in n} for s in (states[0], states[-1]))
        same = mine.keys() == other.keys() and all(tensor.equal(other[n]) for n, tensor in mine.items())
        expect(same, "paths", f"{path} with another task head", "files with the same task head")
    alpha = first.alpha * (math.sqrt(first.r) if first.rank_stabilized else 1)
    method = FLoRA(first.r, len(states), "add", alpha, first.targets)
    saved = {n: torch.stack([s[n] for s in states]) if ".delta." in n else t for n, t in states[0].items()}
    return attach_saved(model, method, saved, attachment.anatomy.drawn)
