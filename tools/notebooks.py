"""Execute notebooks anew and store them the way this project keeps them.

    python tools/notebooks.py [notebook or folder ...]      execute and store; all of notebooks/ by default
    python tools/notebooks.py --check [...]                 store nothing, only say what is not stored cleanly

A notebook is executed in its own folder, by the Python that runs this script, and is replaced only if every
cell succeeded. Outputs are kept. What differs between two runs or two machines and means nothing is not:
stderr, timing, widget state, random cell ids, addresses in representations.

Three facts in the title cell are written here: "8 minutes to read · 40 seconds to run · 1.6 GB of memory".
Reading is 200 words or 25 lines of visible code a minute. Running is processor time, so that a busy machine
and an idle one say the same. Memory is the kernel's peak.
"""

import argparse
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
KEPT = {"tags", "mystnb", "cellView", "jupyter"}  # the cell metadata that somebody wrote on purpose
USED = """import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)"""
FACTS = re.compile(r"\d+ minutes? to read · \d+ seconds to run · [\d.]+ GB of memory")
FOLDED = {"hide-cell", "hide-input", "remove-cell", "remove-input"}


def clean(nb: NotebookNode) -> NotebookNode:
    """The same notebook in its stored form. Executes nothing; cleaning twice changes nothing more."""
    nb = nbformat.from_dict(nb)
    nb.nbformat, nb.nbformat_minor = 4, 5
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    count = 0
    for i, cell in enumerate(nb.cells, 1):
        cell.id = f"cell-{i}"
        cell.source = cell.source.strip()
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in KEPT}
        if cell.cell_type == "code":
            if cell.execution_count is not None:  # an unexecuted cell stays one, for the tests to find
                cell.execution_count = count = count + 1
            cell.outputs = [tidy(output, count) for output in cell.outputs if output.get("name") != "stderr"]
    return nbformat.from_dict(nb)


def tidy(output: NotebookNode, count: int) -> NotebookNode:
    if output.output_type == "execute_result":
        output.execution_count = count
    if output.output_type == "error":  # the frames hold paths of the machine
        output.traceback = [f"{output.ename}: {output.evalue}"]
    if "data" in output:
        output.metadata = {}
        if "text/plain" in output.data:
            output.data["text/plain"] = re.sub(r"\bat 0x[0-9a-fA-F]+", "at 0x...", output.data["text/plain"])
    return output


def visible_code(nb: NotebookNode) -> list[list[str]]:
    """What a reader sees of the code without a click: the lines of each cell, and of each listing."""
    found = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            if not FOLDED & set(cell.metadata.get("tags", [])):
                found.append(cell.source.splitlines())
            for output in cell.outputs:
                shown = output.get("data", {}).get("text/markdown", "").split("<details>")[0]
                blocks = re.findall(r"^(`{3,})python\n(.*?)\n\1$", shown, re.M | re.S)
                found += [code.splitlines() for _, code in blocks]
    return found


def words(nb: NotebookNode) -> int:
    """Of the prose: without addresses, HTML and formulas on lines of their own."""
    text = "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    text = re.sub(r"\$\$.*?\$\$|```.*?```|<[^>]*>", " ", text, flags=re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def minutes(nb: NotebookNode) -> int:
    """To read the page."""
    return math.ceil(words(nb) / 200 + sum(map(len, visible_code(nb))) / 25)


def state_facts(nb: NotebookNode, peak: int, seconds: float) -> None:
    """Write what was measured where the title cell states it. Seconds go up in steps of 5."""
    read = minutes(nb)
    said = f"{read} minute{'s' * (read != 1)} to read · {max(5, 5 * math.ceil(seconds / 5))} seconds to run"
    said += f" · {max(peak, 103) / 1024:.1f} GB of memory"
    nb.cells[0].source = FACTS.sub(said, nb.cells[0].source)


def execute(nb: NotebookNode, folder: Path, timeout: int) -> tuple[int, float]:
    """Fill in the outputs, and return the kernel's peak resident memory in MiB and its processor time in
    seconds."""
    nb.cells.append(nbformat.v4.new_code_cell(USED))
    os.environ["GUIDELIB_LIVE"] = "0"  # what is stored is the page's version, not a live widget
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # or processor time would count threads that wait
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    )
    client.execute()
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak, seconds = nb.cells.pop().outputs[0].text.split()
    return int(peak) // unit, float(seconds)


def write(nb: NotebookNode, path: Path) -> None:
    """Replace the file in one step, so that an interrupted run leaves the old one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        file.write(stored(nb))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def stored(nb: NotebookNode) -> str:
    return nbformat.writes(nb) + "\n"


def find(paths: list[Path]) -> list[Path]:
    found = [p for path in paths for p in ([path] if path.is_file() else sorted(path.rglob("*.ipynb")))]
    return [path for path in found if ".ipynb_checkpoints" not in path.parts]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "notebooks"])
    parser.add_argument(
        "--check", action="store_true", help="execute and write nothing; exit 1 if a file is not clean"
    )
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one cell (default: 300)")
    args = parser.parse_args()
    if absent := [str(path) for path in args.paths if not path.exists()]:
        parser.error(f"no such file or folder: {', '.join(absent)}")
    bad = 0
    for path in find(args.paths):
        text = path.read_text(encoding="utf-8")
        nb = nbformat.reads(text, as_version=4)
        if args.check:
            if stored(clean(nb)) != text:
                bad += 1
                print(f"{path}: not stored cleanly; run python tools/notebooks.py {path}")
            continue
        start = time.monotonic()
        try:
            peak, seconds = execute(nb, path.parent, args.timeout)
        except (CellExecutionError, DeadKernelError, TimeoutError) as error:
            bad += 1
            print(f"{path}: left as it was, because it did not run\n{error}", file=sys.stderr)
            continue
        state_facts(nb, peak, seconds)
        write(clean(nb), path)
        print(f"{path}: {time.monotonic() - start:.1f} s, processor {seconds:.1f} s, peak {peak} MiB")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
