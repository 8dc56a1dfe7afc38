"""Layers that are no plain weight times input: a method serves them right or refuses them with their type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import MethodType

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import remove_hook_from_module
from common import METHOD_CASES, batch, build, outputs, randomise
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import guidelib as gl
from guidelib.core.anatomy import Anatomy, fault_of
from guidelib.core.points.weight_delta import DeltaPart

# stand-ins for the layers of other libraries, by their structure


def codes(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from -7 to 7 (d_out, d_in) and a scale per row, of a Linear or Conv1D."""
    weight = layer.weight.detach()
    weight = weight.t() if isinstance(layer, Conv1D) else weight
    scale = weight.abs().amax(1, keepdim=True) / 7
    return (weight / scale).round().to(torch.int8), scale


class Int8(nn.Linear):
    """As bitsandbytes' Linear8bitLt: a subclass of Linear whose weight holds 8-bit codes."""

    def __init__(self, layer: nn.Module):
        weight, scale = codes(layer)
        super().__init__(*weight.t().shape, device="meta")
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        self.register_buffer("SCB", scale)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.SCB.to(x.dtype), self.bias)


class Int4(nn.Linear):
    """As bitsandbytes' Linear4bit: two codes a byte, in a weight of another shape."""

    def __init__(self, layer: nn.Module):
        weight, scale = codes(layer)
        super().__init__(*weight.t().shape, device="meta")
        flat = (weight + 8).to(torch.uint8).flatten()
        self.weight = nn.Parameter((flat[::2] << 4 | flat[1::2]).unsqueeze(1), requires_grad=False)
        self.quant_state, self.bias = (scale,), layer.bias

    def forward(self, x):
        pairs = torch.cat((self.weight >> 4, self.weight & 15), dim=1)
        weight = pairs.view(self.out_features, self.in_features).to(x.dtype) - 8
        return F.linear(x, weight * self.quant_state[0].to(x.dtype), self.bias)


class Packed(nn.Module):
    """As the layers of GPTQ and AWQ: no Linear, and nothing called weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight, scale = codes(layer)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("qweight", weight)
        self.register_buffer("scales", scale)
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.qweight.to(x.dtype) * self.scales.to(x.dtype), self.bias)


class Idle(Int8):
    """Computes with codes, and has a floating-point weight besides that it does not use."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.register_buffer("codes", self.weight.detach().clone())
        self.weight = nn.Parameter(self.codes * self.SCB)

    def forward(self, x):
        return F.linear(x, self.codes.to(x.dtype) * self.SCB.to(x.dtype), self.bias)


class Doubled(nn.Linear):
    def __init__(self, layer: nn.Module):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return 2 * super().forward(x)


def replaced(layer: nn.Module) -> nn.Module:
    layer.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), layer)
    return layer


@torch.no_grad()  # or the masked weight could not be copied
def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def lora(layer: nn.Module) -> nn.Module:
    around = nn.Sequential(layer)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], init_lora_weights=False), around)
    return around[0].double()


def same(layer: nn.Module) -> nn.Module:
    """Plain, with its own forward put before it, as accelerate leaves a layer."""
    layer.forward = layer.forward
    return layer


COMPUTED = "a Linear whose weight is computed"
QUANTISED = {"int8": Int8, "int4": Int4, "packed": Packed}
OTHERS: dict[str, tuple[Callable, str]] = {
    "idle weight": (Idle, "test_layers.Idle"),
    "subclass": (Doubled, "test_layers.Doubled"),
    "replaced forward": (replaced, "a Linear whose forward was replaced"),
    "weight_norm": (parametrizations.weight_norm, "parametrize.ParametrizedLinear"),
    "old spectral_norm": (nn.utils.spectral_norm, COMPUTED),
    "pruned": (pruned, COMPUTED),
    "peft": (lora, "peft.tuners.lora.layer.Linear"),
}
MAKE = QUANTISED | {name: make for name, (make, _) in OTHERS.items()} | {"plain": same}


