"""What several test modules share."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import notebook_rules as rules
import pytest
from playwright.sync_api import sync_playwright

from guidelib.core.points import passes

QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


def pytest_collection_finish():
    """What the imports made stays to the end: walking through it took 0.3 s in every full collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_noted():
    """No pass through a model leaves a note in its thread; one that does fails its own test alone."""
    yield
    left = {key: passes.take(key) for key in passes.notes()}
    assert not left


@dataclass(frozen=True)
class Build:
    html: Path
    exit_code: int
    log: str


@pytest.fixture(scope="session")
def build_book() -> Callable[[Path, Path], Build]:
    """Builds a book with warnings as errors. The target must be new: a second build repeats no warning."""

    def build(source: Path, target: Path) -> Build:
        program = Path(sys.executable).with_name("jupyter-book")
        command = [program, "build", source, "--path-output", target, "-W", "--keep-going"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return Build(target / "_build/html", result.returncode, result.stdout)

    return build


@pytest.fixture(scope="session")
def book(tmp_path_factory, build_book) -> Build:
    """The book, built from clean outside the checkout, once for all tests."""
    return build_book(rules.ROOT, tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="module")
def browser(request):
    """A headless Chromium, closed with the module: its event loop would be in the way of a kernel's."""
    if request.config.getoption("--other-versions"):
        pytest.skip("the pages are built and looked at with the versions of requirements/site.txt")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()
