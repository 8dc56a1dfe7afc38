"""What a saved method looks like on disk: one safetensors file, whose metadata say which method it is and
which base it belongs to.

    format     "guidelib 2"
    method     the method, as JSON
    base       the architecture, a hash of the shapes, and sums of weights: see fingerprint.py
    drawn      if there are any: the names of parameters beside the blocks that transformers had drawn, which
               are trained with the head; a copy of the model no longer knows which they were
    checksum   SHA-256 of the above and of the tensors

A tensor is called ``guidelib.<part>.<its name there>``, or as the base parameter that it replaces.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from guidelib.core.anatomy import ADDED, Anatomy
from guidelib.core.fingerprint import difference
from guidelib.core.values import has_values

try:
    import fcntl
except ImportError:  # not on Windows, where what a killed process has left stays
    fcntl = None

FORMAT = "guidelib 2"


def write(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a file that appears whole or not at all, and is on the disk when this returns.

    A link stays one: its target is written.  A file that is replaced passes on its permissions, a new one
    has those that the umask leaves.  Raises FileNotFoundError if the folder is missing, ValueError for a
    tensor with NaN or infinity, OSError if there is no room or no permission; what stood there is then as it
    was.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(path.parent)!r} does not exist; make it first")
    _expect_finite(path, tensors)
    try:
        with _folder(target) as folder:
            file = folder / "file"
            save_file({name: t.contiguous() for name, t in tensors.items()}, file, dict(metadata))
            mode = target if target.exists() else folder  # the umask is in the folder's
            file.chmod(mode.stat().st_mode & 0o666)
            _sync(file)
            file.replace(target)
        with suppress(OSError):  # the file is there; only a power failure in these seconds could undo it
            _sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        kind = type(error) if isinstance(error, OSError) else OSError
        reason = getattr(error, "strerror", None) or error
        raise kind(f"path: {str(path)!r} could not be written, and is as it was: {reason}") from error
    return path


@contextmanager
def _folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write in, which goes afterwards; and so do those that killed processes
    have left."""
    start, end = f".{target.name[:200]}.", ".partial"
    for left in [*target.parent.iterdir()]:
        if left.name.startswith(start) and left.name.endswith(end):
            with suppress(OSError), _lock(left):
                shutil.rmtree(left)
    folder = target.parent / f"{start}{secrets.token_hex(4)}{end}"
    folder.mkdir()
    with ExitStack() as stack:
        stack.callback(_remove, folder)
        with suppress(OSError):  # where there are no locks, nobody removes what another one writes, either
            stack.enter_context(_lock(folder))
        yield folder


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()  # its file has gone to its place
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Raises OSError where somebody else is at work, or nobody can tell."""
    if fcntl is None:
        raise OSError("no locks")
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    if fcntl is not None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(
    anatomy: Anatomy, path: str | os.PathLike, *, any_weights: bool = False
) -> tuple[Any, dict[str, torch.Tensor], frozenset[str]]:
    """The method, as JSON, the tensors and the drawn names of a file that belongs to the model of
    ``anatomy``.

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
        drawn = frozenset(json.loads(metadata.get("drawn", "[]")))
    except (safetensors.SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"path: {path.name!r} is damaged or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: {path.name!r} was not saved by guidelib (format {metadata.get('format')!r})")
    if metadata.get("checksum") != checksum(tensors, metadata):
        raise ValueError(f"path: {path.name!r} is damaged: its checksum is not that of what it holds")
    _expect_finite(path, tensors)
    brought = {name for name in tensors if not name.startswith(f"{ADDED}.")}
    try:
        found = difference(anatomy, base, brought, any_weights)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path: {path.name!r} is damaged: it does not say which backbone it belongs to"
        ) from error
    if found:
        raise ValueError(f"path: {path.name!r} belongs to another backbone: {found}")
    if unknown := drawn - anatomy.base_parameters().keys():
        raise ValueError(f"path: {path.name!r} is damaged: it speaks of {min(unknown)!r}")
    return method, tensors, drawn


def checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the tensors, and of all that ``metadata`` says besides."""
    said = {name: text for name, text in metadata.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if has_values(tensor):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _expect_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.itemsize == 1 else tensor  # of 8 bits, torch cannot tell
        # a sum is several times faster, and finite only where all numbers are
        if tensor.is_floating_point() and not (values.sum().isfinite() or values.isfinite().all()):
            raise ValueError(f"path: {path.name!r} would not act: tensor {name!r} holds NaN or infinity")
