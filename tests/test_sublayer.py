"""The attachment point at sub-layers: it finds their inputs and outputs in every architecture."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from common import BACKBONES, batch, build, outputs, randomise
from test_anatomy import CROSSING, MODELS, call, crossing, small
from torch import nn

import guidelib as gl
from guidelib.additive.adapters.bottleneck import Bottleneck
from guidelib.core.anatomy import Anatomy, Sublayer
from guidelib.core.architectures import ARCHITECTURES
from guidelib.core.points import passes
from guidelib.core.points.sublayer import SublayerHook, SublayerPart
from guidelib.core.points.weight_delta import DeltaPart
from guidelib.reparametrization.lora import LowRank


@pytest.fixture(params=MODELS, ids=lambda pair: f"{pair[0].__name__}-{pair[1]}")
def model(request):
    make, name = request.param
    return make(name)


class Probe(nn.Module):
    """Adds nothing (or a fixed number), and keeps what it read."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.value.expand_as(x)


@dataclass(frozen=True)
class Probing(SublayerHook):
    sublayers: tuple[str, ...] = ("attn", "ffn")
    point: str = "after dropout"
    read: str = "output"

    @property
    def reads(self):
        return self.read

    def build(self, sublayer):
        return Probe()


def probes(model, read, point="before dropout", names=("attn", "ffn")):
    """A plugged-in probe at every sub-layer, by name."""
    parts = {}
    for sublayer in Anatomy(model).sublayers(names):
        part = SublayerPart(Probing(point=point, read=read), sublayer, Probe())
        part.plug()
        parts[sublayer.name] = part
    return parts


def test_every_sublayer_of_every_block_is_found(model):
    found = [sublayer.name for sublayer in Anatomy(model).sublayers()]
    expected = []
    for stack, layer, _ in Anatomy(model).blocks():
        config = model.config
        reads = stack == "decoder" if config.is_encoder_decoder else getattr(config, "add_cross_attention", 0)
        roles = ("self", "cross", "ffn") if reads else ("self", "ffn")
        expected += [f"{stack}.{layer}.{role}" for role in roles]
    assert found == expected


def test_what_is_read_makes_up_the_residual_stream(model):
    """x + h is the next sub-layer's x in a pre-norm model; in a post-norm one, its norm is."""
    pre_norm = {s.name: s.pre_norm for s in Anatomy(model).sublayers()}
    x, h = (
        {name: part.module.seen for name, part in probes(model, read).items()} for read in ("input", "output")
    )
    blocks = {}
    for stack, layer, block in Anatomy(model).blocks():
        block.register_forward_hook(
            lambda module, args, output, key=f"{stack}.{layer}": blocks.update(
                {key: output[0] if isinstance(output, tuple) else output}
            )
        )
    norms = {s.name: s.norm for s in Anatomy(model).sublayers()}
    call(model)
    order = list(x)
    for name, following in zip(order, [*order[1:], None], strict=True):
        assert len(x[name]) == len(h[name]) == 1
        total = x[name][0] + h[name][0]
        total = total if pre_norm[name] else norms[name].forward(total).detach()
        block = name.rpartition(".")[0]
        inside = following is not None and following.rpartition(".")[0] == block
        after = x[following][0] if inside else blocks[block]
        assert (total - after).abs().max() < 1e-12, name
        assert h[name][0].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("make", "kind"), [*((small, kind) for kind in ARCHITECTURES), *((crossing, kind) for kind in CROSSING)]
)
def test_the_point_is_before_or_after_the_residual_dropout(make, kind):
    """With dropout at one half, half of what is read behind it is zero."""
    model = make(kind).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    before = probes(model, "output", "before dropout")
    if kind == "mbart":  # pre-norm, and its dropout is a function
        with pytest.raises(ValueError, match='out of reach in this model; use point="before dropout"'):
            probes(model, "output", "after dropout")
        return
    after = probes(model, "output", "after dropout")
    torch.manual_seed(0)
    call(model)
    for name in before:
        (a,), (b,) = before[name].module.seen, after[name].module.seen
        without = kind in ("llama", "mistral", "qwen2", "qwen3", "gemma")
        if without or (kind == "distilbert" and name.endswith("self")):
            assert torch.equal(a, b)
        else:
            a, b = a[a != 0], b[a != 0]  # earlier dropout can empty a whole token
            dropped = b == 0
            assert len(a) > 50 and 0.3 < dropped.double().mean() < 0.7
            assert (b[~dropped] - 2 * a[~dropped]).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("read", ["output", "input"])
@pytest.mark.parametrize("point", ["after dropout", "before dropout"])
def test_what_is_added_arrives_in_the_residual_sum(backbone, read, point):
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, Probing(point=point, read=read))
    shifted = {}
    for value in (0.0, 0.7):
        for part in attachment.parts:
            part.module.value.data.fill_(value)
            part.module.seen.clear()
        extra = probes(model, "output", point, ("ffn",))  # plugged in behind, so that they read the sum
        outputs(model, inputs)
        shifted[value] = {name: part.module.seen[0] for name, part in extra.items()}
        for part in extra.values():
            part.unplug()
    # what comes before differs from the second sub-layer on; the first one's own output is known exactly
    first = build(backbone)
    alone = SublayerPart(Probing(point=point, read=read), Anatomy(first).sublayers("ffn")[0], Probe(0.7))
    watch = SublayerPart(Probing(point=point), Anatomy(first).sublayers("ffn")[0], Probe())
    alone.plug()
    watch.plug()
    outputs(first, inputs)
    plain = shifted[0.0][next(iter(shifted[0.0]))]
    assert (watch.module.seen[0] - plain - 0.7).abs().max() < 1e-12
    for name in shifted[0.0]:
        assert (shifted[0.7][name] - shifted[0.0][name]).abs().max() > 0.1


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-bart"])
def test_the_norm_behind_is_the_blocks_own(backbone):
    model = build(backbone)
    parts = {
        read: next(iter(probes(model, read, "after dropout").values()))
        for read in ("input", "output", "normed")
    }
    outputs(model, batch(backbone))
    x, h, z = (parts[read].module.seen[0] for read in ("input", "output", "normed"))
    norm = parts["normed"].sublayer.norm
    assert (
        torch.nn.functional.layer_norm(x + h, (32,), norm.weight, norm.bias, norm.eps) - z
    ).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-t5-random", "tiny-gpt2"])
