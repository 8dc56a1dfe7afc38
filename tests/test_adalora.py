"""AdaLoRA against Hugging Face PEFT, layer and allocator, the published counts, and what its budget says."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from common import assert_count, assert_the_prediction_is_the_measurement, batch, build, outputs, randomise
from test_training import QUICK, TASK, TOKENIZER

import guidelib as gl
from guidelib import costs
from guidelib.reparametrization.adalora import ranks

ALPHA = 8
ORACLES = [  # backbone, our targets, PEFT's regular expression for the same layers, how many layers that is
    ("tiny-bert", ("q", "v"), r".*\.(query|value)", 4),
    ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)", 12),
    ("tiny-llama", "all", r".*\.(q|k|v|o|gate|up|down)_proj", 14),
    ("tiny-t5-random", "all", r".*(Attention\.[qkvo]|\.wi_0|\.wi_1|\.wo)", 36),
    ("tiny-bart", "all", r".*(\.[qkv]_proj|\.out_proj|\.fc1|\.fc2)", 32),
    ("tiny-gpt2", ("o", "ffn"), r".*\.(c_proj|c_fc)", 6),
]


def peft_model(backbone, pattern, *, dtype=torch.float64, head=None, **arguments):
    """A PEFT model, and its layers by the name that the plain model has for them."""
    settings = dict(init_r=4, target_r=2, total_step=10, orth_reg_weight=0.25) | arguments
    r = settings["init_r"]
    config = peft.AdaLoraConfig(
        lora_alpha=ALPHA * (r + 1e-5) / r,  # PEFT divides by r + 1e-5
        target_modules=pattern,
        fan_in_fan_out="gpt2" in backbone,
        modules_to_save=head,
        **settings,
    )
    model = peft.get_peft_model(build(backbone, dtype=dtype), config).eval()
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.adalora.AdaLoraLayer)
    }
    return model, layers


@torch.no_grad()
def pairs_of(attachment, layers):
    """PEFT's factors filled with ours, and the pairs (our part, PEFT's A, E and B)."""
    names = {id(module): name for name, module in attachment.model.named_modules()}
    pairs = []
    for part in attachment.parts:
        layer = layers[names[id(part.site.module)]]
        a, e, b = (getattr(layer, name)["default"] for name in ("lora_A", "lora_E", "lora_B"))
        a.copy_(part.delta.Q)
        e.copy_(part.delta.Lambda[:, None])
        b.copy_(part.delta.P)
        pairs.append((part, a, e, b))
    return pairs


def copy_head(attachment, theirs):
    with torch.no_grad():
        for name, parameter in attachment.anatomy.head().items():
            theirs.get_parameter(f"base_model.model.{name}").copy_(parameter)


@pytest.mark.parametrize(("backbone", "targets", "pattern", "n"), ORACLES, ids=lambda value: str(value)[:20])
def test_output_gradients_penalty_and_merged_weights_are_those_of_peft(backbone, targets, pattern, n):
    model, inputs = build(backbone), batch(backbone)
    base = outputs(model, inputs)
    attachment = gl.attach(model, gl.AdaLoRA(r=4, target_r=2, alpha=ALPHA, targets=targets, gamma=0.25))
    randomise(attachment, scale=0.3)
    theirs, layers = peft_model(backbone, pattern)
    assert len(attachment.parts) == len(layers) == n
    pairs = pairs_of(attachment, layers)
    copy_head(attachment, theirs)

    ours = outputs(model, inputs)
    assert (ours - base).abs().max() > 1e-3
    assert (ours - outputs(theirs, inputs)).abs().max() <= 1e-12
    loss = model(**inputs).loss + attachment.method.regularizer(attachment)
    other = theirs.base_model(**inputs).loss  # this wrapper adds the penalty; the outer one passes it by
    assert abs(loss - other) <= (1e-12 if other.dtype == torch.float64 else 1e-6)  # language models: 32 bits
    loss.backward()
    other.backward()
    for part, a, e, b in pairs:
        for mine, their in (
            (part.delta.Q, a.grad),
            (part.delta.Lambda, e.grad[:, 0]),
            (part.delta.P, b.grad),
        ):
            assert mine.grad.abs().max() > 0
            assert (mine.grad - their).abs().max() <= 1e-12, part.name

    attachment.merge(permanent=True)
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= 1e-12, name


@pytest.mark.parametrize(
    ("backbone", "targets", "pattern", "phases", "interval"),
    [
        ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)", (0.0, 0.0), 1),
        ("tiny-bert", ("q", "v"), r".*\.(query|value)", (0.1, 0.3), 1),
        ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)", (0.2, 0.4), 3),
        ("tiny-t5-random", "all", r".*(Attention\.[qkvo]|\.wi_0|\.wi_1|\.wo)", (0.1, 0.2), 2),
    ],
)
def test_the_allocator_prunes_what_peft_prunes_at_every_step(backbone, targets, pattern, phases, interval):
    total, inputs = 20, batch(backbone)
    warmup, final = phases
    method = gl.AdaLoRA(4, 2, ALPHA, targets, warmup, final, interval, gamma=0.25)
    model = build(backbone)
    attachment = gl.attach(model, method)
    schedule = dict(tinit=int(warmup * total), tfinal=int(final * total), deltaT=interval, total_step=total)
    theirs, layers = peft_model(backbone, pattern, **schedule)
    pairs = pairs_of(attachment, layers)
    copy_head(attachment, theirs)
    mine = [p for part in attachment.parts for p in part.delta.parameters()]
    other = [p for _, *factors in pairs for p in factors]
    optimizers = torch.optim.AdamW(mine, lr=0.02), torch.optim.AdamW(other, lr=0.02)
    method.prepare(attachment, [])
    left = []
    for step in range(1, total + 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(**inputs).loss + method.regularizer(attachment)).backward()
        theirs.base_model(**inputs).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(attachment, step, total, optimizers[0])
        theirs.base_model.update_and_allocate(step)
        for part, _, e, _ in pairs:
            assert torch.equal(part.delta.Lambda == 0, e[:, 0] == 0), (step, part.name)
            assert (part.delta.Lambda - e[:, 0]).abs().max() < 1e-9
        left.append(sum(ranks(attachment).values()))
    n = len(attachment.parts)
    assert left[0] > left[-1] == 2 * n
    assert len(set(ranks(attachment).values())) > 1  # the budget is one for all weights
    assert theirs.base_model.rankallocator.target_bgt == 2 * n


@pytest.mark.parametrize(("warmup", "final", "interval"), [(0.1, 0.5, 1), (0.0, 0.0, 1), (0.25, 0.25, 4)])
def test_the_budget_falls_as_a_cube_and_so_does_what_is_left(warmup, final, interval):
    total, inputs = 20, batch("tiny-bert")
    model = build("tiny-bert")
    method = gl.AdaLoRA(r=6, target_r=2, warmup=warmup, final=final, interval=interval)
    attachment = gl.attach(model, method)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    n, start, stop = len(attachment.parts), warmup * total, total - final * total
    for step in range(1, total + 1):
        expected = {True: 6 * n, False: 2 * n}.get(step <= start if not start < step < stop else None)
        if expected is None:
            expected = int(2 * n + 4 * n * (1 - (step - start) / (stop - start)) ** 3)
        assert method.budget(step, total, n) == expected
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        method.after_step(attachment, step, total, optimizer)
        if step <= start:
            assert sum(ranks(attachment).values()) == 6 * n
        elif step >= stop or step % interval == 0:
            assert sum(ranks(attachment).values()) == expected
    assert [method.budget(step, total, n) for step in (0, total)] == [6 * n, 2 * n]


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_budget_is_met_in_the_shortest_training(total):
    for warmup, final in ((0.1, 0.5), (0.49, 0.49), (0.9, 0.0), (0.0, 0.9)):
        method = gl.AdaLoRA(warmup=warmup, final=final)
        curve = [method.budget(step, total, 3) for step in range(total + 1)]
        assert curve[0] == 36 and curve[-1] == 24 and curve == sorted(curve, reverse=True)


def test_of_equal_triplets_the_first_stay():
    """With a gradient of zero all scores are equal; a threshold would keep none of them, or all."""
    model = build("tiny-bert")
    method = gl.AdaLoRA(r=4, target_r=1, targets=("q", "v"))
    attachment = gl.attach(model, method)
    for part in attachment.parts:
        torch.nn.init.ones_(part.delta.Lambda)
        for parameter in part.delta.parameters():
            parameter.grad = torch.zeros_like(parameter)
    method.after_step(attachment, 20, 20, None)
    assert list(ranks(attachment).values()) == [4, 0, 0, 0]


def test_importance_by_hand():
    """One weight, two steps: s is the product of the two averages, summed over the triplet."""
    model = build("tiny-bert")
    attachment = gl.attach(
        model, gl.AdaLoRA(r=2, target_r=1, targets="q", beta1=0.5, beta2=0.75).on(layers=0)
    )
    randomise(attachment)
    (part,) = attachment.parts
    seen = {name: [] for name in ("P", "Lambda", "Q")}
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        for name, w in part.delta.named_parameters():
            w.grad = torch.randn(w.shape, dtype=w.dtype, generator=generator)
            seen[name].append((w * w.grad).abs().detach())
        part.delta.remember(0.5, 0.75)
    s = {}
    for name, (first, second) in seen.items():
        means = 0.5 * first, 0.25 * first + 0.5 * second
        s[name] = means[1] * (0.75 * 0.25 * (first - means[0]).abs() + 0.25 * (second - means[1]).abs())
    expected = [
        s["Lambda"][i] + s["P"][:, i].sum() / 32 + s["Q"][i].sum() / 32 for i in range(2)
    ]  # fmt: skip
    assert torch.allclose(part.delta.importance(), torch.stack(expected).detach(), rtol=1e-12, atol=0)
    before = part.delta.importance()
    part.delta.Lambda.grad = None  # left out of a step: P and Q have the gradient of the penalty alone
    part.delta.remember(0.5, 0.75)
    assert torch.equal(part.delta.importance(), before)


def test_with_a_constant_budget_and_no_penalty_it_is_lora_with_a_diagonal():
    """Lambda fixed at 1: the same function of P and Q as LoRA's of B and A, and the same steps."""
    inputs = batch("tiny-bert")
    method = gl.AdaLoRA(r=4, target_r=4, alpha=6, gamma=0.0, targets="all")
    models = [build("tiny-bert") for _ in range(2)]
    ours, lora = gl.attach(models[0], method), gl.attach(models[1], gl.LoRA(r=4, alpha=6, targets="all"))
    assert method.regularizer(ours) is None
    randomise(lora)
    with torch.no_grad():
        for part, other in zip(ours.parts, lora.parts, strict=True):
            part.delta.Lambda.fill_(1)
            part.delta.P.copy_(other.delta.B)
            part.delta.Q.copy_(other.delta.A)
        for name, parameter in ours.anatomy.head().items():
            parameter.copy_(models[1].get_parameter(name))
    optimizers = []
    for model in models:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "Lambda" not in n}
        optimizers.append(torch.optim.AdamW(trained.values(), lr=0.01))
    for step in range(1, 6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        method.after_step(ours, step, 5, optimizers[0])
    assert set(ranks(ours).values()) == {4}
    assert (outputs(models[0], inputs) - outputs(models[1], inputs)).abs().max() < 1e-9
    for part, other in zip(ours.parts, lora.parts, strict=True):
        assert (part.delta.P - other.delta.B).abs().max() < 1e-9
        assert (part.delta.delta() - other.delta.delta()).abs().max() < 1e-9


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_the_chain_rule_gives_the_gradients_of_all_three(backbone):
    """With G the gradient of the whole weight: dLambda_i = s P_i^T G Q_i, and so on."""
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.AdaLoRA(r=3, target_r=2, alpha=6, targets=("q", "v", "ffn.out")))
    randomise(attachment)
    model(**inputs).loss.backward()
    deltas = [(p.site, {n: (w.detach(), w.grad) for n, w in p.delta.named_parameters()})
              for p in attachment.parts]  # fmt: skip
    attachment.merge(permanent=True)
    model.zero_grad()
    model(**inputs).loss.backward()
    for site, of in deltas:
        full = site.module.weight.grad
        full = full.t() if backbone == "tiny-gpt2" else full
        full = 2 * (full if site.rows is None else full[site.rows])
        (p, dp), (lam, dlam), (q, dq) = of["P"], of["Lambda"], of["Q"]
        assert full.abs().max() > 1e-6
        assert (dp - full @ q.t() * lam).abs().max() < 1e-12
        assert (dlam - (p.t() @ full @ q.t()).diagonal()).abs().max() < 1e-12
        assert (dq - lam[:, None] * (p.t() @ full)).abs().max() < 1e-12


