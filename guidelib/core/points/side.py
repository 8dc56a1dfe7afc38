"""SideNetwork - a small network that reads a frozen backbone's states and gives the final one in its place.

The body of each stack runs without a graph, so nothing of it is kept for the backward pass, however wide or
deep it is.  What its blocks give is noted on the way: of block l the states h_l (B, T, d), before the norm
that closes the stack, and where the network asks for it what a linear map within is given.  A network makes
the final state of them, and what follows (head, pooler, language model's head) reads that.

An encoder's network may have a width of its own.  Its state travels behind the backbone's, in the same tensor
(B, T, d + w), so that beams and caches of encoder outputs carry it along; the decoder gets the d numbers that
it knows, and its network the rest.  What the network of a decoder has to keep from one token to the next
stands in the model's cache, in layers behind the backbone's.

The backbone stays in evaluation mode, also where the rest trains.  It has nothing to learn that dropout could
help, and without it a text has the same states in every epoch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, Body, sites_in
from guidelib.core.method import Method, expect
from guidelib.core.points import passes
from guidelib.core.points.part import Part
from guidelib.core.points.passes import Call
from guidelib.core.points.sequence import arguments, cache_in
from guidelib.core.values import autocasts

OPEN = "open"  # a note: the backbone runs as it would alone, with a graph and without networks beside it


class SideNetwork(nn.Module):
    """What stands beside one stack.

    layers: the blocks whose states it reads.  inputs: the maps whose input it reads, (layer, role).  A
    subclass fills in ``forward``.
    """

    layers: tuple[int, ...]
    inputs: tuple[tuple[int, str], ...] = ()

    def forward(self, trail: Trail) -> torch.Tensor:
        """The final state (B, T, d) or, where a decoder's network reads it, (B, T, w)."""
        raise NotImplementedError


@dataclass(eq=False)
class Trail:
    """What one pass through a stack has left for its network, outside of any graph.

    entered: what the first block was given, (B, T, d).  states: h_l by layer.  inputs: what a map was given,
    (B, T, d_in), by layer and role.  given: what else a block was called with, by name.  memory: in a
    decoder, what the encoder's network has made.
    """

    body: Body
    network: SideNetwork | None
    dtype: torch.dtype
    memory: torch.Tensor | None = None
    entered: torch.Tensor | None = None
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    inputs: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    pool: tuple[Call, tuple[Any, ...]] | None = None  # what a pooler has been asked for

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """In the network's type, of 32 bits or more."""
        states = states.detach()
        return states if autocasts(states) else states.to(self.dtype)

    def close(self, states: torch.Tensor) -> torch.Tensor:
        """What the backbone makes of the last block's states: they pass its closing norm, if it has one."""
        norm = self.body.closing
        return states if norm is None else norm.forward(states.to(norm.weight.dtype))


