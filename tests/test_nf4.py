"""NF4 and QLoRA: the published levels and sizes, what autograd keeps, what is alive, what merging gives."""

from __future__ import annotations

import copy
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from common import BACKBONES, TWO_CLASSES, batch, build, outputs, randomise
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

import guidelib as gl
from guidelib import costs
from guidelib.reparametrization import nf4
from guidelib.reparametrization.nf4 import NF4Part, Quantized

PUBLISHED_LEVELS = [  # QLoRA, appendix E, as 32-bit floats
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float((a - b).norm() / b.norm())


# the numbers


def test_the_levels_are_the_published_ones():
    levels = nf4.levels()
    assert (levels - torch.tensor(PUBLISHED_LEVELS, dtype=torch.float64)).abs().max() < 1e-6
    assert levels[7] == 0 and levels[0] == -1 and levels[15] == 1
    assert (levels < 0).sum() == 7 and (levels > 0).sum() == 8


def test_on_either_side_the_levels_are_equally_likely_steps_apart():
    outermost = -NormalDist().inv_cdf((1 / 32 + 1 / 30) / 2)
    probability = [NormalDist().cdf(outermost * float(level)) for level in nf4.levels()]
    steps = torch.tensor(probability).diff()
    assert torch.allclose(steps[:7], steps[0].expand(7)) and torch.allclose(steps[7:], steps[7].expand(8))
    assert steps[0] > steps[-1]


@pytest.mark.parametrize("shape", [(48, 64), (7, 13), (1,), (3, 4, 5)])
@pytest.mark.parametrize("block", [64, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_entry_goes_to_the_nearest_level_of_its_block(shape, block, dtype):
    weight = normal(*shape, dtype=dtype)
    result = Quantized(weight, block, double=False).dequantize()
    assert result.shape == weight.shape and result.dtype == dtype
    for mine, entries in zip(result.flatten().split(block), weight.flatten().split(block), strict=True):
        values = nf4.levels().to(dtype) * entries.abs().max()
        nearest = values[(entries[:, None] - values).abs().argmin(1)]
        assert (mine - nearest).abs().max() <= 2e-7 * entries.abs().max()  # the scale has 32 bits


def test_the_layout_of_the_bytes():
    quantized = Quantized(torch.tensor([-1.0, 1.0, 0.0, 0.5]), block=4, double=False)
    assert quantized.codes.tolist() == [0 << 4 | 15, 7 << 4 | 12] and quantized.codes.dtype == torch.uint8
    assert quantized.scales.tolist() == [1.0]


def test_zeros_stay_zeros():
    weight = normal(64, 64)
    weight[:, ::3] = 0
    weight[10] = 0  # a whole block
    for double in (True, False):
        result = Quantized(weight, double=double).dequantize()
        assert torch.all(result[weight == 0] == 0) and result.isfinite().all()
        assert torch.all(Quantized(torch.zeros(8, 64), double=double).dequantize() == 0)


def test_bits_per_parameter_are_those_of_the_tensors():
    weight = normal(1024, 1024)
    single, double = Quantized(weight, double=False), Quantized(weight)
    assert single.bits == 4 + 32 / 64
    assert round(double.bits, 3) == 4.127
    assert double.nbytes == 2**20 // 2 + 2**20 // 64 + 4 * (2**20 // 64 // 256) + 4
    assert double.scales.dtype == torch.int8 and single.scales.dtype == torch.float32
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in double.buffers()}
    assert sum(held.values()) == double.nbytes  # no view that keeps something larger alive


def test_the_worst_error_is_half_the_widest_gap():
    weight = normal(512, 64)
    scales = weight.abs().amax(1, keepdim=True)
    gap = float(nf4.levels().diff().max()) / 2
    error = ((Quantized(weight, double=False).dequantize() - weight).abs() / scales).max()
    assert 0.9 * gap < error <= gap + 1e-6

    double = Quantized(weight)
    error = (double.dequantize() - weight).abs()
    assert torch.all(error <= gap * scales + 0.5001 * double.steps.max())


def rounded(weight, values):
    """Blocks of 64, scaled to [-1, 1] and put on the nearest of ``values``."""
    blocks = weight.view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    values = torch.tensor(values)
    return (values[(blocks / scales).unsqueeze(-1).sub(values).abs().argmin(-1)] * scales).view_as(weight)


INT4 = [i / 7 for i in range(-7, 8)]
FP4 = [sign * value / 6 for sign in (-1, 1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def test_normal_weights_lose_least_in_nf4():
    weight = normal(1024, 256)
    mine = relative(Quantized(weight).dequantize(), weight) ** 2
    assert mine < 0.9 * relative(rounded(weight, INT4), weight) ** 2
    assert mine < 0.8 * relative(rounded(weight, FP4), weight) ** 2
    # weights that are spread evenly have no use for quantiles
    even = torch.rand(1024, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert relative(rounded(even, INT4), even) < relative(Quantized(even).dequantize(), even)


def test_pretrained_weights_lose_less_in_nf4_than_on_even_levels():
    model, _ = gl.load_backbone("minilm")
    mine, even = [], []
    for site in gl.anatomy.Anatomy(model).linears():
        mine.append(relative(Quantized(site.weight).dequantize(), site.weight) ** 2)
        even.append(relative(rounded(site.weight, INT4), site.weight) ** 2)
    assert sum(mine) < 0.95 * sum(even) and 0.05 < max(mine) ** 0.5 < 0.12


def test_double_quantisation_changes_little():
    weight = normal(1024, 256)
    double = Quantized(weight)
    single = Quantized(weight, double=False)
    assert torch.equal(double.codes, single.codes)
    assert 0 < relative(double.dequantize(), single.dequantize()) < 0.01
    errors = [relative(q.dequantize(), weight) for q in (double, single)]
    assert errors[0] < 1.01 * errors[1]


def test_whole_numbers_hold_the_scales_better_than_8_bit_floats():
    scales = normal(4096, 64).abs().amax(1)
    centred = (scales - scales.mean()).view(-1, 256)
    largest = centred.abs().amax(1, keepdim=True)
    whole = (centred / largest * 127).round() * largest / 127
    float8 = (centred / largest * 448).to(torch.float8_e4m3fn).float() * largest / 448
    assert relative(whole, centred) < 0.5 * relative(float8, centred)


def test_quantising_again_changes_nothing():
    weight = normal(256, 128, dtype=torch.float64)
    once = Quantized(weight, double=False).dequantize()
    assert torch.equal(Quantized(once, double=False).dequantize(), once)
    once = Quantized(weight)
    again = Quantized(once.dequantize())
    assert torch.equal(once.codes, again.codes)
    assert relative(again.dequantize(), once.dequantize()) < 0.005


@pytest.mark.parametrize("block", [0, -64, 63, 64.0, "64", None])
def test_an_impossible_block_is_refused(block):
    for make in (
        lambda: gl.NF4(block=block),
        lambda: gl.QLoRA(block=block),
        lambda: Quantized(normal(4), block),
    ):
        with pytest.raises(ValueError, match="block must be an even whole number from 2 to 1,048,576, got "):
            make()


def test_other_impossible_values_are_refused():
    with pytest.raises(ValueError, match="weight must be of a floating-point type, got torch.int8"):
        Quantized(torch.zeros(4, 4, dtype=torch.int8))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight must be finite, got 'NaN or infinity'"):
            Quantized(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match="double must be True or False, got 8"):
        gl.NF4(double=8)
    with pytest.raises(ValueError, match="targets must be a role or several of them, got 5"):
        gl.NF4(targets=5)
    with pytest.raises(ValueError, match="r must be a whole number of at least 1, got 0"):
        gl.QLoRA(r=0)


# one layer


@pytest.mark.parametrize("turned", [False, True])
def test_a_layers_gradients_are_those_of_its_dequantised_weight(turned):
    quantized = Quantized(normal(6, 4, dtype=torch.float64), block=8)
    weight = quantized.dequantize().t() if turned else quantized.dequantize()
    x = normal(2, 3, weight.shape[1], seed=1, dtype=torch.float64).requires_grad_()
    bias = normal(weight.shape[0], seed=2, dtype=torch.float64).requires_grad_()

    def layer(x, bias=None):
        return nf4._Linear.apply(x, bias, quantized, turned)

    for function, inputs in (
        (layer, (x, bias)),
        (layer, (x,)),
        (lambda bias: layer(x.detach(), bias), (bias,)),
    ):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, (x, bias))
    tokens = torch.func.vmap(layer, (0, None))(x.flatten(0, 1), bias)  # one at a time
    assert (tokens - layer(x, bias).flatten(0, 1)).abs().max() < 1e-12
    mine, theirs = nf4._Linear.apply(x, bias, quantized, turned), F.linear(x, weight, bias)
    assert torch.equal(mine, theirs)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, bias)) for y in (mine, theirs)), strict=True):
        assert (a - b).abs().max() < 1e-12
    frozen = nf4._Linear.apply(x.detach(), bias, quantized, turned)
    assert torch.autograd.grad(frozen.sum(), bias)[0].eq(6).all()


