"""setup(), device(), versions() and require()."""

import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

import guidelib
from guidelib import machine
from guidelib.pages import environment


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    """setup() sets environment variables; here they are a copy."""
    ours = {name: value for name, value in os.environ.items() if name != "GUIDELIB_DEVICE"}
    monkeypatch.setattr(os, "environ", ours)


@pytest.fixture
def accelerators(monkeypatch):
    def there(cuda=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    there()
    return there


@pytest.fixture
def bounds(monkeypatch):
    """Lets guidelib require what a test says."""
    return lambda *lines: monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(lines))


def draws():
    return random.random(), numpy.random.rand(), torch.rand(1).item()


def test_setup_seeds_everything(accelerators, bounds):
    bounds()
    environment.setup(seed=3)
    first = draws()
    environment.setup(seed=3)
    assert draws() == first
    environment.setup(seed=4)
    assert all(new != old for new, old in zip(draws(), first, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, None, "0"])
def test_a_seed_that_is_none(seed):
    with pytest.raises(ValueError, match="seed must be"):
        environment.setup(seed)


def test_one_line_if_nothing_is_off(capsys, accelerators, bounds):
    bounds("torch>=2.0", 'nothing-of-the-kind>=1; extra == "test"', 'nor-this; python_version < "3"')
    environment.setup()
    version = importlib.metadata.version
    expected = (
        f"guidelib {guidelib.__version__} · torch {version('torch')} · transformers {version('transformers')}"
    )
    assert capsys.readouterr().out == f"{expected} · cpu\n"


def test_advice(capsys, accelerators, bounds):
    accelerators(mps=True)
    bounds("torch>=2.0", "numpy>=99,<100")
    environment.setup()
    found = importlib.metadata.version("numpy")
    advice = capsys.readouterr().out.splitlines()[1:]
    assert len(advice) == 1 and advice[0].startswith(f'numpy {found} is too old: run %pip install -U "numpy')
    bounds("nothing-of-the-kind>=1")
    environment.setup()
    assert (
        'nothing-of-the-kind is not installed: run %pip install -U "nothing-of-the-kind>=1"'
        in capsys.readouterr().out
    )
    bounds()
    environment.setup()
    assert "GUIDELIB_DEVICE=mps" in capsys.readouterr().out
    os.environ["GUIDELIB_DEVICE"] = "cpu"
    environment.setup()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_pages_leave_a_gpu_alone_unless_it_is_asked_for(capsys, accelerators, bounds):
    bounds()
    accelerators(cuda=True)
    environment.setup()
    first, advice = capsys.readouterr().out.splitlines()
    assert first.endswith(" · cpu") and advice.startswith("The GPU is not used") and machine.device() == "cpu"
    os.environ["GUIDELIB_DEVICE"] = "cuda"
    environment.setup()
    (only,) = capsys.readouterr().out.splitlines()
    assert only.endswith(" · cuda")


def test_a_checkout_that_is_not_installed_works(monkeypatch, capsys, accelerators):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for name in ("requires", "metadata"):
        monkeypatch.setattr(importlib.metadata, name, missing)
    environment.setup()
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(RuntimeError, match="git pull"):
        environment.require("99")


def test_the_declared_bounds_hold_here(capsys, accelerators):
    environment.setup()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_oldest_versions_that_are_tried_are_the_declared_bounds():
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {bound.name: bound for bound in map(Requirement, project["dependencies"] + extras["offline"])}
    bounds = needed | {bound.name: bound for bound in map(Requirement, extras["test"])}
    lines = (root / "requirements/oldest.txt").read_text(encoding="utf-8").splitlines()
    tried = dict(line.split("==") for line in lines if "==" in line)
    assert needed.keys() <= tried.keys()
    for name in tried.keys() & bounds.keys():
        assert [(one.operator, Version(one.version)) for one in bounds[name].specifier] == [
            (">=", Version(tried[name]))
        ], name


def test_device(accelerators):
    assert machine.device() == "cpu"
    accelerators(mps=True)
    assert machine.device() == "cpu"
    os.environ["GUIDELIB_DEVICE"] = "mps"
    assert machine.device() == "mps"
    accelerators(cuda=True)
    with pytest.raises(
        ValueError, match=r"GUIDELIB_DEVICE must be a device of this machine \(cpu, cuda\), not 'mps'"
    ):
        machine.device()
    os.environ["GUIDELIB_DEVICE"] = ""
    assert machine.device() == "cuda"
    os.environ["GUIDELIB_DEVICE"] = "cpu"
    assert machine.device() == "cpu"
    os.environ["GUIDELIB_DEVICE"] = "tpu"
    with pytest.raises(ValueError, match="'tpu'"):
        machine.device()


def test_versions_can_be_stored():
    found = machine.versions()
    assert json.loads(json.dumps(found)) == found
    assert set(found) >= {
        "python",
        "platform",
        "machine",
        "cpus",
        "torch",
        "transformers",
        "datasets",
        "guidelib",
        "numpy",
    }
    assert found["torch"] == importlib.metadata.version("torch")
    assert found["guidelib"] == guidelib.__version__
    assert machine.version("nothing-of-the-kind") is None


def test_require(monkeypatch):
    monkeypatch.setattr(guidelib, "__version__", "0.9.0")
    environment.require("0.9.0")
    environment.require("0.1")
    urls = {"Project-URL": ["Changes, https://c.example", "Repository, https://r.example/book"]}
    metadata = type("Metadata", (), {"get_all": lambda self, name: urls[name]})()
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: metadata)
    with pytest.raises(RuntimeError, match="0.10.0, and 0.9.0 is installed") as error:
        environment.require("0.10.0")  # larger as a version, smaller as a text
    assert '%pip install -U --no-deps "guidelib @ git+https://r.example/book@v0.10.0"' in str(error.value)
    assert "\n" not in str(error.value)
    for wrong in ("new", "", None, 1):
        with pytest.raises(ValueError, match="version must look like"):
            environment.require(wrong)


LOOK = """
import transformers, datasets, huggingface_hub, json
print(json.dumps([transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled(),
    datasets.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled()]))
"""
SET = "import guidelib.pages.environment as environment; environment.setup()\n"


@pytest.mark.parametrize(
    "code", [SET + LOOK, LOOK + SET + LOOK], ids=["before the imports", "after the imports"]
)
def test_the_libraries_are_quiet(code):
    names = {*environment._QUIET, "GUIDELIB_DEVICE"}
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=clean, check=True)
    *loud, quiet = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert quiet == [40, False, True, True]
    assert all(state != quiet for state in loud)
