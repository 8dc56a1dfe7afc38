"""Sparse - a method whose matrices are pruned before they are trained.  He et al. 2022, arXiv:2210.04284,
sections 2.1 and 2.2.

Every entry w of the matrices that the method adds gets a score; the k highest of all stay.

    random
    magnitude    |w|
    snip         |g w|        g: the gradient of the loss.  Lee et al. 2019, arXiv:1810.02340
    grasp        w (H g)      H: its Hessian.  Were an entry gone, |g|^2 would fall by twice as much.
                              Wang et al. 2020, arXiv:2002.07376
    synflow      w dR/dw      R: what each map makes of ones, summed up, with |w| for all w.  In rounds, since
                              the scores change with what is gone.  Tanaka et al. 2020, arXiv:2006.05467

|g w| is the slope of the loss along a mask, at 1.  g and H g are sums over a few batches, in evaluation mode.
Scores are compared over all matrices; to divide them by their sum, as is usual, would change no choice.

count = k = keep * n of n entries, and what is no matrix: biases, norms, scales.  Stored: k indices, too.

R is the authors' code: each adapter by itself gets a vector of ones.  Its SynFlow has one round unless asked
for more, and its GraSP sets a temperature of 200 and uses none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from guidelib.additive.soft_prompts.prefix import PrefixTuning
from guidelib.core.anatomy import Anatomy
from guidelib.core.batches import Batch, loss
from guidelib.core.method import Attached, Delegate, Method, Sum, Wrapper, expect, is_number, within
from guidelib.core.modes import modes_kept
from guidelib.core.points.part import Part
from guidelib.core.points.pruned import Pruned
from guidelib.core.points.sublayer import SublayerPart
from guidelib.core.points.weight_delta import ChoosingPart, DeltaPart
from guidelib.core.values import has_values

SCORES = ("random", "magnitude", "snip", "grasp", "synflow")
BATCHES = 4  # that a gradient is summed over
ROUNDS = 100  # of SynFlow, as in its paper

Matrices = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sparse(Wrapper):
    """``method`` with the share ``keep`` of the entries of the matrices that it adds, chosen at the start.

    score: "random", "magnitude", "snip", "grasp" or "synflow".  ``fit`` chooses, and two of the scores need
    its data; until then the places are random.  The entries start as they would in ``method``.

    A matrix of zeros, such as LoRA's B, has no entry that any score but "random" could choose.
    """

    keep: float = 0.25
    score: str = "snip"

    def __post_init__(self):
        super().__post_init__()
        share = is_number(self.keep) and 0 < self.keep <= 1
        expect(share, "keep", self.keep, "a share of the entries, more than 0 and at most 1")
        expect(self.score in SCORES, "score", self.score, f"one of {', '.join(SCORES)}")
        written = next((m for m in within(self.method) if _writes(m)), None)
        expect(written is None, "method", written, "one whose parameters the optimiser alone moves")

    @property
    def density(self) -> float:
        return self.keep * self.method.density

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        parts = self.method.parts(anatomy, saved)
        dense = not any(isinstance(part, Pruned) for part in parts)
        expect(dense, "method", self.method, "one that is not sparse already")
        pruned = Pruned(self, parts, self.keep, saved)
        scales = any(isinstance(part, ChoosingPart) and not part.delta.additive for part in pruned.holders)
        expect(not scales, "method", self.method, "one that adds, for which 0 is nothing")
        if pruned.start and not pruned.is_whole and self.score != "random":
            zero = sum(has_values(w) and not w.any() for w in pruned.start.values())
            expect(not zero, "score", self.score, f"'random' where {zero} of the matrices start at zero")
        if self.score == "synflow":
            maps = all(_map(part) for part in pruned.holders)
            expect(maps, "score", self.score, "another one where a part is no map by itself")
        return [*parts, pruned]

    def select(self, anatomy: Anatomy) -> set[str]:
        return self.method.select(anatomy)

    def rewrites(self, anatomy: Anatomy) -> set[str]:
        return self.method.rewrites(anatomy)

    def prepare(self, attachment: Attached, batches: Iterable[Batch]) -> None:
        """Choose the entries, unless they have been trained."""
        (pruned,) = attachment.parts_of(self)
        if not (pruned.trained or pruned.is_whole or self.score == "random"):
            with modes_kept(attachment.model):
                try:
                    scores = self.scores(attachment.model.eval(), pruned, batches)
                finally:
                    pruned.whole = None
            flat = torch.cat([score.flatten() for score in scores.values()])
            if not flat.any():
                raise ValueError(f"score must not be {self.score!r} here, where it is 0 for all entries")
            if not flat.isfinite().all():
                raise ValueError(f"score must not be {self.score!r} here, where it is NaN or infinity")
            pruned.choose(scores.values())
        pruned.settle()

    def scores(self, model: nn.Module, pruned: Pruned, batches: Iterable[Batch]) -> Matrices:
        """Of every entry of the matrices, by their names."""
        start = {name: w.to(pruned.values.device) for name, w in pruned.start.items()}
        if self.score == "magnitude":
            return {name: w.abs() for name, w in start.items()}
        if self.score == "synflow":
            return synflow(pruned, start)
        few = [*itertools.islice(batches, BATCHES)]
        if self.score == "snip":
            return {name: (g * start[name]).abs() for name, g in gradient(model, pruned, start, few).items()}
        return {name: Hg * start[name] for name, Hg in curved(model, pruned, start, few).items()}


def gradient(model: nn.Module, pruned: Pruned, start: Matrices, batches: list[Batch]) -> Matrices:
    """g, summed over the batches."""
    whole = _compute_with(pruned, start)
    total = [torch.zeros_like(w) for w in whole]
    for batch in batches:
        _add(total, torch.autograd.grad(loss(model, batch), whole, materialize_grads=True))
    return dict(zip(start, total, strict=True))


def curved(model: nn.Module, pruned: Pruned, start: Matrices, batches: list[Batch]) -> Matrices:
    """H g, both summed over the batches."""
    g = [*gradient(model, pruned, start, batches).values()]
    whole = _compute_with(pruned, start)
    total = [torch.zeros_like(w) for w in whole]
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivatives
            first = torch.autograd.grad(loss(model, batch), whole, create_graph=True, materialize_grads=True)
            along = sum((a * b).sum() for a, b in zip(first, g, strict=True))
            _add(total, torch.autograd.grad(along, whole, materialize_grads=True))
    return dict(zip(start, total, strict=True))


def synflow(pruned: Pruned, start: Matrices) -> Matrices:
    """1 for the entries that stay, and 0 for the others."""
    size, n = {name: w.abs() for name, w in start.items()}, sum(w.numel() for w in start.values())
    kept = {name: torch.ones_like(w) for name, w in start.items()}
    for i in range(1, ROUNDS + 1):
        whole = _compute_with(pruned, {name: size[name] * kept[name] for name in size})
        flow = sum(_flow(*_map(part), pruned.values) for part in pruned.holders)
        gradients = torch.autograd.grad(flow, whole, materialize_grads=True)
        scores = torch.cat([(g * w.detach()).flatten() for g, w in zip(gradients, whole, strict=True)])
        if not scores.any():
            return {name: torch.zeros_like(w) for name, w in start.items()}
        k = max(1, round(pruned.method.keep ** (i / ROUNDS) * n))
        chosen = torch.zeros_like(scores).index_fill_(0, scores.topk(k, sorted=False).indices, 1)
        pieces = chosen.split([w.numel() for w in start.values()])
        kept = {name: piece.view_as(w) for (name, w), piece in zip(start.items(), pieces, strict=True)}
    return kept


def _map(part: Part) -> tuple[nn.Module, int] | None:
    """What a part computes, and the width of what it reads; None if it is no map by itself."""
    if isinstance(part, SublayerPart):
        return part.module, part.sublayer.width
    plain = isinstance(part, DeltaPart) and not isinstance(part, ChoosingPart) and part.delta.additive
    return (part.delta, part.site.shape[1]) if plain else None


def _flow(module: nn.Module, width: int, like: torch.Tensor) -> torch.Tensor:
    weights = {name: p.detach().abs() for name, p in module.named_parameters()}
    return functional_call(module, weights, (like.new_ones(1, width),)).sum()


def _compute_with(pruned: Pruned, matrices: Matrices) -> list[torch.Tensor]:
    """Let the parts compute with these matrices, whole ones, and get gradients for them."""
    pruned.whole = {name: w.detach().clone().requires_grad_() for name, w in matrices.items()}
    return [*pruned.whole.values()]


def _add(total: list[torch.Tensor], gradients: Iterable[torch.Tensor]) -> None:
    for sum_, g in zip(total, gradients, strict=True):
        sum_ += g.detach()


def _writes(method: Method) -> bool:
    """Whether it changes by itself what it has added, while it trains or behind."""
    if isinstance(method, Delegate | Sum) or (isinstance(method, PrefixTuning) and method.mlp is None):
        return False
    phases = ("prepare", "after_step", "finish")
    return any(getattr(type(method), phase) is not getattr(Method, phase) for phase in phases)
