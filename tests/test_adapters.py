"""Adapters against AdapterHub's library, the published counts, and what their equations say."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import torch
import torch.nn.functional as F
from common import batch, build, outputs, predicted_and_measured, randomise
from safetensors.torch import load_file
from test_attachment import contents, store
from test_lora import BERT_BASE, GPT3, T0_3B, T5_BASE
from test_training import QUICK, TASK, TOKENIZER
from transformers import AutoConfig, AutoModel, BertConfig, BertForTokenClassification, BertModel

import guidelib as gl
from guidelib.additive.adapters.adamix import Experts, disagreement
from guidelib.additive.adapters.linear import Linears
from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Spec
from guidelib.core.points import passes
from guidelib.core.points.sublayer import SublayerPart
from guidelib.hybrid.compacter import PHMLinear
from guidelib.materials.backbones import MeanPoolClassifier

# AdapterHub's library; tests/golden/make_adapters.py wrote the file

GOLDEN = Path(__file__).parent / "golden/adapters.safetensors"
PLAIN = gl.PfeifferAdapter(r=4)
ORIGINAL = gl.PfeifferAdapter(r=4, original_norm=True)
PRODUCTS = gl.PHM(n=2, rank=1, shared=True)
CONFIGURATIONS = {
    "houlsby": gl.Adapter(r=4, activation="silu", norms=False),
    "pfeiffer": ORIGINAL,
    "pfeiffer-plain": PLAIN,
    "parallel": gl.ParallelAdapter(r=4, scale=4.0),
    "parallel-learned": gl.ParallelAdapter(r=4, scale="learned"),
    "fusion": gl.AdapterFusion(2, ORIGINAL),
    "compacter": gl.Compacter(r=4, activation="gelu", norms=False),
    "compacter++": gl.PfeifferAdapter(r=4, activation="gelu", original_norm=True, linear=PRODUCTS),
    "compacter++-plain": gl.CompacterPlusPlus(r=4, activation="gelu", norms=False, linear=PRODUCTS),
}


@pytest.fixture(scope="module")
def golden():
    with safetensors.safe_open(GOLDEN, "pt") as file:
        assert file.metadata()["adapters"] == "1.3.0"
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def golden_model(golden):
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ids = dict(vocab_size=40, max_position_embeddings=12, type_vocab_size=1, pad_token_id=0)
    model = BertModel(BertConfig(**sizes, **ids), add_pooling_layer=False).double().eval()
    model.load_state_dict({k.removeprefix("base/"): t for k, t in golden.items() if k.startswith("base/")})
    return model


def theirs(part: SublayerPart, name: str) -> str:
    """AdapterHub's name for a parameter of ours."""
    place = {"self": "attention.output", "ffn": "output"}[part.sublayer.role]
    module, _, rest = name.removeprefix("module.").partition(".")
    start = f"encoder.layer.{part.sublayer.layer}.{place}"
    if rest == "A":
        return "shared_parameters.one.phm_rule"
    if module in "QKV":
        return f"{start}.adapter_fusion_layer.one,two.{dict(Q='query', K='key', V='value')[module]}.{rest}"
    adapter = "one"
    if module == "adapters":
        index, module, rest = rest.split(".")
        adapter = ("one", "two")[int(index)]
    names = {"down": "adapter_down.0", "up": "adapter_up", "scale": "scaling"}
    if isinstance(getattr(part.module, "down", None), PHMLinear):
        rest = {"S": "W_left", "T": "W_right", "bias": "b"}[rest]
    return f"{start}.adapters.{adapter}.{names[module]}" + (f".{rest}" if rest else "")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_output_and_gradients_are_those_of_adapterhub(golden, name):
    model = golden_model(golden)
    inputs = {key: golden[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        base = model(**inputs).last_hidden_state
    attachment = gl.attach(model, CONFIGURATIONS[name])
    seen = {f"{name}/output"}
    with torch.no_grad():
        for part in attachment.parts:
            for key, parameter in part.named_parameters():
                parameter.copy_(golden[f"{name}/value/{theirs(part, key)}"].reshape(parameter.shape))
                seen.add(f"{name}/value/{theirs(part, key)}")
    output = model(**inputs).last_hidden_state
    assert (output - base).abs().max() > 0.1
    assert (output - golden[f"{name}/output"]).abs().max() <= 1e-12
    (output * golden["weights"]).sum().backward()
    for part in attachment.parts:
        for key, parameter in part.named_parameters():
            gradient = golden.get(f"{name}/gradient/{theirs(part, key)}")
            assert (gradient is not None) == parameter.requires_grad
            if gradient is not None:
                assert (parameter.grad - gradient.reshape(parameter.shape)).abs().max() <= 1e-12, key
                seen.add(f"{name}/gradient/{theirs(part, key)}")
    assert seen == {key for key in golden if key.startswith(f"{name}/")}  # nothing of theirs is left out


# published counts

BERT_LARGE = BERT_BASE | dict(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
NORMED = gl.PfeifferAdapter(r=24, norms=True)
PUBLISHED = {  # where the number stands -> model, method, trainable, stored
    "LoRA's appendix: Adapter^H on GPT-3 7.1 M": (GPT3, gl.Adapter(r=1, norms=False), 7_078_080),
    "LoRA's appendix: Adapter^H on GPT-3 21.2 M": (GPT3, gl.Adapter(r=4, norms=False), 21_234_432),
    "Compacter table 1: Adapter on T5-base 0.832 %": (T5_BASE, gl.Adapter(r=24), 1_855_104),
    "Compacter table 1: Pfeiffer on T5-base 0.427 %": (T5_BASE, NORMED, 951_360),
    "Compacter table 1: PHM-Adapter, n=12, on T5-base 0.179 %": (
        T5_BASE,
        gl.PHMAdapter(linear=gl.PHM(n=12)),
        398_976,
    ),
    "Compacter table 1: Compacter, n=4, on T5-base 0.073 %": (T5_BASE, gl.Compacter(), 161_728),
    "Compacter table 1: Compacter++, n=4, on T5-base 0.047 %": (T5_BASE, gl.CompacterPlusPlus(), 104_704),
    "LST: Adapter on T5-base 1.63 %": (T5_BASE, gl.Adapter(r=48), 3_625_728),
    "T-Few: Adapter on T0-3B 12.9 M": (T0_3B, gl.PfeifferAdapter(r=64, norms=True), 12_934_144),
    "Houlsby: BERT-large, block norms": (BERT_LARGE, gl.Adapter(r=64).on(layers=range(24)), 6_441_984),
    "Houlsby: BERT-large, all norms": (BERT_LARGE, gl.Adapter(r=64), 6_444_032),
    "Houlsby: BERT-large, no norms": (BERT_LARGE, gl.Adapter(r=64, norms=False), 6_343_680),
    "UniPELT: BERT-base 895 K": (BERT_BASE, gl.PfeifferAdapter(), 894_528),
    "AdapterDrop: BERT-base, 5 of 12 layers bare": (BERT_BASE, gl.AdapterDrop(), 7 * 74_544),
    "AdapterFusion: BERT-base": (BERT_BASE, gl.AdapterFusion(), 21_252_096),
    "He: parallel r=512 on BART-large's 24 layers 25.2 M": (
        dict(model_type="bart"),
        gl.ParallelAdapter(),
        25_202_688,
    ),
}


def meta(config):
    with torch.device("meta"):  # sizes without weights
        return AutoModel.from_config(
            AutoConfig.for_model(**config), **NO_POOLER.get(config["model_type"], {})
        )


NO_POOLER = {"bert": {"add_pooling_layer": False}}


@pytest.mark.parametrize("source", PUBLISHED)
def test_published_counts(source):
    config, method, expected = PUBLISHED[source]
    count = gl.attach(meta(config), method).count()
    assert count.trainable == expected
    frozen = 4 * 894_528 if isinstance(method, gl.AdapterFusion) else 0
    assert count.stored == expected + frozen and count.head == 0


def test_adamix_stores_one_adapter_and_trains_more():
    """The paper's 0.9 M on BERT-base is what is stored."""
    attachment = gl.attach(meta(BERT_BASE), gl.AdaMix())
    down, up = 48 * 768 + 48, 768 * 48 + 768
    assert attachment.count().trainable == 12 * (4 * down + up)
    attachment.method.finish(attachment)
    assert attachment.count().stored == attachment.count().trainable == 894_528


@pytest.mark.parametrize(
    "method", [gl.Adapter(r=3), gl.ParallelAdapter(r=5, scale="learned"), gl.AdaMix(r=4)]
)
def test_the_file_holds_the_numbers_of_the_closed_form(method, tmp_path):
    d, depth, r = 32, 2, method.r
    attachment = gl.attach(build("tiny-bert", dtype=torch.float32), method)
    attachment.method.finish(attachment)
    path = attachment.save(tmp_path / "adapter.safetensors")
    per_adapter = 2 * d * r + r + d
    numbers = depth * len(method.sublayers) * per_adapter
    numbers += 5 * 2 * d if method.norms else 0
    numbers += depth if isinstance(method, gl.ParallelAdapter) else 0
    numbers += 2 * d + 2  # the head
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 4 * numbers


# what the equations say


def adapter_by_hand(module, x):
    inner = F.linear(x, module.down.weight, module.down.bias).relu()
    return F.linear(inner, module.up.weight, module.up.bias)


@pytest.mark.parametrize("place", ["sequential", "parallel"])
def test_the_equation_by_hand_on_a_post_norm_block(place):
    model = build("tiny-bert")
    method = PLAIN if place == "sequential" else gl.ParallelAdapter(r=4, scale=4.0)
    attachment = gl.attach(model, method.on(layers=0))
    randomise(attachment)
    seen = {}
    block = model.encoder.encoder.layer[0]
    block.attention.output.LayerNorm.register_forward_hook(lambda m, a, output: seen.update(x=output))
    block.register_forward_hook(lambda m, a, output: seen.update(y=output))
    outputs(model, batch("tiny-bert"))
    x = seen["x"]
    h = block.output.dense(F.gelu(block.intermediate.dense(x)))
    passes.take(attachment.parts[0])  # the block did not end, so that the note of its input is still there
    module = attachment.parts[0].module
    change = adapter_by_hand(module, h) if place == "sequential" else 4 * adapter_by_hand(module, x)
    assert (block.output.LayerNorm(h + change + x) - seen["y"]).abs().max() < 1e-12
    assert change.abs().max() > 0.01


def test_the_equation_by_hand_on_a_pre_norm_block():
    model = build("tiny-t5-random")
    attachment = gl.attach(model, gl.ParallelAdapter(r=4, scale=4.0).on(layers=0, stack="encoder"))
    randomise(attachment)
    seen = {}
    network = model.encoder.block[0].layer[-1]
    network.register_forward_hook(lambda m, args, output: seen.update(x=args[0], y=output))
    outputs(model, batch("tiny-t5-random"))
    x, module = seen["x"], attachment.parts[0].module
    h = network.DenseReluDense(network.layer_norm(x))
    passes.take(attachment.parts[0])
    assert (x + h + 4 * adapter_by_hand(module, x) - seen["y"]).abs().max() < 1e-12


def test_without_the_last_map_nothing_is_added():
    for backbone in ("tiny-bert", "tiny-gpt2", "tiny-bart"):
        model, inputs = build(backbone), batch(backbone)
        base = outputs(model, inputs)
        attachment = gl.attach(model, gl.Adapter(r=4, sublayers=("attn", "ffn")))
        with torch.no_grad():
            for part in attachment.parts:
                part.module.up.weight.zero_()
        assert torch.equal(outputs(model, inputs), base)


def test_pfeiffers_adapter_is_houlsbys_without_the_one_behind_attention():
    results = []
    houlsby = dict(activation="relu", sublayers="ffn", norms=False, linear=gl.Dense("bert"))
    for method in (PLAIN, gl.Adapter(r=4, **houlsby)):
        attachment = gl.attach(build("tiny-bert"), method)
        randomise(attachment)
        results.append(outputs(attachment.model, batch("tiny-bert")))
    assert torch.equal(results[0], results[1])


def test_no_adapter_stands_behind_cross_attention_unless_asked_for():
    names = [p.sublayer.name for p in gl.attach(build("tiny-t5-random"), gl.Adapter(r=2)).parts]
    assert len(names) == 8 and not any("cross" in name for name in names)


def test_houlsbys_method_trains_every_norm_or_those_of_the_chosen_blocks():
    model = build("tiny-bert")
    norms = set(Anatomy(model).norms())
    attachment = gl.attach(model, gl.Adapter(r=2))
    assert norms == {n for n, p in model.named_parameters() if p.requires_grad and "Norm" in n}
    assert attachment.count().norms == 5 * 64
    attachment.detach()
    gl.attach(model, gl.Adapter(r=2).on(layers=1))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "Norm" in n}
    assert trained == {name for name in norms if "layer.1." in name} and len(trained) == 4


def test_starts():
    d, r = 32, 40
    seeds = (0, 0, 1)
    for init, std in (("houlsby", 1e-3), ("bert", 0.02)):
        method = gl.Adapter(r=r, linear=gl.Dense(init))
        first, same, other = (gl.attach(build("tiny-bert"), method, seed=s).parts[0].module for s in seeds)
        for name in ("down", "up"):
            weight = getattr(first, name).weight
            assert torch.equal(weight, getattr(same, name).weight)
            assert not torch.equal(weight, getattr(other, name).weight)
            assert torch.count_nonzero(getattr(first, name).bias) == 0
            # cutting a normal distribution off at two standard deviations narrows it to 0.88 of one
            expected = 0.88 * std if init == "houlsby" else std
            assert abs(weight.std() - expected) < 0.06 * std
            assert (weight.abs().max() <= 2e-3) == (init == "houlsby")
    module = gl.attach(build("tiny-bert"), gl.ParallelAdapter(r=r)).parts[0].module
    assert torch.count_nonzero(module.up.weight) == torch.count_nonzero(module.up.bias) == 0
    assert 0.9 / d**0.5 < module.down.weight.abs().max() <= 1 / d**0.5


def test_the_scale_multiplies_the_whole_adapter_and_can_be_learned():
    changes = []
    for scale in (1, 3.0, "learned"):
        module = gl.attach(build("tiny-bert"), gl.ParallelAdapter(r=4, scale=scale)).parts[0].module
        with torch.no_grad():
            module.up.weight.fill_(0.5)
            module.up.bias.fill_(1.0)
        changes.append(module.eval()(torch.ones(2, 32, dtype=torch.float64)).detach())
    assert torch.allclose(3 * changes[0], changes[1], rtol=1e-12) and torch.equal(changes[0], changes[2])
    (scale,) = (p for n, p in module.named_parameters() if n == "scale")
    assert scale.shape == () and scale == 1


def test_dropout_acts_in_training_only():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.ParallelAdapter(r=16, dropout=0.5))
    randomise(attachment)
    module, x = attachment.parts[0].module, torch.randn(4, 32, dtype=torch.float64)
    assert torch.equal(module(x), module(x))
    assert torch.equal(outputs(model, inputs), outputs(model, inputs))
    model.train()
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu", "identity"])
def test_activations(activation):
    module = gl.attach(build("tiny-bert"), gl.Adapter(r=4, activation=activation)).parts[0].module
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    x = torch.randn(5, 32, dtype=torch.float64)
    z = module.down(x)
    tanh = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    expected = {
        "gelu": z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_new": tanh,
        "relu": z.clamp(min=0),
        "silu": z / (1 + torch.exp(-z)),
        "identity": z,
    }
    assert (module(x) - module.up(expected[activation])).abs().max() < 1e-12


# AdapterDrop


def deep_bert(layers=4):
    config = BertConfig(
        **dict(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64),
        **dict(vocab_size=384, num_labels=2, pad_token_id=0, initializer_range=0.1),
    )
    torch.manual_seed(0)
    return MeanPoolClassifier(config).eval()


def test_every_dropped_layer_keeps_a_layer_s_bytes_less():
    """With u = tokens * d: 8 u here, the statistics of two norms, attention's log-sum-exp, the adapter's."""
    inputs = batch("tiny-bert", padded=False)
    rows, length = inputs["input_ids"].shape
    tokens, d, r, heads = rows * length, 32, 4, 4
    u = tokens * d
    kept = []
    for n in range(4):
        model = deep_bert()
        gl.attach(model, gl.AdapterDrop(PLAIN, drop=n))
        predicted, measured = predicted_and_measured(model, inputs)
        assert predicted == measured
        kept.append(measured[0])
    # q, k, v and what attention gives, two norms; the network is two times as wide inside, not four times
    layer = (4 + 2 + 2) * u + 4 * tokens + tokens * heads
    adapter = u + tokens * r
    assert [a - b for a, b in zip(kept, kept[1:], strict=False)] == [4 * (layer + adapter)] * 3


def test_nothing_flows_below_the_first_adapter():
    model = deep_bert()
    flows = []
    for block in model.encoder.encoder.layer:
        block.register_forward_hook(lambda m, a, output: flows.append(output.requires_grad))
    gl.attach(model, gl.AdapterDrop(gl.Adapter(r=4), drop=2))
    model(**batch("tiny-bert"))
    assert flows == [False, False, True, True]


def test_adapterdrop_is_an_expression_of_on():
    results = []
    for method in (gl.AdapterDrop(PLAIN, drop=1), PLAIN.on(layers=range(1, 4))):
        attachment = gl.attach(deep_bert(), method)
        results.append((outputs(attachment.model, batch("tiny-bert")), attachment.state().keys()))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    seq2seq = gl.attach(build("tiny-t5-random"), gl.AdapterDrop(PLAIN, drop=1))
    assert [p.sublayer.name for p in seq2seq.parts] == ["encoder.1.ffn", "decoder.1.ffn"]
    only = gl.attach(build("tiny-t5-random"), gl.AdapterDrop(PLAIN, drop=1).on(stack="decoder"))
    assert [p.sublayer.name for p in only.parts] == ["decoder.1.ffn"]


@pytest.mark.parametrize(
    ("method", "places"),
    [
        (gl.LoRA(r=2, targets="cross.q"), ["decoder.1.cross.q"]),  # there in one stack alone
        (gl.LoRA(r=2, targets="self.q").on(stack="encoder"), ["encoder.1.self.q"]),
        (gl.LoRA(r=2, targets="self.q").on(layers=-1), ["encoder.1.self.q", "decoder.1.self.q"]),
        (gl.IntrinsicSAID(d=100), ["IntrinsicSAID"]),  # one subspace, not one for each stack
    ],
    ids=lambda value: str(value)[:40],
)
def test_both_stacks_are_dropped_from_at_once(method, places):
    attachment = gl.attach(build("tiny-bart"), gl.AdapterDrop(method, drop=1))
    assert [part.place for part in attachment.parts] == places


def test_only_adapters_can_be_left_out_at_random():
    for method in (gl.LoRA(r=2), PLAIN + gl.LoRA(r=2), gl.AdapterDrop(PLAIN, 1, random=True)):
        with pytest.raises(ValueError, match="random must be False for .*, which adds more than adapters"):
            gl.attach(build("tiny-bert"), gl.AdapterDrop(method, 1, random=True))


def test_at_random_each_pass_in_training_leaves_the_first_few_out():
    model, inputs = deep_bert(), batch("tiny-bert")
    attachment = gl.attach(model, gl.AdapterDrop(PLAIN, drop=3, random=True))
    adapters = [part for part in attachment.parts if isinstance(part, SublayerPart)]
    assert len(adapters) == 4
    acting = []
    for part in adapters:
        part.module.register_forward_hook(lambda m, a, o, n=part.sublayer.layer: acting.append(n))
    model.train()
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        acting.clear()
        model(**inputs).loss.backward()
        assert acting == list(range(acting[0], 4))
        seen.add(acting[0])
    assert seen == {0, 1, 2, 3}
    acting.clear()
    outputs(model.eval(), inputs)
    assert acting == [0, 1, 2, 3]
    for part in adapters[:2]:
        part.unplug()
    acting.clear()
    outputs(model, inputs)
    assert acting == [2, 3]
    attachment.detach()


def test_at_random_a_block_that_is_computed_again_leaves_out_what_its_pass_left_out():
    """Also where another pass, with another draw, came in between."""
    model, inputs = deep_bert(), batch("tiny-bert")
    attachment = gl.attach(model, gl.AdapterDrop(PLAIN, drop=3, random=True))
    randomise(attachment)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(0)
        sum(model(**inputs).loss for _ in range(4)).backward()
        gradients.append([p.grad for part in attachment.parts for p in part.parameters()])
        gl.checkpointing(model)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


def test_the_weights_of_a_fusion_are_those_of_its_own_pass():
    attachment = gl.attach(build("tiny-bert"), gl.AdapterFusion(2, PLAIN))
    randomise(attachment)
    method, inputs = attachment.method, [batch("tiny-bert", length=n) for n in (5, 7, 9, 11)]
    alone = [method.weights(attachment, x) for x in inputs]
    with ThreadPoolExecutor(len(inputs)) as pool:
        for _ in range(5):
            for seen, expected in zip(
                pool.map(lambda x: method.weights(attachment, x), inputs), alone, strict=True
            ):
                assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


# AdaMix


def losses(method, **arguments):
    model = build("tiny-bert", dtype=torch.float32)
    attachment = gl.attach(model, method)
    fitted = gl.fit(model, TASK, TOKENIZER, **QUICK | arguments)
    return fitted.losses, attachment


def test_one_expert_is_the_plain_adapter_in_training_and_after():
    mixed, one = losses(gl.AdaMix(r=4, experts=1))
    plain, adapter = losses(gl.Adapter(r=4, sublayers="ffn", norms=False))
    assert mixed == plain
    ours, theirs = ([*a.state().values()] for a in (one, adapter))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_equal_experts_agree_and_are_one_adapter():
    torch.manual_seed(0)
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.AdaMix(r=4, experts=3, shared="none"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    result = model(**inputs)
    assert attachment.method.batch_loss(attachment, inputs, result) == 0
    trained = copy.deepcopy(model)
    gl.attached(trained).method.finish(gl.attached(trained))
    assert (trained(**inputs).logits - result.logits).abs().max() < 1e-12


def unlike(experts=3, **arguments):
    attachment = gl.attach(build("tiny-bert"), gl.AdaMix(r=4, experts=experts, **arguments))
    randomise(attachment)
    return attachment


@pytest.mark.parametrize(
    ("shared", "sizes"), [("up", (3, 1)), ("down", (1, 3)), ("none", (3, 3))], ids=lambda v: str(v)
)
def test_experts_are_drawn_one_by_one_and_per_layer(shared, sizes):
    attachment = unlike(shared=shared)
    model = attachment.model.train()
    drawn = []
    for part in attachment.parts:
        assert (len(part.module.down), len(part.module.up)) == sizes
        for side in ("down", "up"):
            for i, expert in enumerate(getattr(part.module, side)):
                key = (part.sublayer.layer, side)
                expert.register_forward_hook(lambda m, a, o, key=key, i=i: drawn.append((key, i)))
    torch.manual_seed(0)
    passes = set()
    for _ in range(60):
        drawn.clear()
        outputs(model, batch("tiny-bert"))
        assert [key for key, _ in drawn] == [(n, side) for n in (0, 1) for side in ("down", "up")]
        passes.add(tuple(i for _, i in drawn))
    free = sum(size == 3 for size in sizes) * 2  # draws per pass
    assert len(passes) > (3**free) / 2


def test_evaluation_uses_the_mean_of_the_weights_which_finish_then_keeps():
    attachment = unlike(shared="none")
    model, inputs = attachment.model, batch("tiny-bert")
    averaged = outputs(model, inputs)
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = attachment.parts[0].module
    down, up = (
        [torch.stack([getattr(e, name) for e in side]).mean(0) for name in ("weight", "bias")]
        for side in (module.down, module.up)
    )
    expected = F.linear(F.gelu(F.linear(x, *down)), *up)
    assert (module(x) - expected).abs().max() < 1e-12
    # averaging what the experts compute is something else: phi is not linear
    each = [u(F.gelu(d(x))) for d in module.down for u in module.up]
    assert (torch.stack(each).mean(0) - expected).abs().max() > 1e-3
    attachment.method.finish(attachment)
    assert (outputs(model, inputs) - averaged).abs().max() < 1e-12
    assert all(len(m) == 1 for part in attachment.parts for m in part.modules() if isinstance(m, Experts))
    attachment.method.finish(attachment)  # a second time changes nothing
    assert (outputs(model, inputs) - averaged).abs().max() < 1e-12


def test_one_adapter_is_stored_after_training_and_loads(tmp_path):
    values, attachment = losses(gl.AdaMix(r=4, experts=3))
    model = attachment.model
    plain = gl.attach(build("tiny-bert"), gl.Adapter(r=4, sublayers="ffn", norms=False)).count()
    assert attachment.count().stored == plain.stored
    path = attachment.save(tmp_path / "adamix.safetensors")
    fresh = build("tiny-bert", dtype=torch.float32)
    loaded = gl.load(fresh, path)
    assert torch.equal(outputs(fresh, batch("tiny-bert")), outputs(model, batch("tiny-bert")))
    assert loaded.method == attachment.method and loaded.count() == attachment.count()


def test_the_consistency_enters_the_loss_and_costs_a_second_pass():
    calls = []
    results = {}
    for weight in (0, 1.0, 50.0):
        model = build("tiny-bert", dtype=torch.float32)
        attachment = gl.attach(model, gl.AdaMix(r=4, experts=3, consistency=weight))
        randomise(attachment)
        model.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        results[weight] = gl.fit(model, TASK, TOKENIZER, **QUICK | dict(epochs=0.25)).losses[0]
        assert len(calls) == (2 if weight == 0 else 3)  # one of them looks again after the last step
    assert results[0] < results[1.0] < results[50.0]
    assert results[50.0] - results[0] == pytest.approx(50 * (results[1.0] - results[0]), rel=1e-3)


def test_each_term_of_the_disagreement_trains_one_pass():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    value = disagreement(a, b).mean()
    p, q = a.softmax(-1), b.softmax(-1)
    expected = ((p - q) * (p.log() - q.log())).sum(-1).mean() / 2
    assert abs(value - expected) < 1e-12
    value.backward()
    # the gradient of KL(p || q) with respect to the logits of q is q - p
    assert (a.grad - (p - q).detach() / 12).abs().max() < 1e-12
    assert (b.grad - (q - p).detach() / 12).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", ["tiny-gpt2", "tiny-t5-random"])
def test_the_disagreement_is_over_the_tokens_that_have_labels(backbone):
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.AdaMix(r=4, experts=3))
    randomise(attachment, 0.5)
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][0, 2:] = -100
    model.train()
    torch.manual_seed(1)
    first = model(**inputs)
    state = torch.get_rng_state()
    value = attachment.method.batch_loss(attachment, inputs, first)
    torch.set_rng_state(state)
    second = model(**inputs)
    shift = 1 if backbone == "tiny-gpt2" else 0
    terms = []
    for row, labels in enumerate(inputs["labels"].tolist()):
        for t, label in enumerate(labels):
            if label != -100 and t >= shift:
                p, q = (r.logits[row, t - shift].softmax(-1) for r in (first, second))
                terms.append(((p - q) * (p.log() - q.log())).sum() / 2)
    assert abs(value - sum(terms) / len(terms)) < 1e-12 and value > 0


