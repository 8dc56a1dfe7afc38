"""fit and evaluate on two classes that one word tells apart."""

from __future__ import annotations

import copy
import math
import random
from contextlib import nullcontext
from dataclasses import dataclass

import datasets
import pytest
import torch
import transformers
from common import build

import guidelib as gl
from guidelib.core.attaching import Attachment
from guidelib.core.method import Method
from guidelib.training import fit as training

WORDS = ("the", "a", "book", "story", "long", "read", "we", "it")


def split(n, seed):
    draw = random.Random(seed)
    rows = {"text": [], "label": []}
    for i in range(n):
        words = [draw.choice(WORDS) for _ in range(draw.randint(1, 4))]
        words.insert(draw.randint(0, len(words)), "zzzz" if i % 2 else "qqqq")
        rows["text"].append(" ".join(words))
        rows["label"].append(i % 2)
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    return datasets.Dataset.from_dict(rows, features=features)


TASK = gl.Task("two words", "classification", ("no", "yes"), split(64, 0), split(32, 1), split(32, 2))
TOKENIZER = transformers.ByT5Tokenizer(model_max_length=256)
QUICK = dict(epochs=1, batch_size=16, max_length=32, lr=1e-2, progress=False)


def attached(method=None, **arguments):
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, method or gl.LoRA(r=4, targets="all"), **arguments)
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_one_device_is_used_where_the_trainer_would_take_several(monkeypatch):
    class TwoDevices(transformers.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    class Refused(torch.nn.Module):
        def __init__(self, *arguments, **settings):
            raise AssertionError("the replicas have the first device's parts")

    monkeypatch.setattr(training, "TrainingArguments", TwoDevices)
    monkeypatch.setattr(torch.nn, "DataParallel", Refused)
    model = attached()
    assert gl.fit(model, TASK, TOKENIZER, **QUICK).steps == 4  # batches of 16, not of 32
    gl.evaluate(model, TASK, TOKENIZER, max_length=32)


def test_training_lowers_the_loss_gets_the_test_split_right_and_outlives_saving_and_merging(tmp_path):
    model = attached()
    before = gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    fitted = gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=12))
    after = gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    assert fitted.steps == len(fitted.losses) == 12 * 4 and fitted.seconds > 0
    assert sum(fitted.losses[-4:]) < 0.5 * sum(fitted.losses[:4])
    assert before["accuracy"] < 0.8 < 0.9 < after["accuracy"]
    assert after["loss"] < before["loss"]
    assert not model.training

    path = gl.attached(model).save(tmp_path / "a.safetensors")
    gl.attached(model).merge(permanent=True)
    assert gl.evaluate(model, TASK, TOKENIZER, max_length=32) == pytest.approx(after, abs=1e-5)
    fresh = build("tiny-bert", dtype=torch.float32)
    gl.load(fresh, path)
    assert gl.evaluate(fresh, TASK, TOKENIZER, max_length=32) == pytest.approx(after, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_evaluate_is_what_a_loop_finds(rows):
    model = attached()
    result = gl.evaluate(model, TASK, TOKENIZER, split="validation", batch_size=rows, max_length=32)
    losses, right = [], 0
    for row in TASK.validation:
        ids = torch.tensor([TOKENIZER(row["text"], truncation=True, max_length=32)["input_ids"]])
        with torch.no_grad():
            output = model(input_ids=ids, labels=torch.tensor([row["label"]]))
        losses.append(float(output.loss))
        right += int(output.logits.argmax()) == row["label"]
    assert set(result) == {"accuracy", "loss"}
    assert result["accuracy"] == right / 32
    if rows in (1, 32):  # a mean of the batches' means
        assert result["loss"] == pytest.approx(sum(losses) / 32, abs=1e-5)


def test_evaluate_says_of_each_item_whether_it_is_right_in_the_order_of_the_data():
    model = attached()
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=3))
    found = gl.evaluate(model, TASK, TOKENIZER, max_length=32, each=True)
    with torch.no_grad():
        alone = [
            model(**TOKENIZER(text, return_tensors="pt")).logits.argmax().item() for text in TASK.test["text"]
        ]
    right = [answer == label for answer, label in zip(alone, TASK.test["label"], strict=True)]
    assert found["each"].tolist() == right and 0 < sum(right) < len(right)
    assert found["accuracy"] == sum(right) / len(right)


