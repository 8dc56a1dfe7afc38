"""The costs of a model are found without its weights: the same as measured, and of models that fit nowhere.

The shared invariants hold prediction and measurement equal for every method on every kind of backbone.
"""

from __future__ import annotations

import json
import operator
import os
import resource
import subprocess
import sys
from functools import cache

import pytest
import safetensors.torch
import torch
from common import BACKBONES, METHOD_CASES, TWO_CLASSES, batch, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    BartForSequenceClassification,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    T5Config,
    T5Model,
)

import guidelib as gl
from guidelib.core.values import has_values
from guidelib.costs import shapes
from guidelib.costs.step import count_step
from guidelib.materials import backbones
from guidelib.materials.configs import load_config

LORA = gl.LoRA(r=4)
SIZE = dict(batch=3, length=9, target_length=5)


def measured(backbone, method, inputs, checkpointing=False, **options):
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, method)
    if checkpointing:
        gl.checkpointing(model)
    return count_step(model, inputs, **options)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_mask_without_padding_is_that_of_a_tokenizer(backbone):
    """A real run looks at the mask and drops it; one without values takes the same way."""
    inputs = batch(backbone, padded=False)
    predicted = gl.predict(backbone, LORA, **SIZE).predicted
    assert predicted == measured(backbone, LORA, inputs)
    padded = gl.predict(backbone, LORA, **SIZE, padded=True).predicted
    assert padded.saved_bytes > predicted.saved_bytes or backbone in ("tiny-t5-random", "tiny-t5v1-random")
    assert (padded.forward_flops, padded.backward_flops) == (
        predicted.forward_flops,
        predicted.backward_flops,
    )


BOTH = gl.LoRA(r=2, targets="all", dropout=0.1) + gl.AdaMix(r=3)
plain = cache(lambda backbone: gl.predict(backbone, BOTH, **SIZE, padded=True))


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    "options", [dict(checkpointing=True), dict(keep_less=True), dict(dropout=True)], ids=lambda o: [*o][0]
)
def test_every_option_of_a_step_is_predicted(backbone, options):
    predicted, before = gl.predict(backbone, BOTH, **SIZE, padded=True, **options), plain(backbone)
    assert predicted.predicted == measured(backbone, BOTH, batch(backbone), **options)
    more, less = (op(predicted.saved_bytes, before.saved_bytes) for op in (operator.gt, operator.lt))
    assert (more, less) == ("dropout" in options, "dropout" not in options)
    assert (predicted.backward_flops > before.backward_flops) == ("checkpointing" in options)


def test_checkpointing_and_keeping_less_together():
    options = dict(checkpointing=True, keep_less=True)
    predicted = gl.predict("tiny-bert", LORA, **SIZE, **options).predicted
    assert predicted == measured("tiny-bert", LORA, batch("tiny-bert", padded=False), **options)


# what the model may be


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-t5-random"])
def test_a_name_a_configuration_and_a_model_give_the_same(backbone):
    model = build(backbone, dtype=torch.float32)
    before = [has_values(p) and p.clone() for p in model.parameters()]
    named = gl.predict(backbone, LORA, **SIZE)
    assert gl.predict(load_config(backbone), LORA, **SIZE) == named
    assert gl.predict(model, LORA, **SIZE) == named
    assert not hasattr(model, "guidelib")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_on_the_meta_device_keeps_its_own_head():
    config = load_config("tiny-bert")
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    predicted = gl.predict(model, LORA, **SIZE)
    assert all(p.is_meta for p in model.parameters()) and not hasattr(model, "guidelib")
    real = BertForSequenceClassification(config)
    gl.attach(real, LORA)
    assert predicted == gl.measure(real, batch("tiny-bert", padded=False))
    assert predicted != gl.predict(config, LORA, **SIZE)  # which has no pooler


