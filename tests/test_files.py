"""Files: whose base they know again, what they hold, what they refuse, and how they are written."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from common import BACKBONES, METHOD_CASES, SMALL, TWO_CLASSES, batch, build, outputs, randomise
from test_attachment import Snapshot, contents, store
from torch import nn
from transformers import AutoConfig, BertConfig, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertPreTrainedModel

import guidelib as gl
from guidelib.core import files
from guidelib.core.anatomy import Anatomy
from guidelib.core.fingerprint import Sums, base_of

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
ROUNDINGS = ((F32,), (F16,), (BF16,), (F16, BF16), (BF16, F32), (torch.float64,))
RESULTS = Path(gl.__file__).parent / "experiments/results/domains"


def rounded(backbone, types, **other):
    model = build(backbone, dtype=F32, **other)
    for dtype in types:
        model = model.to(dtype)
    return model


# whose base


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_base_is_known_again_however_it_was_rounded(backbone, tmp_path):
    """From 32 bits to bfloat16 at once, or by way of float16: not the same bits."""
    models = [rounded(backbone, types) for types in ROUNDINGS]
    paths = []
    for i, model in enumerate(models):
        attachment = gl.attach(model, gl.LoRA(r=2))
        randomise(attachment)
        paths.append((attachment.save(tmp_path / f"{i}.safetensors"), attachment.parts[0].delta.B.clone()))
        attachment.detach()
    others = [rounded(backbone, types, seed=1) for types in ROUNDINGS]
    for path, expected in paths:
        for model in models:
            loaded = gl.load(model, path)
            own = loaded.parts[0].delta.B
            assert torch.equal(own, expected.to(own.dtype))
            loaded.detach()
        for model in others:
            with pytest.raises(ValueError, match="another backbone: its weights differ"):
                gl.load(model, path)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("types", "noise"), [((F32,), 1e-4), ((BF16,), 0.03), ((F16, BF16), 0.03)])
def test_a_base_that_was_trained_on_is_another_one(backbone, types, noise, tmp_path):
    path = gl.attach(rounded(backbone, (F32,)), gl.LoRA(r=2)).save(tmp_path / "a.safetensors")
    model, generator = rounded(backbone, (F32,)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    for dtype in types:
        model = model.to(dtype)
    with pytest.raises(ValueError, match="a.safetensors' belongs to another backbone: its weights differ"):
        gl.load(model, path)


@pytest.mark.parametrize("types", [(BF16,), (F16, BF16)], ids=str)
def test_adapters_of_a_32_bit_base_go_together_on_a_16_bit_one(types, tmp_path):
    paths, loras = [], []
    for seed in range(2):
        model = rounded("tiny-bert", (F32,))
        paths.append(gl.attach(model, SMALL, seed=seed).save(tmp_path / f"{seed}.safetensors"))
        gl.attached(model).detach()
        loras.append(gl.attach(model, gl.LoRA(r=2), seed=seed).save(tmp_path / f"lora-{seed}.safetensors"))
    tensors = contents(paths[1])[0]
    attachment = gl.attach(rounded("tiny-bert", types), gl.AdapterFusion(tuple(paths), SMALL))
    (first, *_) = attachment.parts
    name = "guidelib.PfeifferAdapter_encoder_0_ffn.module.down.weight"
    assert torch.equal(first.module.adapters[1].down.weight, tensors[name])
    attachment = gl.load_loras(rounded("tiny-bert", types), loras)
    tensors = contents(loras[1])[0]
    assert torch.equal(attachment.parts[0].delta.A[1], tensors["guidelib.LoRA_encoder_0_self_q.delta.A"])
    other = rounded("tiny-bert", types, seed=1)
    with pytest.raises(ValueError, match="'0.safetensors' belongs to another backbone: its weights"):
        gl.attach(other, gl.AdapterFusion(tuple(paths), SMALL))
    with pytest.raises(ValueError, match="'lora-0.safetensors' belongs to another backbone: its weights"):
        gl.load_loras(other, loras)


def with_more_tokens(backbone, rows, seed, types=(F32,)):
    model = build(backbone, dtype=F32)
    torch.manual_seed(seed)
    model.resize_token_embeddings(384 + rows, mean_resizing=False)
    for dtype in types:
        model = model.to(dtype)
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("rows", [1, 2, 700])
def test_added_tokens_belong_to_the_base(backbone, rows, tmp_path):
    inputs = batch(backbone) | {"input_ids": torch.full((3, 9), 384)}
    model = with_more_tokens(backbone, rows, 0)
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    expected, path = outputs(model, inputs), attachment.save(tmp_path / "a.safetensors")
    same = with_more_tokens(backbone, rows, 0)
    gl.load(same, path)
    assert torch.equal(outputs(same, inputs), expected)
    gl.load(with_more_tokens(backbone, rows, 0, (F16, BF16)), path)
    for types in ((F32,), (BF16,)):
        with pytest.raises(ValueError, match="weights differ from this model's in '.*(emb|wte|share|head)"):
            gl.load(with_more_tokens(backbone, rows, 1, types), path)
    with pytest.raises(ValueError, match="its shapes differ"):
        gl.load(build(backbone, dtype=F32), path)


def test_one_other_row_of_a_table_is_seen(tmp_path):
    path = gl.attach(build("tiny-bert", dtype=F32), gl.LoRA(r=2)).save(tmp_path / "a.safetensors")
    for row in (0, 11, 200, 383):
        for dtype in (F32, BF16, F16):
            model = rounded("tiny-bert", (F32,))
            with torch.no_grad():
                model.get_input_embeddings().weight[row] = torch.linspace(-0.2, 0.2, 32)
            model = model.to(dtype)
            with pytest.raises(ValueError, match="in 'encoder.embeddings.word_embeddings.weight'$"):
                gl.load(model, path)


def test_sums_come_in_the_order_of_the_names():
    """The same in every process, whatever the order of its sets."""
    anatomy = Anatomy(build("tiny-llama"))
    sums = Sums(anatomy, base_of(anatomy, ()))
    tables = [name for name in sums.names if anatomy.base_parameters()[name].shape == (384, 32)]
    assert len(set(tables)) == 2 and tables == sorted(tables) == sums.names[-len(tables) :]


def test_what_a_file_brings_need_not_be_in_the_base(tmp_path):
    """All of the weights are in the file of full fine-tuning, so it acts the same on any base."""
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.FullFineTuning())
    randomise(attachment)
    path = attachment.save(tmp_path / "a.safetensors")
    other = build("tiny-bert", seed=1)
    before = Snapshot(other)
    loaded = gl.load(other, path)
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))
    loaded.detach()
    before.check()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_stored_adapters_fit_the_model_that_the_pages_load(path):
    model, _ = gl.load_backbone("minilm", TWO_CLASSES)
    attachment = gl.load(model, path)
    tensors = contents(path)[0]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in attachment.state().items())
    attachment.detach()
    with torch.no_grad():
        model.get_parameter("encoder.encoder.layer.3.output.dense.weight").mul_(1.01)
    with pytest.raises(ValueError, match=f"{path.name}' belongs to another backbone: its weights"):
        gl.load(model, path)


def test_a_look_at_a_merged_model_leaves_its_base_known(tmp_path):
    """Costs are measured on merged models, too, and the size of the file is one of them."""
    attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=2, targets="all"))
    randomise(attachment)
    attachment.merge()
    attachment.metadata()
    gl.load(build("tiny-bert"), attachment.save(tmp_path / "a.safetensors"))
    attachment.unmerge()
    gl.load(build("tiny-bert"), attachment.save(tmp_path / "a.safetensors"))


# what is trained besides


def blocks_of(backbone):
    return next(n for n, _ in build(backbone).named_parameters() if ".1." in n).split(".1.")[0] + ".1"


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("also", ["embedding", "norms", "biases", "block", "two"])
def test_what_else_is_named_is_trained_saved_and_given_back(backbone, also, tmp_path):
    if also == "biases" and not Anatomy(build(backbone)).biases():
        with pytest.raises(ValueError, match="also: 'biases' is nothing in this"):
            gl.attach(build(backbone), gl.LoRA(r=2), also=also)
        return
    also = {"block": blocks_of(backbone), "two": ("embedding", "norms")}.get(also, also)
    model, inputs = build(backbone), batch(backbone)
    before = Snapshot(model)
    plain = gl.attach(model, gl.LoRA(r=2)).count()
    gl.attached(model).detach()
    attachment = gl.attach(model, gl.LoRA(r=2), also=also)
    names = Anatomy(model).named(also)
    size = sum(p.numel() for n, p in model.named_parameters() if n in names - Anatomy(model).task_head())
    count = attachment.count()
    assert count.trainable - plain.trainable == count.stored - plain.stored == size > 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
    assert not any(torch.equal(model.get_parameter(n), before.tensors[n]) for n in names)
    path = attachment.save(tmp_path / "a.safetensors")
    fresh = build(backbone)
    with torch.no_grad():
        for name in names:  # the file has to bring them
            fresh.get_parameter(name).normal_()
    again = Snapshot(fresh)
    loaded = gl.load(fresh, path)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs)) and loaded.count() == count
    loaded.detach()
    again.check()
    attachment.detach()
    before.gradients = dict.fromkeys(before.gradients)
    before.check()


WRONG = ["FAKE", "encoder.layer.7", "layer", ("norms", ""), 5, (3,), "pooler"]


@pytest.mark.parametrize("also", WRONG, ids=str)
def test_what_is_not_there_cannot_be_trained(also):
    model = build("tiny-bert")
    before = Snapshot(model)
    with pytest.raises((ValueError, TypeError), match="also"):
        gl.attach(model, gl.LoRA(r=2), also=also)
    before.check()


def test_a_weight_in_four_bits_cannot_be_trained():
    model = build("tiny-bert")
    before = Snapshot(model)
    with pytest.raises(ValueError, match="must be one that leaves the weights which NF4 quantises frozen"):
        gl.attach(model, gl.QLoRA(r=2), also="encoder.layer.1")
    before.check()


def test_what_is_unfrozen_by_hand_is_noticed(tmp_path):
    model, tokenizer = gl.load_backbone("tiny-bert", TWO_CLASSES)
    attachment = gl.attach(model, gl.LoRA(r=2))
    model.encoder.embeddings.requires_grad_(True)
    task = gl.load_task("movie-reviews").subset(train=8, validation=8, test=8)
    message = (
        "model: 'encoder.embeddings.word_embeddings.weight' and 4 more must stay frozen after attach, which "
        r"saves and gives back what it knows of; name it in attach\(..., also=...\) to train it"
    )
    for call in (
        attachment.count,
        lambda: attachment.save(tmp_path / "a.safetensors"),
        lambda: gl.fit(model, task, tokenizer, progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not any(tmp_path.iterdir())
    model.encoder.embeddings.requires_grad_(False)
    assert attachment.count().head == 66
    model.encoder.embeddings.requires_grad_(True)
    with pytest.warns(UserWarning, match="word_embeddings.weight' and 4 more was unfrozen after attach"):
        attachment.detach()
    assert not hasattr(model, "guidelib")


# what transformers draws


SMALL_CONFIG = (
    dict(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    | dict(max_position_embeddings=40, num_key_value_heads=2, d_model=16, d_ff=16, d_kv=8)
    | dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16)
    | dict(encoder_attention_heads=2, decoder_attention_heads=2)
)


def classes_of(kind):
    """The bare class of an architecture, and all of its classes that can be loaded from its checkpoint."""
    config = AutoConfig.for_model(kind, **SMALL_CONFIG)
    bare = transformers.MODEL_MAPPING[type(config)]
    classes = [value for value in vars(inspect.getmodule(bare)).values() if inspect.isclass(value)]
    classes = [c for c in classes if issubclass(c, transformers.PreTrainedModel)]
    ends = ("Model", "Classification", "Answering", "Choice", "LM", "PreTraining", "Prediction", "Generation")
    classes = [c for c in classes if c.__name__.endswith(ends) and "retrained" not in c.__name__.lower()]
    return config, bare, classes


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "distilbert", "gpt2", "llama", "t5", "bart"])
def test_what_transformers_draws_is_trained_and_saved_or_spoken_of(kind, tmp_path):
    """Every class of the architecture, loaded from a checkpoint of its bare backbone without a pooler."""
    config, bare, classes = classes_of(kind)
    options = (
        {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(bare).parameters else {}
    )
    bare(config, **options).save_pretrained(tmp_path)
    assert len(classes) >= 5
    for cls in classes:
        models = []
        for seed in range(3):
            torch.manual_seed(seed)
            models.append(cls.from_pretrained(tmp_path))
        own, theirs = (dict(model.named_parameters()) for model in models[:2])
        drawn = {name for name, p in own.items() if not torch.equal(p, theirs[name])}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attachment = gl.attach(models[0], gl.LoRA(r=2))
        frozen = drawn - attachment.state().keys()
        assert [w.category for w in said] == [UserWarning] * bool(frozen), cls
        if frozen:  # a language model whose table of tokens came with no checkpoint
            assert f"{min(frozen)!r} came with no checkpoint" in str(said[0].message)
            attachment.detach()
            attachment = gl.attach(models[0], gl.LoRA(r=2), also=frozen)
        randomise(attachment)
        path = attachment.save(tmp_path / "a.safetensors")
        gl.load(models[1], path)
        now = dict(models[1].named_parameters())
        assert all(torch.equal(now[name], p) for name, p in models[0].named_parameters()), cls
        assert attachment.count().head == sum(p.numel() for p in Anatomy(models[2]).head().values())


class Own(BertPreTrainedModel):
    """As people write it: a backbone, and layers of one's own under any name."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.fc = nn.Sequential(nn.Linear(config.hidden_size, 8), nn.Tanh(), nn.Linear(8, 2))
        self.temperature = nn.Parameter(torch.randn(()))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        pooled = self.bert(input_ids, attention_mask=attention_mask).pooler_output
        return SequenceClassifierOutput(logits=self.temperature * self.fc(pooled))


