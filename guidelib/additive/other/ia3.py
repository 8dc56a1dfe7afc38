"""(IA)^3 - three vectors a block that scale keys, values and the inside of the feed-forward layer.  Liu et
al. 2022, arXiv:2205.05638, section 3.3.

    softmax(Q (l_k * K)^T / sqrt(d_h)) (l_v * V),    W_2 (l_ff * act(W_1 x))        * element-wise

All vectors start at 1, so that the model is what it was.  count = the widths of k and v of every attention,
cross-attention included, and the inner width of every feed-forward layer.  They merge exactly, all three: l_k
and l_v into the rows of their weights and into their biases, l_ff into the columns of W_2, whose bias stays.
(The survey says that l_ff cannot be merged.)  In a gated feed-forward layer l_ff scales the product of both
branches, which is to scale the linear branch, as the authors' code does.

With several ``tasks`` each example of a batch may have its own vectors.  Weight decay would pull them to 0
and not to 1: train without it.

Our reading: keys are scaled where they leave their projection.  With rotary embeddings, which turn them
afterwards, that is not the same as scaling them there, and it is what can be merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, Site, Targets
from guidelib.core.method import Method, expect, is_whole
from guidelib.core.points.choice import Choosing
from guidelib.core.points.part import Part
from guidelib.core.points.weight_delta import BranchCost, ChoosingPart, Delta, added_dtype


@dataclass(frozen=True)
class IA3(Method):
    """A vector for the output of each of ``targets``, and one for the input of each of ``inputs`` (roles, see
    anatomy.py); one of the two may be empty.

    tasks: how many sets of vectors there are, of which ``using`` chooses one for each example; the first acts
    by itself.
    """

    targets: Targets = ("k", "v")
    inputs: Targets = ("ffn.out",)
    tasks: int = 1

    def __post_init__(self):
        for name in ("targets", "inputs"):
            self.several(name)
        expect(bool(self.targets or self.inputs), "targets", self.targets, "a role, where inputs has none")
        expect(is_whole(self.tasks), "tasks", self.tasks, "a whole number of at least 1")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        blocks = {(stack, layer): block for stack, layer, block in anatomy.blocks()}
        kinds = ((Outputs, self.targets), (Inputs, self.inputs))
        places = [(kind, site) for kind, names in kinds if names for site in anatomy.linears(names)]
        return [
            ChoosingPart(
                *(self, site, kind(site, self.tasks)),
                blocks.pop((site.stack, site.layer), None) if self.tasks > 1 else None,
            )
            for kind, site in places
        ]


class Vectors(Delta, Choosing):
    """The vectors of one weight, (tasks, n), in its type (32 bits at least)."""

    additive, last = False, True

    def __init__(self, site: Site, tasks: int, n: int):
        super().__init__()
        like = site.like
        self.l = nn.Parameter(torch.ones(tasks, n, device=like.device, dtype=added_dtype(like)))
        self.tasks = tasks

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """l * x, (..., n), each row of a batch with its own vector if it has chosen one."""
        chosen = self.l[self.index(len(x), self.l.device)]
        if chosen.dim() > 1:
            chosen = chosen.view(len(x), *(1 for _ in x.shape[1:-1]), -1)
        return (x * chosen).to(x.dtype)

    def one(self) -> torch.Tensor:
        """The one vector in use, (n,)."""
        ids, _ = self.choice
        expect(isinstance(ids, int), "ids", ids, "one set of vectors where a single weight is asked for")
        return self.l[ids]


class Outputs(Vectors):
    """W' = diag(l) W, b' = l * b."""

    def __init__(self, site: Site, tasks: int):
        super().__init__(site, tasks, site.shape[0])
        self.moves_bias = not site.fault and site.bias is not None

    def effective(self, weight, bias):
        vector = self.one()
        bias = bias if bias is None else (vector * bias).to(bias.dtype)
        return (vector[:, None] * weight).to(weight.dtype), bias

    def adjust(self, x, y, weight, bias):
        return self.scaled(y)

    def cost(self) -> BranchCost:
        """Of one vector for the whole batch, whose gradient needs the layer's output."""
        n = self.l.shape[1]
        return BranchCost(keeps_input=False, kept=n, forward=0, backward=0, backward_input=0)


class Inputs(Vectors):
    """W' = W diag(l), b' = b."""

    enters = True

    def __init__(self, site: Site, tasks: int):
        alone = site.rows is None
        expect(
            alone, "inputs", site.name, "a map with an input of its own; this one is part of a fused layer"
        )
        super().__init__(site, tasks, site.shape[1])
        self.product = 2 * math.prod(site.shape)

    def effective(self, weight, bias):
        return (weight * self.one()).to(weight.dtype), bias

    def enter(self, x):
        return self.scaled(x)

    def cost(self) -> BranchCost:
        """Of one vector for the whole batch.  Its gradient needs the layer's input, and comes by way of the
        layer's own product whether or not anything below is trained."""
        return BranchCost(
            keeps_input=True, kept=0, forward=0, backward=self.product, backward_input=-self.product
        )
