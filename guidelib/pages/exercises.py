"""Self-checks of the exercises: one line for the reader, never a traceback.

What is right and what helps stands in guidelib/pages/answers, a file per page, so that the page gives neither
away: ``gl.check("lora.merge", merge)`` looks the exercise up.
"""

import copy
import functools
import importlib
import inspect
import math
import numbers
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

_KINDS = {bool: "True or False", numbers.Number: "a number", str: "a text", np.ndarray: "a tensor or array"}
_KINDS |= {Mapping: "a dictionary", Sequence: "a list", Set: "a set"}


def _kind(value: Any) -> str:
    found = next((words for kind, words in _KINDS.items() if isinstance(value, kind)), None)
    return found or ("a function" if callable(value) else f"of type {type(value).__name__}")


def _unanswered(answer: Any) -> bool:
    return answer is ... or answer is None or answer is NotImplemented


def _plain(value: Any) -> Any:
    """Tensors become arrays, and arrays without dimensions numbers."""
    torch = sys.modules.get("torch")  # not imported: who has a tensor has torch
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().to_dense().cpu()
        value = (value.double() if value.is_floating_point() else value.resolve_conj().resolve_neg()).numpy()
    return value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value


def _difference(answer: Any, expected: Any, tolerance: float) -> str | None:
    """What is wrong, in words that do not give the right answer away; None if nothing is."""
    answer, expected = _plain(answer), _plain(expected)
    kinds = {_kind(answer), _kind(expected)}
    arrays = "a tensor or array" in kinds and kinds <= {"a tensor or array", "a list"}
    if len(kinds) > 1 and not arrays:
        return f"it is {_kind(answer)} and should be {_kind(expected)}"
    if arrays or kinds == {"a number"}:
        answer, expected = np.asarray(answer), np.asarray(expected)
        if answer.shape != expected.shape:
            return f"the shape is {answer.shape} and should be {expected.shape}"
        wrong = answer != expected  # counts are compared exactly: 1e-6 of 22 million parameters is 22
        if {answer.dtype.kind, expected.dtype.kind} & set("fc"):
            relative = tolerance if expected.dtype.kind in "fc" else 0
            answer, expected = answer.astype(complex), expected.astype(complex)
            wrong = ~np.isclose(answer, expected, rtol=relative, atol=tolerance, equal_nan=True)
        off = f"{np.sum(wrong)} of {wrong.size} entries are not right" if expected.ndim else "it is not right"
        return off if np.any(wrong) else None
    if kinds == {"a dictionary"}:
        if answer.keys() != expected.keys():
            missing, extra = expected.keys() - answer.keys(), answer.keys() - expected.keys()
            return f"{len(missing)} keys are missing, {len(extra)} are too many"
        pairs = [(f"entry {key!r}", answer[key], expected[key]) for key in expected]
    elif kinds == {"a list"}:
        if len(answer) != len(expected):
            return f"it has {len(answer)} items and should have {len(expected)}"
        pairs = [(f"item {i}", answer[i], expected[i]) for i in range(len(expected))]
    else:
        if kinds == {"a text"}:
            answer, expected = answer.strip().casefold(), expected.strip().casefold()
        return None if answer == expected else "it is not right"
    found = ((name, _difference(a, e, tolerance)) for name, a, e in pairs)
    return next((f"in {name}, {words}" for name, words in found if words), None)


def _judge(answer: Any, expected: Any, inputs: Sequence[tuple] | None, tolerance: float) -> str | None:
    """None if not answered, "" if right, else what is wrong."""
    if _unanswered(answer):
        return None
    if inputs is None:
        return _difference(answer, expected, tolerance) or ""
    if not callable(answer):
        return f"it is {_kind(answer)} and should be a function"
    for arguments, result in zip(inputs, expected, strict=True):
        try:
            returned = answer(*copy.deepcopy(arguments))
        except NotImplementedError:
            return None
        if _unanswered(returned):
            return None
        if words := _difference(returned, result, tolerance):
            return f"called with {_line(repr(arguments)[1:-1].rstrip(','))}, {words}"
    return ""


def _line(text: str) -> str:
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    return line if len(line) <= 120 else line[:117] + "..."


@dataclass(frozen=True)
class Exercise:
    """reference: a function of the reader's, to be called with every tuple of ``inputs``; without ``inputs``
    a function that gives the value, which is computed when it is asked for."""

    reference: Callable
    hint: str
    inputs: Sequence[tuple] | None = None
    tolerance: float = 1e-6