def test_the_penalty_is_zero_for_orthonormal_factors_and_pulls_towards_them():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.AdaLoRA(r=4, target_r=2, gamma=0.5))
    penalty = attachment.method.regularizer
    # P and Q are almost zero at the start, so every norm is almost that of the identity
    assert float(penalty(attachment).detach()) == pytest.approx(0.5 * 2, rel=0.02)
    trained = [w for part in attachment.parts for w in (part.delta.P, part.delta.Q)]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    before = float(penalty(attachment).detach())
    for _ in range(20):
        optimizer.zero_grad()
        penalty(attachment).backward()
        optimizer.step()
    assert float(penalty(attachment).detach()) < 0.5 * before
    with torch.no_grad():
        for part in attachment.parts:
            torch.nn.init.orthogonal_(part.delta.P)
            torch.nn.init.orthogonal_(part.delta.Q)
    loss = penalty(attachment)
    assert float(loss.detach()) < 1e-12
    loss.backward()
    assert all(torch.isfinite(w.grad).all() for w in trained)


def test_a_pruned_triplet_keeps_its_vectors_and_the_gradient_brings_it_back():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    method = gl.AdaLoRA(r=4, target_r=1, warmup=0.0, final=0.25, interval=4)
    attachment = gl.attach(model, method)
    randomise(attachment)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    left = []
    for step in range(1, 13):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()
        method.after_step(attachment, step, 12, optimizer)
        left.append(sum(ranks(attachment).values()))
    pruned = method.budget(4, 12, 12), method.budget(8, 12, 12)
    assert left == [48] * 3 + [pruned[0]] + [48] * 3 + [pruned[1]] + [12] * 4
    assert all(part.delta.P.abs().min(0).values.max() > 0 for part in attachment.parts)


