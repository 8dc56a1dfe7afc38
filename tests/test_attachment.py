"""Attaching, merging, saving and loading: the algebra of methods, wrong files, and failures midway."""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import dataclass, fields, replace

import pytest
import torch
from common import BACKBONES, DECODERS, METHOD_CASES, SEQ2SEQ, batch, build, outputs, randomise
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, BertConfig, BertModel

import guidelib as gl
from guidelib.core.anatomy import Anatomy
from guidelib.core.files import checksum
from guidelib.core.method import On, Spec, Sum
from guidelib.core.points.weight_delta import Delta, DeltaPart, WeightDelta
from guidelib.core.points.weight_space import WeightSpacePart
from guidelib.materials.backbones import MeanPoolClassifier


class Snapshot:
    """Whether a model is exactly as it was."""

    def __init__(self, model):
        self.model = model
        self.tensors = {name: t.clone() for name, t in model.state_dict().items()}
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.modules = [name for name, _ in model.named_modules()]
        self.gradients = {name: p.grad for name, p in model.named_parameters()}

    def check(self):
        state = self.model.state_dict()
        assert list(state) == list(self.tensors)
        assert all(torch.equal(state[name], tensor) for name, tensor in self.tensors.items())
        assert {name: p.requires_grad for name, p in self.model.named_parameters()} == self.flags
        assert [name for name, _ in self.model.named_modules()] == self.modules
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules())
        assert all(p.grad is self.gradients[name] for name, p in self.model.named_parameters())


@pytest.fixture
def bert():
    """A tiny BERT with a frozen parameter and a gradient, so that restoring either is seen."""
    model = build("tiny-bert")
    model(**batch("tiny-bert")).loss.backward()
    model.classifier.bias.requires_grad_(False)
    return model


@pytest.fixture
def saved(tmp_path):
    """A file with a trained LoRA of the tiny BERT."""
    attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=2))
    randomise(attachment)
    return attachment.save(tmp_path / "lora.safetensors")


def contents(path):
    with safe_open(path, "pt") as file:
        # copies: the tensors of an open file are views of the file
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata()  # noqa: SIM118


# attaching


def test_attaching_twice(bert):
    first = gl.attach(bert, gl.LoRA(r=2))
    for method in (gl.LoRA(r=2), gl.FullFineTuning()):
        with pytest.raises(
            ValueError, match=r"already carries LoRA\(r=2.*detach\(\) it first, or attach a sum"
        ):
            gl.attach(bert, method)
    assert gl.attached(bert) is first and len(first.parts) == 4
    first.detach()
    assert gl.attach(bert, gl.FullFineTuning()).parts == []


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-bart"])  # tied or not
@pytest.mark.parametrize("name", ["lora", "full", "said", "adapter"])
def test_a_vocabulary_resized_after_attaching_is_noticed_at_the_next_call(backbone, name, tmp_path):
    """What does not touch the embeddings goes on; detach gives the base back in its new size."""
    for size in (400, 350):  # of 384
        model, plain, inputs = build(backbone), build(backbone), batch(backbone)
        attachment = gl.attach(model, METHOD_CASES[name].method)
        randomise(attachment)
        if merged := name == "said" and size == 350 and backbone != "tiny-llama":  # which gets a new head
            attachment.merge()
        for each in (model, plain):
            each.resize_token_embeddings(size, mean_resizing=False)
        if name == "said" and not merged:
            with pytest.raises(ValueError, match="was resized to .* after IntrinsicSAID was attached; deta"):
                model(**inputs)
        else:
            outputs(model, inputs)
        for call in (attachment.count, attachment.merge, lambda: attachment.save(tmp_path / "x.safetensors")):  # noqa: B023
            with pytest.raises(ValueError, match="was resized or replaced after .* from .* to .*; detach"):
                call()
        assert list(tmp_path.iterdir()) == []
        attachment.detach()
        rows = min(size, 384)
        for key, tensor in plain.state_dict().items():
            there = model.state_dict()[key]
            assert torch.equal(tensor[:rows], there[:rows]) and tensor.shape == there.shape


def test_a_head_replaced_by_one_of_its_size_is_noticed():
    attachment = gl.attach(build("tiny-llama"), gl.IntrinsicSAID(d=200))
    for size in (400, 384):
        attachment.model.resize_token_embeddings(size, mean_resizing=False)
    with pytest.raises(ValueError, match="lm_head.weight was resized or replaced"):
        attachment.merge()
    attachment.detach()


