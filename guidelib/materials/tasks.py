"""Tasks: real data sets, frozen as Parquet files inside the package and checked against a hash."""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from guidelib.materials.data import EXTRACTS, FOLDER, extract

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
