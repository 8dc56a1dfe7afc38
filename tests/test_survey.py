"""The survey's tables as data: their size, and what the text of the survey says about them."""

import pytest

from guidelib.survey import TABLE, TABLE_2, row


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