@pytest.mark.parametrize("pooler", [True, False])
def test_layers_of_ones_own_are_the_head(pooler, tmp_path):
    config = BertConfig(**SMALL_CONFIG)
    BertModel(config, add_pooling_layer=pooler).save_pretrained(tmp_path)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Own.from_pretrained(tmp_path).eval())
        with torch.no_grad():
            models[-1].temperature.fill_(seed + 1)
    attachment = gl.attach(models[0], gl.LoRA(r=2))
    trained = {name.split(".")[0] for name in attachment.state()} - {"guidelib"}
    assert trained == ({"fc", "temperature"} if pooler else {"fc", "temperature", "bert"})
    assert attachment.count().head == 8 * 16 + 8 + 2 * 8 + 2 + 1 + (not pooler) * (16 * 16 + 16)
    randomise(attachment)
    before = Snapshot(models[1])
    loaded = gl.load(models[1], attachment.save(tmp_path / "a.safetensors"))
    inputs = {"input_ids": torch.arange(12).view(2, 6)}
    assert torch.equal(outputs(models[1], inputs), outputs(models[0], inputs))
    loaded.detach()
    before.check()


def test_a_drawn_pooler_of_which_nobody_knows_makes_another_base(tmp_path):
    """A copy of a model no longer knows what was loaded: its pooler stays frozen, a part of the base."""
    config = BertConfig(**SMALL_CONFIG)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        models.append(transformers.BertForMultipleChoice(config))
        torch.manual_seed(seed)
        nn.init.normal_(models[-1].bert.pooler.dense.weight)
    path = gl.attach(models[0], gl.LoRA(r=2)).save(tmp_path / "a.safetensors")
    gl.load(models[1], path)
    with pytest.raises(ValueError, match="weights differ from this model's in 'bert.pooler.dense.weight'$"):
        gl.load(models[2], path)
    gl.attached(models[0]).detach()
    path = gl.attach(models[0], gl.LoRA(r=2), also="pooler").save(path)
    gl.load(models[2], path)
    assert torch.equal(models[2].bert.pooler.dense.weight, models[0].bert.pooler.dense.weight)


