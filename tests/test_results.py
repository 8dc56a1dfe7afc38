"""The table and the two figures of a comparison's verdicts."""

import re

import pytest

import guidelib as gl
from guidelib.experiments import Verdict

RATES = {1e-3: 80.0, 2e-3: 82.0, 4e-3: 79.0}
ROWS = [
    Verdict("t", "LoRA", 2e-3, RATES, (80.0, 82.0, 84.0)),
    Verdict("t", "full", 2e-3, RATES, (83.0, 84.0, 88.0), 3.0, 1.5, 4.5, 0.01, "above"),
    Verdict("t", "head", 2e-3, RATES, (70.0, 71.0, 72.0), -11.0, -12.04, -9.96, 0.001, "below"),
    Verdict("t", "DoRA", 2e-3, RATES, (80.0, 82.0, 84.0), 0.01, -0.4, 0.4, 1.0, "equal"),
    Verdict("t", "SAID", 4e-3, RATES, (80.0, 82.0, 84.0)),
]


def test_the_table():
    lines = repr(gl.verdict_table(ROWS, caption="On t")).splitlines()
    assert lines[0] == "On t" and len(lines) == 3 + len(ROWS)
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[1:2] + lines[3:]]
    assert cells == [
        ["method", "rate", "seeds", "test score", "difference", "verdict"],
        ["LoRA", "0.002", "3", "82.0 ± 2.0", "–", "–"],
        ["full", "0.002", "3", "85.0 ± 2.6", "+3.0 [+1.5, +4.5]", "above"],
        ["head", "0.002", "3", "71.0 ± 1.0", "−11.0 [−12.0, −10.0]", "below"],
        ["DoRA", "0.002", "3", "82.0 ± 2.0", "0.0 [−0.4, +0.4]", "equal"],
        ["SAID", "0.004*", "3", "82.0 ± 2.0", "–", "–"],
    ]


def test_the_figure_of_differences_shows_each_with_its_interval_and_its_name():
    (ax,) = gl.verdict_figure(ROWS, margin=0.5).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["full", "head", "DoRA"]
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert points == {"above": [[3.0, 0]], "below": [[-11.0, 1]], "equal": [[0.01, 2]]}
    bars = {c.get_label(): c.lines[2][0].get_segments()[0][:, 0].tolist() for c in ax.containers}
    assert bars["above"] == pytest.approx([1.5, 4.5]) and bars["below"] == pytest.approx([-12.04, -9.96])


def test_the_figure_of_rates_marks_the_chosen_one():
    (ax,) = gl.rate_figure(ROWS[:2]).axes
    line, chosen = ax.lines[:2]
    assert line.get_xydata().tolist() == [list(pair) for pair in RATES.items()]
    assert chosen.get_xydata().tolist() == [[2e-3, 82.0]]


def test_nothing_to_show():
    for show, rows in ((gl.verdict_table, []), (gl.rate_figure, []), (gl.verdict_figure, ROWS[:1])):
        with pytest.raises(ValueError, match="verdicts must be at least one"):
            show(rows)
