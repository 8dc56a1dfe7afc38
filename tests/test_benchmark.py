"""Times depend on the machine, so what is tested is how they are compared."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from guidelib.additive.other.lst import LST
from guidelib.cli import app
from guidelib.costs import benchmark


def test_a_ratio_is_that_of_the_pairs():
    """A machine that slows down for a while slows both, and the quotient stays."""
    reference = [1.0, 1.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0]
    found = benchmark.ratio([2 * seconds for seconds in reference], reference)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert str(found) == "2.00 [2.00, 2.00]"


def test_the_interval_holds_the_true_median_as_often_as_it_says():
    generator, held, n = np.random.default_rng(0), 0, 400
    for _ in range(n):
        found = benchmark.ratio(generator.lognormal(sigma=0.3, size=15), np.ones(15))
        held += found.low <= 1.0 <= found.high
    assert 0.93 <= held / n <= 1.0


def test_runs_take_turns_and_the_first_turn_warms_up():
    calls = []
    times = benchmark.take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, 6)
    assert calls == ["a", "b"] * 7 and [len(seconds) for seconds in times.values()] == [6, 6]
    with pytest.raises(ValueError, match="pairs must be a whole number of at least 6, got 5"):
        benchmark.take_turns({}, 5)


def test_the_command_prints_both_tables(monkeypatch):
    name = "tiny-bert"
    for function in (benchmark.step_ratios, benchmark.latency_ratios):
        monkeypatch.setattr(
            benchmark, function.__name__, lambda pairs, function=function: function(name, pairs=pairs)
        )
    kept = benchmark.kept_ratio
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    monkeypatch.setattr(benchmark, "kept_ratio", lambda: kept(LST(reduction=4), tiny, epochs=1))
    result = CliRunner().invoke(app, ["benchmark", "--pairs", "6"])
    assert result.exit_code == 0, result.output
    steps, latencies = result.output.split("a forward pass")
    assert [label for label in benchmark.METHODS if label not in steps] == []
    unmerged = {line.split("  ")[1].strip() for line in latencies.splitlines() if "cannot be merged" in line}
    assert unmerged == {"Pfeiffer adapter r=24"}
    assert float(latencies.split()[-3]) > 0  # five epochs of LST
    assert "head only" not in latencies and "LoRA r=8 on all" in latencies
