"""Making the runs of an experiment: any number of processes on one file, none of them indispensable.

Each process takes the next run that nobody is at, makes it and adds it to the file.  That nobody else is at
it is known from a lock which the system takes back when a process ends, however it ends.  A run is always
made on one thread, or on the GPU, so it does not matter which process makes it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm.std import tqdm

from guidelib.core.method import expect, is_whole
from guidelib.experiments.base import KEY, Experiment, Results, Row
from guidelib.machine import device, versions

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def work(experiment: Experiment, path: Path, *, jobs: int = 1, progress: bool = True) -> Path:
    """Make what is missing of ``experiment`` in the file ``path``, with ``jobs`` processes; returns the path.

    Raises ValueError if the file was made with other settings, versions or another kind of device, and
    RuntimeError if a process failed.
    """
    expect(is_whole(jobs), "jobs", jobs, "a whole number of at least 1")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _begin(experiment, path)
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)  # read by the processes as they start
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(experiment, path), daemon=True) for _ in range(jobs)]
    try:
        for worker in workers:
            worker.start()
        _watch(experiment, path, workers, progress)
    except BaseException:
        for worker in workers:
            if worker.is_alive():  # it may be killed at any time
                worker.terminate()
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"a process failed; `guidelib compare` goes on with {path.name} where it stopped")
    with _locked(path):
        experiment.tidy(read(path), path.with_suffix(""))
    return path


def _begin(experiment: Experiment, path: Path) -> None:
    """Make the file with no run in it, or see that the runs that are there belong to ``experiment``."""
    expected = {"settings": experiment.to_json(), "provenance": provenance()}
    with _locked(path):
        if not path.exists() or not read(path)["runs"]:
            _write(path, expected | experiment.facts() | {"runs": []})
    stored = read(path)
    for name, value in expected.items():
        if stored[name] != value:
            raise ValueError(f"{path.name} was made with other {name}; move it away to start again")


def _watch(experiment: Experiment, path: Path, workers: list, progress: bool) -> None:
    """Show how far the work is until the processes end."""
    with tqdm(initial=len(read(path)["runs"]), disable=not progress, unit="run", smoothing=0) as bar:
        ended = False
        while not ended:
            ended = not any(worker.is_alive() for worker in workers)
            runs = read(path)["runs"]
            if len(runs) != bar.n or bar.total is None:
                bar.n, bar.total = len(runs), len(runs) + Results(experiment, runs).expected()
                bar.refresh()
            for worker in workers:
                worker.join(0 if ended else 1)


def _work(experiment: Experiment, path: Path) -> None:
    """What one process does."""
    import torch

    torch.set_num_threads(1)
    while multiprocessing.parent_process() is None or multiprocessing.parent_process().is_alive():
        result = read(path)
        todo = list(Results(experiment, result["runs"]).to_do())
        if not todo:
            return
        for key in todo:
            with _at(path, key) as free:
                if free and not _made(path, experiment, key):
                    add(path, experiment, key | experiment.run(key, result, path.with_suffix("")))
                    break
        else:
            time.sleep(1)  # others are at all that can be made now


@contextmanager
def _at(path: Path, key: Row) -> Iterator[bool]:
    """Whether the run ``key`` is this process's now."""
    lock = _lock(path, json.dumps(key), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # on Windows it stays
            os.unlink(lock.lock_file)  # who is about to take it asks once more what is made
        lock.release()


def _locked(path: Path) -> FileLock:
    return _lock(path, "the file itself", timeout=-1)


def _lock(path: Path, what: str, timeout: float) -> FileLock:
    """Beside the file, where all that work on it see it."""
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    return FileLock(path.with_name(f".{path.stem}-{name}.lock"), timeout=timeout)


def _made(path: Path, experiment: Experiment, key: Row) -> bool:
    return tuple(key.values()) in Results(experiment, read(path)["runs"]).made


def add(path: Path, experiment: Experiment, run: Row) -> None:
    """Add a run to the file; what others have added meanwhile stays."""
    with _locked(path):
        result = read(path)
        results = Results(experiment, result["runs"])
        results.made.setdefault(tuple(run[name] for name in KEY), run)
        _write(path, result | {"runs": results.sorted()})


def read(path: Path) -> Row:
    """What the file holds.  Raises ValueError if that is no result."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        result = None
    parts = {"settings", "provenance", "runs"}
    expect(isinstance(result, dict) and parts <= set(result), "path", path.name, "the file of a result")
    return result


def provenance() -> Row:
    """Versions and device of a run: results of different ones are not put together."""
    made_with = versions()
    del made_with["cpus"]  # each run has one thread
    if device() == "cuda":
        import torch

        return made_with | {"device": torch.cuda.get_device_name()}
    return made_with | {"device": device()}


def _write(path: Path, result: Row) -> None:
    """Replace the file in one step.  A run has a line of its own."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items() if name != "runs"]
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in result["runs"])
    lines.append(f' "runs": [\n{runs}\n]')
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)
