"""The book builds from clean, and what is wrong in a page stops the build."""

import shutil

import notebook_rules as rules
import pytest


def test_the_book_builds_without_a_warning(book):
    assert book.exit_code == 0, book.log


@pytest.mark.parametrize("page", rules.pages())
def test_every_listed_page_is_built(book, page):
    assert (book.html / f"{page}.html").is_file()


@pytest.mark.parametrize(
    "text",
    ["See {ref}`nowhere`.", "![A picture that is not there](nowhere.png)"],
    ids=["reference", "picture"],
)
def test_a_broken_page_stops_the_build(build_book, tmp_path, text):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(rules.ROOT / "_config.yml", source)
    shutil.copytree(rules.ROOT / "book", source / "book")
    (source / "_toc.yml").write_text("format: jb-book\nroot: broken\n", encoding="utf-8")
    (source / "broken.md").write_text(f"# Broken\n\n{text}\n", encoding="utf-8")
    result = build_book(source, tmp_path / "target")
    assert result.exit_code == 1, result.log
    assert "nowhere" in result.log
