"""BitFit - train the biases, and leave every matrix as it is.  Ben Zaken et al. 2022, arXiv:2106.10199,
section 3.

    y = W x + b,    LN(x) = g * (x - mean) / sd + b        b trained, W and g frozen        * element-wise

count = all biases of linear maps and norms.  On BERT, with d and f = 4 d: 4 d in attention, f + d in the
feed-forward network and 2 d in the norms of a block, d in the norm of the embedding, d in the pooler.  The
paper's subset, ``only=("q", "ffn.in")``, has d + f a block.  The trained biases stand in the model, so there
is nothing to merge.

Two facts to know.  A key's bias adds the same number to all scores of a query, and a softmax does not see
that: its gradient is zero but for rounding (with rotary embeddings, which turn keys afterwards, it is not).
And T5, LLaMA and others have no biases.  Compacter's authors (arXiv:2106.04647) give their T5 some for this
comparison, at every linear map and norm of its blocks and at its output; ``add`` does so at each linear map
of the blocks and each norm.  Such a bias starts at zero, and no weight of the base could hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, Site, Targets, expect_numbers
from guidelib.core.method import Method, expect
from guidelib.core.points.part import Part, Place, map_of
from guidelib.core.points.selection import Selection
from guidelib.core.points.weight_delta import added_dtype


@dataclass(frozen=True)
class BitFit(Selection):
    """Train all biases, or those of the linear maps that ``only`` names (roles, see anatomy.py).

    add: give a bias to what has none.  Raises ValueError where there is no bias to train, or ``only`` names a
    part of a fused layer, whose one bias belongs to other maps as well.
    """

    only: Targets = ()
    add: bool = False

    def __post_init__(self):
        self.several("only")
        expect(isinstance(self.add, bool), "add", self.add, "True or False")

    def select(self, anatomy: Anatomy) -> set[str]:
        if self.only:
            ids = {id(site.module.bias) for site in self._maps(anatomy) if _bias(site.module) is not None}
            names = {name for name, p in anatomy.parameters().items() if id(p) in ids}
        else:
            names = anatomy.biases().keys() & (anatomy.parameters().keys() - anatomy.task_head())
        expect_numbers({name: p for name, p in anatomy.parameters().items() if name in names})
        if not names and not self.add:
            which = " and ".join(self.only) or "linear maps and norms"
            raise ValueError(
                f"BitFit: {which} have no biases in this {anatomy.kind} model; BitFit(add=True) adds some"
            )
        return names

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        return [AddedBias(self, *place) for place in self._bare(anatomy)] if self.add else []

    def _maps(self, anatomy: Anatomy) -> list[Site]:
        """The linear maps of ``only``, none of them without the others of its layer."""
        chosen = anatomy.linears(self.only or "all", "only")
        for site in anatomy.linears():
            part = next((s for s in chosen if s.module is site.module), None)
            if part is not None and all(s.name != site.name for s in chosen):
                raise ValueError(
                    f"only: the bias of {part.name} is that of {site.name} as well; "
                    "accepted are all maps of a fused layer"
                )
        return chosen

    def _bare(self, anatomy: Anatomy) -> Iterator[tuple[str, nn.Module, int, torch.Tensor]]:
        """What has no bias: its name and module, the width of its output, and a tensor of its type."""
        for site in self._maps(anatomy):
            if _bias(site.module) is None:
                yield site.name, site.module, site.shape[0], site.like
        inside = anatomy.parameters().keys() - anatomy.task_head()
        for name in () if self.only else anatomy.norms():
            path, _, attribute = name.rpartition(".")
            norm = anatomy.model.get_submodule(path)
            if name in inside and attribute == "weight" and _bias(norm) is None:
                yield path, norm, len(norm.weight), norm.weight


def _bias(module: nn.Module) -> torch.Tensor | None:
    return getattr(module, "bias", None)


class AddedBias(Part):
    """b (d_out,), added to what ``module`` gives, in the type of ``like`` (32 bits at least)."""

    why_not = "its layer has no bias that could hold the method's"

    def __init__(self, method: Method, name: str, module: nn.Module, width: int, like: torch.Tensor):
        super().__init__()
        self.name, self.method, self._place = f"BitFit_{name.replace('.', '_')}", method, name
        self.b = nn.Parameter(torch.zeros(width, device=like.device, dtype=added_dtype(like)))
        self._module = (module,)  # in a tuple, so that it is not registered as a child

    @property
    def place(self) -> str:
        return self._place

    @property
    def acts_on(self) -> tuple[Place, ...]:
        return (map_of(self._module[0]),)

    def plug(self) -> None:
        self.hook(self._module[0], self._hook)

    def _hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        return y + self.b.to(y.dtype)
