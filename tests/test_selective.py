"""BitFit, norm tuning, and cross-attention tuning: what they choose, by type and role and by no name."""

from __future__ import annotations

import copy

import pytest
import torch
from common import BACKBONES, ENCODERS, SEQ2SEQ, batch, build, outputs, randomise
from peft import LNTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen2Config, T5Config
from transformers.pytorch_utils import Conv1D

import guidelib as gl

T5_BASE = T5Config(d_model=768, num_heads=12, num_layers=12, d_ff=3072)
T0_3B = T5Config(
    d_model=2048, d_kv=64, num_heads=32, num_layers=24, d_ff=5120, feed_forward_proj="gated-gelu"
)
SUBSET = gl.BitFit(only=("q", "ffn.in"))


@pytest.mark.parametrize(
    ("config", "method", "expected"),
    [
        (BertConfig(), gl.BitFit(), 102_912),
        (BertConfig(), SUBSET, 46_080),
        # Compacter's biases of linear maps and norms in the blocks; `on` leaves out the two norms behind them
        (T5_BASE, gl.BitFit(add=True).on(layers=range(12)), 248_832),
        (T5_BASE, gl.BitFit(add=True), 248_832 + 2 * 768),
        (T0_3B, gl.BitFit(add=True), 1_429_504),
        (T0_3B, gl.BitFit(only="ffn.out", add=True), 1_429_504 - 1_331_200),  # which T-Few's count lacks
        (BertConfig(), gl.NormTuning(), 38_400),
        (GPT2Config(), gl.NormTuning(), 38_400),
        (T5_BASE, gl.NormTuning(), 47_616),
        (T0_3B, gl.NormTuning(), 249_856),
        (T5_BASE, gl.CrossAttentionTuning(norms=False), 28_311_552),
        (T5_BASE, gl.CrossAttentionTuning(), 28_311_552 + 12 * 768),
        (T5_BASE, gl.CrossAttentionTuning("attn", norms=False), 3 * 28_311_552),
    ],
)
def test_published_counts(config, method, expected):
    count = gl.count(config, method)
    assert count.trainable == count.stored == count.changed == expected


def chosen(method, backbone):
    """The names of what is trained besides the task head."""
    attachment = gl.attach(build(backbone), method)
    head = attachment.anatomy.head()
    return {n for n, p in attachment.model.named_parameters() if p.requires_grad and n not in head}


@pytest.mark.parametrize(
    "backbone", ["tiny-bert", "tiny-roberta", "tiny-distilbert", "tiny-gpt2", "tiny-bart"]
)
def test_bitfit_trains_each_bias_of_a_linear_map_or_norm(backbone):
    kinds = (nn.Linear, Conv1D, nn.LayerNorm)
    base = build(backbone)
    start, modules = f"{base.base_model_prefix}.", base.base_model.named_modules()
    expected = {n for n, m in modules if isinstance(m, kinds) and m.bias is not None}
    assert chosen(gl.BitFit(), backbone) == {f"{start}{name}.bias" for name in expected}
    assert len(expected) > 10


def test_the_table_of_positions_is_no_bias_and_no_projection():
    for method in (gl.BitFit(add=True), gl.CrossAttentionTuning("attn"), gl.NormTuning()):
        assert not any("relative_attention_bias" in name for name in chosen(method, "tiny-t5-random"))


def test_the_subset_leaves_the_other_output_named_alike_alone():
    """Both end in output.dense: the attention's and the feed-forward network's."""
    names = chosen(gl.BitFit(only="ffn.out"), "tiny-bert")
    assert len(names) == 2 and not any("attention" in name for name in names)


def test_a_fused_bias_is_trained_as_a_whole_or_not_at_all():
    names = chosen(gl.BitFit(only=("k", "v", "q")), "tiny-gpt2")
    assert names == {f"transformer.h.{i}.attn.c_attn.bias" for i in (0, 1)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_key_s_bias_has_no_gradient_unless_keys_are_turned_afterwards(backbone):
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, gl.BitFit(add=True))
    randomise(attachment)
    model(**inputs).loss.backward()
    added = {part._module[0]: part.b for part in attachment.parts}
    sizes = {role: [] for role in "qkv"}
    for site in attachment.anatomy.linears("attn"):
        role = site.role.split(".")[1]
        if role != "o":
            bias = added.get(site.module, getattr(site.module, "bias", None))
            gradient = bias.grad if site.rows is None else bias.grad[site.rows]
            sizes[role].append(float(gradient.abs().max()))
    assert min(*sizes["q"], *sizes["v"]) > 1e-7
    assert max(sizes["k"]) < 1e-14 if backbone != "tiny-llama" else min(sizes["k"]) > 1e-7


def test_added_biases_are_those_of_a_model_that_has_them():
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    size |= dict(num_key_value_heads=2, vocab_size=300)
    theirs = LlamaForCausalLM(LlamaConfig(**size, attention_bias=True, mlp_bias=True)).double().eval()
    ours = LlamaForCausalLM(LlamaConfig(**size)).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    attachment = gl.attach(ours, gl.BitFit(only="all", add=True))
    randomise(attachment)
    names = {module: name for name, module in ours.named_modules()}
    pairs = [(part.b, theirs.get_submodule(names[part._module[0]]).bias) for part in attachment.parts]
    assert len(pairs) == 2 * 7 == sum(name.endswith("bias") for name, _ in theirs.named_parameters())
    for mine, its in pairs:
        its.data.copy_(mine.data)
    losses = [model(**batch("tiny-llama")).loss for model in (ours, theirs)]
    sum(losses).backward()
    assert (losses[0] - losses[1]).abs() < 1e-12
    assert all((mine.grad - its.grad).abs().max() < 1e-12 for mine, its in pairs)
    assert not attachment.mergeable


