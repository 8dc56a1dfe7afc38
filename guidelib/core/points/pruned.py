"""Pruned - matrices of parts of which few entries are there.

    W = scatter(indices, values)        values, indices: (k,) for all matrices of one method

W is made wherever it is read, and is no parameter: the optimiser sees the k values, so neither weight decay
nor momentum can bring back what was pruned.  The modules keep their code; they get a class of their own, in
which the attribute is a property.  Whatever reads it computes with all of W, so that a sparse map costs as
much as the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from guidelib.core.method import Wrapper, expect
from guidelib.core.points.part import Part, Place
from guidelib.core.points.sparse_delta import Support


class Pruned(Support):
    """The entries that are kept of the matrices of ``parts``, which the part takes over from them.

    Matrices are the trained parameters of two dimensions or more, but for a single row or column.  One that
    several modules share is one.

    start: the whole matrices, by name, as long as the support may still be chosen; None after that.  They are
    not saved.  whole: what is computed with instead, while the scores are taken.
    """

    mergeable = True

    def __init__(self, method: Wrapper, parts: list[Part], keep: float, saved: Mapping[str, torch.Tensor]):
        super().__init__()
        self.name, self.method = type(method).__name__, method
        self.start: dict[str, torch.Tensor] | None = {}
        self.whole: dict[str, torch.Tensor] | None = None
        self._holders: dict[str, Part] = {}  # a plain dict does not make them children
        named: dict[int, str] = {}
        for n, part in enumerate(parts):
            for path, module in [*part.named_modules()]:
                held = module._parameters
                taken = {a: p for a, p in held.items() if p is not None and p.requires_grad and _is_matrix(p)}
                for attribute, p in taken.items():
                    name = named.setdefault(id(p), f"{n}.{path}.{attribute}")
                    self.start.setdefault(name, p.detach())
                    self._holders.setdefault(name, part)
                    del held[attribute]
                if taken:
                    names = {attribute: named[id(p)] for attribute, p in taken.items()}
                    module._pruned = self, names  # in a tuple, so that this part does not become its child
                    module.__class__ = _reading(type(module), tuple(names))
        self.shapes = {name: tensor.shape for name, tensor in self.start.items()}
        expect(bool(self.shapes), "method", method.method, "one that adds matrices, not vectors alone")
        first = next(iter(self.start.values()))
        numels = {name: shape.numel() for name, shape in self.shapes.items()}
        self.spread_over(numels, keep, saved, device=first.device, dtype=first.dtype)
        self._take_values()
        if saved:
            self.start = None

    @property
    def holders(self) -> list[Part]:
        """The parts that the matrices are from."""
        return [*dict.fromkeys(self._holders.values())]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is pruned."""
        return self.k == sum(self._numels)

    def matrix(self, name: str) -> torch.Tensor:
        if self.whole is not None:
            return self.whole[name]
        span, shape = self._spans[name], self.shapes[name]
        zeros = self.values.new_zeros(shape.numel())
        return zeros.index_put((self.indices[span],), self.values[span]).view(shape)

    @property
    def trained(self) -> bool:
        """Whether the values are others than at the start."""
        return self.start is None or not torch.equal(self.values, self._started())

    def _started(self) -> torch.Tensor:
        parts = self.start.values(), self.indices.split([s.stop - s.start for s in self._spans.values()])
        taken = [start.flatten()[index.to(start.device)] for start, index in zip(*parts, strict=True)]
        return torch.cat(taken).to(self.values)

    @torch.no_grad()
    def _take_values(self) -> None:
        self.values.copy_(self._started())

    @torch.no_grad()
    def support(self, indices: torch.Tensor, sizes: torch.Tensor) -> None:
        """As for all; the values are those that stood there at the start."""
        super().support(indices, sizes)
        self._take_values()

    def settle(self) -> None:
        """Let the rest of the matrices go."""
        self.start = None

    def plug(self) -> None:
        pass  # it acts in the parts

    def merge(self, keep: Callable[[nn.Parameter], None]) -> None:
        pass

    def acts_in(self, modules: Collection[nn.Module]) -> bool:
        return any(part.acts_in(modules) for part in self.holders)

    @property
    def place(self) -> str:
        return self.holders[0].place

    @property
    def places(self) -> Mapping[Place, int]:
        """What is kept of parts that change nothing but what they add."""
        own = {
            name
            for name, part in self._holders.items()
            if {parameter for parameter, _ in part.places} <= {id(p) for p in part.parameters()}
        }
        return {(id(self), None): sum(s.stop - s.start for name, s in self._spans.items() if name in own)}


def _is_matrix(p: torch.Tensor) -> bool:
    return p.dim() > 2 or (p.dim() == 2 and min(p.shape) > 1)


@cache
def _reading(kind: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """``kind``, where these attributes are matrices of a `Pruned`."""

    def reading(attribute: str) -> property:
        def read(module: nn.Module) -> torch.Tensor:
            pruned, names = module._pruned
            return pruned.matrix(names[attribute])

        return property(read)

    def reduced(module: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _blank, (kind, attributes), module.__dict__  # no module holds this class for pickle to find

    own = {"__module__": kind.__module__, "__reduce_ex__": reduced}
    return type(kind.__name__, (kind,), {a: reading(a) for a in attributes} | own)


def _blank(kind: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    made = _reading(kind, attributes)
    return made.__new__(made)
