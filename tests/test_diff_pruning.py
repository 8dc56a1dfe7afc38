"""DiffPruning: the gates' distribution, their limits, the penalty, and the way to a sparse difference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from common import batch, build, outputs, randomise
from test_half import base, fit, fresh
from test_sparse import flat, part_of, support

import guidelib as gl
from guidelib.selective.diff_pruning import START, hard_concrete, open_probability
from guidelib.training import fit as training


def attached(**arguments):
    model = build("tiny-bert")
    return model, gl.attach(model, gl.DiffPruning(**{"keep": 0.05} | arguments))


def set_gates(part, value):
    with torch.no_grad():
        for alpha in part.gates:
            alpha.fill_(value)


# gates


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.7, 5.0])
def test_the_expected_number_of_open_gates_is_what_sampling_finds(alpha):
    u = torch.rand(400_000, generator=torch.Generator().manual_seed(0)).double()
    z = hard_concrete(torch.full_like(u, alpha), u)
    wanted = float(open_probability(torch.tensor(alpha, dtype=torch.float64)))
    assert abs(float((z > 0).double().mean()) - wanted) < 3e-3
    assert abs(wanted - 1 / (1 + math.exp(-alpha))) < 1e-12  # -l / r is one here
    assert 0 <= z.min() and z.max() <= 1
    if abs(alpha) < 1:  # a gate is often closed for good, or open
        assert (z == 0).any() and (z == 1).any() and ((z > 0) & (z < 1)).any()


def test_a_gate_is_the_formula_at_every_noise_and_finite_at_its_ends():
    u = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    alpha = torch.full_like(u, 0.3).requires_grad_()
    v = u.clamp(1e-4, 1 - 1e-4)
    s = torch.sigmoid(torch.log(v) - torch.log(1 - v) + 0.3)
    z = hard_concrete(alpha, u)
    assert (z - (s * 3 - 1.5).clamp(0, 1)).abs().max() < 1e-12
    z.sum().backward()
    assert alpha.grad.isfinite().all() and alpha.grad.any()
    still = hard_concrete(torch.tensor(0.3, dtype=torch.float64))
    assert abs(float(still) - (3 / (1 + math.exp(-0.3)) - 1.5)) < 1e-12


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_open_gates_are_full_fine_tuning_and_closed_ones_the_base(structured, training):
    model, attachment = attached(structured=structured)
    part, inputs = part_of(attachment), batch("tiny-bert")
    start = outputs(model.train(training), inputs)
    with torch.no_grad():
        for p in part.dense:
            p.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    whole = build("tiny-bert")
    with torch.no_grad():
        for name, difference in zip(part.replaced, part.dense, strict=True):
            whole.get_parameter(name).add_(difference)
    for module in (*model.modules(), *whole.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for value, wanted in ((50.0, outputs(whole, inputs)), (-50.0, outputs(build("tiny-bert"), inputs))):
        set_gates(part, value)
        assert (outputs(model, inputs) - wanted).abs().max() < 1e-12
    assert training or torch.equal(start, wanted)


def test_the_noise_is_the_same_within_a_step_and_another_one_in_the_next():
    model, attachment = attached()
    part = part_of(attachment)
    set_gates(part, 0.0)
    part.train()
    first, again, other = part.gate(3), part.gate(3), part.gate(5)
    assert torch.equal(first, again) and not torch.equal(first.flatten()[:20], other.flatten()[:20])
    attachment.method.after_step(attachment, 1, 100, None)
    later = part.gate(3)
    assert not torch.equal(first, later)
    z = torch.cat([part.gate(i).flatten() for i in range(len(part.dense))]).detach()
    assert abs(float((z > 0).double().mean()) - 0.5) < 0.02
    assert torch.equal(part.eval().gate(3), torch.zeros_like(first))
    again, _ = attached()
    twin = part_of(gl.attached(again)).train()
    set_gates(twin, 0.0)
    assert torch.equal(twin.gate(3), first)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-t5-random"])
def test_recomputed_blocks_have_the_gates_that_they_had(backbone):
    model, inputs = build(backbone), batch(backbone)
    part = part_of(attachment := gl.attach(model, gl.DiffPruning()))
    randomise(attachment, 0.5)
    set_gates(part, 0.3)
    model.train()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        gl.checkpointing(model)
    assert any(".gates." in n and g.abs().max() > 1e-3 for n, g in found[0].items())
    assert all((g - found[1][n]).abs().max() < 1e-10 for n, g in found[0].items())


def test_a_model_in_training_merges_without_noise():
    model, attachment = attached()
    randomise(attachment)
    set_gates(part_of(attachment), 0.4)
    acting = outputs(model, batch("tiny-bert"))
    model.train()
    attachment.merge()
    assert (outputs(model.eval(), batch("tiny-bert")) - acting).abs().max() < 1e-12


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_is_the_expected_number_of_open_gates(structured):
    model, attachment = attached(structured=structured, penalty=0.01)
    part = part_of(attachment)
    randomise(attachment, 1.0)
    wanted = 0.0
    for i in range(len(part.dense)):
        of_tensor = open_probability(part.gates[-1][i]) if structured else 1
        wanted += float((open_probability(part.gates[i]) * of_tensor).sum().detach())
    assert float(attachment.method.regularizer(attachment)) == pytest.approx(0.01 * wanted)
    assert len(part.gates) == len(part.dense) + structured
    sizes = sum(p.numel() for p in part.replaced.values())
    assert wanted < sizes and attachment.count().changed == sizes + attachment.count().head
    extra = structured * len(part.dense)
    assert attachment.count().trainable == 2 * sizes + extra + attachment.count().head
    _, without = attached(penalty=0.0)
    assert without.method.regularizer(without) is None


def test_the_penalty_closes_gates():
    left, inputs = [], batch("tiny-bert")
    for penalty in (0.0, 1e-2):
        model, attachment = attached(penalty=penalty)
        optimizer = torch.optim.AdamW(part_of(attachment).gates, lr=0.5, weight_decay=0.0)
        for _ in range(12):
            model.train().zero_grad()
            output = model(**inputs)
            (output.loss + sum(attachment.method.loss_terms(attachment, inputs, output))).backward()
            optimizer.step()
        left.append(float(part_of(attachment).expected()))
    assert left[1] < 0.6 * left[0]


# projection and what comes after


def test_the_largest_gated_differences_are_kept_with_their_values():
    model, attachment = attached(structured=True)
    part = part_of(attachment)
    randomise(attachment, 1.0)
    with torch.no_grad():
        for alpha in part.gates:
            alpha.sub_(5)
    gated = torch.cat([part.update(name)[0].detach().flatten() for name in part.replaced])
    assert (gated == 0).any() and gated.any()
    model.train()  # no noise in what is kept
    attachment.method.after_step(attachment, 7, 10, None)
    assert torch.equal(support(part), gated.abs().topk(part.k).indices.sort().values)
    assert torch.equal(part.values.detach(), gated[support(part)])
    assert part.dense is None and part.gates is None and part.values.requires_grad
    assert attachment.count().trainable == part.k + attachment.count().head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_a_training_it_is_a_sparse_difference(dtype, monkeypatch, tmp_path):
    optimizers, make = [], training._optimizer
    monkeypatch.setattr(training, "_optimizer", lambda *a: optimizers.append(make(*a)) or optimizers[-1])
    model = fresh("tiny-bert", gl.DiffPruning(keep=0.02), torch.float32).to(dtype)
    part = part_of(attachment := gl.attached(model))
    before, gates = flat(model, part), len(part.gates)
    fit(model, lr=1e-3, weight_decay=0.1)
    (optimizer,) = optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == attachment.count().trainable == part.k + attachment.count().head
    assert len(optimizer.param_groups) == 2 + gates
    assert [g["initial_lr"] for g in optimizer.param_groups] == [1e-3, 1e-3, *[0.1] * gates]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, *[0.0] * gates]
    assert part.dense is None and part.trained and torch.equal(flat(model, part), before)
    path = attachment.save(tmp_path / "difference.safetensors")
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (
        path.stat().st_size < 8 + header + 8 * part.k + 4 * (len(part.replaced) + attachment.count().head) + 1
    )
    again = copy.deepcopy(base("tiny-bert"))
    loaded = part_of(gl.load(again, path))
    assert loaded.dense is None and torch.equal(support(loaded), support(part))
    chosen = support(part)
    fit(model, lr=1e-3)  # it can be trained further, where it is
    assert part.dense is None and torch.equal(support(part), chosen)
    composed = gl.load_deltas(copy.deepcopy(base("tiny-bert")), [path])
    assert torch.equal(composed.parts[0].values, loaded.values)


def test_a_training_that_was_broken_off_goes_on_from_its_file(tmp_path):
    model, attachment = attached(structured=True)
    randomise(attachment)
    set_gates(part_of(attachment), 0.2)
    path = attachment.save(tmp_path / "half.safetensors")
    again = build("tiny-bert")
    loaded = gl.load(again, path)
    assert len(part_of(loaded).gates) == len(part_of(attachment).gates)
    assert torch.equal(outputs(again, batch("tiny-bert")), outputs(model, batch("tiny-bert")))


def test_a_training_that_failed_begins_again():
    model = fresh("tiny-bert", gl.DiffPruning(keep=0.02), torch.float32)
    part = part_of(gl.attached(model))
    with pytest.raises(FloatingPointError):
        fit(model, lr=1e30)
    assert not part.trained
    fit(model)
    assert part.trained and part.dense is None and part.values.isfinite().all()


def test_it_takes_more_memory_than_full_fine_tuning_until_it_is_sparse():
    full, pruned, sparse = (
        gl.predict("minilm", method, batch=16, length=64).memory
        for method in (gl.FullFineTuning(), gl.DiffPruning(), gl.FishMask())
    )
    assert pruned.gradients > 1.99 * full.gradients and pruned.activations > 2 * full.activations
    assert pruned.total > 2 * full.total > 4 * sparse.total / 1.1
    assert START == 5.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"penalty": -1}, "penalty must be a finite number of at least 0, got -1"),
        ({"gate_lr": 0}, "gate_lr must be a positive number, got 0"),
        ({"structured": 1}, "structured must be True or False, got 1"),
        ({"final": 1}, "final must be a share of the steps, more than 0 and less than 1, got 1"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.DiffPruning(**arguments)
