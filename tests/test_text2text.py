"""Text to text: what is written, and the scores of it, each against a value that is worked out by hand."""

import pytest
import torch
from datasets import Dataset

import guidelib as gl
from guidelib.training.text2text import chrf_of_each, generate, new_words, score

PAIRS = [("Thou art the man.", "You are the man."), ("He saith unto them, Go.", "He said to them, “Go.”")] * 8


@pytest.fixture(scope="module")
def task():
    rows = {"id": ["x"] * 16, "source": [s for s, _ in PAIRS], "target": [t for _, t in PAIRS]}
    data = Dataset.from_dict(rows)
    return gl.Task("rewriting", "text2text", (), data, data.select(range(5)), data.select(range(3)))


@pytest.fixture(params=("tiny-t5-random", "tiny-bart"))
def backbone(request, task):
    return gl.load_backbone(request.param, task, seed=0)


def without_cache(model, ids, steps):
    """Greedy search by the definition: the whole prefix through the model for each token."""
    written = torch.tensor([[model.config.decoder_start_token_id]])
    for _ in range(steps):
        logits = model(input_ids=ids, decoder_input_ids=written, use_cache=False).logits
        written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
        if written[0, -1] == model.config.eos_token_id:
            break
    return written[0]


def test_texts_come_back_in_order_whatever_the_batch(backbone):
    model, tokenizer = backbone
    sources = ["a", "Thou art the man, and more.", "He", "Go thou hence."]
    one = [generate(model, tokenizer, [s], max_length=24)[0] for s in sources]
    assert generate(model, tokenizer, sources, max_length=24, batch_size=2) == one
    if model.config.model_type == "t5":  # the other one has nothing to say yet
        assert len(set(one)) > 1


def test_greedy_is_the_definition(task):
    model, tokenizer = gl.load_backbone("tiny-t5-random", task)
    for text in ("Go thou.", "a", "the man"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = without_cache(model, ids, 16)
        assert generate(model, tokenizer, [text], max_length=16) == [
            tokenizer.decode(expected, skip_special_tokens=True)
        ]


def test_generating_leaves_the_mode_as_it_was(backbone):
    model, tokenizer = backbone
    generate(model.train(), tokenizer, ["a"], max_length=4)
    assert model.training
    generate(model.eval(), tokenizer, ["a"], max_length=4)
    assert not model.training


def test_a_decoder_is_refused():
    model, tokenizer = gl.load_backbone("tiny-gpt2")
    with pytest.raises(TypeError, match="encoder-decoder"):
        generate(model, tokenizer, ["a"])


def test_new_words_have_their_place():
    assert new_words("Thou art the man", "You are the man") == [("you", 0, 2), ("are", 0, 2)]
    assert new_words("the man", "the good man") == [("good", 1, 1)]
    assert new_words("The man, he saith", "the man he") == []


def test_score_of_the_reference_and_of_a_copy():
    sources, targets = zip(*PAIRS, strict=True)
    best = score(targets, targets, sources)
    assert best == {"chrf": pytest.approx(100), "exact": 1, "precision": 1, "recall": 1, "f1": 1}
    copy = score(sources, targets, sources)
    assert 0 < copy.pop("chrf") < 100 and set(copy.values()) == {0}


def test_the_chrf_of_each_text_is_its_own():
    outputs, references = ["the same", "not at all", ""], ["the same", "quite other", "words"]
    alone = [score([o], [r], [r])["chrf"] for o, r in zip(outputs, references, strict=True)]
    assert chrf_of_each(outputs, references).tolist() == pytest.approx(alone)
    assert alone[0] == 100 and alone[2] == 0


def test_changes_are_counted_by_hand():
    sources = ["thou art the man of God", "he goeth out"]
    references = ["you are the man of God", "he goes out"]  # three new words
    outputs = ["you be the man of you", "he goes away"]  # right: you, goes; wrong: be, the second you, away
    found = score(outputs, references, sources)
    assert found["precision"] == 2 / 5 and found["recall"] == 2 / 3 and found["f1"] == 4 / 8


def test_scores_need_as_many_texts():
    with pytest.raises(ValueError, match="outputs must be .* got '1 texts for 2 references"):
        score(["a"], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="outputs"):
        score([], [], [])


def test_training_learns_the_targets(backbone, task):
    model, tokenizer = backbone
    gl.attach(model, gl.FullFineTuning())
    before = gl.evaluate(model, task, tokenizer, split="train", max_length=40)
    gl.fit(model, task, tokenizer, lr=1e-2, epochs=30, batch_size=4, progress=False)
    after = gl.evaluate(model, task, tokenizer, split="train", max_length=40)
    assert set(before) == {"loss", "chrf", "exact", "precision", "recall", "f1"}
    assert after["loss"] < before["loss"] / 3 and after["f1"] > 0.9 > before["f1"]


def test_loss_is_per_token_whatever_the_batch(backbone, task):
    model, tokenizer = backbone
    one, all_ = (gl.evaluate(model, task, tokenizer, split="validation", batch_size=n) for n in (1, 5))
    assert one == pytest.approx(all_, rel=1e-5)
    loss = gl.evaluate(model, task, tokenizer, split="validation", batch_size=5, write=False)
    assert loss == {"loss": all_["loss"]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(batch_size=-1), "batch_size must be a whole number of at least 1"),
        (dict(num_beams=0), "num_beams must be a whole number of at least 1"),
        (dict(sources="ab"), "sources must be a list of texts, got 'ab'"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, words):
    model, tokenizer = gl.load_backbone("tiny-t5-random")
    with pytest.raises(ValueError, match=words):
        gl.text2text.generate(model, tokenizer, **dict(sources=["a"]) | arguments)


def test_an_error_in_writing_gives_the_mode_back(monkeypatch):
    model, tokenizer = gl.load_backbone("tiny-t5-random")
    model.train()
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gl.text2text.generate(model, tokenizer, ["a"])
    assert model.training and model.encoder.training