def test_the_start_is_the_papers_and_follows_the_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (
        gl.attach(build("tiny-bert"), gl.AdaLoRA(targets="ffn.out"), seed=seed).parts[0].delta
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.P, same.P) and torch.equal(first.Q, same.Q) and not torch.equal(first.Q, other.Q)
    assert (first.P.shape, first.Lambda.shape, first.Q.shape) == ((32, 12), (12,), (12, 64))
    assert first.rank == 0 and abs(first.Q.std() - 0.02) < 0.002 and abs(first.P.std() - 0.02) < 0.002


# training, saving


def test_fit_ends_at_the_budget_and_the_file_holds_the_ranks(tmp_path):
    method = gl.AdaLoRA(r=6, target_r=2, warmup=0.1, final=0.3)
    model = build("tiny-bert", dtype=torch.float32)
    attachment = gl.attach(model, method)
    fitted = gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=8))
    left = ranks(attachment)
    assert sum(left.values()) == 2 * 12 and len(left) == 12 and len(set(left.values())) > 1
    assert left["encoder.0.self.q"] == attachment.parts[0].delta.rank
    for part in attachment.parts:
        values = torch.linalg.svdvals(part.delta.delta().detach().double())
        assert int((values > 1e-6 * values.max().clamp(min=1e-9)).sum()) == part.delta.rank
    result = gl.evaluate(model, TASK, TOKENIZER, max_length=32)
    assert fitted.losses[-1] < 0.5 * fitted.losses[0] and result["accuracy"] > 0.9
    assert attachment.count().stored == attachment.count().trainable  # no moving average is stored
    path = attachment.save(tmp_path / "a.safetensors")
    fresh = build("tiny-bert", dtype=torch.float32)
    loaded = gl.load(fresh, path)
    assert ranks(loaded) == left and loaded.method == method
    assert gl.evaluate(fresh, TASK, TOKENIZER, max_length=32) == result
    gl.fit(fresh, TASK, TOKENIZER, **QUICK)  # a new budget, from nothing remembered
    assert sum(ranks(loaded).values()) == 2 * 12


