"""Right, wrong and unanswered in one line, whatever a reader writes."""

import decimal
import fractions
import math
import re
import subprocess
import sys

import notebook_rules as rules
import numpy as np
import pytest
import torch

from guidelib.pages import exercises
from guidelib.pages.exercises import check, compare


@pytest.fixture
def told(capsys):
    """Calls compare and gives back the one line that it printed."""

    def tell(*arguments, **options):
        assert compare(*arguments, **options) is None
        out = capsys.readouterr().out
        assert out.endswith("\n") and out.count("\n") == 1, out
        return out.strip()

    return tell


def two(x, y):
    return x + 2 * y


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (12, 12),
        (12.0, 12),
        (0.1 + 0.2, 0.3),
        (1e9, 1e9 + 1),
        (math.nan, math.nan),
        (math.inf, math.inf),
        (1 + 2j, 1 + 2j),
        (True, True),
        (np.bool_(False), False),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        (3, torch.tensor(3)),
        (10**400, 10**400),
        (" LoRA ", "lora"),
        ((1, 2.0), [1, 2]),
        (range(3), [0, 1, 2]),
        ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}),
        ({1, 2}, {2, 1}),
        (torch.ones(2, 3), torch.ones(2, 3) + 1e-7),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2)),
        (torch.ones(2, requires_grad=True), np.ones(2)),
        ([[1, 2]], np.array([[1, 2]])),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor([True, False]), torch.tensor([True, False])),
        (torch.eye(2).to_sparse(), torch.eye(2)),
        ({"A": torch.ones(1)}, {"A": torch.ones(1)}),
    ],
)
def test_right(told, answer, expected):
    assert told(answer, expected) == "✓ Right."


@pytest.mark.parametrize(
    ("answer", "expected", "words"),
    [
        (11, 12, "it is not right"),
        (22_713_217, 22_713_216, "it is not right"),  # a relative tolerance would let this pass
        (12.1, 12, "it is not right"),
        (math.nan, 1.0, "it is not right"),
        (False, True, "it is not right"),
        (1, True, "it is a number and should be True or False"),
        (True, 1, "it is True or False and should be a number"),
        ("12", 12, "it is a text and should be a number"),
        (two, 12, "it is a function and should be a number"),
        (object(), 12, "it is of type object and should be a number"),
        ("adapter", "LoRA", "it is not right"),
        ([1, 2], [1, 2, 3], "it has 2 items and should have 3"),
        ([1, 2, 4], [1, 2, 3], "in item 2, it is not right"),
        ({"a": 1}, {"a": 1, "b": 2}, "1 keys are missing, 0 are too many"),
        ({"a": [1, 3]}, {"a": [1, 2]}, "in entry 'a', in item 1, it is not right"),
        (torch.ones(3, 2), torch.ones(2, 3), "the shape is (3, 2) and should be (2, 3)"),
        (torch.ones(2, 3), torch.zeros(2, 3), "6 of 6 entries are not right"),
        (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3]), "1 of 3 entries are not right"),
        (torch.ones(1), 1, "it is a tensor or array and should be a number"),
        (3, torch.ones(3), "it is a number and should be a tensor or array"),
    ],
)
def test_wrong_says_why_and_gives_the_hint(told, answer, expected, words):
    assert told(answer, expected, hint="Count again.") == f"✗ Not yet: {words}. Count again."


@pytest.mark.parametrize("answer", [..., None, NotImplemented])
def test_a_stub_is_not_answered(told, answer):
    for expected, inputs in [(12, None), (torch.ones(2), None), (two, [(1, 2)])]:
        assert told(answer, expected, inputs=inputs, hint="no").startswith("○ Not answered yet.")


def test_functions(told):
    inputs = [(1, 2), (torch.ones(2), torch.ones(2))]
    assert told(lambda x, y: y + x + y, two, inputs=inputs) == "✓ Right."
    assert told(lambda a: a * a, [1, 4], inputs=[(1,), (2,)]) == "✓ Right."
    assert told(lambda a: a, [1, 4], inputs=[(1,), (2,)]) == "✗ Not yet: called with 2, it is not right."
    assert told(5, two, inputs=inputs) == "✗ Not yet: it is a number and should be a function."
    assert told(lambda x, y: ..., two, inputs=inputs).startswith("○")
    assert told(lambda x, y: x if x == 1 else None, [1, 1], inputs=[(1, 2), (2, 2)]).startswith("○")

    def unfinished(x, y):
        raise NotImplementedError

    assert told(unfinished, two, inputs=inputs).startswith("○")
    assert told(lambda x: x, two, inputs=inputs).startswith("✗ Not yet: it stops with TypeError: ")
    assert (
        told(lambda x, y: x / 0, two, inputs=inputs)
        == "✗ Not yet: it stops with ZeroDivisionError: division by zero."
    )


