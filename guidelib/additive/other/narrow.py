"""Narrower copies of a backbone's blocks, and which of its numbers they start from.

A copy is of the block's own class, with all widths divided and as many heads as before.  Structural pruning
fills it: units are kept or left out as a whole, by the importance of all weights at them.

    the residual stream   d / rho units, the same in all blocks and both stacks
    an attention          in each head the same dimensions of q and k, and the same of v and of o's input
    a feed-forward layer  f / rho of its inner units

With rotary embeddings every rho-th dimension of q and k stays, whatever its weights: those are the
frequencies of a head that is so much narrower.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from guidelib.core.anatomy import Body, Site, sites_in
from guidelib.core.architectures import HEAD_WIDTHS, WIDTHS
from guidelib.core.method import expect
from guidelib.core.points.side import numbered
from guidelib.core.points.weight_delta import added_dtype

Score = Callable[[Site], torch.Tensor]  # of a weight: how much each of its numbers matters, (d_out, d_in)
Units = dict[str, torch.Tensor]


def magnitude(site: Site) -> torch.Tensor:
    return site.weight.abs()


class _Narrow:
    """A configuration with its widths divided; what else it says is what the whole one says now."""

    def __init__(self, whole: Any, by: int):
        self.whole, self.by = whole, by

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a copy of it asks before it has anything
            raise AttributeError(name)
        value = getattr(self.whole, name)
        return value // self.by if name in WIDTHS and value is not None else value


def sizes(body: Body) -> dict[str, int]:
    """The widths of a stack: d, f, and h of each head."""
    block, names = body.blocks[0], body.names
    sites = {site.role: site for site in sites_in(block, names)}
    attention = block.get_submodule(names.linears["self.q"].partition("[")[0].rpartition(".")[0])
    h = next(getattr(attention, name) for name in HEAD_WIDTHS if hasattr(attention, name))
    return {"d": sites["ffn.in"].shape[1], "f": sites["ffn.in"].shape[0], "h": h}


def expect_divisible(body: Body, reduction: int) -> None:
    """Raise ValueError unless every width of the stack is a multiple."""
    found = sizes(body)
    for name, width in (("width", found["d"]), ("inner width", found["f"]), ("head width", found["h"])):
        pairs = 2 if name == "head width" and body.names.rotary else 1
        what = f"a divisor of the {body.stack}'s {name} {width}" + " / 2, which is turned in pairs" * (
            pairs > 1
        )
        expect(width % (pairs * reduction) == 0, "reduction", reduction, what)


def narrow_block(body: Body, layer: int, reduction: int, *, first: bool) -> nn.Module:
    """A copy of a block, with random weights.  ``first``: whether no other one stands before it."""
    block = body.blocks[layer]
    like = next(sites_in(block, body.names)).like
    accepted = inspect.signature(type(block)).parameters
    given = {"layer_idx": layer, "has_relative_attention_bias": first}
    # what a new block draws, in torch's default type, is drawn again here: so it shall not count
    with torch.device(like.device), torch.random.fork_rng(devices=[]):
        small = type(block)(
            _Narrow(body.module.config, reduction), **{n: v for n, v in given.items() if n in accepted}
        )
    small = small.to(added_dtype(like))
    with torch.no_grad():
        for site in sites_in(small, body.names):
            site.weight.normal_(std=site.shape[1] ** -0.5)
            if site.bias is not None:
                site.bias.zero_()
        for module in small.modules():
            if isinstance(module, nn.Embedding):  # T5's table of distances
                module.weight.zero_()
    return numbered(small, len(body.blocks) + layer)


def narrow_norm(body: Body, reduction: int) -> nn.Module:
    """A copy of the norm that closes the stack, as it starts; nothing where there is none."""
    norm, like = body.closing, body.like
    if norm is None:
        return nn.Identity()
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    with torch.device(like.device):
        return type(norm)(sizes(body)["d"] // reduction, eps=eps).to(added_dtype(like))


def stream(bodies: dict[Body, list[int]], reduction: int, score: Score) -> torch.Tensor:
    """The units of the residual stream that matter most in these layers of each stack, (d / rho,)."""
    total: Any = 0
    for body, layers in bodies.items():
        for layer in layers:
            for site in sites_in(body.blocks[layer], body.names):
                total = total + score(site).float().sum(0 if ENDS[_kind(site)][1] == "d" else 1)
    return _top(total, reduction)


@torch.no_grad()
def prune(small: nn.Module, body: Body, layer: int, reduction: int, score: Score, kept: torch.Tensor) -> None:
    """Fill a copy of a block with what is left of the block, where ``kept`` is left of the stream."""
    block, done = body.blocks[layer], set()
    whole = {site.role: site for site in sites_in(block, body.names)}
    units = {"d": kept} | _units(whole, body, reduction, score)
    for site in sites_in(small, body.names):
        theirs, attention = whole[site.role], site.role.rpartition(".")[0]
        out, into = (units[end] if end in units else units[f"{attention}.{end}"] for end in ENDS[_kind(site)])
        site.weight.copy_(theirs.weight[out][:, into])
        done.add(id(site.parameter))
        if site.bias is not None:
            site.bias.copy_(theirs.bias[out])
            done.add(id(site.module.bias))
    first, own = dict(body.blocks[0].named_parameters()), dict(block.named_parameters())
    for name, parameter in small.named_parameters():
        if id(parameter) not in done:
            value = own.get(name, first.get(name))  # T5's table of distances is the first block's
            if value.shape != parameter.shape:  # a norm, of the stream or within a head
                value = value[kept] if len(value) == sizes(body)["d"] else value[::reduction]
            parameter.copy_(value)


@torch.no_grad()
def prune_norm(small: nn.Module, body: Body, kept: torch.Tensor) -> None:
    """Fill a copy of the norm that closes the stack."""
    for name, parameter in small.named_parameters():
        parameter.copy_(body.closing.get_parameter(name)[kept])


# of a map, by the last part of its role: which units its outputs are, and which its inputs
ENDS = {
    **{"q": ("queries", "d"), "k": ("keys", "d"), "v": ("values", "d"), "o": ("d", "mixed")},
    **{"in": ("f", "d"), "gate": ("f", "d"), "out": ("d", "f")},
}


def _kind(site: Site) -> str:
    return site.role.rpartition(".")[2]


def _units(whole: dict[str, Site], body: Body, reduction: int, score: Score) -> Units:
    """Which units of a block stay, beside those of the stream."""
    inner = sum(
        score(site).float().sum(0 if role == "ffn.out" else 1)
        for role, site in whole.items()
        if role.startswith("ffn.")
    )
    units, h = {"f": _top(inner, reduction)}, sizes(body)["h"]
    for kind in ("self", "cross"):
        if f"{kind}.q" in whole:
            q, k, v = (score(whole[f"{kind}.{role}"]).float().sum(1).view(-1, h) for role in "qkv")
            mixed = score(whole[f"{kind}.o"]).float().sum(0).view(-1, h)
            turned = body.names.rotary
            names = (f"{kind}.queries", f"{kind}.keys"), (f"{kind}.mixed", f"{kind}.values")
            units |= zip(names[0], _dimensions(q, k, reduction, spaced=turned), strict=True)
            units |= zip(names[1], _dimensions(mixed, v, reduction), strict=True)
    return units


def _dimensions(many: torch.Tensor, few: torch.Tensor, reduction: int, *, spaced: bool = False):
    """Which dimensions of each head stay, by how much they matter: (heads, h) for as many heads as there are
    queries, and for those of the keys, each of which several may share."""
    (n, h), shared = few.shape, len(many) // len(few)
    if spaced:
        kept = torch.arange(0, h, reduction, device=few.device).expand(n, -1)
    else:
        kept = _top(few + many.view(n, shared, h).sum(1), reduction)
    each = kept.repeat_interleave(shared, 0)
    return tuple(
        (torch.arange(len(heads), device=few.device)[:, None] * h + heads).flatten() for heads in (each, kept)
    )


def _top(scores: torch.Tensor, reduction: int) -> torch.Tensor:
    """The best of the last dimension, in their order."""
    return scores.topk(scores.shape[-1] // reduction).indices.sort(-1).values