# AdapterFusion


@pytest.fixture
def trained(tmp_path):
    """The files of two adapters with unlike weights and heads, and the method that they hold."""
    paths = []
    for seed in (1, 2):
        attachment = gl.attach(build("tiny-bert"), PLAIN, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in attachment.model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
        paths.append(str(attachment.save(tmp_path / f"{seed}.safetensors")))
    return paths


def test_fusion_holds_the_trained_adapters_and_trains_only_how_they_mix(trained):
    model = build("tiny-bert")
    head = {name: p.clone() for name, p in Anatomy(model).head().items()}
    attachment = gl.attach(model, gl.AdapterFusion(trained, PLAIN))
    d, r = 32, 4
    assert attachment.count().trainable == 2 * (3 * d * d + 2 * d) + attachment.count().head
    assert attachment.count().stored == attachment.count().trainable + 2 * 2 * (2 * d * r + r + d)
    for i, path in enumerate(trained):
        tensors = load_file(path)
        for part in attachment.parts:
            start = f"guidelib.PfeifferAdapter_encoder_{part.sublayer.layer}_ffn.module."
            for name, p in part.module.adapters[i].named_parameters():
                assert torch.equal(p, tensors[start + name]) and not p.requires_grad
    assert all(torch.equal(p, head[name]) for name, p in Anatomy(model).head().items())


def test_fusion_starts_at_the_mean_of_the_adapters_when_they_score_alike(trained):
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.AdapterFusion(trained, PLAIN))
    module = attachment.parts[0].module
    with torch.no_grad():
        module.Q.weight.zero_()
    h = torch.randn(3, 5, 32, dtype=torch.float64)
    each = torch.stack([adapter(h) for adapter in module.adapters])
    assert (module(h) - each.mean(0)).abs().max() < 1e-4 * each.abs().max()  # V is not quite the identity
    weights = module.weights(h, each.movedim(0, -2))
    assert weights.shape == (3, 5, 2) and torch.allclose(weights.sum(-1), torch.ones(()).double())


