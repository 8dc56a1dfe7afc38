"""What attaching a method to a model gives.

``attach`` freezes a transformers model in place, plugs the method's parts in and returns an Attachment, which
counts, merges, saves and takes the method away again.  ``load`` does so from a file.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from guidelib.core.anatomy import ADDED, Anatomy, expect_weights, modules_of
from guidelib.core.bounds import Bounded
from guidelib.core.files import FORMAT, checksum, read, write
from guidelib.core.fingerprint import fingerprint
from guidelib.core.method import Method, Spec, expect, expect_seed, is_whole
from guidelib.core.points.choice import Choosing
from guidelib.core.points.part import Part, copied, put
from guidelib.core.points.passes import noted, notes, remember
from guidelib.core.values import has_values, mode_of

CARRIED = "_guidelib_attachment"  # of every module of the model: the attachment that it belongs to


@dataclass(frozen=True)
class Count:
    """Numbers of parameters; the task head is included in the first three.

    trainable: what the optimiser sees.  stored: what the per-task file holds.  changed: entries of the
    effective model that can differ from the base.  total: the base model with its head.  head, norms: how
    many of the trainable ones belong to the task head and to the base model's normalisation layers.
    """

    trainable: int
    stored: int
    changed: int
    total: int
    head: int
    norms: int

    def __str__(self) -> str:
        def share(n: int) -> str:
            return f"{n:,} ({100 * n / self.total:.3g} %)"

        return (
            f"trainable {share(self.trainable)}, stored {share(self.stored)}, changed {share(self.changed)} "
            f"of {self.total:,}; of the trainable ones {self.head:,} in the head, {self.norms:,} in norms"
        )


def attach(
    model: PreTrainedModel, method: Method, *, seed: int = 0, also: str | Iterable[str] = ()
) -> Attachment:
    """Freeze ``model`` in place, plug ``method`` in and train the task head with it.

    ``seed`` fixes the method's initial values; the random state of CPU and CUDA stays.  ``also`` names what
    else of the base to train in place, save and give back: "embedding", "norms", "biases", or the beginning
    of a parameter's name, such as "pooler" or "encoder.layer.3".  Warns of parameters that transformers drew
    at random, if they stay frozen.

    Returns the Attachment, which is also reachable as ``attached(model)``.  Raises TypeError or ValueError,
    and leaves the model as it was, for an unsupported model, something that is not a method, a target, layer
    or name that is not there, an impossible size, or a model that already carries a method, or shares layers
    with one that does (its backbone, or another head's).
    """
    expect_seed(seed)
    attachment = _attach(model, method, seed, also=also)
    frozen = sorted(attachment.anatomy.drawn - attachment._selected)
    if frozen:
        try:
            warnings.warn(
                f"{_several(frozen)} came with no checkpoint, so other random numbers may stand there in the "
                "model that this method is loaded onto; attach(..., also=...) trains and saves them",
                stacklevel=2,
            )
        except Warning:  # where warnings are errors
            attachment.detach()
            raise
    return attachment


def attach_saved(
    model: PreTrainedModel,
    method: Method,
    saved: Mapping[str, torch.Tensor],
    drawn: frozenset[str] = frozenset(),
) -> Attachment:
    """Attach ``method`` with the tensors of a file, by their names there: its parts', and those of the base
    that it trains.  drawn: see files.py.  Raises as `attach` does, and ValueError if a tensor is missing or
    does not fit."""
    return _attach(model, method, seed=0, saved=saved, drawn=drawn)


def attached(model: PreTrainedModel) -> Attachment:
    """The Attachment of ``model``.  Raises ValueError if nothing is attached."""
    if not hasattr(model, ADDED):
        raise ValueError("model carries no method; call guidelib.attach(model, method) first")
    return getattr(model, ADDED).attachment


def _attach(
    model: PreTrainedModel,
    method: Method,
    seed: int,
    also: str | Iterable[str] = (),
    saved: Mapping[str, torch.Tensor] | None = None,
    drawn: frozenset[str] | None = None,
) -> Attachment:
    """``saved``: the tensors of a file, of which those of the base say what is trained besides the method.
    drawn: what transformers had drawn of the model that it was saved from."""
    if not isinstance(method, Method):
        hint = f"; write {method.__name__}() to make one" if isinstance(method, type) else ""
        raise TypeError(f"method must be a guidelib method such as LoRA(r=8), got {method!r}{hint}")
    anatomy = Anatomy(model)
    if drawn is not None:
        anatomy.drawn = drawn
    _check_free(model)
    base = anatomy.base_parameters()
    if saved is None:
        selected = method.select(anatomy) | anatomy.head().keys() | anatomy.named(also)
    else:
        brought = base.keys() & saved.keys()
        selected = method.select(anatomy) | anatomy.task_head() | (brought - method.rewrites(anatomy))
    fork = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    bounded = Bounded(method, base, saved)
    try:
        with fork, mode_of(model), bounded:
            torch.manual_seed(seed)
            parts = sorted(method.parts(anatomy, saved or {}), key=lambda part: part.last)
    except BaseException:
        bounded.end()
        raise
    return Attachment(model, method, anatomy, parts, selected, method.rewrites(anatomy), saved)


def _plain(name: str) -> str:
    """The name of a parameter before torch's parametrizations took it, if they have."""
    return name.replace("parametrizations.", "").removesuffix(".original")


def _by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names, and by those that they had."""
    named = dict(model.named_parameters())
    return {_plain(name): p for name, p in named.items()} | named


def _several(names: list[str]) -> str:
    return repr(names[0]) + f" and {len(names) - 1} more" * (len(names) > 1)


def _check_free(model: PreTrainedModel) -> None:
    """Raise ValueError if a method is at work on ``model``, or on another model that has layers of it."""
    for name, module in model.named_modules():
        other = vars(module).get(CARRIED)
        if other is not None and other.active:
            if other.model is model:
                where = "model already"
            else:
                where = f"model: {name or 'all of it'} is shared with a {type(other.model).__name__}, which"
            raise ValueError(
                f"{where} carries {other.method!r}; detach() it first, or attach a sum of methods"
            )


class Attachment:
    """A method at work on a model.  Made by ``attach`` and ``load``.

    The method's own parameters live under ``model.guidelib``, so that optimisers, ``.to()`` and
    ``state_dict`` see them; the base model's keys stay what they were.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        anatomy: Anatomy,
        parts: list[Part],
        selected: set[str],
        rewritten: set[str],
        saved: Mapping[str, torch.Tensor] | None = None,
    ):
        self.model, self.method, self.anatomy = model, method, anatomy
        self.merged, self._merged_under = False, {}
        self._base: dict[str, str] | None = None
        self._layers = _layers(model)
        parameters = dict(model.named_parameters())
        self._flags = {name: p.requires_grad for name, p in parameters.items()}
        self._selected = selected
        self._originals = {name: parameters[name].detach().clone() for name in sorted(selected | rewritten)}
        gradients = {name: p.grad for name, p in parameters.items()}
        self._kept: dict[str, torch.Tensor] = {}  # of a merge: what stood there, by the parameter's name
        added = Added()
        added.attachment = self
        added.train(model.training)
        try:
            model.add_module(ADDED, added)
            for module in model.modules():
                vars(module)[CARRIED] = self  # for other models that have some of these layers
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in selected)
            self._plug(parts)
            if saved is not None:
                self._fill(saved)
        except BaseException:
            self._end()
            for name, gradient in gradients.items():
                parameters[name].grad = gradient
            raise

    @property
    def parts(self) -> list[Part]:
        """The parts in the order in which they were plugged in.  Raises ValueError if this attachment has
        ended."""
        self._check_active()
        return list(getattr(self.model, ADDED).values())

    def parts_of(self, method: Method) -> list[Part]:
        """The parts that ``method`` made: this attachment's or, of a sum, a member's."""
        return [part for part in self.parts if part.method is method]

    def _plug(self, parts: list[Part]) -> None:
        added = getattr(self.model, ADDED)
        _check_order(parts)
        for part in parts:
            name, n = part.name, 2
            while name in added:
                name, n = f"{part.name}_{n}", n + 1
            part.name = name
            part.train(self.model.training)
            added[name] = part
            part.plug()
        torch.compiler.reset()
        _check_closed(self.model, parts)

    def count(self) -> Count:
        """The three counts and what they include."""
        self.check()
        trainable = {name: p.numel() for name, p in self.model.named_parameters() if p.requires_grad}
        norms, base = self.anatomy.norms(), self.anatomy.base_parameters().values()
        changed = _changed(self.parts, {id(p): p.shape[-1] for p in base if p.dim()})
        return Count(
            trainable=sum(trainable.values()),
            stored=sum(tensor.numel() for tensor in self.state().values()),
            changed=changed + sum(self._originals[name].numel() for name in self._selected),
            total=sum(p.numel() for p in base),
            head=sum(p.numel() for name, p in self.anatomy.head().items() if name in self._selected),
            norms=sum(n for name, n in trainable.items() if name in norms),
        )

    @property
    def mergeable(self) -> bool:
        """Whether the method's effect can be written into the base weights."""
        return all(part.mergeable for part in self.parts)

    def merge(self, *, permanent: bool = False) -> None:
        """Write the method into the base weights; the model then runs exactly the base's operations.

        A copy of the base weights is kept, and ``unmerge`` puts it back bit for bit.  With ``permanent``
        nothing is kept: the model becomes an ordinary transformers model with the new weights, and this
        attachment ends. Raises ValueError, with the model as it was, if a part of the method cannot be
        merged.
        """
        self._check_attached()
        fixed = next((part for part in self.parts if not part.mergeable), None)
        if fixed is not None:
            raise ValueError(f"{type(self.method).__name__} cannot be merged: {fixed.name}: {fixed.why_not}")
        if not self.merged:
            try:
                self._unmerge_weights()  # of a merge that not even its clearing up got to the end of
                for part in self.parts:
                    part.merge(self._keep)
                for part in self.parts:
                    part.unplug()
                self._merged_under = notes()  # such as which of several adapters
                self.merged = True
                torch.compiler.reset()  # what is compiled does not see that hooks are gone, or have come
            except BaseException:
                self._act_beside()
                raise
        if permanent:
            _surely(partial(self._end, merged=True))

    def unmerge(self) -> None:
        """Put the base weights back, bit for bit, and let the method act beside them again."""
        self._check_attached()
        if self.merged or self._kept:
            _surely(self._act_beside)

    def detach(self) -> PreTrainedModel:
        """Take the method away and give the base model back, bit for bit, head and ``requires_grad``
        included.  What was resized meanwhile keeps its size.  Warns of what was unfrozen after ``attach``,
        which stays as it is."""
        self._check_attached(resized=True)
        if unknown := self._unknown():
            warnings.warn(
                f"{_several(unknown)} was unfrozen after attach, which kept no copy: it stays as it is now",
                stacklevel=2,
            )
        _surely(self._end)
        return self.model

    def _keep(self, parameter: nn.Parameter) -> None:
        """Called before a merge writes to ``parameter``."""
        # by name, since accelerate exchanges the objects when it offloads
        name = next(name for name, p in self.model.named_parameters() if p is parameter)
        if name not in self._kept:
            self._kept[name] = copied(parameter)

    def _unmerge_weights(self) -> None:
        parameters = _by_name(self.model)
        for name, kept in self._kept.items():
            if name in parameters:  # or its layer was taken out meanwhile
                put(parameters[name], kept)

    # The next two lead to their end from wherever they, or a merge, have got to, so that one that was
    # interrupted is done again.

    def _act_beside(self) -> None:
        """The base weights as they were, and the parts at work in their order, on which sums of floats
        depend."""
        self._unmerge_weights()
        for part in self.parts:
            part.unplug()
        for part in self.parts:
            part.plug()
        torch.compiler.reset()
        self.merged = False
        self._kept = {}

    def _end(self, merged: bool = False) -> None:
        """Nothing of the method is left but, with ``merged``, its effect."""
        if not hasattr(self.model, ADDED):
            return
        for part in self.parts:
            part.unplug()
        parameters = _by_name(self.model)
        if not merged:
            self._unmerge_weights()
            for part in self.parts:
                part.restore()
            for name in self._originals.keys() & parameters.keys():
                put(parameters[name], self._originals[name])
        for name in self._flags.keys() & parameters.keys():  # a layer may have been taken out meanwhile
            parameters[name].requires_grad_(self._flags[name])
            parameters[name].grad = None
        for module in self.model.modules():
            vars(module).pop(CARRIED, None)
        torch.compiler.reset()
        delattr(self.model, ADDED)
        self._kept, self._originals = {}, {}

    @property
    def active(self) -> bool:
        """Whether the method is still on the model: neither detached nor merged for good."""
        return getattr(getattr(self.model, ADDED, None), "attachment", None) is self

    def _check_active(self) -> None:
        if not self.active:
            raise ValueError(
                "this attachment has ended (detached, or merged for good); attach the method again"
            )

    def _check_attached(self, *, resized: bool = False) -> None:
        """Raise ValueError unless the method is there and, but for ``resized``, its base is what it was.
        ``resize_token_embeddings`` gives a layer another size, or puts another one in the place of a head."""
        self._check_active()
        layers, there = _layers(self.model), modules_of(self.model)
        for name, was in () if resized else self._layers.items():
            now = layers.get(name)
            if now is None and was[0] in there:
                continue  # the layer computes it now, by torch's parametrizations
            if now != was:
                into = "by nothing" if now is None else f"from {tuple(was[1])} to {tuple(now[1])}"
                raise ValueError(
                    f"model: {name} was resized or replaced after {type(self.method).__name__} was attached, "
                    f"{into}; detach() and attach again"
                )
        expect_weights(self.model)  # or what is written to the base would be lost

    def check(self) -> None:
        """Raises ValueError if this attachment has ended, or if something is trained that it does not know
        of, and could neither save nor give back."""
        self._check_attached()
        if unknown := self._unknown():
            raise ValueError(
                f"model: {_several(unknown)} must stay frozen after attach, which saves and gives back what "
                "it knows of; name it in attach(..., also=...) to train it"
            )

    def _unknown(self) -> list[str]:
        """The names of the base's parameters that were unfrozen after ``attach``."""
        parameters = self.anatomy.base_parameters().items()
        known = self._originals
        return [n for n, p in parameters if p.requires_grad and n not in known and _plain(n) not in known]

    def state(self) -> dict[str, torch.Tensor]:
        """What a file holds: the added tensors, and the base parameters that are changed in place.  Raises
        ValueError if this attachment has ended."""
        self._check_active()
        added = getattr(self.model, ADDED)
        lasting = added.state_dict().keys()  # buffers that are not persistent can be made again
        named = (*added.named_parameters(), *added.named_buffers())  # a shared parameter is named once
        tensors = {f"{ADDED}.{name}": tensor for name, tensor in named if name in lasting}
        tensors |= {name: self.model.get_parameter(name) for name in self._originals}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def _fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over the values of a file.  Raises ValueError if one is missing, or does not fit."""
        state = self.state()
        for name in sorted(state.keys() | tensors.keys()):
            problem = _misfit(state.get(name), tensors.get(name))
            if problem:
                raise ValueError(f"tensor {name!r} {problem}")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])

    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self.anatomy, self._originals.keys())

    def keep_fingerprint(self) -> None:
        """Let later files speak of the base as it is now: to be called before its weights go."""
        self._base = self._base or self._fingerprint()

    def metadata(self) -> dict[str, str]:
        """What a file says of itself: the format, the method, a fingerprint of the base, and a checksum."""
        return self._metadata(self.state())

    def _metadata(self, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
        said = {
            "format": FORMAT,
            "method": json.dumps(self.method.to_json()),
            "base": json.dumps(self._base or self._fingerprint()),
        }
        if drawn := self.anatomy.head().keys() - self.anatomy.task_head():
            said["drawn"] = json.dumps(sorted(drawn))
        return said | {"checksum": checksum(state, said)}

    def save(self, path: str | os.PathLike) -> Path:
        """Write the method, its tensors and a fingerprint of the base to a safetensors file.

        The file appears whole or not at all.  Raises FileNotFoundError if the folder is missing, OSError if
        the file cannot be written, ValueError for NaN or infinity, or if a parameter was unfrozen after
        ``attach``.
        """
        self.check()
        merged = self.merged
        if merged:  # or base weights that the file holds would have the method's effect in them as well
            self.unmerge()
        try:
            state = self.state()
            return write(path, state, self._metadata(state))
        finally:
            if merged:
                with noted(self._merged_under):
                    self.merge()


class Added(nn.ModuleDict):
    """The one child module under which the parts are."""

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """What several parts share, which ``save_pretrained`` then writes once."""
        named = [*self.named_parameters(remove_duplicate=False)]
        often = Counter(id(p) for _, p in named)
        return {re.escape(name): name for name, p in named if often[id(p)] > 1}

    def _replicate_for_data_parallel(self) -> nn.Module:
        """Called by ``torch.nn.DataParallel`` for each device but the model's own."""
        if not self.attachment.merged and len(self):
            # the parts of a replica would be those of the first device
            raise RuntimeError(
                f"model: {type(self.attachment.method).__name__} cannot act in the replicas that "
                "torch.nn.DataParallel makes; start one process for each device, with torchrun or accelerate"
            )
        return super()._replicate_for_data_parallel()


