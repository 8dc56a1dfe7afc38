"""Where things are in a backbone: from the roles a paper speaks of to the modules transformers has.

A method asks for roles (``q``, ``ffn.out``, ``norms`` ...), never for module names.  Those stand in
architectures.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from guidelib.core.architectures import (
    ARCHITECTURES,
    ATTENTION_ROLES,
    COUNT_FROM_PADDING,
    GROUPS,
    LOADED,
    POSITION_TABLES,
    TARGET_NAMES,
    Stack,
    is_pretrained,
)

Targets = str | Sequence[str]
Layers = int | Iterable[int] | None


@dataclass(frozen=True, eq=False)
class Site:
    """One linear map of the backbone, seen as W (d_out, d_in), whatever the layer's own layout.

    A Conv1D stores its weight transposed, and GPT-2 fuses q, k and v into one; ``rows`` then says which
    outputs of ``module`` are this map's.
    """

    stack: str
    layer: int
    role: str
    module: nn.Module
    rows: slice | None = None

    @cached_property
    def fault(self) -> str:
        """Why W cannot be read and written (see `fault_of`); empty for a plain layer."""
        return fault_of(self.module)

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.{self.role}"

    def check(self, *, adds: bool) -> None:
        """Raise TypeError unless a method can act here: on plain layers every one, on quantised layers those
        that add something to the output whatever W is (``adds``)."""
        if self.fault and not (adds and _quantised(self.module)):
            accepted = "Linear and Conv1D layers that compute with the weight they hold"
            accepted += ", or quantised ones" if adds else ", since this method reads or writes the weight"
            raise TypeError(f"targets: {self.name} {self.fault}; accepted are {accepted}")

    @property
    def parameter(self) -> nn.Parameter:
        """The layer's own weight.  Raises TypeError where the layer is not plain."""
        self.check(adds=False)
        return self.module.weight

    @property
    def weight(self) -> torch.Tensor:
        """W as a view (d_out, d_in) of the layer's own memory, without gradient.

        Raises TypeError where the layer is not plain.
        """
        return self.view(self.parameter.detach())

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """What belongs to W, (d_out, d_in), of a tensor in the layout of the layer's parameter."""
        tensor = tensor.t() if isinstance(self.module, Conv1D) else tensor
        return tensor if self.rows is None else tensor[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """b as a view (d_out,), without gradient; None where the layer has none."""
        if self.module.bias is None:
            return None
        bias = self.module.bias.detach()
        return bias if self.rows is None else bias[self.rows]

    @property
    def like(self) -> torch.Tensor:
        """A tensor with W's shape, type and device, for what is made to fit.  Where W cannot be read, its
        numbers are nothing, and its type is that of the layer's scales."""
        if not self.fault:
            return self.weight
        held = [*self.module.parameters(), *self.module.buffers()]
        numbers = [tensor.dtype for tensor in held if _is_number(tensor)] or [torch.float32]
        device = held[0].device if held else torch.device("cpu")
        return torch.empty((), dtype=numbers[0], device=device).expand(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in).  Raises TypeError for a module that is no linear map."""
        if self.fault:
            size = _size(self.module)
        else:
            size = tuple(self.module.weight.shape)
            size = size[::-1] if isinstance(self.module, Conv1D) else size
        if size is None:
            raise TypeError(f"{self.name}: expected a linear map, got {type(self.module).__name__}")
        return size if self.rows is None else (self.rows.stop - self.rows.start, size[1])


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One sub-layer of a block, attention or feed-forward network, with the residual sum around it.

    With x (..., d) its input on the residual stream, h (..., d) what it adds and D the residual dropout, a
    post-norm block goes on with norm(x + D(h)), and a pre-norm one, where h is computed from norm(x), with
    x + D(h).

    role: "self", "cross" or "ffn".  source: the module whose first argument is x.  out: the linear map that
    gives h.  dropout: D, None where it is not a module.  dropout_function: whether the block applies D as a
    function.  block: the transformer block that all of it is in.
    """

    stack: str
    layer: int
    role: str
    source: nn.Module
    out: Site
    dropout: nn.Module | None
    dropout_function: bool
    norm: nn.Module
    pre_norm: bool
    block: nn.Module

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.{self.role}"

    @property
    def width(self) -> int:
        """d."""
        return self.out.shape[0]


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention of a block.

    role: "self" or "cross".  module: the one that projects to queries, keys and values and attends.  key,
    value: its maps to them.  block: the transformer block that it is in.  looks_back: whether a token sees
    those before it alone.
    """

    stack: str
    layer: int
    role: str
    module: nn.Module
    key: Site
    value: Site
    block: nn.Module

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.{self.role}"

    @property
    def looks_back(self) -> bool:
        return self.role == "self" and (
            self.stack == "decoder" or getattr(self.module.config, "is_decoder", False)
        )


@dataclass(frozen=True, eq=False)
class Body:
    """The module of a stack that embeds the tokens and runs the blocks.

    width: d.  first: the position of a text's first token.  places: how many positions there are, None
    where they have no end.  follower: the body that attends to what this one gives, None where a head does.
    blocks: all of them, whatever the restriction.  closing: the norm behind the last, None where there is
    none.  names: where what is in a block.
    """

    stack: str
    module: nn.Module
    embedding: nn.Module
    width: int
    first: int
    places: int | None
    follower: nn.Module | None
    blocks: tuple[nn.Module, ...]
    closing: nn.Module | None
    names: Stack

    @property
    def room(self) -> float:
        """How many tokens a text may have."""
        return math.inf if self.places is None else self.places - self.first

    @property
    def like(self) -> torch.Tensor:
        """The `Site.like` of its first map, for what is made to fit its blocks."""
        return next(sites_in(self.blocks[0], self.names)).like


SUBLAYER_NAMES = ("self", "cross", "ffn", "attn")
ATTENTION_NAMES = ("self", "cross", "attn")


class Anatomy:
    """The places of a transformers model, found from its ``config.model_type``.

    Raises a ValueError that lists what is supported if the architecture is unknown, and one if weights are
    offloaded.
    """

    def __init__(self, model: PreTrainedModel):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model must be a transformers PreTrainedModel, got {type(model).__name__}; "
                "load one with guidelib.load_backbone or transformers' Auto classes"
            )
        self.model = model
        self.kind = model.config.model_type
        if self.kind not in ARCHITECTURES:
            raise ValueError(
                f"model: architecture {self.kind!r} is not supported; supported are "
                f"{', '.join(sorted(ARCHITECTURES))}; another one is a row of "
                "guidelib.core.architectures.ARCHITECTURES"
            )
        expect_weights(model)
        self.base = model.base_model
        self.restricted = False  # to some of the blocks
        self.planned: list[tuple[Any, Any]] = []  # what each Plan (method.py) is on this model
        self.stacks = {
            name: stack for name, stack in ARCHITECTURES[self.kind].items() if _find(self.base, stack.blocks)
        }
        self._layers: dict[str, tuple[int, ...]] = {
            name: tuple(range(len(_find(self.base, stack.blocks)))) for name, stack in self.stacks.items()
        }

    def restrict(self, layers: Layers = None, stack: str | None = None) -> Anatomy:
        """The same anatomy limited to some layers (negative numbers count from the top) and one stack.

        What was left out before stays out.  Raises ValueError for a layer or a stack that the model does not
        have, and where nothing is left.
        """
        if layers is stack is None:
            return self
        if stack is not None and stack not in self.stacks:
            raise ValueError(f"stack must be one of {', '.join(self.stacks)} for {self.kind}, got {stack!r}")
        kept = {name: inside for name, inside in self._layers.items() if stack in (None, name)}
        if layers is not None:
            wanted = [layers] if isinstance(layers, int) else list(layers)
            for name, inside in kept.items():
                depth = self.depth(name)
                bad = [n for n in wanted if type(n) is not int or not -depth <= n < depth]
                if bad or not wanted:
                    raise ValueError(
                        f"layers must be whole numbers from {-depth} to {depth - 1} for the {name}, "
                        f"got {bad or '()'}"
                    )
                chosen = {n % depth for n in wanted}
                kept[name] = tuple(n for n in inside if n in chosen)
        return self._limited(kept, f"layers {layers} of stack {stack}")

    def without_first(self, n: int) -> Anatomy:
        """The same anatomy without the layers 0 to n - 1 of each stack.

        Raises ValueError where nothing is left.
        """
        kept = {name: tuple(m for m in inside if m >= n) for name, inside in self._layers.items()}
        return self._limited(kept, f"all but the first {n} layers")

    def _limited(self, kept: dict[str, tuple[int, ...]], asked: str) -> Anatomy:
        kept = {name: inside for name, inside in kept.items() if inside}
        if not kept:
            there = ", ".join(f"{name} {list(inside)}" for name, inside in self._layers.items()) or "none"
            raise ValueError(f"{asked}: none of them is among {there}, to which the method is restricted")
        limited = object.__new__(Anatomy)
        limited.__dict__.update(self.__dict__, _layers=kept, restricted=True)
        return limited

    def blocks(self) -> Iterator[tuple[str, int, nn.Module]]:
        """(stack, layer, block) in order, within the restriction."""
        for name, layers in self._layers.items():
            blocks = _find(self.base, self.stacks[name].blocks)
            for layer in layers:
                yield name, layer, blocks[layer]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's own parameters by name: all of them, or those of the blocks within the restriction."""
        parameters = self.base_parameters()
        if not self.restricted:
            return parameters
        inside = {id(p) for _, _, block in self.blocks() for p in block.parameters()}
        return {name: p for name, p in parameters.items() if id(p) in inside}

    def linears(self, targets: Targets = "all", argument: str = "targets") -> list[Site]:
        """The linear maps that ``targets`` names, in order, each once.

        A target is a role (``q``, ``cross.v``, ``ffn.out`` ...) or a group (``attn``, ``self``, ``cross``,
        ``ffn``, ``all``).  Raises ValueError if one of them is unknown, or known but not in this model: a
        misspelt name beside a good one is never passed over.  ``argument`` is what the error calls them.
        """
        sites = (
            replace(site, stack=name, layer=layer)
            for name, layer, block in self.blocks()
            for site in sites_in(block, self.stacks[name])
        )
        return self._choose(argument, targets, TARGET_NAMES, sites, _matches)

    def sublayers(self, names: Targets = ("attn", "ffn")) -> list[Sublayer]:
        """The sub-layers that ``names`` lists, in order: ``self``, ``cross``, ``attn`` (both), ``ffn``.

        Raises ValueError if a name is unknown, or known but not in this model.
        """
        sublayers = (
            _sublayer(name, layer, role, block, self.stacks[name])
            for name, layer, block in self.blocks()
            for role, (norm, _) in self.stacks[name].ends.items()
            if _find(block, norm) is not None
        )
        return self._choose("sublayers", names, SUBLAYER_NAMES, sublayers, _stands_for)

    def _choose(self, argument, names, accepted, places, matches):
        """The places whose role one of ``names`` matches, once the names are known to be good."""
        names = (names,) if isinstance(names, str) else tuple(names)
        if not names:
            raise ValueError(f"{argument} is empty; give one or more of {', '.join(accepted)}")
        unknown = [name for name in names if name not in accepted]
        if unknown:
            raise ValueError(f"{argument}: unknown {unknown[0]!r}; accepted are {', '.join(accepted)}")
        places = list(places)  # not before the names are checked
        for name in names:
            if not any(matches(name, place.role) for place in places):
                present = ", ".join(sorted({place.role for place in places})) or "none that are known"
                raise ValueError(f"{argument}: {name!r} is not in this {self.kind} model; it has {present}")
        return [place for place in places if any(matches(name, place.role) for name in names)]

    def depth(self, stack: str) -> int:
        """How many blocks the stack has, whatever the restriction."""
        return len(_find(self.base, self.stacks[stack].blocks))

    def attentions(self, names: Targets = "attn") -> list[Attention]:
        """The attentions that ``names`` lists, in order: ``self``, ``cross``, ``attn`` (both).

        Raises ValueError if a name is unknown, or known but not in this model.
        """
        attentions = []
        for name, layer, block in self.blocks():
            sites = sites_in(block, self.stacks[name])
            sites = {site.role: replace(site, stack=name, layer=layer) for site in sites}
            for role in ("self", "cross"):
                if f"{role}.k" in sites:
                    inside = self.stacks[name].linears[f"{role}.k"].rpartition(".")[0]
                    maps = sites[f"{role}.k"], sites[f"{role}.v"]
                    attentions.append(Attention(name, layer, role, _find(block, inside), *maps, block))
        return self._choose("attentions", names, ATTENTION_NAMES, attentions, _stands_for)

    def bodies(self) -> dict[str, Body]:
        """The bodies of the stacks by name, within the restriction."""
        bodies = {name: _find(self.base, stack.body) for name, stack in self.stacks.items()}
        return {
            name: Body(
                stack=name,
                module=bodies[name],
                embedding=self.embedding,
                width=self.embedding.weight.shape[1],
                first=self.model.config.pad_token_id + 1 if self.kind in COUNT_FROM_PADDING else 0,
                places=_places(bodies[name]),
                follower=bodies.get("decoder") if name == "encoder" else None,
                blocks=tuple(_find(self.base, self.stacks[name].blocks)),
                closing=_find(bodies[name], closing) if (closing := self.stacks[name].closing) else None,
                names=self.stacks[name],
            )
            for name in self._layers
        }

    def norms(self) -> dict[str, nn.Parameter]:
        """Gains and biases of every normalisation layer (LayerNorm and the RMS variants) of the base, by
        parameter name."""
        return {
            f"{path}.{name}": parameter
            for path, module in self.model.named_modules()
            if type(module).__name__.endswith("Norm") and not path.startswith(f"{ADDED}.")
            for name, parameter in module.named_parameters(recurse=False)
        }

    def biases(self) -> dict[str, nn.Parameter]:
        """Every additive bias vector, by parameter name.  T5's relative position table is not one."""
        return {name: p for name, p in self.base_parameters().items() if name.split(".")[-1] == "bias"}

    @property
    def embedding(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def head(self) -> dict[str, nn.Parameter]:
        """The parameters of the task head, by name: what a new task starts from random weights.

        These are the task's own layers, and what else the checkpoint did not hold, so that transformers drew
        it: a pooler, say.  What it drew within the blocks or for the tokens is not among them.
        """
        names = self.task_head()
        parameters = self.base_parameters() if names or self.drawn else {}
        if self.drawn:
            stacks = [_find(self.base, stack.blocks) for stack in self.stacks.values()]
            inside = self._of_tokens() | {id(p) for stack in stacks for p in stack.parameters()}
            names |= {name for name in self.drawn if id(parameters[name]) not in inside}
        return {name: p for name, p in parameters.items() if name in names}

    def task_head(self) -> set[str]:
        """The names of the parameters of the task's own layers: what stands beside the backbone and a
        language model's head.  Empty for a bare backbone and for a language model."""
        if is_pretrained(self.model) or not self.stacks:
            return set()
        places = {self.embedding, self.model.get_output_embeddings()}
        places |= {_find(self.base, stack.blocks) for stack in self.stacks.values()}
        found = [*self.model.named_parameters(recurse=False)]
        for name, child in self.model.named_children():
            if name != ADDED and child is not self.base and not places & set(child.modules()):
                found += child.named_parameters(name)
        tied = self._of_tokens()
        return {name for name, p in found if id(p) not in tied}

    @cached_property
    def drawn(self) -> frozenset[str]:
        """The names of the parameters that were not loaded although others were: transformers drew them.

        None for a model that was not loaded from a checkpoint at all, and for a copy of one.
        """
        parameters = self.base_parameters()
        loaded = {name for name, p in parameters.items() if getattr(p, LOADED, False)}
        rest = parameters.keys() - loaded if loaded else ()
        return frozenset(n for n in rest if parameters[n].is_floating_point() and not parameters[n].is_meta)

    @property
    def predicts_next(self) -> bool:
        """Whether what it says at a token is held against the label of the next one, as in a decoder alone
        that models language."""
        config, head = self.model.config, self.model.get_output_embeddings()
        alone = head is not None and not config.is_encoder_decoder
        return alone and any(attention.looks_back for attention in self.attentions("self"))

    def named(self, names: str | Iterable[str]) -> set[str]:
        """The names of the parameters that ``names`` stand for: ``embedding`` (of the tokens), ``norms``,
        ``biases``, or the beginning of a parameter's name, with the backbone's own name or without.

        Raises TypeError for something else than names, ValueError for one that stands for nothing.
        """
        given, names = names, (names,) if isinstance(names, str) else names
        names = tuple(names) if isinstance(names, Iterable) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"also must be a name or several of them, got {given!r}")
        if not names:
            return set()
        groups = {"embedding": [*self.embedding.parameters()]}
        groups |= {"norms": self.norms().values(), "biases": self.biases().values()}
        parameters, found = self.base_parameters(), set()
        for name in names:
            if name in groups:
                ids = {id(p) for p in groups[name]}
                chosen = {n for n, p in parameters.items() if id(p) in ids}
            else:
                start = f"{name}.".replace("..", ".")
                starts = (start, f"{self.model.base_model_prefix}.{start}")
                chosen = {n for n in parameters if f"{n}.".startswith(starts)}
            if not chosen:
                raise ValueError(
                    f"also: {name!r} is nothing in this {self.kind} model; accepted are {', '.join(groups)}, "
                    f"or the beginning of a parameter's name, such as {next(iter(parameters))!r}"
                )
            found |= chosen
        return found

    def _of_tokens(self) -> set[int]:
        """The ids of the tables with a row for each token: of the input, and of a language model's output."""
        tables = (self.embedding, self.model.get_output_embeddings())
        return {id(table.weight) for table in tables if table is not None}

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the model itself, by name, without what guidelib added."""
        found: dict[nn.Parameter, str] = {}  # one that is shared has its first name
        for module, name in modules_of(self.model).items():
            if not name.startswith(ADDED + "."):
                for attribute, parameter in module._parameters.items():
                    if parameter is not None:
                        found.setdefault(parameter, name + attribute)
        return {name: parameter for parameter, name in found.items()}


ADDED = "guidelib"  # the one child module under which a method's own parameters live


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """Each module once, and the start of its parameters' names: ``named_modules`` in half the time."""
    found: dict[nn.Module, str] = {}

    def walk(module: nn.Module, start: str) -> None:
        if module not in found:
            found[module] = start
            for name, child in module._modules.items():
                if child is not None:
                    walk(child, f"{start}{name}.")

    walk(model, "")
    return found


def _find(module: nn.Module, paths: str) -> nn.Module | None:
    for path in paths.split("|"):
        try:
            return module.get_submodule(path)
        except AttributeError:
            continue
    return None


def _matches(name: str, role: str) -> bool:
    if name in GROUPS:
        return GROUPS[name](role)
    return name == role or (name in ATTENTION_ROLES and role.split(".")[-1] == name)


def sites_in(block: nn.Module, stack: Stack) -> Iterator[Site]:
    for role, path in stack.linears.items():
        path, _, part = path.partition("[")
        module = _find(block, path)
        if module is None:
            continue
        site = Site("", 0, role, module)
        if part:
            index, parts = (int(number) for number in part.rstrip("]").split("/"))
            size = site.shape[0] // parts
            site = replace(site, rows=slice(index * size, (index + 1) * size))
        yield site


PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear, Conv1D)


