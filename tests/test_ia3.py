"""(IA)^3: three vectors, which merge and stand beside other updates in any order."""

from __future__ import annotations

import copy

import pytest
import torch
from common import (
    BACKBONES,
    SEQ2SEQ,
    assert_the_prediction_is_the_measurement,
    batch,
    build,
    outputs,
    randomise,
)
from peft import IA3Config, get_peft_model
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, T5Config

import guidelib as gl

T0_3B = T5Config(
    d_model=2048, d_kv=64, num_heads=32, num_layers=24, d_ff=5120, feed_forward_proj="gated-gelu"
)


def test_published_counts():
    assert gl.count(T0_3B, gl.IA3()).trainable == 540_672
    assert (
        gl.count(T5Config(d_model=768, num_heads=12, num_layers=12, d_ff=3072), gl.IA3()).trainable == 129_024
    )
    assert gl.count(BertConfig(), gl.IA3()).trainable == 55_296


@pytest.mark.parametrize("backbone", SEQ2SEQ[:2])
def test_it_is_pefts_on_t5_with_its_targets_named(backbone):
    model, inputs = build(backbone), batch(backbone)
    config = IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    peft = get_peft_model(copy.deepcopy(model), config)
    parts = {part.site.module: part.delta for part in gl.attach(model, gl.IA3()).parts}
    theirs = {
        name: module.ia3_l["default"] for name, module in peft.named_modules() if hasattr(module, "ia3_l")
    }
    names = {name: parts[model.get_submodule(name.removeprefix("base_model.model."))] for name in theirs}
    assert len(names) == len(parts) == 2 * 3 + 2 * 5
    for name, vector in theirs.items():
        names[name].l.data.uniform_(0.5, 1.5)
        vector.data.copy_(names[name].l.data.view_as(vector))
    losses = [each(**inputs).loss for each in (model, peft)]
    for loss in losses:
        loss.backward()
    assert (losses[0] - losses[1]).abs() < 1e-12
    for name, vector in theirs.items():
        assert (vector.grad.flatten() - names[name].l.grad.flatten()).abs().max() < 1e-12


def test_a_bias_is_scaled_where_the_output_is_and_not_where_the_input_is():
    model = build("tiny-bert")
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    attachment = gl.attach(model, gl.IA3())
    randomise(attachment)
    before = {part: (part.site.weight.clone(), part.site.bias.clone()) for part in attachment.parts}
    attachment.merge()
    for part, (weight, bias) in before.items():
        vector = part.delta.l[0]
        if part.site.role == "ffn.out":
            expected = weight * vector, bias
        else:
            expected = weight * vector[:, None], bias * vector
        assert all(map(torch.equal, (part.site.weight, part.site.bias), expected))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_order_of_a_sum_does_not_matter(backbone):
    ia3, lora, inputs = gl.IA3(("k", "v")), gl.LoRA(r=2, targets=("v", "ffn.out")), batch(backbone)
    found = []
    for method in (ia3 + lora, lora + ia3):
        model = build(backbone)
        attachment = gl.attach(model, method)
        randomise(attachment)
        found += [outputs(model, inputs), attachment]
        attachment.merge()
        assert (outputs(model, inputs) - found[-2]).abs().max() < 1e-12
    assert (found[0] - found[2]).abs().max() < 1e-12
    assert [part.method for part in found[1].parts] == [part.method for part in found[3].parts]


def test_keys_and_values_of_groups_have_fewer_numbers():
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=48, vocab_size=99,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    attachment = gl.attach(model, gl.IA3())
    assert attachment.count().trainable == 2 * (16 + 16 + 48)
    randomise(attachment)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        acting = model(ids).logits
        attachment.merge()
        assert (model(ids).logits - acting).abs().max() < 1e-5


def test_on_four_bits_it_acts_on_what_they_stand_for():
    model, inputs = build("tiny-llama"), batch("tiny-llama")
    attachment = gl.attach(model, gl.IA3() + gl.NF4())
    plain = outputs(model, inputs)
    randomise(attachment)
    assert (outputs(model, inputs) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_example_has_its_own_vectors(backbone):
    model, inputs = build(backbone), batch(backbone, padded=False)
    attachment = gl.attach(model, gl.IA3(tasks=3))
    randomise(attachment)
    with gl.using(model, [2, 0, 1]):
        mixed = outputs(model, inputs)
        with pytest.raises(ValueError, match="IA3 cannot be merged: .* each example has its own"):
            attachment.merge()
    for row, task in enumerate((2, 0, 1)):
        with gl.using(model, task):
            alone = outputs(model, {name: value[row : row + 1] for name, value in inputs.items()})
        assert (mixed[row] - alone[0]).abs().max() < 1e-12
    assert (mixed - outputs(model, inputs)).abs().max() > 1e-6


@pytest.mark.parametrize("method", [gl.IA3(), gl.IA3(targets=()), gl.IA3("q", ()), gl.IA3() + gl.LoRA(r=2)])
def test_the_closed_form_is_the_measurement(method):
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, method)
    assert_the_prediction_is_the_measurement(model, "tiny-bert")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gl.IA3((), ()), r"targets must be a role, where inputs has none, got \(\)"),
        (lambda: gl.IA3(3), "targets must be a role or several of them, got 3"),
        (lambda: gl.IA3(tasks=0), "tasks must be a whole number of at least 1, got 0"),
        (lambda: gl.attach(build("tiny-gpt2"), gl.IA3(inputs="q")), "a map with an input of its own"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