def _surely(action: Callable[[], None]) -> None:
    """Do it; if it is interrupted, do it all the same, from the start, and raise then."""
    try:
        action()
    except BaseException:
        action()
        raise


def _check_order(parts: list[Part]) -> None:
    """Raise ValueError if the parts, in this order, would compute something else than they merge to."""
    there: dict[int, list[tuple[Any, Part]]] = {}  # by parameter
    for part in parts:
        for parameter, rows in dict.fromkeys((*part.places, *part.acts_on)):
            others = there.setdefault(parameter, [])
            for other in (p for r, p in others if r is None or rows is None or r == rows):
                mine, its = type(part.method).__name__, type(other.method).__name__
                if part.first or (part.reads and not other.inside):
                    raise ValueError(
                        f"method: {mine} must stand first at {part.place}, since it reads the base weight; "
                        f"{its} acts there before it"
                    )
                if part.inside and other.reads:
                    raise ValueError(
                        f"method: {mine} must stand before {its}, which reads the weight of {other.place} as "
                        "it finds it"
                    )
            others.append((rows, part))


def _check_closed(model: PreTrainedModel, parts: list[Part]) -> None:
    """Raise ValueError if something is trained where a part lets no gradient through."""
    for part in parts:
        if not part.closed:
            continue
        mine, closed = f"method: {type(part.method).__name__}", {*part.closed}
        for other in parts:
            trained = any(p.requires_grad for p in other.parameters())
            if other is not part and trained and other.acts_in(closed):
                its = type(other.method).__name__
                raise ValueError(
                    f"{mine} runs the backbone without gradients, in which {its} at {other.place} could not "
                    "be trained; attach one of the two"
                )
        open_to = {id(p) for m in model.modules() if m not in closed for p in m._parameters.values()}
        named = model.named_parameters()
        names = [name for name, p in named if p.requires_grad and id(p) not in open_to]
        if names:
            raise ValueError(
                f"{mine} runs the backbone without gradients, in which {_several(names)} could not be trained"
            )