def test_a_function_cannot_change_the_inputs_of_the_next(told):
    inputs = [([3, 1, 2],)]
    assert told(lambda a: a.sort() or a, sorted, inputs=inputs) == "✓ Right."
    assert inputs == [([3, 1, 2],)]


class Hostile:
    """Raises wherever Python gives it a chance."""

    def __init__(self, error):
        object.__setattr__(self, "error", error)

    def fail(self, *arguments, **options):
        raise object.__getattribute__(self, "error")

    __eq__ = __ne__ = __bool__ = __len__ = __iter__ = __getitem__ = __repr__ = __str__ = __getattr__ = fail
    __call__ = __float__ = __complex__ = __index__ = __array__ = __abs__ = __deepcopy__ = __lt__ = fail
    __hash__ = None
    __class__ = property(fail)


class UnprintableError(Exception):
    def __str__(self):
        raise ValueError("no")


def ring():
    a = []
    a.append(a)
    return a


def raiser(error):
    def function(*arguments):
        raise error

    return function


def test_nothing_that_a_reader_writes_raises(told):
    answers = [
        Hostile(ValueError("a\nb")),
        Hostile(SystemExit(1)),
        Hostile(UnprintableError()),
        ring(),
        {1: ring()},
    ]
    answers += [
        object,
        type,
        int,
        len,
        torch.nn.Linear(2, 2),
        torch.empty(2, device="meta"),
        torch.zeros(0),
        sys,
    ]
    answers += [
        b"x",
        bytearray(3),
        memoryview(b"ab"),
        "",
        "\ud800",
        (),
        [],
        {},
        set(),
        [[1], [2, 3]],
        (i for i in "ab"),
    ]
    answers += [
        0,
        -1,
        10**400,
        1e308,
        -math.inf,
        math.nan,
        1j,
        decimal.Decimal("NaN"),
        fractions.Fraction(1, 3),
    ]
    answers += [
        np.array(["a"]),
        np.array([object()]),
        np.float32(1),
        np.datetime64("2020-01-01"),
        np.zeros((0, 3)),
    ]
    answers += [
        np.array([{}, []], dtype=object),
        np.ma.masked,
        torch.tensor([1j]).conj(),
        torch.float32,
        ValueError("x"),
    ]
    answers += [
        raiser(error) for error in (SystemExit(), UnprintableError(), RecursionError(), ValueError("\ud800"))
    ]
    answers += [lambda *a: Hostile(KeyError("x")), lambda *a: ring(), lambda: 1, Hostile]
    values = [
        1,
        1.5,
        10**400,
        True,
        "text",
        [1, [2]],
        {"a": 1},
        {1},
        torch.ones(2),
        np.array(["a"]),
        1j,
        b"x",
    ]
    for answer in answers:
        for expected in values:
            assert told(answer, expected)[0] in "✓✗○"
        for expected in (two, [1, 1]):
            assert told(answer, expected, inputs=[(1, 2), (3.5, 4)])[0] in "✓✗○"


