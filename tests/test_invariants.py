"""What holds for every method on every kind of backbone.  The numbers are those of the list in
book/architecture.md."""

from __future__ import annotations

import copy
import linecache
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from common import (
    BACKBONES,
    DECODERS,
    ENCODERS,
    METHOD_CASES,
    SEQ2SEQ,
    SMALL,
    batch,
    build,
    outputs,
    padded_left,
    randomise,
    states,
)
from packaging.version import Version
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import guidelib as gl
from guidelib.core.anatomy import ADDED
from guidelib.core.method import within
from guidelib.core.points import passes
from guidelib.core.points.pruned import Pruned
from guidelib.core.points.weight_delta import DeltaPart
from guidelib.core.points.weight_space import WeightSpacePart
from guidelib.costs.step import count_step

CASES = [
    (case, backbone)
    for case in METHOD_CASES
    for backbone in BACKBONES
    if backbone not in METHOD_CASES[case].refuses
]
ON_BERT = [case for case, backbone in CASES if backbone == "tiny-bert"]
REFUSED = [(case, backbone) for case in METHOD_CASES for backbone in METHOD_CASES[case].refuses]


@pytest.fixture(params=CASES, ids=lambda pair: "-".join(pair))
def attached(request):
    """(case, backbone name, base outputs, attachment) with the method freshly attached to a float64 model."""
    name, backbone = request.param
    model = build(backbone)
    before = outputs(model, batch(backbone))
    return METHOD_CASES[name], backbone, before, gl.attach(model, METHOD_CASES[name].method)


def step(model, inputs, optimizer=None):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    if optimizer:
        optimizer.step()


def defined(model, inputs):
    """The loss by definition: torch itself runs the base model with the effective weights."""
    parameters, parts = dict(model.named_parameters()), gl.attached(model).parts
    names = {id(module): name for name, module in model.named_modules()}
    weights = {}
    for part in parts:
        if isinstance(part, WeightSpacePart):
            for name in part.replaced:
                weights[name] = part.effective(name, weights.get(name, parameters[name]))
        elif not isinstance(part, Pruned):  # which acts in the others
            write(weights, parameters, names[id(part.site.module)], part)
    for part in parts:
        part.unplug()
    loss = functional_call(model, weights, kwargs=inputs).loss
    for part in parts:
        part.plug()
    return loss


def write(weights, parameters, layer, part):
    """Put the effective weight and bias of a delta's layer into ``weights``."""
    site = part.site
    bias = weights.get(f"{layer}.bias", parameters.get(f"{layer}.bias"))
    if bias is None and part.delta.moves_bias:  # a layer without one gets one, for the definition's sake
        size = site.module.weight.shape[1 if type(site.module).__name__ == "Conv1D" else 0]
        site.module.bias = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        bias = site.module.bias
    weight = weights.get(f"{layer}.weight", parameters[f"{layer}.weight"])
    turned = type(site.module).__name__ == "Conv1D"
    weight = (weight.t() if turned else weight).clone()
    bias = None if bias is None else bias.clone()
    rows = slice(None) if site.rows is None else site.rows
    new_weight, new_bias = part.delta.effective(
        weight[rows].clone(), None if bias is None else bias[rows].clone()
    )
    weight[rows] = new_weight
    weights[f"{layer}.weight"] = weight.t() if turned else weight
    if bias is not None:
        bias[rows] = new_bias
        weights[f"{layer}.bias"] = bias


@pytest.mark.parametrize(("name", "backbone"), REFUSED)
def test_0_a_method_that_does_not_fit_is_refused_with_a_reason(name, backbone):
    model = build(backbone)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=METHOD_CASES[name].refuses[backbone]):
        gl.attach(model, METHOD_CASES[name].method)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert flags == [p.requires_grad for p in model.parameters()] and not hasattr(model, ADDED)


def test_1_identity_at_the_start(attached):
    case, backbone, before, attachment = attached
    change = (outputs(attachment.model, batch(backbone)) - before).abs().max()
    if case.identity == "exact":
        assert change == 0
    elif case.identity == "near":
        assert 0 < change < case.bound
    else:
        assert change > 1e-6


