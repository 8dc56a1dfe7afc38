"""LeTS, Learn-to-Share - tasks share one pass through a frozen backbone.  Fu et al. 2021, ICML, PMLR 139,
pp. 3469-3479.

Known from the abstract: additive components reuse the intermediate activations of a frozen transformer; a
task's weights are W + dW with a sparse dW, whose mask is chosen at the start of fine-tuning; a search learns
what is computed for the task alone and what is shared.  There is no public code, and the rest is our reading:

    u_l = h_l + g_l (M_l * dW_l) a_l              a_l: what W_o, behind the attention of block l, is given
    s_l, c_l = LSTM(u_l / r_l, s_{l-1}, c_{l-1})  r_l = rms(h_l), for each token
    final state = u_L + r_L U s_L                 U: (d, m)

h_l and a_l are the backbone's and come without a graph.  W_o a_l, which is in h_l, is shared by all tasks;
the task's own part is the product with k = keep d d_in trained numbers, at places that do not move.  g_l in
{0, 1} says whether layer l has one.  In training it is drawn from a binary concrete distribution and passed
straight through; afterwards it is [logit_l > 0], and what is closed is gone.  dW starts at 0.

The part is added where the block ends, not within it: inside, all layers above would be the task's own.

The mask is SNIP's (arXiv:1810.02340): of each layer the k largest |W_o * dL/d(dW)|.  U starts small and not
at 0, with which the layers below the last would have no gradient, and so a mask chosen from zeros.

count = L' (k + 1) + 4 m (d + m + 1) + d m, and L' k indices in the file; L' layers may have a part, and
those that share cost nothing there once training has ended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import ADDED, Anatomy, Body, Site, sites_in
from guidelib.core.batches import Batch, loss
from guidelib.core.method import Attached, Method, expect, is_number, is_whole
from guidelib.core.modes import modes_kept
from guidelib.core.points.part import Part, expect_there
from guidelib.core.points.side import SideNetwork, SidePart, Trail
from guidelib.core.points.weight_delta import added_dtype

ROLE = "self.o"
BATCHES = 4  # that the mask is chosen from
SPEED = 10.0  # of a logit, beside other parameters: Adam moves them all by about the rate at each step
RELAXATION = 0.5  # the temperature of the binary concrete distribution


@dataclass(frozen=True)
class LeTS(Method):
    """Sparse deltas beside the attention's output maps, gates that choose the layers, an LSTM over layers.

    keep: the share of a map's weights that a delta has.  hidden: the LSTM's width m, d / 8 by default.  cost:
    weight in the loss of the mean probability that a layer computes a part of its own.
    ``.on(layers=...)`` leaves which layers may.  ``fit`` chooses the places of a delta from training data;
    until then they are those of the largest |W_o|.
    """

    keep: float = 0.1
    hidden: int | None = None
    cost: float = 0.05

    def __post_init__(self):
        share = is_number(self.keep) and 0 < self.keep <= 1
        expect(share, "keep", self.keep, "a share of the weights, more than 0 and at most 1")
        whole = self.hidden is None or is_whole(self.hidden)
        expect(whole, "hidden", self.hidden, "a whole number of at least 1, or None")
        expect(is_number(self.cost) and self.cost >= 0, "cost", self.cost, "a finite number of at least 0")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        blocks = [*anatomy.blocks()]
        last = blocks[-1][0]
        body = anatomy.bodies()[last]
        start = f"{ADDED}.{type(self).__name__}.networks.{last}."
        own = {}
        for layer in (layer for stack, layer, _ in blocks if stack == last):
            site, index = _site(body, layer), saved.get(f"{start}own.{layer}.index")
            if index is not None or not saved:
                own[layer] = Own(site, max(1, round(self.keep * math.prod(site.shape))), index)
        gated = not saved or f"{start}gates" in saved
        return [SidePart(self, anatomy, {last: Shared(body, own, self.hidden, gated)})]

    def prepare(self, attachment: Attached, batches: Iterable[Batch]) -> None:
        """Choose the places of the deltas, unless they have been trained.

        Of a batch without labels the sum of the first output stands in for the loss.
        """
        model, (body, network) = attachment.model, self._network(attachment)
        if not network.own or any(own.values.any() for own in network.own.values()):
            return
        expect_there(_site(body, int(layer)).weight for layer in network.own)
        dense = {
            layer: torch.zeros(own.shape, dtype=own.values.dtype, device=own.values.device).requires_grad_()
            for layer, own in network.own.items()
        }
        total = {layer: torch.zeros_like(zeros) for layer, zeros in dense.items()}
        with modes_kept(model), ExitStack() as hooks:
            for layer, own in network.own.items():
                hook = own.register_forward_hook(partial(_beside, dense[layer]))
                hooks.callback(hook.remove)
            model.eval()  # in which all gates are open at the start
            for batch in itertools.islice(batches, BATCHES):
                gradients = torch.autograd.grad(loss(model, batch), [*dense.values()])
                for layer, gradient in zip(dense, gradients, strict=True):
                    total[layer] += gradient
        for layer, own in network.own.items():
            sensitivity = _site(body, int(layer)).weight * total[layer]
            own.index.copy_(_largest(sensitivity, len(own.index)))

    def regularizer(self, attachment: Attached) -> torch.Tensor | None:
        _, network = self._network(attachment)
        if network.gates is None or not self.cost:
            return None
        return self.cost * torch.sigmoid(SPEED * network.gates).mean()

    def finish(self, attachment: Attached) -> None:
        """Settle who shares: what is closed goes, and what is open stays so."""
        _, network = self._network(attachment)
        if network.gates is not None:
            for layer, gate in zip([*network.own], network.gates.tolist(), strict=True):
                if gate <= 0:
                    del network.own[layer]
            network.gates = None

    def _network(self, attachment: Attached) -> tuple[Body, Shared]:
        (part,) = attachment.parts_of(self)
        ((stack, network),) = part.networks.items()
        return Anatomy(attachment.model).bodies()[stack], network


class Own(nn.Module):
    """(M * dW) a for one map (d_out, d_in): k trained ``values``, and by ``index`` their places in it, row
    after row."""

    def __init__(self, site: Site, k: int, index: torch.Tensor | None):
        super().__init__()
        self.shape, like = site.shape, site.like
        n = math.prod(self.shape)
        self.values = nn.Parameter(torch.zeros(k, device=like.device, dtype=added_dtype(like)))
        kind = torch.int32 if n <= torch.iinfo(torch.int32).max else torch.int64
        if index is None:
            index = _largest(site.weight, k)
        else:  # of a file, which is yet to be filled in
            expect(bool(((index >= 0) & (index < n)).all()), "index", index, f"places from 0 to {n - 1}")
            index = torch.zeros(k, device=like.device)
        self.register_buffer("index", index.to(kind))

    def dense(self, gate: torch.Tensor | float = 1.0) -> torch.Tensor:
        """g (M * dW), which no gradient needs: that of its numbers is made from a and the places."""
        zeros = torch.zeros(math.prod(self.shape), dtype=self.values.dtype, device=self.values.device)
        return zeros.index_put((self.index,), gate * self.values).view(self.shape)

    def forward(self, a: torch.Tensor, gate: torch.Tensor | float = 1.0) -> torch.Tensor:
        return F.linear(a, self.dense(gate))  # (B, T, d_in) -> (B, T, d_out)


class Shared(SideNetwork):
    """The network beside the last stack: ``own`` parts by layer, and what reads all layers."""

    def __init__(self, body: Body, own: dict[int, Own], hidden: int | None, gated: bool):
        super().__init__()
        like = body.like
        d, made = _site(body, 0).shape[0], {"device": like.device, "dtype": added_dtype(like)}
        m = hidden or max(1, d // 8)
        self.layers = tuple(range(len(body.blocks)))
        self.inputs = tuple((layer, ROLE) for layer in own)
        self.own = nn.ModuleDict({str(layer): each for layer, each in own.items()})
        # each is open at first, with a probability of sigmoid(1) = 0.73
        self.gates = nn.Parameter(torch.full((len(own),), 1 / SPEED, **made)) if gated else None
        self.W, self.V, self.U = (
            nn.Parameter(torch.randn(*shape, **made) * std)
            for shape, std in (((4 * m, d), d**-0.5), ((4 * m, m), m**-0.5), ((d, m), 0.02))
        )
        self.b = nn.Parameter(torch.zeros(4 * m, **made))
        nn.init.ones_(self.b[m : 2 * m])  # nothing is forgotten at first

    def forward(self, trail: Trail) -> torch.Tensor:
        h = torch.stack([trail.states[layer] for layer in self.layers])  # (L, B, T, d)
        r = (torch.linalg.vector_norm(h, dim=-1, keepdim=True) / h.shape[-1] ** 0.5).clamp(min=1e-6)
        u, gates = [*h], self.shares()
        for layer, own in ((int(layer), own) for layer, own in self.own.items()):
            u[layer] = u[layer] + own(trail.inputs[layer, ROLE], gates[str(layer)])
        m = self.U.shape[1]
        s = c = h.new_zeros(*h.shape[1:-1], m)
        for z in F.linear(torch.stack(u) / r, self.W, self.b):  # the states' part, of all layers at once
            z = z + F.linear(s, self.V)
            enter, forget, leave = torch.sigmoid(z[..., : 3 * m]).chunk(3, -1)
            c = forget * c + enter * torch.tanh(z[..., 3 * m :])
            s = leave * torch.tanh(c)
        return trail.close(u[-1] + r[-1] * F.linear(s, self.U))

    def shares(self) -> dict[str, torch.Tensor | float]:
        """g of each layer that may have a part of its own."""
        if self.gates is None:
            return dict.fromkeys(self.own, 1.0)
        logits = SPEED * self.gates
        if self.training:
            noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit()
            logits = (logits + noise) / RELAXATION
        soft = torch.sigmoid(logits)
        hard = (logits > 0).to(soft.dtype)
        return dict(zip(self.own, hard + (soft - soft.detach()), strict=True))


def _beside(D: torch.Tensor, own: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return output + F.linear(args[0], D)


def _site(body: Body, layer: int) -> Site:
    return next(site for site in sites_in(body.blocks[layer], body.names) if site.role == ROLE)


def _largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The places of the k largest |scores|, in order."""
    return scores.detach().abs().flatten().topk(k, sorted=False).indices.sort().values