SHARED = {  # two models that have layers in common, and what the message says of it
    "bert": ("tiny-bert", lambda model: model.encoder),
    "roberta": ("tiny-roberta", lambda model: model.encoder),
    "gpt2": ("tiny-gpt2", lambda model: model.transformer),
    "llama": ("tiny-llama", lambda model: model.model),
    "t5 stack": ("tiny-t5-random", lambda model: model.encoder),
    "bart": ("tiny-bart", lambda model: model.model),
    "two heads": ("tiny-bert", lambda model: MeanPoolClassifier(model.config, model.encoder).double()),
}


@pytest.mark.parametrize("which", SHARED)
@pytest.mark.parametrize("turned", [False, True])
def test_models_that_share_layers_carry_one_method_at_a_time(which, turned):
    backbone, share = SHARED[which]
    model = build(backbone)
    pair = [model, share(model)]
    first, second = reversed(pair) if turned else pair
    attachment, acting = gl.attach(first, gl.FullFineTuning()), [p.requires_grad for p in model.parameters()]
    words = f"shared with a {type(first).__name__}, which carries FullFineTuning.*detach.. it first"
    for method in (gl.FullFineTuning(), gl.LoRA(r=2)):
        with pytest.raises(ValueError, match=words):
            gl.attach(second, method)
    with pytest.raises(ValueError, match=words):
        gl.attach(copy.deepcopy(pair)[not turned], method)
    assert [p.requires_grad for p in model.parameters()] == acting
    attachment.detach()
    again = gl.attach(second, gl.FullFineTuning())
    again.detach()
    gl.attach(first, gl.FullFineTuning()).merge(permanent=True)
    gl.attach(second, gl.FullFineTuning()).detach()
    assert not any("_guidelib" in name for each in pair for m in each.modules() for name in vars(m))


@pytest.mark.parametrize("other", [gl.LoRA, None, "LoRA", {"r": 8}, [gl.LoRA()]], ids=str)
def test_attaching_something_else(bert, other):
    before = Snapshot(bert)
    with pytest.raises(TypeError) as error:
        gl.attach(bert, other)
    assert "method must be a guidelib method such as LoRA(r=8)" in str(error.value)
    assert ("write LoRA() to make one" in str(error.value)) == (other is gl.LoRA)
    before.check()


def test_nothing_attached(bert):
    with pytest.raises(ValueError, match=r"carries no method; call guidelib.attach\(model, method\)"):
        gl.attached(bert)


@pytest.mark.parametrize("n", [0, 1, 5, 11])
def test_a_part_that_fails_takes_all_of_it_back(bert, monkeypatch, n):
    before, plugs = Snapshot(bert), []
    plug = DeltaPart.plug

    def failing(self):
        if len(plugs) == n:
            raise MemoryError("no room")
        plugs.append(self.name)
        plug(self)

    monkeypatch.setattr(DeltaPart, "plug", failing)
    with pytest.raises(MemoryError, match="no room"):
        gl.attach(bert, gl.LoRA(r=2, targets="all") + gl.FullFineTuning())
    assert len(plugs) == n
    before.check()
    monkeypatch.undo()
    assert len(gl.attach(bert, gl.LoRA(r=2)).parts) == 4


def test_a_method_that_fails_while_it_is_built(bert):
    before = Snapshot(bert)
    with pytest.raises(ValueError, match="unknown 'FAKE'"):
        gl.attach(bert, gl.LoRA(r=2) + gl.LoRA(r=2, targets="FAKE"))
    before.check()


