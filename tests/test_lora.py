"""LoRA against Hugging Face PEFT, the published counts, and what its equation says."""

from __future__ import annotations

import copy
import math

import peft
import pytest
import torch
from common import assert_count, assert_the_prediction_is_the_measurement, batch, build, outputs, randomise
from transformers import AutoConfig, AutoModel, BertConfig, BertForSequenceClassification

import guidelib as gl
from guidelib import costs
from guidelib.reparametrization.lora import LowRank

# backbone, our targets, PEFT's regular expression for the same layers, how many layers that is
ORACLES = [
    ("tiny-bert", ("q", "v"), r".*\.(query|value)", 4),
    ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)", 12),
    ("tiny-llama", ("q", "v"), r".*\.(q_proj|v_proj)", 4),
    ("tiny-llama", "all", r".*\.(q|k|v|o|gate|up|down)_proj", 14),
    ("tiny-t5-random", ("q", "v"), r".*Attention\.(q|v)", 12),
    ("tiny-t5-random", "all", r".*(Attention\.[qkvo]|\.wi_0|\.wi_1|\.wo)", 36),
    ("tiny-bart", ("q", "v"), r".*\.(q_proj|v_proj)", 12),
    ("tiny-bart", "all", r".*(\.[qkv]_proj|\.out_proj|\.fc1|\.fc2)", 32),
    ("tiny-gpt2", ("o", "ffn"), r".*\.(c_proj|c_fc)", 6),
]
VARIANTS = {"lora": {}, "rslora": {"rank_stabilized": True}, "lora-fa": {"freeze_A": True}}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()


def peft_model(backbone, r, alpha, pattern, variant="lora", dtype=torch.float64):
    """A PEFT model in eval mode, and its layers by the name that the plain model has for them."""
    config = peft.LoraConfig(
        **dict(r=r, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0),
        **dict(fan_in_fan_out="gpt2" in backbone, use_rslora=variant == "rslora"),
    )
    model = peft.get_peft_model(build(backbone, dtype=dtype), config).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not (variant == "lora-fa" and "lora_A" in name))
    prefix = "base_model.model."
    layers = {
        name.removeprefix(prefix): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return model, layers


@torch.no_grad()
def transplant(attachment, layers):
    """Copy our factors into PEFT's layers; returns the pairs (our part, PEFT's A, PEFT's B)."""
    names = {id(module): name for name, module in attachment.model.named_modules()}
    pairs = []
    for part in attachment.parts:
        layer = layers[names[id(part.site.module)]]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.dtype == b.dtype == torch.float64
        a.copy_(part.delta.A)
        b.copy_(part.delta.B)
        pairs.append((part, a, b))
    return pairs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("backbone", "targets", "pattern", "n"), ORACLES, ids=lambda value: str(value)[:20])
def test_output_gradients_and_merged_weights_are_those_of_peft(backbone, targets, pattern, n, variant):
    model, inputs = build(backbone), batch(backbone)
    base = outputs(model, inputs)
    attachment = gl.attach(model, gl.LoRA(r=3, alpha=8, targets=targets, **VARIANTS[variant]))
    randomise(attachment)
    theirs, layers = peft_model(backbone, 3, 8, pattern, variant)
    assert len(attachment.parts) == len(layers) == n
    pairs = transplant(attachment, layers)
    with torch.no_grad():  # PEFT leaves the head as it was
        for name, parameter in attachment.anatomy.head().items():
            theirs.get_parameter(f"base_model.model.{name}").copy_(parameter)

    ours = outputs(model, inputs)
    assert (ours - base).abs().max() > 1e-3
    assert (ours - outputs(theirs, inputs)).abs().max() <= 1e-12
    gradients(model, inputs)
    gradients(theirs, inputs)
    for part, *factors in pairs:
        for ours, other in zip((part.delta.A, part.delta.B), factors, strict=True):
            assert ours.requires_grad == other.requires_grad
            if ours.requires_grad:
                assert ours.grad.abs().max() > 0
                assert (ours.grad - other.grad).abs().max() <= 1e-12, part.name

    attachment.merge(permanent=True)
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= 1e-12, name


