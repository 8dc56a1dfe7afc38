"""GLoRA against Hugging Face PEFT, its count, and the methods that it generalises."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
from common import assert_the_prediction_is_the_measurement, batch, build, outputs, randomise
from test_dora import with_biases
from test_lora import BERT_BASE, QV, T5_BASE, gradients
from transformers import AutoConfig, AutoModel

import guidelib as gl
from guidelib.reparametrization.glora import FORMS

NOTHING = dict.fromkeys("ABCDE", "none")
BERT = r".*\.(query|value)"
THEIRS = {"scalar": "constant"}  # PEFT has one form for A and B, and one for D and E
ORACLES = [  # backbone, forms of A and B, C, D and E, our targets, PEFT's regular expression
    ("tiny-bert", "lora", "lora", "scalar", QV, BERT),
    ("tiny-bert", "lora", "vector", "vector", "all", r".*\.layer\..*\.(query|key|value|dense)"),
    ("tiny-bert", "vector", "lora", "vector", QV, BERT),
    ("tiny-bert", "scalar", "vector", "none", QV, BERT),
    ("tiny-bert", "none", "none", "vector", QV, BERT),
    ("tiny-bert", "none", "lora", "none", QV, BERT),
    ("tiny-bart", "lora", "lora", "scalar", QV, r".*\.(q_proj|v_proj)"),
    ("tiny-llama", "lora", "none", "none", "all", r".*\.(q|k|v|o|gate|up|down)_proj"),
    ("tiny-t5-random", "vector", "none", "none", QV, r".*Attention\.(q|v)"),
]


def peft_model(base, ab, c, de, pattern, r, save=None):
    config = peft.GloraConfig(
        r=r, target_modules=pattern, config_A_B=THEIRS.get(ab, ab), config_C=c, config_D_E=THEIRS.get(de, de),
        modules_to_save=save,
    )  # fmt: skip
    return peft.get_peft_model(base, config).eval()


@torch.no_grad()
def transplant(attachment, theirs):
    """Copy our tensors into PEFT's layers, which call the factor of the output side d and the other one u;
    returns pairs of ours and PEFT's."""
    names = {id(module): name for name, module in attachment.model.named_modules()}
    pairs = []
    for part in attachment.parts:
        layer = theirs.get_submodule(f"base_model.model.{names[id(part.site.module)]}")
        for name, parameter in part.delta.named_parameters():
            path = getattr(layer, f"glora_{name[0]}")["default"]
            other = getattr(path, {"": "X", "_up": "Xd", "_down": "Xu"}[name[1:]])
            other.copy_(parameter.reshape(other.shape))
            pairs.append((parameter, other))
    for name, parameter in attachment.anatomy.head().items():
        theirs.get_parameter(f"base_model.model.{name}").copy_(parameter)
    return pairs


@pytest.mark.parametrize(("backbone", "ab", "c", "de", "targets", "pattern"), ORACLES)
def test_output_gradients_and_merged_weights_are_those_of_peft(backbone, ab, c, de, targets, pattern):
    model, inputs = with_biases(build(backbone)), batch(backbone)
    base = outputs(model, inputs)
    method = gl.GLoRA(r=3, A=ab, B=ab, C=c, D=de, E=de, targets=targets)
    attachment = gl.attach(model, method)
    randomise(attachment)
    theirs = peft_model(with_biases(build(backbone)), ab, c, de, pattern, 3)
    pairs = transplant(attachment, theirs)
    assert sum(p.requires_grad for p in theirs.parameters()) == len(pairs) > 0

    ours = outputs(model, inputs)
    assert (ours - base).abs().max() > 1e-3
    scale = max(1, ours.abs().max())
    assert (ours - outputs(theirs, inputs)).abs().max() <= 1e-12 * scale
    gradients(model, inputs)
    gradients(theirs, inputs)
    for a, b in pairs:
        assert a.grad.abs().max() > 0
        assert (a.grad - b.grad.reshape(a.shape)).abs().max() <= 1e-12 * max(1, b.grad.abs().max())
    attachment.merge(permanent=True)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= 1e-12, name


