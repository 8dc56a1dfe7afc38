"""LT-SFT: the ticket is what full fine-tuning moves most, everything goes back, and differences add up."""

from __future__ import annotations

import copy

import pytest
import torch
from common import batch, build, outputs
from test_half import base, fit, fresh
from test_sparse import flat, part_of, support, train

import guidelib as gl
from guidelib.training import fit as training

TOTAL = 6


def adamw(model, lr=0.01):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def run(attachment, total=TOTAL, lr=0.01):
    """As ``fit`` does it, with constant rate."""
    model, method, inputs = attachment.model, attachment.method, batch("tiny-bert")
    method.prepare(attachment, [inputs])
    optimizer = adamw(model, lr)
    phases = training._Phases.__new__(training._Phases)
    phases.attachment, phases.copies = attachment, training._Copies(())
    seen = []
    for step in range(1, total + 1):
        train(model, inputs, optimizer, 1)
        method.after_step(attachment, step, total, optimizer)
        phases.exchange(optimizer)
        seen.append((step, copy.deepcopy(optimizer.state_dict()), outputs(model, inputs)))
    return optimizer, seen


def test_the_ticket_is_what_full_fine_tuning_moves_most():
    model = build("tiny-bert")
    part = part_of(attachment := gl.attach(model, gl.LTSFT(keep=0.05)))
    before = flat(model, part)
    run(attachment)
    full = build("tiny-bert")
    gl.attach(full, gl.FullFineTuning())
    train(full, batch("tiny-bert"), adamw(full), TOTAL // 2)
    far = (flat(full, part) - before).abs()
    assert torch.equal(support(part), far.topk(part.k).indices.sort().values)
    assert torch.equal(flat(model, part), before) and part.dense is None and part.trained


def test_when_the_ticket_is_drawn_everything_goes_back():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    start = outputs(model, inputs)
    attachment = gl.attach(model, gl.LTSFT(keep=0.05, first=0.5))
    optimizer, seen = run(attachment)
    far = [float((logits - start).abs().max()) for _, _, logits in seen]
    assert far[TOTAL // 2 - 1] == 0 and all(d > 1e-4 for i, d in enumerate(far) if i != TOTAL // 2 - 1)
    states = seen[TOTAL // 2 - 1][1]["state"].values()
    assert states and all(not t.any() for state in states for t in state.values())
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*held} == {*trained} == {*optimizer.state} and len(held) == len(trained)
    assert sum(p.numel() for p in held) == attachment.count().trainable


def test_with_all_entries_kept_the_second_phase_is_full_fine_tuning():
    finals = []
    for method in (gl.LTSFT(keep=1.0), gl.FullFineTuning()):
        model = build("tiny-bert")
        attachment = gl.attach(model, method)
        if attachment.parts:
            run(attachment)
        else:
            train(model, batch("tiny-bert"), adamw(model), TOTAL - TOTAL // 2)
        attachment.merge()
        finals.append({n: p.detach() for n, p in model.named_parameters() if "guidelib" not in n})
    for name, parameter in finals[1].items():
        assert (parameter - finals[0][name]).abs().max() < 1e-9, name


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2", "tiny-t5"])
def test_with_all_entries_kept_both_phases_are_the_same_to_the_bit(name):
    """The first is full fine-tuning, as a difference from the base."""
    ends = []
    for dense in (True, False):
        model = build(name, dtype=torch.float32)
        part = part_of(gl.attach(model, gl.LTSFT(keep=1.0)))
        if dense:
            part.open()
        train(model, batch(name), adamw(model), TOTAL)
        ends.append(torch.cat([each.detach().flatten() for each in part.dense or [part.values]]))
    assert ends[0].any() and torch.equal(*ends)


@pytest.mark.parametrize("method", [gl.LTSFT(dense_lr=1e-4), gl.DiffPruning(dense_lr=1e-4)])
def test_the_dense_phase_may_have_a_rate_of_its_own(method, monkeypatch):
    made, make = [], training._optimizer
    monkeypatch.setattr(training, "_optimizer", lambda *given: made.append(make(*given)) or made[0])
    model = fresh("tiny-bert", method, torch.float32)
    part, before = part_of(gl.attached(model)), []

    def prepared(attachment, batches):
        prepare(attachment, batches)
        before.extend(part.dense)

    prepare = type(method).prepare.__get__(method)
    monkeypatch.setattr(type(method), "prepare", lambda self, *given: prepared(*given))
    fit(model, lr=1e-2, head_lr=1e-3)
    (optimizer,) = made
    first = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert first[id(part.values)]["initial_lr"] == 1e-2 and part.dense is None and len(before) > 1
    own = [group for group in optimizer.param_groups if group["initial_lr"] == 1e-4]
    assert len(own) == len(before) and not any(group["params"] for group in own)


@pytest.mark.parametrize("first", [0.1, 0.5, 0.75])
def test_the_rate_falls_to_zero_in_either_phase(first):
    method, total = gl.LTSFT(first=first), 40
    rates = [(1 - step / total) * method.lr_factor(step, total) for step in range(total + 1)]
    switch = method.switch(total)
    ramps = rates[:switch], rates[switch:total]
    for ramp in ramps:
        assert ramp == pytest.approx([1 - i / len(ramp) for i in range(len(ramp))])
    assert rates[-1] == 0 and len(ramps[0]) == round(first * total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_trains_the_ticket_alone_in_the_end(dtype, monkeypatch, tmp_path):
    optimizers = []

    def recorded(*arguments):
        optimizers.append(made := make(*arguments))
        return made

    make = training._optimizer
    monkeypatch.setattr(training, "_optimizer", recorded)
    model = fresh("tiny-bert", gl.LTSFT(keep=0.02), torch.float32).to(dtype)
    part = part_of(attachment := gl.attached(model))
    before = flat(model, part)
    result = fit(model, lr=1e-2, epochs=2)
    (optimizer,) = optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert result.steps == 10 and all(p.dtype == torch.float32 for p in held)
    assert sum(p.numel() for p in held) == attachment.count().trainable == part.k + attachment.count().head
    assert part.dense is None and part.trained and torch.equal(flat(model, part), before)
    path = attachment.save(tmp_path / "ticket.safetensors")
    loaded = part_of(gl.load(copy.deepcopy(base("tiny-bert")), path))
    assert torch.equal(support(loaded), support(part)) and loaded.dense is None
    chosen, values = support(part), part.values.detach().clone()
    fit(model, lr=1e-2)
    assert torch.equal(support(part), chosen) and not torch.equal(values, part.values)


def test_a_training_that_was_broken_off_goes_on_from_its_file(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.LTSFT(keep=0.02))
    attachment.method.prepare(attachment, [inputs])
    train(model, inputs, adamw(model), 2)
    acting, path = outputs(model, inputs), attachment.save(tmp_path / "half.safetensors")
    again = gl.load(fresh_base := build("tiny-bert"), path)
    assert torch.equal(outputs(fresh_base, inputs), acting)
    part = part_of(again)
    moved = torch.cat([d.detach().flatten() for d in part.dense]).abs()
    again.method.prepare(again, [inputs])
    again.method.after_step(again, 3, 6, adamw(fresh_base))
    assert part.dense is None and torch.equal(support(part), moved.topk(part.k).indices.sort().values)
    with pytest.raises(ValueError, match="paths must be files of .* that were trained to the end"):
        gl.load_deltas(build("tiny-bert"), [path])


@pytest.mark.parametrize("epochs", [0.8, 4])
def test_a_training_that_failed_leaves_the_base(epochs, monkeypatch):
    """In the first phase, and in the second."""
    model = fresh("tiny-bert", gl.LTSFT(keep=0.02, first=0.5), torch.float32)
    part = part_of(attachment := gl.attached(model))
    start, close = copy.deepcopy(base("tiny-bert")).state_dict(), part.close

    def close_and_break():
        close()
        for p in attachment.anatomy.head().values():
            p.data.fill_(torch.nan)
        part.start = {}

    if epochs > 1:
        monkeypatch.setattr(part, "close", close_and_break)
    with pytest.raises(FloatingPointError):
        fit(model, lr=1e30 if epochs < 1 else 1e-3, epochs=epochs)
    assert not part.trained and all(not d.any() for d in part.dense or ())
    assert all(torch.equal(model.get_parameter(n), t) for n, t in start.items() if n in part.replaced)
    monkeypatch.undo()
    fit(model)
    assert part.trained and part.dense is None


# sums of differences


def files(folder, n=2):
    paths = []
    for i in range(n):
        attachment = gl.attach(build("tiny-bert"), gl.LTSFT(keep=0.05), seed=i)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for p in attachment.model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator).double(), alpha=0.1)
        paths.append(attachment.save(folder / f"{i}.safetensors"))
    return paths


def test_differences_add_up_in_any_order(tmp_path):
    paths, inputs = files(tmp_path), batch("tiny-bert")
    alone = []
    for path in paths:
        attachment = gl.load(build("tiny-bert"), path)
        attachment.merge()
        alone.append({n: p.detach() for n, p in attachment.model.named_parameters() if "guidelib" not in n})
    merged, states = [], []
    for order in (paths, paths[::-1]):
        model = build("tiny-bert")
        attachment = gl.load_deltas(model, order)
        head = attachment.anatomy.head().keys()
        states.append(outputs(model, inputs | {"labels": None})), attachment.merge()
        merged.append({n: p.detach() for n, p in model.named_parameters() if "guidelib" not in n})
    start = dict(build("tiny-bert").named_parameters())
    for name, p in start.items():
        if name not in head:
            wanted = alone[0][name] + alone[1][name] - p
            assert max((m[name] - wanted).abs().max() for m in merged) < 1e-12
        else:  # the head of the last one
            assert torch.equal(merged[0][name], alone[1][name])
            assert torch.equal(merged[1][name], alone[0][name])
    assert attachment.count().changed < 2 * (attachment.count().trainable - attachment.count().head)


def test_a_single_difference_is_what_load_gives(tmp_path):
    (path,), inputs = files(tmp_path, 1), batch("tiny-bert")
    one, other = build("tiny-bert"), build("tiny-bert")
    gl.load(one, path), gl.load_deltas(other, [path])
    assert torch.equal(outputs(one, inputs), outputs(other, inputs))


def test_files_of_something_else_are_refused(tmp_path):
    attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=2))
    path, model = attachment.save(tmp_path / "lora.safetensors"), build("tiny-bert")
    for paths, words in (([path], "paths must be files of FishMask"), ([], "one or more"), ("x", "a list")):
        with pytest.raises(ValueError, match=words):
            gl.load_deltas(model, paths)
        assert not hasattr(model, "guidelib")


