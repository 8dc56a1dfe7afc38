"""Hybrids against what they are made of, against torch.kron, AdapterHub's library and published counts."""

import re
from dataclasses import dataclass

import pytest
import torch
from common import BACKBONES, DECODERS, batch, build, outputs, randomise
from notebook_rules import ROOT
from safetensors.torch import load_file
from test_adapters import golden, golden_model, meta, theirs  # noqa: F401 (golden is a fixture)
from test_lora import ROBERTA_BASE, T5_LARGE

import guidelib as gl
from guidelib.core.method import Spec
from guidelib.core.points.prefix import PrefixPart
from guidelib.core.points.sublayer import SublayerPart
from guidelib.core.points.weight_delta import DeltaPart
from guidelib.hybrid.compacter import PHMLinear


def made(n, rank, d_in=12, d_out=8):
    torch.manual_seed(0)
    A = torch.nn.Parameter(torch.randn(n, n, n, dtype=torch.float64))
    return PHMLinear(A, d_in, d_out, rank)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_the_map_is_a_sum_of_kronecker_products(n, rank):
    """Its values and the gradients of all factors."""
    layer = made(n, rank)
    x = torch.randn(5, 3, 12, dtype=torch.float64, requires_grad=True)
    seconds = layer.B if rank is None else [S @ T for S, T in zip(layer.S, layer.T, strict=True)]
    H = sum(torch.kron(A, B) for A, B in zip(layer.A, seconds, strict=True))
    assert (layer.weight() - H).abs().max() < 1e-12
    wanted, found = x @ H + layer.bias, layer(x)
    assert (found - wanted).abs().max() < 1e-12
    inputs, weights = [x, *layer.parameters()], torch.randn_like(wanted)
    pairs = (torch.autograd.grad((y * weights).sum(), inputs) for y in (found, wanted))
    for ours, kron in zip(*pairs, strict=True):
        assert (ours - kron).abs().max() < 1e-12


