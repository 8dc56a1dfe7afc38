"""Tasks: real data sets, frozen as Parquet files inside the package and checked against a hash.

`load_task` gives the splits, `rebuild_task` makes files again from their sources, `task_card` describes one.
``python -m guidelib.materials.tasks book/data.md`` writes the cards into that page.
"""

import hashlib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from guidelib.materials.data import EXTRACTS, FOLDER, extract, rebuild_task

__all__ = ["Task", "load_task", "rebuild_task", "task_card"]
SPLITS = ("train", "validation", "test")
TEXT_COLUMNS = ("text", "sentence", "content", "review")  # on the hub, in this order
LABEL_COLUMNS = ("label", "labels")
HALVED = "\ufffd"  # what a cut within a character of several tokens leaves, which is longer than the tokens
COLUMNS = {"classification": ("text", "label"), "text2text": ("id", "source", "target")}  # of a task, by kind


@dataclass(frozen=True)
class Task:
    """A data set in three splits.

    For classification they have the columns ``text`` and ``label`` (an index into ``labels``); for text2text
    ``id``, ``source`` and ``target``.
    """

    name: str
    kind: str  # "classification" or "text2text"
    labels: tuple[str, ...]  # () for text2text
    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    question: str = "{}"  # what a model reads, with "{}" for the text
    answers: tuple[str, ...] = ()  # a word for each label, where the head starts from words

    def ask(self, question: str, answers: Iterable[str]) -> "Task":
        """The same classification task, put as a question that a language model may answer by a word.

        question: what the model reads, with "{}" for the text.  answers: a word for each of the labels, in
        their order, as it stands in running text, often with a space before it.  `load_backbone` lets the
        head of a decoder start from the words' first tokens, so that it answers as the language model does
        before it is trained.  Raises ValueError for another task, a question without "{}" or a wrong number
        of words.
        """
        answers = tuple(answers)
        asks = isinstance(question, str) and question.count("{}") == 1
        for name, value, right, accepted in (
            ("task", self.kind, self.kind == "classification", "a classification task"),
            ("question", question, asks, 'a text with one "{}"'),
            ("answers", answers, len(answers) == len(self.labels), f"a word for each of {self.labels}"),
        ):
            if not right:
                raise ValueError(f"{name}: got {value!r}, but {accepted} is accepted")
        return replace(self, question=question, answers=answers)

    def only(self, books: Iterable[str]) -> "Task":
        """The same text2text task, trained on the items alone whose id is that of one of the ``books``, such
        as "Psalms".  Raises ValueError for another task, or a book without an item."""
        if self.kind != "text2text":
            raise ValueError(f"task: got {self.kind!r}, but a text2text task is accepted")
        if isinstance(books, str):
            raise ValueError(f"books: got {books!r}, but a list of books is accepted")
        books = tuple(books)
        places = [at.rsplit(" ", 1)[0] for at in self.train["id"]]
        if missing := [book for book in books if book not in places]:
            known = ", ".join(dict.fromkeys(places))
            raise ValueError(f"books: got {missing[0]!r}, but {known} is accepted")
        return replace(self, train=self.train.select([i for i, at in enumerate(places) if at in books]))

    def back(self) -> "Task":
        """The text2text task the other way round, from target to source.  Raises ValueError for another."""
        if self.kind != "text2text":
            raise ValueError(f"task: got {self.kind!r}, but a text2text task is accepted")
        names = {"source": "target", "target": "source"}
        splits = {split: getattr(self, split).rename_columns(names) for split in SPLITS}
        return replace(self, **splits)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, split: str, max_length: int = 64
    ) -> datasets.Dataset:
        """``input_ids``, ``attention_mask`` and ``labels`` of a split, cut at ``max_length`` tokens.

        For text2text, as an encoder-decoder takes it: the labels are the tokens of the target, cut at
        ``max_length``, too. Nothing is padded: the collator pads each batch to its own longest text
        (`transformers.DataCollatorForSeq2Seq` also pads labels that are tokens).
        """
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, but one of {', '.join(SPLITS)} is accepted")
        least = max(1, tokenizer.num_special_tokens_to_add())
        if type(max_length) is not int or max_length < least:
            accepted = f"a whole number of at least {least} is accepted"
            raise ValueError(f"max_length: got {max_length!r}, but {accepted}")
        data = getattr(self, split)
        if self.kind == "text2text":
            texts = {"text": list(data["source"]), "text_target": list(data["target"])}
            encoded = tokenizer(**texts, truncation=True, max_length=max_length)
        else:
            encoded = self._asked(tokenizer, list(data["text"]), max_length)
            encoded["labels"] = list(data["label"])
        return datasets.Dataset.from_dict(
            {key: encoded[key] for key in ("input_ids", "attention_mask", "labels")}
        )

    def _asked(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> Any:
        """What the model reads.  Of a long text the end is left out, and the question stays whole."""
        cut = {"truncation": True, "max_length": max_length}
        if self.question == "{}":
            return tokenizer(texts, **cut)
        room = max_length - len(tokenizer(self.question.replace("{}", ""))["input_ids"])
        if room < 1:
            raise ValueError(
                f"max_length: got {max_length}, but more than the question's {max_length - room} is accepted"
            )
        own = tokenizer(texts, add_special_tokens=False)["input_ids"]
        asked = []
        for text, ids in zip(texts, own, strict=True):
            most = min(room, len(ids))
            if most < len(ids):
                text = tokenizer.decode(ids[:most]).rstrip(HALVED)
            # beside the question a text may take more tokens than alone
            while most and len(tokenizer(self.question.replace("{}", text))["input_ids"]) > max_length:
                most -= 1
                text = tokenizer.decode(ids[:most]).rstrip(HALVED)
            asked.append(self.question.replace("{}", text))
        return tokenizer(asked, **cut)

    def subset(
        self, train: int | None = None, validation: int | None = None, test: int | None = None, seed: int = 0
    ) -> "Task":
        """The same task with fewer items, drawn by ``seed``; None keeps a split whole.

        With the same seed, a smaller draw is the beginning of a larger one.
        """
        if not (type(seed) is int and seed >= 0):
            raise ValueError(f"seed: got {seed!r}, but a whole number of at least 0 is accepted")
        chosen = {}
        for split, size in zip(SPLITS, (train, validation, test), strict=True):
            data = getattr(self, split)
            if size is None:
                continue
            if not (type(size) is int and 1 <= size <= len(data)):
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
    if not isinstance(name, str):
        raise ValueError(f"name: got {name!r}, but one of {', '.join(EXTRACTS)} or a hub id is accepted")
    if "/" in name:
        return _from_hub(name)
    record, data = extract(name), (FOLDER / f"{name}.parquet").read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise ValueError(
            f"name: {name}.parquet has sha256 {found}, but {record.sha256} is expected; reinstall guidelib"
        )
    table = pq.read_table(io.BytesIO(data))
    columns = COLUMNS[record.kind]
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    if record.kind == "classification":
        features["label"] = datasets.ClassLabel(names=list(record.labels))
    info = datasets.DatasetInfo(features=features)
    splits = {}
    for split in SPLITS:
        rows = table.filter(pc.equal(table["split"], split)).select(columns)
        splits[split] = datasets.Dataset(rows.replace_schema_metadata(None), info=info)
    return Task(name, record.kind, record.labels, **splits)


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