def test_2_merge_is_exact_and_unmerge_restores_the_bits(attached):
    _, backbone, before, attachment = attached
    model, inputs = attachment.model, batch(backbone)
    randomise(attachment)
    if not attachment.mergeable:
        with pytest.raises(ValueError, match="cannot be merged"):
            attachment.merge()
        return
    acting, weights = outputs(model, inputs), copy.deepcopy(model.state_dict())
    assert (acting - before).abs().max() > 1e-6  # or the rest would say nothing
    base = gl.costs.operations(build(backbone), inputs)
    assert (gl.costs.operations(model, inputs) > base) == bool(attachment.parts)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert gl.costs.operations(model, inputs) == base
    attachment.merge()  # a second time changes nothing
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.unmerge()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(outputs(model, inputs), acting)


def test_2_weight_space_and_activation_space_agree_in_value_and_gradient(attached):
    _, backbone, _, attachment = attached
    model, inputs = attachment.model, batch(backbone)
    parts = attachment.parts
    if not parts or not all(isinstance(part, DeltaPart | WeightSpacePart | Pruned) for part in parts):
        assert not parts or not attachment.mergeable
        return
    randomise(attachment)
    twice = backbone == "tiny-bert"  # enough to see that the second derivatives agree as well
    if twice:
        model.set_attn_implementation("eager")  # the fused one has none
    wanted = list({id(p): p for part in parts for p in part.parameters() if p.requires_grad}.values())

    def gradients(loss):
        first = torch.autograd.grad(loss, wanted, create_graph=twice)
        size = sum(g.square().sum() for g in first)
        return first, torch.autograd.grad(size, wanted, materialize_grads=True) if twice else ()

    fast = model(**inputs).loss
    fast_gradients = gradients(fast)
    definition = defined(model, inputs)
    assert abs(fast - definition) < 1e-12
    for mine, theirs in zip(fast_gradients, gradients(definition), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).abs().max() < 1e-12


def test_3_gradients_reach_what_is_trained_and_nothing_else(attached):
    case, backbone, _, attachment = attached
    model, inputs = attachment.model, batch(backbone)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    reached = set()
    for _ in range(2):  # two steps: the factor that starts at zero hides the other one at the first
        step(model, inputs, optimizer)
        reached |= {n for n, p in trainable.items() if p.grad is not None and p.grad.abs().max() > 1e-12}
    assert {name for name in trainable.keys() - reached if not case.silent(name)} == set()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ON_BERT)
def test_3_torch_func_gives_each_example_its_gradient_and_the_slope_along_a_direction(name):
    model = build("tiny-bert")
    model.set_attn_implementation("eager")
    randomise(gl.attach(model, METHOD_CASES[name].method))
    inputs = batch("tiny-bert", padded=False)
    del inputs["attention_mask"]  # transformers looks into it
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(weights, example):
        return functional_call(model, weights, kwargs={key: row[None] for key, row in example.items()}).loss

    gradients = vmap(grad(loss), (None, 0))(weights, inputs)
    for i in range(3):
        model.zero_grad()
        example = {key: rows[i] for key, rows in inputs.items()}
        model(**{key: row[None] for key, row in example.items()}).loss.backward()
        for name, gradient in gradients.items():
            expected = model.get_parameter(name).grad
            assert (gradient[i] - (0 if expected is None else expected)).abs().max() < 1e-12, name
    along = {n: torch.full_like(w, 0.5) for n, w in weights.items()}
    _, slope = jvp(lambda weights: loss(weights, example), (weights,), (along,))
    assert abs(slope - sum(g[2].sum() / 2 for g in gradients.values())) < 1e-10


def test_4_counts_are_consistent(attached):
    _, _, _, attachment = attached
    model, count = attachment.model, attachment.count()
    assert count.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.stored == sum(t.numel() for t in attachment.state().values())
    assert count.total == sum(p.numel() for p in build_like(model).parameters())
    assert count.head == sum(p.numel() for p in attachment.anatomy.head().values())
    assert 0 < count.trainable and count.head <= count.stored


