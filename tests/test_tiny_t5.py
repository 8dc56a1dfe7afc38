"""The T5 that comes with guidelib: the right files, what it learnt, and a card that tells the truth."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import guidelib as gl
from guidelib.experiments import best_runs, load_results
from guidelib.materials import checkpoints
from guidelib.materials.checkpoints import TINY_T5_SHA256, tiny_t5_folder
from guidelib.pretraining.card import CURVE, main, model_card
from guidelib.pretraining.rows import MASK, Text
from guidelib.pretraining.train import held_out_losses
from guidelib.training.text2text import generate

PAGE = Path(__file__).parent.parent / "book" / "tiny-t5.md"


@pytest.fixture(scope="module")
def task():
    return gl.load_task("modern-bible")


@pytest.fixture(scope="module")
def backbone(task):
    return gl.load_backbone("tiny-t5", task)


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A copy of the files that a test may damage."""
    copy = tmp_path / "models" / "tiny-t5"
    shutil.copytree(tiny_t5_folder(), copy)
    monkeypatch.setattr(checkpoints, "__file__", str(tmp_path / "checkpoints.py"))
    assert tiny_t5_folder() == copy
    return copy


def test_it_loads_with_all_of_its_files_pinned(backbone):
    model, tokenizer = backbone
    assert {file.name for file in tiny_t5_folder().iterdir()} == set(TINY_T5_SHA256)
    assert (tiny_t5_folder() / "model.safetensors").stat().st_size < 12e6
    assert not model.training and model.dtype == torch.float32 and model.config.model_type == "t5"
    assert len(tokenizer) == model.config.vocab_size == 4096 and tokenizer.pad_token_id == 0


@pytest.mark.parametrize("file", sorted(TINY_T5_SHA256))
def test_wrong_hash_gives_no_model(damaged, file):
    data = bytearray((damaged / file).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file} has sha256 .* is expected; run .pip install"):
        gl.load_backbone("tiny-t5")


def test_missing_file_gives_no_model(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing; run .pip install"):
        gl.load_backbone("tiny-t5")


def test_untrained_is_the_same_model_with_seeded_weights(backbone):
    state = torch.get_rng_state()
    one, two, other = (gl.load_backbone("tiny-t5-untrained", seed=s)[0].state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    trained = backbone[0].state_dict()
    assert one.keys() == trained.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert all(one[k].shape == w.shape and not torch.equal(one[k], w) for k, w in trained.items())
    assert not torch.equal(one["shared.weight"], other["shared.weight"])


def test_tokenizer_gives_verses_back(backbone, task):
    _, tokenizer = backbone
    texts = [text for split in (task.validation, task.test) for text in (*split["source"], *split["target"])]
    back = tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True)
    assert sum(a == b for a, b in zip(texts, back, strict=True)) / len(texts) > 0.99


@pytest.mark.parametrize("num_beams", (1, 3))
def test_generation_is_the_same_without_the_cache(backbone, task, num_beams):
    model, tokenizer = backbone
    inputs = tokenizer(task.validation["source"][:6], padding=True, return_tensors="pt")
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=40, num_beams=num_beams, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without) and len(set(map(tuple, with_cache.tolist()))) == 6


def test_it_copies_what_it_has_not_read(backbone, task):
    sources = task.validation["source"][:60]
    short = [s for s in sources if len(s.split()) < 25]
    written = generate(*backbone, short)
    assert len(short) > 20 and np.mean([a == b for a, b in zip(short, written, strict=True)]) > 0.75


def test_it_fills_gaps_better_than_frequency_does(backbone, task):
    model, tokenizer = backbone
    text = Text(task.test["target"][:100], tokenizer)
    facts = json.loads((tiny_t5_folder() / "facts.json").read_text())
    found = held_out_losses(model, text, 40)
    untrained = held_out_losses(gl.load_backbone("tiny-t5-untrained")[0], text, 40)
    assert found["hidden"] < facts["unigram"] - 1 < untrained["hidden"]
    assert found["copy"] < 0.1 < found["fill"] < untrained["fill"] / 3


def test_a_gap_is_filled_with_words(backbone):
    model, tokenizer = backbone
    text = "And God said, Let there be light: and there was light."
    ids = tokenizer(text)["input_ids"]
    gap = torch.tensor([[*ids[:5], MASK, *ids[6:]]])
    written = model.generate(input_ids=gap, max_new_tokens=40, do_sample=False)[0]
    assert (
        MASK not in written.tolist() and tokenizer.decode(written, skip_special_tokens=True)[-6:] == "light."
    )


def test_the_facts_are_those_of_the_files(backbone):
    facts = json.loads((tiny_t5_folder() / "facts.json").read_text())
    log = [json.loads(line) for line in (tiny_t5_folder() / "pretraining.jsonl").open()]
    assert facts["parameters"] == sum(p.numel() for p in backbone[0].parameters())
    assert log[0]["step"] == 0 and log[-1]["step"] == facts["steps"]
    assert log[-1]["tokens"] == facts["tokens"]["text"]
    assert [record["step"] for record in log] == sorted(record["step"] for record in log)


def test_the_stored_comparisons_say_what_the_page_says():
    full, settings = "full fine-tuning", []
    trained, untrained = (load_results(name) for name in ("tiny-t5", "tiny-t5-untrained"))
    for result in (trained, untrained):
        method = result["settings"]["methods"][full][0]
        settings.append(result["settings"] | {"backbone": "", "methods": method})
    assert settings[0] == settings[1]
    runs = best_runs(trained, "no tuning"), best_runs(trained, full), best_runs(untrained, full)
    copied, first, second = ([run["test"]["chrf"] for run in each] for each in runs)
    assert len(copied) == len(first) == len(second) == 8
    assert np.mean(first) - 3 * np.std(first, ddof=1) > max(copied) > 2 * max(second)


@pytest.mark.exact_versions
def test_page_shows_the_computed_card(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    assert model_card() in page
    copy = tmp_path / "page.md"
    copy.write_text(page.replace("4,096", "99"), encoding="utf-8")
    main(str(copy))
    assert copy.read_text(encoding="utf-8") == page
    assert copy.with_name(CURVE).read_bytes() == PAGE.with_name(CURVE).read_bytes()
    copy.write_text("# A page\n", encoding="utf-8")
    with pytest.raises(ValueError, match="can be put there"):
        main(str(copy))