def test_an_attachment_that_has_ended_says_so(bert, tmp_path):
    attachment = gl.attach(bert, gl.LoRA(r=2))
    attachment.detach()
    actions = (attachment.merge, attachment.unmerge, attachment.detach, attachment.count)
    for action in (*actions, lambda: attachment.save(tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match="this attachment has ended"):
            action()
    assert not any(tmp_path.iterdir())


def test_replicas_of_data_parallel_are_refused():
    """All of them would act with the first device's parts."""
    model = build("tiny-bert")
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, got DataParallel"):
        gl.attach(torch.nn.DataParallel(model), gl.LoRA(r=2))
    attachment = gl.attach(model, gl.LoRA(r=2))

    def replicate():
        return [module._replicate_for_data_parallel() for module in model.modules()]

    with pytest.raises(RuntimeError, match="LoRA cannot act in the replicas.*torchrun or accelerate"):
        replicate()
    attachment.merge()
    assert len(replicate()) == len([*model.modules()])
    attachment.detach()
    gl.attach(model, gl.FullFineTuning())
    replicate()


def test_training_mode_reaches_the_parts():
    model = build("tiny-bert").train()
    attachment = gl.attach(model, gl.LoRA(r=2))
    assert all(part.delta.training for part in attachment.parts)
    model.eval()
    assert not any(part.delta.training for part in attachment.parts)


def test_the_count_reads_well():
    text = str(gl.attach(build("tiny-bert"), gl.LoRA(r=2)).count())
    assert (
        "trainable 578 (" in text and "66 in the head" in text and "0 in norms" in text
    )  # 4 * 2 * 64 + 33 * 2


def test_counts_of_full_fine_tuning():
    count = gl.attach(build("tiny-bert"), gl.FullFineTuning()).count()
    assert count.norms == 5 * 2 * 32 and count.trainable == count.stored == count.changed == count.total


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_an_entry_that_two_methods_change_is_counted_once(backbone):
    twice = gl.attach(build(backbone), gl.LoRA(r=2) + gl.LoRA(r=3)).count()
    once = gl.attach(build(backbone), gl.LoRA(r=2)).count()
    assert twice.changed == once.changed == 2 * 2 * 32 * 32 + once.head
    both = gl.attach(build(backbone), gl.LoRA(r=2) + gl.FullFineTuning()).count()
    assert both.changed == both.total


# the algebra


def test_sums_are_flat():
    a, b, c = gl.LoRA(r=1), gl.LoRA(r=2), gl.HeadOnly()
    assert (a + b) + c == a + (b + c) == Sum((a, b, c))
    assert a + b != b + a
    assert hash(a + b) == hash(gl.LoRA(r=1) + gl.LoRA(r=2))
    for other in (1, "lora", gl.LoRA, None):
        with pytest.raises(TypeError):
            a + other


def test_equality_of_methods():
    assert gl.LoRA() == gl.LoRA(r=8, alpha=8, targets=["q", "v"]) and gl.LoRA(targets="q") == gl.LoRA(
        targets=("q",)
    )
    assert gl.LoRA(r=4) != gl.LoRA(r=8) and gl.FullFineTuning() == gl.FullFineTuning() != gl.HeadOnly()
    with pytest.raises(AttributeError):
        gl.LoRA().r = 4


def test_on_is_a_value_too():
    assert gl.LoRA().on(layers=[0, 1]) == gl.LoRA().on(layers=range(2)) == On(gl.LoRA(), (0, 1), None)
    assert (
        gl.LoRA().on(layers=-1) == On(gl.LoRA(), (-1,), None)
        and gl.LoRA().on(stack="encoder") != gl.LoRA().on()
    )


def test_on_restricts_every_part_of_a_sum_and_nests():
    model = build("tiny-bart")
    method = (gl.LoRA(r=1, targets="q") + gl.LoRA(r=2, targets="v")).on(stack="decoder").on(layers=-1)
    names = [part.site.name for part in gl.attach(model, method).parts]
    assert names == [f"decoder.1.{kind}.{role}" for role in "qv" for kind in ("self", "cross")]


METHODS = {f"METHODS: {name}": getattr(gl, name)() for names in gl.METHODS.values() for name in names}
ALL_METHODS = METHODS | {name: case.method for name, case in METHOD_CASES.items()}


@pytest.mark.parametrize("name", ALL_METHODS)
def test_a_method_survives_json(name):
    method = ALL_METHODS[name]
    again = Spec.from_json(json.loads(json.dumps(method.to_json())))
    assert again == method and type(again) is type(method) and hash(again) == hash(method)
    assert repr(again) == repr(method)


@pytest.mark.parametrize("name", METHODS)
def test_true_is_no_number(name):
    method = METHODS[name]
    values = {f.name: getattr(method, f.name) for f in fields(method)}
    for field in (field for field, value in values.items() if type(value) in (int, float)):
        with pytest.raises(ValueError, match="got True"):
            replace(method, **{field: True})


def test_every_method_is_listed_and_has_a_case():
    listed = {name for names in gl.METHODS.values() for name in names}
    assert listed <= set(gl.__all__)
    described = json.dumps([case.method.to_json() for case in METHOD_CASES.values()])
    assert all(f'"{name}"' in described for name in listed)


# merging


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_permanent_merge_leaves_an_ordinary_model(backbone, tmp_path):
    model, inputs = build(backbone), batch(backbone)
    plain = Snapshot(build(backbone))
    attachment = gl.attach(model, gl.LoRA(r=2, targets="all"))
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge(permanent=True)
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert list(model.state_dict()) == list(plain.tensors)
    assert [name for name, _ in model.named_modules()] == plain.modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == plain.flags
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="this attachment has ended"):
        attachment.unmerge()

    merged = outputs(model, inputs)
    model.save_pretrained(tmp_path / "merged")
    assert sorted(os.listdir(tmp_path / "merged"))[0] == "config.json"
    build(backbone).save_pretrained(tmp_path / "base")
    names, sizes = zip(*(_names_and_size(tmp_path / folder) for folder in ("merged", "base")), strict=True)
    assert names[0] == names[1] and sizes[0] == sizes[1]
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (
        outputs(again, inputs) - merged
    ).abs().max() < 1e-12  # products may round by where the memory lies


