"""Intrinsic SAID - the whole model moves in a random subspace.  Aghajanyan, Zettlemoyer and Gupta 2021,
arXiv:2012.13255.

    theta'_i = theta_i + lambda_i P_i theta_d        theta_d: (d - m,) zero  ->  theta' = theta at the start

theta_i is one of m parameter tensors with D_i entries, P_i (D_i, d - m) is random and fixed, and the scale
lambda_i starts at 1.  Without scales it is DID (Li et al. 2018, arXiv:1804.08838), with d numbers in theta_d.
Every parameter of the base changes: norms, biases, embeddings.  A tied one has one projection.  The task head
starts from random weights and is trained in place.

count = d.  Stored: d numbers; the projections follow from the seed.  Merges exactly.

Few numbers, and no little memory: theta', its gradient, and Fastfood's: for each tensor two numbers for each
weight, rounded up to a power of two that is at least d, and d signs.

Our reading: a scale for each tensor.  If d is larger than a tensor, its projection gets d columns all the
same; a known implementation cuts theta_d off there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Method, expect, expect_seed, is_whole
from guidelib.core.points.part import Exact, Part
from guidelib.core.points.weight_delta import added_dtype
from guidelib.core.points.weight_space import WeightSpacePart
from guidelib.core.values import autocasts
from guidelib.reparametrization.fastfood import Fastfood

DENSE_LIMIT = 10**8  # numbers: 400 MB


@dataclass(frozen=True)
class IntrinsicSAID(Method):
    """All of the base trained through ``d`` numbers.

    d: how many are trained, the scales included.  scales: whether each tensor has one; without them it is
    DID. projection: "fastfood", or "dense" for a Gaussian matrix, which only toys have room for.  seed: fixes
    the projections.
    """

    d: int = 20_000
    scales: bool = True
    projection: str = "fastfood"
    seed: int = 0

    def __post_init__(self):
        expect(is_whole(self.d), "d", self.d, "a whole number of at least 1")
        expect(isinstance(self.scales, bool), "scales", self.scales, "True or False")
        known = self.projection in ("fastfood", "dense")
        expect(known, "projection", self.projection, "'fastfood' or 'dense'")
        expect_seed(self.seed)

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        head = anatomy.head()
        chosen = {name: p for name, p in anatomy.parameters().items() if name not in head}
        size, m = sum(p.numel() for p in chosen.values()), len(chosen)
        if self.scales:
            expect(self.d > m, "d", self.d, f"more than {m}, since each of the {m} tensors has a scale")
        expect(self.d <= size, "d", self.d, f"at most {size}, the number of parameters that it moves")
        if self.projection == "dense":
            fits = self.d * size <= DENSE_LIMIT
            expect(
                fits,
                "projection",
                self.projection,
                f"'fastfood' here: {size} x {self.d} numbers are more than {DENSE_LIMIT}",
            )
        return [Subspace(self, anatomy.model, chosen)]


class Subspace(WeightSpacePart):
    """theta_d, the scales, and a projection for each tensor."""

    def __init__(self, method: IntrinsicSAID, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        super().__init__(method, model, parameters)
        first = next(iter(parameters.values()))
        like = {"device": first.device, "dtype": added_dtype(first)}
        d = method.d - len(parameters) if method.scales else method.d
        self.theta = nn.Parameter(torch.zeros(d, **like))
        self.scales = nn.Parameter(torch.ones(len(parameters), **like)) if method.scales else None
        generator = torch.Generator().manual_seed(method.seed)
        kind = Fastfood if method.projection == "fastfood" else Dense
        self.projections = nn.ModuleList(kind(p.numel(), d, generator, p.device) for p in parameters.values())
        self._index = {name: i for i, name in enumerate(parameters)}

    def effective(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        i = self._index[name]
        # lambda (P theta) = P (lambda theta), and so autograd keeps d numbers for lambda instead of D_i
        moved = self.theta if self.scales is None else self.scales[i] * self.theta
        # sums of n terms do not fit 16 bits
        moved = moved.to(torch.promote_types(moved.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False) if autocasts(weight) else nullcontext():
            moved = self.projections[i](moved)
        if moved.numel() != weight.numel():
            raise ValueError(
                f"model: {name} was resized to {tuple(weight.shape)} after {self.name} was attached; "
                "detach() and attach again"
            )
        return weight + moved.view(weight.shape)


class Dense(Exact):
    """P (size, d) with Gaussian entries of variance 1 / size; its columns have length 1 on average."""

    def __init__(self, size: int, d: int, generator: torch.Generator, device: torch.device):
        super().__init__()
        draw = {"generator": generator, "device": "meta" if device.type == "meta" else "cpu"}
        P = torch.randn(size, d, dtype=torch.float32, **draw).to(device)
        self.register_buffer("P", P / size**0.5, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.P.to(x.dtype) @ x