def test_drawn_attention_is_spoken_of(tmp_path):
    BertModel(BertConfig(**SMALL_CONFIG)).save_pretrained(tmp_path)
    config = BertConfig(**SMALL_CONFIG, is_decoder=True, add_cross_attention=True)
    model = transformers.BertLMHeadModel.from_pretrained(tmp_path, config=config)
    with pytest.warns(UserWarning, match="'bert.encoder.layer.0.crossattention.* and 9 more came with no"):
        gl.attach(model, gl.LoRA(r=2)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment = gl.attach(model, gl.LoRA(r=2), also="encoder.layer.0.crossattention")
    assert sum("crossattention" in name for name in attachment.state()) >= 10


# files that are not right


@pytest.fixture
def bert():
    return build("tiny-bert")


@pytest.fixture
def saved(tmp_path):
    attachment = gl.attach(build("tiny-bert"), gl.Adapter(r=2))
    randomise(attachment)
    return attachment.save(tmp_path / "a.safetensors")


def refused(model, before, path):
    """Whether the file is refused, in one sentence that names it, with the model as it was."""
    try:
        attachment = gl.load(model, path)
    except ValueError as error:
        assert "a.safetensors" in str(error) and "\n" not in str(error) and len(str(error)) < 600, error
        before.check()
        return True
    attachment.detach()
    return False


def test_a_flipped_bit_is_found(bert, saved):
    """Anywhere in the file.  Blanks at the end of the header say nothing, so there another one may stand."""
    before, whole = Snapshot(bert), saved.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    blanks = header - len(whole[:header].rstrip(b" "))
    rng, accepted = random.Random(0), 0
    for place in (*range(8), *rng.sample(range(len(whole)), 150), *rng.sample(range(header), 150)):
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        saved.write_bytes(data)
        if not refused(bert, before, saved):
            assert header - blanks <= place < header
            accepted += 1
    assert accepted <= 3
    saved.write_bytes(whole)
    assert not refused(bert, before, saved)


def test_a_part_of_a_file_is_refused(bert, saved):
    before, whole, rng = Snapshot(bert), saved.read_bytes(), random.Random(1)
    for _ in range(60):
        start, stop = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        for data in (whole[:stop], whole[start:], whole[:start] + bytes(stop - start) + whole[stop:]):
            saved.write_bytes(data)
            assert refused(bert, before, saved) or data == whole


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(bert, saved, value):
    tensors, metadata = contents(saved)
    whole = saved.read_bytes()
    attachment = gl.load(bert, saved)
    with torch.no_grad():
        attachment.parts[0].module.down.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"a.safetensors' would not act: tensor '.*down.weight' holds NaN"):
        attachment.save(saved)
    assert saved.read_bytes() == whole and [*saved.parent.iterdir()] == [saved]
    attachment.detach()
    before = Snapshot(bert)
    next(iter(tensors.values())).view(-1)[0] = value
    store(tensors, saved, metadata)
    assert refused(bert, before, saved)