def test_two_updates_of_gpt2s_fused_projection_are_one_block_update_of_peft():
    """PEFT sees one layer with 3 d outputs; rank 2 r, A stacked and B block-diagonal is q and v apart."""
    r, alpha, d = 3, 8, 32
    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    attachment = gl.attach(model, gl.LoRA(r=r, alpha=alpha))
    randomise(attachment)
    theirs, layers = peft_model("tiny-gpt2", 2 * r, 2 * alpha, r".*\.c_attn")
    factors = []
    for i, (name, layer) in enumerate(layers.items()):
        assert name == f"transformer.h.{i}.attn.c_attn"
        q, v = (part.delta for part in attachment.parts[2 * i : 2 * i + 2])
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            a.copy_(torch.cat((q.A, v.A)))
            b.zero_()
            b[:d, :r], b[2 * d :, r:] = q.B, v.B
        factors.append((q, v, a, b))
    assert (outputs(model, inputs) - outputs(theirs, inputs)).abs().max() <= 1e-12
    gradients(model, inputs)
    gradients(theirs, inputs)
    for q, v, a, b in factors:
        assert (torch.cat((q.A.grad, v.A.grad)) - a.grad).abs().max() <= 1e-12
        assert (q.B.grad - b.grad[:d, :r]).abs().max() <= 1e-12
        assert (v.B.grad - b.grad[2 * d :, r:]).abs().max() <= 1e-12
        assert b.grad[d : 2 * d].abs().max() > 0  # the rank-2r update is not restricted to q and v; ours is


def test_an_update_of_gpt2s_queries_leaves_keys_and_values_alone():
    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    seen = []
    first = model.transformer.h[0].attn.c_attn
    outputs(model, inputs)  # nothing that is only set up at the first call
    first.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs(model, inputs)
    attachment = gl.attach(model, gl.LoRA(r=2, targets="q"))
    randomise(attachment)
    first.register_forward_hook(lambda module, args, output: seen.append(output))  # after the method's
    outputs(model, inputs)
    before, with_lora = seen[0].chunk(3, -1), seen[-1].chunk(3, -1)
    assert not torch.equal(before[0], with_lora[0])
    assert torch.equal(before[1], with_lora[1]) and torch.equal(before[2], with_lora[2])
    attachment.merge()
    weight, plain = (
        first.weight.chunk(3, -1),
        build("tiny-gpt2").transformer.h[0].attn.c_attn.weight.chunk(3, -1),
    )
    assert not torch.equal(weight[0], plain[0])
    assert torch.equal(weight[1], plain[1]) and torch.equal(weight[2], plain[2])


