"""What a committed notebook must be, as rules that need no kernel.

A rule takes a notebook and its path and yields one sentence per problem. tests/test_notebooks.py runs every
rule on every notebook; tests/test_guards.py breaks a good notebook and looks whether the rule notices.
"""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from nbval.plugin import comment_markers

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["urls"]["Repository"]
VERSION = PROJECT["version"]

SETUP = f"""\
import os
try:
    import guidelib as gl
except ImportError:
    source = os.environ.get("GUIDELIB_SOURCE", "guidelib @ git+{REPOSITORY}@v{VERSION}")
    %pip install -q --no-deps "{{source}}"
    import guidelib as gl
gl.setup(seed=0)"""
SOLUTION = "#@title Solution (click to open)"

# A skipped cell is a cell that nobody runs, so the skip marker is not among them.
MARKERS = [marker for marker in comment_markers if marker.startswith("NBVAL") and marker != "NBVAL_SKIP"]
TAGS = {
    *(marker.lower().replace("_", "-") for marker in MARKERS),
    *(f"{what}-{part}" for what in ("hide", "remove") for part in ("cell", "input", "output")),
    *("raises-exception", "full-width", "margin", "scroll-output"),
}


def notebooks() -> list[Path]:
    """The committed notebooks."""
    return [p for p in sorted(ROOT.glob("notebooks/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


def name_of(path: Path) -> str:
    """The notebook's path in the repository: notebooks/<chapter>/<name>.ipynb."""
    return path.relative_to(ROOT).as_posix()


def pages() -> list[str]:
    """The pages that _toc.yml lists, in order and without suffix."""

    def walk(node):
        if isinstance(node, dict):
            yield from (str(node[key]) for key in ("root", "file") if key in node)
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from walk(child)

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [re.sub(r"\.(md|ipynb)$", "", page) for page in walk(toc)]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def colab(path: Path) -> str:
    """The address at which Colab opens the notebook."""
    place = REPOSITORY.replace("https://github.com/", "https://colab.research.google.com/github/")
    return f"{place}/blob/{CONFIG['repository']['branch']}/{name_of(path)}"


def cells(nb: NotebookNode, kind: str) -> Iterator[tuple[str, NotebookNode]]:
    """The cells of a kind, each with the name that messages give it: its place in the notebook, from 1."""
    return ((f"cell {i}", cell) for i, cell in enumerate(nb.cells, 1) if cell.cell_type == kind)


def outputs(nb: NotebookNode) -> Iterator[tuple[str, NotebookNode, NotebookNode]]:
    return ((where, cell, output) for where, cell in cells(nb, "code") for output in cell.outputs)


def text_of(output: NotebookNode) -> str:
    """All text of an output, without the base64 of images."""
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [
        data
        for mime, data in output.get("data", {}).items()
        if isinstance(data, str) and "image/p" not in mime
    ]
    return re.sub(r"[\w+/]{200,}", "", "\n".join(parts))


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def markers(cell: NotebookNode) -> set[str]:
    """nbval's markers of the cell, from comments and from tags."""
    lines = {
        line.strip().lstrip("#").strip() for line in cell.source.splitlines() if line.strip().startswith("#")
    }
    return {marker for marker in MARKERS if marker in lines or marker.lower().replace("_", "-") in tags(cell)}


def is_solution(cell: NotebookNode) -> bool:
    return cell.source.startswith("#@title Solution")


def parse(cell: NotebookNode) -> ast.Module:
    """The cell's Python: what %time measures is code too, other magics become calls."""
    source = re.sub(r"(?m)^(\s*)%%?(time|timeit)\b[ \t]*", r"\1", cell.source)
    return ast.parse(TransformerManager().transform_cell(source))


# --- the rules ------------------------------------------------------------


def listed(nb: NotebookNode, path: Path) -> Iterator[str]:
    if name_of(path).removesuffix(".ipynb") not in pages():
        yield "_toc.yml does not list it"


def valid(nb: NotebookNode, path: Path) -> Iterator[str]:
    for error in nbformat.validator.iter_validate(nb):
        yield f"not a valid notebook: {error.message}"


def kernel(nb: NotebookNode, path: Path) -> Iterator[str]:
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernelspec must be python3"


def widgets(nb: NotebookNode, path: Path) -> Iterator[str]:
    if "widgets" in nb.metadata:
        yield "metadata.widgets is stored: GitHub and nbconvert cannot read such a notebook"
    for where, _, output in outputs(nb):
        if any("widget" in mime for mime in output.get("data", {})):
            yield f"{where} stores a widget, which is an empty box on the page"


def cell_order(nb: NotebookNode, path: Path) -> Iterator[str]:
    """A cell that was deleted leaves a gap in the ids; the closing text shows that the end is there."""
    expected = [f"cell-{i}" for i in range(1, len(nb.cells) + 1)]
    if [cell.get("id") for cell in nb.cells] != expected:
        yield "the cell ids are not cell-1, cell-2, ...: run tools/notebooks.py"
    if not nb.cells or nb.cells[-1].cell_type != "markdown":
        yield "the last cell must be text"


def executed(nb: NotebookNode, path: Path) -> Iterator[str]:
    counts = [cell.execution_count for _, cell in cells(nb, "code")]
    if not counts:
        yield "no code cell"
    if counts != list(range(1, len(counts) + 1)):
        yield f"the execution counts are {counts}, not 1, 2, ...: run tools/notebooks.py"


def clean_source(nb: NotebookNode, path: Path) -> Iterator[str]:
    for i, cell in enumerate(nb.cells, 1):
        if not cell.source or cell.source != cell.source.strip():
            yield f"cell {i} is empty or has blank space at its start or end"


def errors(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, cell in cells(nb, "code"):
        failed = any(output.output_type == "error" for output in cell.outputs)
        wanted = "raises-exception" in tags(cell) or "NBVAL_RAISES_EXCEPTION" in markers(cell)
        if failed and not wanted:
            yield f"{where} stores an error"
        if wanted and not failed:
            yield f"{where} should raise an exception but stores none"


def stderr(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, _, output in outputs(nb):
        if output.get("name") == "stderr":
            yield f"{where} stores stderr"


def machine_paths(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, _, output in outputs(nb):
        found = re.search(
            r"(?<![\w.])/(root|home|work|tmp|Users|var/folders|content)/\S*|C:\\Users\S*", text_of(output)
        )
        if found:
            yield f"{where} stores a path of the machine it ran on: {found[0][:60]}"


def exact_markers(nb: NotebookNode, path: Path) -> Iterator[str]:
    """nbval ignores a marker with a typo or with text beside it, and the cell is silently not compared."""
    for where, cell in cells(nb, "code"):
        for line in map(str.strip, cell.source.splitlines()):
            marker_like = re.search("nbval", line, re.I) or re.match(r"#+\s*[A-Z]+(_[A-Z]+)+\b", line)
            if marker_like and (not line.startswith("#") or line.lstrip("#").strip() not in MARKERS):
                yield f"{where}: {line!r} is not one of the markers {', '.join(MARKERS)} on a line of its own"
        for tag in sorted(set(tags(cell)) - TAGS):
            yield f"{where}: the tag {tag!r} is not one of {', '.join(sorted(TAGS))}"


def checked(nb: NotebookNode, path: Path) -> Iterator[str]:
    marked = [(where, cell) for where, cell in cells(nb, "code") if "NBVAL_CHECK_OUTPUT" in markers(cell)]
    if all(is_solution(cell) for _, cell in marked):
        yield "no cell other than the solutions has the marker NBVAL_CHECK_OUTPUT"
    for where, cell in marked:
        if not cell.outputs:
            yield f"{where} is marked NBVAL_CHECK_OUTPUT but stores no output to compare with"


def forbidden(nb: NotebookNode, path: Path) -> Iterator[str]:
    patterns = {
        r"\binteract(ive|ive_output|_manual)?\(": "a widget that is dead on the page: use guidelib's slider",
        r"\bFigureWidget\b": "a widget that is dead on the page: use guidelib's slider",
        r"(?m)^\s*(\w+\s*=\s*)?!": "a shell command",
        r"(?m)^\s*%%?(bash|sh|script|system|sx|pip|conda|mamba|uv)\b": "a shell command or an installation",
    }
    for where, cell in cells(nb, "code"):
        if cell.source != SETUP:
            for pattern, reason in patterns.items():
                if found := re.search(pattern, cell.source):
                    yield f"{where}: {found[0].strip()!r} is {reason}"


def setup_cell(nb: NotebookNode, path: Path) -> Iterator[str]:
    second = nb.cells[1] if len(nb.cells) > 1 else None
    if second is None or second.source != SETUP:
        yield f"the second cell must be the set-up cell, to the letter:\n{SETUP}"
    elif "remove-cell" not in tags(second):
        yield "the set-up cell must have the tag remove-cell"


def badge(nb: NotebookNode, path: Path) -> Iterator[str]:
    first = nb.cells[0] if nb.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell must be text that starts with the title"
    elif f"({colab(path)})" not in first.source and f'href="{colab(path)}"' not in first.source:
        yield f"the first cell must link to {colab(path)}"


def plain_markdown(nb: NotebookNode, path: Path) -> Iterator[str]:
    """MyST syntax is raw text in Colab and JupyterLab; GitHub's alerts are raw text in the book."""
    patterns = [
        r"(?m)^\s*(```+|~~~+|:::+)\s*\{.*",
        r"\{[a-z:]+\}`[^`]*`",
        r"(?m)^\([\w-]+\)=\s*$",
        r"(?m)^>\s*\[!\w+\]",
    ]
    for where, cell in cells(nb, "markdown"):
        for pattern in patterns:
            if found := re.search(pattern, cell.source):
                yield f"{where}: {found[0].strip()!r} is not understood wherever notebooks are shown"


def alternatives(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, cell, output in outputs(nb):
        data = output.get("data", {})
        # Our sliders carry the alternative text and the caption in their own HTML.
        if "guidelib-slider" in data.get("text/html", "") or not any(
            mime.startswith("image/") for mime in data
        ):
            continue
        mystnb = cell.metadata.get("mystnb", {})
        for kind, key in (("image", "alt"), ("figure", "caption")):
            if len(str(mystnb.get(kind, {}).get(key, "")).split()) < 3:
                yield f"{where} shows an image: its metadata need mystnb.{kind}.{key}, a few words or more"


def exercises(nb: NotebookNode, path: Path) -> Iterator[str]:
    found, open_exercise = 0, None
    for where, cell in cells(nb, "code"):
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden") is True
        form = cell.metadata.get("cellView") == "form"
        if is_solution(cell) or hidden or form:
            right_title = cell.source.splitlines()[0] == SOLUTION
            if not (right_title and hidden and form and "hide-cell" in tags(cell)):
                yield (
                    f"{where}: a solution needs the first line {SOLUTION!r}, the tag hide-cell, "
                    "and the metadata cellView: form and jupyter.source_hidden: true"
                )
            printed = "".join(output.get("text", "") for output in cell.outputs)
            if "gl.check(" not in cell.source or "✓" not in printed or "✗" in printed:
                yield f"{where}: the solution must pass gl.check, and its output must be stored"
            if "NBVAL_CHECK_OUTPUT" not in markers(cell):
                yield f"{where}: the solution needs the marker NBVAL_CHECK_OUTPUT, so that it stays right"
            open_exercise = None
        elif "gl.check(" in cell.source:
            if open_exercise:
                yield f"{open_exercise} is an exercise without a solution after it"
            found, open_exercise = found + 1, where
    if open_exercise:
        yield f"{open_exercise} is an exercise without a solution after it"
    if found < 2:
        yield f"{found} exercises (cells that call gl.check), at least two are needed"


def guidelib_names(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, cell in cells(nb, "code"):
        used = []
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.Attribute):
                used.append(re.sub(r"^gl\.", "guidelib.", ast.unparse(node)))
            elif isinstance(node, ast.ImportFrom) and node.module:
                used += [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (f"{where}: there is no {name}" for name in sorted(set(used)) if missing(name))


def missing(dotted: str) -> bool:
    """Whether guidelib has no such public name. Looks into modules, not into objects."""
    first, *rest = dotted.split(".")
    if first != "guidelib" or not all(name.isidentifier() for name in rest):
        return False
    thing = importlib.import_module(first)
    for name in rest:
        if not isinstance(thing, ModuleType):
            return False
        if not hasattr(thing, name):  # perhaps a module that nothing has imported yet
            try:
                importlib.import_module(f"{thing.__name__}.{name}")
            except ModuleNotFoundError:
                return True
        thing = getattr(thing, name)
    return False


RULES = [
    *(listed, valid, kernel, widgets, cell_order, executed, clean_source, errors, stderr, machine_paths),
    *(
        exact_markers,
        checked,
        forbidden,
        setup_cell,
        badge,
        plain_markdown,
        alternatives,
        exercises,
        guidelib_names,
    ),
]
