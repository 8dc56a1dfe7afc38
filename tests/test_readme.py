"""What the README tells a reader to type works as it stands."""

import re

from notebook_rules import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_in_ten_lines(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert "train=2000" in code
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code.replace("train=2000", "train=64"), scope)
    assert scope["gl"].attached(scope["model"]).method == scope["gl"].LoRA(r=8, alpha=16)
    assert (tmp_path / "lora.safetensors").stat().st_size < 400_000


def test_the_two_commands_are_there_and_ci_runs_the_second():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{command}:", makefile, flags=re.M), command
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith(("#", "set ", "cd "))] == ["exec make test"]
