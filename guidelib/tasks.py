"""Tasks: real data sets, frozen as Parquet files inside the package and checked against a hash.

`load_task` gives the splits, `rebuild_task` makes a file again from its source, and `task_card` describes it.
``python -m guidelib.tasks book/data.md`` writes the cards into that page.
"""

import hashlib
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from guidelib.data import EXTRACTS, FOLDER, extract, rebuild_task

__all__ = ["Task", "load_task", "rebuild_task", "task_card"]
SPLITS = ("train", "validation", "test")
TEXT_COLUMNS = ("text", "sentence", "content", "review")  # on the hub, in this order
LABEL_COLUMNS = ("label", "labels")


@dataclass(frozen=True)
class Task:
    """A data set in three splits, with the columns ``text`` and ``label`` (an index into ``labels``)."""

    name: str
    kind: str  # "classification"
    labels: tuple[str, ...]
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, split: str, max_length: int = 64
    ) -> datasets.Dataset:
        """``input_ids``, ``attention_mask`` and ``labels`` of a split, cut at ``max_length`` tokens.

        Nothing is padded: the collator pads each batch to its own longest text.
        """
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, but one of {', '.join(SPLITS)} is accepted")
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, but a positive number of tokens is accepted")
        data = getattr(self, split)
        encoded = tokenizer(list(data["text"]), truncation=True, max_length=max_length)
        columns = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        return datasets.Dataset.from_dict(columns | {"labels": list(data["label"])})

    def subset(
        self, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> "Task":
        """The same task with fewer items, drawn by ``seed``; None keeps a split whole.

        With the same seed, a smaller draw is the beginning of a larger one.
        """
        chosen = {}
        for split, size in zip(SPLITS, (train, validation, test), strict=True):
            data = getattr(self, split)
            if size is None:
                continue
            if not 1 <= size <= len(data):
                raise ValueError(
                    f"{split}: got {size}, but 1 to {len(data)} (all items of {self.name!r}) is accepted"
                )
            chosen[split] = data.select(np.random.default_rng(seed).permutation(len(data))[:size])
        return replace(self, **chosen)


def load_task(name: str = "movie-reviews") -> Task:
    """A task by its short name, from the package: no network, and nothing is written to disk.

    A name with a "/" is a Hugging Face hub id; see `_from_hub` for what its columns must be. Raises
    ValueError for an unknown name, or a file that is not the one this version of guidelib was made with.
    """
    if "/" in name:
        return _from_hub(name)
    record, data = extract(name), (FOLDER / f"{name}.parquet").read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise ValueError(
            f"name: {name}.parquet has sha256 {found}, but {record.sha256} is expected; reinstall guidelib"
        )
    table = pq.read_table(io.BytesIO(data))
    label = datasets.ClassLabel(names=list(record.labels))
    info = datasets.DatasetInfo(features=datasets.Features(text=datasets.Value("string"), label=label))
    splits = {}
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split)).select(["text", "label"])
        splits[split] = datasets.Dataset(rows.replace_schema_metadata(None), info=info)
    return Task(name, "classification", record.labels, **splits)


def _from_hub(name: str) -> Task:
    """A single-label text classification data set of the hub, read by `datasets.load_dataset`.

    The text is in the first of TEXT_COLUMNS that it has, the label is a ClassLabel in one of
    LABEL_COLUMNS.  A test split that is missing or unlabelled is replaced by the validation split, and a
    missing validation split is cut from train (one item in ten, seed 0).
    """
    try:
        found = datasets.load_dataset(name)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"name: {name!r} could not be loaded ({reason}); offline, these can: {', '.join(EXTRACTS)}"
        ) from error
    splits = {}
    for split in (s for s in SPLITS if s in found):
        data = found[split]
        text = next((c for c in TEXT_COLUMNS if c in data.features), None)
        label = next(
            (c for c in LABEL_COLUMNS if isinstance(data.features.get(c), datasets.ClassLabel)), None
        )
        if text is None or label is None:
            raise ValueError(
                f"name: {name!r} has the columns {data.column_names}, but a text ({', '.join(TEXT_COLUMNS)}) "
                f"and a ClassLabel ({', '.join(LABEL_COLUMNS)}) are needed"
            )
        data = data.select_columns([text, label]).rename_columns({text: "text", label: "label"})
        if -1 not in data.unique("label"):  # how the hub marks a test split whose labels are kept back
            splits[split] = data
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if not {"train", "test"} <= set(splits):
        raise ValueError(
            f"name: {name!r} has the labelled splits {list(splits)}, but train and test are needed"
        )
    if "validation" not in splits:
        cut = splits["train"].train_test_split(test_size=0.1, seed=0)
        splits["train"], splits["validation"] = cut["train"], cut["test"]
    return Task(name, "classification", tuple(splits["train"].features["label"].names), **splits)


def task_card(name: str) -> str:
    """The data card of a task in Markdown: its source and rights, and sizes computed from its file."""
    task, record, file = load_task(name), extract(name), FOLDER / f"{name}.parquet"
    stored = pq.read_metadata(file).metadata
    facts = {key.decode(): int(value) for key, value in stored.items() if value.isdigit()}
    lines = [
        record.about,
        "",
        "| fact | value |",
        "|---|---|",
        f"| Source | `{record.package}`, the source distribution on PyPI, in it `{record.member}` |",
        f"| SHA-256 of the source | `{record.package_sha256}` |",
        f"| SHA-256 of the archive in it | `{record.member_sha256}` |",
        f"| SHA-256 of the extract | `{record.sha256}` ({file.stat().st_size:,} bytes) |",
        f"| Licence, as declared | {record.licence} |",
        f"| Rights | {record.rights} |",
        f"| Selection | {record.selection.format(**facts)} |",
        f"| Split rule | {record.rule} |",
        f"| Rebuild it | `python -c \"import guidelib; guidelib.tasks.rebuild_task('{name}')\"` |",
        "",
        f"| split | items | {' | '.join(task.labels)} | mean words | median | 95th percentile | longest |",
        "|---|" + "---:|" * (5 + len(task.labels)),
    ]
    for split in SPLITS:
        data = getattr(task, split)
        words, label = np.array([len(text.split()) for text in data["text"]]), np.array(data["label"])
        shares = [f"{(label == i).sum():,} ({(label == i).mean():.1%})" for i in range(len(task.labels))]
        spread = (
            f"{words.mean():.1f} | {np.median(words):.0f} | {np.percentile(words, 95):.0f} | {words.max()}"
        )
        lines.append(f"| {split} | {len(data):,} | {' | '.join(shares)} | {spread} |")
    lines += ["", "The first training item of each label:", ""]
    for i, label in enumerate(task.labels):
        lines.append(f"* {label}: “{next(row['text'] for row in task.train if row['label'] == i)}”")
    return "\n".join(lines)


def main(pages: list[str]) -> None:
    """Write each card between its two comments in the pages; without a page, print the cards."""
    if not pages:
        print("\n\n".join(map(task_card, EXTRACTS)))
    for page in map(Path, pages):
        text = page.read_text(encoding="utf-8")
        for name in EXTRACTS:
            start, end = f"<!-- card: {name} -->\n", f"\n<!-- end of card: {name} -->"
            before, found, rest = text.partition(start)
            if not found or end not in rest:
                raise ValueError(
                    f"pages: {page} has no {start.strip()} with its end: a card cannot be put there"
                )
            text = before + start + task_card(name) + end + rest.partition(end)[2]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
