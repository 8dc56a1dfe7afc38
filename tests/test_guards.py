"""Break a good notebook in every way we know and look whether the run fails.

The small project made here uses this project's own conftest.py, pyproject.toml, rules and tool; only its
notebooks and a two-line guidelib are its own.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import nbformat
import notebook_rules as rules
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

STUB = """
def setup(seed): ...
def check(name, answer): print("○" if answer is ... else "✓" if answer == 6 else "✗")
"""
SLIDER = """\
from IPython.display import HTML
HTML('<figure class="guidelib-slider"><svg></svg></figure>')"""
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
MOVING, CHECKED, RAISING, PICTURE, TASK, EXERCISE, SOLUTION = range(3, 10)  # places in the good notebook
WORKERS = (), ("-n", "2")  # one process, and as make test runs


def good_notebook(name):
    """A notebook that keeps every rule, not yet executed."""
    hidden = labelled("Solution", "hide-cell", "nbval-check-output")
    hidden |= {"cellView": "form", "jupyter": {"source_hidden": True}}
    picture = {"mystnb": {"image": {"alt": "One blue dot."}, "figure": {"caption": "A very small picture."}}}
    stem = name.removesuffix(".ipynb")
    exercise = f'answer = ...\ngl.check("{stem}.six", answer)'
    solution = f'{rules.SOLUTION}\nanswer = 6\ngl.check("{stem}.six", answer)'
    address = rules.colab(rules.ROOT / "notebooks" / name)
    facts = "1 minutes to read · 9 seconds to run · 9.0 GB of memory"
    cells = [
        new_markdown_cell(f"# Tiny\n\n{facts} · [glossary](book/glossary.md) · [open in Colab]({address})"),
        new_code_cell(rules.SETUP, metadata=labelled("Set-up", "hide-cell")),
        new_markdown_cell("## Idea\n\nA number, an error on purpose, a picture and two exercises."),
        new_code_cell(SLIDER, metadata=labelled("Code of this figure", "hide-input")),
        new_code_cell("print(3 * 14)", metadata={"tags": ["nbval-check-output"]}),
        new_code_cell("raise ValueError('on purpose')", metadata={"tags": ["raises-exception"]}),
        new_code_cell(
            f"import base64\nfrom IPython.display import Image\n"
            f"png = '{PNG[:60]}'\npng += '{PNG[60:]}'\nImage(base64.b64decode(png))",
            metadata=picture,
        ),
        *(new_markdown_cell("## Exercises\n\nTwice three? ★"), new_code_cell(exercise)),
        new_code_cell(solution, metadata=hidden),
        *(new_markdown_cell("Half of twelve? ★"), new_code_cell(exercise)),
        new_code_cell(solution, metadata=hidden),
        new_markdown_cell("## Further reading"),
    ]
    return new_notebook(cells=cells)


def labelled(label, *tags):
    prompts = {"code_prompt_show": label, "code_prompt_hide": label}
    return {"tags": list(tags), "mystnb": prompts}


def run(project, *arguments):
    """Run a command in the project as a contributor would, away from the environment of this run."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env |= {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "PIP_RETRIES": "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pytest_in(project, *arguments):
    result = run(project, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", *arguments)
    # pytest takes nbval's file name for a dotted one, and xdist puts its worker and the outcome first
    result.stdout = result.stdout.replace("::ipynb::", ".ipynb::")
    result.stdout = re.sub(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.*?) *$", r"\2 \1", result.stdout, flags=re.M)
    return result


def make_project(folder, names):
    for name in (
        "conftest.py",
        "pyproject.toml",
        "_config.yml",
        "tests/notebook_rules.py",
        "tests/test_notebooks.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(rules.ROOT / name, folder / name)
    (folder / "tools").mkdir()
    shutil.copy(rules.ROOT / "tools/notebooks.py", folder / "tools")
    (folder / "notebooks").mkdir()
    (folder / "guidelib.py").write_text(STUB, encoding="utf-8")
    (folder / "README.md").write_text("# Tiny\n", encoding="utf-8")
    chapters = "\n".join(f"- file: notebooks/{name}" for name in names)
    (folder / "_toc.yml").write_text(
        f"format: jb-book\nroot: README\nchapters:\n{chapters}\n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def good_project(tmp_path_factory):
    """A project with one good notebook, executed and stored by the project's own tool."""
    project = make_project(tmp_path_factory.mktemp("good"), ["good"])
    nbformat.write(good_notebook("good.ipynb"), project / "notebooks/good.ipynb")
    stored = run(project, "tools/notebooks.py")
    assert stored.returncode == 0, stored.stdout
    assert re.search(r"good\.ipynb: \d+\.\d s, processor \d+\.\d s, peak \d+ MiB", stored.stdout)
    return project


@pytest.fixture(scope="module")
def good(good_project):
    return nbformat.read(good_project / "notebooks/good.ipynb", as_version=4)


def test_the_tool_writes_the_facts(good):
    assert re.search(r"1 minute to read · \d+ seconds to run · 0\.\d GB of memory", good.cells[0].source)
    nb = copy.deepcopy(good)
    nb.cells[2].source = "word " * 450
    rules.TOOL.state_facts(nb, peak=1536, seconds=31.2)
    assert "3 minutes to read · 35 seconds to run · 1.5 GB of memory" in nb.cells[0].source
    nb.cells.insert(3, new_code_cell("x\n" * 50))
    assert rules.TOOL.minutes(nb) == 5
    nb.cells[3].metadata.tags = ["hide-input"]
    assert rules.TOOL.minutes(nb) == 3


def test_words_are_those_of_the_prose():
    text = "Two words, $x$ and [a link](http://no.where/at all).\n\n$$\nx = y\n$$\n\n"
    text += "```python\nx = 1\n```\n<b>End</b> – 5 %"
    assert rules.TOOL.words(new_notebook(cells=[new_markdown_cell(text)])) == 8


@pytest.mark.parametrize("workers", WORKERS, ids=" ".join)
def test_the_good_notebook_passes_and_the_table_of_times_is_printed(good_project, workers):
    result = pytest_in(good_project, *workers)
    assert result.returncode == 0, result.stdout
    assert "notebooks/good.ipynb::Cell 8 PASSED" in result.stdout
    table = result.stdout.split("what took how long")[1]
    rows = {name: float(seconds) for seconds, name in re.findall(r"^ *(\d+\.\d) s  (\S.*)$", table, re.M)}
    files = {"notebooks/good.ipynb", "tests/test_notebooks.py"}
    assert rows.keys() == files | {"starting and collecting", "total"}
    assert list(rows)[-1] == "total" and all(0 < spent <= rows["total"] for spent in rows.values())


# --- breaks that need a run: what is changed, and which part of the run must fail --------------------

BREAKS = {}


def breaks(*failing):
    def register(change):
        BREAKS[change.__name__] = change, failing
        return change

    return register


def source(place, text):
    return lambda nb: nb.cells[place].update(source=text)


@breaks("::Cell 2")
def kernel_dies(nb):
    source(CHECKED, "import os\nos._exit(1)")(nb)


@breaks("::Cell 2")
def cell_raises(nb):
    source(CHECKED, "1 / 0")(nb)


@breaks("::Cell 2")
def cell_takes_too_long(nb):
    source(CHECKED, "import time\ntime.sleep(60)")(nb)


@breaks("::Cell 2")
def pip_fails(nb):
    source(CHECKED, "%pip install --quiet --no-index there-is-no-such-package")(nb)


@breaks("::Cell 2")
def shell_command_fails(nb):
    source(CHECKED, "!exit 3")(nb)


@breaks("::Cell 2")
def checked_number_differs(nb):
    nb.cells[CHECKED].outputs[0].text = "43\n"


@breaks("::Cell 3")
def nothing_is_raised(nb):
    source(RAISING, "print('all is well')")(nb)


@breaks("cell_order", "executed")
def cell_is_deleted(nb):
    del nb.cells[PICTURE]


@breaks("cell_order")
def last_cells_are_deleted(nb):
    del nb.cells[-2:]


@breaks("executed", "checked")
def outputs_are_stripped(nb):
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)


@breaks("::Cell 6")
def solution_is_wrong(nb):
    source(SOLUTION, nb.cells[SOLUTION].source.replace("answer = 6", "answer = 7"))(nb)


@breaks("exact_markers", "checked")
def marker_is_misspelt(nb):
    source(CHECKED, "# NBVAL_CHEK_OUTPUT\nprint(3 * 14)")(nb)
    nb.cells[CHECKED].metadata.tags = []


@pytest.fixture(scope="module", params=WORKERS, ids=" ".join)
def broken_run(request, tmp_path_factory, good):
    """One run over a good notebook and all broken ones: outcomes by test id, and the whole text."""
    project = make_project(tmp_path_factory.mktemp("broken"), ["good", *BREAKS])
    for name, (change, _) in {"good": (lambda nb: None, ()), **BREAKS}.items():
        nb = copy.deepcopy(good)
        nb.cells[0].source = good_notebook(f"{name}.ipynb").cells[0].source
        change(nb)
        nbformat.write(nb, project / f"notebooks/{name}.ipynb")
    result = pytest_in(project, "--nbval-cell-timeout=6", *request.param)
    assert result.returncode == 1, result.stdout
    outcomes = dict(
        re.findall(r"^(\S.*?::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", result.stdout, re.M)
    )
    return outcomes, result.stdout


def test_the_good_notebook_passes_among_broken_ones(broken_run):
    outcomes = {test: outcome for test, outcome in broken_run[0].items() if "notebooks/good.ipynb" in test}
    assert len(outcomes) == 9 + len(rules.RULES)
    assert set(outcomes.values()) == {"PASSED"}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_notebook_fails(broken_run, name):
    outcomes = {test: outcome for test, outcome in broken_run[0].items() if f"notebooks/{name}.ipynb" in test}
    for part in BREAKS[name][1]:
        test = f"notebooks/{name}.ipynb{part}"
        if not part.startswith("::"):
            test = f"tests/test_notebooks.py::test_rule[notebooks/{name}.ipynb-{part}]"
        assert outcomes[test] == "FAILED", broken_run[1]


@pytest.mark.parametrize("name", [name for name, (_, failing) in BREAKS.items() if failing == ("::Cell 2",)])
def test_the_rest_of_a_failed_notebook_is_skipped(broken_run, name):
    rest = [broken_run[0][f"notebooks/{name}.ipynb::Cell {i}"] for i in range(3, 9)]
    assert rest == ["SKIPPED"] * 6


def test_failures_say_what_happened(broken_run):
    assert "the kernel died while this cell ran" in broken_run[1]
    assert "tagged raises-exception but raised nothing" in broken_run[1]
    assert "Timeout of 6 seconds exceeded" in broken_run[1]


# --- breaks of the session --------------------


def test_without_nbval_nothing_is_run(good_project):
    result = pytest_in(good_project, "-o", "addopts=")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "notebooks are only run with --nbval-lax" in result.stdout


@pytest.mark.parametrize("arguments", [*WORKERS, ("notebooks",), ("notebooks/empty.ipynb",)], ids=str)
def test_notebook_without_code_fails_the_session(tmp_path, good, arguments):
    project = make_project(tmp_path, ["empty"])
    (project / "tests/test_notebooks.py").write_text("def test_nothing(): pass", encoding="utf-8")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Empty")]), project / "notebooks/empty.ipynb")
    result = pytest_in(project, *arguments)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "ERROR notebooks/empty.ipynb" in result.stdout


@pytest.mark.parametrize("workers", WORKERS, ids=" ".join)
def test_notebook_that_is_not_collected_fails_the_session(good_project, workers):
    result = pytest_in(good_project, "--ignore=notebooks/good.ipynb", *workers)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "ERROR notebooks/good.ipynb" in result.stdout


@pytest.mark.parametrize("arguments", [("-k", "toc or order"), ("tests",), ("--collect-only",)], ids=str)
def test_a_part_of_the_tests_may_be_run_alone(good_project, arguments):
    result = pytest_in(good_project, *arguments)
    assert result.returncode == 0, result.stdout
    assert "what took how long" in result.stdout


def test_tool_leaves_a_notebook_that_does_not_run_as_it_was(tmp_path, good):
    project = make_project(tmp_path, ["good"])
    path = project / "notebooks/good.ipynb"
    nb = copy.deepcopy(good)
    source(CHECKED, "1 / 0")(nb)
    nbformat.write(nb, path)
    before = path.read_bytes()
    result = run(project, "tools/notebooks.py", "notebooks")
    assert result.returncode == 1 and "ZeroDivisionError" in result.stdout
    assert path.read_bytes() == before and os.listdir(project / "notebooks") == ["good.ipynb"]


def test_tool_finds_what_is_not_clean_and_cleans_it(tmp_path, good):
    project = make_project(tmp_path, ["good"])
    path = project / "notebooks/good.ipynb"
    nbformat.write(good, path)
    clean = path.read_bytes()
    assert run(project, "tools/notebooks.py", "--check").returncode == 0
    nb = copy.deepcopy(good)
    nb.metadata["colab"] = {"provenance": []}
    nb.metadata["widgets"] = {}
    nb.cells[CHECKED].metadata["executionInfo"] = {"elapsed": 12}
    nb.cells[CHECKED].outputs.append(new_output("stream", name="stderr", text="a warning\n"))
    nb.cells[CHECKED].execution_count = 12
    nb.cells[0].id = "abc"
    nbformat.write(nb, path)
    assert run(project, "tools/notebooks.py", "--check").returncode == 1
    assert run(project, "tools/notebooks.py").returncode == 0
    assert path.read_bytes() == clean


# --- every rule notices its break --------------------


def meta(place, **items):
    return lambda nb: nb.cells[place].metadata.update(items)


def output(place, **items):
    return lambda nb: nb.cells[place].outputs[0].update(items)


def retitle(cell):
    cell.source = cell.source.replace(" (click to open)", "")


RULE_BREAKS = [
    ("listed", None),
    ("valid", lambda nb: nb.cells[CHECKED].update(outputs=[{"output_type": "none"}])),
    ("kernel", lambda nb: nb.metadata.kernelspec.update(name="peft")),
    ("widgets", lambda nb: nb.metadata.update(widgets={})),
    ("widgets", output(PICTURE, data={"application/vnd.jupyter.widget-view+json": {}})),
    ("cell_order", lambda nb: nb.cells.insert(2, new_markdown_cell("New."))),
    ("cell_order", lambda nb: nb.cells.pop()),
    ("executed", lambda nb: nb.cells[CHECKED].update(execution_count=None)),
    ("executed", lambda nb: nb.cells[CHECKED].update(execution_count=5)),
    ("executed", lambda nb: nb.update(cells=nb.cells[:1])),
    ("clean_source", source(CHECKED, "")),
    ("clean_source", source(CHECKED, "print(42)\n")),
    ("errors", meta(RAISING, tags=[])),
    ("errors", lambda nb: nb.cells[RAISING].update(outputs=[])),
    ("stderr", output(CHECKED, name="stderr")),
    ("machine_paths", output(CHECKED, text="saved in /home/me/file\n")),
    ("machine_paths", output(PICTURE, data={"text/html": "<a href='file:///tmp/x'>x</a>"})),
    ("exact_markers", source(CHECKED, "# NBVAL_CHECK_OUTPUT please\nprint(42)")),
    ("exact_markers", source(CHECKED, "print(42)  # NBVAL_CHECK_OUTPUT")),
    ("exact_markers", source(CHECKED, "# NVBAL_CHECK_OUTPUT\nprint(42)")),
    ("exact_markers", source(CHECKED, "# nbval_check_output\nprint(42)")),
    ("exact_markers", source(CHECKED, "# NBVAL_SKIP\nprint(42)")),
    ("exact_markers", meta(CHECKED, tags=["nbval-chek-output"])),
    ("exact_markers", meta(CHECKED, tags=["nbval-skip"])),
    ("checked", meta(CHECKED, tags=[])),
    ("checked", lambda nb: nb.cells[CHECKED].update(outputs=[])),
    ("forbidden", source(CHECKED, "interact(f, r=(1, 8))")),
    ("forbidden", source(CHECKED, "go.FigureWidget()")),
    ("forbidden", source(CHECKED, "!ls")),
    ("forbidden", source(CHECKED, "files = !ls")),
    ("forbidden", source(CHECKED, "%pip install peft")),
    ("forbidden", source(CHECKED, "%%bash\nls")),
    ("setup_cell", source(1, rules.SETUP.replace("seed=0", "seed=1"))),
    ("setup_cell", source(1, rules.SETUP.replace(rules.VERSION, "9.9.9"))),
    ("setup_cell", meta(1, tags=[])),
    ("badge", source(0, "# Tiny")),
    ("badge", lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("good.ipynb", "other.ipynb"))),
    ("badge", lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("/github/", "/github/other-"))),
    ("plain_markdown", source(2, "```{note}\nText.\n```")),
    ("plain_markdown", source(2, "See {cite}`hu2021`.")),
    ("plain_markdown", source(2, ":::{tip}\nText.\n:::")),
    ("plain_markdown", source(2, "> [!NOTE]\n> Text.")),
    ("alternatives", meta(PICTURE, mystnb={})),
    ("alternatives", meta(PICTURE, mystnb={"image": {"alt": "One blue dot."}})),
    (
        "alternatives",
        meta(PICTURE, mystnb={"image": {"alt": "x.png"}, "figure": {"caption": "A small picture."}}),
    ),
    ("exercises", meta(SOLUTION, tags=[])),
    ("exercises", meta(SOLUTION, jupyter={})),
    ("exercises", lambda nb: retitle(nb.cells[SOLUTION])),
    ("exercises", source(SOLUTION, f"{rules.SOLUTION}\nprint('✓')")),
    ("exercises", meta(SOLUTION, tags=["hide-cell"])),
    ("exercises", lambda nb: nb.cells[SOLUTION].update(outputs=[])),
    ("exercises", output(SOLUTION, text="✗ Not yet.\n")),
    ("exercises", lambda nb: nb.cells.pop(SOLUTION)),
    ("exercises", lambda nb: [nb.cells.pop(EXERCISE), nb.cells.pop(EXERCISE)]),
    ("guidelib_names", source(CHECKED, "gl.no_such_name(6)")),
    ("guidelib_names", source(CHECKED, "%time gl.no_such_name(6)")),
    ("guidelib_names", source(CHECKED, "from guidelib import no_such_name")),
    ("visible_lines", lambda nb: nb.cells.extend(new_code_cell("x\n" * 20) for _ in range(11))),
    ("cell_length", source(CHECKED, "x\n" * 26)),
    ("cell_length", output(CHECKED, data={"text/markdown": "```python\n" + "x\n" * 26 + "```\n"})),
    ("line_width", source(CHECKED, f"x = {'1' * 85}")),
    ("folded", source(CHECKED, "gl.table(rows)")),
    ("folded", source(CHECKED, "figure, ax = plt.subplots()")),
    ("labelled", meta(SOLUTION, mystnb={"code_prompt_show": "Solution"})),
    ("labelled", meta(MOVING, mystnb={"code_prompt_show": "More", "code_prompt_hide": "Less"})),
    ("labelled", meta(1, mystnb={})),
    ("set_up_is_folded", meta(1, tags=["remove-cell"])),
    ("picture_early", output(MOVING, data={"text/plain": "no picture"})),
    ("interactive_early", output(MOVING, data={"image/png": PNG})),
    ("interactive_early", lambda nb: nb.cells.insert(TASK - 1, nb.cells.pop(MOVING))),
    ("truth_values", output(CHECKED, text="True False\n" * 5)),
    ("no_marker_comments", source(CHECKED, "# NBVAL_CHECK_OUTPUT\nprint(42)")),
    ("word_count", source(2, "word " * 1701)),
    (
        "shown_source",
        lambda nb: (
            nb.cells[CHECKED].update(source="gl.show_source(gl.LoRA)"),
            nb.cells[CHECKED].outputs[0].update(data={"text/markdown": "```python\nclass Nothing:\n```"}),
        ),
    ),
    ("linked", source(2, "More on it in the memory chapter.")),
    ("linked", source(2, "See the page on memory.")),
    ("facts", source(0, "# Tiny")),
    ("facts", source(2, "word " * 500)),
    ("facts", lambda nb: nb.cells[0].update(source=nb.cells[0].source.replace("book/glossary.md", "#"))),
    ("named_checks", source(EXERCISE, 'answer = ...\ngl.check("other.six", answer)')),
    ("named_checks", source(EXERCISE, 'answer = ...\ngl.check("good.six", answer, hint="six")')),
    ("named_checks", source(EXERCISE, "answer = ...\ngl.check(answer, 6)")),
    ("named_checks", source(EXERCISE, 'answer = 6\ngl.check("good.six", answer)')),
    ("named_checks", source(TASK, "## Exercises\n\nTwice three?")),
    ("heads", source(2, "## Exercises\n\n## Idea")),
]


@pytest.fixture
def stub_guidelib(monkeypatch):
    stub = ModuleType("guidelib")
    exec(STUB, stub.__dict__)
    monkeypatch.setitem(sys.modules, "guidelib", stub)
    monkeypatch.setattr(rules, "pages", lambda: ["README", "notebooks/good"])


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_every_rule_lets_the_good_notebook_pass(stub_guidelib, good, rule):
    assert list(rule(good, rules.ROOT / "notebooks/good.ipynb")) == []


@pytest.mark.parametrize(
    ("name", "change"), RULE_BREAKS, ids=[f"{i}-{b[0]}" for i, b in enumerate(RULE_BREAKS)]
)
def test_rule_notices_its_break(stub_guidelib, monkeypatch, good, name, change):
    nb = copy.deepcopy(good)
    if change:
        change(nb)
    else:
        monkeypatch.setattr(rules, "pages", lambda: ["README"])
    assert list(getattr(rules, name)(nb, rules.ROOT / "notebooks/good.ipynb"))


def test_every_rule_has_a_break():
    assert {name for name, _ in RULE_BREAKS} == {rule.__name__ for rule in rules.RULES}
