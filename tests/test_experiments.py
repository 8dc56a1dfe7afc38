"""Stored comparisons: they go on where they stopped, and choose on validation data alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from test_training import TASK
from typer.testing import CliRunner

import guidelib as gl
from guidelib import experiments
from guidelib.cli import app
from guidelib.experiments import Comparison, best_rate, load_results, run, summary
from guidelib.experiments.transfer import ALL, OWN, Transfer, Way

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
SCORED = {split: {"accuracy": 0.5, "loss": 1.0} for split in ("validation", "test")}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The folder of results, with one comparison to run."""
    monkeypatch.setattr(experiments, "COMPARISONS", {"tiny": TINY})
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr("guidelib.materials.tasks.load_task", lambda name: {"two words": TASK}[name])
    return tmp_path


def keys(result):
    return [(r["method"], r["lr"], r["seed"]) for r in result["runs"]]


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, n):
    done, once = [], Comparison.run

    def limited(*arguments):
        if len(done) == n:
            raise Interrupted
        done.append(arguments)
        return once(*arguments)

    monkeypatch.setattr(Comparison, "run", limited)
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
    key = {"method": "lora", "lr": 1e-2, "seed": 0}
    first, second = (TINY.run(key, {}, tiny) for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


@pytest.mark.parametrize(
    "change", [dict(train=48), dict(seeds=(0,)), dict(methods={"head": (gl.HeadOnly(), (1.0,))})]
)
def test_a_file_of_other_settings_is_refused_and_kept(tiny, monkeypatch, change):
    monkeypatch.setattr(Comparison, "run", lambda *arguments: pytest.fail("nothing may be run"))
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

    def fake(*arguments):
        return {"odd": object()} if next(made) == 1 else SCORED  # cannot be written as JSON

    monkeypatch.setattr(Comparison, "run", fake)
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

    monkeypatch.setattr(type(tiny), "replace", watch)
    monkeypatch.setattr(Comparison, "run", lambda *arguments: SCORED)
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
def test_the_experiments_can_be_written_and_are_those_of_the_stored_results(name):
    experiment = experiments.COMPARISONS[name]
    settings = experiment.to_json()
    assert settings == load_results(name)["settings"]
    if isinstance(experiment, Comparison):
        methods = [method for method, _ in settings["methods"].values()]
        rates = [rates for _, rates in settings["methods"].values()]
    else:
        methods, rates = [settings["adapter"]], [way["rates"] for way in settings["ways"].values()]
    for method in methods:
        assert gl.Method.from_json(method).to_json() == method
    assert all(each and all(rate > 0 for rate in each) for each in rates)


def test_unknown_names(tiny):
    with pytest.raises(ValueError, match="name must be one of tiny, got 'huge'"):
        run("huge", tiny)
    with pytest.raises(
        FileNotFoundError, match="no result 'huge' is stored; `guidelib compare huge` makes it"
    ):
        load_results("huge")
    assert not any(tiny.iterdir())


# from domain to domain

WAYS = {
    OWN: Way("new", 32, 1, (1e-3, 1e-1)),
    "few: head only": Way("head", 16, 1, (1e-2,)),
    "few: the nearest adapter": Way("nearest", 16, 1, (1e-2,)),
    "few: fusion of the others": Way("fusion of others", 16, 1, (1e-2,)),
    "fusion of all": Way("fusion of all", 32, 1, (1e-2,)),
    "one adapter for all": Way("pooled", 32, 1, (1e-2,)),
}
PLACES = ("here", "there", "elsewhere")
TRANSFER = Transfer(
    "tiny-bert", WAYS, domains=PLACES, adapter=gl.PfeifferAdapter(r=2), batch_size=16, seeds=(0, 1)
)


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """The stored result, and its folder."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "COMPARISONS", {"moving": TRANSFER})
        patch.setattr("guidelib.materials.tasks.load_task", lambda name: replace(TASK, name=name))
        run("moving", folder)
    return json.loads((folder / "moving.json").read_text()), folder


def made(result, label):
    return [r for r in result["runs"] if r["method"] == label]


def test_each_way_is_taken_on_each_domain_and_seed_at_one_rate(transferred):
    result, _ = transferred
    assert result["settings"] == TRANSFER.to_json()
    for label in WAYS:
        domains = (ALL,) if label == "one adapter for all" else PLACES
        lr = best_rate(result, label)
        found = [(r["domain"], r["seed"]) for r in made(result, label) if r["lr"] == lr]
        assert sorted(found) == sorted((domain, seed) for domain in domains for seed in (0, 1))
    tried = {(r["domain"], r["lr"]) for r in made(result, OWN) if r["seed"] == 0}
    assert tried == {(domain, lr) for domain in PLACES for lr in (1e-3, 1e-1)}


def test_what_each_way_trains(transferred):
    result, _ = transferred
    d, layers, head = 32, 2, 66
    adapter, fusion = layers * (2 * d * 2 + 2 + d), layers * (3 * d * d + 2 * d)
    trained = {label: {r["count"]["trainable"] - head for r in made(result, label)} for label in WAYS}
    assert trained == {
        OWN: {adapter},
        "few: head only": {0},
        "few: the nearest adapter": {adapter},
        "few: fusion of the others": {fusion},
        "fusion of all": {fusion},
        "one adapter for all": {adapter},
    }
    stored = {label: made(result, label)[0]["count"]["stored"] - head for label in WAYS}
    assert stored["few: fusion of the others"] == fusion + 2 * adapter
    assert stored["fusion of all"] == fusion + 3 * adapter
    steps = {label: {r["steps"] for r in made(result, label)} for label in WAYS}
    assert steps[OWN] == {2} and steps["few: head only"] == {1} and steps["one adapter for all"] == {6}


def test_scores_on_the_other_domains_choose_the_nearest(transferred):
    result, _ = transferred
    for run_ in made(result, OWN) + made(result, "one adapter for all"):
        assert set(run_["across"]) == set(PLACES)
    for run_ in made(result, OWN):
        assert run_["across"][run_["domain"]]["test"] == run_["test"]
    for run_ in made(result, "few: the nearest adapter"):
        lr, domain = best_rate(result, OWN), run_["domain"]
        others = {
            r["domain"]: r["across"][domain]["validation"]["accuracy"]
            for r in made(result, OWN)
            if (r["lr"], r["seed"]) == (lr, run_["seed"]) and r["domain"] != domain
        }
        assert others[run_["nearest"]] == max(others.values())


def test_the_weights_of_a_fusion_are_shares(transferred):
    result, _ = transferred
    for label, n in (("fusion of all", 3), ("few: fusion of the others", 2)):
        for run_ in made(result, label):
            assert [len(layer) for layer in run_["weights"]] == [n, n]
            assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in run_["weights"])
    assert not any("weights" in r for r in made(result, OWN))


def test_the_adapters_of_the_first_seed_are_kept_and_score_as_stored(transferred):
    result, folder = transferred
    lr = best_rate(result, OWN)
    files = {place: folder / "moving" / f"{place}-0-{lr:g}.safetensors" for place in PLACES}
    assert set((folder / "moving").iterdir()) == set(files.values())
    for place, file in files.items():
        model, tokenizer = gl.load_backbone("tiny-bert", TASK, seed=0)
        gl.load(model, file)
        stored = next(r for r in made(result, OWN) if (r["domain"], r["lr"], r["seed"]) == (place, lr, 0))
        assert gl.evaluate(model, TASK, tokenizer) == stored["test"]


def test_nothing_is_left_to_do(transferred, monkeypatch):
    _, folder = transferred
    monkeypatch.setattr(experiments, "COMPARISONS", {"moving": TRANSFER})
    monkeypatch.setattr("guidelib.materials.tasks.load_task", lambda name: replace(TASK, name=name))
    monkeypatch.setattr(Transfer, "run", lambda *arguments: pytest.fail("nothing may be run"))
    before = (folder / "moving.json").read_text()
    run("moving", folder)
    assert (folder / "moving.json").read_text() == before


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
    monkeypatch.setattr(Comparison, "run", lambda *arguments: SCORED)
    monkeypatch.setattr(experiments.run, "__defaults__", (tiny,))  # bound when the module was imported
    outcome = CliRunner().invoke(app, ["compare", "tiny"])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.splitlines()[-1].endswith("tiny.json")
    assert len(json.loads((tiny / "tiny.json").read_text())["runs"]) == 5