def _names_and_size(folder):
    path = folder / "model.safetensors"
    tensors, _ = contents(path)
    assert not any("guidelib" in name or "lora" in name.lower() for name in tensors)
    return {name: t.shape for name, t in tensors.items()}, path.stat().st_size


def test_a_merge_after_a_merge_can_be_made_permanent():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    attachment.merge()
    merged = outputs(model, inputs)
    attachment.merge(permanent=True)
    assert torch.equal(outputs(model, inputs), merged) and not hasattr(model, "guidelib")


def test_the_file_is_the_same_merged_or_not(tmp_path):
    attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=2))
    randomise(attachment)
    first, metadata = contents(attachment.save(tmp_path / "a.safetensors"))
    attachment.merge()
    second, same = contents(attachment.save(tmp_path / "b.safetensors"))
    assert metadata == same and first.keys() == second.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


@pytest.mark.parametrize("method", [gl.ReLoRA(r=2), gl.LoRA(r=2) + gl.FullFineTuning()])
def test_saving_while_merged_does_not_store_the_effect_twice(method, tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, method)
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge()
    path = attachment.save(tmp_path / "a.safetensors")
    assert attachment.merged
    fresh = build("tiny-bert")
    gl.load(fresh, path)
    assert (outputs(fresh, inputs) - acting).abs().max() < 1e-12


def test_what_cannot_be_merged_says_why(monkeypatch):
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=2) + gl.LoRA(r=2, targets="ffn"))
    randomise(attachment)
    last = attachment.parts[-1]
    monkeypatch.setattr(DeltaPart, "mergeable", property(lambda part: part is not last))
    before, acting = copy.deepcopy(model.state_dict()), outputs(model, batch("tiny-bert"))
    with pytest.raises(ValueError, match="Sum cannot be merged: .*ffn.*has no bias"):
        attachment.merge()
    assert not attachment.mergeable and not attachment.merged
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(outputs(model, batch("tiny-bert")), acting)


@dataclass(frozen=True)
class Growing(gl.Method):
    """Every parameter of the model times one number."""

    def parts(self, anatomy, saved):
        return [Grown(self, anatomy.model, anatomy.parameters())]


class Grown(WeightSpacePart):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def effective(self, name, weight):
        return self.factor * weight


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_parameter_can_be_replaced_while_the_model_runs(backbone):
    """Tied embeddings, norms and position tables included; with checkpointing, and after a failure."""
    model, inputs = build(backbone), batch(backbone)
    before, parameters = outputs(model, inputs), dict(model.named_parameters())
    attachment = gl.attach(model, Growing())
    (part,) = attachment.parts
    assert torch.equal(outputs(model, inputs), before)
    with torch.no_grad():
        part.factor.fill_(1.01)
    loss = model(**inputs).loss
    (gradient,) = torch.autograd.grad(loss, part.factor)
    factor = part.factor.detach().clone().requires_grad_()
    part.unplug()
    grown = {name: factor * p.detach() for name, p in parameters.items()}
    defined = torch.func.functional_call(model, grown, kwargs=inputs).loss
    assert abs(defined - loss) < 1e-12
    assert abs(torch.autograd.grad(defined, factor)[0] - gradient) < 1e-10 * (1 + abs(gradient))
    part.plug()

    model.train()
    gl.checkpointing(model)
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    assert part.factor.grad.abs() > 0
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        model(input_ids=torch.full((1, 2), 10**6))
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    gl.checkpointing(model, on=False)
    model.eval()
    acting = outputs(model, inputs)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert attachment.count().changed == sum(p.numel() for p in parameters.values())
    attachment.detach()
    assert torch.equal(outputs(model, inputs), before)


@dataclass(frozen=True)
class Doubling(WeightDelta):
    """W' = 2 W (+ a b'): not additive, and with a bias of its own."""

    targets: tuple[str, ...] = ("q",)
    shift: bool = False

    def build(self, site):
        return Doubled(site, self.shift)


class Doubled(Delta):
    additive = False

    def __init__(self, site, shift):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.moves_bias = shift

    def effective(self, weight, bias):
        return self.factor * weight, bias + 1 if self.moves_bias else bias

    def adjust(self, x, y, weight, bias):
        return y + (self.factor - 1) * torch.nn.functional.linear(x, weight) + self.moves_bias


def test_an_update_that_reads_the_weight_must_come_first():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    before = outputs(model, inputs)
    with pytest.raises(ValueError, match="Doubling must stand first at encoder.0.self.q.*LoRA acts there"):
        gl.attach(model, gl.LoRA(r=2) + Doubling())
    assert torch.equal(outputs(model, inputs), before) and not hasattr(model, "guidelib")
    attachment = gl.attach(model, Doubling() + gl.LoRA(r=2))
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12