@cache
def models(kind: str, backbone: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model whose blocks have only such layers for their linear maps, and the same function with
    ordinary ones: what the layers make of the unit vectors."""
    model = build(backbone)
    swap(model, MAKE[kind])
    twin = copy.deepcopy(model.eval())
    swap(twin, ordinary)
    return model, twin


def swap(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
    layers = {site.module for site in Anatomy(model).linears()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in layers:
                setattr(parent, name, make(child))


@torch.no_grad()
def ordinary(layer: nn.Module) -> nn.Module:
    d_in = layer.nx if isinstance(layer, Conv1D) else layer.in_features
    bias = layer(torch.zeros(d_in, dtype=torch.float64))
    weight = (layer(torch.eye(d_in, dtype=torch.float64)) - bias).t()
    plain = nn.Linear(d_in, len(bias), device="meta")
    plain.weight, plain.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
    return plain


# every method on what LoRA can act beside, and one of each kind of method on the rest
PLACES = [("int8", "tiny-bert"), ("int4", "tiny-gpt2"), ("int8", "tiny-t5v1-random")]
FEW = ["full", "head", "lora", "relora", "flora-multiply", "nf4-lora", "said", "dora", "glora", "adapter"]
CASES = [(*place, name) for place in PLACES for name in METHOD_CASES]
CASES += [(kind, "tiny-bert", name) for kind in MAKE if kind not in ("int8", "int4") for name in FEW]


@pytest.mark.parametrize(("kind", "backbone", "name"), CASES)
def test_every_method_serves_it_right_or_refuses_it_with_its_type(kind, backbone, name):
    if backbone in METHOD_CASES[name].refuses:
        return
    model, twin = copy.deepcopy(models(kind, backbone))
    method, inputs = METHOD_CASES[name].method, batch(backbone)
    before, state = outputs(model, inputs), copy.deepcopy(model.state_dict())
    assert (outputs(twin, inputs) - before).abs().max() < 1e-10
    try:
        attachment = gl.attach(model, method)
    except TypeError as error:
        assert kind != "plain"
        words = "is quantised", "computes its weight", "Int", "Packed", *OTHERS.get(kind, ())[1:]
        assert any(word in str(error) for word in words)
        assert not hasattr(model, "guidelib")
    else:
        assert kind in (*QUANTISED, "plain") or not any(isinstance(p, DeltaPart) for p in attachment.parts)
        other = gl.attach(twin, method)
        randomise(attachment)
        randomise(other)
        acting = outputs(model, inputs)
        # as beside the same numbers in an ordinary layer; but it has a bias, too, that FAR would train and S4
        # counts, and a share of S4's is one of more numbers there
        biases = name.startswith(("far", "s4")) and "t5" in backbone
        if name not in ("full", "said", "did", "s4-uneven") and not biases:
            assert (acting - outputs(twin, inputs)).abs().max() < 1e-10
        if attachment.mergeable:
            assert not any(isinstance(part, DeltaPart) for part in attachment.parts) or kind == "plain"
            attachment.merge()
            assert (outputs(model, inputs) - acting).abs().max() < 1e-12
        else:
            with pytest.raises(ValueError, match="cannot be merged"):
                attachment.merge()
        attachment.detach()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("kind", QUANTISED)
def test_beside_quantised_layers_works_what_only_adds(kind):
    model, _ = models(kind, "tiny-bert")
    layer = gl.anatomy.Anatomy(model).linears("q")[0].module
    for name in ("lora", "lora-fa", "lora-sum", "adalora", "krona", "flora-add", "adapter", "head"):
        attachment = gl.attach(model, METHOD_CASES[name].method)
        model(**batch("tiny-bert")).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        assert {p.dtype for p in trained} == {torch.float64}  # that of the scales
        if name not in ("adapter", "head"):
            with pytest.raises(ValueError, match=rf"encoder.0.self.[qk] is of type .*{type(layer).__name__}"):
                attachment.merge()
        attachment.detach()
    for name in ("dora", "glora-mergeable", "flora-multiply", "relora", "qlora"):
        with pytest.raises(TypeError, match=rf"targets: encoder.0.*{type(layer).__name__}.*reads or writes"):
            gl.attach(model, METHOD_CASES[name].method)
    for name in ("full", "said") if kind != "packed" else ():  # whose codes are no parameters
        with pytest.raises(TypeError, match=r"model: .*query.weight' is quantised \(torch.u?int8\)"):
            gl.attach(model, METHOD_CASES[name].method)


def test_a_weight_that_hooks_compute_is_known_by_its_parts():
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 3))
    assert fault_of(layer).startswith("is a Linear whose weight is computed")
    assert fault_of(nn.utils.remove_weight_norm(layer)) == ""
    biased = prune.random_unstructured(nn.Linear(4, 3), "bias", 1)
    assert "computed" in fault_of(biased)


def test_what_becomes_of_a_layer_after_attaching_is_not_merged_into():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    parametrizations.spectral_norm(attachment.parts[-1].site.module)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"encoder.1.self.v is of type .*ParametrizedLinear"):
        attachment.merge()
    assert not attachment.merged
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


# accelerate, which takes the weights away between two passes


@pytest.mark.parametrize("method", [gl.LoRA(r=2), gl.FullFineTuning(), gl.Adapter(r=2), gl.HeadOnly()])
def test_an_offloaded_model_is_refused_and_taken_back_it_is_served(method):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    before = outputs(model, inputs)
    accelerate.cpu_offload(model)
    with pytest.raises(ValueError, match="accelerate offloads the weights of 'encoder.embeddings"):
        gl.attach(model, method)
    assert not hasattr(model, "guidelib") and torch.equal(outputs(model, inputs), before)
    remove_hook_from_module(model, recurse=True)
    attachment = gl.attach(model, method)
    randomise(attachment)
    acting = outputs(model, inputs)
    if attachment.mergeable:
        attachment.merge()
        assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.detach()
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("name", ["full", "lora", "qlora", "dora", "flora-multiply", "said", "adapter"])
def test_what_is_offloaded_after_attaching_loses_nothing(name, tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    before, state = outputs(model, inputs), copy.deepcopy(model.state_dict())
    attachment = gl.attach(model, METHOD_CASES[name].method)
    randomise(attachment)
    acting = outputs(model, inputs)
    accelerate.cpu_offload(model)
    calls = [attachment.merge, attachment.unmerge, attachment.detach, lambda: attachment.save(tmp_path / "a")]
    for call in calls:
        with pytest.raises(ValueError, match="take them back with accelerate.hooks.remove_hook_from_module"):
            call()
    assert list(tmp_path.iterdir()) == []
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(outputs(model, inputs), acting)
    if attachment.mergeable:
        attachment.merge()
        assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.detach()
    assert torch.equal(outputs(model, inputs), before)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_model_that_accelerate_only_spreads_over_devices_is_plain():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    layer = model.encoder.encoder.layer[0].attention.self.query
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.detach()
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook(), append=True)
    with pytest.raises(TypeError, match="forward was replaced"):  # such a hook may do anything
        gl.attach(model, gl.LoRA(r=2))