def exercise(*, hint: str, inputs: Sequence[tuple] | None = None, tolerance: float = 1e-6) -> Callable:
    """Makes a function of a file in guidelib/pages/answers the reference of the exercise of its name."""

    def register(reference: Callable) -> Exercise:
        alone = inputs is None and not inspect.signature(reference).parameters
        if not (alone or inputs):
            raise ValueError(f"inputs must list the arguments to try, because {reference.__name__} has some.")
        return Exercise(functools.cache(reference) if alone else reference, hint, inputs, tolerance)

    return register


def exercises(page: str) -> dict[str, Exercise]:
    """The exercises of a page by their full names, such as "lora.merge"; empty for a page without a file."""
    if page not in _pages():
        return {}
    module = importlib.import_module(f"{_ANSWERS}.{page}")
    return {f"{page}.{name}": item for name, item in vars(module).items() if isinstance(item, Exercise)}


_ANSWERS = "guidelib.pages.answers"


def _pages() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(importlib.import_module(_ANSWERS).__path__)]


def _find(name: str) -> Exercise:
    page = str(name).split(".")[0]
    if str(name) not in exercises(page):
        known = ", ".join(exercises(page)) or f"those of the pages {', '.join(_pages())}"
        raise ValueError(f"name must be one of the exercises that are stored ({known}), not {name!r}.")
    return exercises(page)[name]


def hint(name: str) -> None:
    """Print what helps with the exercise of that name, such as "lora.merge"."""
    print(_find(name).hint)


def check(name: str, answer: Any) -> None:
    """Is ``answer`` right for the exercise of that name, such as "lora.merge"?

    Prints one line: ○ not answered yet (`...`, None, a function that returns it), ✓ right, or ✗ with what is
    wrong and a hint.  Whole numbers and truth values are compared exactly, other numbers and arrays within a
    tolerance, texts without regard to case.  Nothing that a reader puts into ``answer`` raises; the author's
    mistakes do, as `ValueError`, and a name that is not stored.  Torch's random numbers go on as if nothing
    had been checked.
    """
    found, torch = _find(name), sys.modules.get("torch")
    state = torch.get_rng_state() if torch else None
    try:
        expected = found.reference() if found.inputs is None else found.reference
        compare(answer, expected, hint=found.hint, inputs=found.inputs, tolerance=found.tolerance, name=name)
    finally:
        if torch:
            torch.set_rng_state(state)


def compare(
    answer: Any,
    expected: Any,
    *,
    hint: str = "",
    inputs: Sequence[tuple] | None = None,
    tolerance: float = 1e-6,
    name: str = "",
) -> None:
    """Print one line: ○ not answered yet (`...`, None, a function that returns it), ✓ right, or ✗.

    Whole numbers and truth values are compared exactly, other numbers and arrays within `tolerance` (absolute
    plus relative), texts without regard to case. A function is called with every tuple of `inputs` and
    compared with the results of the function `expected`, or with the list `expected`. `hint` follows a ✗.
    Nothing that a reader puts into `answer` raises. The author's mistakes do, as `ValueError`.
    """
    if not isinstance(tolerance, numbers.Real) or not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a number from 0 on, not {tolerance!r}.")
    if inputs is None and callable(expected):
        raise ValueError("inputs must list the arguments to try, because expected is a function.")
    if inputs is not None:
        if (
            not isinstance(inputs, (list, tuple))
            or not inputs
            or not all(isinstance(i, tuple) for i in inputs)
        ):
            raise ValueError(f"inputs must be a list of argument tuples, such as [(1, 2)], not {inputs!r}.")
        if callable(expected):
            expected = [expected(*copy.deepcopy(arguments)) for arguments in inputs]
        if not isinstance(expected, (list, tuple)) or len(expected) != len(inputs):
            raise ValueError(
                f"expected must be a function or a list of {len(inputs)} results, one per input."
            )
    if _unanswered(expected) or (inputs is not None and any(map(_unanswered, expected))):
        raise ValueError("expected must not be or return ... or None, which mean an unanswered exercise.")
    try:
        verdict = _judge(answer, expected, inputs, tolerance)
    except (Exception, SystemExit) as error:  # whatever a reader's code or object does
        try:
            verdict = f"it stops with {type(error).__name__}: {_line(str(error))}"
        except Exception:
            verdict = "it stops with an error that cannot be printed"
    if verdict is None:
        help_ = f' gl.hint("{name}") helps.' if name else ""
        print(f"○ Not answered yet. Replace the ... above, then run this cell again.{help_}")
    else:
        print(f"✗ Not yet: {verdict}. {hint}".rstrip() if verdict else "✓ Right.")