def test_counts():
    per_module = {"lora": 4 * (768 + 768), "vector": 768, "scalar": 1, "none": 0}
    of_c = {"lora": 4 * (768 + 1), "vector": 768, "none": 0}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**BERT_BASE))
        t5 = AutoModel.from_config(AutoConfig.for_model(**T5_BASE))

    def count(**forms):
        attachment = gl.attach(model, gl.GLoRA(**forms).on(layers=0))
        n = attachment.count().trainable
        attachment.detach()
        return n / 2

    assert count() == 15_366
    for a, c, e in itertools.product(("lora", "vector", "scalar"), FORMS["C"], FORMS["E"]):
        expected = 2 * per_module[a] + of_c[c] + 2 * per_module[e]
        assert count(A=a, B=a, C=c, D=e, E=e) == expected, (a, c, e)
    assert gl.attach(model, gl.GLoRA()).count().trainable == 368_784
    weights_only = gl.GLoRA(C="none", D="none", E="none")
    assert gl.attach(t5, weights_only).count().trainable == 884_736


def test_every_combination_starts_as_the_base_and_merges_to_what_acts():
    """All 4 x 4 x 3 x 3 x 3 - 1 of them, on one layer with a bias; values from a formula written out here."""
    d_out, d_in, r = 6, 5, 2
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((d_out, d_in), (d_out,), (3, 4, d_in))
    )
    y = x @ weight.t() + bias
    full = {"A": (d_out, d_in), "B": (d_out, d_in), "C": (d_in,), "D": (d_out,), "E": (d_out,)}
    kind = type(gl.attach(build("tiny-bert"), gl.GLoRA()).parts[0].delta)
    for forms in itertools.product(*FORMS.values()):
        named = dict(zip("ABCDE", forms, strict=True))
        if named == NOTHING:
            continue
        delta = kind(weight, r, named)
        with torch.no_grad():
            assert torch.equal(delta.adjust(x, y, weight, bias), y), named
            assert all(map(torch.equal, delta.effective(weight, bias), (weight, bias))), named
            for p in delta.parameters():
                p.normal_(generator=generator)
            dense = {}
            for name, shape in full.items():
                dense[name] = torch.zeros(shape, dtype=torch.float64)
                if named[name] == "lora":
                    up, down = getattr(delta, f"{name}_up"), getattr(delta, f"{name}_down")
                    dense[name] += torch.einsum("ir,rj->ij", up, down).reshape(shape)
                elif named[name] != "none":
                    p = getattr(delta, name)
                    dense[name] += p if len(shape) == 2 else p.flatten()
            new_weight = weight * (1 + dense["A"]) + dense["B"]
            new_bias = bias * (1 + dense["D"]) + dense["E"] + weight @ dense["C"]
            merged = delta.effective(weight, bias)
            assert (merged[0] - new_weight).abs().max() < 1e-12
            assert (merged[1] - new_bias).abs().max() < 1e-12
            acting = delta.adjust(x, y, weight, bias)
            assert (acting - (x @ new_weight.t() + new_bias)).abs().max() < 1e-12, named


def test_up_starts_at_zero_and_down_within_xaviers_bound():
    delta = gl.attach(build("tiny-bert"), gl.GLoRA(r=4, targets="ffn.out")).parts[0].delta
    for name, (fan_out, fan_in) in {"A": (4, 64), "B": (4, 64), "C": (4, 1)}.items():
        down, bound = getattr(delta, f"{name}_down"), (6 / (fan_in + fan_out)) ** 0.5
        assert 0 < down.abs().max() <= bound and torch.count_nonzero(getattr(delta, f"{name}_up")) == 0
    assert delta.A_down.abs().max() > 0.9 * (6 / 68) ** 0.5


# what it generalises


def test_with_b_alone_it_is_lora():
    model, inputs = with_biases(build("tiny-bert")), batch("tiny-bert")
    attachment = gl.attach(model, gl.GLoRA(**NOTHING | {"B": "lora"}, r=3))
    randomise(attachment)
    acting, factors = outputs(model, inputs), [(p.delta.B_down, p.delta.B_up) for p in attachment.parts]
    head = [p.detach().clone() for p in attachment.anatomy.head().values()]
    costs = gl.costs.saved_bytes(model, inputs), gl.costs.flops(model, inputs)
    attachment.detach()
    lora = gl.attach(model, gl.LoRA(r=3, alpha=3))
    with torch.no_grad():
        for parameter, value in zip(lora.anatomy.head().values(), head, strict=True):
            parameter.copy_(value)
        for part, (down, up) in zip(lora.parts, factors, strict=True):
            part.delta.A.copy_(down)
            part.delta.B.copy_(up)
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert costs[1] == gl.costs.flops(model, inputs) and costs[0] <= gl.costs.saved_bytes(model, inputs)