def build_like(model):
    return type(model)(model.config)


def test_6_nothing_else_moves(attached):
    """Weight decay and Adam's moments are what moves masked or frozen entries when something is wrong."""
    _, backbone, _, attachment = attached
    model, inputs = attachment.model, batch(backbone)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        step(model, inputs, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())


@pytest.mark.parametrize(("name", "backbone"), CASES)
def test_16_the_costs_are_predicted_without_the_weights(name, backbone):
    method, inputs = METHOD_CASES[name].method, batch(backbone)
    predicted = gl.predict(backbone, method, batch=3, length=9, target_length=5, padded=True)
    model = build(backbone, dtype=torch.float32)
    attachment = gl.attach(model, method)
    if backbone == BACKBONES[0]:
        assert predicted == gl.measure(model, inputs)
    else:  # without the prediction that measure makes besides
        assert predicted.predicted == count_step(model, inputs)
        assert predicted.count == attachment.count()


def test_8_what_stands_under_the_padding_does_not_matter(attached):
    _, backbone, _, attachment = attached
    randomise(attachment)
    inputs = batch(backbone)
    other = inputs | {"input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 77)}
    assert not torch.equal(inputs["input_ids"], other["input_ids"])
    a, b = outputs(attachment.model, inputs), outputs(attachment.model, other)
    if backbone in DECODERS:  # the logits at padded positions are nobody's
        a, b = (logits[inputs["attention_mask"] == 1] for logits in (a, b))
    assert (a - b).abs().max() < 1e-12


def test_8_nor_does_it_how_much_padding_stands_on_the_left(attached):
    """Neither do the neighbours in a batch.  BART counts padding as positions, whatever is attached."""
    _, backbone, _, attachment = attached
    if backbone == "tiny-bart":
        return
    model, inputs = attachment.model, batch(backbone)
    randomise(attachment)
    short = {k: v[-1:, :6] for k, v in inputs.items() if k != "labels"} | {"labels": inputs["labels"][-1:]}
    if backbone in DECODERS:
        short["labels"] = short["labels"][:, :6]
    alone, at_right = states(model, short), states(model, inputs)[-1:]
    left = padded_left(model, short, 3)
    together = {k: torch.cat((v[:1], left[k])) for k, v in padded_left(model, inputs, 0).items()}
    at_left = states(model, together)[-1:]
    if backbone not in SEQ2SEQ:
        at_right, at_left = at_right[:, :6], at_left[:, 3:]
    assert (at_right - alone).abs().max() < 1e-12 and (at_left - alone).abs().max() < 1e-12


def test_9_generation_is_the_same_with_and_without_cache(attached):
    _, backbone, _, attachment = attached
    model = attachment.model
    if backbone in ENCODERS:
        assert not model.can_generate()
        return
    randomise(attachment)
    inputs = batch(backbone)
    inputs.pop("labels")
    if backbone in DECODERS:  # the last text again, behind its padding
        inputs = {k: torch.cat((v[:-1], v[-1:].roll(3, 1))) for k, v in inputs.items()}
    for beams in (1, 2):
        settings = dict(max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0)
        cached = model.generate(**inputs, **settings, use_cache=True)
        assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
        assert cached.shape[1] > 1


def test_10_a_saved_method_acts_the_same_on_a_fresh_base(attached, tmp_path):
    """And so it does where torch's default type is another one, in which the method also starts the same."""
    case, backbone, _, attachment = attached
    inputs = batch(backbone)
    started = {name: tensor.clone() for name, tensor in attachment.state().items()}
    randomise(attachment)
    expected, state = outputs(attachment.model, inputs), attachment.state()
    path = attachment.save(tmp_path / "method.safetensors")
    fresh = build(backbone)
    torch.set_default_dtype(torch.float64)
    try:
        again = gl.attach(fresh, case.method)
        assert all(torch.equal(started[name], tensor) for name, tensor in again.state().items())
        again.detach()
        with torch.no_grad():
            for parameter in gl.anatomy.Anatomy(fresh).head().values():
                parameter.normal_()  # the file has to bring the head
        torch.manual_seed(99)
        loaded = gl.load(fresh, path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert loaded.method == attachment.method
    assert torch.equal(outputs(fresh, inputs), expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state().items())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "backbone"), CASES[::3])