KINDS = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_tensors_of_another_kind_are_refused(bert, saved, dtype):
    tensors, metadata = contents(saved)
    before = Snapshot(bert)
    for name in list(tensors)[:2] + ["classifier.weight"]:
        store(tensors | {name: tensors[name].to(dtype)}, saved, metadata)
        assert refused(bert, before, saved)


def test_numbers_that_do_not_fit_into_16_bits_are_refused(tmp_path):
    attachment = gl.attach(build("tiny-bert", dtype=F32), gl.Adapter(r=2))
    with torch.no_grad():
        attachment.model.classifier.bias.fill_(1e5)
    path = attachment.save(tmp_path / "a.safetensors")
    gl.load(build("tiny-bert", dtype=BF16), path)
    model = build("tiny-bert", dtype=F16)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="'classifier.bias' has numbers that are too large for torch.float"):
        gl.load(model, path)
    before.check()


VALUES = [0, -1, 2, 1.5, True, None, "x", [], {}, [1], ["q"], 10**6, 10**9, 10**12, 10**30, 10**400, 1e308]
VALUES += [float("nan"), float("inf"), {"type": "LoRA"}, {"type": "Dense"}, ["q"] * 1000]
VALUES += [{"type": "Sum", "methods": []}, {"type": "On", "method": {"type": "LoRA"}}, {"type": "Wrapper"}]


