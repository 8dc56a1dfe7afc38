"""The project's address and version stand in pyproject.toml; whatever repeats them must say the same."""

import re
import subprocess

import notebook_rules as rules
import pytest
import yaml

import guidelib

PREFIX = "https://github.com/"
OWNER, NAME = rules.REPOSITORY.removeprefix(PREFIX).split("/")


def tracked():
    """The text files of the project, including those not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=rules.ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [rules.ROOT / name for name in listed.stdout.splitlines()]
    else:  # an archive without git
        kept = [
            p
            for p in rules.ROOT.iterdir()
            if p.name in (".ci", ".github") or not p.name.startswith((".", "_build"))
        ]
        paths = [path for top in kept for path in ([top] if top.is_file() else top.rglob("*"))]
    for path in paths:
        try:
            yield path.relative_to(rules.ROOT).as_posix(), path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue


def wrong_addresses(text):
    """Links to a repository of this name, or through a launch button, that are not to this repository."""
    here = f"{OWNER}/{NAME}"
    code = re.findall(rf"github\.com[/:]([\w.-]+/{re.escape(NAME)})\b", text)
    launched = re.findall(
        r"(?:colab\.research\.google\.com|kaggle\.com|mybinder\.org)/\S*?(?:github(?:\.com)?|gh)/([\w.-]+/[\w.-]+)",
        text,
    )
    pages = [f"{owner}/{NAME}" for owner in re.findall(rf"//([\w-]+)\.github\.io/{re.escape(NAME)}\b", text)]
    return sorted(
        {found for found in code + launched if found != here}
        | {p for p in pages if p.lower() != here.lower()}
    )


def wrong_versions(text):
    """Installations of this project from another tag than its version's."""
    return sorted(set(re.findall(rf"/{re.escape(NAME)}(?:\.git)?@([\w.-]+\w)", text)) - {f"v{rules.VERSION}"})


def test_the_address_is_one_of_github():
    assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", rules.REPOSITORY)
    assert not rules.REPOSITORY.endswith(".git")


def test_every_address_is_this_one():
    wrong = {path: found for path, text in tracked() if (found := wrong_addresses(text))}
    assert not wrong


def test_every_version_is_this_one():
    wrong = {path: found for path, text in tracked() if (found := wrong_versions(text))}
    assert not wrong


def test_the_site_points_at_the_repository():
    assert rules.CONFIG["repository"]["url"] == rules.REPOSITORY


def test_the_citation_file_agrees():
    citation = yaml.safe_load((rules.ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rules.VERSION
    assert citation["repository-code"] == rules.REPOSITORY


def test_the_library_has_this_version():
    assert guidelib.__version__ == rules.VERSION


@pytest.mark.parametrize(
    "text",
    [
        f"{PREFIX}someone/{NAME}",
        f"git@github.com:someone/{NAME}.git",
        f"https://colab.research.google.com/github/someone/{NAME}/blob/main/x.ipynb",
        f"https://colab.research.google.com/github/{OWNER}/other/blob/main/x.ipynb",
        f"https://kaggle.com/kernels/welcome?src={PREFIX}someone/{NAME}/blob/main/x.ipynb",
        f"https://someone-else.github.io/{NAME}/",
    ],
)
def test_a_wrong_address_is_noticed(text):
    assert wrong_addresses(text)
    assert wrong_versions(f"git+{rules.REPOSITORY}@v9.9.9")


def test_the_right_address_is_accepted():
    colab = rules.colab(rules.ROOT / "notebooks/x.ipynb")
    text = f"git+{rules.REPOSITORY}@v{rules.VERSION} {rules.REPOSITORY}/issues {colab}"
    assert not wrong_addresses(text) and not wrong_versions(text)
