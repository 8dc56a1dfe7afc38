"""16 bits: what is trained there moves as in 32, autocast and loss scaling, and casts of a whole model."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace

import datasets
import pytest
import torch
from common import METHOD_CASES, SEQ2SEQ, TWO_CLASSES, batch, build, outputs, randomise
from test_layers import Int8, swap
from test_training import TOKENIZER, split
from torch import nn
from transformers import Trainer, TrainingArguments

import guidelib as gl
from guidelib.training import fit as training

ROWS = split(20, 0)
CLASSES = gl.Task("two words", "classification", ("no", "yes"), ROWS, ROWS, ROWS)
PAIRS = {"id": range(20), "source": ROWS["text"], "target": [t.replace("zzzz", "yes") for t in ROWS["text"]]}
REWRITING = gl.Task("rewriting", "text2text", (), *3 * (datasets.Dataset.from_dict(PAIRS),))
KINDS = ("tiny-bert", "tiny-gpt2", "tiny-t5v1-random")
FIVE_STEPS = dict(batch_size=4, max_length=16, warmup=0.0, lr=3e-3, progress=False)


@cache
def base(backbone):
    return gl.load_backbone(backbone, None if backbone in SEQ2SEQ else TWO_CLASSES)[0]


def fresh(backbone, method, dtype=torch.bfloat16):
    model = copy.deepcopy(base(backbone)).to(dtype)
    gl.attach(model, method)
    return model


def fit(model, **arguments):
    task = REWRITING if model.config.is_encoder_decoder else CLASSES
    return gl.fit(model, task, TOKENIZER, **FIVE_STEPS | arguments)


def scaler(scale):
    return lambda device: torch.amp.grad_scaler.GradScaler(device, init_scale=scale)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copies(model):
    return {name: p.detach().clone() for name, p in trained(model).items()}


def stuck(model, before, silent=lambda name: False):
    return {n for n, p in trained(model).items() if torch.equal(p, before.get(n, p + 1)) and not silent(n)}


# what is trained in 16 bits


@pytest.mark.parametrize("backbone", KINDS)
@pytest.mark.parametrize("name", METHOD_CASES)
def test_everything_that_is_trained_moves_in_bfloat16(name, backbone):
    """No step is longer than the rate, less than half of the distance between two numbers near 1.  All is in
    16 bits: the base, and what the method adds."""
    case = METHOD_CASES[name]
    if backbone in case.refuses and (name != "head" or backbone in SEQ2SEQ):
        return
    model = fresh(backbone, case.method).to(torch.bfloat16)
    before = copies(model)
    fit(model, lr=1.5e-3)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    assert all(p.isfinite().all() and p.grad is None for p in model.parameters())
    if left := stuck(model, before, case.silent):  # then it moves in 32 bits by less than 16 bits can tell
        wide = fresh(backbone, case.method, torch.float32)
        with torch.no_grad():
            for n, p in trained(wide).items():
                p.copy_(before[n])
        fit(wide, lr=1.5e-3)
        way = {n: (p - before[n]).abs().max() for n, p in trained(wide).items()}
        assert all(way[n] < 2**-8 * before[n].abs().max() or n.endswith("Lambda") for n in left), left


@pytest.mark.parametrize("name", ["full", "lora-all", "adalora", "adapter"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_losses_and_the_way_are_those_of_32_bits(dtype, name, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", scaler(2.0**10))  # so that no step is left out
    runs = []
    for kind in (torch.float32, dtype):
        model = fresh("tiny-bert", METHOD_CASES[name].method, kind)
        before = copies(model)
        losses = fit(model, epochs=2, lr=1e-3).losses
        way = torch.cat([(p.float() - before[n].float()).flatten() for n, p in trained(model).items()])
        runs.append((torch.tensor(losses), way))
    (losses, way), (losses16, way16) = runs
    assert (losses - losses16).abs().max() < 0.02
    assert torch.cosine_similarity(way, way16, dim=0) > 0.9 and 0.9 < way16.norm() / way.norm() < 1.1


def test_a_parameter_is_its_copy_rounded_after_every_step():
    generator = torch.Generator().manual_seed(0)
    p, plain = nn.Parameter(torch.randn(50, generator=generator).bfloat16()), nn.Parameter(torch.ones(3))
    exact, held = nn.Parameter(p.detach().float()), p.data_ptr()
    node = p.view_as(p).grad_fn.next_functions[0][0]  # where several processes add up their gradients
    optimizer, reference = (torch.optim.AdamW([q, plain], lr=1e-4, weight_decay=0.1) for q in (p, exact))
    kept = training._Copies([p, plain])
    kept.take_over(optimizer, 1.0)
    assert [*kept] == [p] and optimizer.param_groups[0]["params"] == [kept[p], plain]
    for step in range(30):
        gradient = torch.randn(50, generator=generator).bfloat16()
        p.grad, exact.grad = gradient.clone(), gradient.float()
        kept.take()
        assert p.grad is None
        nn.utils.clip_grad_norm_([exact], 1.0)
        optimizer.step()
        reference.step()
        kept.give()
        assert torch.equal(p, exact.bfloat16()) and p.data_ptr() == held and p.dtype == torch.bfloat16
        assert torch.equal(p.grad, exact.grad.bfloat16()) and kept[p].grad is None
        if (
            step == 10
        ):  # a method writes to it, as AdaLoRA and ReLoRA do: the other entries go on as they were
            for tensor in (p, exact):
                tensor.data[:5] = 0.5
    assert torch.equal(kept[p], exact) and p.view_as(p).grad_fn.next_functions[0][0] is node
    p.grad, before = None, p.detach().clone()
    kept.take()  # nothing came from the backward pass
    optimizer.step()
    kept.give()
    assert torch.equal(p, before) and p.grad is None


def test_a_method_finds_the_moments_of_what_it_trains():
    """ReLoRA drops those of its factors at a restart, also where the optimiser moves copies of them."""
    seen = []

    class Watch(gl.LoRA):
        def after_step(self, attachment, step, total, optimizer):
            factors = [p for part in attachment.parts for p in part.parameters()]
            seen.append([optimizer.state[p]["exp_avg"].dtype for p in factors])
            assert all(p.grad.dtype == p.dtype == torch.bfloat16 for p in factors)

    fit(fresh("tiny-bert", Watch(r=2)).to(torch.bfloat16))
    assert seen == 5 * [8 * [torch.float32]]


def test_gradients_in_16_and_in_32_bits_are_clipped_together():
    seen = []

    class Watch(gl.Adapter):
        def after_step(self, attachment, step, total, optimizer):
            seen.append({n: p.grad.float() for n, p in trained(attachment.model).items()})

    for dtype in (torch.float32, torch.bfloat16):
        model = fresh("tiny-bert", Watch(r=4), dtype)
        with torch.no_grad():
            for part in gl.attached(model).parts:
                part.module.up.weight.mul_(1000)  # or the adapters' own gradients would be short
        fit(model, epochs=0.2)
    exact, half = seen
    added = {n for n in exact if n.startswith("guidelib")}
    for names in (added, exact.keys() - added):
        lengths = [float(torch.cat([way[n].flatten() for n in names]).norm()) for way in (exact, half)]
        assert 0.3 < lengths[0] < 0.97 and lengths[1] == pytest.approx(lengths[0], rel=0.03)


def test_it_takes_the_bytes_that_the_documentation_says(monkeypatch):
    """4 for the copy and 8 for the moments of each number in 16 bits; no copy of what has 32."""
    seen = []
    for name in ("_optimizer", "_Copies"):
        make = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, make=make: seen.append(make(*a)) or seen[-1])
    model = fresh("tiny-bert", gl.Adapter(r=4))
    fit(model, epochs=0.2)
    optimizer, kept = seen[0], max(seen[1:], key=len)
    half = sum(p.numel() for p in trained(model).values() if p.dtype == torch.bfloat16)
    whole = sum(p.numel() for p in trained(model).values())
    assert 0 < half < whole
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * half
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.untyped_storage().nbytes() for t in moments) == 8 * whole


def test_an_interrupted_step_leaves_the_model_as_it_was(monkeypatch):
    model = fresh("tiny-bert", gl.FullFineTuning())
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    before = copies(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert stuck(model, before) == set(before)


# autocast, and a scaled loss


@pytest.mark.parametrize(
    ("name", "keep_less"),
    [
        *((name, False) for name in ("full", "qlora", "krona", "said", "adapter")),
        ("adamix", True),
        ("dora", True),
    ],
)
def test_mixed_precision_gives_nearly_the_losses_of_32_bits(name, keep_less):
    losses = {}
    for precision in ("no", "bf16", "fp16"):
        model = fresh("tiny-bert", METHOD_CASES[name].method, torch.float32)
        seen, attributes = set(), dict(vars(model))
        hook = model.encoder.encoder.layer[0].output.dense.register_forward_hook(
            lambda layer, args, y, seen=seen: seen.add(y.dtype)
        )
        fitted = fit(model, mixed_precision=precision, keep_less=keep_less, lr=1e-3)
        hook.remove()
        assert seen == {training.HALF.get(precision, torch.float32)}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert vars(model).keys() == attributes.keys()  # nor is autocast left around the model
        losses[precision] = torch.tensor(fitted.losses)
    for precision in ("bf16", "fp16"):
        assert 0 < (losses[precision] - losses["no"]).abs().max() < 0.02


def test_one_precision_after_the_other():
    model, seen = fresh("tiny-bert", gl.LoRA(r=2), torch.float32), []
    model.encoder.encoder.layer[0].output.dense.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    model._is_accelerate_prepared = True  # accelerate's mark, left by another run
    wanted = torch.float32, torch.bfloat16, torch.float16, torch.float32
    for precision in ("no", "bf16", "fp16", "no"):
        fit(model, epochs=0.2, mixed_precision=precision)
        gl.evaluate(model, CLASSES, TOKENIZER)
    twice = [torch.bfloat16] * 2 + [torch.float16] * 2  # the step, and the look after the last one
    assert [kind for kind in seen if kind != torch.float32] == twice
    assert seen[0] == wanted[0] and seen[-1] == wanted[-1]


@pytest.mark.parametrize("name", ["full", "head", "lora", "adalora", "relora", "adapter", "qlora"])
def test_a_model_in_float16_trains_with_a_scaled_loss(name):
    model = fresh("tiny-bert", METHOD_CASES[name].method, torch.float16)
    before = copies(model)
    fitted = fit(model, epochs=4, lr=1e-2)
    left = stuck(model, before, METHOD_CASES[name].silent)
    assert all(n.endswith("Lambda") for n in left)  # AdaLoRA's, which it may set to zero again
    assert all(p.isfinite().all() for p in model.parameters())
    assert sum(fitted.losses[-4:]) < sum(fitted.losses[:4])


def test_small_gradients_do_not_vanish_in_float16():
    """Divided by a million, they are below the smallest number of float16; Adam's steps are as long all the
    same."""

    class Small(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, gradient: gradient / 1e6)

    moved = []
    for precision in (None, "no"):
        model = fresh("tiny-bert", gl.FullFineTuning(), torch.float16)
        model.classifier.register_forward_pre_hook(lambda layer, args: (Small.apply(args[0]),))
        before = copies(model)
        fit(model, mixed_precision=precision)
        moved.append(len(before) - len(stuck(model, before)))
    assert moved[0] > 30 and moved[1] < 10


def test_a_step_whose_gradients_overflow_is_left_out(monkeypatch):
    """The first two are; no method learns from infinite gradients, nor from a step that was none."""
    monkeypatch.setattr(torch.amp, "GradScaler", scaler(2.0**26))
    model = fresh("tiny-bert", METHOD_CASES["adalora"].method + gl.Adapter(r=2), torch.float16)
    seen, make = [], training._optimizer
    monkeypatch.setattr(training, "_optimizer", lambda *a: seen.append(make(*a)) or seen[-1])
    fit(model, epochs=4)
    steps = {int(state["step"]) for state in seen[0].state.values()}
    assert len(steps) == 1 and 0 < min(steps) < 20
    deltas = [part.delta for part in gl.attached(model).parts if hasattr(part, "delta")]
    assert all(t.isfinite().all() for d in deltas for pair in d.remembered.values() for t in pair)
    assert all(p.isfinite().all() for p in model.parameters())


def test_steps_that_all_overflow_are_an_error_with_advice(monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", scaler(2.0**60))
    model = fresh("tiny-bert", gl.LoRA(r=2), torch.float32)
    before = copies(model)
    with pytest.raises(FloatingPointError, match="each of the 5 steps; float16, which ends at 65504, is too"):
        fit(model, mixed_precision="fp16")
    assert stuck(model, before) == set(before) and all(p.grad is None for p in model.parameters())


def test_a_loss_that_overflows_in_float16_is_an_error_with_advice():
    model = fresh("tiny-bert", gl.FullFineTuning(), torch.float16)
    with torch.no_grad():
        model.classifier.weight.fill_(60000)
    before = copies(model)
    with pytest.raises(
        FloatingPointError, match="at step 1; lr must .* or float16, .* in bfloat16 or float32"
    ):
        fit(model)
    assert stuck(model, before) == set(before)


@pytest.mark.parametrize(
    ("dtype", "chosen", "accepted"),
    [
        (torch.float32, "half", "one of no, bf16, fp16 for a model in float32, got 'half'"),
        (torch.float32, True, "one of no, bf16, fp16 for a model in float32, got True"),
        (torch.bfloat16, "fp16", "one of no, bf16 for a model in bfloat16 and float32, got 'fp16'"),
        (torch.float16, "bf16", "one of no, fp16 for a model in float16 and float32, got 'bf16'"),
        (torch.float64, "bf16", "one of no for a model in float64, got 'bf16'"),
    ],
)
def test_a_precision_that_does_not_go_with_the_model_is_refused(dtype, chosen, accepted):
    model = fresh("tiny-bert", gl.LoRA(r=2), dtype)
    with pytest.raises(ValueError, match=f"mixed_precision must be {accepted}"):
        fit(model, mixed_precision=chosen)


def test_a_model_that_transformers_calls_quantised_is_trained_beside_its_layers():
    model = build("tiny-bert", dtype=torch.float32)
    swap(model, Int8)
    model.is_quantized, model.hf_quantizer = True, SimpleNamespace(is_trainable=True)
    gl.attach(model, gl.LoRA(r=2))
    before, attributes = copies(model), dict(vars(model))
    fit(model)
    assert stuck(model, before) == set()
    assert gl.evaluate(model, CLASSES, TOKENIZER)["loss"] > 0
    assert vars(model).keys() == attributes.keys()


# a cast of the whole model


@pytest.mark.parametrize("backbone", KINDS)
@pytest.mark.parametrize("name", METHOD_CASES)
def test_a_cast_model_computes_what_it_did_up_to_rounding(name, backbone):
    case = METHOD_CASES[name]
    if backbone in case.refuses:
        return
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    rounded = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    attachment = gl.attach(model, case.method)
    randomise(attachment, 0.03)
    before = outputs(model, inputs)
    model.to(torch.bfloat16)
    acting = outputs(model, inputs)
    assert acting.dtype == torch.bfloat16
    assert (acting.float() - before).norm() < 0.03 * before.norm()
    model(**inputs).loss.backward()
    assert all(p.grad.isfinite().all() for p in trained(model).values() if p.grad is not None)
    if attachment.mergeable:
        attachment.merge()
        assert (outputs(model, inputs) - acting).float().norm() < 0.03 * before.norm()
    attachment.detach()
    assert all(torch.equal(tensor, rounded[key]) for key, tensor in model.state_dict().items())


def test_the_trainers_evaluation_in_bfloat16_takes_qlora(tmp_path):
    model = fresh("tiny-bert", gl.QLoRA(r=4), torch.float32)
    randomise(gl.attached(model))
    data = CLASSES.encode(TOKENIZER, "test", 32)
    collate = training._collator(model, CLASSES, TOKENIZER)
    losses = []
    for half in (False, True):
        arguments = TrainingArguments(
            tmp_path, bf16_full_eval=half, report_to="none", disable_tqdm=True, use_cpu=True
        )
        losses.append(Trainer(model, arguments, data_collator=collate).evaluate(data)["eval_loss"])
    assert model.dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