def test_a_layer_without_a_bias_cannot_be_merged_with_one():
    attachment = gl.attach(build("tiny-bert"), Doubling(shift=True))
    acting = outputs(attachment.model, batch("tiny-bert"))
    attachment.merge()
    assert (outputs(attachment.model, batch("tiny-bert")) - acting).abs().max() < 1e-12
    attachment = gl.attach(build("tiny-llama"), Doubling(shift=True))
    with pytest.raises(ValueError, match="Doubling cannot be merged.*no bias"):
        attachment.merge()
    assert gl.attach(build("tiny-llama"), Doubling()).mergeable


def test_parts_know_their_method():
    one, two = gl.LoRA(r=2), gl.LoRA(r=2, targets="ffn")
    attachment = gl.attach(build("tiny-bert"), one + two)
    assert [len(attachment.parts_of(m)) for m in (one, two, gl.LoRA(r=2))] == [4, 4, 0]
    attachment = gl.attach(build("tiny-bert"), one.on(layers=0) + one.on(layers=1))
    low, high = attachment.method.methods
    assert low.method == high.method == one
    assert [[p.place for p in attachment.parts_of(m.method)] for m in (low, high)] == [
        [f"encoder.{layer}.self.{role}" for role in "qv"] for layer in (0, 1)
    ]


def test_what_a_method_rewrites_is_kept_saved_and_given_back(tmp_path):
    @dataclass(frozen=True)
    class Rewriting(gl.LoRA):
        def rewrites(self, anatomy):
            names = {id(p): n for n, p in anatomy.parameters().items()}
            return {names[id(site.module.weight)] for site in anatomy.linears(self.targets)}

    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    before = outputs(model, inputs)
    method = Rewriting(r=2, targets="q")
    attachment = gl.attach(model, method.on(layers=0))
    weight = model.transformer.h[0].attn.c_attn.weight
    assert not weight.requires_grad
    plain = gl.attach(build("tiny-gpt2"), gl.LoRA(r=2, targets="q").on(layers=0)).count()
    assert attachment.count().changed == plain.changed
    assert attachment.count().stored == plain.stored + weight.numel()
    with torch.no_grad():
        weight.add_(1)
    assert torch.equal(attachment.state()["transformer.h.0.attn.c_attn.weight"], weight)
    attachment.detach()
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_two_updates_of_the_same_weight_add_up(backbone):
    model, inputs = build(backbone), batch(backbone)
    base = outputs(model, inputs)
    method = gl.LoRA(r=2) + gl.LoRA(r=3, alpha=5, targets=("q", "k")) + gl.LoRA(r=1, targets="q")
    attachment = gl.attach(model, method)
    randomise(attachment)
    names = [part.name for part in attachment.parts]
    assert len(set(names)) == len(names) == 4 + 4 + 2
    site = attachment.anatomy.restrict(0).linears("q")[0]
    deltas = [part.delta.delta() for part in attachment.parts if part.site.name == site.name]
    assert len(deltas) == 3
    acting, weight = outputs(model, inputs), site.weight.clone()
    attachment.merge()
    assert (site.weight - weight - sum(deltas)).abs().max() < 1e-12
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.unmerge()
    assert torch.equal(site.weight, weight)
    assert torch.equal(outputs(model, inputs), acting)  # to the bit: they act in the same order as before
    attachment.detach()
    assert torch.equal(outputs(model, inputs), base)


def test_fifty_merges_leave_a_16_bit_weight_as_it_was():
    """Where an update is added and subtracted again, bfloat16 drifts by 5e-2."""
    model = build("tiny-bert", dtype=torch.bfloat16)
    attachment = gl.attach(model, gl.LoRA(r=2, targets="all"))
    randomise(attachment)
    before = Snapshot(model)
    for _ in range(50):
        attachment.merge()
        attachment.unmerge()
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.tensors.items())
    attachment.merge()
    state = model.state_dict()
    query = "encoder.encoder.layer.0.attention.self.query.weight"
    assert state[query].dtype == torch.bfloat16 and not torch.equal(state[query], before.tensors[query])


# files


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_file_holds_the_method_and_nothing_of_the_base(backbone, tmp_path):
    attachment = gl.attach(build(backbone), gl.LoRA(r=2))
    tensors, metadata = contents(attachment.save(tmp_path / "a.safetensors"))
    assert sum(t.numel() for t in tensors.values()) == attachment.count().stored
    head = {"classifier.weight", "classifier.bias"} if backbone not in DECODERS + SEQ2SEQ else set()
    assert {name for name in tensors if not name.startswith("guidelib.")} == head
    assert metadata["format"] == "guidelib 2" and sum(map(len, metadata.values())) < 1500
    assert Spec.from_json(json.loads(metadata["method"])) == gl.LoRA(r=2)


