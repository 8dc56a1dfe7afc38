"""The set-up of a notebook: seeds, quiet libraries, and a word on what is missing or too old."""

import importlib.metadata
import os
import random
import sys

import guidelib
from guidelib.machine import device, version

_QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def _advice() -> str | None:
    """The first thing that is off, with its remedy; None if nothing is. No accelerator is fine."""
    import torch
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("guidelib") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = []
    for bound in map(Requirement, lines):
        if bound.marker is not None and not bound.marker.evaluate({"extra": ""}):
            continue
        found = version(bound.name)
        if found is None or not bound.specifier.contains(found, prereleases=True):
            state = "is not installed" if found is None else f"{found} is too old"
            return f'{bound.name} {state}: run %pip install -U "{bound.name}{bound.specifier}" and restart.'
    if torch.cuda.is_available() and "GUIDELIB_DEVICE" not in os.environ:
        return "The GPU is not used: the pages are made for the CPU, where each of them takes seconds."
    if torch.backends.mps.is_available() and "GUIDELIB_DEVICE" not in os.environ:
        return (
            "The Apple GPU is not used: its results differ from the book's. GUIDELIB_DEVICE=mps turns it on."
        )
    return None


def setup(seed: int = 0) -> None:
    """Seed random, numpy and torch; quieten the Hugging Face libraries; leave a GPU alone; print versions,
    device and advice.

    The environment variables that you set yourself, such as TRANSFORMERS_VERBOSITY, stay as they are.
    Raises `ValueError` for a seed that numpy cannot take.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, not {seed!r}.")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    # The variables are read at import; what was imported before is told directly.
    if (transformers := sys.modules.get("transformers")) and os.environ["TRANSFORMERS_VERBOSITY"] == "error":
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        datasets.disable_progress_bars()
    if (hub := sys.modules.get("huggingface_hub")) and os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1":
        hub.utils.disable_progress_bars()

    import numpy
    import torch

    advice = _advice()
    if torch.cuda.is_available():  # the pages' own tensors are on the CPU
        os.environ.setdefault("GUIDELIB_DEVICE", "cpu")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)  # every device
    shown = " · ".join(f"{name} {version(name)}" for name in ("guidelib", "torch", "transformers"))
    print(f"{shown} · {device()}")
    if advice:
        print(advice)


def require(version: str) -> None:
    """Raise `RuntimeError` with the command that updates guidelib if it is older than `version`."""
    from packaging.version import InvalidVersion, Version

    try:
        old = Version(guidelib.__version__) < Version(version)
    except (InvalidVersion, TypeError):
        raise ValueError(f"version must look like '0.1.0', not {version!r}.") from None
    if old:
        try:
            urls = importlib.metadata.metadata("guidelib").get_all("Project-URL") or []
            address = next(url.split(", ", 1)[1] for url in urls if url.startswith("Repository, "))
            update = f'%pip install -U --no-deps "guidelib @ git+{address}@v{version}"'
        except (importlib.metadata.PackageNotFoundError, StopIteration):
            update = "git pull"  # a checkout that is not installed
        raise RuntimeError(
            f"This notebook needs guidelib {version}, and {guidelib.__version__} is installed: "
            f"run {update} and restart."
        )