BERT_BASE = dict(model_type="bert")
ROBERTA_BASE = dict(model_type="roberta")
ROBERTA_LARGE = ROBERTA_BASE | dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
GPT2 = dict(model_type="gpt2")
GPT2_M = GPT2 | dict(n_embd=1024, n_layer=24, n_head=16)
GPT2_L = GPT2 | dict(n_embd=1280, n_layer=36, n_head=20)
GPT3 = GPT2 | dict(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
T5_BASE = dict(model_type="t5", d_model=768, d_kv=64, num_heads=12, d_ff=3072, num_layers=12)
T5_LARGE = dict(model_type="t5", d_model=1024, d_kv=64, num_heads=16, d_ff=4096, num_layers=24)
T5_3B = T5_LARGE | dict(d_kv=128, num_heads=32, d_ff=16384)
T5_11B = T5_LARGE | dict(d_kv=128, num_heads=128, d_ff=65536)
T0_3B = T5_LARGE | dict(d_model=2048, num_heads=32, d_ff=5120, feed_forward_proj="gated-gelu")
LLAMA_7B = dict(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
QV, QKVO = ("q", "v"), ("q", "k", "v", "o")
PUBLISHED = {  # where the number stands -> model, rank, targets, parameters
    "LoRA table 4: GPT-3 4.7 M": (GPT3, 1, QV, 4_718_592),
    "LoRA table 5: GPT-3 18 M, q and v": (GPT3, 4, QV, 18_874_368),
    "LoRA table 5: GPT-3 18 M, q alone": (GPT3, 8, "q", 18_874_368),
    "LoRA table 5: GPT-3 18 M, q k v o": (GPT3, 2, QKVO, 18_874_368),
    "LoRA table 2: RoBERTa base 0.3 M": (ROBERTA_BASE, 8, QV, 294_912),
    "LoRA table 2: RoBERTa large 0.8 M": (ROBERTA_LARGE, 8, QV, 786_432),
    "LoRA table 3: GPT-2 M, 0.35 M printed": (GPT2_M, 4, QV, 393_216),
    "LoRA table 3: GPT-2 L, 0.77 M printed": (GPT2_L, 4, QV, 737_280),
    "VeRA: RoBERTa base r=1 36.8 K": (ROBERTA_BASE, 1, QV, 36_864),
    "VeRA: RoBERTa base r=16 589.8 K": (ROBERTA_BASE, 16, QV, 589_824),
    "T-Few: T0-3B 9.1 M, without its LayerNorms": (T0_3B, 4, "all", 9_097_216 - 249_856),
    "LST: T5-base r=32 1.71 %, without its biases": (T5_BASE, 32, QV, 3_819_876 - 280_932),
    "DoRA table 1: LLaMA-7B 0.83 %": (LLAMA_7B, 32, ("q", "k", "v", "ffn.in", "ffn.out"), 56_098_816),
    "UniPELT: BERT-base 295 K": (BERT_BASE, 8, QV, 294_912),
    "AdaLoRA table 1: 1.33 M, six matrices of BERT-base's size": (BERT_BASE, 8, "all", 1_327_104),
    "survey's code: T5-large q, v": (T5_LARGE, 8, QV, 2_359_296),
    "survey's code: T5-large all": (T5_LARGE, 8, "all", 8_650_752),
    "survey's formula: T5-3B q, v": (T5_3B, 8, QV, 144 * 8 * (1024 + 4096)),
    "survey's formula: T5-11B all": (T5_11B, 8, "all", 288 * 8 * (1024 + 16384) + 96 * 8 * (1024 + 65536)),
    "PEFT: T5-base": (T5_BASE, 8, QV, 884_736),
    "PEFT: T0-3B": (T0_3B, 8, QV, 4_718_592),
    "PEFT: GPT-2, one update of the fused layer": (GPT2, 8, QV, 294_912),
}


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_counts(source):
    config, r, targets, expected = PUBLISHED[source]
    count = assert_count(config, gl.LoRA(r=r, targets=targets), expected)
    assert count.head == count.norms == 0


def test_at_the_first_step_only_b_has_a_gradient():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=4))
    gradients(model, batch("tiny-bert"))
    for part in attachment.parts:
        assert torch.count_nonzero(part.delta.A.grad) == 0
        assert torch.count_nonzero(part.delta.B.grad) > 0


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_the_chain_rule_gives_the_gradients_of_both_factors(backbone):
    """With G the gradient of the whole weight at W': dB = s G A^T and dA = s B^T G."""
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.LoRA(r=3, alpha=6, targets=("q", "v", "ffn.out")))
    randomise(attachment)
    gradients(model, inputs)
    factors = [(p.site, *(t.detach() for t in (p.delta.A, p.delta.B, p.delta.A.grad, p.delta.B.grad)))
               for p in attachment.parts]  # fmt: skip
    attachment.merge(permanent=True)  # the model is a plain one at W', and all of it trains
    gradients(model, inputs)
    for site, a, b, da, db in factors:
        full = site.module.weight.grad
        full = full.t() if backbone == "tiny-gpt2" else full
        full = full if site.rows is None else full[site.rows]
        assert full.shape == site.shape and full.abs().max() > 1e-6
        assert (db - 2 * full @ a.t()).abs().max() < 1e-12
        assert (da - 2 * b.t() @ full).abs().max() < 1e-12


