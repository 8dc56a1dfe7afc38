"""WeightSpacePart - base parameters that are replaced by functions of themselves while the model runs.

A WeightDelta corrects the output of a linear map.  What acts on any parameter (an embedding, a norm's gain)
or has no fast path is done here by the definition: whenever a layer runs, it finds theta' in the place of its
parameter theta, and theta again afterwards.  So the layer keeps its class, its keys and its parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from guidelib.core.anatomy import computes, expect_numbers
from guidelib.core.method import Method
from guidelib.core.points.part import Part, put


class WeightSpacePart(Part):
    """A subclass fills in ``effective``.

    parameters: the base parameters by name, as ``Anatomy.parameters`` gives them.  One that several layers
    share (a tied embedding) is replaced in each of them.
    """

    mergeable = True

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
        self._handles: list = []
        self._resting: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._kept: dict[str, torch.Tensor] = {}

    def effective(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """theta -> theta' of the base parameter ``name``, of the same shape."""
        raise NotImplementedError

    @property
    def changed(self) -> int:
        # a parameter that is also trained in place is counted there
        return sum(p.numel() for p in self.replaced.values() if not p.requires_grad)

    def plug(self) -> None:
        for module in self._owners:
            self._handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def unplug(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        for attribute, name in self._owners[module].items():
            parameter = module._parameters[attribute]
            self._resting[module, attribute] = parameter
            module._parameters[attribute] = self.effective(name, parameter).to(parameter.dtype)

    def _leave(self, module: nn.Module, args: tuple, output: object) -> None:
        for attribute in self._owners[module]:
            if (module, attribute) in self._resting:  # not if the layer before it failed to enter
                module._parameters[attribute] = self._resting.pop((module, attribute))

    @torch.no_grad()
    def merge(self) -> None:
        for name, parameter in self.replaced.items():
            self._kept[name] = parameter.clone()
            parameter.copy_(self.effective(name, parameter))

    def unmerge(self) -> None:
        for name, kept in self._kept.items():
            put(self.replaced[name], kept)
        self._kept.clear()