def test_what_has_a_bias_keeps_its_own():
    """Qwen2 has biases at queries, keys and values alone."""
    size = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    config = Qwen2Config(**size, num_key_value_heads=2, vocab_size=300)
    assert gl.count(config, gl.BitFit()).trainable == 16 + 2 * 8
    with pytest.raises(ValueError, match="BitFit: o have no biases in this qwen2 model"):
        gl.count(config, gl.BitFit(only="o"))
    added = 16 + 2 * 24 + 16 + 3 * 16  # o, up and gate, down, three norms
    assert gl.count(config, gl.BitFit(add=True)).trainable == 16 + 2 * 8 + added


@pytest.mark.parametrize(
    ("backbone", "targets"),
    [("tiny-bert", ["LayerNorm"]), ("tiny-gpt2", None), ("tiny-llama", None), ("tiny-t5-random", None)],
)
def test_norm_tuning_is_pefts(backbone, targets):
    model, inputs = build(backbone), batch(backbone)
    peft = get_peft_model(copy.deepcopy(model), LNTuningConfig(target_modules=targets))
    attachment = gl.attach(model, gl.NormTuning())
    theirs = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in attachment.anatomy.norms().items() if p.requires_grad}
    assert sum(p.numel() for p in theirs.values()) == sum(p.numel() for p in mine.values())
    for each in (model, peft):
        each(**inputs).loss.backward()
    for name, parameter in theirs.items():
        name = name.removeprefix("base_model.model.").replace("ln_tuning_layers.default.", "")
        assert (parameter.grad - mine[name].grad).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", SEQ2SEQ)
def test_cross_attention_tuning_spares_the_encoder(backbone):
    """Nothing in there is in the graph.  With the shared embedding trained, all of it is."""

    def step(method, also=()):
        model, inputs = build(backbone), batch(backbone)
        attachment = gl.attach(model, method, also=also)
        encoder, alive = attachment.anatomy.bodies()["encoder"].module, []
        hook = encoder.register_forward_hook(lambda m, i, o: alive.append(o[0].requires_grad))
        kept = gl.costs.saved_bytes(model, inputs)
        hook.remove()
        attachment.detach()
        return alive[0], kept

    assert step(gl.CrossAttentionTuning())[0] is False
    assert step(gl.CrossAttentionTuning(), also="embedding")[0] is True
    assert step(gl.CrossAttentionTuning("attn"))[0] is True
    kept = [step(method)[1] for method in (gl.CrossAttentionTuning(), gl.CrossAttentionTuning("attn"))]
    assert kept[0] < kept[1] < step(gl.FullFineTuning())[1]


@pytest.mark.parametrize("backbone", SEQ2SEQ)
def test_the_decoder_is_the_same_without_the_encoder_s_graph(backbone):
    """With the encoder's states made beforehand, without a graph, each gradient is the same."""
    model, inputs = build(backbone), batch(backbone)
    gl.attach(model, gl.CrossAttentionTuning())
    gradients = []
    with torch.no_grad():
        states = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for more in ({}, {"encoder_outputs": states}):
        model.zero_grad()
        model(**inputs, **more).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_attention_tuning_is_cross_and_self():
    both, cross, own = (
        chosen(gl.CrossAttentionTuning(which), "tiny-bart") for which in ("attn", "cross", "self")
    )
    assert both == cross | own and not cross & own
    assert all("encoder_attn" in name and ".decoder." in name for name in cross)


def test_biases_go_with_lora_and_merge():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.BitFit() + gl.LoRA(r=2))
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    count, alone = attachment.count(), gl.attach(build("tiny-bert"), gl.LoRA(r=2)).count()
    biases = gl.attach(build("tiny-bert"), gl.BitFit()).count()
    assert count.changed == alone.changed + biases.changed - biases.head


@pytest.mark.parametrize("backbone", ENCODERS[:1])
def test_biases_and_norms_keep_less_than_all(backbone):
    def kept(method):
        model = build(backbone)
        attachment = gl.attach(model, method)
        found = gl.costs.saved_bytes(model, batch(backbone))
        attachment.detach()
        return found

    assert kept(SUBSET) <= kept(gl.BitFit()) == kept(gl.NormTuning()) < kept(gl.FullFineTuning())


def test_impossible_arguments_are_refused():
    for make, words in (
        (lambda: gl.BitFit(only=3), "only must be a role or several of them, got 3"),
        (lambda: gl.BitFit(add="yes"), "add must be True or False, got 'yes'"),
        (lambda: gl.CrossAttentionTuning("ffn"), "attentions must be one or more of self, cross, attn, got"),
        (lambda: gl.CrossAttentionTuning(norms=1), "norms must be True or False, got 1"),
        (lambda: gl.attach(build("tiny-bert"), gl.BitFit(only="bias")), "only: unknown 'bias'"),
        (lambda: gl.CrossAttentionTuning(()), "attentions must be one or more"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