@pytest.mark.parametrize("first", [0, 1, "half"])
def test_impossible_arguments(first):
    with pytest.raises(ValueError, match="first must be a share of the steps, more than 0 and less than 1"):
        gl.LTSFT(first=first)


@pytest.mark.parametrize("dense_lr", [0, -1e-3, "low", float("inf")])
def test_impossible_rates(dense_lr):
    with pytest.raises(ValueError, match="dense_lr must be a positive number or None"):
        gl.LTSFT(dense_lr=dense_lr)


def test_the_first_phase_takes_the_memory_of_full_fine_tuning():
    """Of the norms, which are computed as they are changed, autograd keeps the changed ones."""
    inputs, full, ours = batch("tiny-bert"), *(build("tiny-bert", dtype=torch.float32) for _ in range(2))
    count = gl.attach(full, gl.FullFineTuning()).count()
    attachment = gl.attach(ours, gl.LTSFT(keep=0.01))
    assert attachment.count().trainable < 0.02 * count.trainable
    attachment.method.prepare(attachment, [])
    assert attachment.count().trainable == attachment.count().changed == count.trainable
    norms = sum(p.nbytes for p in attachment.anatomy.norms().values())
    assert gl.costs.saved_bytes(ours, inputs) == gl.costs.saved_bytes(full, inputs) + norms


