"""``import guidelib`` is fast because it imports nothing heavy, and still shows everything it has."""

import json
import subprocess
import sys

import guidelib as gl

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "matplotlib",
    "numpy",
    "pyarrow",
    "pandas",
    "safetensors",
    "IPython",
)


def fresh(code):
    """What a new interpreter prints as JSON for ``code``."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_import_alone_loads_nothing_heavy():
    loaded = fresh("import guidelib, sys, json; dir(guidelib); print(json.dumps(sorted(sys.modules)))")
    assert "guidelib" in loaded
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}
    assert [name for name in loaded if name.startswith("guidelib")] == ["guidelib"]


def test_the_command_lists_its_commands_without_loading_torch():
    loaded = fresh("import guidelib.cli, sys, json; print(json.dumps(sorted(sys.modules)))")
    assert "torch" not in loaded and "transformers" not in loaded


def test_every_public_name_resolves_and_says_what_it_is():
    for name in gl.__all__:
        value = getattr(gl, name)
        if name == "METHODS":
            continue
        assert value.__name__ == name
        assert value.__module__.startswith("guidelib.")
        assert value.__doc__ and len(value.__doc__.split()) > 4, name
        assert not value.__doc__.startswith(f"{name}("), name  # the one that dataclasses make


def test_dir_lists_every_public_name():
    assert set(gl.__all__) <= set(dir(gl))
    assert len(set(gl.__all__)) == len(gl.__all__)
    assert (
        fresh("import guidelib, json; print(json.dumps(sorted(set(guidelib.__all__) - set(dir(guidelib)))))")
        == []
    )


def test_a_star_import_gives_every_public_name():
    names = {}
    exec("from guidelib import *", names)
    assert set(gl.__all__) <= names.keys() and names["LoRA"] is gl.LoRA


def test_submodules_are_reached_as_attributes():
    code = "import guidelib, json; print(json.dumps([guidelib.cli.__name__, guidelib.viz.__name__]))"
    assert fresh(code) == ["guidelib.cli", "guidelib.pages.viz"]


def test_a_name_that_is_not_there_is_an_attribute_error():
    code = """
import guidelib, json
messages = []
for name in ("LORA", "_private", "no_such"):
    try:
        getattr(guidelib, name)
    except AttributeError as error:
        messages.append(str(error))
print(json.dumps([messages, hasattr(guidelib, "nothing")]))
"""
    names = ("LORA", "_private", "no_such")
    assert fresh(code) == [[f"guidelib has no attribute {name!r}" for name in names], False]


def test_a_missing_dependency_is_not_taken_for_a_missing_name():
    """Where torch is not installed, ``guidelib.costs`` says that, and not that guidelib has no costs."""
    code = """
import sys, json
sys.modules["torch"] = None  # as if it were not installed
import guidelib
try:
    guidelib.costs
except Exception as error:
    print(json.dumps([type(error).__name__, "torch" in str(error)]))
"""
    assert fresh(code) == ["ModuleNotFoundError", True]
