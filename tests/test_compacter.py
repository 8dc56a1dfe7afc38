"""Sums of Kronecker products against torch.kron, and what is shared."""

import pytest
import torch
from common import batch, build, outputs, randomise

import guidelib as gl
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
    for ours, theirs in zip(*pairs, strict=True):
        assert (ours - theirs).abs().max() < 1e-12


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