def fault_of(layer: nn.Module) -> str:
    """Why ``layer`` does not compute W x + b with a W and a b that it holds; empty if it does.

    A subclass may compute anything, and so may a function put in the place of ``forward``: only the types of
    PLAIN with their own ``forward`` and an ordinary weight are known not to.
    """
    name = type(layer).__name__
    if type(layer) not in PLAIN:
        return f"is of type {type(layer).__module__}.{type(layer).__qualname__}"
    weight, forward = layer._parameters.get("weight"), vars(layer).get("forward")
    if weight is None or computes(layer):
        return f"is a {name} whose weight is computed before each pass (weight_norm, spectral_norm, pruning)"
    if not (type(weight) is nn.Parameter or isinstance(weight, FakeTensor)) or not _is_number(weight):
        return f"is a {name} whose weight is a {type(weight).__name__} of {weight.dtype}"
    if _offloads(layer):
        return f"is a {name} whose weight accelerate offloads"
    if _hooks(layer) and all(hasattr(hook, "offload") for hook in _hooks(layer)):
        forward = getattr(forward, "__wrapped__", forward)  # what is around it only moves the input
    detour = getattr(forward, "__self__", None)
    if hasattr(detour, "around"):  # of this model's method (points/passes.py)
        forward = detour.own
    own = forward is None or getattr(forward, "__func__", None) is type(layer).forward
    return "" if own else f"is a {name} whose forward was replaced by another function"