@pytest.mark.parametrize(
    ("method", "inside"),
    [("qlora", False), *((m, True) for m in ("qlora", "said", "adamix", "adapter-drop-random", "relora"))],
)
def test_a_model_of_a_fake_tensor_mode_can_be_attached_to_and_measured(method, inside):
    """The mode that the model was made in is active, or it is not."""
    mode, method = FakeTensorMode(), METHOD_CASES[method].method
    with mode:
        model = backbones.blank_backbone(load_config("tiny-bert"))
        inputs = {name: torch.ones_like(tensor) for name, tensor in batch("tiny-bert").items()}
        if inside:
            gl.attach(model, method)
            found = gl.measure(model, inputs)
    if not inside:
        gl.attach(model, method)
        found = gl.measure(model, inputs)
    assert not any(has_values(p) for p in model.parameters())
    assert found == gl.predict("tiny-bert", method, **SIZE)


def test_values_that_others_see_are_not_made_on_shapes():
    """NF4 keeps a table; made without values, it would be without values for everybody after."""
    code = """
import json, torch, guidelib as gl
from torch._subclasses.fake_tensor import FakeTensorMode
from guidelib.materials.backbones import blank_backbone
from guidelib.materials.configs import load_config
results = []
for mode in (FakeTensorMode(), torch.inference_mode(False)):
    with mode:
        model = blank_backbone(load_config("tiny-bert"))
        gl.attach(model, gl.NF4() + gl.LoRA(r=2))
        results.append(model(input_ids=torch.ones(2, 3, dtype=torch.long)).logits)
print(json.dumps([type(results[0]).__name__, bool(results[1].isfinite().all())]))
"""
    assert run(code) == ["FakeTensor", True]


@pytest.mark.parametrize("backbone", ["minilm", "tiny-t5"])
def test_pretrained_backbones_are_predicted_without_a_look_at_their_weights(backbone, monkeypatch):
    task = TWO_CLASSES if backbone == "minilm" else None
    model, _ = gl.load_backbone(backbone, task)
    gl.attach(model, LORA)
    ids = torch.ones(2, 7, dtype=torch.long)
    labels = torch.ones(2, dtype=torch.long) if task else ids
    found = gl.measure(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(backbones, "load_file", refuse)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse)
    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(backbones.AutoTokenizer, "from_pretrained", refuse)
    assert gl.predict(backbone, LORA, batch=2, length=7, task=task) == found


def test_smollm2_is_predicted_before_it_is_converted(monkeypatch, tmp_path):
    """From the metadata of the packaged file, which are those of the converted files."""
    converted = load_config("smollm2").to_dict()
    monkeypatch.setenv("GUIDELIB_CACHE", str(tmp_path))
    packed = load_config("smollm2").to_dict()
    assert [*tmp_path.iterdir()] == []
    assert {n for n in packed if packed[n] != converted[n]} <= {"architectures", "dtype", "_name_or_path"}
    assert gl.predict(AutoConfig.for_model(**packed), LORA, batch=2, length=7).count.total == 134_515_008


def test_a_hub_id_needs_its_configuration_alone(tmp_path):
    folder = tmp_path / "owner" / "name"
    load_config("tiny-llama").save_pretrained(folder)
    assert gl.predict(str(folder), LORA, **SIZE) == gl.predict("tiny-llama", LORA, **SIZE)


@pytest.mark.parametrize("kind", [T5Model, BartModel])
def test_a_bare_encoder_decoder_has_no_loss_either(kind):
    model = kind(load_config("tiny-bart" if kind is BartModel else "tiny-t5-random"))
    predicted = gl.predict(model, LORA, batch=2, length=9, target_length=5)
    gl.attach(model, LORA)
    ids, targets = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": targets}
    assert predicted == gl.measure(model, inputs)


def test_an_encoder_decoder_that_classifies_is_for_measure():
    model = BartForSequenceClassification(load_config("tiny-bart"))
    with pytest.raises(
        ValueError, match="model must be an encoder-decoder that writes or is bare; `measure`"
    ):
        gl.predict(model, LORA, batch=2, length=9)


def test_a_bare_backbone_has_no_loss():
    bare, _ = gl.load_backbone("tiny-bert")
    predicted = gl.predict(bare, LORA, **SIZE)
    gl.attach(bare, LORA)
    inputs = batch("tiny-bert", padded=False)
    del inputs["labels"]
    assert predicted == gl.measure(bare, inputs)