def test_missing_files(bert, tmp_path):
    before = Snapshot(bert)
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="path: there is no file"):
            gl.load(bert, path)
    before.check()


def test_saving_into_a_folder_that_is_not_there(bert, tmp_path):
    attachment = gl.attach(bert, gl.LoRA(r=2))
    with pytest.raises(FileNotFoundError, match="path: the folder .*missing.* does not exist; make it first"):
        attachment.save(tmp_path / "missing" / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_path_may_be_a_string(bert, tmp_path):
    path = gl.attach(bert, gl.LoRA(r=2)).save(str(tmp_path / "a.safetensors"))
    assert path == tmp_path / "a.safetensors" and gl.load(build("tiny-bert"), str(path)).method == gl.LoRA(
        r=2
    )


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_while_saving_leaves_no_half_file(bert, tmp_path, monkeypatch, existing):
    attachment = gl.attach(bert, gl.LoRA(r=2))
    path = tmp_path / "a.safetensors"
    if existing:
        attachment.save(path)
    before = path.read_bytes() if existing else None

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr("guidelib.core.files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        attachment.save(path)
    assert list(tmp_path.iterdir()) == ([path] if existing else [])
    assert not existing or path.read_bytes() == before


def test_saving_over_a_file_replaces_it_in_one_go(tmp_path):
    """Who has the old file open keeps the old file, whole."""
    attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=2))
    path = attachment.save(tmp_path / "a.safetensors")
    before = path.read_bytes()
    randomise(attachment)
    with path.open("rb") as old:
        attachment.save(path)
        assert old.read() == before != path.read_bytes()


def store(tensors, path, metadata):
    """A file that is whole, whatever it says."""
    said = {name: text for name, text in metadata.items() if name != "checksum"}
    save_file(tensors, path, said | {"checksum": checksum(tensors, said)})


def corrupt(kind, path):
    data = path.read_bytes()
    tensors, metadata = contents(path)
    if kind == "truncated":
        path.write_bytes(data[:-100])
    elif kind == "header only":
        path.write_bytes(data[:8])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "random":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == "pickle":
        torch.save(tensors, path)
    elif kind == "of another library":
        save_file(tensors, path)
    elif kind == "of a later format":
        store(tensors, path, metadata | {"format": "guidelib 99"})
    elif kind == "renamed tensor":
        store({name.replace("_q", "_k"): t for name, t in tensors.items()}, path, metadata)
    elif kind == "missing tensor":
        store(dict(list(tensors.items())[1:]), path, metadata)
    elif kind == "further tensor":
        store(tensors | {"guidelib.more": torch.zeros(1)}, path, metadata)
    elif kind == "misshapen tensor":
        store({n: torch.cat((t, t)) for n, t in tensors.items()}, path, metadata)
    elif kind == "broken method":
        store(tensors, path, metadata | {"method": "{"})
    elif kind == "no method":
        store(tensors, path, {name: text for name, text in metadata.items() if name != "method"})
    elif kind == "no base":
        store(tensors, path, {name: text for name, text in metadata.items() if name != "base"})
    elif kind == "base without weights":
        base = json.loads(metadata["base"])
        store(tensors, path, metadata | {"base": json.dumps({"model_type": base["model_type"]})})
    else:
        method = {
            "unknown method": {"type": "Quantum"},
            "no method's name": {"type": "load_backbone"},
            "a class that is no method": {"type": "Task"},
            "unknown field": gl.LoRA(r=2).to_json() | {"rslora": True},
            "impossible value": gl.LoRA(r=2).to_json() | {"r": 0},
            "value of another type": gl.LoRA(r=2).to_json() | {"r": "2"},
            "sum of nothing": {"type": "Sum", "methods": [3]},
            "sum without terms": {"type": "Sum"},
            "list": [gl.LoRA(r=2).to_json()],
        }[kind]
        store(tensors, path, metadata | {"method": json.dumps(method)})