def test_autograd_keeps_neither_the_weight_nor_the_input():
    quantized = Quantized(normal(256, 512))
    x = normal(4, 512).requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nf4._Linear.apply(x, None, quantized, False)
        assert kept == []
        F.linear(x, quantized.dequantize())  # by itself it would
    assert [tensor.numel() for tensor in kept] == [256 * 512]


# a model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_model_computes_with_dequantised_linear_maps_and_nothing_else_differs(backbone):
    model, twin, inputs = build(backbone), build(backbone), batch(backbone)
    for layer in {site.module for site in gl.anatomy.Anatomy(twin).linears()}:
        layer.weight.data = Quantized(layer.weight).dequantize()
    state = copy.deepcopy(model.state_dict())
    attachment = gl.attach(model, gl.NF4())
    assert torch.equal(outputs(model, inputs), outputs(twin, inputs))
    assert not torch.equal(outputs(model, inputs), outputs(build(backbone), inputs))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    weights = {name for name, p in model.named_parameters() if not torch.equal(p, twin.get_parameter(name))}
    assert all(part.mergeable for part in attachment.parts)
    count = attachment.count()
    assert count.changed - count.head == sum(model.get_parameter(name).numel() for name in weights)
    assert count.stored == count.trainable == count.head  # codes are in no file

    attachment.merge()
    assert torch.equal(outputs(model, inputs), outputs(twin, inputs))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in twin.named_parameters())
    attachment.detach()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_qlora_is_the_sum_of_nf4_and_lora(backbone):
    inputs, results = batch(backbone), []
    for method in (gl.QLoRA(r=3, alpha=8), gl.NF4() + gl.LoRA(r=3, alpha=8, targets="all")):
        model = build(backbone)
        attachment = gl.attach(model, method)
        randomise(attachment)
        model(**inputs).loss.backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((outputs(model, inputs), *gradients, *attachment.state().values()))
        assert attachment.count() == gl.attach(build(backbone), gl.LoRA(r=3, targets="all")).count()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_qlora_has_the_papers_defaults_and_count():
    assert gl.QLoRA() == gl.QLoRA(r=64, alpha=16, targets="all", dropout=0.1, block=64, double=True)
    with torch.device("meta"):
        config = AutoConfig.for_model(
            "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32
        )
        model = AutoModel.from_config(config)
    attachment = gl.attach(model, gl.QLoRA())
    assert attachment.count().trainable == attachment.count().stored == 159_907_840
    codes = [p.quantized for p in attachment.parts if isinstance(p, NF4Part)]
    bits = 8 * sum(q.nbytes for q in codes) / sum(q.shape.numel() for q in codes)
    assert round(bits, 3) == 4.127