def test_mixed_precision_trains_what_is_trained_in_32_bits_and_leaves_the_model_as_it_was():
    losses = {}
    for precision in ("no", "bf16"):
        model = attached()
        losses[precision] = gl.fit(model, TASK, TOKENIZER, **QUICK, mixed_precision=precision).losses
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        exact = gl.evaluate(model, TASK, TOKENIZER, max_length=32)["loss"]
        mixed = gl.evaluate(model, TASK, TOKENIZER, max_length=32, mixed_precision="bf16")["loss"]
        assert 0 < abs(exact - mixed) < 0.02
    assert losses["bf16"] != losses["no"]
    assert losses["bf16"] == pytest.approx(losses["no"], abs=0.05)


def test_the_seed_decides():
    losses = [gl.fit(attached(), TASK, TOKENIZER, **QUICK, seed=seed).losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_only_what_is_attached_moves():
    model = attached(gl.LoRA(r=2).on(layers=0))
    before = weights(model)
    gl.fit(model, TASK, TOKENIZER, **QUICK)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved(model, before) == trainable
    assert len(trainable) == 2 * 2 + 2


def test_full_fine_tuning_moves_everything_and_detach_brings_it_back():
    model = attached(gl.FullFineTuning())
    before = weights(model)
    gl.fit(model, TASK, TOKENIZER, **QUICK)
    assert len(moved(model, before)) > 0.9 * len(before)
    gl.attached(model).detach()
    assert moved(model, before) == set()


def test_each_learning_rate_reaches_its_group(monkeypatch):
    seen, make = [], training._optimizer

    def spy(*arguments):
        seen.append(make(*arguments))
        return seen[-1]

    monkeypatch.setattr(training, "_optimizer", spy)
    model = attached()
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(lr=1e-3), head_lr=1e-2, warmup=0.0, weight_decay=0.25)
    (optimizer,) = seen
    body, head = optimizer.param_groups
    assert (body["initial_lr"], head["initial_lr"]) == (1e-3, 1e-2)
    assert body["weight_decay"] == head["weight_decay"] == 0.25
    assert {id(p) for p in head["params"]} == {id(p) for p in gl.attached(model).anatomy.head().values()}
    assert {id(p) for g in (body, head) for p in g["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(lr=1e-3))
    assert [group["initial_lr"] for group in seen[1].param_groups] == [1e-3, 1e-3]


def test_a_tiny_head_rate_moves_the_head_little():
    """Adam's first steps are as long as the rate, so the rate is seen in how far a weight goes."""
    model = attached(gl.LoRA(r=4))
    before = weights(model)
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(lr=1e-2), head_lr=1e-6)
    change = {
        name: (p - before[name]).abs().max().item() for name, p in model.named_parameters() if p.requires_grad
    }
    head = [c for name, c in change.items() if name.startswith("classifier")]
    assert 0 < max(head) <= 4.1e-6
    assert max(c for name, c in change.items() if not name.startswith("classifier")) > 1e-3


def test_the_rate_rises_over_the_warm_up_and_falls_to_zero(monkeypatch):
    rates, make = [], training._optimizer

    def spy(*arguments):
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(training, "_optimizer", spy)
    gl.fit(attached(), TASK, TOKENIZER, **QUICK | dict(epochs=5, lr=1.0e-3), warmup=0.25)
    rising = [1e-3 * i / 5 for i in range(5)]
    falling = [1e-3 * (20 - i) / 15 for i in range(5, 20)]
    assert rates == pytest.approx(rising + falling)


def test_epochs_may_be_a_fraction():
    assert gl.fit(attached(), TASK, TOKENIZER, **QUICK | dict(epochs=0.5)).steps == 2
    assert gl.fit(attached(), TASK, TOKENIZER, **QUICK | dict(epochs=0.01, batch_size=48)).steps == 1


# the phases of a method

CALLS = []


@dataclass(frozen=True)
class Recorder(Method):
    """Trains nothing of its own, and writes down how it is called."""

    name: str = "one"
    penalty: float | None = None
    extra: float | None = None

    def parts(self, anatomy, saved):
        return []

    def prepare(self, attachment, batches):
        CALLS.append((self.name, "prepare", attachment, list(batches)))

    def regularizer(self, attachment):
        CALLS.append((self.name, "regularizer", attachment))
        return None if self.penalty is None else torch.tensor(self.penalty)

    def batch_loss(self, attachment, batch, outputs):
        CALLS.append((self.name, "batch_loss", attachment, batch, outputs))
        return None if self.extra is None else torch.tensor(self.extra)

    def after_step(self, attachment, step, total, optimizer):
        assert optimizer.param_groups
        gradients = [p.grad is not None for p in attachment.model.parameters() if p.requires_grad]
        CALLS.append((self.name, "after_step", attachment, step, total, all(gradients)))

    def finish(self, attachment):
        CALLS.append((self.name, "finish", attachment))


def test_the_phases_are_called_in_order_with_what_they_need():
    CALLS.clear()
    model = attached(Recorder())
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=0.5))
    assert [call[1] for call in CALLS] == [
        "prepare",
        *("regularizer", "batch_loss", "after_step") * 2,
        "finish",
    ]
    assert all(call[2] is gl.attached(model) and isinstance(call[2], Attachment) for call in CALLS)
    assert [call[3:] for call in CALLS if call[1] == "after_step"] == [(1, 2, True), (2, 2, True)]
    batches = CALLS[0][3]
    assert [len(batch["labels"]) for batch in batches] == [16] * 4
    assert all({"input_ids", "attention_mask", "labels"} <= batch.keys() for batch in batches)
    assert [int(label) for batch in batches for label in batch["labels"]] == list(TASK.train["label"])
    model(**batches[0])  # the model takes them as they are