def test_a_pre_norm_model_reads_the_stream_before_the_norm(backbone):
    model = build(backbone)
    part = next(iter(probes(model, "input", names="ffn").values()))
    normed = []
    part.sublayer.norm.register_forward_hook(lambda module, args, output: normed.append(output))
    outputs(model, batch(backbone))
    (x,) = part.module.seen
    assert not torch.allclose(x, normed[0])
    assert torch.equal(part.sublayer.norm.forward(x), normed[0])


@pytest.mark.parametrize("role", ["q", "o", "ffn.in"])
def test_a_parallel_adapter_without_nonlinearity_beside_a_linear_map_is_lora(role):
    """With phi the identity: A = W_down, B = W_up, alpha / r = s."""
    results = []
    for kind in ("lora", "parallel"):
        model = build("tiny-bert")
        site = Anatomy(model).restrict(0).linears(role)[0]
        generator = torch.Generator().manual_seed(0)
        d_out, d_in = site.shape
        a, b = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, d_in), (d_out, 3))
        )
        if kind == "lora":
            delta = LowRank(site.weight, 3, 2.0)
            delta.A.data, delta.B.data = a, b
            part = DeltaPart(gl.LoRA(), site, delta)
        else:
            down, up = nn.Linear(d_in, 3).double(), nn.Linear(3, d_out).double()
            down.weight.data, up.weight.data = a, b
            nn.init.zeros_(down.bias)
            nn.init.zeros_(up.bias)
            _, _, block = next(Anatomy(model).blocks())
            map_alone = Sublayer("encoder", 0, role, site.module, site, None, False, None, False, block)
            module = Bottleneck(down, up, "identity", scale=2.0)
            part = SublayerPart(gl.ParallelAdapter(point="before dropout"), map_alone, module)
        base = outputs(model, batch("tiny-bert"))
        part.plug()
        results.append(outputs(model, batch("tiny-bert")))
        assert (results[-1] - base).abs().max() > 1e-3
    assert (results[0] - results[1]).abs().max() < 1e-12


def test_a_copy_made_after_a_forward_pass_that_broke_off_holds_no_activation():
    """An activation has a graph behind it, which cannot be copied."""
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.ParallelAdapter(r=4))

    def stop(module, args):
        raise KeyboardInterrupt

    handle = attachment.parts[-1].sublayer.out.module.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch("tiny-bert"))
    handle.remove()
    assert passes.notes() == {}
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, batch("tiny-bert")), outputs(model, batch("tiny-bert")))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", [gl.Adapter(r=4, norms=False), gl.ParallelAdapter(r=4)])
def test_half_precision_bases_keep_the_added_parameters_in_32_bits(backbone, method):
    model = build(backbone, dtype=torch.bfloat16)
    attachment = gl.attach(model, method)
    randomise(attachment)
    assert {p.dtype for part in attachment.parts for p in part.parameters()} == {torch.float32}
    assert outputs(model, batch(backbone)).dtype == torch.bfloat16
    model(**batch(backbone)).loss.backward()
    assert all(p.grad is not None for part in attachment.parts for p in part.parameters())


def test_autocast_is_left_to_torch():
    model = build("tiny-bert", dtype=torch.float32)
    attachment = gl.attach(model, gl.Adapter(r=4))
    randomise(attachment)
    plain = outputs(model, batch("tiny-bert"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs(model, batch("tiny-bert"))
    assert 0 < (plain - mixed.float()).abs().max() < 0.1


REFUSED = [
    (dict(sublayers="mlp"), "sublayers: unknown 'mlp'; accepted are self, cross, ffn, attn"),
    (dict(sublayers=()), "sublayers is empty; give one or more of self, cross, ffn, attn"),
    (dict(sublayers=("ffn", "cross")), "sublayers: 'cross' is not in this bert model; it has ffn, self"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_impossible_places_are_refused_and_the_model_stays_as_it_was(arguments, message):
    model = build("tiny-bert")
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError) as error:
        gl.attach(model, gl.Adapter(**arguments))
    assert str(error.value) == message
    assert flags == [p.requires_grad for p in model.parameters()] and not hasattr(model, "guidelib")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_architecture_may_leave_its_sublayers_out(monkeypatch):
    stack = replace(ARCHITECTURES["gpt2"]["decoder"], ends={})
    monkeypatch.setitem(ARCHITECTURES, "gpt2", {"decoder": stack})
    with pytest.raises(ValueError, match="'ffn' is not in this gpt2 model; it has none that are known"):
        gl.attach(build("tiny-gpt2"), gl.PfeifferAdapter())


def test_attn_means_both_attentions_and_the_restriction_is_kept():
    anatomy = Anatomy(build("tiny-t5-random"))
    assert [s.name for s in anatomy.restrict(-1).sublayers("attn")] == [
        *("encoder.1.self", "decoder.1.self", "decoder.1.cross")
    ]
    assert {s.name for s in anatomy.restrict(stack="decoder").sublayers(("ffn", "cross"))} == {
        *("decoder.0.cross", "decoder.0.ffn", "decoder.1.cross", "decoder.1.ffn")
    }