def test_long_and_broken_messages_stay_one_line(told):
    line = told(raiser(ValueError("many\nlines " * 100)), [1], inputs=[(1,)])
    assert len(line) < 200 and line.endswith("....")


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((1, two), {}, "inputs must list"),
        ((two, two), {"inputs": []}, "inputs must be"),
        ((two, two), {"inputs": [1, 2]}, "inputs must be"),
        ((two, 3), {"inputs": [(1, 2)]}, "expected must be a function or a list of 1 results"),
        ((two, [1, 2]), {"inputs": [(1, 2)]}, "expected must be a function or a list of 1 results"),
        ((..., None), {}, "expected must not be"),
        ((two, lambda x, y: None), {"inputs": [(1, 2)]}, "expected must not be"),
        ((1, 1), {"tolerance": -1}, "tolerance must be"),
        ((1, 1), {"tolerance": math.nan}, "tolerance must be"),
        ((1, 1), {"tolerance": "small"}, "tolerance must be"),
    ],
)
def test_the_authors_mistakes_raise(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        compare(*arguments, **options)


def test_tolerance(told):
    assert told(1.01, 1.0) == "✗ Not yet: it is not right."
    assert told(1.01, 1.0, tolerance=0.05) == "✓ Right."
    assert told(torch.tensor([1.01]), torch.tensor([1.0]), tolerance=0.05) == "✓ Right."


def test_torch_is_not_imported():
    code = (
        "import sys; from guidelib.pages.exercises import compare; "
        "compare([1.5], [2]); print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert result.stdout.split()[-1] == "False"


ANSWERS = """\
from guidelib.pages.exercises import exercise


@exercise(hint="Half of 84.")
def number():
    print("computed")
    return 42


@exercise(hint="Add them.", inputs=[(1, 2), (3, 4)])
def add(x, y):
    return x + y


@exercise(hint="Nearly.", tolerance=0.1)
def nearly():
    return 1.0
"""


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A package with the answers of one page."""
    folder = tmp_path / "answers_for_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "page.py").write_text(ANSWERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(exercises, "_ANSWERS", "answers_for_tests")
    yield
    for name in ("answers_for_tests", "answers_for_tests.page"):
        sys.modules.pop(name, None)


def test_an_exercise_is_found_by_its_name(stored, capsys):
    def told(name, answer):
        assert check(name, answer) is None
        return capsys.readouterr().out.strip().split("\n")[-1]

    assert told("page.number", 42) == "✓ Right."
    assert told("page.number", 41) == "✗ Not yet: it is not right. Half of 84."
    assert told("page.number", ...).endswith('gl.hint("page.number") helps.')
    assert told("page.add", lambda x, y: y + x) == "✓ Right."
    assert told("page.add", lambda x, y: x).startswith("✗ Not yet: called with 1, 2, it is not right. Add")
    assert told("page.add", lambda x, y: ...).startswith("○")
    assert told("page.nearly", 1.05) == "✓ Right."
    assert exercises.hint("page.add") is None and capsys.readouterr().out == "Add them.\n"


def test_a_value_is_computed_once_and_when_it_is_asked_for(stored, capsys):
    check("page.add", ...)
    assert "computed" not in capsys.readouterr().out
    for _ in range(2):
        check("page.number", 42)
    assert capsys.readouterr().out.count("computed") == 1


@pytest.mark.parametrize("name", ["page.nothing", "nowhere.number", "page.exercise", "number", 5, [1, 2]])
def test_an_exercise_that_is_not_stored_is_refused(stored, name):
    with pytest.raises(ValueError, match=re.escape(f"not {name!r}")):
        check(name, 1)
    with pytest.raises(ValueError, match=re.escape(f"not {name!r}")):
        exercises.hint(name)


def test_a_reference_with_arguments_needs_inputs():
    with pytest.raises(ValueError, match="inputs must list the arguments to try, because add has some"):

        @exercises.exercise(hint="no")
        def add(x, y):
            return x + y


def test_texts_are_compared_as_before(told):
    assert told("q, v", "q, v") == "✓ Right."
    assert told("adapter", "LoRA") == "✗ Not yet: it is not right."
    assert told("lora.merge", "lora.merge", hint="") == "✓ Right."


STORED = [name for page in exercises._pages() for name in exercises.exercises(page)]


def test_the_pages_ask_what_is_stored():
    sources = [
        cell.source
        for path in rules.notebooks()
        for _, cell in rules.cells(rules.read(path), "code")
        if "#@title" not in cell.source
    ]
    asked = [name for source in sources for name in re.findall(r'gl\.check\("([\w.]+)"', source)]
    assert sorted(asked) == sorted(STORED)


@pytest.mark.parametrize("name", STORED)
def test_what_is_stored_is_right_by_its_own_measure(name, capsys):
    found, state = exercises.exercises(name.split(".")[0])[name], torch.get_rng_state()
    check(name, ...)
    assert capsys.readouterr().out.startswith("○") and torch.equal(torch.get_rng_state(), state)
    check(name, found.reference() if found.inputs is None else found.reference)
    assert capsys.readouterr().out == "✓ Right.\n"
    assert len(found.hint.split()) > 3 and found.hint.endswith((".", "?"))