def test_with_a_as_a_vector_it_scales_the_outputs_and_with_d_the_bias_too():
    """(IA)^3's l = 1 + A, which scales the bias with the rest, is A and D with the same numbers."""
    model = with_biases(build("tiny-bert"))
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for d in ("none", "vector"):
        method = gl.GLoRA(**NOTHING | {"A": "vector", "D": d}, targets="k")
        attachment = gl.attach(model, method.on(layers=1))
        randomise(attachment)
        (part,) = attachment.parts
        layer, bias = part.site.module, part.site.bias
        with torch.no_grad():
            if d == "vector":
                part.delta.D.copy_(part.delta.A.squeeze(1))
            acting = layer(x)
            part.unplug()
            scale = 1 + part.delta.A.squeeze(1)
            expected = scale * layer(x) if d == "vector" else scale * (layer(x) - bias) + bias
        assert (acting - expected).abs().max() < 1e-12 < (acting - layer(x)).abs().max()
        attachment.detach()


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_with_d_and_e_it_tunes_the_bias(backbone):
    """Values and gradients: dE is the gradient of the bias itself, dD that times b."""
    model, inputs = with_biases(build(backbone)), batch(backbone)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("weight")}
    attachment = gl.attach(model, gl.GLoRA(**NOTHING | {"D": "vector", "E": "vector"}))
    randomise(attachment)
    acting = outputs(model, inputs)
    gradients(model, inputs)
    found = [(p.site, p.site.bias.clone(), p.delta.D.grad, p.delta.E.grad) for p in attachment.parts]
    head = set(attachment.anatomy.head())
    attachment.merge(permanent=True)
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert all(torch.equal(model.get_parameter(n), w) for n, w in weights.items() if n not in head)
    gradients(model, inputs)
    for site, before, d_grad, e_grad in found:
        rows = slice(None) if site.rows is None else site.rows
        gradient = site.module.bias.grad[rows]
        assert gradient.abs().max() > 0
        assert (e_grad - gradient).abs().max() < 1e-12
        assert (d_grad - gradient * before).abs().max() < 1e-12


def test_c_moves_the_bias_as_an_offset_of_every_input_would():
    """W (x + C) + b = W x + (b + W C): the support that the paper calls a prompt."""
    model = with_biases(build("tiny-bert"))
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attachment = gl.attach(model, gl.GLoRA(**NOTHING | {"C": "vector"}, targets="v").on(layers=0))
    randomise(attachment)
    (part,) = attachment.parts
    with torch.no_grad():
        acting = part.site.module(x)
        part.unplug()
        assert (acting - part.site.module(x + part.delta.C.squeeze(1))).abs().max() < 1e-12


# layers without a bias


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-t5-random"])
def test_without_a_bias_d_is_left_out_and_c_and_e_cannot_be_merged(backbone):
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.GLoRA(r=2))
    assert {name[0] for part in attachment.parts for name, _ in part.delta.named_parameters()} == set("ABCE")
    randomise(attachment)
    acting = outputs(model, inputs)
    with pytest.raises(ValueError, match="GLoRA cannot be merged: .* its layer has no bias"):
        attachment.merge()
    assert torch.equal(outputs(model, inputs), acting)
    attachment.detach()
    attachment = gl.attach(model, gl.GLoRA(r=2, C="none", E="none"))
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12


REFUSED = [
    ("tiny-bert", dict(r=0), "r must be a whole number of at least 1, got 0"),
    ("tiny-bert", dict(r=33), "r must be at most 32, the smaller side of encoder.0.self.q, got 33"),
    ("tiny-bert", dict(A="matrix"), "A must be one of lora, vector, scalar, none, got 'matrix'"),
    ("tiny-bert", dict(B=None), "B must be one of lora, vector, scalar, none, got None"),
    ("tiny-bert", dict(C="scalar"), "C must be one of lora, vector, none, got 'scalar'"),
    ("tiny-bert", dict(E="lora"), "E must be one of vector, scalar, none, got 'lora'"),
    ("tiny-bert", NOTHING, "A must be something else than none, or B, C, D or E, got 'none'"),
    ("tiny-llama", NOTHING | {"D": "vector"}, "D must be beside another support, since decoder.0.self.q has"),
    ("tiny-bert", dict(targets=5), "targets must be a role or several of them, got 5"),
]


