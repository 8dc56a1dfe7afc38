"""The machine that a computation runs on: its device and the versions of what runs there."""

import importlib.metadata
import os
import platform

import guidelib


def version(package: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    if package == "guidelib":
        return guidelib.__version__  # what runs here, not what some metadata says
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | int | None]:
    """Where a stored result was computed. A package that is missing has the version None."""
    packages = ("guidelib", "torch", "transformers", "datasets", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        **{package: version(package) for package in packages},
    }


def device() -> str:
    """The device for models: "cuda" if there is one, else "cpu"; GUIDELIB_DEVICE chooses cpu, cuda or mps.

    An Apple GPU ("mps") is used only when chosen: it lacks operations and rounds in its own way, so that its
    results would not be the book's. Raises `ValueError` for a device that this machine does not have.
    """
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    chosen = os.environ.get("GUIDELIB_DEVICE") or ("cuda" if available["cuda"] else "cpu")
    if not available.get(chosen):
        here = ", ".join(name for name, there in available.items() if there)
        raise ValueError(f"GUIDELIB_DEVICE must be a device of this machine ({here}), not {chosen!r}.")
    return chosen