def test_one_whole_product_is_a_linear_map():
    layer = made(1, None)
    linear = torch.nn.Linear(12, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.A.fill_(1)
        layer.B[0] = linear.weight.t()
        layer.bias.copy_(linear.bias)
    x = torch.randn(4, 12, dtype=torch.float64)
    assert (layer(x) - linear(x)).abs().max() < 1e-12


def test_compacter_has_one_set_of_first_factors():
    attachment = gl.attach(build("tiny-bert"), gl.Compacter(r=4))
    layers = [m for part in attachment.parts for m in part.modules() if isinstance(m, PHMLinear)]
    assert len(layers) == 8 and len({id(layer.A) for layer in layers}) == 1
    stored = [name for name in attachment.state() if name.endswith(".A")]
    assert len(stored) == 1  # and so in a file
    count = attachment.count()
    assert count.trainable == count.stored == count.changed
    free = gl.attach(build("tiny-bert"), gl.PHMAdapter(r=4))
    assert len({id(m.A) for part in free.parts for m in part.modules() if isinstance(m, PHMLinear)}) == 8


def test_two_compacters_share_nothing():
    both = gl.attach(build("tiny-bert"), gl.Compacter(r=4).on(layers=0) + gl.Compacter(r=4).on(layers=1))
    assert len([name for name in both.state() if name.endswith(".A")]) == 2


def test_shared_factors_are_shared_again_after_loading(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.Compacter(r=4))
    randomise(attachment)
    again = build("tiny-bert")
    loaded = gl.load(again, attachment.save(tmp_path / "compacter.safetensors"))
    assert torch.equal(outputs(model, inputs), outputs(again, inputs))
    assert loaded.count() == attachment.count()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"rank": 1.5}, "rank must be a whole number of at least 1, got 1.5"),
        ({"shared": 1}, "shared must be True or False, got 1"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.PHM(**arguments)


@pytest.mark.parametrize(("r", "n", "words"), [(6, 4, "of r, 6"), (5, 5, "of the width of .*, 32")])
def test_n_divides_both_widths(r, n, words):
    model = build("tiny-bert")
    with pytest.raises(ValueError, match=f"n must be a divisor {words}"):
        gl.attach(model, gl.Compacter(r=r, linear=gl.PHM(n=n)))
    assert not hasattr(model, "guidelib")


# expressions


def test_mam_is_the_sum_of_its_parts():
    inputs, found = batch("tiny-bert"), []
    for method in (gl.MAM(3, None, 4, 2.0), gl.PrefixTuning(3) + gl.ParallelAdapter(4, scale=2.0)):
        model = build("tiny-bert")
        attachment = gl.attach(model, method, seed=1)
        randomise(attachment)
        found.append((attachment.count(), outputs(model, inputs)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_mam_is_adapterhubs(golden):  # noqa: F811
    model = golden_model(golden)
    parts = gl.attach(model, gl.MAM(length=5, mlp=None, r=4)).parts
    tensors, flat = {}, "control_trans"
    for part in parts:
        if isinstance(part, PrefixPart):
            tensors.setdefault(flat, []).append(part.prefix.P)
        else:
            tensors |= {theirs(part, name): [p] for name, p in part.named_parameters()}
    assert len(tensors) == 1 + 2 * 4 and len(tensors[flat]) == 2

    def stored(kind, name):
        (key,) = (k for k in golden if k.startswith(f"mam/{kind}/") and k.endswith(name))
        t = golden[key]
        return t.view(5, 2, 2, 32).unbind(1) if name == flat else [t]

    for name, parameters in tensors.items():
        for parameter, value in zip(parameters, stored("value", name), strict=True):
            parameter.data.copy_(value)
    output = model(golden["input_ids"], golden["attention_mask"]).last_hidden_state
    assert (output - golden["mam/output"]).abs().max() < 1e-12
    (output * golden["weights"]).sum().backward()
    for name, parameters in tensors.items():
        for parameter, gradient in zip(parameters, stored("gradient", name), strict=True):
            assert (parameter.grad - gradient).abs().max() < 1e-12, name


def test_mam_has_the_papers_count():
    """6.75 % of BART-large once the MLP is gone; the paper prints 6.7."""
    count = gl.attach(meta(dict(model_type="bart")), gl.MAM(mlp=None)).count()
    assert count.stored == 27_414_528
    assert round(100 * count.stored / count.total, 2) == 6.75


def test_mam_has_the_papers_small_count():
    """0.5 % of RoBERTa-base, with the widths of the authors' script for GLUE."""
    count = gl.attach(meta(ROBERTA_BASE), gl.MAM(length=16, mlp=None, r=16, scale=2.0)).count()
    assert count.stored == 599_232 and round(100 * count.stored / count.total, 1) == 0.5


LOGGED = {  # by the survey's authors, on T5-Large: what is trained, and what is left after training
    "prefix": (gl.PrefixTuning(30), 4_423_680, 4_423_680),
    "prefix, MLP of 512": (gl.PrefixTuning(30, mlp=512), 77_311_488, 4_423_680),
    "mam": (gl.MAM(), 171_069_792, 4_423_680 + 50_405_376),
    "unipelt": (gl.UniPELT(bottleneck=64), 86_223_624, 144 * 10 * 1024 + 2_359_296 + 6_343_680 + 264 * 1025),
    # without the norms, which the paper trains
    "compacter": (gl.Compacter(r=32, sublayers=("self", "ffn"), norms=False), 304_192, 304_192),
    "compacter++": (gl.CompacterPlusPlus(r=32, norms=False), 152_128, 152_128),
}


@pytest.mark.parametrize("name", LOGGED)
def test_logged_counts_are_those_before_the_mlp_goes(name):
    method, trained, left = LOGGED[name]
    attachment = gl.attach(meta(T5_LARGE), method)
    assert attachment.count().trainable == trained
    method.finish(attachment)
    assert attachment.count().trainable == attachment.count().stored == left


def theirs_too(part, name):
    """AdapterHub's name for a parameter of UniPELT."""

    def gate(name):
        return name.replace("gating.", "gate.")

    place = part.sublayer.name if isinstance(part, SublayerPart) else part.place
    layer = f"encoder.layer.{place.split('.')[1]}"
    if isinstance(part, PrefixPart):
        start = f"{layer}.attention.self.prefix_tuning"
        flat = f"{start}.pool.prefix_tunings.one.self_prefix.control_trans"
        return flat if name == "prefix.P" else f"{start}.prefix_gates.one.{name.removeprefix('gating.')}"
    if isinstance(part, DeltaPart):
        place = {"q": "query", "v": "value"}[part.site.role.removeprefix("self.")]
        return f"{layer}.attention.self.{place}.loras.one.{gate(name).replace('delta.', 'lora_')}"
    if name.startswith("gating."):
        return f"{layer}.output.adapters.one.{gate(name)}"
    return theirs(part, name)


def test_unipelt_is_adapterhubs(golden):  # noqa: F811
    """Its gates are means over the padding as well, so no text is padded."""
    model = golden_model(golden)
    attachment = gl.attach(model, gl.UniPELT(length=5, mlp=None, bottleneck=4, r=4))
    named = [(part, name, p) for part in attachment.parts for name, p in part.named_parameters()]
    prefixes = [p for part, name, p in named if name == "prefix.P"]  # one tensor of theirs holds them all

    def stored(kind, part, name, p):
        if name != "prefix.P":
            return golden[f"unipelt/{kind}/{theirs_too(part, name)}"].reshape(p.shape)
        (key,) = (k for k in golden if k.startswith(f"unipelt/{kind}/") and k.endswith("control_trans"))
        i = next(i for i, prefix in enumerate(prefixes) if prefix is p)
        return golden[key].view(5, 2, 2, 32)[:, i]

    assert len(named) == 2 * (3 + 6 + 2 * 4)
    with torch.no_grad():
        for part, name, p in named:
            p.copy_(stored("value", part, name, p))
    output = model(golden["input_ids"]).last_hidden_state
    assert (output - golden["unipelt/output"]).abs().max() < 1e-12
    (output * golden["weights"]).sum().backward()
    for part, name, p in named:
        assert (p.grad - stored("gradient", part, name, p)).abs().max() < 1e-12, (part.name, name)


def gates_at(attachment, value):
    """Set all gates to sigmoid(value), whatever is read; 40 is 1 to the last bit, -800 is 0."""
    for part in attachment.parts:
        if part.gating is not None:
            part.gating.weight.data.zero_()
            part.gating.bias.data.fill_(value)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_open_gates_are_no_gates_and_closed_ones_leave_the_base(backbone):
    method, inputs = gl.LoRA(r=2, targets="all") + gl.PfeifferAdapter(r=3), batch(backbone)
    model = build(backbone)
    attachment = gl.attach(model, gl.Gated(method))
    randomise(attachment)
    plain, trained = build(backbone), dict(model.named_parameters())
    gl.attach(plain, method)
    for name, p in plain.named_parameters():
        p.data.copy_(trained[name])
    gates_at(attachment, 40.0)
    assert (outputs(model, inputs) - outputs(plain, inputs)).abs().max() < 1e-12
    gates_at(attachment, -800.0)
    gl.attached(plain).detach()
    for name, p in plain.named_parameters():
        p.data.copy_(trained[name])  # the head
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))


def test_a_gate_does_not_take_a_prefix_away():
    """Its keys are zero then, and so are the scores, not minus infinity."""
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    base = outputs(model, inputs)
    attachment = gl.attach(model, gl.Gated(gl.PrefixTuning(length=3)))
    gates_at(attachment, -800.0)
    closed = outputs(model, inputs)
    assert (closed - base).abs().max() > 1e-3
    for part in attachment.parts:
        if part.gating is not None:
            part.prefix.P.data.zero_()
    gates_at(attachment, 0.0)
    assert torch.equal(outputs(model, inputs), closed)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", [*DECODERS, "tiny-t5-random", "tiny-bert"])
def test_a_gated_prefix_is_its_definition(backbone, attention):
    """Token for token: the prefix of a token is multiplied by the gate of that token, or of its text."""
    model, inputs = build(backbone), batch(backbone)
    model.set_attn_implementation(attention)
    attachment = gl.attach(model, gl.Gated(gl.PrefixTuning(length=3)) + gl.PrefixTuning(length=2))
    randomise(attachment)
    whole, kept = outputs(model, inputs), {}
    part = next(p for p in attachment.parts if p.gating is not None and p.attention.role == "self")
    each = part.gating.mask is None
    assert each == (backbone in DECODERS)  # T5's first part is in its encoder
    part.gating.register_forward_hook(lambda m, args, g: kept.setdefault("g", g.detach()))
    assert torch.equal(outputs(model, inputs), whole)
    g, found = kept["g"], []
    prefix = part.prefix.P.data.clone()
    for i in range(g.shape[1] if each else len(g)):
        # all tokens, or texts, get the one's gate, by way of the prefix; that one is then as it was
        one = g[0, i] if each else g[i, 0]
        part.prefix.P.data.copy_(prefix * one)
        hook = part.gating.register_forward_hook(lambda m, args, g: torch.ones_like(g))
        states = []
        attend = part.attention.module
        inner = attend.register_forward_hook(lambda m, args, y, states=states: states.append(y[0]))
        outputs(model, inputs)
        inner.remove()
        hook.remove()
        found.append(states[0][0, i] if each else states[0][i])
    part.prefix.P.data.copy_(prefix)
    states = []
    part.attention.module.register_forward_hook(lambda m, args, y, states=states: states.append(y[0]))
    outputs(model, inputs)
    wanted = states[0][0] if each else states[0]
    assert (torch.stack(found) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (gl.FullFineTuning(), "train or rewrite nothing of the base to be gated, got FullFineTuning"),
        (gl.IA3(), "add something beside a map to be gated, got IA3: IA3_"),
        (gl.PromptTuning(length=2), "add something beside a map to be gated, got PromptTuning"),
        (gl.LST(), "add something beside a map to be gated, got LST"),
        (gl.DoRA(r=2), "add something beside a map to be gated, got DoRA"),
    ],
)
def test_what_cannot_be_gated_says_so(method, words):
    model = build("tiny-bert")
    with pytest.raises(ValueError, match=words):
        gl.attach(model, gl.Gated(method))
    assert not hasattr(model, "guidelib")


