"""KronA - an update that is a Kronecker product.  Edalati et al. 2022, arXiv:2212.10650.

    W' = W + s A (x) B        A: (o1, i1) random,  B: (o2, i2) zero  ->  W' = W at the start
                              o1 o2 = d_out,  i1 i2 = d_in

count = o1 i1 + o2 i2 per target, at least 2 sqrt(d_in d_out): as few as LoRA's at r = 1, but
rank(A (x) B) = rank(A) rank(B).  Merges exactly.  The paper's targets are the query and value projections.

The product is never formed.  With x laid out row by row as X (i1, i2), (A (x) B) x is A X B^T (o1, o2), laid
out in the same way.

There is no public code.  Our reading: which factor starts at zero, the uniform start of the other one, and
the shapes: of those with the fewest numbers the ones with the highest rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from guidelib.core.anatomy import Site, Targets
from guidelib.core.method import expect, is_number, is_whole
from guidelib.core.points.weight_delta import BranchCost, Delta, WeightDelta, added_dtype


@dataclass(frozen=True)
class KronA(WeightDelta):
    """A Kronecker product beside every target, scaled by ``s``.

    s: scale; the paper tunes it.  shape: (o1, i1) of the first factor, which have to divide (d_out, d_in) of
    every target; None takes near-square factors of each weight.  targets: roles (see anatomy.py).
    """

    s: float = 1.0
    shape: tuple[int, int] | None = None
    targets: Targets = ("q", "v")

    def __post_init__(self):
        super().__post_init__()
        expect(is_number(self.s), "s", self.s, "a finite number")
        if self.shape is not None:
            right = isinstance(self.shape, tuple | list) and len(self.shape) == 2
            right = right and all(is_whole(side) for side in self.shape)
            expect(right, "shape", self.shape, "None or two whole numbers of at least 1")
            object.__setattr__(self, "shape", tuple(self.shape))

    def build(self, site: Site) -> Kronecker:
        return self.product(site.like, site.name)

    def product(self, weight: torch.Tensor, name: str) -> Kronecker:
        """For a weight (d_out, d_in) that messages call ``name``."""
        d_out, d_in = weight.shape
        o1, i1 = near_square(d_out, d_in) if self.shape is None else self.shape
        accepted = f"divisors of {(d_out, d_in)}, the shape of {name}"
        expect(d_out % o1 == 0 and d_in % i1 == 0, "shape", self.shape, accepted)
        return Kronecker(weight, o1, i1, self.s)


@cache
def near_square(d_out: int, d_in: int) -> tuple[int, int]:
    """(o1, i1) of the cheapest pair of factors of (d_out, d_in); where several cost the same, the one whose
    product can have the highest rank, and of these the tallest first factor."""

    def merit(shape: tuple[int, int]) -> tuple[int, int, int]:
        o1, i1 = shape
        o2, i2 = d_out // o1, d_in // i1
        return -(o1 * i1 + o2 * i2), min(o1, i1) * min(o2, i2), o1

    return max(((o1, i1) for o1 in _divisors(d_out) for i1 in _divisors(d_in)), key=merit)


def _divisors(n: int) -> Iterator[int]:
    return (k for k in range(1, n + 1) if n % k == 0)


class Kronecker(Delta):
    """s A (x) B for one weight (d_out, d_in), on its device and in its type (32 bits at least)."""

    def __init__(self, weight: torch.Tensor, o1: int, i1: int, scale: float = 1.0):
        super().__init__()
        d_out, d_in = weight.shape
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        self.A = nn.Parameter(torch.empty(o1, i1, **like))
        self.B = nn.Parameter(torch.zeros(d_out // o1, d_in // i1, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # uniform within 1 / sqrt(i1)
        self.scale = scale

    def delta(self) -> torch.Tensor:
        return self.scale * torch.kron(self.A, self.B)  # (d_out, d_in)

    @property
    def right_first(self) -> bool:
        """Whether A (X B^T) takes fewer operations than (A X) B^T."""
        (o1, i1), (o2, i2) = self.A.shape, self.B.shape
        return i1 * o2 * (i2 + o1) <= o1 * i2 * (i1 + o2)

    def cost(self) -> BranchCost:
        first, second = (self.B, self.A) if self.right_first else (self.A, self.B)
        (n, k), (m, rest) = first.shape, second.shape
        inner, outer = 2 * n * k * rest, 2 * m * rest * n  # rest: the side that the first product passes by
        return BranchCost(
            keeps_input=True,
            kept=0,
            forward=inner + outer,
            backward=2 * inner + 2 * outer,  # the first product again, both factors, and what is between
            backward_input=inner,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (Compiled if torch.compiler.is_compiling() else TwoSided).apply
        x = x.unflatten(-1, (self.A.shape[1], self.B.shape[1]))  # (..., i1, i2)
        y = product(x, self.A, self.B) if self.right_first else product(x.mT, self.B, self.A).mT
        return self.scale * y.flatten(-2)  # (..., o1, o2) -> (..., d_out)


class TwoSided(torch.autograd.Function):
    """X (..., i1, i2), A (o1, i1), B (o2, i2) -> A (X B^T), (..., o1, o2).

    X B^T is made again in the backward pass.  Autograd would keep it, i1 o2 numbers per token, which is more
    than the whole of A (x) B once there are many tokens.  Second derivatives, forward mode and torch.func's
    transforms work as for the two products.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, a, b):
        return a @ (x @ b.t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, a, b = ctx.saved_tensors
        shape, tokens = x.shape, x.shape[:-2].numel()
        # autocast does not reach the backward pass, and its 16-bit tensors would meet 32-bit factors
        x, gradient = (t.to(a.dtype).reshape(tokens, *t.shape[-2:]) for t in (x, gradient))
        between = a.t() @ gradient  # of X B^T, (tokens, i1, o2)
        of_a = torch.einsum("top,tip->oi", gradient, x @ b.t())
        of_b = torch.einsum("tip,tik->pk", between, x)
        of_x = (between @ b).reshape(shape) if ctx.needs_input_grad[0] else None
        return of_x, of_a, of_b

    @staticmethod
    def jvp(ctx, along_x, along_a, along_b):
        x, a, b = ctx.saved_tensors
        along = (along_x, a, b), (x, along_a, b), (x, a, along_b)
        return sum(a @ (x @ b.t()) for x, a, b in along if all(t is not None for t in (x, a, b)))


class Compiled(TwoSided):
    """The same for torch.compile, which takes no function with a ``jvp``."""

    jvp = torch.autograd.Function.jvp