def test_a_rank_that_does_not_fit_is_refused():
    model = build("tiny-bert")
    with pytest.raises(
        ValueError, match="r must be at most 32, the smaller side of encoder.0.self.q, got 64"
    ):
        gl.attach(model, gl.QLoRA())
    assert not any("forward" in vars(module) for module in model.modules())


COSTED = {
    "all": (dict(r=2), None),
    "q, v": (dict(r=3, targets=("q", "v")), None),
    "all, last layer": (dict(r=2), -1),
    "q, v, last layer": (dict(r=2, targets=("q", "v")), -1),
}


@pytest.mark.parametrize("name", COSTED)
@pytest.mark.parametrize("padded", [True, False])
def test_bytes_and_operations_are_those_of_lora(name, padded):
    """So LoRA's closed form holds for QLoRA, too: to the byte and to the operation."""
    arguments, layers = COSTED[name]
    arguments = {"targets": "all"} | arguments
    inputs, measured = batch("tiny-bert", padded=padded, rows=5, length=17), []
    for base in (gl.NF4(), None):
        model, lora = build("tiny-bert", dtype=torch.float32), gl.LoRA(**arguments).on(layers=layers)
        gl.attach(model, lora if base is None else base + lora)
        measured.append((costs.saved_bytes(model, inputs), *costs.flops(model, inputs)))
    predicted = gl.closed_form.predict(model, inputs)
    assert measured[0] == measured[1]
    assert measured[0] == (predicted.saved_bytes, predicted.forward_flops, predicted.backward_flops)