def test_the_start_is_the_authors_and_follows_the_seed():
    """A is uniform within 1 / sqrt(d_in), B zero; the global random state does not move."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (
        gl.attach(build("tiny-bert"), gl.LoRA(r=4, targets="ffn.out"), seed=seed).parts[0].delta
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.A, same.A) and not torch.equal(first.A, other.A)
    assert first.A.shape == (4, 64) and first.B.shape == (32, 4) and torch.count_nonzero(first.B) == 0
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < first.A.abs().max() <= bound
    assert abs(first.A.std() - bound / math.sqrt(3)) < 0.1 * bound


def test_the_update_has_at_most_rank_r():
    model, plain = build("tiny-gpt2"), build("tiny-gpt2")
    attachment = gl.attach(model, gl.LoRA(r=3, alpha=7, targets="all"))
    randomise(attachment, scale=1.0)
    attachment.merge()
    for site, before in zip(attachment.anatomy.linears(), gl.anatomy.Anatomy(plain).linears(), strict=True):
        values = torch.linalg.svdvals(site.weight - before.weight)
        assert values[2] > 1e-3 and values[3:].max() < 1e-12 * values[0], site.name


@pytest.mark.parametrize("target", ["q", "ffn.in", "ffn.out"])
def test_full_rank_reaches_any_update(target):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    method = gl.LoRA(r=32, alpha=4, targets=target)
    attachment = gl.attach(model, method.on(layers=0))
    (part,) = attachment.parts
    update = torch.randn(part.site.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(update, full_matrices=False)
    with torch.no_grad():
        part.delta.A.copy_(right)
        part.delta.B.copy_(left * values * (32 / 4))
    acting = outputs(model, inputs)
    attachment.detach()
    part.site.weight.add_(update)
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12


def test_the_surveys_sketch_scales_the_frozen_path_too():
    generator = torch.Generator().manual_seed(0)
    x, w, w_a = (torch.randn(5, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    w_b = torch.zeros(5, 5, dtype=torch.float64)

    def sketch(x, scale):
        h = x @ w
        h = h + x @ w_a @ w_b
        return scale * h

    assert torch.equal(sketch(x, scale=1), x @ w)
    assert not torch.allclose(sketch(x, scale=1 / 4), x @ w)

    model = build("tiny-bert")
    before = outputs(model, batch("tiny-bert"))
    gl.attach(model, gl.LoRA(r=4, alpha=1))  # the same scale
    assert torch.equal(outputs(model, batch("tiny-bert")), before)


@pytest.mark.parametrize(("stabilized", "divisor"), [(False, 4), (True, 2)])
def test_alpha_scales_the_update_alone(stabilized, divisor):
    changes = []
    for alpha in (1, 3):
        attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=4, alpha=alpha, rank_stabilized=stabilized))
        randomise(attachment)
        changes.append(attachment.parts[0].delta.delta().detach())
        product = attachment.parts[0].delta.B @ attachment.parts[0].delta.A
        assert torch.allclose(changes[-1], alpha / divisor * product)
    assert torch.allclose(3 * changes[0], changes[1], rtol=1e-12)


def test_dropout_acts_in_training_only_and_merging_ignores_it():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=4, targets="all", dropout=0.5))
    randomise(attachment)
    delta = attachment.parts[0].delta
    x = torch.randn(2000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (delta(x) - x @ delta.delta().t()).abs().max() < 1e-12  # eval: as if there were none
    acting = outputs(model, inputs)
    assert torch.equal(acting, outputs(model, inputs))

    model.train()
    torch.manual_seed(1)  # not the seed of x, or the mask would depend on x
    dropped = delta(x)
    torch.manual_seed(1)
    assert torch.equal(dropped, delta(x))
    assert not torch.equal(dropped, delta(x))
    error = (dropped - x @ delta.delta().t()).mean(0).abs().max()  # unbiased: the mean over many rows stays
    assert error < 0.1 * dropped.std()

    attachment.merge()  # still in training mode
    model.eval()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12


# rsLoRA


@pytest.mark.parametrize(("stabilized", "power"), [(False, -1), (True, 0)])
def test_the_first_step_is_as_large_at_every_rank_only_if_stabilised(stabilized, power):
    """dB = s G A^T, and A A^T is about r: its square grows as s^2 r, so as 1 / r with s = alpha / r."""

    def first(r):
        total = 0
        for seed in range(8):
            model = build("tiny-bert")
            method = gl.LoRA(r=r, targets=("q", "k", "v", "o"), rank_stabilized=stabilized)
            attachment = gl.attach(model, method, seed=seed)
            gradients(model, batch("tiny-bert"))
            total += sum(float(part.delta.B.grad.square().sum()) for part in attachment.parts)
        return total

    assert first(2) > 0
    for r in (8, 32):
        assert math.log(first(r) / first(2), r / 2) == pytest.approx(power, abs=0.15)


# LoRA-FA


FROZEN_A = {  # model, rank, targets -> trained (half, or what the outputs have), in the file
    "RoBERTa base, square": (ROBERTA_BASE, 8, QV, 147_456, 294_912),
    "GPT-3, square": (GPT3, 4, QV, 9_437_184, 18_874_368),
    "T5-large all": (T5_LARGE, 8, "all", 24 * 8 * (12 * 1024 + 2 * (1024 + 4096)), 8_650_752),
    "FFN out": (BERT_BASE, 8, "ffn.out", 12 * 8 * 768, 12 * 8 * (768 + 3072)),
}


@pytest.mark.parametrize("name", FROZEN_A)
def test_with_a_frozen_b_alone_is_trained_and_both_are_in_the_file(name):
    config, r, targets, trainable, stored = FROZEN_A[name]
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    count = gl.attach(model, gl.LoRA(r=r, targets=targets, freeze_A=True)).count()
    assert (count.trainable, count.stored) == (trainable, stored)


def test_with_a_frozen_the_start_and_the_gradients_of_b_are_loras():
    found = []
    for freeze in (False, True):
        model = build("tiny-bert")
        attachment = gl.attach(model, gl.LoRA(r=3, targets="all", freeze_A=freeze), seed=4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for part in attachment.parts:
                part.delta.B.normal_(generator=generator)
        gradients(model, batch("tiny-bert"))
        found.append([(part.delta.A.detach(), part.delta.B.grad) for part in attachment.parts])
        assert all((part.delta.A.grad is None) == freeze for part in attachment.parts)
    for (a, db), (same_a, same_db) in zip(*found, strict=True):
        assert torch.equal(a, same_a) and torch.equal(db, same_db) and db.abs().max() > 0


def test_bytes_of_the_known_model_with_a_frozen():
    """90.6 MiB: LoRA's without the six layers' inputs, which is less than training the biases keeps."""
    config = BertConfig(
        **dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536),
        **dict(vocab_size=30522, num_labels=2),
    )
    model = BertForSequenceClassification(config)
    ids = torch.arange(16 * 64).reshape(16, 64) + 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}
    kept = []
    for freeze in (False, True):
        attachment = gl.attach(model, gl.LoRA(r=8, freeze_A=freeze))
        kept.append(costs.saved_bytes(model, inputs))
        attachment.detach()
    assert kept == [104_472_708, 104_472_708 - 6 * ids.numel() * 384 * 4]
    assert round(kept[1] / 2**20, 1) == 90.6
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or "classifier" in name)
    assert kept[1] < costs.saved_bytes(model, inputs) == 96_223_364


CLOSED_FORMS = {
    "lora-fa q, v": gl.LoRA(r=4, freeze_A=True),
    "lora-fa all": gl.LoRA(r=2, targets="all", freeze_A=True),
    "lora-fa on the last layer": gl.LoRA(r=3, targets="all", freeze_A=True).on(layers=-1),
    **{f"lora-fa {role}": gl.LoRA(r=5, targets=role, freeze_A=True) for role in ("k", "o", "ffn")},
    "lora-fa beside lora": gl.LoRA(r=2, freeze_A=True) + gl.LoRA(r=3, targets="v"),
    "rslora all": gl.LoRA(r=4, targets="all", rank_stabilized=True),
}


@pytest.mark.parametrize("method", CLOSED_FORMS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
def test_the_closed_form_is_the_measurement(backbone, method):
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, CLOSED_FORMS[method])
    assert_the_prediction_is_the_measurement(model, backbone)


@pytest.mark.parametrize("variant", ["rslora", "lora-fa"])
@pytest.mark.parametrize("row", [ORACLES[1], ORACLES[2], ORACLES[5]], ids=lambda row: f"{row[0]}-{row[1]}")
def test_no_more_than_peft_needs(row, variant):
    backbone, targets, pattern, _ = row
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    attachment = gl.attach(model, gl.LoRA(r=3, alpha=8, targets=targets, **VARIANTS[variant]))
    theirs, _ = peft_model(backbone, 3, 8, pattern, variant, torch.float32)
    for name in attachment.anatomy.head():
        theirs.get_parameter(f"base_model.model.{name}").requires_grad_(True)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, theirs)]
    assert trained[0] == trained[1]
    assert 0 < costs.saved_bytes(model, inputs) <= costs.saved_bytes(theirs, inputs)
    for ours, other in zip(costs.flops(model, inputs), costs.flops(theirs, inputs), strict=True):
        assert 0 < ours <= other


# alpha and the learning rate


@pytest.mark.parametrize(
    ("optimizer", "settings", "power"),
    [(torch.optim.SGD, {}, 2), (torch.optim.Adam, {"eps": 1e-30}, 1)],
    ids=["SGD", "Adam"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["lora", "lora-fa"])
def test_a_larger_alpha_is_a_larger_learning_rate_of_b(optimizer, settings, power, freeze):
    """alpha and B's rate trade exactly, by c^2 in SGD and by c in Adam; A's rate stays."""

    def train(alpha, rate_of_b):
        model = build("tiny-bert")
        attachment = gl.attach(model, gl.LoRA(r=3, alpha=alpha, freeze_A=freeze))
        rest = list(attachment.anatomy.head().values())
        rest += [part.delta.A for part in attachment.parts if part.delta.A.requires_grad]
        groups = [{"params": rest}]
        groups += [{"params": [part.delta.B for part in attachment.parts], "lr": rate_of_b}]
        stepper = optimizer(groups, lr=0.02, **settings)
        for _ in range(4):
            gradients(model, batch("tiny-bert"))
            stepper.step()
        return torch.stack([part.delta.delta().detach() for part in attachment.parts])

    small, large = train(2, 0.02 * 3**power), train(6, 0.02)
    assert (small - large).abs().max() < 1e-9 * small.abs().max()
    assert not torch.allclose(small, train(2, 0.02), rtol=0.1)


# beside a 16-bit base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_16_bit_base_no_32_bit_copy_of_an_input_is_kept(dtype):
    """What LoRA keeps and LoRA-FA does not are the inputs, of two bytes a number and shared by q, k and v."""
    inputs, kept = batch("tiny-bert"), []
    for freeze in (False, True):
        model = build("tiny-bert", dtype=dtype)
        attachment = gl.attach(model, gl.LoRA(r=2, targets="all", freeze_A=freeze))
        assert all(t.dtype == torch.float32 for n, t in attachment.state().items() if "guidelib" in n)
        kept.append(costs.saved_bytes(model, inputs))
    # attention's output is kept anyway; each layer's input, the network's and its activation are not
    inputs_kept = 2 * inputs["input_ids"].numel() * (32 + 32 + 64)
    # and B in 16 bits where no gradient goes on to x: the first layer's q, k and v
    assert kept[0] - kept[1] == 2 * (inputs_kept + 3 * 32 * 2)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_a_16_bit_input_costs_no_more_than_its_own_rounding(dtype, bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(48, 64, dtype=dtype)
    x = torch.randn(200, 64, generator=generator).to(dtype).requires_grad_()
    wish = torch.randn(200, 48, generator=generator)
    delta = LowRank(weight, r=4, scale=2.0)
    torch.nn.init.normal_(delta.B, std=0.1, generator=generator)
    exact = copy.deepcopy(delta).double()
    wide = x.detach().double().requires_grad_()
    results = []
    for module, given, like in ((delta, x, weight), (exact, wide, weight.double())):
        y = module.adjust(given, given.new_zeros(200, 48), like, None)
        assert y.dtype == given.dtype
        (y * wish.to(y.dtype)).sum().backward()
        assert module.A.grad.dtype == module.B.grad.dtype == module.A.dtype
        results.append((y.detach(), given.grad, module.A.grad, module.B.grad))
    for rounded, true in zip(*results, strict=True):
        assert (rounded - true).norm() < 2 ** (1 - bits) * true.norm()


REFUSED_VALUES = [
    (dict(r=0), "r must be a whole number of at least 1, got 0"),
    (dict(r=-2), "r must be a whole number of at least 1, got -2"),
    (dict(r=2.0), "r must be a whole number of at least 1, got 2.0"),
    (dict(r="8"), "r must be a whole number of at least 1, got '8'"),
    (dict(alpha=float("nan")), "alpha must be a finite number, got nan"),
    (dict(alpha=float("inf")), "alpha must be a finite number, got inf"),
    (dict(alpha="8"), "alpha must be a finite number, got '8'"),
    (dict(dropout=1), "dropout must be at least 0 and less than 1, got 1"),
    (dict(dropout=-0.1), "dropout must be at least 0 and less than 1, got -0.1"),
    (dict(targets=5), "targets must be a role or several of them, got 5"),
    (dict(targets=None), "targets must be a role or several of them, got None"),
    (dict(rank_stabilized=1), "rank_stabilized must be True or False, got 1"),
    (dict(rank_stabilized="yes"), "rank_stabilized must be True or False, got 'yes'"),
    (dict(freeze_A=None), "freeze_A must be True or False, got None"),
    (dict(freeze_A=0), "freeze_A must be True or False, got 0"),
    (dict(dropout="none"), "dropout must be at least 0 and less than 1, got 'none'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_VALUES, ids=lambda value: str(value)[:24])
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.LoRA(**arguments)
    assert message in str(error.value)


REFUSED_TARGETS = [
    ("tiny-bert", dict(r=33), ["r must be at most 32", "encoder.0.self.q", "got 33"]),
    ("tiny-llama", dict(r=17, targets="k"), ["r must be at most 16", "decoder.0.self.k", "got 17"]),
    ("tiny-bert", dict(targets="query"), ["targets: unknown 'query'", "accepted are q, k, v, o", "ffn.in"]),
    ("tiny-bert", dict(targets=("q", "FAKE")), ["targets: unknown 'FAKE'", "accepted are"]),
    ("tiny-bert", dict(targets=()), ["targets is empty", "one or more of q"]),
    ("tiny-bert", dict(targets="cross"), ["targets: 'cross' is not in this bert model", "self.q"]),
    ("tiny-bert", dict(targets=("q", "cross.v")), ["targets: 'cross.v' is not in this bert model", "self.v"]),
    ("tiny-bert", dict(targets=("q", "ffn.gate")), ["'ffn.gate' is not in this bert model", "ffn.in"]),
    ("tiny-t5v1-random", dict(targets="ffn.gate"), ["'ffn.gate' is not in this t5 model", "cross.k"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "arguments", "words"), REFUSED_TARGETS, ids=lambda value: str(value)[:32]
)
def test_impossible_places_are_refused_and_the_model_stays_as_it_was(backbone, arguments, words):
    model = build(backbone)
    first = next(model.parameters())
    first.requires_grad_(False)  # a flag that is not the default
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    children = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError) as error:
        gl.attach(model, gl.LoRA(**arguments))
    for word in words:
        assert word in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert children == [name for name, _ in model.named_modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_target_that_is_only_in_one_stack_is_found_there():
    model = build("tiny-t5-random")
    names = {part.site.name for part in gl.attach(model, gl.LoRA(targets="cross.q")).parts}
    assert names == {"decoder.0.cross.q", "decoder.1.cross.q"}
    gl.attached(model).detach()
    with pytest.raises(ValueError, match="'cross.q' is not in this t5 model"):
        gl.attach(model, gl.LoRA(targets="cross.q").on(stack="encoder"))