def test_deltas_of_diff_pruning_act_when_they_are_loaded(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.DiffPruning(keep=0.02))
    (part,) = attachment.parts
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for dense in part.dense:
            dense.normal_(std=0.3)
    attachment.method.after_step(attachment, 10, 10, optimizer)
    expected, path = outputs(model.eval(), inputs), attachment.save(tmp_path / "pruned.safetensors")
    fresh = build("tiny-bert")
    gl.load_deltas(fresh, [path])
    torch.testing.assert_close(outputs(fresh, inputs), expected)
    assert not torch.equal(expected, outputs(build("tiny-bert"), inputs))


def test_files_that_train_the_same_norms_are_not_added_up(tmp_path):
    paths = []
    for seed in (0, 1):
        attachment = gl.attach(build("tiny-bert"), gl.FishMask(keep=0.1), also="norms")
        with torch.no_grad():
            for name, tensor in attachment.state().items():
                if "LayerNorm.weight" in name:
                    tensor.add_(seed)
        paths.append(attachment.save(tmp_path / f"{seed}.safetensors"))
    model = build("tiny-bert")
    with pytest.raises(ValueError, match="paths must be files that agree on that, got .*in place"):
        gl.load_deltas(model, paths)
    assert not hasattr(model, "guidelib")
    assert gl.load_deltas(model, [paths[0], paths[0]]).parts
