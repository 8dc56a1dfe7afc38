"""What a committed notebook must be, as rules that need no kernel.

A rule takes a notebook and its path and yields one sentence per problem. tests/test_notebooks.py runs every
rule on every notebook; tests/test_guards.py breaks a good notebook and looks whether the rule notices.

The second half are the rules of the form, which CONTRIBUTING.md describes.
"""

import ast
import functools
import importlib.util
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
TEMPLATE = ROOT / "notebooks/template.ipynb"  # to copy from; no page of the book

_tool = importlib.util.spec_from_file_location("notebooks_tool", ROOT / "tools/notebooks.py")
TOOL = importlib.util.module_from_spec(_tool)
_tool.loader.exec_module(TOOL)

INTERACTIVE = ('<figure class="guidelib-slider"', '<figure class="guidelib-menu"')

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


def is_interactive(output: NotebookNode) -> bool:
    """Whether a reader can move it."""
    return any(figure in output.get("data", {}).get("text/html", "") for figure in INTERACTIVE)


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
    if path != TEMPLATE and name_of(path).removesuffix(".ipynb") not in pages():
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
    elif not {"remove-cell", "hide-cell"} & set(tags(second)):
        yield "the set-up cell must have the tag hide-cell"


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
        if is_interactive(output) or not any(mime.startswith("image/") for mime in data):
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


@functools.cache
def lines_of_the_library() -> frozenset[str]:
    files = (ROOT / "guidelib").rglob("*.py")
    return frozenset(line.strip() for file in files for line in file.read_text("utf-8").splitlines())


def shown_source(nb: NotebookNode, path: Path) -> Iterator[str]:
    """What `show_source` has shown is in the library still, line for line."""
    for where, cell, output in outputs(nb):
        if "show_source(" not in cell.source:
            continue
        shown = "".join(output.get("data", {}).get("text/markdown", ""))
        for code in re.findall(r"```python\n(.*?)```", shown, re.DOTALL):
            lines = [line.strip() for line in code.splitlines()]
            if old := [line for line in lines if line not in lines_of_the_library()]:
                yield f"{where} shows what guidelib no longer has; execute it again: {old[0]!r}"


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


# --- the rules of the form -------------------------------------------------

# the heads of a page, in order; what a page of a method must have
HEADS = (
    *("Idea", "Equation", "The code", "In Hugging Face terms", "Spot the bug", "Checks", "What moves"),
    *("Finding", "What it costs", "Exercises", "When to use it", "Further reading"),
)
NEEDED = {
    "Idea",
    "Equation",
    "The code",
    "Checks",
    "What moves",
    "What it costs",
    "Exercises",
    "When to use it",
}
OF_NO_METHOD = (
    *("foundations/", "reparametrization/lora_choices", "reparametrization/family"),
    "additive/other_ways",
    "additive/soft_prompts",
    "selective/which_entries",
    "hybrid/more_than_parts",
    "survey/",
)
LINES, LINES_OF_CELL, COLUMNS, TRUTHS, WORDS, WORDS_OF_FOUNDATIONS = 220, 25, 88, 8, 1700, 2300


def page_of(path: Path) -> str:
    """Such as "reparametrization/lora"."""
    return path.relative_to(ROOT / "notebooks").as_posix().removesuffix(".ipynb")


