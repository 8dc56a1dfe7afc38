"""show_source: the equation first, the whole file folded."""

import importlib
import sys
import textwrap

import pytest

import guidelib as gl
from guidelib.pages.listing import show_source

SOURCE = '''\
"""A module."""

import torch


def expect(*arguments): ...


class Scaled(torch.nn.Module):
    """s x, for x (..., d)."""

    factor: float = 2.0
    words = """```
    a fence inside
    ```"""

    def __init__(self, s):
        super().__init__()
        self.s = s

    def cost(self):
        return 1

    @staticmethod
    def double(x):
        return 2 * x

    @torch.no_grad()
    def forward(self, x):
        expect(
            x.ndim > 0,
            "x",
        )
        if x.isnan().any():
            raise ValueError("x")
        if self.s == 1:
            return x
        return self.s * x

    def delta(self):
        return self.s


class Plain:
    value = 1
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "scaled_for_listing.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("scaled_for_listing")
    del sys.modules["scaled_for_listing"]


def test_of_a_class_the_equation_comes_first_without_checks(module):
    shown = show_source(module.Scaled)._repr_mimebundle_()
    assert shown["text/plain"] == textwrap.dedent('''\
        class Scaled(torch.nn.Module):
            """s x, for x (..., d)."""

            factor: float = 2.0
            words = """```
            a fence inside
            ```"""

            def delta(self):
                return self.s

            @torch.no_grad()
            def forward(self, x):
                if self.s == 1:
                    return x
                return self.s * x''')
    excerpt, folded = shown["text/markdown"].split("<details>")
    assert excerpt.strip() == f"````python\n{shown['text/plain']}\n````"
    assert folded.startswith(
        "<summary>The whole file: <code>scaled_for_listing.py</code></summary>\n\n````python\n"
    )
    assert folded.strip().endswith(f"{SOURCE.strip()}\n````\n\n</details>")


def test_functions_may_be_chosen(module):
    assert repr(show_source(module.Scaled, "cost")).endswith("def cost(self):\n        return 1")
    assert "def delta" not in repr(show_source(module.Scaled, "cost"))
    static = "    @staticmethod\n    def double(x):\n        return 2 * x"
    assert repr(show_source(module.Scaled, "double")).endswith(static)
    for absent in ("backward", "factor", "train"):  # train is there, but inherited
        with pytest.raises(ValueError, match=f"functions must be .*, got '{absent}'"):
            show_source(module.Scaled, absent)


def test_what_has_no_equation_is_shown_whole(module):
    assert repr(show_source(module.Plain)) == "class Plain:\n    value = 1"
    assert repr(show_source(module.Scaled.delta)) == "def delta(self):\n    return self.s"
    whole = show_source(module)._repr_mimebundle_()
    assert whole["text/plain"] == SOURCE.strip() and "<details>" not in whole["text/markdown"]
    assert whole["text/markdown"].startswith("`scaled_for_listing.py`\n")
    assert show_source(gl)._repr_mimebundle_()["text/markdown"].startswith("`guidelib/__init__.py`\n")


def test_what_is_shown_runs():
    """An excerpt is still Python, for every class that a page may show."""
    for names in gl.METHODS.values():
        for name in names:
            compile(repr(show_source(getattr(gl, name))), name, "exec")


@pytest.mark.parametrize("thing", [3, len, sys, object()])
def test_what_has_no_source_is_refused(thing):
    with pytest.raises(TypeError, match="thing must be a class, function or module"):
        show_source(thing)
