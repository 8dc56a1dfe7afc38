"""Training with the frozen blocks run once: the same to the bit, and they are run once."""

from __future__ import annotations

import copy
import dataclasses

import datasets
import pytest
import torch
import transformers
from common import DECODERS, SEQ2SEQ
from test_training import TASK, split

import guidelib as gl
from guidelib.core.anatomy import Anatomy
from guidelib.core.attaching import attached
from guidelib.training.states import States

TOKENIZER = transformers.ByT5Tokenizer(model_max_length=256)
EPOCHS = 2
QUICK = dict(epochs=EPOCHS, batch_size=16, max_length=24, lr=1e-2, progress=False)
SIDES = {
    "lst": gl.LST(reduction=4),
    "lst, fisher": gl.LST(reduction=4, layers=-1, init="fisher"),
    "fusion": gl.AttentionFusion(),
    "lets": gl.LeTS(),
}
LATE = {
    "late LoRA": gl.LoRA(r=2, targets="all").on(layers=-1),
    "AdapterDrop": gl.AdapterDrop(gl.PfeifferAdapter(r=4), 1),
    "late prompt": gl.LatePromptTuning(length=2),
    "4 bits": gl.NF4() + gl.LoRA(r=2, targets="all").on(layers=-1),
    "keep less": gl.LoRA(r=2).on(layers=-1),
}
BACKBONES = ("tiny-bert", "tiny-distilbert", *DECODERS, "tiny-t5-random", "tiny-bart")


def task_of(name):
    """What a tiny backbone can be trained on; the last batch is smaller than the others."""
    if name not in SEQ2SEQ:
        return dataclasses.replace(TASK, train=split(56, 0))
    texts = {part: split(56, seed)["text"] for part, seed in (("source", 0), ("target", 1))}
    pairs = datasets.Dataset.from_dict(texts)
    return gl.Task("pairs", "text2text", (), pairs, pairs, pairs)


def built(name, method):
    task = None if name in SEQ2SEQ else TASK
    model, _ = gl.load_backbone(name, task, seed=0, dtype=torch.float32)
    gl.attach(model, method, seed=1)
    return model


def trained(name, method, frozen, **arguments):
    model = built(name, method)
    fit = gl.fit(model, task_of(name), TOKENIZER, frozen=frozen, **QUICK | arguments)
    return model, fit


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("label", SIDES | LATE)
def test_what_is_kept_trains_to_the_same_bits(name, label, tmp_path):
    method, arguments = (SIDES | LATE)[label], {"keep_less": label == "keep less"}
    still, one = trained(name, method, "still", **arguments)
    for frozen in ("memory", tmp_path) if name in ("tiny-bert", "tiny-t5-random") else ("memory",):
        kept, other = trained(name, method, frozen, **arguments)
        assert one.losses == other.losses and same(still, kept)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frozen", [None, "still", "memory"])
@pytest.mark.parametrize("label", ["fusion", "late LoRA"])
def test_frozen_blocks_run_once_per_batch(label, frozen, monkeypatch):
    model = built("tiny-bert", (SIDES | LATE)[label])
    blocks = Anatomy(model).bodies()["encoder"].blocks
    calls = dict.fromkeys(range(len(blocks)), 0)

    def count(i):
        def called(*_):
            calls[i] += torch.is_grad_enabled() or model.training

        return called

    for i, block in enumerate(blocks):
        block.attention.self.query.register_forward_hook(count(i))
    fit = gl.fit(model, task_of("tiny-bert"), TOKENIZER, frozen=frozen, **QUICK)
    frozen_blocks = blocks if label == "fusion" else blocks[:-1]
    assert fit.steps == EPOCHS * 4
    for i, block in enumerate(blocks):
        once = frozen == "memory" and block in frozen_blocks
        assert calls[i] >= (4 if once else fit.steps)
        assert calls[i] <= (4 if once else fit.steps) + 3  # to see what is frozen, twice, and the last look


def test_there_must_be_something_frozen():
    model = built("tiny-bert", gl.LoRA(r=2))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(
        ValueError, match="frozen must be None for LoRA here: it trains from the first block on"
    ):
        gl.fit(model, TASK, TOKENIZER, frozen="memory", **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [
        gl.PromptTuning(length=2),
        gl.PrefixTuning(length=2),
        gl.AdapterDrop(gl.PfeifferAdapter(r=4), 1, random=True),
        gl.BitFit() if hasattr(gl, "BitFit") else gl.FullFineTuning(),
        gl.LoRA(r=2).on(layers=-1) + gl.PromptTuning(length=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_moves_from_the_bottom_is_found(method):
    with pytest.raises(ValueError, match="frozen must be None"):
        gl.fit(built("tiny-bert", method), TASK, TOKENIZER, frozen="still", **QUICK)


@pytest.mark.parametrize("frozen", ["nowhere", True, 3])
def test_frozen_is_a_way_or_a_folder(frozen):
    with pytest.raises(
        ValueError, match="frozen must be one of still, memory, a folder that is there, or None"
    ):
        gl.fit(built("tiny-bert", gl.AttentionFusion()), TASK, TOKENIZER, frozen=frozen, **QUICK)


def test_an_encoder_may_be_frozen_where_the_decoder_is_trained():
    """Cross-attention carries a gradient into the decoder's blocks, and not the other way."""
    model = built("tiny-t5-random", gl.LoRA(r=2).on(stack="decoder"))
    batch = {"input_ids": torch.full((2, 5), 7), "labels": torch.full((2, 4), 9)}
    encoder = Anatomy(model).bodies()["encoder"].blocks
    assert States(attached(model), batch, keep=True).blocks == encoder
    model = built("tiny-t5-random", gl.LoRA(r=2).on(stack="encoder", layers=-1))
    encoder = Anatomy(model).bodies()["encoder"].blocks
    assert States(attached(model), batch, keep=True).blocks == encoder[:-1]


def test_nothing_is_left_when_it_fails(monkeypatch, tmp_path):
    model = built("tiny-bert", gl.AttentionFusion())
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    with pytest.raises(FloatingPointError):
        gl.fit(model, TASK, TOKENIZER, frozen=tmp_path, **QUICK | {"lr": 1e30})
    assert list(tmp_path.iterdir()) == []
    kept = {module: vars(module).get("forward") for module in model.modules()}
    assert forwards.keys() == kept.keys()
    assert all((forwards[m] is None) == (kept[m] is None) for m in kept)
