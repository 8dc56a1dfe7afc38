"""WeightSpacePart - base parameters that are replaced by functions of themselves while the model runs.

A WeightDelta corrects the output of a linear map.  What acts on any parameter (an embedding, a norm's gain)
or has no fast path is done here by the definition: whenever a layer runs, a twin of it computes, which has
theta' in the place of the parameter theta.  The layer itself keeps its class, its keys and its parameter,
which nothing ever touches but a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from guidelib.core.anatomy import computes, expect_numbers
from guidelib.core.method import Method
from guidelib.core.points.part import Part, Place, put, where
from guidelib.core.points.passes import Call, Detour, stock, twin


class WeightSpacePart(Part):
    """A subclass fills in ``effective``.

    parameters: the base parameters by name, as ``Anatomy.parameters`` gives them.  One that several layers
    share (a tied embedding) is replaced in each of them.
    """

    mergeable = True
    inside = True

    def __init__(self, method: Method, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        expect_numbers(parameters)
        self.name, self.method = type(method).__name__, method
        self.replaced = dict(parameters)
        names = {id(parameter): name for name, parameter in parameters.items()}
        # layer -> {its attribute: the parameter's name}; a plain dict does not make the layers children
        self._owners = {
            module: owned
            for module in model.modules()
            if (owned := {a: names[id(p)] for a, p in module._parameters.items() if id(p) in names})
        }
        for module, owned in self._owners.items():
            if computes(module):
                raise TypeError(
                    f"model: the layer of {min(owned.values())!r} computes its weight before each pass "
                    "(weight_norm, spectral_norm, pruning); accepted are layers that hold their weight"
                )

    def effective(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """theta -> theta' of the base parameter ``name``, of the same shape."""
        raise NotImplementedError

    @property
    def present(self) -> dict[str, nn.Parameter]:
        """The parameters by name, as the layers hold them now: accelerate exchanges the objects when it
        offloads."""
        owners = self._owners.items()
        return {name: m._parameters[attribute] for m, owned in owners for attribute, name in owned.items()}

    @property
    def places(self) -> dict[Place, int]:
        return {where(p): 0 if p.requires_grad else p.numel() for p in self.present.values()}

    def plug(self) -> None:
        for module, owned in self._owners.items():
            own = vars(module).get("forward") if Detour.of(module) is None else Detour.of(module).own
            if not stock(module, own):
                raise TypeError(
                    f"model: the layer of {min(owned.values())!r} has a forward that was replaced by another "
                    f"function; {self.name} accepts layers with their class's own"
                )
            self.around(module, self._forward)

    def _forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return call.on(self.stand_in(call.module, call.layer))(*args, **kwargs)

    def stand_in(self, module: nn.Module, layer: nn.Module) -> nn.Module:
        found = layer._parameters
        tensors = {
            attribute: self.effective(name, found[attribute]).to(found[attribute].dtype)
            for attribute, name in self._owners[module].items()
        }
        return twin(layer, tensors)

    @torch.no_grad()
    def merge(self, keep: Callable[[nn.Parameter], None]) -> None:
        for name, parameter in self.present.items():
            value = self.effective(name, parameter)
            keep(parameter)
            put(parameter, value)