class SidePart(Part):
    """The networks beside the stacks of one model, by the stack's name; a stack may have none."""

    why_not = "it computes beside the network, and no weight can"

    def __init__(self, method: Method, anatomy: Anatomy, networks: Mapping[str, SideNetwork]):
        super().__init__()
        self.name, self.method = type(method).__name__, method
        bodies = Anatomy(anatomy.model).bodies()
        expect([*bodies][-1] in networks, "stack", [*networks], "None: the final state is the last stack's")
        self.networks = nn.ModuleDict(networks)
        self._bodies = tuple(bodies.values())  # in tuples, so that they are not children of this module
        self._arguments = {
            module: arguments(module) for body in self._bodies for module in (body.module, *body.blocks)
        }
        self._maps = {
            site.module: (layer, site.role)
            for stack, network in networks.items()
            for layer in {layer for layer, _ in network.inputs}
            for site in sites_in(bodies[stack].blocks[layer], bodies[stack].names)
            if (layer, site.role) in network.inputs
        }
        poolers = [getattr(body.module, "pooler", None) for body in self._bodies]
        self._poolers = tuple(pooler for pooler in poolers if isinstance(pooler, nn.Module))
        behind = {module for pooler in self._poolers for module in pooler.modules()}
        self.held: dict[nn.Module, bool] = {}  # the modes of the backbone's modules; exchanged, never changed
        self.closed = tuple(m for body in self._bodies for m in body.module.modules() if m not in behind)

    def plug(self) -> None:
        for body in self._bodies:
            self.around(body.module, self._run)
            for block in body.blocks:
                self.around(block, self._step)
        for module in self._maps:
            self.hook(module, self._read, before=True)
        for pooler in self._poolers:
            self.around(pooler, self._pool)
        self._rest()

    def unplug(self) -> None:
        super().unplug()
        for module, mode in self.held.items():
            module.training = mode
        self.held = {}

    def train(self, mode: bool = True) -> SidePart:
        """The backbone comes before the parts among a model's children, so this has the last word."""
        super().train(mode)
        if self.held:
            self._rest()
        return self

    def _rest(self) -> None:
        """Put the backbone in evaluation mode, and keep which mode its modules were put in."""
        self.held = {module: module.training for module in self.closed}
        for module in self.closed:
            module.training = False

    def _run(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Around a body: it leaves a trail, and its network's state takes the place of its own."""
        if OPEN in passes.notes():
            return call(*args, **kwargs)
        if awake := [module for module in self.closed if module.training]:
            # a part of the model was put in training mode by itself
            self.held = self.held | dict.fromkeys(awake, True)
            for module in awake:
                module.training = False
        body = next(body for body in self._bodies if body.module is call.module)
        given = dict(zip(self._arguments[call.module], args, strict=False)) | kwargs
        network = self.networks[body.stack] if body.stack in self.networks else None
        trail = Trail(body, network, next(self.parameters()).dtype)
        if body.stack == "decoder" and "encoder" in self.networks:
            trail.memory, given["encoder_hidden_states"] = self._memory(body, given)
        with torch.no_grad(), passes.noted({self: trail}):
            output = call(**given)
        if network is None:
            return output
        single = not isinstance(output, tuple)
        own = output.last_hidden_state if single else output[0]
        state = network(trail)
        state = torch.cat((own, state), -1) if body.follower is not None else state.to(own.dtype)
        pooled = ()
        if trail.pool is not None:
            pool, rest = trail.pool
            pooled = (pool(state, *rest),)
        if not single:
            return (state, *pooled, *output[1 + len(pooled) :])
        output.last_hidden_state = state
        if pooled:
            (output.pooler_output,) = pooled
        return output

    def _memory(self, body: Body, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder's network has made, and the backbone's own states."""
        both, d = given.get("encoder_hidden_states"), body.width
        if both is None or both.shape[-1] <= d:
            raise ValueError(
                f"encoder_outputs must come from this model's encoder, whose states {self.name} makes wider "
                f"than {d}, got {None if both is None else tuple(both.shape)}"
            )
        return both[..., d:], both[..., :d].detach().to(body.embedding.weight.dtype)

    def _step(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Around a block: the trail gets what it was given, and what it gives."""
        output, trail = call(*args, **kwargs), passes.notes().get(self)
        if trail is None:  # the block is run by itself
            return output
        layer = trail.body.blocks.index(call.module)
        given = dict(zip(self._arguments[call.module], args, strict=False)) | kwargs
        states = given.pop("hidden_states")
        if layer == 0:
            trail.entered = trail.read(states)
        if trail.network is not None and layer in trail.network.layers:
            trail.states[layer] = trail.read(output[0] if isinstance(output, tuple) else output)
            trail.given[layer] = given
        return output

    def _read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a map that the network reads: the trail gets what it is given."""
        trail = passes.notes().get(self)
        if trail is not None:
            trail.inputs[self._maps[module]] = trail.read(args[0])

    def _pool(self, call: Call, states: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Around a pooler, which stands in the body and may be trained: it waits for the network's state."""
        trail = passes.notes().get(self)
        if trail is None:
            return call(states, *rest)
        trail.pool = call, rest
        return states[:, 0]


class Again:
    """Runs blocks of a network as the backbone has run its own: with the same masks, positions and cache.

    They are of the backbone's class, ``narrow`` times narrower than its own, and ``numbered``: that beside
    layer l of L keeps its keys and values in the cache's layer L + l.
    """

    def __init__(self, trail: Trail, narrow: int = 1):
        self.trail, self.narrow = trail, narrow
        self.biases: dict[str, Any] = {}  # T5's, which one block hands on to the next

    def __call__(self, block: nn.Module, layer: int, states: torch.Tensor) -> torch.Tensor:
        """What ``block`` makes of ``states``, called as that of ``layer`` was."""
        trail = self.trail
        given = {name: value for name, value in trail.given[layer].items() if name not in BIASES}
        given |= self.biases
        if trail.memory is not None:
            given["encoder_hidden_states"] = trail.memory.to(states.dtype)
        if (turns := given.get("position_embeddings")) is not None:
            # every narrow-th of a head's frequencies: those of a head that is as much narrower
            given["position_embeddings"] = tuple(turn[..., :: self.narrow].to(states.dtype) for turn in turns)
        if (cache := cache_in(given)) is not None:
            _make_room(cache, 2 * len(trail.body.blocks))
        # by position what may have a gradient, which reentrant checkpointing has for nothing else
        names = list(arguments(block)[1:])
        while names and (names[-1] not in GRADED or given.get(names[-1]) is None):
            names.pop()
        output = block(states, *[given.pop(name, None) for name in names], **given)
        if not isinstance(output, tuple):
            return output
        self.biases = dict(zip(BIASES, output[1:], strict=False))
        return output[0]


BIASES = ("position_bias", "encoder_decoder_position_bias")
GRADED = (*BIASES, "encoder_hidden_states")


def numbered(block: nn.Module, layer: int) -> nn.Module:
    """``block``, with ``layer`` as the place of its keys and values in a cache."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = layer
    return block


def _make_room(cache: Any, layers: int) -> None:
    """Let the cache have so many layers, those behind the backbone's as the backbone's are."""
    if hasattr(cache, "self_attention_cache"):  # and another one for the encoder's states
        caches = cache.self_attention_cache, cache.cross_attention_cache
    else:
        caches = (cache,)
    for each in caches:
        for layer in each.layers[: layers - len(each.layers)]:
            names = inspect.signature(type(layer)).parameters
            each.layers.append(type(layer)(**{n: getattr(layer, n) for n in names if hasattr(layer, n)}))