def test_a_method_can_change_the_learning_rate(monkeypatch):
    """At a factor of zero nothing moves any more; in a sum the factors multiply."""
    monkeypatch.setattr(gl.HeadOnly, "lr_factor", lambda self, step, total: float(step < 2))
    model = attached(gl.HeadOnly() + Recorder())
    two = {name: p.clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(Recorder, "lr_factor", lambda self, step, total: 0.0)
    gl.fit(model, TASK, TOKENIZER, **QUICK)
    assert all(torch.equal(two[name], p) for name, p in model.named_parameters())
    monkeypatch.setattr(Recorder, "lr_factor", lambda self, step, total: 1.0)
    gl.fit(model, TASK, TOKENIZER, **QUICK)
    assert any(not torch.equal(two[name], p) for name, p in model.named_parameters())


def test_a_batch_loss_gets_the_batch_and_what_the_model_made_of_it():
    CALLS.clear()
    model = attached(Recorder())
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=0.5))
    calls = [call[3:] for call in CALLS if call[1] == "batch_loss"]
    assert len(calls) == 2
    for inputs, outputs in calls:
        assert {"input_ids", "attention_mask", "labels"} <= inputs.keys()
        assert outputs.logits.shape == (16, 2) and outputs.logits.requires_grad


@pytest.mark.parametrize("term", [dict(penalty=5.0), dict(extra=5.0), dict(penalty=2.0, extra=3.0)])
def test_a_regularizer_and_a_batch_loss_enter_the_loss(term):
    plain, with_term = (
        gl.fit(attached(Recorder(**arguments)), TASK, TOKENIZER, **QUICK).losses for arguments in ({}, term)
    )
    assert with_term == pytest.approx([loss + 5 for loss in plain], abs=1e-5)


@dataclass(frozen=True)
class Shrink(Method):
    """A penalty with a gradient: the head's squared norm, times a large number."""

    def parts(self, anatomy, saved):
        return []

    def regularizer(self, attachment):
        return 1e4 * sum(p.square().sum() for p in attachment.anatomy.head().values())


