"""Stored comparisons: they go on where they stopped, and choose on validation data alone."""

from __future__ import annotations

import json
import math

import pytest
from test_training import TASK
from typer.testing import CliRunner

import guidelib as gl
from guidelib import experiments
from guidelib.cli import app
from guidelib.experiments import Comparison, best_rate, load_results, run, summary

TINY = Comparison(
    "tiny-bert",
    "two words",
    {"head": (gl.HeadOnly(), (1e-2,)), "lora": (gl.LoRA(r=2), (1e-3, 1e-2))},
    train=32,
    batch_size=16,
    max_length=32,
    seeds=(0, 1),
)
RUNS = [
    ("head", 1e-2, 0),
    ("lora", 1e-3, 0),
    ("lora", 1e-2, 0),
    ("head", 1e-2, 1),
]  # and lora's best with seed 1


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The folder of results, with one comparison to run."""
    monkeypatch.setattr(experiments, "COMPARISONS", {"tiny": TINY})
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr("guidelib.tasks.load_task", lambda name: {"two words": TASK}[name])
    return tmp_path


def keys(result):
    return [(r["method"], r["lr"], r["seed"]) for r in result["runs"]]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, n):
    done, once = [], experiments._run

    def limited(*arguments):
        if len(done) == n:
            raise Interrupted
        done.append(arguments)
        return once(*arguments)

    monkeypatch.setattr(experiments, "_run", limited)
    return done


def test_an_interrupted_comparison_goes_on_where_it_stopped(tiny, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            run("tiny", tiny)
    assert [path.name for path in tiny.iterdir()] == ["tiny.json"]
    first = load_results("tiny")
    assert keys(first) == RUNS[:1]

    with monkeypatch.context() as patch:
        done = interrupt_after(patch, 99)
        path = run("tiny", tiny)
    assert path == tiny / "tiny.json" and [path.name for path in tiny.iterdir()] == ["tiny.json"]
    result = load_results("tiny")
    assert keys(result)[:4] == RUNS and len(done) == 4
    assert keys(result)[4:] == [("lora", best_rate(result, "lora"), 1)]
    assert result["runs"][0] == first["runs"][0]
    before = path.read_text()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        assert run("tiny", tiny) == path  # nothing is left to do
    assert path.read_text() == before

    assert result["settings"] == TINY.to_json()
    assert result["settings"]["methods"]["lora"] == [gl.LoRA(r=2).to_json(), [1e-3, 1e-2]]
    assert {"guidelib", "torch", "transformers", "python", "machine"} <= result["provenance"].keys()
    row = result["runs"][1]
    assert row["steps"] == 2 and row["count"]["trainable"] == 4 * 2 * 64 + 66
    for split in ("validation", "test"):
        assert 0 <= row[split]["accuracy"] <= 1 and math.isfinite(row[split]["loss"])
    assert row["seconds"] >= 0 and math.isfinite(row["last_losses"])
    assert [line["method"] for line in summary(result)] == ["head", "lora"]


def test_a_run_is_repeatable(tiny):
    first, second = (experiments._run(TINY, "lora", gl.LoRA(r=2), 1e-2, 0) for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


@pytest.mark.parametrize(
    "change", [dict(train=48), dict(seeds=(0,)), dict(methods={"head": (gl.HeadOnly(), (1.0,))})]
)
def test_a_file_of_other_settings_is_refused_and_kept(tiny, monkeypatch, change):
    monkeypatch.setattr(experiments, "_run", lambda *arguments: pytest.fail("nothing may be run"))
    path = tiny / "tiny.json"
    path.write_text(
        json.dumps({"settings": Comparison(**vars(TINY) | change).to_json(), "provenance": {}, "runs": []})
    )
    before = path.read_text()
    with pytest.raises(ValueError, match="tiny.json was made with other settings; move it away"):
        run("tiny", tiny)
    assert path.read_text() == before


def test_a_failure_while_writing_keeps_the_file_as_it_was(tiny, monkeypatch):
    made = iter(range(9))

    def fake(comparison, label, method, lr, seed):
        if next(made) == 1:
            return {"method": label, "lr": lr, "seed": seed, "odd": object()}  # cannot be written as JSON
        scores = {"accuracy": 0.5, "loss": 1.0}
        return {"method": label, "lr": lr, "seed": seed, "validation": scores, "test": scores}

    monkeypatch.setattr(experiments, "_run", fake)
    with pytest.raises(TypeError):
        run("tiny", tiny)
    assert keys(json.loads((tiny / "tiny.json").read_text())) == RUNS[:1]


def test_a_crash_in_the_middle_of_writing_does_not_break_the_file(tiny, monkeypatch):
    """What stands in the place of the file is always whole: it is written beside it and moved there."""
    seen = []
    replace = type(tiny).replace

    def watch(self, target):
        assert json.loads(self.read_text())["runs"]  # complete before it is moved
        seen.append((self.name, target.name))
        return replace(self, target)

    scores = {"accuracy": 0.5, "loss": 1.0}
    monkeypatch.setattr(type(tiny), "replace", watch)
    monkeypatch.setattr(
        experiments,
        "_run",
        lambda c, label, m, lr, seed: dict(method=label, lr=lr, seed=seed, validation=scores, test=scores),
    )
    run("tiny", tiny)
    assert len(seen) == 5 and {target for _, target in seen} == {"tiny.json"}
    assert "tiny.json" not in {source for source, _ in seen}


def result(rows):
    runs = [
        dict(method=m, lr=lr, seed=s, validation=dict(accuracy=v, loss=loss), test=dict(accuracy=t, loss=1.0))
        for m, lr, s, v, loss, t in rows
    ]
    return {"settings": {"seeds": [0, 1, 2], "methods": {row[0]: None for row in rows}}, "runs": runs}


def test_the_best_rate_is_chosen_on_validation_data_of_the_first_seed():
    rows = result(
        [
            ("a", 1e-3, 0, 0.70, 0.5, 0.99),  # the best on test
            ("a", 1e-2, 0, 0.80, 0.6, 0.50),  # the best on validation, with a higher loss than its equal
            ("a", 5e-2, 0, 0.80, 0.4, 0.10),
            ("a", 1e-1, 1, 0.95, 0.1, 0.95),  # another seed
            ("b", 1e-4, 0, 0.99, 0.1, 0.99),  # another method
        ]
    )
    assert best_rate(rows, "a") == 5e-2
    assert best_rate(rows, "b") == 1e-4


def test_the_summary_by_hand():
    rows = result(
        [
            ("a", 1e-2, 0, 0.8, 0.5, 0.70),
            ("a", 1e-3, 0, 0.7, 0.5, 0.10),  # not its best rate, so it is not in the mean
            ("a", 1e-2, 1, 0.8, 0.5, 0.72),
            ("a", 1e-2, 2, 0.1, 0.5, 0.77),
            ("b", 1e-4, 0, 0.6, 0.5, 0.60),
        ]
    )
    first, second = summary(rows)
    assert (first["method"], first["lr"], first["seeds"]) == ("a", 1e-2, 3)
    assert first["mean"] == pytest.approx(73.0)
    assert first["deviation"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert (second["method"], second["seeds"], second["mean"]) == ("b", 1, pytest.approx(60.0))
    assert math.isnan(second["deviation"])


@pytest.mark.parametrize("name", experiments.COMPARISONS)
def test_the_comparisons_can_be_written_and_belong_to_what_is_there(name):
    settings = experiments.COMPARISONS[name].to_json()
    assert settings == json.loads(json.dumps(settings))
    for method, rates in settings["methods"].values():
        assert gl.Method.from_json(method).to_json() == method
        assert rates and all(rate > 0 for rate in rates)


def test_unknown_names(tiny):
    with pytest.raises(ValueError, match="name must be one of tiny, got 'huge'"):
        run("huge", tiny)
    with pytest.raises(
        FileNotFoundError, match="no result 'huge' is stored; `guidelib compare huge` makes it"
    ):
        load_results("huge")
    assert not any(tiny.iterdir())


# the command


def test_the_command_says_which_names_it_accepts():
    outcome = CliRunner().invoke(app, ["compare", "no-such-comparison"])
    assert outcome.exit_code == 2
    assert "no-such-comparison" in outcome.output and "Traceback" not in outcome.output
    assert all(name in outcome.output for name in experiments.COMPARISONS)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compare", "--help"], ["rebuild", "--help"]])
def test_the_command_helps(arguments):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == (0 if arguments else 2)
    words = ("compare", "rebuild") if len(arguments) < 2 else (arguments[0], "--help")
    assert all(word in outcome.output for word in words)


def test_the_command_runs_a_comparison(tiny, monkeypatch):
    scores = {"accuracy": 0.5, "loss": 1.0}
    monkeypatch.setattr(
        experiments,
        "_run",
        lambda c, label, m, lr, seed: dict(method=label, lr=lr, seed=seed, validation=scores, test=scores),
    )
    monkeypatch.setattr(experiments.run, "__defaults__", (tiny,))  # bound when the module was imported
    outcome = CliRunner().invoke(app, ["compare", "tiny"])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines()[-1].endswith("tiny.json")
    assert len(json.loads((tiny / "tiny.json").read_text())["runs"]) == 5