def test_the_equation_of_fusion_by_hand(trained):
    attachment = gl.attach(build("tiny-bert"), gl.AdapterFusion(trained, PLAIN))
    randomise(attachment, 0.5)
    module = attachment.parts[1].module
    h = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    added = [adapter(h) for adapter in module.adapters]
    query = module.Q.weight @ h + module.Q.bias
    scores = torch.stack([query @ (module.K.weight @ a + module.K.bias) for a in added])
    p = scores.exp() / scores.exp().sum()
    expected = sum(p[n] * module.V.weight @ a for n, a in enumerate(added))
    assert (module(h) - expected).abs().max() < 1e-12


def test_the_shares_of_a_pass_explain_its_output(trained):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.AdapterFusion(trained, PLAIN))
    randomise(attachment, 0.5)
    before = outputs(model, inputs)
    layers = attachment.method.weights(attachment, inputs)
    assert [tuple(p.shape) for p in layers] == [(*inputs["input_ids"].shape, 2)] * 2
    assert all(torch.allclose(p.sum(-1), torch.ones(()).double()) for p in layers)
    assert not torch.allclose(layers[0], layers[1])

    def replace(module, args, output, p):  # by the mixture of these shares
        added = torch.stack([adapter(*args) for adapter in module.adapters], -1)
        return module.V((added * p.unsqueeze(-2)).sum(-1))

    for part, p in zip(attachment.parts, layers, strict=True):
        part.module.register_forward_hook(lambda m, args, output, p=p: replace(m, args, output, p))
    assert torch.allclose(outputs(model, inputs), before, rtol=0, atol=1e-12)
    with pytest.raises(ValueError):
        attachment.method.weights(attachment, {})
    assert all(len(part.module._forward_hooks) == 1 for part in attachment.parts)  # that of this test


