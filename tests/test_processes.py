"""Two processes, with the model copied to both (DDP) or spread over them (FSDP2), train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = (
    *("full", "lora-all", "dora", "glora", "krona", "qlora", "said"),
    *("fishmask", "far", "adapter", "parallel"),
)


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """case -> how it was run -> the losses of three steps; of one process under ""."""
    path, here = tmp_path_factory.mktemp("processes") / "losses.json", Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, here / "processes.py", path, *CASES], env=environment, check=True, timeout=400)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_losses_of_one(losses, case, way):
    one, two = losses[case][""], losses[case][way]
    assert two == pytest.approx(one, abs=1e-10) and abs(one[0] - one[-1]) > 1e-3
