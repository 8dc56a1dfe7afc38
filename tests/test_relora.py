"""ReLoRA: what a restart keeps, what it drops, and how the rank grows."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from common import assert_the_prediction_is_the_measurement, batch, build, outputs, randomise
from test_training import QUICK, TASK, TOKENIZER
from transformers import AutoConfig, AutoModel

import guidelib as gl
from guidelib import costs
from guidelib.core.anatomy import Anatomy
from guidelib.training import fit as training

PLACES = [
    ("tiny-bert", "all"),
    ("tiny-gpt2", ("q", "v")),  # two maps of one fused weight
    ("tiny-gpt2", "all"),
    ("tiny-t5-random", "all"),
    ("tiny-bart", ("q", "cross.v", "ffn")),
]


def train(model, steps, total, *, optimizer=None, first=1, inputs=None):
    """Some steps by hand, as fit does them; returns the optimizer."""
    attachment = gl.attached(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trained, lr=0.02)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        attachment.method.after_step(attachment, step, total, optimizer)
    return optimizer


@pytest.mark.parametrize(("backbone", "targets"), PLACES)
def test_a_restart_leaves_the_function_and_starts_anew(backbone, targets):
    model, inputs = build(backbone), batch(backbone)
    method = gl.ReLoRA(r=3, alpha=8, targets=targets, restarts=1)
    attachment = gl.attach(model, method)
    first = [part.delta.A.clone() for part in attachment.parts]
    base = outputs(model, inputs)
    randomise(attachment)
    before, weights = outputs(model, inputs), copy.deepcopy(model.state_dict())
    assert (before - base).abs().max() > 1e-3
    random = torch.get_rng_state()
    method.after_step(attachment, 5, 10, torch.optim.AdamW(model.parameters()))
    assert torch.equal(torch.get_rng_state(), random)
    assert (outputs(model, inputs) - before).abs().max() < 1e-12

    rewritten = method.rewrites(attachment.anatomy)
    assert rewritten and all(name.endswith("weight") for name in rewritten)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert rewritten == {name for name in moved if not name.startswith("guidelib")}
    for part, a in zip(attachment.parts, first, strict=True):
        assert torch.count_nonzero(part.delta.B) == 0
        bound = part.delta.A.shape[1] ** -0.5  # as at the start, but other numbers
        assert 0.8 * bound < part.delta.A.abs().max() <= bound and not torch.equal(part.delta.A, a)
    assert len({part.delta.A.double().sum().item() for part in attachment.parts}) == len(attachment.parts)


def test_a_restart_of_gpt2s_queries_leaves_keys_and_values_alone():
    model = build("tiny-gpt2")
    method = gl.ReLoRA(r=3, targets="q", restarts=1)
    attachment = gl.attach(model, method)
    randomise(attachment)
    before = model.transformer.h[0].attn.c_attn.weight.detach().clone().chunk(3, -1)
    method.after_step(attachment, 1, 2, torch.optim.AdamW(model.parameters()))
    after = model.transformer.h[0].attn.c_attn.weight.chunk(3, -1)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])


def test_no_more_cycles_start_than_there_are_steps():
    for restarts in (4, 7, 10**12):
        assert gl.ReLoRA(r=3, restarts=restarts).starts(5) == [0, 1, 2, 3, 4]
    assert gl.ReLoRA(r=3, restarts=2).starts(7) == [0, 2, 4]


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_right_after_a_restart_only_b_has_a_gradient(backbone):
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.ReLoRA(r=3, restarts=1))
    train(model, 3, 6, inputs=inputs)
    model.zero_grad()
    model(**inputs).loss.backward()
    for part in attachment.parts:
        assert torch.count_nonzero(part.delta.A.grad) == 0
        assert torch.count_nonzero(part.delta.B.grad) > 0


@pytest.mark.parametrize("restarts", [0, 1, 3])
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_the_rank_grows_by_r_with_every_restart(backbone, restarts):
    r, model, inputs = 2, build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.ReLoRA(r=r, targets=("q", "v", "ffn"), restarts=restarts))
    train(model, 12, 12, inputs=inputs)
    plain = Anatomy(build(backbone)).linears(("q", "v", "ffn"))
    attachment.merge()
    for part, site in zip(attachment.parts, plain, strict=True):
        values = torch.linalg.svdvals(part.site.weight - site.weight)
        rank = int((values > 1e-12 * values[0]).sum())
        assert r * restarts < rank <= r * (restarts + 1), part.name


def test_without_a_restart_it_is_lora_bit_for_bit():
    losses, states = [], []
    for method in (gl.ReLoRA(r=4, restarts=0), gl.LoRA(r=4, targets="all")):
        model = build("tiny-bert", dtype=torch.float32)
        attachment = gl.attach(model, method)
        losses.append(gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=2)).losses)
        states.append(list(attachment.state().values()))
        assert attachment.count().stored == attachment.count().trainable
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_until_the_first_restart_it_is_lora_bit_for_bit():
    inputs, states = batch("tiny-bert"), []
    for method in (gl.ReLoRA(r=4, restarts=1), gl.LoRA(r=4, targets="all")):
        model = build("tiny-bert")
        gl.attach(model, method, seed=7)
        optimizer = train(model, 4, 10, inputs=inputs)
        states.append(copy.deepcopy(model.state_dict()))
        train(model, 1, 10, first=5, optimizer=optimizer, inputs=inputs)
        states.append(model.state_dict())
    for (name, tensor), other in zip(states[0].items(), states[2].values(), strict=True):
        assert torch.equal(tensor, other), name
    assert any(not torch.equal(a, b) for a, b in zip(states[1].values(), states[3].values(), strict=True))


# Adam's moments and the learning rate


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 1.0])
def test_the_largest_moments_of_the_factors_survive_and_the_heads_are_untouched(keep):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    method = gl.ReLoRA(r=4, restarts=1, keep=keep)
    attachment = gl.attach(model, method)
    optimizer = train(model, 4, 10, inputs=inputs)
    before = {p: {k: t.clone() for k, t in state.items()} for p, state in optimizer.state.items()}
    method.after_step(attachment, 5, 10, optimizer)
    factors = {p for part in attachment.parts for p in part.delta.parameters()}
    assert len(factors) == 24 and len(before) == 26
    for parameter, state in optimizer.state.items():
        old = before[parameter]
        assert torch.equal(state["step"], old["step"]) and state["step"] == 4
        if parameter not in factors or keep == 1:
            assert all(torch.equal(state[name], old[name]) for name in old)
            continue
        kept = state["exp_avg"] != 0
        assert int(kept.sum()) == round(keep * parameter.numel())
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], old[name] * kept)
        if keep:
            assert old["exp_avg"][kept].abs().min() >= old["exp_avg"][~kept].abs().max()


def test_no_entry_keeps_a_mean_without_its_square():
    """Right after a restart A has no gradient: Adam would divide the mean by its epsilon, 1e-8."""
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.ReLoRA(r=4, restarts=3, keep=0.1))
    optimizer = train(model, 12, 13, inputs=inputs)
    assert all(p.abs().max() < 1 for part in attachment.parts for p in part.delta.parameters())
    separately = copy.deepcopy(optimizer.state)
    for state in separately.values():  # the two moments pruned each for itself
        for name in ("exp_avg", "exp_avg_sq"):
            least = state[name].abs().flatten().topk(int(0.9 * state[name].numel()), largest=False)
            state[name].view(-1)[least.indices] = 0
    mean, square = (
        torch.cat([state[name].flatten() for state in separately.values()])
        for name in ("exp_avg", "exp_avg_sq")
    )
    assert bool(((mean != 0) & (square == 0)).any())


def test_other_optimizers_are_reset_as_well():
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
    ):
        model, inputs = build("tiny-bert"), batch("tiny-bert")
        attachment = gl.attach(model, gl.ReLoRA(r=2, restarts=1, keep=0.0))
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        train(model, 2, 4, optimizer=optimizer, inputs=inputs)
        for part in attachment.parts:
            for factor in part.delta.parameters():
                moments = [m for m in optimizer.state[factor].values() if torch.is_tensor(m) and m.dim()]
                assert all(torch.count_nonzero(m) == 0 for m in moments)


def test_the_learning_rate_is_jagged():
    method = gl.ReLoRA(restarts=3, warmup=0.4)
    assert method.starts(40) == [0, 10, 20, 30]
    factors = [method.lr_factor(step, 40) for step in range(40)]
    cycle = [0, 0.25, 0.5, 0.75] + [1] * 6
    assert factors == pytest.approx([1] * 10 + cycle * 3)
    assert all(gl.ReLoRA(warmup=0.0).lr_factor(step, 40) == 1 for step in range(41))
    assert all(gl.ReLoRA(restarts=0).lr_factor(step, 40) == 1 for step in range(41))
    # too few steps for every restart
    assert gl.ReLoRA(restarts=3).starts(1) == [0] and gl.ReLoRA(restarts=3).starts(3) == [0, 1, 2]
    assert gl.ReLoRA(restarts=1).starts(7) == [0, 3]


def test_the_rate_that_fit_uses_is_the_usual_one_times_the_jags(monkeypatch):
    rates, make = [], training._optimizer

    def spy(*arguments):
        optimizer = make(*arguments)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(training, "_optimizer", spy)
    model = build("tiny-bert", dtype=torch.float32)
    method = gl.ReLoRA(r=2, restarts=1, warmup=0.4)
    gl.attach(model, method)
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=5, lr=1e-3), warmup=0.0)
    usual = [1e-3 * (20 - step) / 20 for step in range(20)]
    assert rates == pytest.approx([r * method.lr_factor(step, 20) for step, r in enumerate(usual)])
    assert rates[9] > 0 == rates[10] < rates[11]


# training, saving, giving back


def test_fit_restarts_and_repeats(tmp_path):
    method = gl.ReLoRA(r=2, targets=("q", "v", "ffn"), restarts=3, keep=0.0)
    states, results = [], []
    for seed in (0, 0, 1):
        model = build("tiny-bert", dtype=torch.float32)
        attachment = gl.attach(model, method, seed=seed)
        losses = gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=12)).losses
        states.append({name: tensor.clone() for name, tensor in attachment.state().items()})
        results.append(gl.evaluate(model, TASK, TOKENIZER, max_length=32))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4]) and results[2]["accuracy"] > 0.9

    path = attachment.save(tmp_path / "a.safetensors")
    fresh = build("tiny-bert", dtype=torch.float32)
    loaded = gl.load(fresh, path)
    assert loaded.method == method
    assert gl.evaluate(fresh, TASK, TOKENIZER, max_length=32) == results[2]
    gl.fit(fresh, TASK, TOKENIZER, **QUICK)  # it can be trained further
    plain = build("tiny-bert", dtype=torch.float32).state_dict()
    assert any(not torch.equal(plain[name], fresh.get_parameter(name)) for name in plain)
    detached = loaded.detach().state_dict()
    assert all(torch.equal(tensor, detached[name]) for name, tensor in plain.items())


@pytest.mark.parametrize(("backbone", "targets"), PLACES)
def test_merge_unmerge_save_and_detach_after_restarts(backbone, targets, tmp_path):
    model, inputs = build(backbone), batch(backbone)
    plain = copy.deepcopy(model.state_dict())
    attachment = gl.attach(model, gl.ReLoRA(r=2, targets=targets, restarts=2))
    train(model, 8, 9, inputs=inputs)
    acting, weights = outputs(model, inputs), copy.deepcopy(model.state_dict())
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.unmerge()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    path = attachment.save(tmp_path / "a.safetensors")
    fresh = build(backbone)
    gl.load(fresh, path)
    assert torch.equal(outputs(fresh, inputs), acting)
    attachment.merge()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in attachment.detach().state_dict().items())
    gl.attached(fresh).merge(permanent=True)
    assert (outputs(fresh, inputs) - acting).abs().max() < 1e-12
    assert fresh.state_dict().keys() == plain.keys()


def test_a_failed_training_gives_the_rewritten_weights_back(monkeypatch):
    """The learning rate explodes after the second restart, and the loss with it."""
    monkeypatch.setattr(gl.ReLoRA, "lr_factor", lambda self, step, total: 1e30 if step > 10 else 1.0)
    model = build("tiny-bert", dtype=torch.float32)
    attachment = gl.attach(model, gl.ReLoRA(r=2, restarts=3))
    seen = []
    weight = model.encoder.encoder.layer[0].output.dense.weight
    restart = gl.ReLoRA.after_step
    monkeypatch.setattr(
        gl.ReLoRA,
        "after_step",
        lambda *arguments: (restart(*arguments), seen.append(weight.detach().clone()))[0],
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the loss is"):
        gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=4))
    assert len(seen) > 10 and not torch.equal(seen[9], before["encoder.encoder.layer.0.output.dense.weight"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(torch.count_nonzero(part.delta.B) == 0 for part in attachment.parts)


def test_it_works_in_a_sum_and_on_some_layers():
    model = build("tiny-bert", dtype=torch.float32)
    plain = copy.deepcopy(model.state_dict())
    attachment = gl.attach(model, gl.ReLoRA(r=2, targets="q").on(layers=-1) + gl.LoRA(r=2))
    gl.fit(model, TASK, TOKENIZER, **QUICK)
    moved = {name for name, t in plain.items() if not torch.equal(t, model.state_dict()[name])}
    assert moved == {"encoder.encoder.layer.1.attention.self.query.weight"} | {
        f"classifier.{name}" for name in ("weight", "bias")
    }
    attachment.detach()
    assert all(torch.equal(t, plain[name]) for name, t in model.state_dict().items())


def test_no_other_update_comes_before_it_at_a_weight():
    """Were there one that reads the weight, as DoRA does, a restart would change what it computes."""
    model = build("tiny-bert")
    with pytest.raises(ValueError, match="ReLoRA must stand first at encoder.0.self.q"):
        gl.attach(model, gl.LoRA(r=2) + gl.ReLoRA(r=2))
    gl.attach(model, gl.LoRA(r=2) + gl.ReLoRA(r=2, restarts=0)).detach()
    gl.attach(model, gl.LoRA(r=2) + gl.ReLoRA(r=2, targets="ffn"))


# counts and costs


def test_counts_trainable_as_lora_and_stored_with_the_weights():
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("bert"))
    lora, weights = 12 * 8 * (4 * 1536 + 2 * 3840), 12 * (4 * 768**2 + 2 * 768 * 3072)
    attachment = gl.attach(model, gl.ReLoRA())
    count = attachment.count()
    assert (count.trainable, count.stored, count.changed) == (lora, lora + weights, weights)
    attachment.detach()
    assert gl.attach(model, gl.ReLoRA(restarts=0)).count().stored == lora
    with torch.device("meta"):
        gpt2 = AutoModel.from_config(AutoConfig.for_model("gpt2"))
    count = gl.attach(gpt2, gl.ReLoRA(targets=("q", "v"))).count()
    # of the fused weight q and v change, but the whole of it is stored
    assert (count.trainable, count.changed) == (294_912, 24 * 768**2)
    assert count.stored == 294_912 + 12 * 3 * 768**2


METHODS = {
    "q, v": gl.ReLoRA(r=4, targets=("q", "v")),
    "all": gl.ReLoRA(r=3),
    "on the last layer": gl.ReLoRA(r=5).on(layers=-1),
    "on the first layer": gl.ReLoRA(r=5, targets=("k", "ffn.in")).on(layers=0),
    "beside lora": gl.ReLoRA(r=4) + gl.LoRA(r=2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
def test_the_prediction_is_the_measurement(backbone, method):
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, METHODS[method])
    assert_the_prediction_is_the_measurement(model, backbone)


def test_a_step_needs_no_more_than_pefts_lora():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    gl.attach(model, gl.ReLoRA(r=4))
    train(model, 3, 4, inputs=inputs)
    pattern = r".*\.layer\..*\.(query|key|value|dense)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=pattern, modules_to_save=["classifier"])
    theirs = peft.get_peft_model(build("tiny-bert", dtype=torch.float32), config)
    assert costs.saved_bytes(model, inputs) <= costs.saved_bytes(theirs, inputs)
    for ours, other in zip(costs.flops(model, inputs), costs.flops(theirs, inputs), strict=True):
        assert 0 < ours <= other


REFUSED_VALUES = [
    (dict(restarts=-1), "restarts must be a whole number of at least 0, got -1"),
    (dict(restarts=1.5), "restarts must be a whole number of at least 0, got 1.5"),
    (dict(keep=1.1), "keep must be a share from 0 to 1, got 1.1"),
    (dict(keep="all"), "keep must be a share from 0 to 1, got 'all'"),
    (dict(keep=float("nan")), "keep must be a share from 0 to 1, got nan"),
    (dict(warmup=-0.1), "warmup must be a share from 0 to 1, got -0.1"),
    (dict(r=0), "r must be a whole number of at least 1, got 0"),
    (dict(alpha=float("inf")), "alpha must be a finite number, got inf"),
    (dict(targets=5), "targets must be a role or several of them, got 5"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_VALUES, ids=lambda value: str(value)[:24])
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.ReLoRA(**arguments)
    assert message in str(error.value)


def test_a_further_training_draws_other_directions():
    model, inputs = build("tiny-bert", dtype=torch.float64), batch("tiny-bert")
    attachment = gl.attach(model, gl.ReLoRA(r=2, restarts=1))
    drawn = []
    for _ in range(2):
        train(model, 2, 4, inputs=inputs)  # the restart is behind the second step
        drawn.append(attachment.parts[0].delta.A.detach().clone())
        attachment.method.finish(attachment)
    assert not torch.equal(*drawn)


def test_an_interrupted_restart_does_not_count_an_update_twice(monkeypatch):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.ReLoRA(r=2, restarts=1))
    randomise(attachment)
    wanted, calls = outputs(model, inputs), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", interrupted)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(KeyboardInterrupt):
        attachment.method.after_step(attachment, 2, 4, optimizer)
    assert (outputs(model, inputs) - wanted).abs().max() < 1e-9


def test_a_training_that_goes_on_from_a_file_draws_other_directions(tmp_path):
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.ReLoRA(r=2))
    first = [part.seed for part in attachment.parts]
    path = attachment.save(tmp_path / "relora.safetensors")
    attachment.detach()
    again = [part.seed for part in gl.load(model, path).parts]
    assert not {*first} & {*again}
