"""What a method adds at one place of the model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

import torch
from torch import nn

from guidelib.core.method import Method, expect
from guidelib.core.points.passes import Detour, framed

Place = tuple[int, tuple[int, int] | None]  # id of a parameter, and which of its rows; None for all


class Part(nn.Module):
    """Added parameters, and how they take effect.

    A subclass fills in ``plug`` (start to act), by ``hook`` and ``around``.  One whose effect can be written
    into the base weights also fills in ``merge`` and sets ``mergeable``; what cannot be merged costs
    something at inference.  A forward pass leaves nothing on a part: see passes.py.
    """

    name: str  # unique within an attachment; without dots
    method: Method  # the one that made it
    mergeable: bool = False
    why_not: str = "it computes something that no base weight can"
    first: bool = False  # whether nothing may stand before it at its places
    reads: bool = False  # whether its effect depends on the weight that it finds
    last: bool = False  # whether it stands behind all others, wherever it is in a sum
    inside: bool = False  # whether it acts within the layer, and so before all that act on the layer's output
    serves: bool = False  # whether it acts through other parts alone
    closed: tuple[nn.Module, ...] = ()  # through which it lets no gradient, so that nothing trains there

    def __init__(self):
        super().__init__()
        self.gating: nn.Module | None = None  # what multiplies its effect: see gate.py
        self._plugged: dict[nn.Module, Detour | None] = {}  # a plain dict does not make them children

    def plug(self) -> None:
        raise NotImplementedError

    def hook(
        self, module: nn.Module, function: Callable, *, before: bool = False, first: bool = False
    ) -> None:
        """Call ``function``, a method of this part, behind the forward of ``module`` or before it; ``first``,
        before those of the parts that are plugged in already."""
        self._plugged.setdefault(module, None)
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        register(function, prepend=first)

    def around(self, module: nn.Module, function: Callable) -> None:
        """Put ``function``, a method of this part, around the forward of ``module``; a deep copy binds it to
        the copied part."""
        self._plugged[module] = detour = Detour.of(module) or Detour(module)
        detour.add(function)

    def frame(self, call, *args, **kwargs):
        """To be put around a block in which this part makes or reads notes."""
        return framed(call, *args, **kwargs)

    @property
    def plugged(self) -> Iterable[nn.Module]:
        """The modules that it is plugged into."""
        return self._plugged.keys()

    def acts_in(self, modules: Container[nn.Module]) -> bool:
        """Whether it is plugged into one of them."""
        return any(module in modules for module in self._plugged)

    def unplug(self) -> None:
        """Stop to act, and leave no trace, from wherever ``plug`` has got to."""
        for module, detour in self._plugged.items():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                    del hooks[key]
            if detour is not None:
                detour.remove(self)

    def stand_in(self, module: nn.Module, layer: nn.Module) -> nn.Module:
        """What stands for ``module``, of which this part finds ``layer``, to those that come after it."""
        return layer

    def merge(self, keep: Callable[[nn.Parameter], None]) -> None:
        """Write the effect into the base weights; ``keep`` is called with each of them before."""
        raise NotImplementedError

    def restore(self) -> None:
        """Called when the method is taken away: give back what this part has taken from the base."""

    @property
    def place(self) -> str:
        """Where it acts, for a reader."""
        return self.name

    @property
    def places(self) -> Mapping[Place, int | torch.Tensor]:
        """What it changes, and how many entries of the effective model it can make differ from the base
        there, or which ones of a whole parameter.  What is also trained in place is counted there."""
        return {where(parameter): parameter.numel() for parameter in self.parameters()}

    @property
    def acts_on(self) -> Iterable[Place]:
        """The maps whose output it changes besides, where that depends on who stands there before it."""
        return ()


def where(parameter: nn.Parameter, rows: slice | None = None) -> Place:
    """The place of ``parameter``, or of one map's rows of a fused one."""
    return id(parameter), None if rows is None else (rows.start, rows.stop)


def map_of(layer: nn.Module, rows: slice | None = None) -> Place:
    """The place of the map that ``layer`` is; one that is not plain may hold no weight."""
    return where(getattr(layer, "weight", layer), rows)


def standing(module: nn.Module) -> nn.Module:
    """What stands for ``module`` to one that reads its parameters behind its forward."""
    layer, detour = module, Detour.of(module)
    if detour is not None:
        for function in detour.around:
            layer = function.__self__.stand_in(module, layer)
    return layer


def copied(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of what stands in ``parameter``, for ``put``."""
    return parameter.detach() if hollow(parameter) else parameter.detach().clone()


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write ``value`` into ``parameter``, in one step; where that was resized meanwhile, into the rows that
    both have."""
    if hollow(parameter) or hollow(value):
        parameter.data = value.to(parameter.dtype)
    elif parameter.shape == value.shape:
        parameter.copy_(value)
    else:
        rows = min(len(parameter), len(value))
        parameter[:rows].copy_(value[:rows])


def hollow(tensor: torch.Tensor) -> bool:
    """Whether it is a stand-in without memory (see ``nf4.release``), into which nothing can be written."""
    return tensor.numel() > 1 and not any(tensor.stride())


class Exact(nn.Module):
    """Its buffers keep their type when the model is cast: other values follow from them."""

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


def expect_there(weights: Iterable[torch.Tensor]) -> None:
    """Raises ValueError if one of them is hollow."""
    there = not any(map(hollow, weights))
    expect(there, "model", "one whose weights NF4 has released", "one that has them; release() after fit")