REFUSED = [
    ("tiny-bert", gl.NF4() + gl.FullFineTuning(), "encoder.0.self.q in place"),
    ("tiny-bert", gl.NF4() + gl.ReLoRA(r=1), "ReLoRA must stand first at encoder.0.self.q"),
    ("tiny-bert", gl.NF4() + gl.NF4(), "NF4 must stand first at encoder.0.self.q"),
    ("tiny-bert", gl.LoRA() + gl.NF4(), "NF4 must stand first at encoder.0.self.q"),
    ("tiny-gpt2", gl.NF4(targets="q"), "all maps of the layer that holds decoder.0.self.q, got"),
    ("tiny-bert", gl.NF4(targets="query"), "unknown 'query'"),
]


@pytest.mark.parametrize(("backbone", "method", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_go_together_is_refused_and_the_model_stays_as_it_was(backbone, method, words):
    model, inputs = build(backbone), batch(backbone)
    before = outputs(model, inputs)
    with pytest.raises(ValueError, match=words):
        gl.attach(model, method)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(outputs(model, inputs), before) and all(p.requires_grad for p in model.parameters())


def test_a_fused_layer_may_be_quantised_whole():
    attachment = gl.attach(build("tiny-gpt2"), gl.NF4(targets=("q", "k", "v")))
    parts = attachment.parts
    assert len({id(part.quantized) for part in parts}) == 2 and len(parts) == 6
    assert isinstance(parts[0].site.module, Conv1D) and parts[0].quantized.shape == (32, 96)
    assert attachment.count().changed == 2 * 32 * 96


def test_a_forward_that_was_put_there_before_comes_back():
    model = build("tiny-bert")
    layer = gl.anatomy.Anatomy(model).linears("q")[0].module
    layer.forward = mine = layer.forward  # as accelerate leaves it
    attachment = gl.attach(model, gl.NF4())
    assert layer.forward is not mine
    attachment.detach()
    assert layer.forward is mine


def test_biases_of_quantised_layers_can_be_trained():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.NF4())
    biases = {name: p.requires_grad_() for name, p in model.named_parameters() if name.endswith("bias")}
    model(**inputs).loss.backward()
    gradients = {name: p.grad.clone() for name, p in biases.items()}
    gl.attached(model).merge()
    model.zero_grad()
    model(**inputs).loss.backward()
    for name, p in biases.items():
        assert (gradients[name] - p.grad).abs().max() < 1e-12, name


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_it_works_under_autocast_and_in_16_bits(backbone):
    inputs = batch(backbone)
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, gl.QLoRA(r=2))
    plain = outputs(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss, mixed = model(**inputs).loss, outputs(model, inputs)
    loss.backward()
    assert (mixed - plain).abs().max() < 0.05 * plain.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)

    half = build(backbone, dtype=torch.bfloat16)
    attachment = gl.attach(half, gl.QLoRA(r=2))
    assert outputs(half, inputs).dtype == torch.bfloat16
    half(**inputs).loss.backward()
    assert attachment.parts[0].quantized.dequantize().dtype == torch.bfloat16


# the memory


