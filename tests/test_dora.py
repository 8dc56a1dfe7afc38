"""DoRA against Hugging Face PEFT, the published counts, and what its equation says."""

from __future__ import annotations

import peft
import pytest
import torch
from common import assert_count, assert_the_prediction_is_the_measurement, batch, build, outputs, randomise
from test_costs import house_batch, house_bert
from test_lora import BERT_BASE, LLAMA_7B, QV, gradients

import guidelib as gl

ORACLES = [  # backbone, our targets, PEFT's regular expression for the same layers
    ("tiny-bert", ("q", "v"), r".*\.(query|value)"),
    ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)"),
    ("tiny-llama", ("q", "k", "v", "ffn.in", "ffn.out"), r".*\.(q|k|v|up|down)_proj"),
    ("tiny-t5-random", ("q", "v"), r".*Attention\.(q|v)"),
    ("tiny-gpt2", ("o", "ffn"), r".*\.(c_proj|c_fc)"),
]
ids = pytest.mark.parametrize(("backbone", "targets", "pattern"), ORACLES, ids=lambda value: str(value)[:20])


def with_biases(model):
    """Untrained models have biases of zero, which would hide a bias that is scaled."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def peft_model(base, backbone, pattern, *, r, alpha, save=None):
    config = peft.LoraConfig(
        r=r, lora_alpha=alpha, target_modules=pattern, fan_in_fan_out="gpt2" in backbone, use_dora=True,
        lora_dropout=0.0, modules_to_save=save,
    )  # fmt: skip
    return peft.get_peft_model(base, config).eval()


@torch.no_grad()
def transplant(attachment, theirs):
    """Copy our tensors into PEFT's layers; returns pairs of ours and PEFT's."""
    names = {id(module): name for name, module in attachment.model.named_modules()}
    pairs = []
    for part in attachment.parts:
        layer = theirs.get_submodule(f"base_model.model.{names[id(part.site.module)]}")
        d = part.delta
        mine = d.update.A, d.update.B, d.m
        other = (layer.lora_A["default"].weight, layer.lora_B["default"].weight,
                 layer.lora_magnitude_vector["default"].weight)  # fmt: skip
        for a, b in zip(mine, other, strict=True):
            b.copy_(a)
            pairs.append((a, b))
    for name, parameter in attachment.anatomy.head().items():
        theirs.get_parameter(f"base_model.model.{name}").copy_(parameter)
    return pairs


@ids
def test_output_gradients_and_merged_weights_are_those_of_peft(backbone, targets, pattern):
    model, inputs = with_biases(build(backbone)), batch(backbone)
    base = outputs(model, inputs)
    attachment = gl.attach(model, gl.DoRA(r=3, alpha=8, targets=targets))
    randomise(attachment)
    theirs = peft_model(with_biases(build(backbone)), backbone, pattern, r=3, alpha=8)
    pairs = transplant(attachment, theirs)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trained) == len(pairs) == 3 * len(attachment.parts)

    ours = outputs(model, inputs)
    assert (ours - base).abs().max() > 1e-3
    assert (ours - outputs(theirs, inputs)).abs().max() <= 1e-12
    gradients(model, inputs)
    gradients(theirs, inputs)
    for a, b in pairs:
        assert a.grad.abs().max() > 0
        assert (a.grad - b.grad).abs().max() <= 1e-12
    attachment.merge(permanent=True)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= 1e-12, name


COUNTS = {  # where the number stands -> model, method, parameters
    "DoRA table 1: LLaMA-7B 0.84 %": (LLAMA_7B, gl.DoRA(r=32, alpha=64), 56_975_360),
    "LoRA on the same targets: 0.83 %": (LLAMA_7B, gl.LoRA(r=32, targets=gl.DoRA().targets), 56_098_816),
    "PEFT: BERT-base": (BERT_BASE, gl.DoRA(r=8, targets=QV), 313_344),
}


@pytest.mark.parametrize("source", COUNTS)
def test_published_counts(source):
    assert_count(*COUNTS[source])


def directed(backbone="tiny-bert", **arguments):
    """A moved DoRA of one weight with its layer's weight and bias."""
    attachment = gl.attach(with_biases(build(backbone)), gl.DoRA(targets="q", **arguments).on(layers=0))
    randomise(attachment)
    (part,) = attachment.parts
    return part.delta, part.site.weight.clone(), part.site.bias.clone()


def test_the_length_of_a_row_is_m_and_its_direction_is_v():
    delta, weight, bias = directed(r=4)
    new, same = delta.effective(weight, bias)
    v = weight + 4 * delta.update.B @ delta.update.A  # alpha / r = 16 / 4
    assert torch.allclose(new.norm(dim=1), delta.m.abs(), rtol=1e-12)
    cosine = torch.cosine_similarity(new, v, dim=1)
    assert torch.allclose(cosine, delta.m.sign(), rtol=1e-12)
    assert same is bias