def prose(nb: NotebookNode) -> str:
    """The text, without code, formulas and links."""
    text = "\n\n".join(cell.source for _, cell in cells(nb, "markdown"))
    text = re.sub(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", "·", text, flags=re.S)
    return re.sub(r"\[[^\]]*\]\([^)]*\)|<a .*?</a>", "·", text, flags=re.S)


@functools.cache
def names_of_methods() -> dict[Path, str]:
    """The pages whose title begins with a name like LoRA, which is no word besides."""
    titles = {path: read(path).cells[0].source.splitlines()[0] for path in notebooks()}
    names = {path: title.removeprefix("# ").split(":")[0] for path, title in titles.items()}
    return {path: name for path, name in names.items() if re.search(r"[a-z][A-Z]|[A-Z]{2}", name)}


def is_figure(output: NotebookNode) -> bool:
    data = output.get("data", {})
    return any(mime.startswith("image/") for mime in data) or "<svg" in data.get("text/html", "")


def visible_lines(nb: NotebookNode, path: Path) -> Iterator[str]:
    lines = sum(map(len, TOOL.visible_code(nb)))
    if lines > LINES:
        yield f"{lines} lines of code are visible, {LINES} are the most: fold what builds tables and figures"


def cell_length(nb: NotebookNode, path: Path) -> Iterator[str]:
    for lines in TOOL.visible_code(nb):
        if len(lines) > LINES_OF_CELL:
            yield f"{len(lines)} visible lines begin with {lines[0]!r}, {LINES_OF_CELL} are the most"


def line_width(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, cell in cells(nb, "code"):
        widest = max(map(len, cell.source.splitlines()), default=0)
        if not TOOL.FOLDED & set(tags(cell)) and widest > COLUMNS:
            yield f"{where} has a line of {widest} columns, {COLUMNS} fit the page"


def folded(nb: NotebookNode, path: Path) -> Iterator[str]:
    """A reader sees code that computes; code that builds a table or a figure is one click away."""
    building = r"\bgl\.(table|slider|place|Diagram)\(|\bplt\.|\.subplots\(|\bax\.\w+\("
    for where, cell in cells(nb, "code"):
        if (found := re.search(building, cell.source)) and not TOOL.FOLDED & set(tags(cell)):
            yield f"{where}: {found[0]!r} builds a table or a figure: give the cell the tag hide-input"


def labelled(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, cell in cells(nb, "code"):
        if not {"hide-input", "hide-cell"} & set(tags(cell)):
            continue
        label = "Solution" if is_solution(cell) else "Set-up" if cell.source == SETUP else "Code of this .+"
        for key in ("code_prompt_show", "code_prompt_hide"):
            if not re.fullmatch(label, str(cell.metadata.get("mystnb", {}).get(key, ""))):
                yield f"{where}: its metadata need mystnb.{key}: {label!r}"


def set_up_is_folded(nb: NotebookNode, path: Path) -> Iterator[str]:
    if len(nb.cells) < 2 or "hide-cell" not in tags(nb.cells[1]):
        yield "the set-up cell must be folded, with the tag hide-cell: it is where gl comes from"


def picture_early(nb: NotebookNode, path: Path) -> Iterator[str]:
    if not any(is_figure(output) for cell in nb.cells[:6] for output in cell.get("outputs", [])):
        yield "there is no picture among the first six cells"


def interactive_early(nb: NotebookNode, path: Path) -> Iterator[str]:
    heads = (i for i, cell in enumerate(nb.cells) if re.match("## Exercises", cell.source))
    end = next(heads, len(nb.cells))
    for cell in nb.cells[: (end + 1) // 2]:
        if any(map(is_interactive, cell.get("outputs", []))):
            return
    yield "no interactive figure stands in the first half of the way to the exercises"


def truth_values(nb: NotebookNode, path: Path) -> Iterator[str]:
    printed = (output for _, _, output in outputs(nb) if output.get("data", {}).keys() <= {"text/plain"})
    found = sum(len(re.findall(r"\b(True|False)\b", text_of(output))) for output in printed)
    if found > TRUTHS:
        yield f"True or False is printed {found} times, {TRUTHS} is the most: print the number, and assert"


def no_marker_comments(nb: NotebookNode, path: Path) -> Iterator[str]:
    for where, cell in cells(nb, "code"):
        if "NBVAL_" in cell.source:
            yield f"{where}: use the tag nbval-check-output instead of the comment"


def word_count(nb: NotebookNode, path: Path) -> Iterator[str]:
    most = WORDS_OF_FOUNDATIONS if page_of(path).startswith("foundations/") else WORDS
    if (found := TOOL.words(nb)) > most:
        yield f"it has {found} words, {most} is the most"


def linked(nb: NotebookNode, path: Path) -> Iterator[str]:
    """A method that has a page of its own is linked where a page speaks of it, and so is any other page."""
    text, source = prose(nb), "\n".join(cell.source for _, cell in cells(nb, "markdown"))
    for other, name in names_of_methods().items():
        spoken_of = other != path and re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)
        if spoken_of and not re.search(rf"[/(]{re.escape(other.name)}", source):
            yield f"it speaks of {name} and does not link to {page_of(other)}"
    for found in re.finditer(r"\b(the|see) (?!same\b)[\w’']+ (page|chapter)\b|\b(page|chapter) on \w+", text):
        yield f"{found[0]!r} is no link"


def facts(nb: NotebookNode, path: Path) -> Iterator[str]:
    said = TOOL.FACTS.search(nb.cells[0].source) if nb.cells else None
    if said is None:
        yield "the title cell needs '1 minutes to read · 5 seconds to run · 1.0 GB of memory' to fill in"
    elif int(said[0].split()[0]) != TOOL.minutes(nb):
        yield f"the title cell says {said[0].split()[0]} minutes to read, it takes {TOOL.minutes(nb)}"
    if said and "book/glossary.md)" not in nb.cells[0].source:
        yield "the title cell must link to the glossary, where each term stands once"


def named_checks(nb: NotebookNode, path: Path) -> Iterator[str]:
    """References and hints stand in the library, so that a stub gives neither away."""
    page = re.escape(path.stem)
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code" or "gl.check(" not in cell.source:
            continue
        calls = [
            n for n in ast.walk(parse(cell)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "gl.check"
        ]
        for call in calls:
            name = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
            if len(call.args) != 2 or call.keywords or not re.fullmatch(rf"{page}\.\w+", str(name)):
                yield f'cell {i + 1}: call gl.check("{path.stem}.name", answer), and nothing besides'
        if not is_solution(cell):
            if not re.search(r"(=|return) \.\.\.", cell.source):
                yield f"cell {i + 1}: the stub must leave ... for the answer"
            if "★" not in nb.cells[i - 1].source:
                yield f"cell {i + 1}: the exercise above must say how hard it is, from ★ to ★★★"


def heads(nb: NotebookNode, path: Path) -> Iterator[str]:
    source = "\n".join(cell.source for _, cell in cells(nb, "markdown"))
    found = [head for head in re.findall(r"(?m)^## (.+)$", source) if head in HEADS]
    if found != sorted(found, key=HEADS.index):
        yield f"the heads must come in the order {', '.join(HEADS)}, not {', '.join(found)}"
    of_a_method = path == TEMPLATE or (
        path.parent != ROOT / "notebooks" and not page_of(path).startswith(OF_NO_METHOD)
    )
    if of_a_method and (missing_heads := [head for head in HEADS if head in NEEDED and head not in found]):
        yield f"the page of a method needs the heads {', '.join(missing_heads)}"
    if of_a_method and not any("guidelib-place" in text_of(output) for _, _, output in outputs(nb)):
        yield "the page of a method needs gl.place(...)"


FORM = [
    *(visible_lines, cell_length, line_width, folded, labelled, set_up_is_folded, picture_early),
    *(interactive_early, truth_values, no_marker_comments, word_count, linked, facts, named_checks, heads),
]
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
        shown_source,
    ),
    *FORM,
]