def places(value, path=()):
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from places(item, (*path, key))


def changed(value, path, new):
    if not path:
        return new
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-t5-random"])
def test_no_method_that_a_file_may_name_crashes(backbone, tmp_path):
    model, rng, path = build(backbone), random.Random(2), tmp_path / "a.safetensors"
    before, loaded = Snapshot(model), 0
    for case in METHOD_CASES.values():
        if backbone in case.refuses:
            continue
        tensors, metadata = contents(gl.attach(model, case.method).save(path))
        gl.attached(model).detach()
        for _ in range(5):
            method = json.loads(metadata["method"])
            for _ in range(rng.choice((1, 1, 2))):
                method = changed(method, rng.choice([*places(method)]), rng.choice(VALUES))
            store(tensors, path, metadata | {"method": json.dumps(method)})
            loaded += not refused(model, before, path)
    assert loaded < 30


TOO_LARGE = [
    gl.Adapter(r=10**12),
    gl.Adapter(r=10**6),
    gl.ParallelAdapter(r=10**9),
    gl.AdaMix(experts=10**9),
    gl.FLoRA(tasks=10**9, r=2),
    gl.FLoRA(tasks=10**6, r=2, form="add"),
    gl.AdapterFusion(10**5, gl.PfeifferAdapter(r=1)),
    gl.AdapterFusion(2, gl.PfeifferAdapter(r=10**9)),
    gl.LoRA(r=2) + gl.AdapterDrop(gl.Adapter(r=10**30), 1),
    gl.Sum((gl.PfeifferAdapter(r=1),) * 5000),
    gl.Sum((gl.NF4(),) * 3000),
]