def test_a_regularizers_gradient_reaches_the_weights():
    norms = []
    for method in (gl.HeadOnly(), Shrink()):
        model = attached(method)
        before = model.classifier.weight.norm().item()
        gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=4))
        norms.append(model.classifier.weight.norm().item() / before)
    assert norms[1] < 0.8 * norms[0]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (Recorder("one", 1.0) + Recorder("two", extra=2.0), ["one", "two"]),
        (gl.AdapterDrop(Recorder("one", 1.0, 2.0), drop=1), ["one"]),
        (gl.LoRA(r=2) + Recorder("two", 3.0), ["two"]),
        (Recorder("one", 3.0).on(layers=0), ["one"]),
    ],
)
def test_sums_and_restrictions_pass_the_phases_on(method, names):
    CALLS.clear()
    plain = gl.fit(attached(Recorder()), TASK, TOKENIZER, **QUICK | dict(epochs=0.25)).losses
    CALLS.clear()
    model = attached(method)
    losses = gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=0.25)).losses
    phases = ("prepare", "regularizer", "batch_loss", "after_step", "finish")
    assert [call[:2] for call in CALLS if call[1] != "prepare"] == [(n, p) for p in phases[1:] for n in names]
    assert losses == pytest.approx([plain[0] + 3], abs=1e-5)
    # each gets the batches in full, one after the other
    assert [(call[0], len(call[3])) for call in CALLS if call[1] == "prepare"] == [
        (name, 4) for name in names
    ]


def test_trls_trainer_trains_what_is_attached_and_nothing_else(tmp_path):
    trl = pytest.importorskip("trl")
    model = build("tiny-llama", dtype=torch.float32)
    gl.attach(model, gl.LoRA(r=2))
    before = weights(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, max_length=16,
        gradient_checkpointing=False, bf16=False, report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    data = datasets.Dataset.from_dict({"text": ["a book that we read"] * 12})
    trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=TOKENIZER).train()
    assert moved(model, before) == trained


# when it goes wrong


def test_a_rate_that_is_too_high_stops_with_its_reason_and_restores_the_start():
    model = attached(gl.FullFineTuning())
    before = weights(model)
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at step \d+; lr must be lower than 1e\+30"
    ):
        gl.fit(model, TASK, TOKENIZER, **QUICK | dict(lr=1e30, epochs=5), warmup=0.0)
    assert moved(model, before) == set()
    assert not model.training and all(p.grad is None for p in model.parameters())
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=0.25))  # and it can be trained again


@pytest.mark.parametrize("method", [gl.HeadOnly(), gl.LoRA(r=2), gl.DoRA(r=2), gl.Adapter(r=2)])
def test_a_last_step_that_destroys_the_weights_is_noticed(method):
    model = attached(method)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) .*; lr must be lower than 1e\+30 here"):
        gl.fit(model, TASK, TOKENIZER, **QUICK | dict(lr=1e30, epochs=0.25), warmup=0.0)
    assert moved(model, before) == set() and not model.training