def test_a_saved_fusion_needs_its_sources_no_more(trained, tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.AdapterFusion(trained, PLAIN))
    randomise(attachment)
    path = attachment.save(tmp_path / "fusion.safetensors")
    for source in trained:
        Path(source).unlink()
    fresh = build("tiny-bert")
    gl.load(fresh, path)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_v_is_pulled_towards_the_identity():
    attachment = gl.attach(build("tiny-bert"), gl.AdapterFusion(2, PLAIN, regularization=0.5))

    def pull():
        return float(attachment.method.regularizer(attachment).detach())

    assert pull() == pytest.approx(0.5 * 2 * 32 * 31 * 1e-12)
    with torch.no_grad():
        attachment.parts[0].module.V.weight[0, 0] = 3.0
    assert pull() == pytest.approx(0.5 * 4, abs=1e-6)
    assert gl.AdapterFusion(2, PLAIN, regularization=0).regularizer(attachment) is None


def test_fusion_in_training(trained):
    values, attachment = losses(gl.AdapterFusion(2, PLAIN), epochs=0.5)
    assert len(values) == 2
    for part in attachment.parts:
        assert all(p.grad is None for p in part.module.adapters.parameters())


def damage(path, kind):
    tensors, metadata = contents(path)
    name = next(name for name in tensors if name.endswith("down.weight"))
    if kind == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:2].contiguous()
    store(tensors, path, metadata)