def test_10_a_file_loads_in_16_bits_and_back(name, backbone, tmp_path):
    """The base is rounded twice, which gives other bits than rounding it once."""
    attachment = gl.attach(build(backbone, dtype=torch.float32), METHOD_CASES[name].method)
    randomise(attachment)
    path, state = attachment.save(tmp_path / "method.safetensors"), attachment.state()
    for dtypes in ((torch.float16, torch.bfloat16), (torch.float32,)):
        model = build(backbone, dtype=torch.float32)
        for dtype in dtypes:
            model = model.to(dtype)
        loaded = gl.load(model, path)
        now = loaded.state()
        assert now.keys() == state.keys()
        assert all(torch.equal(now[name], tensor.to(now[name].dtype)) for name, tensor in state.items())
        path, state = loaded.save(path), now


def test_11_checkpointing_gives_the_same_gradients(attached):
    _, backbone, _, attachment = attached
    model, inputs = attachment.model, batch(backbone)
    randomise(attachment)
    model.train()  # with dropout, whose draws have to be repeated in the recomputation
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            gl.checkpointing(model)
            for module in model.modules():  # in either of torch's ways
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        step(model, inputs)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    wanted, *others = gradients
    for found in others:
        assert wanted.keys() == found.keys() and wanted
        for name, gradient in wanted.items():
            assert (gradient - found[name]).abs().max() < 1e-12, name


def leaves(model):
    return [module for module in model.modules() if not list(module.children())]


def test_12_a_pass_leaves_nothing_behind_and_others_may_run_beside_it(attached):
    """Whether it ends or is broken off; and eight threads, each with other texts, meet in every layer."""
    _, backbone, _, attachment = attached
    randomise(attachment)
    model, n = attachment.model, 8
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    inputs = [batch(backbone, rows=2, length=4 + i) for i in range(n)]
    alone = [outputs(model, x) for x in inputs]
    meet = threading.Barrier(n, timeout=60)

    def stop(module, args):
        raise KeyboardInterrupt

    reached = 0
    for module in leaves(model)[::5]:
        handle = module.register_forward_pre_hook(stop)
        try:
            model(**inputs[0])  # with a graph
        except KeyboardInterrupt:
            reached += 1
        handle.remove()
        assert passes.notes() == {}
    assert reached > 3 and (outputs(model, inputs[0]) - alone[0]).abs().max() < 1e-12

    results = [None] * n

    def serve(i):
        try:
            results[i] = [outputs(model, inputs[i]) for _ in range(2)], dict(passes.notes())
        except BaseException as error:
            meet.abort()
            results[i] = error

    def wait(module, args):
        meet.wait()

    handles = [module.register_forward_pre_hook(wait) for module in leaves(model)]
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.remove()
    for i, result in enumerate(results):
        assert not isinstance(result, BaseException), repr(result)
        passed, left = result
        assert all((logits - alone[i]).abs().max() < 1e-12 for logits in passed) and left == {}
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


LIBRARY = (str(Path(gl.__file__).parent),)
LIBRARY_AND_TORCH = *LIBRARY, torch.nn.modules.module.__file__


def at_lines(action, files, reach):
    """Run ``action`` and call ``reach(frame)`` just before each line of ``files`` that it comes by."""

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(files):
            return None
        if event == "line":
            reach(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)


def every_line(action, files):
    """For each line the first time that ``action`` comes by, and with torch's lines the last time, too: after
    how many others."""
    seen = []
    at_lines(action, files, lambda frame: seen.append((frame.f_code.co_filename, frame.f_lineno)))

    def of(file, line):
        return linecache.getline(file, line).strip()

    first = {line: i for i, line in reversed([*enumerate(seen)])}
    # a second time at a "with" is its end, where Python itself would not break off
    last = {line: i for i, line in enumerate(seen) if not of(*line).startswith("with ")}
    last = last if files == LIBRARY_AND_TORCH else {}
    return sorted({*first.values(), *last.values()})