@pytest.mark.parametrize("method", TOO_LARGE, ids=lambda method: repr(method)[:60])
def test_a_small_file_is_not_work_for_minutes(bert, saved, method):
    tensors, metadata = contents(saved)
    before = Snapshot(bert)
    store(tensors, saved, metadata | {"method": json.dumps(method.to_json())})
    start = time.process_time()
    assert refused(bert, before, saved)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("drawn", ["5", "null", "[[1]]", "[{}]", '["no.such"]'])
def test_what_was_drawn_is_a_list_of_names(bert, saved, drawn):
    tensors, metadata = contents(saved)
    before = Snapshot(bert)
    store(tensors, saved, metadata | {"drawn": drawn})
    assert refused(bert, before, saved)


def test_no_more_is_made_than_a_file_holds(bert, saved, monkeypatch):
    """And no random numbers are drawn for what its tensors cannot be."""
    tensors, metadata = contents(saved)
    store(tensors, saved, metadata | {"method": json.dumps(gl.Adapter(r=50_000).to_json())})
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda *args, **kwargs: pytest.fail("drawn"))
    with pytest.raises(
        ValueError, match=r"a.safetensors' does not fit: the file holds less than Adapter\(r=50000"
    ):
        gl.load(bert, saved)


@pytest.mark.parametrize("method", TOO_LARGE, ids=lambda method: repr(method)[:60])
def test_what_no_memory_holds_is_refused_before_it_is_made(bert, method):
    before, start = Snapshot(bert), time.process_time()
    with pytest.raises(ValueError, match="must make (at most [0-9,]* numbers|fewer tensors) beside this"):
        gl.attach(bert, method)
    assert time.process_time() - start < 3
    before.check()


def test_a_block_of_four_bits_has_a_bound():
    with pytest.raises(ValueError, match="block must be an even whole number from 2 to 1,048,576, got 1000"):
        gl.NF4(block=10**12)


TEXTS = ["[" * 100_000, '{"type": "LoRA", "r": 1' + "0" * 5000 + "}", '{"type":' * 5000]


@pytest.mark.parametrize("text", TEXTS, ids=["deep", "long", "open"])
def test_json_that_is_too_deep_or_too_long(bert, saved, text):
    tensors, metadata = contents(saved)
    before = Snapshot(bert)
    for key in ("method", "base"):
        store(tensors, saved, metadata | {key: text})
        assert refused(bert, before, saved)


NONE = [{"weights": "x"}, {"weights": ""}, {"weights": 3}, {"rounded": "int8"}, {"rounded": []}]


@pytest.mark.parametrize("change", [*NONE, {"shapes": None}, {"model_type": 1}], ids=str)
def test_a_base_that_is_none(bert, saved, change):
    tensors, metadata = contents(saved)
    before = Snapshot(bert)
    base = json.loads(metadata["base"]) | change
    store(tensors, saved, metadata | {"base": json.dumps(base)})
    assert refused(bert, before, saved)


def test_an_interrupt_while_loading_leaves_the_model_as_it_was(bert, saved, monkeypatch):
    bert(**batch("tiny-bert")).loss.backward()
    before = Snapshot(bert)

    def interrupted(self, tensors):
        fill(self, tensors)
        raise KeyboardInterrupt

    fill = gl.Attachment._fill
    monkeypatch.setattr(gl.Attachment, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gl.load(bert, saved)
    before.check()


# writing


@pytest.fixture
def attachment():
    return gl.attach(build("tiny-bert"), gl.LoRA(r=2))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0, 0o666)])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(attachment, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = attachment.save(tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


def test_a_file_that_is_replaced_passes_on_its_permissions(attachment, tmp_path):
    path = attachment.save(tmp_path / "a.safetensors")
    path.chmod(0o604)
    attachment.save(path)
    assert path.stat().st_mode & 0o777 == 0o604


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(attachment, tmp_path, there):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "real.safetensors", tmp_path / "a.safetensors"
    if there:
        target.write_bytes(b"old")
    link.symlink_to(Path("store") / "real.safetensors")
    assert attachment.save(link) == link and link.is_symlink()
    assert [*target.parent.iterdir()] == [target] and not target.is_symlink()
    gl.load(build("tiny-bert"), link)
    with pytest.raises(FileNotFoundError, match="the folder '.*' does not exist"):
        (tmp_path / "b").symlink_to(tmp_path / "nowhere" / "b")
        attachment.save(tmp_path / "b")


def test_a_file_is_on_the_disk_before_it_is_in_its_place(attachment, tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a))[1])
    attachment.save(tmp_path / "a.safetensors")
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, and the folder that holds the name


