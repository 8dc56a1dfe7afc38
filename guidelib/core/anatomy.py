"""Where things are in a backbone: from the roles a paper speaks of to the modules transformers has.

A method asks for roles (``q``, ``ffn.out``, ``norms`` ...), never for module names.  Those stand in
architectures.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from guidelib.core.architectures import (
    ARCHITECTURES,
    ATTENTION_ROLES,
    GROUPS,
    HEADS,
    TARGET_NAMES,
    Stack,
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

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.{self.role}"

    @property
    def weight(self) -> torch.Tensor:
        """W as a view (d_out, d_in) of the layer's own memory, without gradient."""
        weight = self.module.weight.detach()
        weight = weight.t() if isinstance(self.module, Conv1D) else weight
        return weight if self.rows is None else weight[self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """b as a view (d_out,), without gradient; None where the layer has none."""
        if self.module.bias is None:
            return None
        bias = self.module.bias.detach()
        return bias if self.rows is None else bias[self.rows]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return tuple(self.weight.shape)


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One sub-layer of a block, attention or feed-forward network, with the residual sum around it.

    With x (..., d) its input on the residual stream, h (..., d) what it adds and D the residual dropout, a
    post-norm block goes on with norm(x + D(h)), and a pre-norm one, where h is computed from norm(x), with
    x + D(h).

    role: "self", "cross" or "ffn".  source: the module whose first argument is x.  out: the linear map that
    gives h.  dropout: D, None where it is not a module.  dropout_function: whether the block applies D as a
    function.
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

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.layer}.{self.role}"

    @property
    def width(self) -> int:
        """d."""
        return self.out.shape[0]


SUBLAYER_NAMES = ("self", "cross", "ffn", "attn")


class Anatomy:
    """The places of a transformers model, found from its ``config.model_type``.

    Raises a ValueError that lists what is supported if the architecture is unknown.
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
        self.base = model.base_model
        self.restricted = False  # to some of the blocks
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
                depth = len(_find(self.base, self.stacks[name].blocks))
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

    def linears(self, targets: Targets = "all") -> list[Site]:
        """The linear maps that ``targets`` names, in order, each once.

        A target is a role (``q``, ``cross.v``, ``ffn.out`` ...) or a group (``attn``, ``self``, ``cross``,
        ``ffn``, ``all``).  Raises ValueError if one of them is unknown, or known but not in this model: a
        misspelt name beside a good one is never passed over.
        """
        sites = (
            replace(site, stack=name, layer=layer)
            for name, layer, block in self.blocks()
            for site in _sites(block, self.stacks[name])
        )
        return self._choose("targets", targets, TARGET_NAMES, sites, _matches)

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

    def attentions(self) -> Iterator[tuple[str, int, str, nn.Module]]:
        """(stack, layer, "self" or "cross", attention module) in order, within the restriction."""
        for name, layer, block in self.blocks():
            for kind, path in self.stacks[name].attention.items():
                if (attention := _find(block, path)) is not None:
                    yield name, layer, kind, attention

    def norms(self) -> dict[str, nn.Parameter]:
        """Gains and biases of every normalisation layer (LayerNorm and the RMS variants), by parameter
        name."""
        return {
            f"{path}.{name}": parameter
            for path, module in self.model.named_modules()
            if type(module).__name__.endswith("Norm")
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

        Empty for a bare backbone and for a language-model head, which is pretrained.
        """
        return {
            f"{child}.{name}": parameter
            for child in HEADS
            if hasattr(self.model, child)
            for name, parameter in getattr(self.model, child).named_parameters()
        }

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter of the model itself, by name, without what guidelib added."""
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(ADDED + ".")}


ADDED = "guidelib"  # the one child module under which a method's own parameters live


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


def _sites(block: nn.Module, stack: Stack) -> Iterator[Site]:
    for role, path in stack.linears.items():
        path, _, part = path.partition("[")
        module = _find(block, path)
        if module is None:
            continue
        if not isinstance(module, nn.Linear | Conv1D):
            raise TypeError(f"{role}: expected a Linear or Conv1D layer, got {type(module).__name__}")
        rows = None
        if part:
            index, parts = (int(number) for number in part.rstrip("]").split("/"))
            size = module.nf // parts
            rows = slice(index * size, (index + 1) * size)
        yield Site("", 0, role, module, rows)


def _stands_for(name: str, role: str) -> bool:
    return name == role or (name == "attn" and role != "ffn")


def _sublayer(stack: str, layer: int, role: str, block: nn.Module, places: Stack) -> Sublayer:
    first, last = ("ffn.in", "ffn.out") if role == "ffn" else (f"{role}.q", f"{role}.o")
    norm, dropout = places.ends[role]
    sites = {site.role: replace(site, stack=stack, layer=layer) for site in _sites(block, places)}
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
    )