def computes(module: nn.Module) -> bool:
    """Whether hooks of torch.nn.utils compute a parameter of ``module`` from others before each pass."""
    held = (name.rpartition("_") for name in module._parameters)
    return any(of in ("g", "v", "orig") and name in vars(module) for name, _, of in held)


def expect_numbers(parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise TypeError if one of them holds codes for numbers, which cannot be trained or moved."""
    for name, parameter in parameters.items():
        if not _is_number(parameter):
            raise TypeError(
                f"model: {name!r} is quantised ({parameter.dtype}); a method that trains or moves it accepts "
                "floating-point numbers of 16 bits or more"
            )


def _is_number(tensor: torch.Tensor) -> bool:
    """Whether it holds floating-point numbers of 16 bits or more, and no codes for them."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def _quantised(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear map of known size that does not hold its weight as plain numbers."""
    weight = getattr(layer, "weight", None)
    plain = type(weight) in (torch.Tensor, nn.Parameter, FakeTensor) and _is_number(weight)
    return not plain and _size(layer) is not None


def _size(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) as the layer says it; None if it does not."""
    for names in (("out_features", "in_features"), ("nf", "nx")):
        size = tuple(getattr(layer, name, None) for name in names)
        if all(isinstance(side, int) for side in size):
            return size
    return None


def _hooks(module: nn.Module) -> tuple:
    """What accelerate has put around the module's ``forward``."""
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _offloads(module: nn.Module) -> bool:
    """Whether accelerate takes the module's weights away between two passes."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def expect_weights(model: nn.Module) -> None:
    """Raise ValueError if accelerate takes some of the model's weights away between two passes."""
    name = next((name for module, name in modules_of(model).items() if _offloads(module)), None)
    if name is not None:
        raise ValueError(
            f"model: accelerate offloads the weights of {name[:-1]!r}, which are there only while it runs; "
            "take them back with accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )


def _places(body: nn.Module) -> int | None:
    """How many positions a learned table of the body has, without those that it skips (BART's first two)."""
    for name, module in body.named_modules():
        if isinstance(module, nn.Embedding) and name.split(".")[-1] in POSITION_TABLES:
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


def _stands_for(name: str, role: str) -> bool:
    return name == role or (name == "attn" and role != "ffn")


def _sublayer(stack: str, layer: int, role: str, block: nn.Module, places: Stack) -> Sublayer:
    first, last = ("ffn.in", "ffn.out") if role == "ffn" else (f"{role}.q", f"{role}.o")
    norm, dropout = places.ends[role]
    sites = {site.role: replace(site, stack=stack, layer=layer) for site in sites_in(block, places)}
    norm = block.get_submodule(norm)
    return Sublayer(
        stack=stack,
        layer=layer,
        role=role,
        source=norm if places.pre_norm else sites[first].module,
        out=sites[last],
        dropout=block.get_submodule(dropout) if dropout else None,
        dropout_function=dropout == "",
        norm=norm,
        pre_norm=places.pre_norm,
        block=block,
    )
