"""What a saved method looks like on disk: one safetensors file, whose metadata say which method it is and
which base it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from guidelib.core.anatomy import Anatomy

FORMAT = "guidelib 1"


def write(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a file that appears whole or not at all.  Raises FileNotFoundError if its folder is missing."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(path.parent)!r} does not exist; make it first")
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        temporary = Path(file.name)
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
        temporary.chmod(0o644)  # a temporary file is its owner's alone, an adapter is to be shared
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(
    anatomy: Anatomy, path: str | os.PathLike, *, any_weights: bool = False
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The method, as JSON, and the tensors of a file that belongs to the model of ``anatomy``.

    Raises as ``load`` does.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {str(path)!r}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        method, base = json.loads(metadata.get("method", "0")), json.loads(metadata.get("base", "0"))
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {path.name!r} is damaged or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: {path.name!r} was not saved by guidelib (format {metadata.get('format')!r})")
    mine = fingerprint(anatomy)
    if not isinstance(base, dict) or base.keys() != mine.keys():
        raise ValueError(f"path: {path.name!r} is damaged: it does not say which backbone it belongs to")
    for key, meaning in (("model_type", "architecture"), ("shapes", "shapes"), ("weights", "weights")):
        if mine[key] != base[key] and not (key == "weights" and any_weights):
            advice = "; any_weights=True loads it all the same" if key == "weights" else ""
            raise ValueError(
                f"path: {path.name!r} belongs to another backbone: its {meaning} {base[key]!r} differ from "
                f"this model's {mine[key]!r}{advice}"
            )
    return method, tensors


def fingerprint(anatomy: Anatomy) -> dict[str, str]:
    """What an adapter file says of its base: architecture, shapes, and a sample of the weights.

    The task head is left out, since it differs per task; the sample is rounded to bfloat16, so that a base
    loaded in 16 bits is recognised.  A model without weights (meta device) has an empty sample.
    """
    head = anatomy.head()
    base = {name: p for name, p in anatomy.base_parameters().items() if name not in head}
    shapes = json.dumps({name: tuple(p.shape) for name, p in base.items()}, sort_keys=True)
    sample = hashlib.sha256()
    for _, parameter in sorted(base.items()):
        if parameter.device.type != "meta":
            flat = parameter.detach().flatten()
            few = flat[:: max(1, flat.numel() // 16)].to(torch.bfloat16).cpu()
            sample.update(few.view(torch.int16).numpy().tobytes())
    return {
        "model_type": anatomy.kind,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "weights": sample.hexdigest()[:16],
    }