def test_it_works_in_a_sum_and_on_some_layers():
    model = build("tiny-bert", dtype=torch.float32)
    ada = gl.AdaLoRA(r=4, target_r=1, targets=("q", "v"))
    attachment = gl.attach(model, ada.on(layers=-1) + gl.LoRA(r=2, targets="ffn"))
    gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=2))
    assert sum(ranks(attachment).values()) == 2 and set(ranks(attachment)) == {
        "encoder.1.self.q",
        "encoder.1.self.v",
    }
    assert ranks(gl.attach(build("tiny-bert"), gl.LoRA(r=2))) == {}


# counts and costs

DEBERTA_V3_BASE = dict(model_type="bert", vocab_size=128100)  # its encoder's matrices have BERT-base's sizes
SIX = 12 * (4 * (768 + 768) + 2 * (768 + 3072))
COUNTS = {  # where the number stands -> model, method, parameters
    "PEFT: BERT-base q, v r=12": (dict(model_type="bert"), gl.AdaLoRA(targets=("q", "v")), 442_680 - 24),
    "DeBERTaV3-base, six matrices, at the start": (DEBERTA_V3_BASE, gl.AdaLoRA(), 12 * SIX + 72 * 12),
    "DeBERTaV3-base, six matrices, at the target": (DEBERTA_V3_BASE, gl.AdaLoRA(r=8), 1_327_104 + 72 * 8),
    "DeBERTaV3-base, target 2": (DEBERTA_V3_BASE, gl.AdaLoRA(r=2, target_r=2), 331_776 + 72 * 2),
}


