"""Stored comparisons: which runs are made, that none is lost, that they choose on validation data alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import Timeout
from safetensors.torch import load_file
from scipy import stats
from test_training import TASK
from typer.testing import CliRunner

import guidelib as gl
from guidelib import experiments
from guidelib.cli import app
from guidelib.experiments import Comparison, Results, Setting, compare, load_results, read_plan
from guidelib.experiments.base import KEY, Arm, pack, score, unpack
from guidelib.experiments.transfer import ALL, OWN, Transfer, Way, overall
from guidelib.experiments.work import _begin, _lock, _locked, _work, add, read, work
from guidelib.materials.tasks import load_task

PLAN = """
backbone: tiny-bert
seeds: 2
tuning_seeds: 1
batch_size: 16
max_length: 32
tasks:
  tweets: {train: 16}
methods:
  head: {type: HeadOnly, rate: 1.0e-2}
  lora: {type: LoRA, r: 2, rate: 4.0e-3}
"""


@pytest.fixture
def tiny(tmp_path) -> tuple[Comparison, Path]:
    """A small comparison, and the path of its result."""
    (tmp_path / "tiny.yaml").write_text(PLAN)
    return read_plan(tmp_path / "tiny.yaml"), tmp_path / "tiny.json"


@pytest.fixture
def here(monkeypatch):
    """Runs are made in this process, on two small classes of words."""
    monkeypatch.setattr("guidelib.materials.tasks.load_task", lambda name: replace(TASK, name=name))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make(experiment, path):
    _begin(experiment, path)
    _work(experiment, path)
    return read(path)


def untimed(path):
    result = read(path)
    return result | {"runs": [run | {"seconds": 0} for run in result["runs"]]}


def run_of(lr, seed, accuracy, loss=1.0, task="t", method="m"):
    scores = {"accuracy": accuracy, "loss": loss}
    return {"task": task, "method": method, "lr": lr, "seed": seed, "validation": scores, "test": scores}


def test_the_score_of_a_run():
    assert score(run_of(1.0, 0, 0.75)) == 75
    assert score({"test": {"loss": np.log(8), "chrf": 60.0}}) == pytest.approx(12.5)
    assert score({"diverged": True}) == 0


def plan(**changes):
    settings = {
        "tasks": {"t": Setting("t")},
        "methods": {"m": (gl.LoRA(), 4.0)},
        "seeds": 3,
        "tuning_seeds": 2,
    }
    return Comparison("tiny-bert", **settings | changes)


# which runs are made


def test_the_grid_grows_until_the_best_rate_is_inside():
    """Validation accuracy falls with the distance from 32: the search walks there from 4, with two seeds."""
    experiment = plan()
    arm, runs = experiment.arms()[0], []
    for _ in range(99):
        todo = list(Results(experiment, runs).to_do())
        if not todo:
            break
        runs += [run_of(k["lr"], k["seed"], 1 - abs(np.log2(k["lr"]) - 5) / 10) for k in todo[:1]]
    results = Results(experiment, runs)
    assert results.rates(arm) == ([2.0, 4.0, 8.0, 16.0, 32.0, 64.0], 32.0)
    assert {(run["lr"], run["seed"]) for run in runs} == {
        *((2.0**k, seed) for k in range(1, 7) for seed in (0, 1)),
        (32.0, 2),
    }
    assert results.complete(arm) and results.expected() == 0


def test_the_search_goes_down_as_well_and_ends_somewhere():
    experiment = plan(tuning_seeds=1)
    arm, runs = Arm("m", ("t",), 4.0), []
    while (found := Results(experiment, runs).rates(arm))[1] is None:
        made = {run["lr"] for run in runs}
        runs += [run_of(lr, 0, 1 / (1 + lr)) for lr in found[0] if lr not in made]
    assert found[0] == [4.0 / 2**k for k in range(7, -2, -1)] and found[1] == found[0][0]  # nine, at the edge


def test_the_rate_is_chosen_by_the_mean_of_the_tuning_seeds_and_by_the_loss_where_that_ties():
    experiment, test = plan(), {"accuracy": 1.0, "loss": 0.0}
    runs = [run_of(2.0, seed, 0.8, 0.5) | {"test": test} for seed in (0, 1)]  # the best on test
    runs += [run_of(4.0, 0, 0.9, 0.5), run_of(4.0, 1, 0.8, 0.5)]
    runs += [run_of(8.0, 0, 0.8, 0.4), run_of(8.0, 1, 0.9, 0.4), run_of(4.0, 2, 0.0), run_of(16.0, 0, 0.1)]
    assert Results(experiment, runs).rates(experiment.arms()[0]) == ([2.0, 4.0, 8.0, 16.0], None)
    runs.append(run_of(16.0, 1, 0.1))
    assert Results(experiment, runs).rates(experiment.arms()[0]) == ([2.0, 4.0, 8.0, 16.0], 8.0)


def test_a_run_that_diverged_counts_as_the_worst():
    experiment = plan(tuning_seeds=1, seeds=1)
    runs = [run_of(2.0, 0, 0.4), run_of(4.0, 0, 0.5)]
    runs.append({"task": "t", "method": "m", "lr": 8.0, "seed": 0, "diverged": True})
    assert Results(experiment, runs).rates(experiment.arms()[0]) == ([2.0, 4.0, 8.0], 4.0)
    assert score(runs[-1]) == 0


def test_what_is_expected_includes_the_seeds_of_rates_that_are_not_chosen_yet():
    experiment = plan(seeds=8, tuning_seeds=3, methods={"a": (gl.LoRA(), 1.0), "b": (gl.LoRA(), 1.0)})
    assert Results(experiment, []).expected() == 2 * (3 * 3 + 5)


# making them


def test_a_comparison_from_start_to_end(tiny, here):
    experiment, path = tiny
    result = make(experiment, path)
    assert result["settings"] == experiment.to_json() and result["items"] == {"tweets": len(TASK.test)}
    assert result["settings"]["methods"]["lora"] == [gl.LoRA(r=2).to_json(), 4e-3]
    assert {"guidelib", "torch", "transformers", "python", "device"} <= result["provenance"].keys()
    for arm in experiment.arms():
        rates, best = Results(experiment, result["runs"]).rates(arm)
        found = {(run["lr"], run["seed"]) for run in result["runs"] if run["method"] == arm.method}
        assert found == {*((lr, 0) for lr in rates), (best, 1)}
    for run in result["runs"]:
        right = unpack(run["test"]["each"], len(TASK.test))
        assert right.mean() == pytest.approx(score(run))
        assert 0 <= score(run, "validation") <= 100 and run["steps"] == 1 == len(run["losses"])
    row = next(run for run in result["runs"] if run["method"] == "lora")
    assert row["count"]["trainable"] == 4 * 2 * 64 + 66
    before = path.read_text()
    assert make(experiment, path) and path.read_text() == before  # nothing is left to do
    assert len(list(path.parent.glob(".*.lock"))) == 1  # the file's, and none of a run


def test_the_rate_of_head_only_is_the_heads(tiny, here, monkeypatch):
    seen = []
    monkeypatch.setattr(Comparison, "fit", lambda self, *a: seen.append((a[3], a[6])) or {"diverged": True})
    for method in ("head", "lora"):
        tiny[0].run({"task": "tweets", "method": method, "lr": 0.3, "seed": 0}, {}, tiny[1])
    assert seen == [(0.3, 0.3), (0.3, None)]


def test_without_a_method_nothing_is_trained_and_nothing_searched(tmp_path, here, monkeypatch):
    (tmp_path / "plan.yaml").write_text(PLAN.replace("head: {type: HeadOnly, rate: 1.0e-2}", "none: {}"))
    experiment = read_plan(tmp_path / "plan.yaml")
    experiment = replace(experiment, tasks={"tweets": Setting("tweets", train=16, test=4)})
    monkeypatch.setattr(Comparison, "fit", lambda *args: {"diverged": True})
    result = make(experiment, tmp_path / "plan.json")
    runs = [run for run in result["runs"] if run["method"] == "none"]
    assert [(run["lr"], run["seed"]) for run in runs] == [(0.0, 0), (0.0, 1)] and result["items"] == {
        "tweets": 4
    }
    assert all("losses" not in run and len(unpack(run["test"]["each"], 4)) == 4 for run in runs)
    (row,) = compare(result, "none", methods=[])
    assert not row.edge and row.rates == {0.0: score(runs[0], "validation")}
    assert gl.rate_figure([row]).axes[0].lines


def test_a_comparison_that_was_killed_ends_as_one_that_was_not(tmp_path):
    """Two processes are killed in the middle, with whatever they were at, and started again."""
    files = {}
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(PLAN)
        files[name] = tmp_path / f"{name}.json"
    command = [sys.executable, "-m", "guidelib.cli", "compare", tmp_path / "killed.yaml", "--jobs", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command, **quiet)
    while not (files["killed"].exists() and len(read(files["killed"])["runs"]) >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = read(files["killed"])["runs"]
    subprocess.run(command, check=True, **quiet)
    assert all(run in read(files["killed"])["runs"] for run in kept)
    work(read_plan(tmp_path / "whole.yaml"), files["whole"], progress=False)
    assert untimed(files["killed"]) == untimed(files["whole"])
    assert not list(tmp_path.glob("*.partial"))


def test_processes_with_temporary_folders_of_their_own_see_one_lock(tiny, monkeypatch, tmp_path):
    _, path = tiny
    with _locked(path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
        with pytest.raises(Timeout):
            _lock(path, "the file itself", timeout=0).acquire()


def test_many_may_add_to_one_file(tiny):
    experiment, path = tiny
    _begin(experiment, path)
    runs = [run_of(lr, seed, 0.5, task="tweets", method="lora") for lr in (1e-3, 2e-3) for seed in range(12)]
    threads = [threading.Thread(target=add, args=(path, experiment, run)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read(path)["runs"] == sorted(runs, key=lambda run: (run["lr"], run["seed"]))


def test_a_run_that_fails_is_said_and_the_file_stays_whole(tiny):
    experiment, path = tiny
    impossible = replace(experiment, tasks={"tweets": Setting("tweets", train=10**9)})
    with pytest.raises(ValueError, match="train: got 1000000000, but 1 to"):
        work(impossible, path, progress=False)
    assert not path.exists()
    broken = replace(experiment, max_length=0)
    with pytest.raises(RuntimeError, match="a process failed; .* goes on with tiny.json where it stopped"):
        work(broken, path, progress=False)
    assert read(path)["runs"] == []


def test_a_failure_while_writing_keeps_the_file_as_it_was(tiny):
    experiment, path = tiny
    _begin(experiment, path)
    add(path, experiment, run_of(1e-3, 0, 0.5, task="tweets", method="lora"))
    before = path.read_text()
    with pytest.raises(TypeError):
        add(path, experiment, run_of(1e-3, 1, object(), task="tweets", method="lora"))
    assert path.read_text() == before


@pytest.mark.parametrize("change", [{"seeds": 3}, {"methods": {"head": (gl.HeadOnly(), 1.0)}}])
def test_a_file_of_other_settings_is_refused_and_kept(tiny, change):
    experiment, path = tiny
    _begin(experiment, path)
    add(path, experiment, run_of(1e-3, 0, 0.5, task="tweets", method="lora"))
    before = path.read_text()
    with pytest.raises(ValueError, match="tiny.json was made with other settings; move it away"):
        work(replace(experiment, **change), path)
    assert path.read_text() == before


def test_results_of_other_versions_are_not_put_together(tiny, monkeypatch):
    experiment, path = tiny
    _begin(experiment, path)
    add(path, experiment, run_of(1e-3, 0, 0.5, task="tweets", method="lora"))
    monkeypatch.setattr(gl, "__version__", "99")
    with pytest.raises(ValueError, match="tiny.json was made with other provenance"):
        work(experiment, path)


@pytest.mark.parametrize("jobs", [0, 1.5, None])
def test_jobs_that_are_none(tiny, jobs):
    with pytest.raises(ValueError, match="jobs must be a whole number of at least 1"):
        work(*tiny, jobs=jobs)
    assert not tiny[1].exists()


@pytest.mark.parametrize("each", [np.arange(13) % 3 == 0, np.array([0.0, 33.5, 100.0, 71.5])])
def test_the_result_of_each_item_is_packed_and_unpacked(each):
    expected = 100.0 * each if each.dtype == bool else each
    assert unpack(pack(each), len(each)).tolist() == expected.tolist()


# plans


def test_a_plan_of_your_own(tiny):
    experiment, _ = tiny
    assert experiment.methods == {"head": (gl.HeadOnly(), 1e-2), "lora": (gl.LoRA(r=2), 4e-3)}
    assert experiment.tasks == {"tweets": Setting("tweets", train=16)} and experiment.seeds == 2


def test_a_question_in_a_plan_and_what_is_as_usual_is_not_written(tmp_path):
    new = 'tweets: {train: 16, validation: 8, question: "{} It was", answers: [bad, good]'
    (tmp_path / "asked.yaml").write_text(PLAN.replace("tweets: {train: 16", new))
    setting = read_plan(tmp_path / "asked.yaml").tasks["tweets"]
    assert setting.question == "{} It was" and tuple(setting.answers) == ("bad", "good")
    assert Setting("tweets", train=16).to_json() == {"type": "Setting", "task": "tweets", "train": 16}
    data = Setting("movie-reviews", validation=8, test=4, question="{} It", answers=("bad", "good")).data()
    assert (len(data.validation), len(data.test), data.question) == (8, 4, "{} It")


def test_a_sum_in_a_plan(tmp_path):
    lines = PLAN.replace("{type: LoRA, r: 2,", "{sum: [{type: NF4}, {type: LoRA}],")
    (tmp_path / "sum.yaml").write_text(lines)
    assert read_plan(tmp_path / "sum.yaml").methods["lora"] == (gl.NF4() + gl.LoRA(), 4e-3)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("backbone: tiny-bert", "", "backbone"),
        ("rate: 4.0e-3", "rate: 4e-3", "a learning rate such as 4.0e-3, got '4e-3'"),
        ("type: LoRA", "type: LORA", "method 'LORA' is unknown"),
        ("r: 2", "rank: 2", "'rank' is unknown"),
        ("train: 16", "trains: 16", "trains"),
        ("seeds: 2", "sedes: 2", "sedes"),
        ("methods:", "methods: [", "parsing"),
        ("tiny-bert", "tiny-brat", "'tiny-brat' is not a backbone"),
        ("\nseeds: 2", "\nseeds: two", "seeds must be a whole number of at least 1, got 'two'"),
        ("tuning_seeds: 1", "tuning_seeds: 0", "tuning_seeds must be a whole number of at least 1, got 0"),
        ("batch_size: 16", "mixed_precision: half", "mixed_precision must be no, bf16 or fp16, got 'half'"),
        ("batch_size: 16", "head_lr: 0.0", "head_lr must be a learning rate such as 1.0e-2, got 0.0"),
    ],
)
def test_a_plan_that_is_wrong(tmp_path, old, new, words):
    (tmp_path / "wrong.yaml").write_text(PLAN.replace(old, new))
    with pytest.raises(ValueError, match=r"path: wrong\.yaml is not a plan of a comparison: ") as caught:
        read_plan(tmp_path / "wrong.yaml")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", experiments.names())
def test_the_plans_of_the_book(name):
    experiment = experiments.experiment(name)
    assert experiment.seeds >= 8 and experiment.tuning_seeds >= 3
    assert json.loads(json.dumps(experiment.to_json())) == experiment.to_json()
    if isinstance(experiment, Comparison):
        for method, rate in experiment.methods.values():
            trained = method is not None and gl.Method.from_json(method.to_json()) == method
            assert trained if rate > 0 else method is None


def test_unknown_names():
    with pytest.raises(ValueError, match="name must be one of .*, or a YAML file that is there, got 'huge'"):
        experiments.run("huge")
    with pytest.raises(ValueError, match="name must be one of .*, or a JSON file, got 'huge'"):
        load_results("huge")
    with pytest.raises(
        FileNotFoundError, match="'mine.json' is stored; `guidelib compare mine.yaml` makes it"
    ):
        load_results("mine.json")


# the verdict


def result_of(scores, rates=(1.0, 2.0, 4.0), items=1000):
    """A result of one task: label -> test accuracies by seed.  The middle rate is the best."""
    runs = []
    for label, values in scores.items():
        for lr in rates:
            for seed, value in enumerate(values if lr == rates[1] else values[:3]):
                right = np.arange(items) < round(value * items / 100)
                run = run_of(lr, seed, 0.9 if lr == rates[1] else 0.5, method=label)
                run["test"] = {"accuracy": right.mean(), "loss": 1.0, "each": pack(right)}
                runs.append(run)
    settings = {"tasks": {"t": {}}, "methods": dict.fromkeys(scores), "seeds": 8, "tuning_seeds": 3}
    return {"settings": settings, "items": {"t": items}, "runs": runs}


BASE = [80.0, 81.0, 79.5, 80.5, 82.0, 80.0, 79.0, 81.5]
NOISE = [0.1, -0.2, 0.3, 0.0, -0.1, 0.2, -0.3, 0.1]


def shifted(by, noise=1.0):
    return [b + by + noise * n for b, n in zip(BASE, NOISE, strict=True)]


def test_the_four_verdicts():
    found = compare(
        result_of(
            {
                "base": BASE,
                "better": shifted(2),
                "worse": shifted(-2),
                "same": shifted(0),
                "noisy": shifted(0, 20),
            }
        ),
        "base",
    )
    assert [v.verdict for v in found] == ["none", "above", "below", "equal", "open"]
    better = found[1]
    assert better.difference == pytest.approx(2 + np.mean(NOISE)) and better.low < better.difference
    assert better.mean == pytest.approx(np.mean(shifted(2)), abs=0.06) and not better.edge
    assert found[0].difference is None


def test_the_margin_changes_the_verdict_and_who_else_is_compared_does_not():
    scores = {"base": BASE, "a bit": shifted(0.2), "a bit more": shifted(0.5)}
    _, alone, more = compare(result_of(scores), "base")
    assert 0.01 < alone.p < 0.05 and alone.low > 0 and alone.verdict == "equal"
    assert more.p < 0.01 and more.verdict == "above"  # within the margin as well, but not by chance
    many = result_of(scores | {f"noisy {i}": shifted(0, 20) for i in range(9)})
    assert compare(many, "base")[1:3] == [alone, more]
    assert compare(many, "base", margin=0.3)[1].verdict == "open"


def test_no_verdict_at_the_edge_of_the_grid_or_with_seeds_missing():
    at_edge = result_of({"base": BASE, "other": shifted(2)}, rates=(4.0, 2.0, 8.0))
    assert [v.verdict for v in compare(at_edge, "base")] == ["none", "none"]
    assert all(v.edge for v in compare(at_edge, "base"))
    for scores in ({"base": BASE, "other": shifted(2)[:6]}, {"base": BASE[:6], "other": shifted(2)[:6]}):
        missing = result_of(scores)
        assert [v.verdict for v in compare(missing, "base")] == ["none", "none"]
    missing = result_of({"base": BASE, "other": shifted(2)[:6]})
    assert [v.verdict for v in compare(missing, "base")] == ["none", "none"]
    assert compare(missing, "base")[1].difference is None


def test_two_seeds_decide_nothing():
    """Their differences often coincide, and would have no spread."""
    two = result_of({"base": BASE[:2], "other": shifted(1, 0)[:2]})
    two["settings"] |= {"seeds": 2}
    assert [v.verdict for v in compare(two, "base")] == ["none", "none"]


def test_equal_scores_are_equal():
    (_, same) = compare(result_of({"base": BASE, "twin": BASE}), "base")
    assert (same.difference, same.low, same.high, same.p, same.verdict) == (0, 0, 0, 1, "equal")


def test_the_search_and_the_verdict_prefer_the_same_rate():
    """Equal sums of right answers tie, whatever their means are rounded to; then the loss decides."""
    right = {1.0: (840, 860, 855), 2.0: (841, 859, 855), 0.5: (1, 1, 1), 4.0: (1, 1, 1)}
    runs = [
        run_of(lr, seed, round(n / 1067, 6), loss=0.6 if lr == 1.0 else 0.5)  # as it is stored
        for lr, each in right.items()
        for seed, n in enumerate(each)
    ]
    for run in runs:
        run["test"] = {"accuracy": 0.5, "loss": 1.0}
    settings = {"tasks": {"t": {}}, "methods": {"m": {}}, "seeds": 8, "tuning_seeds": 3}
    (verdict,) = compare({"settings": settings, "runs": runs}, "m")
    assert Results(plan(seeds=8, tuning_seeds=3), runs).rates(Arm("m", ("t",), 1.0))[1] == verdict.lr == 2.0


def test_a_pair_gets_one_verdict_whoever_else_is_there_and_from_both_sides():
    mirrored = {"above": "below", "below": "above"}
    for result, reference, row in stored_verdicts():
        (alone,) = (v for v in compare(result, reference, task=row.task, methods=[row.method]) if v.p)
        assert alone == row
        there = compare(result, row.method, task=row.task, methods=[reference])
        (back,) = (v for v in there if v.method == reference)
        assert back.p == pytest.approx(row.p) and back.difference == pytest.approx(-row.difference)
        assert back.verdict == mirrored.get(row.verdict, row.verdict)


def test_names_that_a_result_does_not_have():
    result = result_of({"base": BASE})
    with pytest.raises(ValueError, match="method must be one of base, got 'bass'"):
        compare(result, "bass")
    with pytest.raises(ValueError, match="task must be one of t, got 'u'"):
        compare(result, "base", task="u")


def stored_verdicts():
    """The complete verdicts of the stored results beside LoRA, or else their first row, and its label."""
    for path in sorted(experiments.RESULTS.glob("*.json")):
        result = read(path)
        for task in result["settings"].get("tasks", ()):
            methods = result["settings"]["methods"]
            base = "LoRA r=8 on q, v" if "LoRA r=8 on q, v" in methods else next(iter(methods))
            rows = compare(result, base, task=task)
            yield from ((result, base, row) for row in rows if row.difference is not None)


def test_a_stored_verdict_again_from_the_raw_predictions():
    """Not by the paired test but by that of one sample, on the bits and not on the scores."""
    for result, reference, row in stored_verdicts():
        if "chrf" in result["runs"][0]["test"]:
            continue  # that of a whole split is not the mean over its texts
        items = result["items"][row.task]

        def each(label, lr, result=result, task=row.task, items=items):
            runs = [r for r in result["runs"] if (r["task"], r["method"], r["lr"]) == (task, label, lr)]
            return np.array([unpack(r["test"]["each"], items) for r in sorted(runs, key=lambda r: r["seed"])])

        pair = compare(result, reference, task=row.task, methods=[row.method])
        (base,) = (v for v in pair if v.method == reference)
        gains = (each(row.method, row.lr) - each(base.method, base.lr)).mean(1)
        test = stats.ttest_1samp(gains, 0)
        low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
        assert (row.difference, row.low, row.high) == pytest.approx((gains.mean(), low, high), abs=1e-3)
        assert row.p == pytest.approx(test.pvalue, abs=1e-3)


def test_the_best_runs_are_those_that_the_verdict_is_of():
    for result, _, row in stored_verdicts():
        runs = experiments.best_runs(result, row.method, task=row.task)
        assert tuple(score(run) for run in sorted(runs, key=lambda run: run["seed"])) == row.scores
    with pytest.raises(ValueError, match="method must be one of"):
        experiments.best_runs(result, "no method")
    first = result | {"runs": result["runs"][:1]}  # too few to choose a rate by
    assert experiments.best_runs(first, row.method, task=row.task) == []


@pytest.mark.parametrize("name", [p.stem for p in experiments.RESULTS.glob("*.json")])
def test_stored_results_are_those_of_the_plan(name):
    result = load_results(name)
    assert result["settings"] == experiments.experiment(name).to_json()
    runs = Results(experiments.experiment(name), result["runs"])
    assert runs.sorted() == result["runs"]


# from task to task

WAYS = {
    OWN: Way("new", 32, 1, 1e-2),
    "few: head only": Way("head", 16, 1, 1e-2),
    "few: the nearest adapter": Way("nearest", 16, 1, 1e-2),
    "few: fusion of the others": Way("fusion of others", 16, 1, 1e-2),
    "fusion of all": Way("fusion of all", 32, 1, 1e-2),
    "one adapter for all": Way("pooled", 32, 1, 1e-2),
}
PLACES = ("here", "there", "elsewhere")
SIZES = {"tuned": gl.PfeifferAdapter(r=2), "batch_size": 16, "seeds": 2, "tuning_seeds": 1}
TRANSFER = Transfer("tiny-bert", tasks={name: Setting(name) for name in PLACES}, methods=WAYS, **SIZES)


@pytest.fixture(scope="module")
def transferred(tmp_path_factory):
    """The stored result, and its folder."""
    path = tmp_path_factory.mktemp("results") / "moving.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guidelib.materials.tasks.load_task", lambda name: replace(TASK, name=name))
        patch.setattr("guidelib.experiments.base.MOST", 3)  # the rates are not what matters here
        result = make(TRANSFER, path)
        TRANSFER.tidy(result, path.with_suffix(""))
        yield result, path.with_suffix("")


def made(result, label):
    return [r for r in result["runs"] if r["method"] == label]


def test_each_way_is_taken_on_each_domain_and_seed_at_one_rate(transferred):
    result, _ = transferred
    for label in WAYS:
        domains = (ALL,) if label == "one adapter for all" else PLACES
        lr = TRANSFER.best_rate(result, label)
        found = [(r["task"], r["seed"]) for r in made(result, label) if r["lr"] == lr]
        assert sorted(found) == sorted((domain, seed) for domain in domains for seed in (0, 1))


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
    steps = {label: {r["steps"] for r in made(result, label)} for label in WAYS}
    assert steps[OWN] == {2} and steps["few: head only"] == {1} and steps["one adapter for all"] == {6}


def test_scores_on_the_other_domains_choose_the_nearest(transferred):
    result, _ = transferred
    for run in made(result, OWN):
        assert set(run["across"]) == set(PLACES) and run["across"][run["task"]]["test"] == run["test"]
    for run in made(result, "few: the nearest adapter"):
        others = {
            r["task"]: r["across"][run["task"]]["validation"]["accuracy"]
            for r in TRANSFER.chosen(result, OWN)
            if r["seed"] == run["seed"] and r["task"] != run["task"]
        }
        assert others[run["nearest"]] == max(others.values())


def test_all_domains_together_are_one_task_of_their_means(transferred):
    result, _ = transferred
    one = overall(result)
    found = {row.method: row for row in compare(one, OWN)}
    assert list(found) == list(WAYS)
    for label, row in found.items():
        assert (row.task, row.lr) == (ALL, TRANSFER.best_rate(result, label))
        chosen = [run for run in made(result, label) if run["lr"] == row.lr]
        if label == "one adapter for all":
            chosen = [run["across"][name] | {"seed": run["seed"]} for run in chosen for name in PLACES]
        means = [np.mean([score(run) for run in chosen if run["seed"] == seed]) for seed in (0, 1)]
        assert row.scores == pytest.approx(means)
    lost = [r if r["seed"] else {name: r[name] for name in KEY} | {"diverged": True} for r in result["runs"]]
    for run in overall(result | {"runs": lost})["runs"]:
        nothing = {"accuracy": 0, "loss": np.inf}
        assert run["seed"] or (run["validation"], run["test"]) == (nothing, nothing)
    some = [run for run in result["runs"] if run["task"] != "here"]
    assert {r["method"] for r in overall(result | {"runs": some})["runs"]} == {"one adapter for all"}


def test_the_weights_of_a_fusion_are_shares(transferred):
    result, _ = transferred
    for label, n in (("fusion of all", 3), ("few: fusion of the others", 2)):
        for run in made(result, label):
            assert [len(layer) for layer in run["weights"]] == [n, n]
            assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in run["weights"])


def test_the_adapters_of_the_first_seed_are_kept_and_one_that_is_gone_is_made_again(transferred):
    result, folder = transferred
    files = TRANSFER.kept(result, folder)
    assert set(folder.iterdir()) == set(files.values())
    path = files["here"]
    before = load_file(path)
    path.unlink()
    assert TRANSFER._made("here", 0, result, folder) == path
    after = load_file(path)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


SMALL = {"validation": 4, "test": 4}
GENESIS = Setting("modern-bible", books=("Genesis",), **SMALL)
TO_ACTS = Transfer(
    "tiny-t5",
    tasks={
        "Genesis": GENESIS,
        "Genesis, back": replace(GENESIS, back=True),
        "Acts": Setting("modern-bible", books=("Acts",), **SMALL),
    },
    methods={
        OWN: Way("new", 8, 1, 1.0),
        "a new prompt": Way("new", 4, 1, 1.0),
        "SPoT": Way("SPoT", 4, 1, 1.0),
        "IPT": Way("IPT", 4, 1, 1.0),
        "IPT, a random space": Way("IPT, random", 4, 1, 1.0),
    },
    tuned=gl.PromptTuning(length=3),
    targets=("Acts",),
    batch_size=4,
    max_length=24,
    seeds=2,
    tuning_seeds=1,
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "moving.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guidelib.materials.tasks.load_task", load_task)
        patch.setattr("guidelib.experiments.base.MOST", 3)
        return make(TO_ACTS, path)


def test_prompts_go_to_the_target_alone(prompts):
    tasks = {label: {r["task"] for r in made(prompts, label)} for label in TO_ACTS.methods}
    assert tasks.pop(OWN) == {"Genesis", "Genesis, back", "Acts"}
    assert set(map(frozenset, tasks.values())) == {frozenset({"Acts"})}
    counts = {label: {r["count"]["trainable"] for r in made(prompts, label)} for label in TO_ACTS.methods}
    prompt = 3 * 128
    # the decoded prompt of IPT is what is left when the training has ended
    assert all(count == {prompt} for count in counts.values())


def test_spot_starts_from_the_prompt_that_suits_the_target_best(prompts):
    for run in made(prompts, "SPoT"):
        fits = {
            r["task"]: -r["across"]["Acts"]["validation"]["loss"]
            for r in TO_ACTS.chosen(prompts, OWN)
            if r["seed"] == run["seed"] and r["task"] != "Acts"
        }
        assert run["nearest"] == max(fits, key=fits.get)


def test_what_would_start_from_something_diverged_counts_as_diverged(prompts, tmp_path, monkeypatch):
    broken = prompts | {
        "runs": [
            {k: run[k] for k in ("task", "method", "lr", "seed")} | {"diverged": True}
            if run["method"] == OWN and run["seed"] == 1
            else run
            for run in prompts["runs"]
        ]
    }
    monkeypatch.setattr("guidelib.materials.tasks.load_task", load_task)
    monkeypatch.setattr("guidelib.experiments.base.MOST", 3)
    monkeypatch.setattr(Transfer, "fit", lambda self, *args: {"diverged": True})
    for method in ("SPoT", "IPT"):
        key = {"task": "Acts", "method": method, "lr": 1.0, "seed": 1}
        assert TO_ACTS.run(key, broken, tmp_path) == {"diverged": True}


def test_ways_on_the_target_are_compared_as_methods(prompts):
    verdicts = {v.method: v for v in experiments.compare(prompts, "a new prompt", task="Acts")}
    assert set(verdicts) == set(TO_ACTS.methods)
    assert all(len(verdict.scores) == 2 for verdict in verdicts.values())


# the command


def test_the_command_says_which_names_it_accepts():
    outcome = CliRunner().invoke(app, ["compare", "no-such-comparison"])
    assert outcome.exit_code == 2
    assert "no-such-comparison" in outcome.output and "Traceback" not in outcome.output
    assert all(name in outcome.output for name in experiments.names())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["compare", "--help"], ["rebuild", "--help"]])
def test_the_command_helps(arguments):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0 or (outcome.exit_code == 2 and not arguments)  # 0 with click 8.1
    words = ("compare", "rebuild") if len(arguments) < 2 else (arguments[0], "--help")
    assert all(word in outcome.output for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rebuild", "no-such-task"], "no-such-task"),
        (["benchmark", "--pairs", "3"], "greater than or equal to 6"),
        (["pretrain", "tiny-t5", "--out", "nowhere", "--tokens", "0"], "tokens must be at least 1, got 0"),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments, words):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2 and not isinstance(outcome.exception, ValueError)
    assert words in " ".join(outcome.output.replace("│", "").split())


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ("head: {type: HeadOnly, rate: 1.0e-2}", "head: HeadOnly", "head must be a mapping such as"),
        ("head: {type: HeadOnly, rate: 1.0e-2}", "head:", "head must be a mapping such as"),
        ("  head: {type", "  8: {type", "methods: label must be a text: put it in quotes, got 8"),
        ("  head: {type", "  no: {type", "methods: label must be a text: put it in quotes, got False"),
        ("tweets: {train: 16}", "tweets: 16", "tweets must be a mapping such as {train: 2000}, got 16"),
        (
            "tasks:\n  tweets: {train: 16}",
            "tasks: [tweets]",
            "tasks must be a mapping with one entry or more",
        ),
        ("tasks:\n  tweets: {train: 16}", "", "tasks must be a mapping with one entry or more, got None"),
        (
            "{type: LoRA, r: 2, rate",
            "{sum: [{type: NF4}], r: 2, rate",
            "lora: beside sum and rate must be nothing",
        ),
        ("{type: LoRA, r: 2, rate", "{sum: {type: LoRA}, rate", "lora: sum must be a list such as"),
        ("tweets: {train: 16", "tweets: {train: 16, epochs: '2'", "tweets: epochs must be a positive number"),
        ("tweets: {train: 16", "tweets: {train: 16, epochs: -1", "tweets: epochs must be a positive number"),
        ("rate: 4.0e-3", "rate: .inf", "lora: rate must be a learning rate such as 4.0e-3, got inf"),
        ("{type: LoRA, r: 2, rate", "{sum: [], rate", "lora: sum must be a list such as"),
    ],
)
def test_the_commonest_slips_in_a_plan_are_named(tmp_path, was, now, words):
    (tmp_path / "my.yaml").write_text(PLAN.replace(was, now))
    with pytest.raises(ValueError, match="my.yaml is not a plan of a comparison: .*" + re.escape(words)):
        read_plan(tmp_path / "my.yaml")


def test_a_method_that_does_not_fit_is_named_before_any_run(tmp_path):
    (tmp_path / "my.yaml").write_text(PLAN.replace("type: LoRA, r: 2", "type: LoRA, targets: [cross.q]"))
    with pytest.raises(ValueError, match="lora: targets: 'cross.q' is not in this bert model"):
        experiments.run(str(tmp_path / "my.yaml"), progress=False)
    assert not (tmp_path / "my.json").exists()


def test_a_plain_no_in_a_plan_is_a_word(tmp_path):
    (tmp_path / "my.yaml").write_text(PLAN + "mixed_precision: no\n")
    assert read_plan(tmp_path / "my.yaml").mixed_precision == "no"


def test_workers_end_with_what_started_them(tiny, monkeypatch):
    comparison, path = tiny
    started = []

    def interrupted(experiment, path, workers, progress):
        started.extend(workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["guidelib.experiments.work"], "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(comparison, path)
    started[0].join(20)
    assert not started[0].is_alive()


def test_a_plan_that_made_no_run_may_be_corrected(tiny):
    comparison, path = tiny
    _begin(replace(comparison, batch_size=1), path)
    _begin(comparison, path)
    assert read(path)["settings"]["batch_size"] == comparison.batch_size


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}'])
def test_a_file_that_is_no_result_is_refused(tiny, text):
    comparison, path = tiny
    path.write_text(text)
    for action in (lambda: work(comparison, path), lambda: load_results(str(path))):
        with pytest.raises(ValueError, match="path must be the file of a result, got 'tiny.json'"):
            action()


def test_a_way_of_a_transfer_has_the_rate_of_all_its_tasks(transferred):
    result, _ = transferred
    for label in WAYS:
        lr = TRANSFER.best_rate(result, label)
        for task in {run["task"] for run in made(result, label)} - {ALL}:
            (row,) = compare(result, label, task=task, methods=())
            assert (row.lr, len(row.scores)) == (lr, SIZES["seeds"])
    assert result["items"] == {name: len(TASK.test) for name in PLACES}


def test_the_matrix_is_that_of_the_domains_alone(transferred):
    with pytest.raises(ValueError, match="result must be the transfer between domains"):
        experiments.across(transferred[0])
