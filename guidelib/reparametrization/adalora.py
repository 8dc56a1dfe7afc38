"""AdaLoRA - a rank for every weight, from one budget.  Zhang et al. 2023, arXiv:2303.10512, section 3.

    W' = W + (alpha / r) P diag(Lambda) Q        P: (d_out, r) and Q: (r, d_in) normal,  Lambda: (r,) zero

Triplet i is (P_i, Lambda_i, Q_i).  A penalty holds P and Q near orthogonal, so that the triplets stay apart.
After a step, the least important ones of the whole model lose their Lambda; the gradient may bring them back
until the budget stands still.  count = r (d_in + d_out) + r per target, for the initial r.  Merges exactly.

Where the authors' code and the paper differ, this is the code: the penalty is the mean of the norms, which
the paper squares and adds up.  The code's scale alpha / (r + 1e-5) allows for a rank of zero; here r >= 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import Site, Targets
from guidelib.core.attaching import Attachment
from guidelib.core.method import expect, is_number, is_whole
from guidelib.core.points.weight_delta import BranchCost, Delta, WeightDelta, added_dtype


@dataclass(frozen=True)
class AdaLoRA(WeightDelta):
    """Rank ``r`` for every target at first, ``target_r`` on average at the end, scaled by ``alpha / r``.

    targets: roles (see anatomy.py), all of them in the paper.  warmup, final: the shares of the training
    before the budget falls and after it, rounded down to steps; the paper's are near 0.1 and 0.5.  interval:
    steps between two prunings.  beta1, beta2: how long importance and its uncertainty are remembered.
    gamma: weight of the penalty.
    """

    r: int = 12
    target_r: int = 8
    alpha: float = 16.0
    targets: Targets = "all"
    warmup: float = 0.1
    final: float = 0.5
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        for name in ("r", "interval"):
            value = getattr(self, name)
            expect(is_whole(value), name, value, "a whole number of at least 1")
        whole = is_whole(self.target_r) and self.target_r <= self.r
        expect(whole, "target_r", self.target_r, f"a whole number from 1 to r = {self.r}")
        expect(is_number(self.alpha), "alpha", self.alpha, "a finite number")
        share = is_number(self.warmup) and 0 <= self.warmup < 1
        expect(share, "warmup", self.warmup, "a share of the training, at least 0 and less than 1")
        share = is_number(self.final) and 0 <= self.final and self.warmup + self.final < 1
        accepted = f"a share of the training, at least 0 and with warmup = {self.warmup} less than 1"
        expect(share, "final", self.final, accepted)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            expect(is_number(value) and 0 < value < 1, name, value, "a number between 0 and 1")
        expect(
            is_number(self.gamma) and self.gamma >= 0, "gamma", self.gamma, "a finite number of at least 0"
        )

    def build(self, site: Site) -> Triplets:
        side = min(site.shape)
        expect(self.r <= side, "r", self.r, f"at most {side}, the smaller side of {site.name}")
        return Triplets(site.like, self.r, self.alpha / self.r)

    def budget(self, step: int, total: int, weights: int) -> int:
        """b(t), how many triplets of ``weights`` weights may be nonzero after ``step`` of ``total`` steps."""
        start, stop = self._falling(total)
        left = 1 - min(max((step - start) / (stop - start), 0), 1)
        return int(weights * (self.r - self.target_r) * left**3 + weights * self.target_r)

    def _falling(self, total: int) -> tuple[int, int]:
        """The steps after which the budget starts and stops to fall."""
        return int(self.warmup * total), total - int(self.final * total)

    def prepare(self, attachment, batches):
        for part in attachment.parts_of(self):
            part.delta.remembered.clear()

    def regularizer(self, attachment):
        if not self.gamma:
            return None
        deltas = [part.delta for part in attachment.parts_of(self)]
        grams = [gram for delta in deltas for gram in (delta.P.t() @ delta.P, delta.Q @ delta.Q.t())]
        one = torch.eye(self.r, dtype=grams[0].dtype, device=grams[0].device)
        return self.gamma * torch.stack([torch.linalg.norm(gram - one) for gram in grams]).mean()

    @torch.no_grad()
    def after_step(self, attachment, step, total, optimizer):
        deltas = [part.delta for part in attachment.parts_of(self)]
        start, stop = self._falling(total)
        if step < stop:  # from stop on the scores stand still, and with them the ranks
            for delta in deltas:
                delta.remember(self.beta1, self.beta2)
        if step >= stop or (step > start and step % self.interval == 0):
            scores = torch.cat([delta.importance() for delta in deltas])
            # the first of equal ones, so that exactly b(t) are left
            order = scores.argsort(descending=True, stable=True)
            pruned = torch.ones_like(scores, dtype=torch.bool)
            pruned[order[: self.budget(step, total, len(deltas))]] = False
            for delta, rows in zip(deltas, pruned.split(self.r), strict=True):
                delta.Lambda.masked_fill_(rows, 0)


class Triplets(Delta):
    """scale * P diag(Lambda) Q for one weight (d_out, d_in).

    remembered: of each parameter, the moving averages of its entries' importance and of its uncertainty.
    They serve the training alone and are not saved; they take as much memory as Adam's moments.
    """

    def __init__(self, weight: torch.Tensor, r: int, scale: float):
        super().__init__()
        d_out, d_in = weight.shape
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        self.P = nn.Parameter(torch.empty(d_out, r, **like))
        self.Lambda = nn.Parameter(torch.zeros(r, **like))
        self.Q = nn.Parameter(torch.empty(r, d_in, **like))
        nn.init.normal_(self.P, std=0.02)
        nn.init.normal_(self.Q, std=0.02)
        self.scale = scale
        self.remembered: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def rank(self) -> int:
        """How many triplets are left."""
        return int(torch.count_nonzero(self.Lambda))

    def _right(self) -> torch.Tensor:
        return self.scale * (self.Lambda[:, None] * self.Q)  # (r, d_in)

    def delta(self) -> torch.Tensor:
        return self.P @ self._right()  # (d_out, d_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self._right()), self.P)  # (..., d_in) -> (..., r) -> (..., d_out)

    def cost(self) -> BranchCost:
        d_out, (r, d_in) = self.P.shape[0], self.Q.shape
        return BranchCost(
            keeps_input=True,
            kept=r,  # what P is applied to
            kept_input_once=r * d_in,  # scale * diag(Lambda) Q, for the gradient of x
            forward=2 * r * (d_in + d_out),
            backward=2 * r * (d_in + 2 * d_out),
            backward_input=2 * r * d_in,
        )

    def remember(self, beta1: float, beta2: float) -> None:
        """Take in the gradients: |w g| is about what the loss would change by if w were zero.

        A weight that took no part in the step (layer drop) is not judged by it; P and Q have the penalty's
        gradient all the same.
        """
        if self.Lambda.grad is None:
            return
        for name, w in self.named_parameters():
            mean, spread = self.remembered.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
            now = (w * w.grad).abs()
            mean = beta1 * mean + (1 - beta1) * now
            spread = beta2 * spread + (1 - beta2) * (now - mean).abs()
            self.remembered[name] = mean, spread

    def importance(self) -> torch.Tensor:
        """S (r,): of each triplet, s(Lambda_i) plus the means of s over P_i and Q_i."""
        if not self.remembered:  # pruned before anything was seen
            return torch.zeros_like(self.Lambda)
        s = {name: mean * spread for name, (mean, spread) in self.remembered.items()}
        return s["Lambda"] + (s["Q"].mean(1) + s["P"].mean(0))


def ranks(attachment: Attachment) -> dict[str, int]:
    """How many triplets every weight that AdaLoRA changes has left, by place."""
    left = Counter()
    for part in attachment.parts:
        if isinstance(getattr(part, "delta", None), Triplets):
            left[part.place] += part.delta.rank
    return dict(left)
