"""AdapterFusion - several trained adapters at once, weighed by attention.  Pfeiffer et al. 2021,
arXiv:2005.00247, section 3.

First N adapters are trained, each on its own task.  Then they are frozen, and in every layer Q, K and V
learn how much of which adapter the new task needs for a token.  With h (d,) what the adapters read and a_n
(d,) what adapter n adds to it:

    s_n = (Q h + b_Q) . (K a_n + b_K)       p = softmax(s_1 ... s_N)       h <- h + sum_n p_n V a_n

Q, K, V (d, d).  V starts as the identity (1e-6 off the diagonal) and is pulled towards it by
``regularization * |V - 1|^2``, so that all starts at about the mean of the adapters.  b_K adds the same to
all scores: its gradient is zero.  V multiplies what an adapter adds, without its skip connection, as in
AdapterHub.

count (trained) = 3 d^2 + 2 d per layer.  A file holds the frozen adapters as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.additive.adapters.bottleneck import Bottleneck, PfeifferAdapter
from guidelib.core.anatomy import Anatomy, Sublayer
from guidelib.core.files import read
from guidelib.core.method import Attached, Method, expect, is_number
from guidelib.core.points.part import Part
from guidelib.core.points.sublayer import SublayerPart
from guidelib.core.points.weight_delta import BranchCost, added_dtype
from guidelib.core.values import has_values


@dataclass(frozen=True)
class AdapterFusion(Method):
    """Attention over adapters, which stay frozen.

    adapters: the files of the trained ones, two or more; or a number, for that many new ones (for counts and
    costs).  adapter: the method that the files hold, the same in all.  Their task heads are not read.
    regularization: weight of the pull of V towards the identity (0.01 in the authors' code).

    ``attach`` raises FileNotFoundError or ValueError for a file that is missing, damaged, of another backbone
    or of another method.
    """

    adapters: int | tuple[str, ...] = 4
    adapter: PfeifferAdapter = PfeifferAdapter()
    regularization: float = 0.01

    def __post_init__(self):
        wanted = "the paths of two or more adapters, or a whole number of at least 2"
        value = self.adapters
        if not isinstance(value, int):
            paths = isinstance(value, Iterable) and not isinstance(value, str)
            expect(paths, "adapters", value, wanted)
            object.__setattr__(self, "adapters", tuple(str(path) for path in value))
        expect(self.n >= 2, "adapters", value, wanted)
        right = isinstance(self.adapter, PfeifferAdapter) and not self.adapter.norms
        expect(right, "adapter", self.adapter, "a PfeifferAdapter that leaves the norms frozen")
        number = is_number(self.regularization) and self.regularization >= 0
        expect(number, "regularization", self.regularization, "a number of at least 0")

    @property
    def n(self) -> int:
        return self.adapters if isinstance(self.adapters, int) else len(self.adapters)

    @property
    def reads(self) -> str:
        return self.adapter.reads

    @property
    def point(self) -> str:
        return self.adapter.point

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        each = [self.adapter.parts(anatomy, {}) for _ in range(self.n)]  # of each adapter, a part per layer
        real = has_values(next(iter(anatomy.base_parameters().values())))  # or their values do not matter
        if (
            not isinstance(self.adapters, int) and not saved and real
        ):  # a file of a fusion brings its adapters
            for path, parts in zip(self.adapters, each, strict=True):
                self._fill(anatomy, path, parts)
        return [
            SublayerPart(self, same[0].sublayer, Fusion(same[0].sublayer, [part.module for part in same]))
            for same in zip(*each, strict=True)
        ]

    def _fill(self, anatomy: Anatomy, path: str, parts: list[SublayerPart]) -> None:
        method, tensors, _ = read(anatomy, path)
        expect(method == self.adapter.to_json(), f"adapters: the method in {path!r}", method, self.adapter)
        base = (anatomy.base_parameters().keys() - anatomy.head().keys()) & tensors.keys()
        expect(
            not base,
            f"adapters: what {path!r} holds of the base",
            min(base, default=""),
            "the task head alone",
        )
        for part in parts:
            for name, parameter in part.named_parameters():
                tensor = tensors.get(f"guidelib.{part.name}.{name}")
                if tensor is None or tensor.shape != parameter.shape:
                    raise ValueError(
                        f"adapters: {path!r} does not fit: {part.name}.{name} is not as it should be"
                    )
                parameter.data.copy_(tensor)

    def regularizer(self, attachment: Attached) -> torch.Tensor | None:
        if not self.regularization:
            return None
        values = [fusion.V.weight for fusion in self._fusions(attachment)]
        eye = torch.eye(len(values[0]), device=values[0].device, dtype=values[0].dtype)
        return self.regularization * sum(((v - eye.to(v.device)) ** 2).sum() for v in values)

    @torch.no_grad()
    def weights(self, attachment: Attached, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """p of each layer in one pass over ``batch``: (..., N), and 1 summed over the N adapters."""
        seen: list[torch.Tensor] = []
        mine = threading.get_ident()

        def look(fusion: Fusion, h: tuple[torch.Tensor], _: torch.Tensor) -> None:
            if threading.get_ident() == mine:  # others may run passes of their own
                seen.append(fusion.weights(*h, fusion.added(*h)))

        fusions = self._fusions(attachment)
        expect(bool(fusions), "attachment", attachment.method, "one of this very object, attachment.method")
        hooks = [fusion.register_forward_hook(look) for fusion in fusions]
        try:
            attachment.model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _fusions(self, attachment: Attached) -> list[Fusion]:
        parts = attachment.parts_of(self)
        return [module for part in parts for module in part.modules() if isinstance(module, Fusion)]


class Fusion(nn.Module):
    """h (..., d) -> sum_n p_n V a_n (..., d), with frozen adapters."""

    def __init__(self, sublayer: Sublayer, adapters: list[Bottleneck]):
        super().__init__()
        weight, d = sublayer.out.like, sublayer.width
        like = {"device": weight.device, "dtype": added_dtype(weight)}
        self.Q, self.K = nn.Linear(d, d, **like), nn.Linear(d, d, **like)
        self.V = nn.Linear(d, d, bias=False, **like)
        for layer in (self.Q, self.K):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.V.weight, 1e-6)
        with torch.no_grad():
            self.V.weight.fill_diagonal_(1.0)
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        added = self.added(h)
        return (self.weights(h, added).unsqueeze(-2) @ self.V(added)).squeeze(-2)

    def added(self, h: torch.Tensor) -> torch.Tensor:
        """What each adapter adds: (..., N, d)."""
        return torch.stack([adapter(h) for adapter in self.adapters], dim=-2)

    def weights(self, h: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """p (..., N)."""
        return (self.K(added) @ self.Q(h).unsqueeze(-1)).squeeze(-1).softmax(-1)

    def cost(self) -> BranchCost:
        """Raises NotImplementedError for adapters whose maps are not dense."""
        d, n = self.V.weight.shape[0], len(self.adapters)
        frozen = sum(adapter.cost().forward for adapter in self.adapters)
        # an adapter's own numbers are frozen, so what it keeps serves the gradient of the input alone
        widths = [a.down.weight.shape[0] for a in self.adapters if a.activation != "identity"]
        return BranchCost(
            keeps_input=True,  # for the gradient of Q
            kept=d + n * (3 * d + 1),  # Q h; a_n, K a_n, V a_n and p_n
            kept_input=sum(widths),
            forward=2 * d * d + n * (4 * d * d + 4 * d) + frozen,
            backward=2 * d * d + n * (4 * d * d + 8 * d),
            backward_input=2 * d * d + n * 4 * d * d + frozen,
        )