def _changed(parts: list[Part], widths: Mapping[int, int]) -> int:
    """How many entries of the effective model the parts can make differ from the base, each counted once.
    widths: the last dimension of each parameter, by its id."""
    whole: dict[int, dict[Any, int]] = {}  # of each parameter, by rows
    few: dict[int, list[torch.Tensor]] = {}
    for part in parts:
        for (parameter, rows), n in part.places.items():
            by_rows = whole.setdefault(parameter, {})
            if isinstance(n, torch.Tensor):
                few.setdefault(parameter, []).append(n)
            else:
                by_rows[rows] = max(n, by_rows.get(rows, 0))
    total = 0
    for parameter, by_rows in whole.items():
        chosen = [tensor for tensor in few.get(parameter, ()) if not by_rows.get(None)]
        for start, stop in (rows for rows, n in by_rows.items() if rows is not None and n):
            # these are counted already; a fused map has its outputs in the last dimension
            for i, index in enumerate(chosen):
                if has_values(index):
                    at = index % widths[parameter]
                    chosen[i] = index[(at < start) | (at >= stop)]
        if len(chosen) > 1 and all(map(has_values, chosen)):
            chosen = [torch.cat(chosen).unique()]
        total += by_rows.get(None) or sum(by_rows.values()) + sum(map(len, chosen))
    return total