def break_off(action, files, n):
    """Run ``action`` and break off just before its line ``n``."""
    error, left = (KeyboardInterrupt, MemoryError)[n % 2], iter(range(n))

    def reach(frame):
        if next(left, None) is None:
            raise error

    with pytest.raises(error):
        at_lines(action, files, reach)


class Look:
    """All that a change of state may change: tensors, flags and what stands in the way of a pass."""

    def __init__(self, model):
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.flags = [p.requires_grad for p in model.parameters()]
        self.around = [self.of(module) for module in model.modules()]

    @staticmethod
    def of(module):
        forward = getattr(vars(module).get("forward"), "__self__", None)
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        return hooks, forward and forward.around

    def __eq__(self, other):
        same = (self.flags, self.around, [*self.tensors]) == (other.flags, other.around, [*other.tensors])
        return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())


BROKEN_OFF = {(case, "tiny-bert"): LIBRARY for case in ON_BERT} | {
    (case, backbone): LIBRARY_AND_TORCH
    for case, backbone in (
        *(("lora", "tiny-bert"), ("parallel-everywhere", "tiny-bart"), ("nf4-lora", "tiny-gpt2")),
    )
}


@pytest.mark.parametrize(("name", "backbone"), BROKEN_OFF)
def test_13_a_change_that_is_broken_off_at_any_line_is_not_begun_or_done(name, backbone):
    model, method, inputs = build(backbone), METHOD_CASES[name].method, batch(backbone)
    files, base = BROKEN_OFF[name, backbone], Look(model)
    fresh = copy.deepcopy(model)
    gl.attach(fresh, method).detach()  # what is cached is cached now
    for n in every_line(lambda: gl.attach(fresh, method), LIBRARY)[:: 1 if name == "lora" else 7]:
        break_off(lambda: gl.attach(model, method), LIBRARY, n)
        if hasattr(model, ADDED):
            gl.attached(model).detach()
        assert Look(model) == base, n
    attachment = gl.attach(model, method)
    randomise(attachment)
    beside, acting, starts = Look(model), outputs(model, inputs), [copy.deepcopy(model)]
    if attachment.mergeable:
        attachment.merge()
        merged = Look(model)
        starts.append(copy.deepcopy(model))
        attachment.unmerge()
        changes = (attachment.merge, attachment.unmerge), (attachment.unmerge, attachment.merge)
        for change, back in changes:
            for n in every_line(change, files):
                back()
                break_off(change, files, n)
                assert Look(model) == (merged if attachment.merged else beside), n
            back()
            change()
        assert Look(model) == beside and torch.equal(outputs(model, inputs), acting)
    for start in starts if files == LIBRARY_AND_TORCH else starts[-1:]:
        for n in every_line(gl.attached(copy.deepcopy(start)).detach, files):
            twin = copy.deepcopy(start)
            break_off(gl.attached(twin).detach, files, n)
            if hasattr(twin, ADDED):
                gl.attached(twin).detach()
            assert Look(twin) == base, n
    attachment.detach()
    assert Look(model) == base


TERMS = {
    "SAID": gl.IntrinsicSAID(d=100),
    "NF4": gl.NF4(),
    "LoRA": gl.LoRA(r=2),
    "KronA": gl.KronA(),
    "DoRA": gl.DoRA(r=2),
    "GLoRA": gl.GLoRA(r=2),
    "FLoRA": gl.FLoRA(r=2),
    "added FLoRA": gl.FLoRA(r=2, form="add"),
    "ReLoRA": gl.ReLoRA(r=2),
    "IA3": gl.IA3(("q", "v")),
    "FishMask": gl.FishMask(keep=0.01),
    "full": gl.FullFineTuning(),
    "adapter": gl.ParallelAdapter(r=2),
}
READING, INSIDE = {"DoRA", "GLoRA", "FLoRA"}, {"SAID", "FishMask"}