CORRUPTIONS = {
    **dict.fromkeys(
        ("truncated", "header only", "empty", "random", "pickle"), "is damaged or no safetensors file"
    ),
    "broken method": "is damaged",
    **dict.fromkeys(("of another library", "of a later format"), "was not saved by guidelib"),
    **dict.fromkeys(
        ("renamed tensor", "missing tensor", "further tensor", "misshapen tensor"), "does not fit: tensor"
    ),
    "unknown method": "'Quantum' is unknown to guidelib",
    "no method's name": "'load_backbone' is unknown to guidelib",
    "a class that is no method": "'Task' is unknown to guidelib",
    "unknown field": "method LoRA: 'rslora' is unknown",
    "impossible value": "r must be a whole number",
    "value of another type": "r must be a whole number",
    **dict.fromkeys(
        ("no method", "no base", "base without weights", "list", "sum of nothing", "sum without terms"),
        "is damaged|methods must",
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_file_that_is_not_right(bert, saved, kind):
    before = Snapshot(bert)
    corrupt(kind, saved)
    with pytest.raises(ValueError, match=CORRUPTIONS[kind]) as error:
        gl.load(bert, saved)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)
    before.check()


def wider_bert():
    config = AutoConfig.for_model(
        "bert",
        vocab_size=384,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return AutoModel.from_config(config)


OTHERS = {
    "architecture": lambda: build("tiny-roberta"),
    "shapes": wider_bert,
    "weights": lambda: build("tiny-bert", seed=1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_backbone(saved, what):
    model = OTHERS[what]()
    before = Snapshot(model)
    with pytest.raises(
        ValueError, match=f"lora.safetensors' belongs to another backbone: its {what} "
    ) as error:
        gl.load(model, saved)
    assert "any_weights" not in str(error.value)  # nobody is asked to try numbers that are wrong
    if what != "weights":
        with pytest.raises(ValueError, match="belongs to another backbone"):
            gl.load(model, saved, any_weights=True)
    before.check()


def test_any_weights_accepts_a_base_of_the_same_shapes(saved):
    model = build("tiny-bert", seed=1)
    attachment = gl.load(model, saved, any_weights=True)
    tensors, _ = contents(saved)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in attachment.state().items())
    assert (
        outputs(model, batch("tiny-bert")) - outputs(build("tiny-bert", seed=1), batch("tiny-bert"))
    ).abs().max() > 0


def test_loading_onto_a_model_that_carries_a_method(saved):
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=2))
    with pytest.raises(ValueError, match="already carries"):
        gl.load(model, saved)
    assert gl.attached(model) is attachment


def test_a_file_of_a_32_bit_base_loads_on_a_16_bit_one(tmp_path):
    attachment = gl.attach(build("tiny-bert", dtype=torch.float32), gl.LoRA(r=2))
    randomise(attachment)
    path = attachment.save(tmp_path / "a.safetensors")
    loaded = gl.load(build("tiny-bert", dtype=torch.bfloat16), path)
    assert torch.equal(loaded.parts[0].delta.B, attachment.parts[0].delta.B)


def test_a_loaded_method_can_be_trained_on_and_detached(saved):
    model = build("tiny-bert")
    before = Snapshot(model)
    attachment = gl.load(model, saved)
    model(**batch("tiny-bert")).loss.backward()
    assert all(p.grad.abs().max() > 0 for part in attachment.parts for p in part.parameters())
    attachment.detach()
    before.check()


def test_a_file_of_an_encoder_loads_onto_another_task_with_as_many_labels(saved):
    """The fingerprint leaves the head out; the file brings its own."""
    model = build("tiny-bert", seed=0)
    with torch.no_grad():
        model.classifier.weight.normal_()
    gl.load(model, saved)
    assert torch.equal(model.classifier.weight, contents(saved)[0]["classifier.weight"])


def test_a_method_saved_without_head_is_refused_by_a_model_with_one(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
    )
    bare = BertModel(config, add_pooling_layer=False)
    path = gl.attach(bare, gl.LoRA(r=2)).save(tmp_path / "a.safetensors")
    gl.attached(bare).detach()
    with_head = MeanPoolClassifier(config, bare)
    before = Snapshot(with_head)
    with pytest.raises(ValueError):
        gl.load(with_head, path)
    before.check()


def test_full_fine_tuning_can_be_restricted_to_blocks():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.FullFineTuning().on(layers=-1))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = [name for name, _ in model.named_parameters()]
    assert trained == {name for name in names if ".layer.1." in name or name.startswith("classifier")}
    assert attachment.count().trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_merge_that_fails_halfway_leaves_the_weights_as_they_were(monkeypatch):
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    before, acting = copy.deepcopy(model.state_dict()), outputs(model, batch("tiny-bert"))

    def fail(keep):
        raise MemoryError

    monkeypatch.setattr(attachment.parts[-1], "merge", fail)
    with pytest.raises(MemoryError):
        attachment.merge()
    assert not attachment.merged
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, batch("tiny-bert")), acting)


