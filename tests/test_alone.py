"""One notebook, copied alone into an empty folder, where guidelib is not installed, installs it and runs."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import notebook_rules as rules
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

NOTEBOOK = rules.ROOT / "notebooks/foundations/anatomy.ipynb"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the project, built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(
        ".*", "_build", "build", "*.egg-info", "__pycache__", "book", "notebooks", "tests"
    )
    shutil.copytree(rules.ROOT, folder / "source", ignore=unneeded)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder]
    command = [sys.executable, "-m", "pip", "wheel", *options, folder / "source"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A new environment that has all packages of this one except guidelib."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv/bin/python"
    # Links, because the folder itself would show pip that guidelib is installed there. They lie in the
    # environment's own folder, or dill would take them for the reader's modules and pickle them whole.
    packages = site_packages(python)
    for name in ("purelib", "platlib"):
        for entry in Path(sysconfig.get_path(name)).iterdir():
            if "guidelib" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    return python


def site_packages(python):
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(
        subprocess.run([python, "-I", "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    )


def test_notebook_runs_alone(wheel, python, tmp_path, monkeypatch):
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = subprocess.run([python, "-c", "import guidelib"], cwd=folder, capture_output=True, text=True)
    assert "No module named 'guidelib'" in before.stderr

    spec = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "language": "python",
    }
    kernel = tmp_path / "jupyter/kernels/alone/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({**spec, "display_name": "alone"}), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("GUIDELIB_SOURCE", str(wheel))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing but the wheel is needed
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")

    shutil.copy(NOTEBOOK, folder)
    nb = rules.read(folder / NOTEBOOK.name)
    nb.cells.append(new_code_cell("import guidelib; print(guidelib.__file__)"))
    # Raises at the first cell that fails.
    NotebookClient(
        nb, timeout=300, kernel_name="alone", resources={"metadata": {"path": str(folder)}}
    ).execute()
    assert site_packages(python) in Path(nb.cells[-1].outputs[0].text.strip()).parents
