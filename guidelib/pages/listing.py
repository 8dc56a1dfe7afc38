"""Listings of guidelib's own source: the lines that are the equation, and the whole file folded below."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from guidelib.core.method import expect
from guidelib.pages.viz import Output

# what a module computes, and what a method builds at one place
EQUATION = ("delta", "effective", "adjust", "forward", "build")


def show_source(thing: Any, *functions: str) -> Output:
    """The source of a class, function or module as it runs here: a notebook teaches the code that it uses.

    Of a class, its fields and the ``functions`` that are named, or those that are its equation (`EQUATION`)
    as far as it has them itself, without argument checks.  A class without any, and anything else, is shown
    whole.  The file stands folded below.  All is in fenced blocks, so that the site's or the notebook's own
    highlighter sets it, in light and dark.  Raises `TypeError` for what has no Python source, `ValueError`
    for a function that the class does not have.
    """
    thing = inspect.unwrap(thing)  # of a function that is cached
    try:
        code = textwrap.dedent(inspect.getsource(thing)).rstrip()
    except (TypeError, OSError):
        kind = type(thing).__name__
        raise TypeError(f"thing must be a class, function or module written in Python, not {kind}.") from None
    own = vars(thing) if isinstance(thing, type) else {}
    for name in functions:
        function = getattr(own.get(name), "__func__", own.get(name))  # of a static method
        expect(inspect.isfunction(function), "functions", name, f"functions of {thing!r} itself")
    chosen = functions or [name for name in EQUATION if inspect.isfunction(own.get(name))]
    if chosen:
        code = "\n".join(_excerpt(code, chosen))
    path = inspect.getmodule(thing).__name__.replace(".", "/")
    path += "/__init__.py" if hasattr(thing, "__path__") else ".py"
    file = Path(inspect.getsourcefile(thing))
    whole = file.read_text(encoding="utf-8").rstrip() if file.is_file() else code  # a cell is no file
    if code == whole:
        shown = f"`{path}`\n\n{_fenced(code)}"
    else:
        title = f"<summary>The whole file: <code>{path}</code></summary>"
        shown = f"{_fenced(code)}\n<details>{title}\n\n{_fenced(whole)}\n</details>\n"
    return Output(text_markdown=shown, text_plain=code)


def _excerpt(code: str, names: Sequence[str]) -> Iterator[str]:
    """The head of the class, its docstring and its fields, then the functions, without argument checks."""
    lines = [None, *code.split("\n")]  # counted from 1, as the syntax tree does
    (node,) = ast.parse(code).body
    functions = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    fields = [item for item in node.body if not isinstance(item, ast.FunctionDef | ast.ClassDef)]
    yield "\n".join(lines[n] for n in range(1, _numbers(node.body[0]).start))
    for before, item in zip([None, *fields], fields, strict=False):
        apart = before is not None and _is_text(before)
        yield "\n" * apart + "\n".join(lines[n] for n in _numbers(item))
    for name in names:
        checks = {n for item in functions[name].body if _is_check(item) for n in _numbers(item)}
        yield "\n" + "\n".join(lines[n] for n in _numbers(functions[name]) if n not in checks)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _numbers(node: ast.stmt) -> range:
    """The lines of a statement, its decorators included."""
    first = min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))])
    return range(first, node.end_lineno + 1)


def _is_check(node: ast.stmt) -> bool:
    """expect(...), or an ``if`` that does nothing but raise."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", None) == "expect"
    return isinstance(node, ast.If) and not node.orelse and all(isinstance(n, ast.Raise) for n in node.body)


def _fenced(code: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}python\n{code}\n{fence}\n"