def test_where_warnings_are_errors_the_model_stays_as_it_was(monkeypatch):
    model = build("tiny-bert")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    monkeypatch.setattr(
        Anatomy, "drawn", frozenset(n for n, _ in model.named_parameters() if ".layer.0." in n)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="came with no checkpoint"):
            gl.attach(model, gl.LoRA(r=2))
    assert not hasattr(model, "guidelib")
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_layer_that_is_not_plain_is_no_damaged_file(tmp_path):
    path = gl.attach(build("tiny-bert"), gl.DoRA(r=2)).save(tmp_path / "dora.safetensors")
    model = build("tiny-bert")
    layer = model.base_model.encoder.layer[0].attention.self.query
    layer.forward = lambda x: type(layer).forward(layer, x)
    with pytest.raises(ValueError, match="'dora.safetensors' does not fit: .* whose forward was replaced"):
        gl.load(model, path)


def test_a_head_that_was_taken_out_is_noticed_and_the_rest_given_back():
    model = build("tiny-bert")
    snapshot = {name: p.clone() for name, p in model.named_parameters() if "classifier" not in name}
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    model.classifier = torch.nn.Identity()
    for action in (attachment.count, attachment.merge, attachment.check):
        with pytest.raises(ValueError, match=r"classifier.weight was resized or replaced .* by nothing"):
            action()
    attachment.detach()
    now = dict(model.named_parameters())
    assert now.keys() == snapshot.keys() and all(torch.equal(now[n], p) for n, p in snapshot.items())
    assert all(p.requires_grad for p in now.values())


def test_an_attachment_that_has_ended_says_nothing_of_the_next_one():
    model = build("tiny-bert")
    ended = gl.attach(model, gl.LoRA(r=2))
    ended.detach()
    gl.attach(model, gl.Adapter(r=2))
    for look in ("parts", "mergeable", "state", "count"):
        with pytest.raises(ValueError, match="this attachment has ended"):
            getattr(ended, look)()


def test_what_is_merged_for_good_keeps_no_copies():
    attachment = gl.attach(build("tiny-bert"), gl.LoRA(r=2))
    attachment.merge(permanent=True)
    assert not attachment._kept and not attachment._originals


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_what_two_methods_change_in_a_fused_layer_counts_once(keep):
    model = build("tiny-gpt2")
    lora, mask = gl.LoRA(r=2, targets=("q", "k", "v")), gl.FishMask(keep=keep, targets=("q", "k", "v"))
    alone = gl.attach(model, lora).count().changed
    gl.attached(model).detach()
    both = gl.attach(model, mask + lora)
    (sparse,) = both.parts_of(both.method.methods[0])
    weights = sum(int(size) for size in sparse.sizes[::2])  # of each layer the weight comes first
    assert both.count().changed == alone + len(sparse.values) - weights


def test_a_file_says_what_was_drawn(tmp_path):
    config = BertConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config.intermediate_size = 64
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    base = BertModel.from_pretrained(tmp_path / "bare").double()  # its pooler is drawn
    ids = torch.arange(2, 20).view(2, 9)
    projected = (gl.IntrinsicSAID(d=64, scales=False), gl.IntrinsicSAID(d=64))
    for method in (*projected, gl.FishMask(keep=0.1), gl.LoRA(r=2)):
        attachment = gl.attach(base, method)
        assert {"pooler.dense.weight", "pooler.dense.bias"} <= attachment.state().keys()
        randomise(attachment)
        path, wanted = attachment.save(tmp_path / "file.safetensors"), base(ids).pooler_output
        attachment.detach()
        copied = copy.deepcopy(base)  # which no longer knows
        assert not Anatomy(copied).drawn
        gl.load(copied, path)
        assert torch.equal(copied(ids).pooler_output, wanted)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_rows_and_entries_of_one_map_count_once(backbone):
    model = build(backbone)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = gl.FAR(keep=0.1, targets=("q", "ffn.in"))
    attachment = gl.attach(model, rows + gl.FishMask(0.3, targets=("q", "k", "v", "ffn.in")))
    randomise(attachment)
    counted, head = attachment.count().changed, attachment.anatomy.head().keys()
    attachment.merge()
    changed = sum(int((p != base[name]).sum()) for name, p in model.named_parameters() if name in base)
    assert counted == changed + sum(
        int((base[n] == p).sum()) for n, p in model.named_parameters() if n in head
    )


def test_what_a_parametrization_has_taken_is_given_back():
    model = build("tiny-bert")
    head, key = model.classifier, model.base_model.encoder.layer[0].attention.self.key
    wanted = head.weight.detach().clone()
    attachment = gl.attach(model, gl.LoRA(r=2))
    for layer in (head, key):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    with torch.no_grad():
        head.parametrizations.weight.original.add_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attachment.detach()
    assert head.weight.equal(wanted) and all(p.requires_grad for p in model.parameters())
