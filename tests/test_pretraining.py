"""How tiny-t5 is made: a text without the Gospels, a tokenizer, objectives, a run that goes on exactly."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5ForConditionalGeneration

from guidelib.materials.data import KJV, WEB, WORDNET, packages
from guidelib.materials.tasks import load_task
from guidelib.pretraining import corpus as corpora
from guidelib.pretraining.corpus import AUSTEN, GOSPELS, Corpus, corpus, windows
from guidelib.pretraining.rows import END, FIRST, MASK, OBJECTIVES, Text, spoil, train_tokenizer
from guidelib.pretraining.train import Plan, pretrain, schedule

# ---- the text


def tar(**files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def king_james(verses):
    lines = (
        json.dumps({"citation": f"{book} 1:{n}", "text": text, "book": book, "chapter": 1, "verse": n})
        for book, n, text in verses
    )
    return tar(**{KJV.member: "\n".join(lines).encode()})


def world_english(verses):
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["field"] * 5, *verses])
    return tar(**{WEB.member: gzip.compress(out.getvalue().encode())})


def wordnet(glosses):
    lines = ["  1 This is the licence."]
    lines += [f"0000{i:04d} 03 n 01 word 0 000 | {gloss}  " for i, gloss in enumerate(glosses)]
    files = {f"package/dict/data.{part}": b"" for part in ("verb", "adj", "adv")}
    return tar(**{WORDNET.member: "\n".join(lines).encode()}, **files)


def novels(lines):
    raw = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5)[:12] + struct.pack(">i", 5) + b"UTF-8"
    raw += struct.pack(">ii", 16, len(lines))
    for line in lines:
        raw += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    data = struct.pack(">i", len(raw)) + zlib.compress(raw)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as archive:
        info = tarfile.TarInfo(AUSTEN.member)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("data.tar.xz", out.getvalue())):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        deb += b"\n" * (len(content) % 2)
    return deb


SAYING = "Blessed are the meek for they shall inherit the earth and much more besides that"
PROMISE = "A bruised reed shall he not break and smoking flax shall he not quench till he send"


@pytest.fixture
def archives():
    books = ["Genesis", "Isaiah", *GOSPELS]
    return {
        KJV: king_james(
            [("Genesis", 1, "In the  beginning."), ("Isaiah", 1, PROMISE)]
            + [(book, 1, f"{SAYING}, saith {book}. {PROMISE}") for book in GOSPELS]
        ),
        WEB: world_english(
            [["1", "1", "1", "1", "At first{or, once} [the] light."]]
            + [
                [str(n), str(n), "1", "1", f"{SAYING}, says {book}."]
                for n, book in enumerate(books, 1)
                if n > 2
            ]
        ),
        WORDNET: wordnet(["a thing; ", f'a verse; "{SAYING.lower()}"', "a thing"]),
        AUSTEN: novels(["EMMA", "", "Emma Woodhouse, _handsome_,", "and rich.", "", f"He read: {SAYING!r}!"]),
    }


def test_the_text_is_clean_and_has_no_word_of_the_gospels(archives):
    texts = corpus(archives)
    assert sorted(texts.train + texts.held_out) == sorted(
        ["In the beginning.", PROMISE, "At first the light.", "a thing", "EMMA"]
        + ["Emma Woodhouse, handsome, and rich."]
    )
    assert texts.facts["king_james_units"] == 2 and texts.facts["king_james_quoting"] == 1
    assert texts.facts["glosses_quoting"] == texts.facts["austen_quoting"] == 1


def test_a_verse_is_held_out_of_both_bibles_or_of_none(archives):
    n = 2000
    places = [("Genesis", i, f"Old verse number {i}.") for i in range(1, n)]
    archives[KJV] = king_james([*places, *((book, 1, "Words.") for book in GOSPELS)])
    archives[WEB] = world_english([["1", "1", "1", str(i), f"New verse number {i}."] for i in range(1, n)])
    held_out = corpus(archives).held_out
    old, new = ({t.split()[-1] for t in held_out if t.startswith(age)} for age in ("Old verse", "New verse"))
    assert old == new and 5 < len(old) < 40


def test_windows_ignore_case_and_punctuation():
    text = "Blessed are the meek: for THEY shall inherit the earth, and more besides."
    assert list(windows(text)) == list(windows(text.upper().replace(":", " -"))) != []


@pytest.fixture
def only_the_novels(monkeypatch):
    """The other three archives are not fetched; tests/test_tasks.py does that."""
    others = {KJV, WEB, WORDNET}
    monkeypatch.setattr(corpora, "packages", lambda sources, folder: packages(sources - others, folder))


def test_wrong_archive_is_refused(archives, tmp_path, only_the_novels):
    assert AUSTEN.file == "r-cran-janeaustenr_1.0.0-1_all.deb"
    (tmp_path / AUSTEN.file).write_bytes(archives[AUSTEN])
    with pytest.raises(ValueError, match=f"{AUSTEN.file} has sha256 .* is expected"):
        corpora.fetch(tmp_path)


def test_failing_apt_is_one_sentence(tmp_path, monkeypatch, only_the_novels):
    program = tmp_path / "apt-get"
    program.write_text("#!/bin/sh\necho 'E: No such thing' >&2\nexit 100\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(
        RuntimeError, match=r"could not fetch r-cran-janeaustenr=1.0.0-1 \(E: No such thing\)"
    ):
        corpora.fetch()


# ---- tokens and objectives

TEXTS = tuple(
    f"And {who} {did} {what} {where}, number {n}."
    for n in range(40)
    for who in ("she", "he", "Emma")
    for did in ("saw", "knew")
    for what in ("the light", "a stone")
    for where in ("in Highbury", "by the sea")
)
SMALL = Corpus(TEXTS[4:], TEXTS[:4], {})
CONFIG = dict(d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1, num_decoder_layers=1, dropout_rate=0.0)
CONFIG |= dict(feed_forward_proj="gated-gelu")
PLAN = Plan(tokens=12 * 120, batch=120, length=16, late_length=40, warmup=3, vocabulary=120)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SMALL.train, PLAN.vocabulary)


@pytest.fixture(scope="module")
def text(tokenizer):
    return Text(SMALL.train, tokenizer)


def test_tokenizer_is_the_same_each_time_and_gives_texts_back(tokenizer):
    again = train_tokenizer(SMALL.train, PLAN.vocabulary)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert [tokenizer.decode(tokenizer(t)["input_ids"], skip_special_tokens=True) for t in TEXTS] == [*TEXTS]
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_31>"]) == [
        0,
        END,
        2,
        FIRST,
        MASK,
    ]
    assert tokenizer("Emma")["input_ids"][-1] == END


def test_a_vocabulary_that_the_text_cannot_fill_is_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        train_tokenizer(["a b"], 4096)


def test_text_does_not_depend_on_what_the_tokenizer_did_before(tokenizer, text):
    tokenizer(["And she knew.", "he"], padding=True, truncation=True, max_length=3)
    assert np.array_equal(Text(SMALL.train, tokenizer).ids, text.ids)


def test_rows_cover_the_text_once_and_start_with_a_word(text):
    for seed in range(5):
        rows = text.rows(24, np.random.default_rng(seed))
        assert rows[0][0] == 0 and rows[-1][1] == len(text.ids)
        assert all(a[1] == b[0] for a, b in zip(rows, rows[1:], strict=False))
        assert all(0 < b - a <= 24 and text.starts[a] for a, b in rows)


def test_long_units_are_cut_before_a_word(tokenizer):
    text = Text(["And she saw the light in Highbury. " * 9, "He knew."], tokenizer)
    rows = text.rows(10, np.random.default_rng(0))
    assert len(rows) > 5 and all(b - a <= 10 and text.starts[a] for a, b in rows)
    assert sum(b - a for a, b in rows) == len(text.ids)


def test_batches_hold_every_row_once_within_the_budget(text):
    batches = text.batches(120, 24, np.random.default_rng(0))
    assert sorted(row for batch in batches for row in batch) == text.rows(24, np.random.default_rng(0))
    assert all(len(batch) * max(b - a for a, b in batch) <= 120 for batch in batches)


def test_the_schedule_depends_on_the_length_of_the_run_only_in_its_last_quarter(text):
    long = dataclasses.replace(PLAN, tokens=16 * 120)
    assert PLAN.late == 9 and long.late == 12
    ours, theirs = list(schedule(text, PLAN)), list(schedule(text, long))
    assert [step for step, _ in ours] == list(range(12)) and len(theirs) == 16
    assert ours[:9] == theirs[:9]
    assert [PLAN.rate(i) for i in range(9)] == [long.rate(i) for i in range(9)]
    assert max(b - a for _, rows in ours[9:] for a, b in rows) > 16
    assert list(schedule(text, PLAN, start=5)) == ours[5:]
    assert PLAN.rate(3) == PLAN.lr > PLAN.rate(11) > 0


@pytest.mark.parametrize("n", (1, 2, 3, 10, 40, 400))
def test_objectives_hide_and_return_what_they_say(n):
    rng = np.random.default_rng(n)
    ids, pieces = rng.integers(MASK + 1, 99, n), np.arange(100, 120)
    for objective in OBJECTIVES:
        for _ in range(20):
            source, target = spoil(ids, objective, pieces, rng)
            if objective == "copy":
                assert source == target == ids.tolist()
            elif objective == "repair":
                assert target == ids.tolist() and set(source) <= {*target, *pieces.tolist()}
            elif objective == "fill":
                assert target == ids.tolist() and MASK in source
                kept = iter(target)
                assert all(token in kept for token in source if token != MASK)  # in order
            else:  # putting the spans back gives the text
                spans, at = {}, None
                for token in target:
                    if FIRST <= token < MASK:
                        at = token
                        spans[at] = []
                    else:
                        spans[at].append(token)
                assert all(spans.values()) and list(spans) == list(range(FIRST, FIRST + len(spans)))
                assert [t for s in source for t in spans.get(s, [s])] == ids.tolist()
    if n >= 40:
        hidden = [len(ids) - sum(t != MASK for t in spoil(ids, "fill", pieces, rng)[0]) for _ in range(200)]
        assert 0.15 < np.mean(hidden) / n < 0.2  # a rate between 5 and 30 %, each as likely


# ---- the run


def same_run(a, b):
    assert (a / "model/model.safetensors").read_bytes() == (b / "model/model.safetensors").read_bytes()
    logs = ([json.loads(line) for line in (x / "model/pretraining.jsonl").open()] for x in (a, b))
    first, second = ([{k: v for k, v in record.items() if k != "seconds"} for record in log] for log in logs)
    assert first == second and [record["step"] for record in first] == [0, 2, 4, 6, 8, 10, 12]


def run(out, plan=PLAN, stop_after=None, texts=SMALL):
    return pretrain(texts, plan, out, config=CONFIG, log_every=2, held_out_every=4, stop_after=stop_after)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run(out)
    return out


def test_an_interrupted_run_ends_as_an_uninterrupted_one(finished, tmp_path):
    run(tmp_path, stop_after=5)
    with (tmp_path / "log.jsonl").open("a") as log:  # what was logged after the checkpoint was lost with it
        log.write('{"step": 6}\n')
    run(tmp_path, stop_after=10)  # in the last quarter, too
    run(tmp_path)
    same_run(finished, tmp_path)


def test_a_run_that_was_planned_longer_ends_as_one_that_was_not(finished, tmp_path):
    run(tmp_path, dataclasses.replace(PLAN, tokens=40 * 120), stop_after=7)
    run(tmp_path)
    same_run(finished, tmp_path)


@pytest.mark.parametrize(
    "changes", ({"lr": 1e-3}, {"seed": 1}, {"tokens": 8 * 120}, {"shares": (1.0, 0.0, 0.0, 0.0)})
)
def test_another_plan_does_not_go_on(tmp_path, changes):
    run(tmp_path, stop_after=7)  # 8 steps would have their last quarter from step 6
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="another plan or other texts"):
        run(tmp_path, dataclasses.replace(PLAN, **changes))
    with pytest.raises(ValueError, match="another plan or other texts"):
        run(tmp_path, texts=Corpus(SMALL.train[1:], SMALL.held_out, {}))
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_the_files_load_and_the_facts_are_true(finished):
    folder = finished / "model"
    model = T5ForConditionalGeneration.from_pretrained(folder)
    assert all(w.dtype == torch.float32 for w in load_file(folder / "model.safetensors").values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    assert ids[0, -1] == END and tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["steps"] == PLAN.steps and 0.7 * PLAN.tokens < facts["tokens"]["text"] <= PLAN.tokens
    assert facts["held_out"]["fill"] < facts["random_weights"]["fill"]
    text = "\n".join([*SMALL.train, "", *SMALL.held_out])
    assert facts["corpus"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert not list(finished.glob("tmp*")), "the files are moved into place, not copied"


# ---- the model that is shipped


def test_modern_bible_is_tested_on_books_that_the_model_has_not_read():
    task = load_task("modern-bible")
    books = {
        name.rsplit(" ", 1)[0] for split in ("validation", "test") for name in getattr(task, split)["id"]
    }
    assert books == set(GOSPELS)