@pytest.mark.parametrize("kind", ["gone", "other method", "other backbone", "missing", "misshapen"])
def test_files_that_do_not_fit_are_refused_and_the_model_stays_as_it_was(trained, kind, tmp_path):
    method, words, error_type = gl.AdapterFusion(trained, PLAIN), "", ValueError
    model = build("tiny-bert")
    if kind == "gone":
        Path(trained[1]).unlink()
        error_type, words = FileNotFoundError, "there is no file"
    elif kind == "other method":
        method, words = gl.AdapterFusion(trained, gl.PfeifferAdapter(r=5)), "PfeifferAdapter(r=5"
    elif kind == "other backbone":
        model, words = build("tiny-bert", seed=7), "belongs to another backbone"
    else:
        damage(trained[1], kind)
        words = "does not fit"
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error_type) as error:
        gl.attach(model, method)
    assert words in str(error.value)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "guidelib") and all(p.requires_grad for p in model.parameters())


# values

REFUSED = [
    (gl.Adapter, dict(r=0), "r must be a whole number of at least 1, got 0"),
    (gl.Adapter, dict(r=2.5), "r must be a whole number of at least 1, got 2.5"),
    (
        gl.Adapter,
        dict(activation="swish"),
        "activation must be one of gelu, gelu_new, relu, silu, identity, ",
    ),
    (gl.Adapter, dict(activation=None), "activation must be one of gelu"),
    (gl.Adapter, dict(dropout=1.0), "dropout must be at least 0 and less than 1, got 1.0"),
    (gl.Adapter, dict(norms="all"), "norms must be True or False, got 'all'"),
    (gl.Adapter, dict(point="after"), "point must be one of after dropout, before dropout, got 'after'"),
    (gl.Adapter, dict(linear="dense"), "linear must be a value such as Dense(), got 'dense'"),
    (gl.Adapter, dict(sublayers=3), "sublayers must be a name or several of them, got 3"),
    (gl.Dense, dict(init="zero"), "init must be one of houlsby, bert, zero up, got 'zero'"),
    (gl.PfeifferAdapter, dict(original_norm=1), "original_norm must be True or False, got 1"),
    (gl.ParallelAdapter, dict(scale="auto"), "scale must be a finite number or \"learned\", got 'auto'"),
    (gl.ParallelAdapter, dict(scale=float("nan")), "scale must be a finite number"),
    (gl.AdaMix, dict(experts=0), "experts must be a whole number of at least 1, got 0"),
    (gl.AdaMix, dict(shared="both"), "shared must be one of up, down, none, got 'both'"),
    (gl.AdaMix, dict(consistency=-1), "consistency must be a number of at least 0, got -1"),
    (gl.AdapterDrop, dict(drop=-1), "drop must be a whole number of at least 0, got -1"),
    (gl.AdapterDrop, dict(method="adapter"), "method must be a method such as LoRA(), got"),
    (gl.AdapterDrop, dict(random=1), "random must be True or False, got 1"),
    (gl.AdapterFusion, dict(adapters=1), "adapters must be the paths of two or more adapters, or a whole "),
    (gl.AdapterFusion, dict(adapters=("a",)), "adapters must be the paths of two or more adapters"),
    (gl.AdapterFusion, dict(adapters="a"), "adapters must be the paths of two or more adapters"),
    (
        gl.AdapterFusion,
        dict(adapter=gl.PfeifferAdapter(norms=True)),
        "adapter must be a PfeifferAdapter that",
    ),
    (gl.AdapterFusion, dict(adapter=gl.Adapter()), "adapter must be a PfeifferAdapter that leaves"),
    (gl.AdapterFusion, dict(regularization=-1), "regularization must be a number of at least 0, got -1"),
]


