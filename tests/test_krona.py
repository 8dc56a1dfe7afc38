"""KronA against PEFT's LoKr with full factors, torch.kron, the published count, and what it keeps."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from common import TWO_CLASSES, assert_the_prediction_is_the_measurement, batch, build, outputs, randomise
from transformers import AutoConfig, AutoModel

import guidelib as gl
from guidelib import costs
from guidelib.reparametrization.krona import Kronecker, TwoSided, near_square

SHAPES = [  # d_out, d_in, o1, i1: square, tall, wide, non-square factors in every combination, outer products
    (12, 12, 4, 3), (12, 12, 3, 4), (12, 20, 2, 10), (20, 12, 10, 2), (6, 35, 3, 7), (35, 6, 5, 1),
    (8, 8, 8, 1), (8, 8, 1, 8), (8, 6, 1, 1), (8, 6, 8, 6),
]  # fmt: skip


def random_factors(d_out, d_in, o1, i1, scale=1.5):
    generator = torch.Generator().manual_seed(0)
    delta = Kronecker(torch.empty(d_out, d_in, dtype=torch.float64), o1, i1, scale)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    return delta, torch.randn(2, 5, d_in, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_fast_path_is_the_kronecker_product(shape):
    delta, x = random_factors(*shape)
    product = torch.kron(delta.A, delta.B)
    assert product.shape == shape[:2] and torch.equal(delta.delta(), 1.5 * product)
    wanted = (x, delta.A, delta.B)
    fast, defined = delta(x), 1.5 * x @ product.t()
    assert fast.shape == defined.shape and (fast - defined).abs().max() < 1e-12
    weights = torch.randn(defined.shape, dtype=torch.float64)
    fast = torch.autograd.grad(fast, wanted, weights)
    for a, b in zip(fast, torch.autograd.grad(defined, wanted, weights), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_gradients_of_the_two_products():
    generator = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 3, 4, 5), (2, 4), (3, 5))
    )
    assert torch.autograd.gradcheck(TwoSided.apply, (x, a, b), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda x: TwoSided.apply(x.mT, b, a), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(TwoSided.apply, (x, a, b))


def test_the_surveys_sketch_reshapes_by_the_wrong_sides():
    """x (A (x) B) = A^T X B of a row vector has X of (A's rows, B's rows); the sketch takes the columns."""

    def sketch(x, a, b, side):
        return (a.t() @ x.reshape(a.shape[side], b.shape[side]) @ b).flatten()

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 3), (5, 4)))
    x = torch.randn(10, dtype=torch.float64, generator=generator)
    expected = x @ torch.kron(a, b)
    assert (sketch(x, a, b, side=0) - expected).abs().max() < 1e-12
    with pytest.raises(RuntimeError, match="invalid for input of size 10"):
        sketch(x, a, b, side=1)
    # ours is written for columns, y = (A (x) B) x, and so has the transposed factors
    delta = Kronecker(torch.empty(12, 10, dtype=torch.float64), 3, 2)
    with torch.no_grad():
        delta.A.copy_(a.t())
        delta.B.copy_(b.t())
        assert (delta(x) - expected).abs().max() < 1e-12


def test_ranks_multiply():
    generator = torch.Generator().manual_seed(0)
    delta, _ = random_factors(24, 30, 4, 5)
    with torch.no_grad():
        for factor, rank in ((delta.A, 2), (delta.B, 3)):
            left, right = (
                torch.randn(n, rank, dtype=torch.float64, generator=generator) for n in factor.shape
            )
            factor.copy_(left @ right.t())
        assert torch.linalg.matrix_rank(delta.delta()) == 2 * 3
    full, _ = random_factors(16, 16, 4, 4)
    assert torch.linalg.matrix_rank(full.delta()) == 16


@pytest.mark.parametrize(
    ("d_out", "d_in", "expected"),
    [(768, 768, (32, 24)), (384, 384, (24, 16)), (1024, 1024, (32, 32)), (7, 7, (7, 1)), (36, 64, (6, 8))],
)
def test_default_factors(d_out, d_in, expected):
    o1, i1 = near_square(d_out, d_in)
    assert (o1, i1) == expected
    o2, i2 = d_out // o1, d_in // i1
    for a, b in ((a, b) for a in range(1, d_out + 1) for b in range(1, d_in + 1)):
        if d_out % a == d_in % b == 0:
            numbers = a * b + (d_out // a) * (d_in // b)
            assert numbers >= o1 * i1 + o2 * i2
            if numbers == o1 * i1 + o2 * i2:
                assert min(a, b) * min(d_out // a, d_in // b) <= min(o1, i1) * min(o2, i2)


def test_the_count_of_the_paper_and_of_its_shapes():
    """T5-base, q and v: 72 modules; with the 47,616 of its norms 158,208, which is the paper's 0.07 %."""
    config = AutoConfig.for_model("t5", d_model=768, d_kv=64, num_heads=12, d_ff=3072, num_layers=12)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    attachment = gl.attach(model, gl.KronA())
    count = attachment.count()
    assert len(attachment.parts) == 72 and count.norms == 0
    assert count.trainable == count.stored == 72 * (32 * 24 + 24 * 32) == 110_592
    assert round(100 * (110_592 + 47_616) / count.total, 2) == 0.07
    attachment.detach()
    lora = gl.attach(model, gl.LoRA(r=1))
    assert lora.count().trainable == 110_592
    lora.detach()
    assert gl.attach(model, gl.KronA(shape=(24, 24))).count().trainable == 72 * (24 * 24 + 32 * 32)


