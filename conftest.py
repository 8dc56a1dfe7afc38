"""Guards around nbval: a notebook that was not really run, or not really checked, must not pass.

nbval alone lets several kinds of broken notebook through. The rules that need no kernel (stripped outputs,
misspelt markers, ...) are in tests/notebook_rules.py; here are those that need a run. tests/test_guards.py
breaks a small project in every one of these ways and looks whether the run fails.

With pytest-xdist (make test), workers run the tests, one file at a time, and the process that started them
gets their reports. What is gathered from reports, the executed notebooks and the times, is whole there.
"""

import os
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from queue import Empty

import nbval.plugin
import pytest

seconds: Counter = Counter()  # test file or notebook -> set-up + call + teardown
executed: set = set()  # notebooks of which at least one cell was run
not_executed: list = []
started = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--other-versions",
        action="store_true",
        help="other than those of requirements/site.txt: notebooks must run, what they print may differ",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "exact_versions: compares bytes that only the versions of requirements/site.txt write"
    )
    if not (config.getoption("nbval") or config.getoption("nbval_lax")):
        raise pytest.UsageError(
            "notebooks are only run with --nbval-lax: pass it, or leave addopts as they are"
        )
    # A failing shell command or %pip only prints; this makes it raise, in every kernel started from here.
    profile = tempfile.mkdtemp(prefix="ipython-")
    startup = Path(profile, "profile_default", "startup")
    startup.mkdir(parents=True)
    (startup / "raise.py").write_text("get_ipython().system_raise_on_error = True\n", encoding="utf-8")
    os.environ["IPYTHONDIR"] = profile
    os.environ["GUIDELIB_LIVE"] = "0"  # a live widget is nothing that a test run can wait for
    config.add_cleanup(lambda: shutil.rmtree(profile, ignore_errors=True))


class WatchedKernel(nbval.plugin.RunningKernel):
    """nbval's kernel, but its death is noticed within a second and not after the whole cell timeout."""

    def get_message(self, stream, timeout=None):
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while True:
            try:
                return super().get_message(stream, timeout=max(0.0, min(1.0, end - time.monotonic())))
            except Empty:
                if not self.is_alive():
                    raise RuntimeError("the kernel died while this cell ran (out of memory?)") from None
                if time.monotonic() >= end:
                    raise


nbval.plugin.RunningKernel = WatchedKernel


def is_cell(item):
    return isinstance(item, nbval.plugin.IPyNbCell)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--other-versions"):
        for item in items:
            if is_cell(item):
                item.options["check"] = False
            elif item.get_closest_marker("exact_versions"):
                item.add_marker(pytest.mark.skip(reason="with --other-versions"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if is_cell(item) and getattr(item.parent, "broken_by", None):
        pytest.skip(f"{item.parent.broken_by} of this notebook failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if is_cell(item) and item.options["check_exception"]:
        if not any(output.output_type == "error" for output in item.test_outputs):
            pytest.fail("the cell is tagged raises-exception but raised nothing")
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if is_cell(item) and report.failed:
        item.parent.broken_by = item.name
    return report


def pytest_runtest_logstart():
    seconds.setdefault("starting and collecting", time.monotonic() - started)


def pytest_runtest_logreport(report):
    name = report.nodeid.split("::")[0]
    seconds[name] += report.duration
    if report.when == "call" and not report.skipped and name.endswith(".ipynb"):
        executed.add(name)


def requested_notebooks(config):
    """The notebooks under notebooks/ that the command line asked for, as files or in folders."""
    option = config.option
    if option.keyword or option.markexpr or option.collectonly or getattr(option, "lf", False):
        return
    asked = [(config.invocation_params.dir / arg).resolve() for arg in config.args if "::" not in arg]
    for path in sorted(config.rootpath.glob("notebooks/**/*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts and any(a == path or a in path.parents for a in asked):
            yield path.relative_to(config.rootpath).as_posix()


def pytest_sessionfinish(session, exitstatus):
    stopped = (
        session.shouldstop
        or session.shouldfail
        or exitstatus not in (0, 1, pytest.ExitCode.NO_TESTS_COLLECTED)
    )
    if stopped or hasattr(session.config, "workerinput"):
        return
    not_executed.extend(name for name in requested_notebooks(session.config) if name not in executed)
    if not_executed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.write_line
    if not_executed:
        terminalreporter.section("notebooks of which no cell was run", red=True)
        for name in not_executed:
            write(f"ERROR {name}", red=True)
    terminalreporter.section("what took how long")
    for name, spent in [*seconds.most_common(), ("total", time.monotonic() - started)]:
        write(f"{spent:8.1f} s  {name}")
