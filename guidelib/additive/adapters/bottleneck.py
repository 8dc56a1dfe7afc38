"""Bottleneck adapters - a small network at the end of a sub-layer, or beside it.

    Adapter          h <- h + W_up phi(W_down h + b_down) + b_up
    PfeifferAdapter  the same, behind the feed-forward network only
    ParallelAdapter  h <- h + s (W_up phi(W_down x + b_down) + b_up)

Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2021, arXiv:2005.00247, section 3; He et
al. 2022, arXiv:2110.04366, section 4.

x (..., d) is the sub-layer's input, h (..., d) its output behind the residual dropout and before the
residual sum; W_down (r, d), W_up (d, r).  On post-norm models x is the output of the norm before, on pre-norm
models it is the residual stream itself, before the norm.

count = 2 d r + r + d per adapter: two per block for Houlsby (none behind cross-attention, as in the T5
ports), one for the others.  Nothing can be merged, since phi is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.additive.adapters.linear import Dense, Linears
from guidelib.core.anatomy import Anatomy, Sublayer, Targets
from guidelib.core.method import expect, is_number, is_whole
from guidelib.core.points.sublayer import SublayerHook
from guidelib.core.points.weight_delta import BranchCost

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,  # also known as swish
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class Adapter(SublayerHook):
    """Houlsby's adapter: behind attention and behind the feed-forward network, norms trained with it.

    r: width of the bottleneck.  activation: gelu (as in the authors' code), gelu_new, relu, silu, identity.
    sublayers: where, see `Anatomy.sublayers`.  norms: whether the norms are trained, too: all of the model's,
    or with ``on`` those of the chosen blocks.  dropout: behind the activation, while training.  point: "after
    dropout" or "before dropout", the block's own.  linear: what the two maps are made of.
    """

    r: int = 64
    activation: str = "gelu"
    sublayers: Targets = ("self", "ffn")
    norms: bool = True
    dropout: float = 0.0
    point: str = "after dropout"
    linear: Linears = Dense()

    def __post_init__(self):
        super().__post_init__()
        expect(is_whole(self.r), "r", self.r, "a whole number of at least 1")
        known = isinstance(self.activation, str) and self.activation in ACTIVATIONS
        expect(known, "activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")
        expect(isinstance(self.norms, bool), "norms", self.norms, "True or False")
        number = is_number(self.dropout)
        expect(number and 0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        expect(isinstance(self.linear, Linears), "linear", self.linear, "a value such as Dense()")

    def select(self, anatomy: Anatomy) -> set[str]:
        return anatomy.norms().keys() & anatomy.parameters().keys() if self.norms else set()

    def build_all(self, sublayers: list[Sublayer], saved: Mapping[str, torch.Tensor]) -> list[nn.Module]:
        return [self.bottleneck(*pair) for pair in self.linear.pairs(sublayers, self.r)]

    def bottleneck(self, down: nn.Module, up: nn.Module) -> Bottleneck:
        return Bottleneck(down, up, self.activation, self.dropout)


@dataclass(frozen=True)
class PfeifferAdapter(Adapter):
    """One adapter per block, behind the feed-forward network; the norms stay frozen.

    original_norm: read norm(x + h), the block's own norm, instead of h, as AdapterHub does; the block applies
    the same norm again afterwards.  Only on post-norm models.  Without it: the plain form, our choice.
    """

    r: int = 48  # the width of BERT-base, 768, divided by 16
    activation: str = "relu"
    sublayers: Targets = ("ffn",)
    norms: bool = False
    linear: Linears = Dense("bert")
    original_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        expect(isinstance(self.original_norm, bool), "original_norm", self.original_norm, "True or False")

    @property
    def reads(self) -> str:
        return "normed" if self.original_norm else "output"


@dataclass(frozen=True)
class ParallelAdapter(Adapter):
    """An adapter beside the feed-forward network, which adds exactly nothing at the start.

    scale: the factor s, a number, or "learned" for a trained one that starts at 1.  With scale=1 it is the
    paper's parallel adapter, with 4 its scaled one.
    """

    reads: ClassVar[str] = "input"

    r: int = 512
    activation: str = "relu"
    sublayers: Targets = ("ffn",)
    norms: bool = False
    dropout: float = 0.1
    linear: Linears = Dense("zero up")
    scale: float | str = 4.0

    def __post_init__(self):
        super().__post_init__()
        number = is_number(self.scale)
        expect(number or self.scale == "learned", "scale", self.scale, 'a finite number or "learned"')

    def bottleneck(self, down: nn.Module, up: nn.Module) -> Bottleneck:
        return Bottleneck(down, up, self.activation, self.dropout, self.scale)


class Bottleneck(nn.Module):
    """x (..., d) -> scale * up(phi(down(x))) (..., d): what an adapter adds."""

    def __init__(
        self, down: nn.Module, up: nn.Module, activation: str, dropout: float = 0.0, scale: float | str = 1.0
    ):
        super().__init__()
        self.down, self.up, self.activation, self.dropout = down, up, activation, dropout
        like = next(up.parameters())
        learned = scale == "learned"
        self.scale = nn.Parameter(torch.ones((), device=like.device, dtype=like.dtype)) if learned else scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = ACTIVATIONS[self.activation](self.down(x))  # (..., r)
        inner = F.dropout(inner, self.dropout, self.training) if self.dropout else inner
        change = self.up(inner)
        return change if isinstance(self.scale, float | int) and self.scale == 1 else self.scale * change

    def cost(self) -> BranchCost:
        """Raises NotImplementedError for maps that are not dense."""
        # of experts, one acts at a time
        down, up = (m[0] if isinstance(m, nn.ModuleList) else m for m in (self.down, self.up))
        if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
            raise NotImplementedError(f"no closed form for {type(down).__name__}")
        (r, d_in), d_out = down.weight.shape, up.weight.shape[0]
        # relu keeps its output, which the second map needs anyway; the others keep their input besides
        kept = r if self.activation in ("relu", "identity") else 2 * r
        return BranchCost(
            keeps_input=True,  # for the gradient of W_down
            kept=kept + (d_out if isinstance(self.scale, nn.Parameter) else 0),
            forward=2 * r * (d_in + d_out),
            backward=2 * r * (d_in + 2 * d_out),  # of W_down; of W_up and of its input
            backward_input=2 * r * d_in,
        )