LOKR = [  # backbone, targets, PEFT's pattern, how many
    ("tiny-bert", ("q", "v"), r".*\.(query|value)", 4),
    ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)", 12),
    ("tiny-llama", ("q", "v"), r".*\.(q_proj|v_proj)", 4),
    ("tiny-t5-random", "all", r".*(Attention\.[qkvo]|\.wi_0|\.wi_1|\.wo)", 36),
    ("tiny-bart", ("q", "v"), r".*\.(q_proj|v_proj)", 12),
]


def lokr_model(base, pattern, alpha=128.0):
    """PEFT's LoKr with two full factors, and its layers by the plain model's names."""
    head = ["classifier"] if hasattr(base, "classifier") else None
    config = peft.LoKrConfig(
        r=64, alpha=alpha, decompose_factor=4, target_modules=pattern, modules_to_save=head
    )
    model = peft.get_peft_model(base, config).eval()
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lokr.LoKrLayer)
    }
    return model, layers


@pytest.mark.parametrize(("backbone", "targets", "pattern", "n"), LOKR, ids=lambda value: str(value)[:20])
def test_output_gradients_and_merged_weights_are_those_of_peft(backbone, targets, pattern, n):
    model, inputs = build(backbone), batch(backbone)
    base = outputs(model, inputs)
    theirs, layers = lokr_model(build(backbone), pattern)
    attachment = gl.attach(model, gl.KronA(s=2.0, shape=(4, 4), targets=targets))  # as decompose_factor = 4
    randomise(attachment, scale=0.3)
    assert len(attachment.parts) == len(layers) == n
    names = {id(module): name for name, module in model.named_modules()}
    pairs = []
    with torch.no_grad():
        for part in attachment.parts:
            layer = layers[names[id(part.site.module)]]
            a, b = layer.lokr_w1["default"], layer.lokr_w2["default"]
            assert a.dtype == b.dtype == torch.float64
            a.copy_(part.delta.A)
            b.copy_(part.delta.B)
            pairs += [(part.delta.A, a), (part.delta.B, b)]
        for name, parameter in attachment.anatomy.head().items():
            child, rest = name.split(".", 1)
            theirs.get_parameter(f"base_model.model.{child}.modules_to_save.default.{rest}").copy_(parameter)
    ours = outputs(model, inputs)
    assert (ours - base).abs().max() > 1e-3
    assert (ours - outputs(theirs, inputs)).abs().max() <= 1e-12
    for which in (model, theirs):
        which.zero_grad()
        which(**inputs).loss.backward()
    for mine, other in pairs:
        assert mine.grad.abs().max() > 0
        assert (mine.grad - other.grad).abs().max() <= 1e-12
    attachment.merge(permanent=True)
    merged = theirs.merge_and_unload().state_dict()
    assert merged.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert (tensor - merged[name]).abs().max() <= 1e-12, name


@pytest.mark.parametrize(("backbone", "targets", "pattern", "n"), LOKR[:4], ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("length", [9, 120])
def test_no_more_than_peft_needs(backbone, targets, pattern, n, length):
    """PEFT forms the product of every weight and keeps it; at many tokens the two products' middle would be
    more than that, if it were kept."""
    inputs = batch(backbone, rows=16, length=length)
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, gl.KronA(shape=(4, 4), targets=targets))
    theirs, _ = lokr_model(build(backbone, dtype=torch.float32), pattern)
    ours, other = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, theirs))
    assert ours == other
    assert costs.saved_bytes(model, inputs) <= costs.saved_bytes(theirs, inputs)
    for mine, other in zip(costs.flops(model, inputs), costs.flops(theirs, inputs), strict=True):
        assert 0 < mine < other


