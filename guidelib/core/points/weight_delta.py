"""WeightDelta - a method that replaces a weight W of the backbone by some W'.

There are two views of the same map.  In weight space, ``effective(W, b) -> W', b'`` is the definition: it
is what merging writes.  In activation space, ``adjust(x, y, W, b) -> y'`` is the fast path: it corrects the
frozen layer's output y = W x + b without forming W'.  The tests hold the two equal for every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from guidelib.core.anatomy import Anatomy, Site, fault_of
from guidelib.core.method import Method
from guidelib.core.points.part import Part, Place, map_of, standing, where
from guidelib.core.values import autocasts


@dataclass(frozen=True)
class BranchCost:
    """What a Delta's fast path costs per token, for the closed forms.

    keeps_input: whether autograd keeps the layer's input for it.  kept: numbers kept besides.  forward,
    backward: floating-point operations of its products, the latter without the gradient of the input, which
    costs ``backward_input`` more where something below is trained.  ``_once``: per step, however many tokens.
    kept_input, kept_input_once: numbers kept for the gradient of the input alone.
    """

    keeps_input: bool
    kept: int
    forward: int
    backward: int
    backward_input: int
    kept_input: int = 0
    kept_once: int = 0
    forward_once: int = 0
    backward_once: int = 0
    kept_input_once: int = 0


class Delta(nn.Module):
    """The added parameters of one weight.  An additive update fills in ``delta`` and ``forward`` and is done;
    another one overrides ``effective`` and ``adjust``.

    additive: whether the update is the same whatever W is.  If not, no other update can stand before this one
    at the same weight.  last: whether it acts on what the layer gives, or is given, whatever else acts there;
    then it needs no W, and stands behind all others.  enters: whether it acts on what the layer is given, by
    ``enter``.  moves_bias: whether b' differs from b; a layer without a bias cannot be merged then.
    """

    additive: ClassVar[bool] = True
    last: ClassVar[bool] = False
    enters: ClassVar[bool] = False
    moves_bias: ClassVar[bool] = False

    def delta(self) -> torch.Tensor:
        """The update of the weight, (d_out, d_in)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same update applied to x (..., d_in) -> (..., d_out), never forming ``delta()``."""
        raise NotImplementedError

    def effective(
        self, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (d_out, d_in), b (d_out,) or None -> W', b'."""
        return weight + self.delta(), bias

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's input (..., d_in) -> what it is given instead, so that W enter(x) + b = W' x + b'."""
        raise NotImplementedError

    def cost(self) -> BranchCost:
        """The fast path's cost in training without dropout."""
        raise NotImplementedError

    def adjust(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Input x (..., d_in) and the base layer's output y = W x + b (..., d_out) -> y' = W' x + b'.

        An additive update is not given W and b.

        The added parameters stay in 32 bits beside a 16-bit base, which would round small updates away.
        """
        dtype = computed_dtype(self)
        return y + self(x if autocasts(x) else x.to(dtype)).to(y.dtype)


@dataclass(frozen=True)
class WeightDelta(Method):
    """Base of the methods whose effect is a new weight: they merge, and then cost nothing at inference.

    A subclass has a field ``targets`` and fills in ``build``; one that shares parameters between weights
    overrides ``build_all``.
    """

    def __post_init__(self):
        self.several("targets")

    def build(self, site: Site) -> Delta:
        raise NotImplementedError

    def build_all(self, sites: list[Site]) -> list[Delta]:
        return [self.build(site) for site in sites]

    def parts(self, anatomy: Anatomy, saved: dict[str, torch.Tensor]) -> list[Part]:
        sites = anatomy.linears(self.targets)
        return [
            DeltaPart(self, site, delta) for site, delta in zip(sites, self.build_all(sites), strict=True)
        ]


class DeltaPart(Part):
    """One Delta beside one linear map, as a forward hook: the layer and its ``state_dict`` keys stay what
    they were."""

    why_not = "its layer has no bias that could hold the method's"

    def __init__(self, method: Method, site: Site, delta: Delta):
        super().__init__()
        outside = delta.additive or delta.last
        site.check(adds=outside)
        self.name = f"{type(method).__name__}_{site.name.replace('.', '_')}"
        self.method, self.delta = method, delta
        # in a tuple, so that the backbone's layer is not registered as a child of this module
        self._site = (site,)
        self.reads, self.last = not outside, delta.last
        if site.fault:
            self.why_not = f"{site.name} {site.fault}, which holds no plain weight to write to"

    @property
    def mergeable(self) -> bool:
        gated = self.gating is not None
        return not (gated or self.site.fault or (self.delta.moves_bias and self.site.bias is None))

    @property
    def site(self) -> Site:
        return self._site[0]

    @property
    def place(self) -> str:
        return self.site.name

    @property
    def places(self) -> Mapping[Place, int | torch.Tensor]:
        if self.gating is not None:
            return super().places
        layer, rows = self.site.module, self.site.rows
        trained = getattr(getattr(layer, "weight", layer), "requires_grad", False)
        changed = {map_of(layer, rows): 0 if trained else math.prod(self.site.shape)}
        if getattr(layer, "bias", None) is not None:  # read at least
            moved = self.delta.moves_bias and not layer.bias.requires_grad
            changed[where(layer.bias, rows)] = self.site.bias.numel() if moved else 0
        return changed

    @property
    def acts_on(self) -> tuple[Place, ...]:
        return () if self.gating is None else (map_of(self.site.module, self.site.rows),)

    def plug(self) -> None:
        if self.delta.enters:
            self.hook(self.site.module, self._enter, before=True)
        else:
            self.hook(self.site.module, self._hook)

    def _enter(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (self.delta.enter(args[0]), *args[1:])

    def found(self, layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
        """W (d_out, d_in) and b (d_out,) of ``layer``, which stands for the site's, with their gradients."""
        weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        rows = slice(None) if self.site.rows is None else self.site.rows
        return weight[rows], None if layer.bias is None else layer.bias[rows]

    def _hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x, rows = args[0], self.site.rows
        base = self.found(standing(module)) if self.reads else (None, None)
        if rows is None:
            return self._adjust(x, output, *base)
        # one map of a fused projection: only its own outputs change
        before, own, after = output[..., : rows.start], output[..., rows], output[..., rows.stop :]
        return torch.cat((before, self._adjust(x, own, *base), after), dim=-1)

    def _adjust(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self.gating is None:
            return self.delta.adjust(x, y, weight, bias)
        change = self.delta.adjust(x, y.new_zeros(()).expand_as(y), weight, bias)
        return y + (self.gating(x) * change).to(y.dtype)

    @torch.no_grad()
    def merge(self, keep: Callable[[nn.Parameter], None]) -> None:
        if fault := fault_of(self.site.module):  # since it was attached
            raise ValueError(f"{self.site.name} {fault}, which holds no plain weight to write to")
        layer = self.site.module
        weight, bias = self.delta.effective(self.site.weight, self.site.bias)
        keep(layer.weight)
        self.site.weight.copy_(weight)
        if self.delta.moves_bias:
            keep(layer.bias)
            self.site.bias.copy_(bias)


class ChoosingPart(DeltaPart):
    """A delta of which there are several, chosen for each pass (see ``using``).

    block: its transformer block, for the first part in there: recomputed for its gradient, the block has to
    find the same choice.
    """

    why_not = "each example has its own; choose one for all with using(model, id)"

    def __init__(self, method: Method, site: Site, delta: Delta, block: nn.Module | None):
        super().__init__(method, site, delta)
        self._block = (block,)  # in a tuple, so that it is not registered as a child

    @property
    def mergeable(self) -> bool:
        return super().mergeable and isinstance(self.delta.choice[0], int)

    def plug(self) -> None:
        super().plug()
        self.frame_block()

    def frame_block(self) -> None:
        if self._block[0] is not None:
            self.around(self._block[0], self.frame)


def computed_dtype(module: nn.Module) -> torch.dtype:
    """The type of what a part adds: of its parameters or, where all of them are pruned, of what is left."""
    held = next(module.parameters(), None)
    if held is None:
        held = next(m._pruned[0].values for m in module.modules() if hasattr(m, "_pruned"))
    return held.dtype


def added_dtype(weight: torch.Tensor) -> torch.dtype:
    """The type of parameters added beside ``weight``: its own, but at least 32 bits."""
    return torch.promote_types(weight.dtype, torch.float32)