@pytest.mark.parametrize(("kind", "arguments", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_impossible_values_are_refused(kind, arguments, message):
    with pytest.raises(ValueError) as error:
        kind(**arguments)
    assert message in str(error.value)


def test_dropping_all_layers_is_refused():
    with pytest.raises(ValueError, match="drop must be less than 2, the number of layers, got 2"):
        gl.attach(build("tiny-bert"), gl.AdapterDrop(PLAIN, drop=2))


class OneForAll(Linears):
    """All adapters share both maps."""

    def pairs(self, sublayers, r):
        return [gl.Dense().pair(sublayers[0], r)] * len(sublayers)


def test_another_factory_makes_the_same_adapters_of_shared_maps():
    attachment = gl.attach(build("tiny-bert"), gl.Adapter(r=4, norms=False, linear=OneForAll()))
    assert len(attachment.parts) == 4
    assert len({id(part.module.down) for part in attachment.parts}) == 1
    count = attachment.count()
    assert count.trainable == count.stored == 2 * 32 * 4 + 4 + 32 + count.head
    attachment.model(**batch("tiny-bert")).loss.backward()
    assert attachment.parts[0].module.down.weight.grad.abs().max() > 0


def test_what_the_maps_are_made_of_goes_into_the_file():
    method = gl.Adapter(linear=gl.Dense("bert"))
    assert Spec.from_json(json.loads(json.dumps(method.to_json()))) == method != gl.Adapter()


@pytest.mark.parametrize("place", [0, 3])
def test_two_passes_agree_where_an_encoder_has_a_label(place):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    config = model.config
    config.num_labels = 3
    tagger = BertForTokenClassification(config).double().eval()
    attachment = gl.attach(tagger, gl.AdaMix(r=4))
    randomise(attachment)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, place] = 1
    inputs = {"input_ids": inputs["input_ids"], "labels": labels}
    torch.manual_seed(0)
    first = tagger(**inputs)
    found = attachment.method.batch_loss(attachment, inputs, first)
    torch.manual_seed(0)
    tagger(**inputs)
    second = tagger(**inputs)
    pairs = zip(first.logits[:, place], second.logits[:, place], strict=True)
    wanted = torch.stack([disagreement(a, b) for a, b in pairs]).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=1e-12)
