"""LST, Ladder Side-Tuning - a small transformer beside the frozen one.  Sung et al. 2022, arXiv:2206.06522.

    s = D_0 e                                       e (B, T, d): what the first block gets
    s = block_l(mu_l s + (1 - mu_l) D_l h_l)        for each kept layer l;  mu_l = sigmoid(alpha_l / T)
    final state = U norm(s)                         U: (d, d / rho)

Side blocks are the backbone's own, ``reduction`` = rho times narrower, with as many heads.  An
encoder-decoder has a ladder for each stack; the decoder's attends to the encoder's, and only it has a U.  The
norm is there where the backbone has one behind its last block.  Every stack has an alpha for each of its
layers, used or not, as in the authors' code.

count = for each stack the blocks, (n + 1) (d w + w) for the D with their biases, w = d / rho, L for the
alphas, and the norm; and once (w d + d) for U.

No gradient passes the backbone, so what is kept for it is the side network's: about 1 / rho of the backbone's
numbers, and h_l of each kept layer, which the gradient of D_l needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guidelib.additive.other import narrow
from guidelib.core.anatomy import Anatomy, Body, Layers, Site, sites_in
from guidelib.core.batches import Batch, loss, singles
from guidelib.core.method import Attached, Method, expect, is_number, is_whole
from guidelib.core.points.part import Part, expect_there
from guidelib.core.points.passes import noted
from guidelib.core.points.side import OPEN, Again, SideNetwork, SidePart, Trail
from guidelib.core.points.weight_delta import added_dtype

INITS = ("magnitude", "fisher", "random")
EXAMPLES = 64  # that the Fisher information is estimated from


@dataclass(frozen=True)
class LST(Method):
    """A side network with ``reduction`` times narrower blocks.

    layers: which layers have a side block (negative numbers count from the top); None leaves out every
    fourth, counted from the last, which is the paper's choice for T5-base.  init: what side blocks start
    from.  "magnitude" prunes the backbone's weights by their size, "fisher" by the mean square of their
    gradients on a few examples before training, which once takes the memory of full fine-tuning.  "random"
    prunes nothing; D and U are random in any case.  temperature: T.
    """

    reduction: int = 8
    layers: Layers = None
    init: str = "magnitude"
    temperature: float = 0.1

    def __post_init__(self):
        expect(is_whole(self.reduction), "reduction", self.reduction, "a whole number of at least 1")
        layers = (self.layers,) if isinstance(self.layers, int) else self.layers
        if layers is not None:
            right = isinstance(layers, Iterable) and not isinstance(layers, str)
            expect(right, "layers", layers, "None, a whole number or several of them")
            object.__setattr__(self, "layers", tuple(layers))
        expect(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")
        number = is_number(self.temperature) and self.temperature > 0
        expect(number, "temperature", self.temperature, "a positive number")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        bodies, kept = Anatomy(anatomy.model).bodies(), self.kept(anatomy)
        for stack, body in bodies.items():
            expect(bool(kept), "layers", "none with a side block", "others than those that are left out")
            expect(stack in kept, "stack", [*kept], "None: both stacks need a side network")
            crossing = any("cross." in site.role for site in sites_in(body.blocks[0], body.names))
            fits = not crossing or "encoder" in bodies and stack == "decoder"
            expect(fits, "model", f"a {stack} that attends to another model", "one with its own encoder")
            narrow.expect_divisible(body, self.reduction)
        ladders = {stack: Ladder(self, body, kept[stack]) for stack, body in bodies.items()}
        part = SidePart(self, anatomy, ladders)
        if self.init != "random":
            self._prune(bodies, ladders, narrow.magnitude)
        return [part]

    def kept(self, anatomy: Anatomy) -> dict[str, list[int]]:
        """The layers with a side block, by stack."""
        kept: dict[str, list[int]] = {}
        for stack, layer, _ in anatomy.restrict(self.layers).blocks():
            if self.layers is not None or (anatomy.depth(stack) - 1 - layer) % 4 != 3:
                kept.setdefault(stack, []).append(layer)
        return kept

    def prepare(self, attachment: Attached, batches: Iterable[Batch]) -> None:
        """Start from what the Fisher information of the backbone's weights lets stand.

        Of a batch without labels the sum of the first output stands in for the loss.
        """
        (part,) = attachment.parts_of(self)
        bodies, ladders = Anatomy(attachment.model).bodies(), part.networks
        untouched = not any(ladder.alpha.any() for ladder in ladders.values())  # as they are at the start
        if self.init == "fisher" and untouched:
            expect_there(_weights(bodies, ladders))
            others = [each for each in attachment.parts if each is not part]
            try:
                for each in others:  # of weights that stand in four bits, those of the base count
                    each.unplug()
                scores = _fisher(attachment.model, bodies, ladders, batches)
            finally:
                for each in others:
                    each.unplug()  # or it could be plugged in twice
                    each.plug()
            self._prune(bodies, ladders, lambda site: site.view(scores[site.parameter]))

    def _prune(self, bodies: Mapping[str, Body], ladders: Any, score: narrow.Score) -> None:
        layers = {body: ladders[stack].layers for stack, body in bodies.items()}
        stream = narrow.stream(layers, self.reduction, score)
        for stack, body in bodies.items():
            for layer, block in zip(ladders[stack].layers, ladders[stack].blocks, strict=True):
                narrow.prune(block, body, layer, self.reduction, score, stream)
            narrow.prune_norm(ladders[stack].norm, body, stream)


class Ladder(SideNetwork):
    """The side network of one stack."""

    def __init__(self, method: LST, body: Body, layers: list[int]):
        super().__init__()
        like = body.like
        d, made = narrow.sizes(body)["d"], {"device": like.device, "dtype": added_dtype(like)}
        w, n = d // method.reduction, len(layers)
        self.layers, self.narrow, self.temperature = tuple(layers), method.reduction, method.temperature
        self.enter = _linear(d, w, made)
        self.down = nn.ModuleList(_linear(d, w, made) for _ in range(n))
        self.alpha = nn.Parameter(torch.zeros(len(body.blocks), **made))
        self.blocks = nn.ModuleList(
            narrow.narrow_block(body, layer, method.reduction, first=i == 0) for i, layer in enumerate(layers)
        )
        self.norm = narrow.narrow_norm(body, method.reduction)
        self.up = _linear(w, d, made) if body.follower is None else nn.Identity()

    def forward(self, trail: Trail) -> torch.Tensor:
        again = Again(trail, self.narrow)
        s = self.enter(trail.entered)
        for layer, down, block in zip(self.layers, self.down, self.blocks, strict=True):
            mu = torch.sigmoid(self.alpha[layer] / self.temperature)
            s = again(block, layer, mu * s + (1 - mu) * down(trail.states[layer]))
        return self.up(self.norm(s))


def _linear(d_in: int, d_out: int, made: dict[str, Any]) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, **made)
    nn.init.normal_(linear.weight, std=d_in**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


def _sites(body: Body, layer: int) -> Iterable[Site]:
    return sites_in(body.blocks[layer], body.names)


def _weights(bodies: Mapping[str, Body], ladders: Any) -> list[nn.Parameter]:
    """Those of the backbone that the side blocks start from."""
    sites = (s for stack, body in bodies.items() for i in ladders[stack].layers for s in _sites(body, i))
    return list(dict.fromkeys(site.parameter for site in sites))


def _fisher(model, bodies, ladders, batches) -> dict[nn.Parameter, torch.Tensor]:
    """The mean square of each weight's gradient, over single examples, in the backbone as it is alone."""
    weights = _weights(bodies, ladders)
    total = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for example in itertools.islice(singles(batches, model.device), EXAMPLES):
            with noted({OPEN: True}):
                value = loss(model, example)
            for weight, gradient in zip(weights, torch.autograd.grad(value, weights), strict=True):
                total[weight] += gradient.float().square()
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return total