def test_scaling_the_rows_of_v_changes_nothing():
    """V = W + s B A: each row of W and of B times its own number."""
    delta, weight, bias = directed(r=4)
    before = delta.effective(weight, bias)[0].detach()
    scale = torch.rand(len(weight), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.no_grad():
        delta.update.B.mul_(scale)
    assert (delta.effective(scale * weight, bias)[0] - before).abs().max() < 1e-12
    assert (delta.effective(weight, bias)[0] - before).abs().max() > 1e-3


def test_the_norm_is_a_constant_in_the_backward_pass():
    """With G the gradient of W': dB = s (g G) A^T, and dm = the row sums of G * V / ||V||."""
    delta, weight, bias = directed(r=4)
    g = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (delta.effective(weight, bias)[0] * g).sum().backward()
    v = (weight + 4 * delta.update.B @ delta.update.A).detach()
    norm = v.norm(dim=1, keepdim=True)
    d_b = 4 * (delta.m.detach()[:, None] / norm * g) @ delta.update.A.detach().t()
    assert (delta.update.B.grad - d_b).abs().max() < 1e-12
    assert (delta.m.grad - (g * v / norm).sum(1)).abs().max() < 1e-12


def test_with_its_length_tied_to_v_it_is_lora():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.DoRA(r=4, alpha=8, targets=QV))
    randomise(attachment)
    with torch.no_grad():
        for part in attachment.parts:
            part.delta.m.copy_(part.delta.norm(part.site.weight))
    acting, factors = outputs(model, inputs), [p.delta.update.state_dict() for p in attachment.parts]
    head = {name: p.detach().clone() for name, p in attachment.anatomy.head().items()}
    attachment.detach()
    lora = gl.attach(model, gl.LoRA(r=4, alpha=8))
    with torch.no_grad():
        for name, parameter in lora.anatomy.head().items():
            parameter.copy_(head[name])
    for part, state in zip(lora.parts, factors, strict=True):
        part.delta.load_state_dict(state)
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12


def test_dropout_drops_the_update_and_not_the_frozen_path():
    """g W x + g s B A drop(x): the mean over many draws is what the model computes without."""
    delta, weight, bias = directed(r=4, dropout=0.5)
    x = torch.randn(1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(20000, 32)
    y = x @ weight.t() + bias
    with torch.no_grad():
        plain = delta.eval().adjust(x, y, weight, bias)[0]
        torch.manual_seed(1)
        dropped = delta.train().adjust(x, y, weight, bias)
        delta.update.B.zero_()
        frozen = delta.adjust(x, y, weight, bias)
    assert dropped.std(0).max() > 1e-3 and frozen.std(0).max() < 1e-12
    assert (dropped.mean(0) - plain).abs().max() < 5 * dropped.std(0).max() / 20000**0.5


def test_a_row_of_zeros_stays_finite():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    with torch.no_grad():
        gl.anatomy.Anatomy(model).linears("q")[0].weight[3].zero_()
    before = outputs(model, inputs)
    attachment = gl.attach(model, gl.DoRA(r=4))
    assert torch.equal(outputs(model, inputs), before)
    gradients(model, inputs)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    attachment.merge()
    assert torch.equal(outputs(model, inputs), before)


def test_it_reads_the_base_weight_so_it_stands_first():
    model = build("tiny-bert")
    with pytest.raises(ValueError, match=r"DoRA must stand first at encoder\.0\.self\.q"):
        gl.attach(model, gl.LoRA() + gl.DoRA())
    assert len(gl.attach(model, gl.DoRA(targets=QV) + gl.LoRA()).parts) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(r=0), "r must be a whole number of at least 1, got 0"),
        (dict(alpha=float("nan")), "alpha must be a finite number, got nan"),
        (dict(dropout=1), "dropout must be at least 0 and less than 1, got 1"),
        (dict(targets=None), "targets must be a role or several of them, got None"),
        (dict(r=33), "r must be at most 32, the smaller side of encoder.0.self.q, got 33"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.attach(build("tiny-bert"), gl.DoRA(**arguments))
    assert message in str(error.value)


METHODS = {
    "q, v": gl.DoRA(r=4, targets=QV),
    "default": gl.DoRA(),
    "all": gl.DoRA(r=2, targets="all"),
    "last layer": gl.DoRA(r=3, targets="all").on(layers=-1),
    "first layer": gl.DoRA(r=3, targets="o").on(layers=0),
    "frozen A": gl.DoRA(r=3, targets="all", freeze_A=True),
    "sum": gl.DoRA(r=3, targets="k") + gl.LoRA(r=2, targets="k"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_is_the_measurement(method):
    for backbone in ("tiny-bert", "tiny-roberta"):
        model = build(backbone, dtype=torch.float32)
        gl.attach(model, METHODS[method])
        assert_the_prediction_is_the_measurement(model, backbone)


@ids
def test_no_more_than_peft_needs(backbone, targets, pattern):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    gl.attach(model, gl.DoRA(r=4, targets=targets))
    base = build(backbone, dtype=torch.float32)
    theirs = peft_model(
        base, backbone, pattern, r=4, alpha=16, save=["classifier"] if hasattr(base, "classifier") else None
    )
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, theirs)]
    assert counts[0] == counts[1]
    assert gl.costs.saved_bytes(model, inputs) < gl.costs.saved_bytes(theirs, inputs)
    for ours, other in zip(gl.costs.flops(model, inputs), gl.costs.flops(theirs, inputs), strict=True):
        assert 0 < ours <= other


def test_bytes_of_the_known_model():
    """0.80 of full fine-tuning's 154,419,844, where PEFT keeps 0.97: LoRA's and one number per output."""
    model, inputs = house_bert(), house_batch()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    gl.attach(model, gl.DoRA(r=8, targets=QV))
    kept = gl.costs.saved_bytes(model, inputs)
    assert kept == 104_472_708 + 12 * 4 * 384 * (16 * 64 + 2)
    assert round(kept / 154_419_844, 2) == 0.80


def test_a_16_bit_base():
    model, inputs = build("tiny-bert", dtype=torch.bfloat16), batch("tiny-bert")
    before = outputs(model, inputs)
    attachment = gl.attach(model, gl.DoRA(r=2))
    assert torch.equal(outputs(model, inputs), before)
    randomise(attachment, scale=0.02)
    assert {p.dtype for part in attachment.parts for p in part.parameters()} == {torch.float32}
    acting = outputs(model, inputs)
    assert acting.dtype == torch.bfloat16 and not torch.equal(acting, before)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 0.05 * acting.abs().max()
