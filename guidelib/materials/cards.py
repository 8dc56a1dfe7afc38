"""The data cards of the book, with sizes computed from the files.

``python -m guidelib.materials.cards book/data.md`` writes them into that page.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from guidelib.materials.data import EXTRACTS, FOLDER, extract
from guidelib.materials.tasks import SPLITS, Task, load_task


def task_card(name: str) -> str:
    """The data card of a task in Markdown: its sources and rights, and sizes computed from its file."""
    task, record, file = load_task(name), extract(name), FOLDER / f"{name}.parquet"
    stored = pq.read_metadata(file).metadata
    facts = {key.decode(): int(value) for key, value in stored.items() if value.isdigit()}
    lines = [record.about, "", "| fact | value |", "|---|---|"]
    for source in record.sources:
        what = "the source distribution" if source.registry == "PyPI" else "the package"
        lines += [
            f"| Source | `{source.package}`, {what} on {source.registry}, in it `{source.member}` |",
            f"| SHA-256 of the source | `{source.sha256}` |",
            f"| Licence, as declared | {source.licence}. |",
        ]
    lines += [
        f"| SHA-256 of the extract | `{record.sha256}` ({file.stat().st_size:,} bytes) |",
        f"| Rights | {record.rights} |",
        f"| Selection | {record.selection.format(**facts)} |",
        f"| Split rule | {record.rule.format(**facts)} |",
        f"| Rebuild it | `guidelib rebuild {name}` |",
        "",
    ]
    return "\n".join(lines + (_pairs(task) if task.kind == "text2text" else _classes(task)))


def _classes(task: Task) -> list[str]:
    """The sizes of a classification task: its texts, then its labels."""
    lines = [
        "| split | items | majority | mean words | median | 95th percentile | longest |",
        "|---|" + "---:|" * 6,
    ]
    label = {split: np.array(getattr(task, split)["label"]) for split in SPLITS}
    commonest = np.bincount(label["train"]).argmax()
    for split in SPLITS:
        majority = f"{(label[split] == commonest).mean():.1%}"
        lines.append(
            f"| {split} | {label[split].size:,} | {majority} | {_words(getattr(task, split)['text'])} |"
        )
    lines += [
        "",
        f"Majority: the share that is right if you always answer *{task.labels[commonest]}*, "
        "the commonest label of the training split.",
        "",
        f"| label | {' | '.join(SPLITS)} |",
        "|---|" + "---:|" * 3,
    ]
    for i, name in enumerate(task.labels):
        shares = (f"{(label[s] == i).sum():,} ({(label[s] == i).mean():.1%})" for s in SPLITS)
        lines.append(f"| {name} | {' | '.join(shares)} |")
    lines += ["", "The first training item of each label:", ""]
    for i, name in enumerate(task.labels):
        lines.append(f"* {name}: “{next(row['text'] for row in task.train if row['label'] == i)}”")
    return lines


def _pairs(task: Task) -> list[str]:
    """The sizes of a text2text task."""
    lines = [
        "| split | text | items | copy | mean words | median | 95th percentile | longest |",
        "|---|---|" + "---:|" * 6,
    ]
    for split in SPLITS:
        data = getattr(task, split)
        copy = f"{np.mean(list(map(_word_f1, data['source'], data['target']))):.3f}"
        for column, score in (("source", copy), ("target", "")):
            lines.append(f"| {split} | {column} | {len(data):,} | {score} | {_words(data[column])} |")
    row = task.train[0]
    return [
        *lines,
        "",
        "Copy: how near the source already is to the target. It is the mean of the word F1, which counts the "
        "words that the two have in common, whatever their case and order. A model that only copies gets it.",
        "",
        f"The first training item, {row['id']}:",
        "",
        f"* source: “{row['source']}”",
        f"* target: “{row['target']}”",
    ]


def _word_f1(given: str, wanted: str) -> float:
    given, wanted = (Counter(re.findall(r"\w+", text.casefold())) for text in (given, wanted))
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def _words(texts: Iterable[str]) -> str:
    words = np.array([len(text.split()) for text in texts])
    return f"{words.mean():.1f} | {np.median(words):.0f} | {np.percentile(words, 95):.0f} | {words.max()}"


def put(page: Path, pieces: Mapping[str, str]) -> None:
    """Write each piece into ``page``, between the comments ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises ValueError if the page has not got both; it stays as it was.
    """
    text = page.read_text(encoding="utf-8")
    for name, piece in pieces.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"page: {page} has no {start.strip()} with its end: nothing can be put there")
        text = before + start + piece + end + rest.partition(end)[2]
    page.write_text(text, encoding="utf-8")


def main(pages: list[str]) -> None:
    """Write each card between its two comments in the pages; without a page, print the cards."""
    cards = {f"card: {name}": task_card(name) for name in EXTRACTS}
    if not pages:
        print("\n\n".join(cards.values()))
    for page in pages:
        put(Path(page), cards)


if __name__ == "__main__":
    main(sys.argv[1:])
