"""DiffPruning - learn a difference from the base and, with it, which entries of it are zero.  Guo, Rush and
Kim 2021, arXiv:2012.07463, section 3.

    theta' = theta + z * w,   z = min(1, max(0, (r - l) s + l)),   s = sigmoid(log u - log(1 - u) + alpha)
    penalty = lambda sum_j P(z_j > 0) = lambda sum_j sigmoid(alpha_j - log(-l / r)),   l = -1.5, r = 1.5

w and alpha have theta's size D, w starts at zero, u is uniform: z is a hard concrete gate (Louizos et al.
2018, arXiv:1712.01312).  Without noise, in evaluation mode, s is sigmoid(alpha).

    1. w and alpha are trained together
    2. the k entries with the largest |z w| of all are kept
    3. these alone are trained on

structured: a second gate for each tensor, z_j = z_j^element z^tensor, whose product is also in the penalty.

count = 2 D, and one for each tensor if it is structured, until step 2; then k = keep * D.  Stored in the end:
k values and k indices.  Merges exactly.  Memory: more than full fine-tuning, since two numbers for each entry
have gradients and moments, and autograd keeps the gates.

The authors give the penalty of a structured gate as a product, and their code adds the two; here it is the
product.  The noise is drawn once a step, so a tied parameter has one gate, and so has a recomputed block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy
from guidelib.core.method import expect, is_number
from guidelib.core.points.part import Part
from guidelib.core.points.sparse_delta import Narrowing, SparseDelta
from guidelib.core.values import draw, has_values

LEFT, RIGHT = -1.5, 1.5  # to which s is stretched
MARGIN = 1e-4  # of u from 0 and 1, where its logit is infinite
START = 5.0  # alpha: a gate is then open with probability 0.993


@dataclass(frozen=True)
class DiffPruning(Narrowing):
    """Train all entries and their gates, keep the share ``keep`` of the entries, and train those on.

    penalty: lambda, for each entry; the paper's is for BERT-large.  structured: whether each tensor has a
    gate, too.  gate_lr: the gates' learning rate.  final: the share of the steps that is left for the
    entries that are kept.
    """

    penalty: float = 1.25e-7
    structured: bool = False
    gate_lr: float = 0.1
    final: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        number = is_number(self.penalty) and self.penalty >= 0
        expect(number, "penalty", self.penalty, "a finite number of at least 0")
        expect(is_number(self.gate_lr) and self.gate_lr > 0, "gate_lr", self.gate_lr, "a positive number")
        expect(isinstance(self.structured, bool), "structured", self.structured, "True or False")
        share = is_number(self.final) and 0 < self.final < 1
        expect(share, "final", self.final, "a share of the steps, more than 0 and less than 1")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        part = GatedDelta(self, anatomy.model, self.choices(anatomy), self.keep, saved)
        if not saved or part.open_in(saved):
            part.open()
        return [part]

    def rates(self, attachment):
        gates = self.part(attachment).gates
        return super().rates(attachment) | dict.fromkeys(() if gates is None else gates, self.gate_lr)

    def regularizer(self, attachment):
        part = self.part(attachment)
        return None if part.gates is None or not self.penalty else self.penalty * part.expected()

    def switch(self, total: int) -> int:
        """After how many steps the entries are chosen."""
        return max(1, min(total - round(self.final * total), total - 1))

    @torch.no_grad()
    def after_step(self, attachment, step, total, optimizer):
        part = self.part(attachment)
        part.step += 1
        if part.dense is None or step < self.switch(total):
            return
        with part.without_noise():
            gated = [part.update(name)[0] for name in part.replaced]
        part.close()
        chosen = part.choose(difference.abs() for difference in gated)
        part.values.copy_(torch.cat([difference.flatten() for difference in gated])[chosen])


class GatedDelta(SparseDelta):
    """While it is open, each entry has a gate.

    gates: the alphas of each parameter and, if they are structured, those of the tensors behind them; None if
    it is closed.  seed, step: what the noise follows from.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.gates: nn.ParameterList | None = None
        self.seed, self.step = draw(2**31), 0

    def open(self) -> None:
        super().open()
        shapes = [each.shape for each in self.dense]
        shapes += [(len(shapes),)] if self.method.structured else []
        like = {"device": self.values.device, "dtype": self.values.dtype}
        self.gates = nn.ParameterList(torch.full(shape, START, **like) for shape in shapes)

    def close(self) -> None:
        super().close()
        self.gates = None

    def update(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.dense is None:
            return super().update(name)
        i = self._index[name]
        return self.dense[i] * self.gate(i), None

    def gate(self, i: int) -> torch.Tensor:
        """z of a parameter, of its shape; with noise in training mode."""
        alpha, *of_tensors = self.gates[i], *self.gates[len(self._index) :]
        generator = None
        if self.training and has_values(alpha):
            generator = torch.Generator(alpha.device)
            generator.manual_seed((self.seed * 10_007 + self.step) * 10_007 + i)
        z = hard_concrete(alpha, self._noise(alpha, generator))
        for alphas in of_tensors:
            z = z * hard_concrete(alphas[i], self._noise(alphas[i], generator))
        return z

    def _noise(self, like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor | None:
        if not self.training:
            return None
        return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)

    def expected(self) -> torch.Tensor:
        """How many gates are not zero, on average."""
        each = torch.stack([open_probability(alpha).sum() for alpha in self.gates[: len(self._index)]])
        for alphas in self.gates[len(self._index) :]:
            each = each * open_probability(alphas)
        return each.sum()

    @contextmanager
    def without_noise(self) -> Iterator[None]:
        training = self.training
        self.training = False
        try:
            yield
        finally:
            self.training = training

    def merge(self, keep: Callable[[nn.Parameter], None]) -> None:
        with self.without_noise():
            super().merge(keep)


def hard_concrete(alpha: torch.Tensor, u: torch.Tensor | None = None) -> torch.Tensor:
    """z of gates with the parameters ``alpha``: with uniform noise ``u`` of the same shape, or without."""
    if u is not None:
        alpha = alpha + u.clamp(MARGIN, 1 - MARGIN).logit()
    return ((RIGHT - LEFT) * alpha.sigmoid() + LEFT).clamp(0, 1)


def open_probability(alpha: torch.Tensor) -> torch.Tensor:
    """P(z > 0)."""
    return (alpha - math.log(-LEFT / RIGHT)).sigmoid()
