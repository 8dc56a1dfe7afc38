"""The committed notebooks as files: every rule of notebook_rules on every notebook."""

import subprocess
import sys

import notebook_rules as rules
import pytest


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", rules.notebooks(), ids=rules.name_of)
def test_rule(path, rule):
    problems = list(rule(rules.read(path), path))
    assert not problems, "\n".join(problems)


def test_every_page_of_the_table_of_contents_exists():
    exists = {
        page for page in rules.pages() for s in (".md", ".ipynb") if (rules.ROOT / (page + s)).is_file()
    }
    assert not set(rules.pages()) - exists


def test_every_page_of_the_book_is_listed():
    written = {
        p.relative_to(rules.ROOT).as_posix().removesuffix(".md") for p in rules.ROOT.glob("book/**/*.md")
    }
    assert not written - set(rules.pages())


def test_notebooks_are_stored_as_the_tool_stores_them():
    tool = subprocess.run(
        [sys.executable, rules.ROOT / "tools/notebooks.py", "--check"], capture_output=True, text=True
    )
    assert tool.returncode == 0, tool.stdout + tool.stderr