@contextmanager
def using(model: PreTrainedModel, ids: int | Sequence[int], *, num_beams: int = 1) -> Iterator[None]:
    """Within the block, example i of each batch uses the adapter, prompt or prefix ``ids[i]``; a single
    number is for all of them.

    num_beams: in generation with beams, as many as ``generate`` is given; the beams of an example use its
    adapter.  The choice is that of the passes in this thread; others may choose otherwise at the same time.

    Raises ValueError if what is attached has one of each alone, or is merged, or an id is none of its; and
    the model does if a batch has another number of examples.
    """
    attachment = attached(model)
    several = [m for part in attachment.parts for m in part.modules() if isinstance(m, Choosing)]
    accepted = "one with FLoRA attached, or with several prompts or prefixes"
    expect(bool(several), "model", f"one that carries {attachment.method!r}", accepted)
    expect(not attachment.merged, "model", "a merged one", "unmerged; call unmerge() first")
    expect(is_whole(num_beams), "num_beams", num_beams, "a whole number of at least 1")
    tasks = min(module.tasks for module in several)
    given, ids = ids, ids.tolist() if hasattr(ids, "tolist") else ids
    single = isinstance(ids, int)
    listed = [ids] if single else list(ids) if isinstance(ids, Sequence) else []
    right = bool(listed) and all(is_whole(i, 0) and i < tasks for i in listed)
    expect(right, "ids", given, f"a number from 0 to {tasks - 1}, or one for each example")
    choice = (ids if single else torch.tensor(listed)), num_beams
    remember(model)
    with noted({module: choice for module in several}):
        yield