METHODS = {
    "q, v": gl.KronA(),
    "all": gl.KronA(targets="all"),
    "wide first": gl.KronA(shape=(2, 16), targets="all"),
    "tall first": gl.KronA(shape=(16, 2), targets="all"),
    "last layer": gl.KronA(targets="all").on(layers=-1),
    "first layer": gl.KronA().on(layers=0),
    "beside LoRA": gl.KronA() + gl.LoRA(r=2),
    "merged": gl.KronA(targets="all"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
def test_the_prediction_is_the_measurement(backbone, name):
    model = build(backbone, dtype=torch.float32)
    attachment = gl.attach(model, METHODS[name])
    if name == "merged":
        attachment.merge()
    assert_the_prediction_is_the_measurement(model, backbone)


def test_it_keeps_the_layers_input_and_nothing_else():
    """On q, the input is there for nothing else; on v besides it costs nothing more."""

    def kept(method):
        model = build("tiny-bert", dtype=torch.float32)
        gl.attach(model, method)
        return costs.saved_bytes(model, batch("tiny-bert"))

    q = kept(gl.KronA(targets="q"))
    assert q == kept(gl.KronA())
    assert kept(gl.LoRA(r=1, targets="q")) - q == 2 * 27 * 1 * 4  # layers, tokens, r, bytes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_order_of_the_products_is_the_cheaper_one(shape):
    delta, x = random_factors(*shape)
    (o1, i1), (o2, i2) = delta.A.shape, delta.B.shape
    cost = delta.cost()
    assert cost.forward == 2 * min(i1 * i2 * o2 + o1 * i1 * o2, o1 * i1 * i2 + o1 * i2 * o2)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = delta(x)
    assert counter.get_total_flops() == 10 * cost.forward  # ten tokens
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 10 * (cost.backward + cost.backward_input)


def test_degenerate_factors():
    """A of 1 x 1 leaves a dense update; a column times a row is LoRA at rank 1."""
    dense, _ = random_factors(8, 6, 1, 1)
    assert torch.allclose(dense.delta(), 1.5 * dense.A[0, 0] * dense.B, rtol=1e-14)
    outer, x = random_factors(8, 6, 8, 1)
    assert outer.A.shape == (8, 1) and outer.B.shape == (1, 6)
    lora = gl.LoRA(r=1, alpha=1.5).build(gl.attach(build("tiny-bert"), gl.LoRA(r=1)).parts[0].site)
    lora.B, lora.A = outer.A, outer.B
    assert (outer(x) - lora(x)).abs().max() < 1e-12


def test_at_the_first_step_only_b_has_a_gradient_and_the_start_follows_the_seed():
    deltas = []
    for seed in (0, 0, 1):
        model = build("tiny-bert")
        attachment = gl.attach(model, gl.KronA(), seed=seed)
        model(**batch("tiny-bert")).loss.backward()
        deltas.append(attachment.parts[0].delta)
        assert torch.count_nonzero(deltas[-1].A.grad) == 0 < torch.count_nonzero(deltas[-1].B.grad)
    first, same, other = deltas
    assert torch.equal(first.A, same.A) and not torch.equal(first.A, other.A)
    assert torch.count_nonzero(first.B) == 0
    bound = first.A.shape[1] ** -0.5
    assert 0.8 * bound < first.A.abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_trains_in_32_bits(dtype):
    model, inputs = build("tiny-bert", dtype=dtype), batch("tiny-bert")
    attachment = gl.attach(model, gl.KronA())
    randomise(attachment)
    twin = copy.deepcopy(model).double()
    twin(**inputs).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    for part, exact in zip(attachment.parts, gl.attached(twin).parts, strict=True):
        for mine, other in zip(part.parameters(), exact.parameters(), strict=True):
            assert mine.grad.dtype == torch.float32
            assert (mine.grad - other.grad).norm() < 0.1 * other.grad.norm()  # bfloat16 holds 8 bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(s=float("nan")), "s must be a finite number, got nan"),
        (dict(s="2"), "s must be a finite number, got '2'"),
        (dict(shape=4), "shape must be None or two whole numbers of at least 1, got 4"),
        (dict(shape=(4,)), "shape must be None or two whole numbers of at least 1, got (4,)"),
        (dict(shape=(4, 0)), "shape must be None or two whole numbers of at least 1, got (4, 0)"),
        (dict(shape=(4, 2.0)), "shape must be None or two whole numbers of at least 1, got (4, 2.0)"),
        (dict(targets=5), "targets must be a role or several of them, got 5"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.KronA(**arguments)
    assert message in str(error.value)


def test_a_shape_that_does_not_divide_a_target_is_refused():
    model = build("tiny-bert")
    names = [name for name, _ in model.named_modules()]
    message = r"shape must be divisors of \(32, 32\), the shape of encoder.0.self.q, got \(32, 3\)"
    with pytest.raises(ValueError, match=message):
        gl.attach(model, gl.KronA(shape=(32, 3)))
    assert [name for name, _ in model.named_modules()] == names


def test_with_a_thousand_tokens_it_still_keeps_less_than_peft():
    ids = torch.randint(1000, 30000, (16, 64), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}
    base, _ = gl.load_backbone("minilm", TWO_CLASSES)
    config = peft.LoKrConfig(
        r=384, alpha=384, decompose_factor=16, target_modules=["query", "value"],
        modules_to_save=["classifier"],
    )  # fmt: skip
    theirs = costs.saved_bytes(peft.get_peft_model(copy.deepcopy(base), config), inputs)
    gl.attach(base, gl.KronA())
    # PEFT keeps the products of five layers; no gradient goes through those of the first
    assert costs.saved_bytes(base, inputs) == theirs - 5 * 2 * 384 * 384 * 4
