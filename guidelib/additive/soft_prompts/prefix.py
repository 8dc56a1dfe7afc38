"""Prefix tuning - trained keys and values in every attention.  Li and Liang 2021, arXiv:2101.00190.

    K' = [P_K; K],  V' = [P_V; V]        P_K, P_V: (P, width of k) in each layer, the queries as they are
    P_K, P_V of all layers = MLP(E) = W_2 tanh(W_1 E)        E: (P, d), only while it is trained

count = 2 P (width of k) per attention, stored in any case; with the MLP E, W_1 and W_2 are trained instead,
and go when the training ends.  An encoder-decoder has three kinds of attention, and each kind its own MLP.

What attends to a prefix attends less to the text: the output is a mixture of both, (1 - lambda) of the one
and lambda of the other (He et al. 2022, arXiv:2110.04366).  So no prefix leaves the model as it was, zeros
least of all: a key of zeros has the score 0 and not minus infinity.  It does not merge.

Our reading: E starts from N(0, 1), as an embedding does; without an MLP the prefix does from N(0, 0.02).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from guidelib.additive.soft_prompts.prompt import Several, Vectors
from guidelib.additive.soft_prompts.reparametrized import MLP
from guidelib.core.anatomy import ADDED, Anatomy, Attention, Body, Targets
from guidelib.core.method import Attached, Method, expect, is_whole
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call, noted, notes, reentrant, remember
from guidelib.core.points.prefix import PrefixPart
from guidelib.core.points.weight_delta import added_dtype


@dataclass(frozen=True)
class PrefixTuning(Method):
    """``length`` trained keys and values in each attention.

    mlp: width of the MLP that gives them while they are trained (the paper's is 512 or 800); None trains them
    directly.  attentions: "self", "cross" or "attn", both.  tasks: how many prefixes there are, of which
    ``using`` chooses one for each text; several have no MLP.
    """

    length: int = 10
    mlp: int | None = None
    attentions: Targets = "attn"
    tasks: int = 1

    def __post_init__(self):
        for name in ("length", "tasks"):
            value = getattr(self, name)
            expect(is_whole(value), name, value, "a whole number of at least 1")
        whole = self.mlp is None or is_whole(self.mlp)
        expect(whole, "mlp", self.mlp, "a whole number of at least 1, or None")
        expect(self.mlp is None or self.tasks == 1, "mlp", self.mlp, "None for several tasks")
        self.several("attentions", "name")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        attentions = anatomy.attentions(self.attentions)
        first = f"{ADDED}.{type(self).__name__}_{attentions[0].name.replace('.', '_')}.prefix.P"
        if self.mlp is None or first in saved:  # or in a file written after training
            return [
                PrefixPart(self, attention, self.flat(*self.shape(attention))) for attention in attentions
            ]
        bodies, kinds = anatomy.bodies(), {}
        for attention in attentions:
            kinds.setdefault((attention.stack, attention.role), []).append(attention)
        parts = []
        for (stack, role), alike in kinds.items():
            made = Made(self, f"{stack}_{role}", bodies[stack], len(alike), *self.shape(alike[0]))
            parts += [made, *(PrefixPart(self, each, Slice(made, i)) for i, each in enumerate(alike))]
        return parts

    def flat(self, length: int, width: int, like: torch.Tensor) -> nn.Module:
        start = torch.empty(self.tasks, length, 2, width, device=like.device, dtype=added_dtype(like))
        start.normal_(std=0.02)
        return Vectors(start[0]) if self.tasks == 1 else Several(start)

    def shape(self, attention: Attention) -> tuple[int, int, torch.Tensor]:
        """P, the width of a key, and a tensor of the right kind."""
        weight = attention.key.like
        return self.length, len(weight), weight

    @torch.no_grad()
    def finish(self, attachment: Attached) -> None:
        """Keep the prefixes, and let the MLPs go."""
        parts = attachment.parts_of(self)
        for part in parts:
            if isinstance(part, PrefixPart) and isinstance(part.prefix, Slice):
                part.prefix = Vectors(part.prefix().clone())  # (P, 2, width): keys, values
        for part in parts:
            if isinstance(part, Made):
                part.E = part.encoder = None


class Made(Part):
    """The prefixes of all attentions of a kind, made once for each pass through their stack."""

    serves = True

    def __init__(
        self, method: PrefixTuning, kind: str, body: Body, n: int, length: int, width: int, like: torch.Tensor
    ):
        super().__init__()
        self.name, self.method = f"{type(method).__name__}_{kind}", method
        made = {"device": like.device, "dtype": added_dtype(like)}
        self.E = nn.Parameter(torch.randn(length, body.width, **made))
        self.encoder = MLP(body.width, method.mlp, n * 2 * width, activation="tanh", **made)
        self._body, self._width = (body.module,), 2 * width

    def plug(self) -> None:
        self.around(self._body[0], self._make)

    def _make(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        if self.encoder is None or reentrant(call.module):
            return call(*args, **kwargs)
        remember(self._body[0])
        with noted({self: self.values()}):
            return call(*args, **kwargs)

    def values(self) -> torch.Tensor:
        """(P, attentions, 2 * width)."""
        return self.encoder(self.E).unflatten(-1, (-1, self._width))


class Slice(nn.Module):
    """Those of the i-th attention."""

    def __init__(self, made: Made, i: int):
        super().__init__()
        self._made, self.i = (made,), i

    def forward(self, rows: int = 1) -> torch.Tensor:
        (made,) = self._made
        values = notes().get(made)  # None where each attention makes its own
        return (made.values() if values is None else values)[:, self.i].unflatten(-1, (2, -1))