def load(model: PreTrainedModel, path: str | os.PathLike, *, any_weights: bool = False) -> Attachment:
    """Attach the method that ``path`` holds to a fresh base model and fill in its trained values.

    The base may be in another type than the one that the method was trained on.  ``any_weights`` accepts one
    of the same shapes with other weights: what the model then computes is not what was trained.

    Raises FileNotFoundError if there is no file, ValueError if it is damaged, not guidelib's, or of another
    backbone; the model is then as it was.
    """
    path, anatomy = Path(path), Anatomy(model)
    _check_free(model)
    method, tensors, drawn = read(anatomy, path, any_weights=any_weights)
    try:
        method = Spec.from_json(method)
        if not isinstance(method, Method):
            raise TypeError(f"{method!r} is no method")
    except (TypeError, OverflowError, RecursionError) as error:  # not even the fields of a method
        raise ValueError(f"path: {path.name!r} is damaged: {_short(error)}") from error
    except ValueError as error:
        raise ValueError(f"path: {path.name!r} does not fit: {_short(error)}") from error
    try:
        return attach_saved(model, method, tensors, drawn)
    except (OverflowError, RecursionError) as error:
        raise ValueError(f"path: {path.name!r} is damaged: {_short(error)}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"path: {path.name!r} does not fit: {_short(error)}") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())  # one line
    return text if len(text) <= 400 else f"{text[:400]} ..."


FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def _misfit(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> str | None:
    """Why the values of a file cannot be taken over."""
    if mine is None or theirs is None:
        return "is missing" if theirs is None else "is unknown"
    if mine.shape != theirs.shape:
        return f"is misshapen: {tuple(theirs.shape)}, where {tuple(mine.shape)} is expected"
    if mine.dtype == theirs.dtype:
        return None
    if not {mine.dtype, theirs.dtype} <= FLOATS:
        return f"is of type {theirs.dtype}, where {mine.dtype} is expected"
    finite = theirs.to(mine.dtype).isfinite().all()
    return None if finite else f"has numbers that are too large for {mine.dtype}"


def _layers(model: PreTrainedModel) -> dict[str, tuple[nn.Module, torch.Size]]:
    """Of each parameter, by name, the layer that it belongs to and its shape."""
    return {
        name + attribute: (module, parameter.shape)
        for module, name in modules_of(model).items()
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    }
