"""The script for a GPU, here on the CPU with small shapes."""

import json
import subprocess
import sys

import notebook_rules as rules

PLAN = """
backbone: tiny-bert
seeds: 2
tuning_seeds: 1
tasks:
  tweets: {train: 16}
methods:
  head: {type: HeadOnly, rate: 1.0e-2}
"""


def test_it_measures_what_it_predicts_and_writes_all_parts(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    command = [sys.executable, rules.ROOT / "tools/on_gpu.py", "--tiny", "--out", tmp_path]
    command += ["--compare", tmp_path / "plan.yaml"]
    subprocess.run(command, check=True, capture_output=True, timeout=400)
    result = json.loads((tmp_path / "on_gpu.json").read_text(encoding="utf-8"))
    parts = result["parts"]
    assert parts.keys() == {"bytes", "ratios", "invariants", "runs"} and result["card"]
    assert not any("error" in part or "stopped" in part for part in parts.values())
    kept = parts["bytes"]["rows"]
    assert [row["predicted"] for row in kept] == [row["measured"] for row in kept]
    assert len(kept) == 8 and {row["way"] for row in kept} == {"", "keep less", "checkpointing"}
    assert all(row["low"] <= row["median"] <= row["high"] for row in parts["ratios"]["rows"])
    (looked,) = parts["invariants"]["rows"]  # a row for each problem, and then the sum
    assert looked["looked at"] > 50
    assert parts["runs"]["rows"][0]["runs"] >= 4