def refused(first, second):
    """Whether the two would compute something else than they merge to."""
    if "NF4" in (first, second) and "full" in (first, second):
        return "in place"
    if second in ("NF4", "ReLoRA"):
        return "must stand first" if first not in ("full", "adapter", "IA3") else None
    if second in READING:
        return "must stand first" if first not in (*INSIDE, "NF4", "full", "adapter", "IA3") else None
    return "must stand before" if second in INSIDE and first in READING else None


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
@pytest.mark.parametrize("first", TERMS)
def test_14_a_sum_merges_to_what_it_computes_or_is_refused(first, backbone):
    inputs = batch(backbone)
    for second in TERMS:
        model, words = build(backbone), refused(first, second)
        base = Look(model)
        if words:
            with pytest.raises(ValueError, match=words):
                gl.attach(model, TERMS[first] + TERMS[second])
            assert Look(model) == base
            continue
        attachment = gl.attach(model, TERMS[first] + TERMS[second])
        assert attachment.count().changed <= attachment.count().total + attachment.count().stored
        randomise(attachment, 0.05)
        acting = outputs(model, inputs)
        if "adapter" not in (first, second):
            wanted = [p for p in model.parameters() if p.requires_grad]
            losses = model(**inputs).loss, defined(model, inputs)
            gradients = (torch.autograd.grad(loss, wanted, allow_unused=True) for loss in losses)
            for a, b in zip(*gradients, strict=True):
                assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-11), second
            attachment.merge()
            assert (outputs(model, inputs) - acting).abs().max() < 1e-12, second
        attachment.detach()
        assert Look(model) == base


COMPILED = [  # every method, in as few graphs as their places allow
    gl.HeadOnly() + gl.FullFineTuning() + gl.DoRA(r=2, targets="q") + gl.GLoRA(r=2, targets="k")
    + gl.FLoRA(r=2, targets="v") + gl.ReLoRA(r=2, targets="o") + gl.LoRA(r=2, targets="ffn.in")
    + gl.AdaLoRA(r=2, target_r=1, targets="ffn.in") + gl.KronA(targets="ffn.out")
    + gl.Adapter(r=2) + SMALL + gl.ParallelAdapter(r=2) + gl.AdapterFusion(2, SMALL)
    + gl.AdapterDrop(SMALL, 0) + gl.AdaMix(r=2) + gl.PHMAdapter(r=4) + gl.Compacter(r=4)
    + gl.CompacterPlusPlus(r=4) + gl.KronARes() + gl.PromptTuning(length=2) + gl.PTuning(length=2)
    + gl.PrefixTuning(length=2, mlp=4) + gl.IA3(),
    gl.FishMask(keep=0.01) + gl.LTSFT(keep=0.5, targets="ffn")
    + gl.FAR(targets="o") + gl.DiffPruning(structured=True),
    gl.WARP(length=2) + gl.SPoT(length=2) + gl.IPT(length=2),
    gl.LST(reduction=4),
    gl.AttentionFusion(),
    gl.LeTS(),
    gl.MAM(length=2, mlp=4, r=2) + gl.UniPELT(length=2, mlp=4, bottleneck=2, r=2),
    gl.SparseAdapter(r=4) + gl.SparseLoRA(r=4),
    gl.S4(8000, strategy=("APBL",) * 4),
    gl.BitFit(add=True) + gl.NormTuning() + gl.CrossAttentionTuning("self"),
    gl.LatePromptTuning(length=2) + gl.LatePromptTuning(length=2, bottleneck=2),
    gl.QLoRA(r=2),
    gl.QLoRA(r=2) + gl.IntrinsicSAID(d=50).on(layers=0),
    gl.IntrinsicSAID(d=200),
]  # fmt: skip