def test_what_a_killed_process_left_goes(attachment, tmp_path, monkeypatch):
    path = tmp_path / "[a]*.safetensors"
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(
                "guidelib.core.files._sync", lambda path: os.kill(os.getpid(), signal.SIGKILL)
            )
            attachment.save(path)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".b.safetensors.1234.partial"
    other.mkdir()
    attachment.save(path)
    assert left.name.endswith(".partial") and {*tmp_path.iterdir()} == {path, other}
    gl.load(build("tiny-bert"), path)


def test_what_another_one_is_writing_stays(attachment, tmp_path, monkeypatch):
    """Two at once: each writes its own, and the last one to end has it."""
    path, sync = tmp_path / "a.safetensors", files._sync

    def meanwhile(file):
        monkeypatch.setattr(files, "_sync", sync)
        files.write(path, {"b": torch.ones(1)}, {"format": "another"})
        assert {*tmp_path.iterdir()} == {path, file.parent} and contents(path)[1]["format"] == "another"
        sync(file)

    monkeypatch.setattr(files, "_sync", meanwhile)
    attachment.save(path)
    assert [*tmp_path.iterdir()] == [path] and contents(path)[1]["format"] == "guidelib 2"


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_is_one_sentence(attachment, tmp_path, existing):
    """The limit is real: the operating system refuses to write on."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.safetensors"
    if existing:
        attachment.save(path)
    before = path.read_bytes() if existing else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            attachment.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"path: '{path}' could not be written, and is as it was: " in str(error.value)
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == before


def test_a_folder_in_the_place_of_a_file(attachment, tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError, match="a.safetensors' could not be written, and is as it was: Is a dir"):
        attachment.save(tmp_path / "a.safetensors")
    assert [*tmp_path.iterdir()] == [tmp_path / "a.safetensors"]


def test_a_long_name(attachment, tmp_path):
    attachment.save(tmp_path / ("a" * 255))
    assert len([*tmp_path.iterdir()]) == 1


# sums


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-bart"])
@pytest.mark.parametrize("case", METHOD_CASES)
def test_a_method_beside_itself_is_saved_and_loaded(case, backbone, tmp_path):
    method, inputs, model = METHOD_CASES[case].method, batch(backbone), build(backbone)
    try:
        attachment = gl.attach(model, method + gl.LoRA(r=2) + replace(method))
    except ValueError as error:
        if backbone not in METHOD_CASES[case].refuses:
            closed = any(part.closed for part in gl.attach(model, method).parts)
            assert ("without gradients" if closed else "must stand first at") in str(error)
        return
    randomise(attachment)
    fresh = build(backbone)
    gl.load(fresh, attachment.save(tmp_path / "a.safetensors"))
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.parametrize("finished", [(), (0,), (1,), (0, 1), (2,)])
def test_mixtures_of_several_sizes_beside_one_another(finished, tmp_path):
    """How many experts a mixture has is known from the file alone: each mixture finds its own there."""
    inner = gl.AdaMix(r=2, experts=3) + gl.AdaMix(r=3, experts=4).on(layers=0)
    method = gl.AdaMix(r=4, experts=2) + inner.on(layers=[0, 1])
    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    attachment = gl.attach(model, method)
    mixtures = [method.methods[0], *method.methods[1].method.methods]
    mixtures[2] = mixtures[2].method
    for i in finished:
        mixtures[i].finish(attachment)
    randomise(attachment)
    fresh = build("tiny-gpt2")
    loaded = gl.load(fresh, attachment.save(tmp_path / "a.safetensors"))
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    sizes, expected = ([len(part.module.up) for part in a.parts] for a in (loaded, attachment))
    assert sizes == expected
