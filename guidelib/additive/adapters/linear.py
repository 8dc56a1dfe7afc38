"""What the two maps of an adapter are made of.

Every adapter has a field ``linear=``: a value that makes the maps of all adapters of a method at once, so
that they may share parameters.  `Dense` makes ordinary ones.  Another factory is one more class like it, and
every adapter can be built with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Sublayer
from guidelib.core.method import Spec, expect
from guidelib.core.points.weight_delta import added_dtype
from guidelib.core.values import has_values

Pair = tuple[nn.Module, nn.Module]
INITS = ("houlsby", "bert", "zero up")


@dataclass(frozen=True)
class Linears(Spec):
    """Base of the values for ``linear=``: what an adapter's maps are made of."""

    def pairs(self, sublayers: list[Sublayer], r: int) -> list[Pair]:
        """For each sub-layer of width d a map d -> r and a map r -> d, with biases, where the model is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dense(Linears):
    """Ordinary matrices; 2 d r + r + d parameters per adapter.

    init: "houlsby", truncated normal with standard deviation 0.001 (Houlsby's code); "bert", normal with
    0.02 (AdapterHub's); "zero up", uniform within 1 / sqrt(d) for the first and zero for the second, so that
    the adapter adds exactly nothing at the start (He's code).  Biases are zero.
    """

    init: str = "houlsby"

    def __post_init__(self):
        expect(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")

    def pairs(self, sublayers: list[Sublayer], r: int) -> list[Pair]:
        return [self.pair(sublayer, r) for sublayer in sublayers]

    def pair(self, sublayer: Sublayer, r: int) -> Pair:
        weight, d = sublayer.out.like, sublayer.width
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        with torch.device("meta"):  # no values yet, so that torch's own do not use up random numbers
            down, up = nn.Linear(d, r), nn.Linear(r, d)
        for layer in (down, up):
            layer.weight = nn.Parameter(torch.empty(layer.weight.shape, **like))
            layer.bias = nn.Parameter(torch.zeros(layer.bias.shape, **like))
            if not has_values(layer.weight):  # torch's truncated normal looks at what it drew
                continue
            if self.init == "houlsby":  # cut off at two standard deviations, as TensorFlow does
                nn.init.trunc_normal_(layer.weight, std=1e-3, a=-2e-3, b=2e-3)
            elif self.init == "bert":
                nn.init.normal_(layer.weight, std=0.02)
            elif layer is down:
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            else:
                nn.init.zeros_(layer.weight)
        return down, up
