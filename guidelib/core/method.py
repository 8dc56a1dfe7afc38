"""Methods as values.

A Method is a frozen dataclass of hyper-parameters; ``a + b`` composes two, ``m.on(layers=..., stack=...)``
restricts one.  ``attach`` in attaching.py puts one to work on a model.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

import guidelib
from guidelib.core.anatomy import ADDED, Anatomy, Layers


def expect(condition: bool, argument: str, value: object, accepted: str) -> None:
    """Raise ValueError naming the argument, its value and what would be accepted, unless ``condition``
    holds."""
    if not condition:
        raise ValueError(f"{argument} must be {accepted}, got {value!r}")


def is_whole(value: object, least: int = 1) -> bool:
    """Whether it is a whole number of at least ``least``; True and False are no numbers."""
    return type(value) is int and value >= least


def expect_seed(seed: object, bits: int = 63) -> None:
    """Raise ValueError unless a generator takes it: numpy's have 32 bits, torch's 63 and a sign."""
    right = is_whole(seed, 0) and seed < 2**bits
    expect(right, "seed", seed, f"a whole number from 0 to 2**{bits} - 1")


LARGEST = sys.float_info.max


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


class Spec:
    """A value that a file can hold: a frozen dataclass, written as its class name and fields."""

    def to_json(self) -> dict[str, Any]:
        return {"type": type(self).__name__} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @staticmethod
    def from_json(value: Any) -> Any:
        """The inverse of ``to_json``.  Raises ValueError for a class or field that guidelib does not have."""
        if isinstance(value, list):
            return tuple(Spec.from_json(item) for item in value)
        if not isinstance(value, dict):
            return value
        arguments = dict(value)
        name = arguments.pop("type", None)
        kind = getattr(guidelib, name) if name in guidelib.__all__ else None
        if not (isinstance(kind, type) and issubclass(kind, Spec)):
            raise ValueError(f"method {name!r} is unknown to guidelib {guidelib.__version__}")
        unknown = arguments.keys() - {field.name for field in fields(kind)}
        if unknown:
            raise ValueError(f"method {name}: {min(unknown)!r} is unknown to guidelib {guidelib.__version__}")
        return kind(**{key: Spec.from_json(item) for key, item in arguments.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, list | tuple | range | set | frozenset):
        return [_plain(item) for item in value]
    return value


class Attached(Protocol):
    """What a method may ask of the model that it is attached to; ``attach`` in attaching.py gives one."""

    model: Any
    anatomy: Anatomy
    parts: list[Any]

    def parts_of(self, method: Method) -> list[Any]:
        """The parts that ``method`` made, also where it is a member of a sum."""


@dataclass(frozen=True)
class Method(Spec):
    """Hyper-parameters of a method, and what it does with a model.

    ``parts`` says what is added and where; ``select`` which base parameters are trained in place.  The five
    phase functions are called by ``fit``; most methods need none of them.

    density: of the numbers that it makes, the share that a file holds at least.
    """

    density: ClassVar[float] = 1.0

    def several(self, field: str, what: str = "role") -> None:
        """Make a tuple of what stands in ``field``, one name or several, so that equal names make equal
        methods.  For ``__post_init__``; raises ValueError for anything else."""
        names = getattr(self, field)
        right = isinstance(names, Iterable)
        each = () if not right else (names,) if isinstance(names, str) else tuple(names)
        right = right and all(isinstance(name, str) for name in each)
        expect(right, field, names, f"a {what} or several of them")
        object.__setattr__(self, field, each)

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[nn.Module]:
        """The parts (points/part.py) to plug in, in order, built without touching the model.

        ``saved`` holds the tensors of a file when the method is loaded from one, for parts whose shapes
        depend on data (the indices of a mask); it is empty otherwise.
        """
        raise NotImplementedError

    def select(self, anatomy: Anatomy) -> set[str]:
        """The names of base parameters to train in place."""
        return set()

    def rewrites(self, anatomy: Anatomy) -> set[str]:
        """The names of base parameters that the method itself writes to while it trains, without gradient."""
        return set()

    def prepare(self, attachment: Attached, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Called once before training, with batches of the training data (a mask's scores, say)."""

    def rates(self, attachment: Attached) -> dict[nn.Parameter, float]:
        """Learning rates of its own for some of the parameters, which then have no weight decay."""
        return {}

    def regularizer(self, attachment: Attached) -> torch.Tensor | None:
        """A scalar to add to every step's loss, or None."""
        return None

    def batch_loss(
        self, attachment: Attached, batch: Mapping[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor | None:
        """A scalar to add to the loss of one batch, or None; ``outputs`` is what the model gave for it."""
        return None

    def loss_terms(
        self, attachment: Attached, batch: Mapping[str, torch.Tensor], outputs: Any
    ) -> list[torch.Tensor]:
        """What is added to the loss of one batch: of the two terms above those that there are."""
        terms = self.regularizer(attachment), self.batch_loss(attachment, batch, outputs)
        return [term for term in terms if term is not None]

    def after_step(
        self, attachment: Attached, step: int, total: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called after each optimiser step, the first is 1, before the gradients are cleared."""

    def lr_factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by after ``step`` steps, besides the usual schedule."""
        return 1.0

    def finish(self, attachment: Attached) -> None:
        """Called once after training."""

    def __add__(self, other: Method) -> Method:
        if not isinstance(other, Method):
            return NotImplemented
        mine, theirs = ((m.methods if isinstance(m, Sum) else (m,)) for m in (self, other))
        return Sum((*mine, *theirs))

    def on(self, layers: Layers = None, stack: str | None = None) -> Method:
        """This method on some layers (numbers; negative ones count from the top) and one stack only."""
        return On(copy.deepcopy(self), layers, stack)  # a copy: one method at two places is two methods


def within(value: Any) -> Iterator[Method]:
    """The methods that a method is made of, itself included."""
    if isinstance(value, Method):
        yield value
        planned = isinstance(value, Plan)  # what it is made of depends on the model
        made = (value.method,) if isinstance(value, Expression) and not planned else ()
        value = (*(getattr(value, field.name) for field in fields(value)), *made)
    for member in value if isinstance(value, tuple) else ():
        yield from within(member)


@dataclass(frozen=True)
class Sum(Method):
    """Several methods on one model, plugged in one after the other."""

    methods: tuple[Method, ...]

    def __post_init__(self):
        right = isinstance(self.methods, tuple) and all(isinstance(m, Method) for m in self.methods)
        expect(right, "methods", self.methods, "a tuple of methods")
        apart: list[Method] = []
        there: set[int] = set()
        for method in self.methods:  # one method at two places is two methods
            shared = any(id(m) in there for m in within(method))
            apart.append(copy.deepcopy(method) if shared else method)
            there |= {id(m) for m in within(apart[-1])}
        object.__setattr__(self, "methods", tuple(apart))

    @property
    def density(self):
        return min((method.density for method in self.methods), default=1.0)

    def parts(self, anatomy, saved):
        parts = []
        for method in self.methods:
            parts += method.parts(anatomy, _own(saved, parts))
        return parts

    def select(self, anatomy):
        return set().union(*(method.select(anatomy) for method in self.methods))

    def rewrites(self, anatomy):
        return set().union(*(method.rewrites(anatomy) for method in self.methods))

    def prepare(self, attachment, batches):
        for method in self.methods:
            method.prepare(attachment, batches)

    def rates(self, attachment):
        return {p: rate for method in self.methods for p, rate in method.rates(attachment).items()}

    def regularizer(self, attachment):
        terms = [term for method in self.methods if (term := method.regularizer(attachment)) is not None]
        return sum(terms) if terms else None

    def batch_loss(self, attachment, batch, outputs):
        terms = [method.batch_loss(attachment, batch, outputs) for method in self.methods]
        terms = [term for term in terms if term is not None]
        return sum(terms) if terms else None

    def after_step(self, attachment, step, total, optimizer):
        for method in self.methods:
            method.after_step(attachment, step, total, optimizer)

    def lr_factor(self, step, total):
        return math.prod({method.lr_factor(step, total) for method in self.methods})  # equal ones are one

    def finish(self, attachment):
        for method in self.methods:
            method.finish(attachment)


def _own(saved: Mapping[str, torch.Tensor], parts: list[Any]) -> Mapping[str, torch.Tensor]:
    """The tensors of a file as a method knows them whose parts come behind ``parts``.  The third part that is
    called p has the name p_3 in the file: to the method that makes it, it is the first, p."""
    before, own = Counter(part.name for part in parts), {}
    for name, tensor in saved.items():
        added, _, rest = name.partition(".")
        part, _, rest = rest.partition(".")
        start, _, number = part.rpartition("_")
        if not (number.isdecimal() and start in before):
            start, number = part, 1
        place = int(number) - before[start]  # of a part that no other precedes, what it is called
        if added != ADDED or start not in before:
            own[name] = tensor
        elif place > 0:
            own[f"{added}.{start}{f'_{place}' if place > 1 else ''}.{rest}"] = tensor
    return own


class Delegate(Method):
    """Base of the methods that hand their phases on to another one."""

    method: Method

    @property
    def density(self):
        return self.method.density

    def inner(self, anatomy: Anatomy) -> Method:
        """The other one, on a model with that anatomy."""
        return self.method

    def prepare(self, attachment, batches):
        self.inner(attachment.anatomy).prepare(attachment, batches)

    def rates(self, attachment):
        return self.inner(attachment.anatomy).rates(attachment)

    def regularizer(self, attachment):
        return self.inner(attachment.anatomy).regularizer(attachment)

    def batch_loss(self, attachment, batch, outputs):
        return self.inner(attachment.anatomy).batch_loss(attachment, batch, outputs)

    def after_step(self, attachment, step, total, optimizer):
        self.inner(attachment.anatomy).after_step(attachment, step, total, optimizer)

    def lr_factor(self, step, total):
        return self.method.lr_factor(step, total)

    def finish(self, attachment):
        self.inner(attachment.anatomy).finish(attachment)


@dataclass(frozen=True)
class Wrapper(Delegate):
    """A method around another one."""

    method: Method

    def __post_init__(self):
        expect(isinstance(self.method, Method), "method", self.method, "a method such as LoRA()")


class Expression(Delegate):
    """Base of the methods that are an expression of others.  A subclass is a dataclass of hyper-parameters
    and says in ``expression`` what they make."""

    def __post_init__(self):
        object.__setattr__(self, "method", self.expression())  # one for all phases

    def expression(self) -> Method:
        raise NotImplementedError

    def parts(self, anatomy, saved):
        return self.inner(anatomy).parts(anatomy, saved)

    def select(self, anatomy):
        return self.inner(anatomy).select(anatomy)

    def rewrites(self, anatomy):
        return self.inner(anatomy).rewrites(anatomy)


class Plan(Expression):
    """Base of the methods that are an expression of others which depends on the model, on how many layers it
    has, say.  A subclass is a dataclass of hyper-parameters and says in ``plan`` what they make there.

    Of methods that shape the learning rate it makes none: ``lr_factor`` knows of no model.
    """

    density: ClassVar[float] = 1.0

    def __post_init__(self):
        """There is nothing to make yet."""

    def plan(self, anatomy: Anatomy) -> Method:
        """The method on a model with that anatomy, which may be restricted."""
        raise NotImplementedError

    def inner(self, anatomy):
        for plan, method in anatomy.planned:
            if plan is self:
                return method
        method = self.plan(anatomy)
        anatomy.planned.append((self, method))  # one for all phases: it is asked for the parts that it made
        return method

    def lr_factor(self, step, total):
        return 1.0


@dataclass(frozen=True)
class On(Wrapper):
    """A method on a part of the model: ``layers`` (numbers; negative ones count from the top) and one
    ``stack``."""

    layers: tuple[int, ...] | None = None
    stack: str | None = None

    def __post_init__(self):
        super().__post_init__()
        layers = [self.layers] if isinstance(self.layers, int) else self.layers
        if layers is not None:
            right = isinstance(layers, Iterable) and not isinstance(layers, str)
            expect(right, "layers", layers, "None, a whole number or several of them")
            object.__setattr__(self, "layers", tuple(layers))
        expect(isinstance(self.stack, str | None), "stack", self.stack, "None or a stack's name")

    def on(self, layers=None, stack=None):
        # one restriction if it is of two kinds: so the order in which they were written makes no difference
        if (self.layers is None or layers is None) and (self.stack is None or stack is None):
            layers, stack = (self.layers if layers is None else layers), stack or self.stack
            return On(copy.deepcopy(self.method), layers, stack)
        return super().on(layers, stack)

    def parts(self, anatomy, saved):
        return self.method.parts(anatomy.restrict(self.layers, self.stack), saved)

    def select(self, anatomy):
        return self.method.select(anatomy.restrict(self.layers, self.stack))

    def rewrites(self, anatomy):
        return self.method.rewrites(anatomy.restrict(self.layers, self.stack))