def test_15_every_method_is_compiled_here():
    there = {type(method).__name__ for each in COMPILED for method in within(each)}
    assert {name for names in gl.METHODS.values() for name in names} <= there


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="an older torch cannot trace the twin of a module"
)
@pytest.mark.parametrize("method", COMPILED, ids=lambda method: type(method).__name__)
def test_15_torch_compile_takes_the_whole_model_in_one_graph(method):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    if "Late" not in repr(method):  # the second layer only takes as long again
        model.encoder.encoder.layer = model.encoder.encoder.layer[:1]
    randomise(gl.attach(model, method))
    torch.compiler.reset()  # or those compiled before count, of which eight are allowed
    compiled, results = torch.compile(model, fullgraph=True, backend="eager"), []
    for each in (model, compiled):  # a break in the graph would be an error
        model.zero_grad()
        loss = each(**inputs).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*results, strict=True))


def test_detach_gives_the_base_back_bit_for_bit(attached):
    _, backbone, before, attachment = attached
    model, inputs = attachment.model, batch(backbone)
    fresh = build(backbone)
    assert fresh.state_dict().keys() <= model.state_dict().keys()  # the base's keys never change
    randomise(attachment)
    step(model, inputs, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1))
    if attachment.mergeable:
        attachment.merge()
    assert attachment.detach() is model
    assert [*model.state_dict()] == [*fresh.state_dict()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(outputs(model, inputs), before)
    with pytest.raises(ValueError, match="ended"):
        attachment.count()


def test_a_deep_copy_is_independent(attached):
    _, backbone, _, attachment = attached
    inputs = batch(backbone)
    randomise(attachment)
    acting = outputs(attachment.model, inputs)
    twin = copy.deepcopy(attachment.model)
    assert torch.equal(outputs(twin, inputs), acting)
    gl.attached(twin).detach()
    assert torch.equal(outputs(attachment.model, inputs), acting)


@pytest.mark.parametrize("name", [case for case, backbone in CASES if backbone == "tiny-bart"])
def test_training_goes_on_where_a_layer_is_left_out(name):
    """Layer drop: what stands in those layers gets no gradient at that step."""
    model, inputs = build("tiny-bart"), batch("tiny-bart")
    attachment, encoder = gl.attach(model, METHOD_CASES[name].method), model.model.encoder
    method, trained = attachment.method, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    method.prepare(attachment, [inputs])
    for number, encoder.layerdrop in enumerate((1.0, 0.0, 1.0), 1):
        model.train().zero_grad()
        output = model(**inputs)
        terms = output.loss, method.regularizer(attachment), method.batch_loss(attachment, inputs, output)
        loss = sum(term for term in terms if term is not None)
        if loss.requires_grad:  # a late prompt is nowhere if all of its layers are left out
            loss.backward()
        optimizer.step()
        method.after_step(attachment, number, 4, optimizer)
        if number == 1:
            assert all(p.grad is None for p in encoder.layers.parameters())
    assert all(p.isfinite().all() for p in model.parameters())
    assert outputs(model, inputs).isfinite().all()


@pytest.mark.parametrize("backbone", ENCODERS[:1])
def test_7_kept_bytes_are_ordered_as_the_theory_says(backbone):
    def kept(method):
        model = build(backbone, dtype=torch.float32)
        gl.attach(model, method)
        return gl.costs.saved_bytes(model, batch(backbone))

    head, late = kept(gl.HeadOnly()), kept(gl.LoRA(r=2).on(layers=-1))
    lora, everywhere, full = kept(gl.LoRA(r=2)), kept(gl.LoRA(r=2, targets="all")), kept(gl.FullFineTuning())
    assert head < late < lora < everywhere and lora < full


@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_bases_keep_the_added_parameters_in_32_bits(backbone):
    model = build(backbone, dtype=torch.bfloat16)
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    assert {p.dtype for part in attachment.parts for p in part.parameters()} == {torch.float32}
    assert outputs(model, batch(backbone)).dtype == torch.bfloat16
    step(model, batch(backbone))
    acting = outputs(model, batch(backbone)).double()
    attachment.merge()
    change = (outputs(model, batch(backbone)).double() - acting).abs().max()
    assert change < 0.05 * acting.abs().max()  # bfloat16 holds 8 bits