@pytest.mark.parametrize(("backbone", "arguments", "message"), REFUSED)
def test_impossible_values_are_refused(backbone, arguments, message):
    model = build(backbone)
    with pytest.raises(ValueError) as error:
        gl.attach(model, gl.GLoRA(**arguments))
    assert message in str(error.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_rank_matters_only_where_something_has_one():
    gl.attach(build("tiny-bert"), gl.GLoRA(r=99, A="vector", B="scalar", C="vector"))


def test_it_reads_the_base_weight_so_it_stands_first():
    with pytest.raises(ValueError, match=r"GLoRA must stand first at encoder\.0\.self\.q"):
        gl.attach(build("tiny-bert"), gl.LoRA() + gl.GLoRA())


def test_each_layer_can_have_its_own_configuration():
    """What the paper's search looks for is a sum of restricted values; it is saved as any other method."""
    found = gl.GLoRA(B="none").on(layers=0) + gl.GLoRA(A="none", C="none", targets="all").on(layers=1)
    model = build("tiny-bert")
    parts = gl.attach(model, found).parts
    assert [hasattr(part.delta, "A_up") for part in parts] == [True] * 2 + [False] * 6
    assert gl.Method.from_json(found.to_json()) == found


# costs

METHODS = {
    "default": gl.GLoRA(),
    "all": gl.GLoRA(r=2, targets="all"),
    "all on the last layer": gl.GLoRA(r=2, E="vector", targets="all").on(layers=-1),
    "b, c": gl.GLoRA(**NOTHING | {"B": "lora", "C": "lora"}),
    "a vector": gl.GLoRA(A="vector", B="lora", C="vector", targets="all"),
    "a scalar": gl.GLoRA(A="scalar", B="vector", C="none", E="vector", targets=("k", "ffn.out")),
    "b scalar": gl.GLoRA(**NOTHING | {"B": "scalar"}),
    "bias": gl.GLoRA(**NOTHING | {"D": "vector", "E": "scalar"}, targets="all"),
    "last layer": gl.GLoRA(A="vector", targets="all").on(layers=-1),
    "sum": gl.GLoRA(A="vector", targets="k") + gl.LoRA(r=2, targets="k"),
    "above lora": gl.LoRA(r=3, targets="o").on(layers=0) + gl.GLoRA(C="none", targets="all").on(layers=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_prediction_is_the_measurement(method):
    for backbone in ("tiny-bert", "tiny-roberta"):
        model = build(backbone, dtype=torch.float32)
        gl.attach(model, METHODS[method])
        assert_the_prediction_is_the_measurement(model, backbone)


def pair(backbone, ab, c, de, targets, pattern):
    model, base = (build(backbone, dtype=torch.float32) for _ in range(2))
    gl.attach(model, gl.GLoRA(A=ab, B=ab, C=c, D=de, E=de, targets=targets))
    save = ["classifier"] if hasattr(base, "classifier") else None
    theirs = peft_model(base, ab, c, de, pattern, 4, save)
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, theirs)]
    assert counts[0] == counts[1]
    return model, theirs


@pytest.mark.parametrize(("backbone", "ab", "c", "de", "targets", "pattern"), ORACLES)
def test_no_more_operations_than_peft(backbone, ab, c, de, targets, pattern):
    """PEFT runs every layer twice, with W and with W'; here only a low-rank A takes a second product."""
    model, theirs = pair(backbone, ab, c, de, targets, pattern)
    inputs = batch(backbone, rows=5, length=20)
    for ours, other in zip(gl.costs.flops(model, inputs), gl.costs.flops(theirs, inputs), strict=True):
        assert (ours <= other) if ab == "lora" else (ours < 0.9 * other)


@pytest.mark.parametrize(("backbone", "ab", "c", "de", "targets", "pattern"), ORACLES)
def test_no_more_bytes_than_peft(backbone, ab, c, de, targets, pattern):
    """PEFT keeps W', d_out d_in numbers; a vector or a scalar A here W x, which is less for few tokens."""
    model, theirs = pair(backbone, ab, c, de, targets, pattern)
    short = batch(backbone, rows=2, length=5)
    assert gl.costs.saved_bytes(model, short) <= gl.costs.saved_bytes(theirs, short)
    if ab in ("lora", "none"):
        long = batch(backbone, rows=8, length=40)
        assert gl.costs.saved_bytes(model, long) <= gl.costs.saved_bytes(theirs, long)


@pytest.mark.parametrize("a", FORMS["A"])
def test_a_16_bit_base(a):
    model, inputs = build("tiny-bert", dtype=torch.bfloat16), batch("tiny-bert")
    before = outputs(model, inputs)
    attachment = gl.attach(model, gl.GLoRA(r=2, A=a))
    assert torch.equal(outputs(model, inputs), before)
    randomise(attachment, scale=0.05)
    assert {p.dtype for part in attachment.parts for p in part.parameters()} == {torch.float32}
    gradients(model, inputs)
    acting = outputs(model, inputs)
    assert acting.dtype == torch.bfloat16 and not torch.equal(acting, before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (outputs(model, inputs) - acting).abs().max() < 0.05 * acting.abs().max()
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 0.05 * acting.abs().max()