def alive(model):
    """Bytes of everything that the model holds, each storage once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_release_frees_the_base_weights_and_the_method_goes_on(backbone):
    model, inputs = build(backbone), batch(backbone)
    base = alive(model)
    layers = {site.module for site in gl.anatomy.Anatomy(model).linears()}
    attachment = gl.attach(model, gl.QLoRA(r=2))
    randomise(attachment)
    acting, shapes = outputs(model, inputs), {n: t.shape for n, t in model.state_dict().items()}
    codes = sum(
        {id(p.quantized): p.quantized.nbytes for p in attachment.parts if isinstance(p, NF4Part)}.values()
    )
    added = sum(p.nbytes for part in attachment.parts for p in part.parameters())
    assert alive(model) == base + codes + added
    linear = sum(layer.weight.nbytes for layer in layers)
    assert nf4.release(model) == linear
    assert alive(model) == base + codes + added - linear + 8 * len(layers)  # one NaN per layer
    assert nf4.release(model) == 0
    assert torch.equal(outputs(model, inputs), acting)
    assert {n: t.shape for n, t in model.state_dict().items()} == shapes
    assert all(layer.weight.isnan().all() for layer in layers)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, inputs), acting)
    assert attachment.count() == gl.attach(build(backbone), gl.LoRA(r=2, targets="all")).count()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()
    trained = outputs(model, inputs)
    assert not torch.equal(trained, acting)

    attachment.merge()
    merged = outputs(model, inputs)
    assert (merged - trained).abs().max() < 1e-12
    assert costs.operations(model, inputs) == costs.operations(build(backbone), inputs)
    with pytest.raises(ValueError, match="model must be unmerged"):
        nf4.release(model)
    attachment.unmerge()
    assert all(layer.weight.stride() == (0, 0) for layer in layers)
    assert torch.equal(outputs(model, inputs), trained)

    attachment.detach()
    expected = build(backbone)
    for layer in {site.module for site in gl.anatomy.Anatomy(expected).linears()}:
        layer.weight.data = Quantized(layer.weight).dequantize()
    assert all(torch.equal(t, expected.state_dict()[name]) for name, t in model.state_dict().items())
    assert alive(model) == base and torch.equal(outputs(model, inputs), outputs(expected, inputs))

    gl.attached(twin).merge(permanent=True)
    assert (outputs(twin, inputs) - acting).abs().max() < 1e-12 and alive(twin) == base


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_cast_changes_what_is_given_out_and_not_what_is_held(half, double):
    quantized = Quantized(normal(40, 48), double=double)
    before, held = quantized.dequantize(), [b.clone() for b in quantized.buffers()]
    quantized.to(half)
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(quantized.buffers(), held, strict=True)
    )
    assert torch.equal(quantized.dequantize(), before)
    given = quantized.dequantize(half)
    assert given.dtype == half and relative(given.float(), before) < 0.01
    assert quantized.to("meta").dequantize().device.type == "meta"


@pytest.mark.parametrize("end", ["detach", "merge"])
def test_a_released_model_can_be_cast(end):
    model, inputs = build("tiny-gpt2", dtype=torch.float32), batch("tiny-gpt2")
    attachment = gl.attach(model, gl.QLoRA(r=2))
    randomise(attachment)
    nf4.release(model)
    before, bytes_before = outputs(model, inputs), alive(model)
    model.to(torch.bfloat16)
    acting = outputs(model, inputs)
    assert acting.dtype == torch.bfloat16 and relative(acting.float(), before) < 0.02
    assert alive(model) < 0.8 * bytes_before  # the stand-ins got no memory
    if end == "merge":
        attachment.merge()
        assert relative(outputs(model, inputs).float(), before) < 0.02
    attachment.detach()
    assert outputs(model, inputs).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_cast_of_the_layers_alone_is_followed():
    model, inputs = build("tiny-gpt2", dtype=torch.float32), batch("tiny-gpt2")
    attachment = gl.attach(model, gl.NF4())
    before = outputs(model, inputs)
    model.transformer.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    acting = outputs(model, inputs)
    assert relative(acting.float(), before) < 0.02
    attachment.merge()
    for part in attachment.parts:  # the very numbers that the layer computed with
        if part.replaced:
            assert torch.equal(part.site.module.weight, part.quantized.dequantize(torch.bfloat16))


def test_a_released_model_saves_a_file_that_fits_the_original_base(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.QLoRA(r=2))
    nf4.release(model)
    randomise(attachment)
    path = attachment.save(tmp_path / "a.safetensors")
    fresh = build("tiny-bert")
    for p, q in zip(fresh.classifier.parameters(), model.classifier.parameters(), strict=True):
        p.data.copy_(q)
    gl.load(fresh, path)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_release_without_nf4_is_refused():
    model = build("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    with pytest.raises(ValueError, match="model must be one with NF4 or QLoRA attached"):
        nf4.release(model)


def test_putting_a_small_update_back_into_four_bits_loses_it():
    """What a merge writes keeps the update; the same in NF4 again does not, until the update is large."""
    model = gl.load_backbone("minilm", TWO_CLASSES)[0]
    attachment = gl.attach(model, gl.QLoRA(r=8).on(layers=0))
    randomise(attachment)
    quantized = next(part for part in attachment.parts if isinstance(part, NF4Part))
    site = quantized.site
    base = quantized.quantized.dequantize()
    lora = next(p for p in attachment.parts if p.place == site.name and not isinstance(p, NF4Part))
    update = lora.delta.delta().detach()
    stays = []
    for size in (0.01, 1.0):
        scaled = update * size * base.norm() / update.norm()
        assert relative(base + scaled - base, scaled) < 1e-4
        again = Quantized(base + scaled).dequantize() - base
        stays.append(float((again * scaled).sum() / scaled.square().sum()))  # the share along the update
    assert stays[0] < 0.1 and stays[1] > 0.9


def test_no_scale_is_below_zero_beside_an_outlier():
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 0.02
    weight[0] *= 280
    assert (Quantized(weight).dequantize() * weight >= 0).all()


def test_a_weight_that_is_not_finite_is_named():
    model = build("tiny-bert")
    with torch.no_grad():
        model.encoder.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model: encoder.1.ffn.out: weight must be finite"):
        gl.attach(model, gl.QLoRA(r=2))
