"""Hybrids against what they are made of, against torch.kron, AdapterHub's library and published counts."""

import pytest
import torch
from common import batch, build, outputs, randomise
from test_adapters import golden, golden_model, meta, theirs  # noqa: F401 (golden is a fixture)

import guidelib as gl
from guidelib.core.method import Spec
from guidelib.core.points.context import PrefixPart
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
