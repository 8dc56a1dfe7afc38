"""FAR, Freeze and Reconfigure - whole outputs of the feed-forward maps are trained, or none of them.  Vucetic
et al. 2022, arXiv:2205.01541.

    1. priming: all of the maps are trained for a small share of the steps
    2. each output i has moved by |w'_i - w_i|_1 + |b'_i - b_i|;  the share ``keep`` that moved most learns on
    3. y = [W_f x + b_f, W_l x + b_l], put back in order;  W_l (r, d_in) and b_l (r,) are trained

An output is a row of W (d_out, d_in).  Training r rows takes dense products alone: torch has a gradient for a
whole tensor or none.  count = r (d_in + 1) per map, r = keep * d_out, without the 1 where there is no bias.
Stored: as many, and r numbers of rows.  Merges exactly.

Our reading, since there is no public code: what the learners have learnt in the priming is kept, and the
others go back.  The frozen map stays whole and the learners' difference from it stands beside it, which
computes the same as two maps at the price of computing the learners' outputs twice.  The authors prime the
model; here only the maps that are reconfigured are primed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from guidelib.core.anatomy import ADDED, Anatomy, Site, Targets
from guidelib.core.method import expect, is_number
from guidelib.core.points.part import Part, Place
from guidelib.core.points.sparse_delta import spread
from guidelib.core.points.weight_delta import BranchCost, Delta, DeltaPart, WeightDelta, added_dtype
from guidelib.core.values import autocasts, has_values


@dataclass(frozen=True)
class FAR(WeightDelta):
    """Train the share ``keep`` of the outputs of every target, those that priming moves most.

    targets: roles (see anatomy.py).  priming: the share of the steps in which all outputs are trained.
    rewind: whether the learners go back to their start, too, when they are chosen.  Until then they are
    random.
    """

    keep: float = 0.1
    targets: Targets = "ffn"
    priming: float = 0.1
    rewind: bool = False

    def __post_init__(self):
        super().__post_init__()
        share = is_number(self.keep) and 0 < self.keep <= 1
        expect(share, "keep", self.keep, "a share of the outputs, more than 0 and at most 1")
        share = is_number(self.priming) and 0 < self.priming < 1
        expect(share, "priming", self.priming, "a share of the steps, more than 0 and less than 1")
        expect(isinstance(self.rewind, bool), "rewind", self.rewind, "True or False")

    def build(self, site: Site) -> Learners:
        return Learners(site, max(1, round(self.keep * site.shape[0])))

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        sites = anatomy.linears(self.targets)
        parts = [
            LearnersPart(self, site, delta) for site, delta in zip(sites, self.build_all(sites), strict=True)
        ]
        for part in parts:
            if f"{ADDED}.{part.name}.delta.primed.0" in saved:  # of a training that was broken off
                part.delta.open()
        return parts

    def prepare(self, attachment, batches):
        deltas = [part.delta for part in attachment.parts_of(self)]
        if not any(delta.trained for delta in deltas):
            for delta in deltas:
                delta.open()

    def after_step(self, attachment, step, total, optimizer):
        for part in attachment.parts_of(self):
            if part.delta.primed is not None and step >= self.priming * total:
                part.delta.close(self.rewind)


class LearnersPart(DeltaPart):
    """Beside one linear map, of which only some rows can change."""

    @property
    def places(self) -> dict[Place, int | torch.Tensor]:
        if self.gating is not None:
            return super().places
        site, rows, found = self.site, self.delta.rows, {}
        for (place, n), own in zip(super().places.items(), self.delta.own, strict=False):
            found[place] = min(n, own.numel())
            if 0 < found[place] < n and has_values(rows):
                outputs, d_in = rows + (0 if site.rows is None else site.rows.start), site.shape[1]
                if own.dim() == 1:
                    entries = outputs
                elif isinstance(site.module, Conv1D):
                    width = site.module.weight.shape[1]
                    entries = torch.arange(d_in, device=rows.device)[:, None] * width + outputs
                else:
                    entries = outputs[:, None] * d_in + torch.arange(d_in, device=rows.device)
                found[place] = entries.flatten()
        return found


class Learners(Delta):
    """Rows of one weight (d_out, d_in) that are trained, with their biases.

    rows: which ones, ascending.  learners: their differences from the base, (r, d_in) and (r,), the second
    where there is a bias.  primed: while all rows are trained instead, the same for all of them; None
    otherwise.
    """

    def __init__(self, site: Site, r: int):
        super().__init__()
        like = site.like
        self.moves_bias = getattr(site.module, "bias", None) is not None
        self.shape, made = site.shape, {"device": like.device, "dtype": added_dtype(like)}
        self.learners = self._make(r, made)
        rows = spread(r, self.shape[0], "meta" if like.is_meta else "cpu")
        self.register_buffer("rows", rows.to(device=like.device, dtype=torch.int64))
        self.primed: nn.ParameterList | None = None

    def _make(self, r: int, made: dict[str, Any]) -> nn.ParameterList:
        shapes = (r, self.shape[1]), (r,)
        return nn.ParameterList(torch.zeros(shape, **made) for shape in shapes[: 1 + self.moves_bias])

    @property
    def trained(self) -> bool:
        return any(bool(p.any()) for p in self.learners)

    def open(self) -> None:
        """Train all rows in the place of the few, from zero."""
        if self.primed is None:
            weight = self.learners[0]
            self.primed = self._make(self.shape[0], {"device": weight.device, "dtype": weight.dtype})
            self.learners.requires_grad_(False)

    @torch.no_grad()
    def close(self, rewind: bool) -> None:
        """Train only the rows that have moved most, by the sum of their entries' distances."""
        moved = sum(p.abs().flatten(1).sum(1) if p.dim() > 1 else p.abs() for p in self.primed)
        rows = moved.topk(len(self.rows)).indices.sort().values
        for learner, primed in zip(self.learners, self.primed, strict=True):
            learner.copy_(0 * learner if rewind else primed[rows])
            learner.grad = None
        self.rows.copy_(rows)
        self.primed = None
        self.learners.requires_grad_(True)

    @property
    def own(self) -> nn.ParameterList:
        """What is trained: differences of the weight's rows and, where there is one, of the bias."""
        return self.learners if self.primed is None else self.primed

    def _put(self, onto: torch.Tensor, own: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """``onto`` with ``own`` added in the places of its rows."""
        if self.primed is not None:
            return onto + own
        places = [None] * (dim % onto.dim()) + [self.rows]
        return torch.ops.aten.index_put(onto, places, own, True)  # autograd would keep what index_add adds

    def delta(self) -> torch.Tensor:
        weight = self.own[0]
        return self._put(weight.new_zeros(self.shape), weight)

    def effective(self, weight, bias):
        if self.moves_bias:
            own = self.own[1]
            bias = bias + self._put(own.new_zeros(self.shape[0]), own)
        return weight + self.delta(), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the trained rows add, (..., d_in) -> (..., r)."""
        weight, *bias = (p.to(x.dtype) for p in self.own)
        return F.linear(x, weight, *bias)

    def adjust(self, x, y, weight, bias):
        dtype = self.own[0].dtype
        return self._put(y, self(x if autocasts(x) else x.to(dtype)).to(y.dtype), dim=-1)

    def cost(self) -> BranchCost:
        one = 2 * self.own[0].numel()
        return BranchCost(keeps_input=True, kept=0, forward=one, backward=one, backward_input=one)