def test_looking_again_leaves_no_trace():
    """Neither in the losses nor in the random state, whatever draws at random."""
    states = []
    for look in (training._Trainer.look_again, lambda trainer: None):
        model = attached(gl.AdaMix(r=2, experts=2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training._Trainer, "look_again", look)
            losses = gl.fit(model, TASK, TOKENIZER, **QUICK).losses
        states.append((losses, torch.get_rng_state(), *model.state_dict().values()))
    assert len(losses) == 4 and states[0][0] == losses
    assert all(torch.equal(a, b) for a, b in zip(*(state[1:] for state in states), strict=True))


def test_a_poisoned_weight_is_found_at_the_first_step():
    model = attached()
    with torch.no_grad():
        model.encoder.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    before = weights(model)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1; lr must be lower than 0.01"):
        gl.fit(model, TASK, TOKENIZER, **QUICK)
    for name, parameter in model.named_parameters():
        assert torch.equal(torch.nan_to_num(parameter), torch.nan_to_num(before[name]))


def empty():
    return gl.Task(
        "nothing", "classification", ("no", "yes"), TASK.train.select([]), TASK.validation, TASK.test
    )


BAD = [
    (dict(lr=0), "lr must be a positive number, got 0"),
    (dict(lr=-1e-3), "lr must be a positive number, got -0.001"),
    (dict(lr=float("nan")), "lr must be a positive number, got nan"),
    (dict(lr="1e-3"), "lr must be a positive number, got '1e-3'"),
    (dict(head_lr=0), "head_lr must be a positive number, got 0"),
    (dict(head_lr=float("inf")), "head_lr must be a positive number, got inf"),
    (dict(epochs=0), "epochs must be a positive number, got 0"),
    (dict(epochs=float("inf")), "epochs must be a positive number, got inf"),
    (dict(batch_size=0), "batch_size must be"),
    (dict(batch_size=2.5), "batch_size must be"),
    (dict(warmup=1), "warmup must be"),
    (dict(warmup=-0.1), "warmup must be"),
    (dict(warmup="0.1"), "warmup must be"),
    (dict(weight_decay=-1), "weight_decay must be"),
    (dict(max_length=0), "max_length"),
    (dict(seed=-1), "seed must be a whole number from 0 to"),
    (dict(seed="0"), "seed must be a whole number from 0 to"),
    (dict(task="movie-reviews"), "task must be a Task, such as load_task() gives, got 'movie-reviews'"),
    (dict(task=gl.load_task("topics")), "a head for: load_backbone(name, task), got 'topics with 12 labels'"),
    (dict(task=gl.load_task("modern-bible")), "task must be a classification task, or an encoder-decoder"),
    (
        dict(task=empty()),
        "task must be a task with training data, got 'nothing with an empty training split'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:30])
def test_impossible_arguments(arguments, message):
    model = attached()
    before, state = weights(model), torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        gl.fit(**dict(model=model, task=TASK, tokenizer=TOKENIZER) | QUICK | arguments)
    assert message in str(error.value)
    assert moved(model, before) == set() and torch.equal(torch.get_rng_state(), state)


def test_something_has_to_be_attached_and_unmerged():
    model = build("tiny-bert", dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model carries no method; call guidelib.attach"):
        gl.fit(model, TASK, TOKENIZER, **QUICK)
    attachment = gl.attach(model, gl.LoRA(r=2))
    attachment.merge()
    with pytest.raises(ValueError, match=r"model must be unmerged while it trains; call unmerge\(\) first"):
        gl.fit(model, TASK, TOKENIZER, **QUICK)
    assert all(torch.equal(before[name], tensor) for name, tensor in attachment.detach().state_dict().items())


@pytest.mark.parametrize("name", ["dev", "", None])
def test_evaluate_wants_a_split_that_is_there(name):
    with pytest.raises(ValueError, match="split: got .* but one of train, validation, test is accepted"):
        gl.evaluate(attached(), TASK, TOKENIZER, split=name)


@pytest.mark.parametrize("arguments", [dict(task=gl.load_task("topics")), dict(batch_size=0)])
def test_evaluate_wants_what_the_model_can(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
        gl.evaluate(**dict(model=attached(), task=TASK, tokenizer=TOKENIZER) | arguments)


def test_a_bare_backbone_has_no_head_to_train():
    model, tokenizer = gl.load_backbone("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    with pytest.raises(ValueError, match="a task that the model has a head for"):
        gl.fit(model, TASK, tokenizer, **QUICK)


def test_evaluate_wants_data():
    task = gl.Task(
        "nothing", "classification", ("no", "yes"), TASK.train, TASK.validation, TASK.test.select([])
    )
    with pytest.raises(
        ValueError, match="task must be a task with data there, got 'nothing with an empty test split'"
    ):
        gl.evaluate(attached(), task, TOKENIZER)


# what it leaves behind


@pytest.mark.parametrize("progress", [False, True])
def test_nothing_is_printed_written_or_switched(tmp_path, monkeypatch, capfd, progress):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    verbosity = transformers.logging.get_verbosity()
    default = torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    flags = [p.requires_grad for p in attached().parameters()]
    bars = transformers.utils.logging.is_progress_bar_enabled(), datasets.utils.are_progress_bars_disabled()
    model = attached()
    capfd.readouterr()
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(progress=progress))
    gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert progress == ("step/s" in printed.err or "s/step" in printed.err or "step" in printed.err)
    assert printed.err.endswith("\r") or not progress  # the bar is wiped out
    assert list(tmp_path.iterdir()) == []
    assert transformers.logging.get_verbosity() == verbosity
    assert default == (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )
    assert bars == (
        transformers.utils.logging.is_progress_bar_enabled(),
        datasets.utils.are_progress_bars_disabled(),
    )
    assert flags == [p.requires_grad for p in model.parameters()]


def test_evaluating_does_not_change_the_model():
    model = attached()
    before = weights(model)
    first = gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    model.train()  # with dropout, were it not switched off
    assert gl.evaluate(model, TASK, TOKENIZER, max_length=32) == first
    assert moved(model, before) == set()
    assert all(math.isfinite(value) for value in first.values())


def test_an_evaluation_leaves_the_random_numbers_and_the_modes_alone():
    model = attached()
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state(), random.getstate()
    gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("mixed_precision", ["no", "bf16", "fp16"])
def test_a_look_during_a_training_changes_nothing_and_sees_what_there_is(mixed_precision):
    model, losses, seen = build("tiny-bert", dtype=torch.float32), [], []
    for looks in (True, False):
        attachment = gl.attach(model, gl.LoRA(r=2))
        look = lambda: seen.append(gl.evaluate(model, TASK, TOKENIZER, max_length=32)["loss"])  # noqa: E731
        with gl.recording(look) if looks else nullcontext():
            fitted = gl.fit(model, TASK, TOKENIZER, **QUICK | dict(mixed_precision=mixed_precision))
        losses.append(fitted.losses)
        if looks:
            assert seen[-1] == gl.evaluate(model, TASK, TOKENIZER, max_length=32)["loss"] != seen[0]
        attachment.detach()
    assert losses[0] == losses[1]


def test_the_configuration_stays_what_it_is():
    model = build("tiny-gpt2", dtype=torch.float32)
    config = transformers.GPT2Config(**model.config.to_diff_dict() | {"num_labels": 2, "use_cache": True})
    model = transformers.GPT2ForSequenceClassification(config)
    gl.attach(model, gl.LoRA(r=2))
    gl.fit(model, TASK, TOKENIZER, **QUICK)
    gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    assert model.config.use_cache is True


def test_what_a_model_puts_out_besides_is_not_scored():
    model = attached()
    wanted = gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    model.config.output_hidden_states = True
    assert gl.evaluate(model, TASK, TOKENIZER, max_length=32) == wanted


def test_each_of_several_processes_takes_its_share_of_the_steps(monkeypatch):
    assert training._steps(64, 16, 1.5) == 6
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert training._steps(64, 16, 1.5) == 6  # a scheduler's, which started one process
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert training._steps(64, 16, 1.5) == 3


def test_a_share_of_an_epoch_is_not_rounded_up_by_floats():
    assert training._steps(100, 10, 1.1) == 11 and training._steps(100, 10, 0.11) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("long", "max_length must be at most 256, the positions of the encoder, got 300"),
        ("tokens", "tokenizer must be the model's own, got 'one with a token"),
        ("labels", r"task must be one with all its labels named, got 'tiny with labels \[.*2\]"),
    ],
)
def test_data_that_the_model_has_no_place_for_is_refused(change, words):
    model = attached()
    before = weights(model)
    texts, tokenizer, length = ["a" * 400, "b"], TOKENIZER, 300 if change == "long" else 32
    if change == "tokens":
        _, tokenizer = gl.load_backbone("minilm")
    rows = datasets.Dataset.from_dict({"text": texts, "label": [1, 2 if change == "labels" else 0]})
    task = gl.Task("tiny", "classification", ("no", "yes"), rows, rows, rows)
    with pytest.raises(ValueError, match=words):
        gl.fit(model, task, tokenizer, max_length=length, progress=False)
    with pytest.raises(ValueError, match=words):
        gl.evaluate(model, task, tokenizer, max_length=length)
    assert moved(model, before) == set()


def test_the_loss_of_a_head_that_takes_any_keyword_is_a_mean_too():
    """Which the Trainer would multiply by the number of processes."""
    model, _ = gl.load_backbone("tiny-llama", TASK)
    gl.attach(model, gl.LoRA(r=2))
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Trainer, "look_again", lambda trainer: made.append(trainer))
        gl.fit(model, TASK, TOKENIZER, **QUICK)
    assert made[0].model_accepts_loss_kwargs is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_recording_sees_what_the_step_has_done(dtype):
    model = build("tiny-bert", dtype=dtype)
    attachment = gl.attach(model, gl.BitFit())
    with gl.recording(lambda: sum(float(p.float().abs().sum()) for p in attachment.state().values())) as seen:
        gl.fit(model, TASK, TOKENIZER, **QUICK)
    assert len(set(seen)) == len(seen) == 5
    assert seen[-1] == sum(float(p.float().abs().sum()) for p in attachment.state().values())
