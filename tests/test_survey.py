"""The survey's tables as data: their size, and what the text of the survey says about them."""

import json
import re

import notebook_rules as rules
import pytest

import guidelib as gl
from guidelib.experiments import RESULTS
from guidelib.pages.places import classes
from guidelib.survey import FIGURE, TABLE, TABLE_2, row


def test_the_tables_have_the_printed_sizes():
    assert len(TABLE) == len({entry.method for entry in TABLE}) == 27
    assert sum(entry.trainable is not None for entry in TABLE) == 22
    assert all((entry.trainable is None) == (entry.changed is None) for entry in TABLE)


def test_three_methods_reduce_backpropagation():
    cheaper = {entry.method for entry in TABLE if entry.backprop == "yes"}
    assert cheaper == {"Attention Fusion", "LeTS", "Ladder Side-Tuning"}


def test_columns_hold_the_survey_s_words():
    assert {entry.kind for entry in TABLE} == {"A", "S", "R", "AS", "AR", "ARS"}
    assert {word for entry in TABLE for word in (entry.storage, entry.memory, entry.backprop)} == {
        "yes",
        "no",
        "maybe",
    }


def test_a_row_is_found_by_its_name():
    assert row("LoRA").changed == "~0.5 or ~30"
    with pytest.raises(ValueError, match="method must be one of Adapters, .* got 'LORA'"):
        row("LORA")


def test_the_second_version_differs_where_it_does():
    assert [entry.method for entry in TABLE_2 if entry.method not in {old.method for old in TABLE}] == [
        "DoRA"
    ]
    assert len(TABLE_2) == 28 and TABLE_2[[e.method for e in TABLE_2].index("LoRA") + 1].method == "DoRA"
    columns = ("kind", "storage", "memory", "backprop", "overhead")
    differ = {
        (old.method, name, getattr(old, name), getattr(row(old.method, 2), name))
        for old in TABLE
        for name in columns
        if getattr(old, name) != getattr(row(old.method, 2), name)
    }
    assert differ == {
        ("Intrinsic SAID", "storage", "no", "yes"),
        ("FAR", "memory", "maybe", "yes"),
        ("Fish-Mask", "memory", "maybe", "no (footnote)"),
        ("LT-SFT", "memory", "maybe", "no (footnote)"),
    }
    assert all(entry.trainable is None for entry in TABLE_2)  # its Table 2 was not found
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        row("LoRA", 3)


def test_figure_2_has_the_printed_sizes():
    assert sum(label.version == 1 for label in FIGURE) == 30
    assert sum(label.version in (1, 2) for label in FIGURE) == 34
    assert len({label.name for label in FIGURE}) == len(FIGURE)


@pytest.mark.parametrize("label", FIGURE, ids=lambda label: label.name)
def test_every_label_has_an_implementation_and_a_page(label):
    assert label.method in {name for names in gl.METHODS.values() for name in names}
    assert f"notebooks/{label.page}" in rules.pages()
    text = (rules.ROOT / f"notebooks/{label.page}.ipynb").read_text(encoding="utf-8")
    assert re.search(rf"gl\.{label.method}\b", text), "the page does not use the method"


@pytest.mark.parametrize("label", FIGURE, ids=lambda label: label.name)
def test_a_label_stands_where_its_parts_act(label):
    """In the circles that the survey draws it in, but for one: (IA)^3 acts in weights, and merges."""
    assert classes(getattr(gl, label.method)()) == ("R" if label.name == "(IA)^3" else label.kind)


def compared() -> set[str]:
    """The classes of the methods that some comparison has run."""
    found = set()
    for path in RESULTS.glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        methods, ran = result["settings"].get("methods", {}), {run["method"] for run in result["runs"]}
        if "fusion of all four" in ran:  # of the comparison of transfer, whose rows are ways to start
            found.add("AdapterFusion")
        ways = {methods[name]["start"] for name in ran & {*methods} if isinstance(methods[name], dict)}
        found |= ways & {"SPoT", "IPT"}
        found |= {*re.findall(r'"type": "(\w+)"', json.dumps([methods[name] for name in ran & {*methods}]))}
    return found | ({"QLoRA"} if {"NF4", "LoRA"} <= found else set())  # which is their sum


def test_every_label_has_a_row_in_a_comparison():
    assert {label.method for label in FIGURE} <= compared()