def test_a_task_brings_its_head():
    three = gl.Task("three", "classification", ("a", "b", "c"), None, None, None)
    encoder = gl.predict("tiny-bert", gl.HeadOnly(), **SIZE, task=three)
    decoder = gl.predict("tiny-llama", gl.HeadOnly(), **SIZE, task=three)
    assert (encoder.count.head, decoder.count.head) == (3 * 32 + 3, 3 * 32)
    model, _ = gl.load_backbone("tiny-llama", three)
    gl.attach(model, gl.HeadOnly())
    assert decoder == gl.measure(model, batch("tiny-bert", padded=False))
    four = AutoConfig.for_model(**load_config("tiny-bert").to_dict() | dict(num_labels=4))
    assert gl.predict(four, gl.HeadOnly(), **SIZE).count.head == 4 * 32 + 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(model="tiny-brt"), ValueError, "'tiny-brt' is not a backbone"),
        (dict(model="nobody/nothing"), OSError, "'nobody/nothing' could not be loaded"),
        (dict(model=7), ValueError, "model must be a backbone's name"),
        (dict(batch=0), ValueError, "batch must be a whole number of at least 1, got 0"),
        (dict(batch=True), ValueError, "batch must be a whole number of at least 1, got True"),
        (dict(length=257), ValueError, "length must be at most 256, the positions of the encoder, got 257"),
        (
            dict(model="tiny-bart", length=8, target_length=300),
            ValueError,
            "target_length must be at most 256, the positions of the decoder, got 300",
        ),
        (dict(length=2.5), ValueError, "length must be a whole number of at least 1, got 2.5"),
        (dict(target_length=0), ValueError, "target_length must be a whole number of at least 1, got 0"),
        (dict(method=gl.LoRA(targets="cross")), ValueError, "'cross' is not in this bert model"),
        (dict(model=build("tiny-bert"), dtype=torch.float32), ValueError, "dtype must be None for a model"),
        (dict(model=build("tiny-bert"), task=TWO_CLASSES), ValueError, "task must be None for a model"),
        (dict(task="modern-bible"), NotImplementedError, "cannot be given the text2text task"),
    ],
)
def test_what_cannot_be_predicted_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        gl.predict(**dict(model="tiny-bert", method=LORA) | arguments)


def test_a_fusion_of_files_is_predicted_without_them():
    small = gl.PfeifferAdapter(r=4)
    files, new = (gl.AdapterFusion(adapters, small) for adapters in (("a.safetensors", "b.safetensors"), 2))
    assert gl.predict("tiny-bert", files, **SIZE).predicted == gl.predict("tiny-bert", new, **SIZE).predicted


# models that fit nowhere


def run(code):
    """What ``code`` prints last in a process of its own, from JSON."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_model_of_seven_billion_parameters_takes_no_memory():
    code = """
import json, resource, torch, transformers
import guidelib as gl
gl.predict("tiny-llama", gl.LoRA(r=8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
costs = gl.predict(transformers.LlamaConfig(), gl.LoRA(r=8), batch=8, length=512, dtype=torch.bfloat16)
# what each layer makes of a mask with padding is batch x length^2 numbers
small = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_hidden_layers=9)
small = transformers.LlamaConfig(**small)
padded = gl.predict(small, gl.LoRA(r=8), batch=8, length=2048, padded=True)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([memory, costs.count.total, costs.memory.weights, costs.memory.gradients,
                  costs.memory.total, costs.forward_flops, costs.saved_bytes, padded.saved_bytes]))