BERT_BASE = dict(model_type="bert")


def added(config, method):
    return gl.attach(meta(config), method).count().trainable


def test_unipelt_has_the_papers_counts():
    """Its Table prints 184 K, 295 K, 895 K and 1.1 M, without gates."""
    prefix, lora, adapter = gl.PrefixTuning(10), gl.LoRA(r=8), gl.PfeifferAdapter(48)
    found = [added(BERT_BASE, method) for method in (prefix, lora, adapter, prefix + adapter)]
    assert found == [184_320, 294_912, 894_528, 1_078_848]
    assert added(BERT_BASE, gl.UniPELT(mlp=None)) == sum(found[:3]) + 12 * 4 * (768 + 1)
    assert added(BERT_BASE, gl.UniPELT(mlp=None, lora=False)) == found[3] + 12 * 2 * (768 + 1)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_contributors_hybrid_works_as_it_stands(backbone, tmp_path, monkeypatch):
    page = (ROOT / "book/architecture.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(@dataclass\(frozen=True\)\nclass .*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 10
    names = {"dataclass": dataclass, "gl": gl, "__name__": __name__}
    exec(code, names)
    model, inputs = build(backbone), batch(backbone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attachment = gl.attach(model, names["Lopsided"]())
    randomise(attachment)
    model(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert attachment.count().trainable == gl.measure(model, inputs).count.trainable
    monkeypatch.setattr(gl, "Lopsided", names["Lopsided"], raising=False)
    monkeypatch.setattr(gl, "__all__", [*gl.__all__, "Lopsided"])
    again = build(backbone)
    gl.load(again, attachment.save(tmp_path / "lopsided.safetensors"))
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    attachment.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_expression_is_a_value():
    mam = gl.MAM(length=3)
    assert Spec.from_json(mam.to_json()) == mam != gl.MAM() and repr(mam).startswith("MAM(length=3, ")
    assert mam.method is mam.method and mam.on(layers=0).method == mam


def test_a_kronecker_branch_is_its_definition():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.KronARes(s=0.5, shape=(8, 4)))
    randomise(attachment)
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    for part in attachment.parts:
        module = part.module
        wanted = 0.5 * x @ torch.kron(module.product.A, module.product.B).T + module.residual * x
        assert (module(x) - wanted).abs().max() < 1e-12
    assert attachment.count().trainable - attachment.count().head == 2 * (8 * 4 + 4 * 8 + 1)
    assert outputs(model, inputs).isfinite().all()


def test_krona_res_has_impossible_arguments():
    with pytest.raises(ValueError, match="shape must be None or two whole numbers of at least 1, got 3"):
        gl.KronARes(shape=3)
    with pytest.raises(ValueError, match="residual must be True or False, got 1"):
        gl.KronARes(residual=1)
    with pytest.raises(ValueError, match=r"shape must be divisors of \(32, 32\), the shape of encoder.0.ffn"):
        gl.attach(build("tiny-bert"), gl.KronARes(shape=(5, 5)))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (gl.ReLoRA(r=2), "train or rewrite nothing of the base to be gated, got ReLoRA"),
        (gl.Gated(gl.LoRA(r=2)), "method must be one that is not gated already"),
    ],
    ids=["rewrites", "gated"],
)
def test_what_cannot_be_gated_is_refused(method, message):
    model = build("tiny-bert")
    with pytest.raises(ValueError, match=message):
        gl.attach(model, gl.Gated(method))
    assert not hasattr(model, "guidelib")


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_open_gates_on_rows_change_nothing(backbone):
    inputs, found = batch(backbone), []
    for method in (gl.FAR(), gl.Gated(gl.FAR())):
        model = build(backbone)
        attachment = gl.attach(model, method, seed=1)
        with torch.no_grad():
            torch.manual_seed(2)
            for part in attachment.parts:
                for p in (p for name, p in part.named_parameters() if "gating" not in name):
                    p.add_(0.1 * torch.randn_like(p))
                if part.gating is not None:
                    part.gating.weight.zero_()
                    part.gating.bias.fill_(40.0)
        found.append(outputs(model, inputs))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_compacter_and_checkpoints_of_transformers(tmp_path):
    """What its maps share is written once, as transformers asks for."""
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, gl.Compacter(r=4))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith(".A") for name in held) == 1


def test_experts_share_what_their_maps_share():
    model = build("tiny-bert")
    factory = gl.PHM(n=2, rank=1, shared=True)
    gl.attach(model, gl.AdaMix(r=4, experts=2, linear=factory))
    assert len({id(p) for name, p in model.named_parameters() if name.endswith(".A")}) == 1
