"""The survey's tables as data: their size, and what the text of the survey says about them."""

import pytest

from guidelib.survey import TABLE, row


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