"""
    memory, total, weights, gradients, plan, forward, saved, padded = run(code)
    assert memory * (1024 if sys.platform != "darwin" else 1) < 0.5 * 10**9 < padded / 2
    layers, d, inner, words, tokens = 32, 4096, 11008, 32000, 8 * 512
    assert total == 6_738_415_616  # as published
    trained = layers * 2 * 8 * 2 * d  # q and v, r = 8
    assert gradients == 4 * trained  # 32 bits beside the base's 16
    assert weights == 2 * total + 4 * trained + 2 * 4 * 64  # with the rotary frequencies, twice
    assert plan == weights + 3 * gradients + saved
    products = layers * (4 * d * d + 3 * d * inner) + words * d + trained
    rotary = 2 * 512 * 64  # older versions of transformers multiply matrices for the angles
    assert forward - 2 * tokens * products - layers * 2 * (2 * 8 * 512**2 * d) in (0, rotary)
    # at least what attention, the gates and the loss in 32 bits need
    assert saved > layers * tokens * 2 * (4 * d + 2 * inner) + tokens * words * 4


class _Values(TorchDispatchMode):
    """The largest storage with values that is made, in bytes, and by what."""

    def __init__(self):
        super().__init__()
        self.largest = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and has_values(tensor):
                made = tensor.untyped_storage().nbytes(), str(function)
                self.largest = max(self.largest, made, key=operator.itemgetter(0))
        return out


@pytest.mark.parametrize("name", [name for names in gl.METHODS.values() for name in names])
def test_nothing_as_large_as_a_matrix_is_made(name):
    """So no method needs memory or time where another does not, however large the model is."""
    d, layers = 1024, 6 if name == "AdapterDrop" else 2  # it leaves five without
    sizes = dict(num_attention_heads=16, intermediate_size=4 * d, vocab_size=2000)
    config = BertConfig(hidden_size=d, num_hidden_layers=layers, **sizes)
    if name == "CrossAttentionTuning":
        config = T5Config(d_model=d, d_ff=4 * d, num_heads=16, num_layers=layers, vocab_size=2000)
    with _Values() as values:
        gl.predict(config, getattr(gl, name)(), batch=1, length=16)
    assert values.largest[0] < 4 * d * d / 2, values.largest


def test_nor_anything_as_large_as_an_attention():
    """T5 adds zeros for each head and each pair of tokens to its cross-attention."""
    heads, tokens = 16, 256
    config = T5Config(d_model=64, d_kv=4, num_heads=heads, num_layers=1, vocab_size=100)
    with _Values() as values:
        gl.predict(config, LORA, batch=1, length=tokens)
    assert values.largest[0] < 4 * heads * tokens**2 / 2, values.largest


LARGE = {
    "T5-11B": (
        lambda n: T5Config(
            **dict(d_model=1024, d_kv=128, d_ff=65536, num_heads=128, vocab_size=32128),
            **dict(num_layers=n, num_decoder_layers=n),
        ),
        24,
        11_307_321_344,
    ),
    "LLaMA-70B": (
        lambda n: LlamaConfig(
            **dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, vocab_size=128256),
            **dict(num_hidden_layers=n, num_key_value_heads=8),
        ),
        80,
        70_553_706_496,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_models_cost_as_much_as_their_layers(name):
    """Every term grows by the same from layer to layer, so two small models of that width tell of the large
    one."""
    config, depth, published = LARGE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def numbers(n):
        costs = gl.predict(
            config(n), gl.LoRA(r=8), batch=4, length=128, target_length=32, dtype=torch.bfloat16
        )
        memory = costs.memory
        terms = memory.weights, memory.gradients, memory.optimizer, memory.activations
        return costs.count.total, costs.count.trainable, *terms, costs.forward_flops, costs.operations

    one, two, large = numbers(1), numbers(2), numbers(depth)
    assert large[0] == published
    for a, b, found in zip(one, two, large, strict=True):
        assert 0 < a < b and found == a + (depth - 1) * (b - a)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1024 if sys.platform != "darwin" else 1) < 0.5 * 10**9


# the file


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from([*shapes.TYPES])),
        min_size=1,
        max_size=8,
    ),
    metadata=st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=30), min_size=1, max_size=3),
)
def test_the_size_of_a_file_is_that_of_safetensors(tensors, metadata):
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in tensors.items()}
    assert shapes.file_size(tensors, metadata) == len(safetensors.torch.save(tensors, metadata))


def test_a_copy_on_shapes_is_independent_and_keeps_what_is_shared():
    model = build("tiny-gpt2", dtype=torch.float32)
    gl.attach(model, LORA)
    for meta in (True, False):
        copied = shapes.on_shapes(model, meta=meta)
        assert not any(has_values(t) for t in (*copied.parameters(), *copied.buffers()))
        assert copied.lm_head.weight is copied.transformer.wte.weight
        assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
        assert {n: (t.shape, t.dtype) for n, t in copied.state_dict().items()} == {
            n: (t.shape, t.dtype) for n, t in model.state_dict().items()
        }
        gl.attached(copied).detach()
    assert all(map(has_values, model.parameters())) and gl.attached(model).method == LORA