@pytest.mark.parametrize("source", COUNTS)
def test_published_counts(source):
    assert_count(*COUNTS[source])


METHODS = {  # without the penalty, which is not in the closed form
    "q, v": gl.AdaLoRA(r=4, target_r=2, targets=("q", "v"), gamma=0),
    "all": gl.AdaLoRA(r=3, target_r=2, gamma=0),
    "on the last layer": gl.AdaLoRA(r=5, target_r=2, gamma=0).on(layers=-1),
    "on the first layer": gl.AdaLoRA(r=5, target_r=2, targets=("k", "ffn.in"), gamma=0).on(layers=0),
    "beside lora": gl.AdaLoRA(r=4, target_r=2, gamma=0) + gl.LoRA(r=2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
def test_the_prediction_is_the_measurement(backbone, method):
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, METHODS[method])
    assert_the_prediction_is_the_measurement(model, backbone)


@pytest.mark.parametrize(
    ("backbone", "targets", "pattern", "n"), ORACLES[:4], ids=lambda value: str(value)[:20]
)
def test_no_more_than_peft_needs(backbone, targets, pattern, n):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    attachment = gl.attach(model, gl.AdaLoRA(r=4, target_r=2, alpha=ALPHA, targets=targets, gamma=0))
    head = [name for name in ("classifier",) if hasattr(model, name)]
    theirs, layers = peft_model(backbone, pattern, dtype=torch.float32, head=head or None)
    theirs = theirs.base_model.model  # without the penalty, which PEFT's wrapper adds
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == attachment.count().trainable
    assert costs.saved_bytes(model, inputs) <= costs.saved_bytes(theirs, inputs)
    for ours, other in zip(costs.flops(model, inputs), costs.flops(theirs, inputs), strict=True):
        assert 0 < ours <= other


REFUSED_VALUES = [
    (dict(r=0), "r must be a whole number of at least 1, got 0"),
    (dict(r=2.0), "r must be a whole number of at least 1, got 2.0"),
    (dict(target_r=0), "target_r must be a whole number from 1 to r = 12, got 0"),
    (dict(target_r=13), "target_r must be a whole number from 1 to r = 12, got 13"),
    (dict(alpha="8"), "alpha must be a finite number, got '8'"),
    (dict(warmup=1), "warmup must be a share of the training, at least 0 and less than 1, got 1"),
    (dict(warmup="0.1"), "warmup must be"),
    (dict(final=-0.1), "final must be"),
    (
        dict(warmup=0.5, final=0.5),
        "final must be a share of the training, at least 0 and with warmup = 0.5 less than 1, got 0.5",
    ),
    (dict(interval=0), "interval must be a whole number of at least 1, got 0"),
    (dict(beta1=0), "beta1 must be a number between 0 and 1, got 0"),
    (dict(beta2=1.0), "beta2 must be a number between 0 and 1, got 1.0"),
    (dict(gamma=-1), "gamma must be a finite number of at least 0, got -1"),
    (dict(gamma=float("nan")), "gamma must be"),
    (dict(targets=None), "targets must be"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_VALUES, ids=lambda value: str(value)[:24])
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.AdaLoRA(**arguments)
    assert message in str(error.value)


def test_a_rank_beyond_the_smaller_side_is_refused_and_the_model_stays_as_it_was():
    model = build("tiny-llama")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"r must be at most 16, the smaller side of decoder.0.self.k, got 17"
    ):
        gl.attach(model, gl.AdaLoRA(r=17, targets="k"))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert not hasattr(model, "guidelib")
