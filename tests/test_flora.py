"""FLoRA: each example of a batch computes what its adapter computes alone."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import peft
import pytest
import torch
from common import (
    BACKBONES,
    DECODERS,
    SEQ2SEQ,
    assert_the_prediction_is_the_measurement,
    batch,
    build,
    outputs,
    randomise,
)
from torch.func import functional_call
from transformers import AutoConfig, AutoModel

import guidelib as gl
from guidelib import costs

FORMS = ("multiply", "add")
IDS = [2, 0, 1, 2]  # one per row of rows()


def rows(backbone, **kwargs):
    return batch(backbone, **({"rows": 4} | kwargs))


def attach(backbone, dtype=torch.float64, **arguments):
    model = build(backbone, dtype=dtype)
    attachment = gl.attach(model, gl.FLoRA(**({"r": 3, "tasks": 3, "targets": "all"} | arguments)))
    randomise(attachment)
    return model, attachment


def example(inputs, i):
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_example_of_a_batch_is_as_with_its_adapter_alone(backbone, form):
    model, _ = attach(backbone, form=form)
    inputs = rows(backbone)
    with gl.using(model, IDS):
        mixed = outputs(model, inputs)
    alone = []
    for i, adapter in enumerate(IDS):
        with gl.using(model, adapter):
            alone.append(outputs(model, inputs)[i])
    assert (mixed - torch.stack(alone)).abs().max() < 1e-12
    assert (alone[0] - outputs(model, inputs)[0]).abs().max() > 1e-3  # the first adapter acts by itself
    assert (mixed[1] - outputs(model, inputs)[1]).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_each_adapter_has_the_gradients_of_its_own_examples(backbone, form):
    model, attachment = attach(backbone, form=form)
    inputs = rows(backbone)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(outputs(model, inputs).shape, generator=generator, dtype=torch.float64)
    factors = [p for part in attachment.parts for p in part.parameters()]
    with gl.using(model, IDS):
        mixed = torch.autograd.grad((model(**inputs).logits * weights).sum(), factors)
    for adapter in set(IDS):
        mine = [i for i, other in enumerate(IDS) if other == adapter]
        with gl.using(model, adapter):
            alone = torch.autograd.grad((model(**inputs).logits * weights)[mine].sum(), factors)
        for a, b in zip(mixed, alone, strict=True):
            assert (a[adapter] - b[adapter]).abs().max() < 1e-11
            assert b[adapter].abs().max() > 0 and all(b[i].eq(0).all() for i in range(3) if i != adapter)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-t5-random", "tiny-gpt2"])
def test_multiplying_at_rank_one_scales_the_inputs_and_the_outputs(backbone):
    model, attachment = attach(backbone, r=1, tasks=2, targets=("o", "ffn"))
    inputs = rows(backbone)
    with gl.using(model, 1):
        acting = outputs(model, inputs)
    pairs = [
        (part.site, part.delta.A[1, 0].detach(), part.delta.B[1, :, 0].detach()) for part in attachment.parts
    ]
    with torch.no_grad():
        attachment.detach()
        for p, q in zip(
            attachment.anatomy.head().values(), attach(backbone)[1].anatomy.head().values(), strict=True
        ):
            p.copy_(q)

    def hook(a, b):
        def scaled(module, args, output):
            bias = 0 if module.bias is None else module.bias
            return b * (module.forward(a * args[0]) - bias) + bias

        return scaled

    for site, a, b in pairs:
        site.module.register_forward_hook(hook(a, b))
    assert (outputs(model, inputs) - acting).abs().max() < 1e-11


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("targets", [("q", "v"), "all"])
def test_one_added_adapter_is_lora(backbone, targets):
    inputs, results = batch(backbone), []
    for method in (gl.LoRA(r=3, alpha=5, targets=targets),
                   gl.FLoRA(r=3, tasks=1, form="add", alpha=5, targets=targets)):  # fmt: skip
        model = build(backbone)
        attachment = gl.attach(model, method, seed=3)
        start = [p.detach().squeeze(0).clone() for part in attachment.parts for p in part.parameters()]
        randomise(attachment)
        model(**inputs).loss.backward()
        gradients = [p.grad.squeeze(0) for part in attachment.parts for p in part.parameters()]
        results.append((*start, outputs(model, inputs), *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-t5-random"])
def test_a_mixed_batch_is_that_of_peft(backbone):
    model, attachment = attach(backbone, form="add", alpha=7, targets=("q", "v"))
    inputs = rows(backbone)
    names = {id(module): name for name, module in model.named_modules()}
    pattern = {"tiny-bert": r".*\.(query|value)", "tiny-llama": r".*\.(q_proj|v_proj)"}
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=pattern.get(backbone, r".*Attention\.(q|v)"))
    theirs = peft.get_peft_model(build(backbone), config, adapter_name="0")
    theirs.add_adapter("1", config)
    theirs.add_adapter("2", config)
    theirs.eval()
    with torch.no_grad():
        for part in attachment.parts:
            layer = theirs.get_submodule(f"base_model.model.{names[id(part.site.module)]}")
            for i in range(3):
                layer.lora_A[str(i)].weight.copy_(part.delta.A[i])
                layer.lora_B[str(i)].weight.copy_(part.delta.B[i])
        for name, parameter in attachment.anatomy.head().items():
            theirs.get_parameter(f"base_model.model.{name}").copy_(parameter)
    with gl.using(model, IDS):
        mine = outputs(model, inputs)
    with torch.no_grad():
        other = theirs(**inputs, adapter_names=[str(i) for i in IDS]).logits
    assert (mine - other).abs().max() < 1e-12 and (mine - outputs(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_start_is_the_identity_for_every_adapter_and_target(backbone, form):
    model, inputs = build(backbone), rows(backbone)
    before = outputs(model, inputs)
    gl.attach(model, gl.FLoRA(r=3, tasks=3, form=form, targets="all"))
    with gl.using(model, IDS):
        change = (outputs(model, inputs) - before).abs().max()
    # a product of one map of GPT-2's fused layer may be rounded otherwise than the whole layer's
    assert change == 0 if (form, backbone) != ("multiply", "tiny-gpt2") else change < 1e-13


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_adapter_in_use_is_the_one_that_merges(backbone, form):
    model, attachment = attach(backbone, form=form)
    inputs, state = rows(backbone), copy.deepcopy(model.state_dict())
    with gl.using(model, 2):
        acting = outputs(model, inputs)
        attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert costs.operations(model, inputs) == costs.operations(build(backbone), inputs)
    attachment.unmerge()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    first = outputs(model, inputs)
    assert (first - acting).abs().max() > 1e-3
    attachment.merge()
    assert (outputs(model, inputs) - first).abs().max() < 1e-12
    with pytest.raises(ValueError, match="model must be unmerged"), gl.using(model, 1):
        pass
    attachment.detach()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("form", FORMS)
def test_several_adapters_at_once_cannot_be_merged(form):
    model, attachment = attach("tiny-bert", form=form)
    with gl.using(model, IDS):
        assert not attachment.mergeable
        with pytest.raises(ValueError, match="FLoRA cannot be merged: .* each example has its own adapter"):
            attachment.merge()
        with pytest.raises(ValueError, match="ids must be one adapter where a single weight is asked for"):
            attachment.parts[0].delta.product()
        assert not attachment.merged
    assert attachment.mergeable


# choosing


def test_the_choice_ends_with_the_block_also_after_an_error_and_nests():
    model, _ = attach("tiny-bert")
    inputs = rows("tiny-bert")
    results = {}
    for i in range(3):
        with gl.using(model, i):
            results[i] = outputs(model, inputs)
    with gl.using(model, torch.tensor(IDS)):
        with pytest.raises(RuntimeError), gl.using(model, 1):
            assert torch.equal(outputs(model, inputs), results[1])
            raise RuntimeError
        assert (
            outputs(model, inputs) - torch.stack([results[a][i] for i, a in enumerate(IDS)])
        ).abs().max() < 1e-12
    assert torch.equal(outputs(model, inputs), results[0])


REFUSED_IDS = [
    (3, "ids must be a number from 0 to 2, or one for each example, got 3"),
    (-1, "got -1"),
    ([0, 3], r"got \[0, 3\]"),
    ([], r"got \[\]"),
    ([0, True], r"got \[0, True\]"),
    ([0.0, 1], r"got \[0.0, 1\]"),
    ([[0, 1]], r"got \[\[0, 1\]\]"),
    (torch.tensor([0.5]), "got tensor"),
    (True, "got True"),
    (None, "got None"),
    ("01", "got '01'"),
]


@pytest.mark.parametrize(("ids", "message"), REFUSED_IDS, ids=str)
def test_ids_that_are_not_there_are_refused(ids, message):
    model, _ = attach("tiny-bert")
    with pytest.raises(ValueError, match=message), gl.using(model, ids):
        pass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 2, 0, 1], [1]])
def test_a_batch_of_another_size_is_refused(form, ids):
    model, _ = attach("tiny-bert", form=form)
    with gl.using(model, ids), pytest.raises(ValueError, match="ids must be as many as the batch's 4 rows"):
        outputs(model, rows("tiny-bert"))
    outputs(model, rows("tiny-bert"))


def test_other_impossible_choices_are_refused():
    model, _ = attach("tiny-bert")
    with pytest.raises(ValueError, match="num_beams must be a whole number of at least 1, got 0"):
        with gl.using(model, 0, num_beams=0):
            pass
    plain = build("tiny-bert")
    with pytest.raises(ValueError, match="model carries no method"), gl.using(plain, 0):
        pass
    gl.attach(plain, gl.LoRA(r=1))
    with pytest.raises(ValueError, match="model must be one with FLoRA attached"), gl.using(plain, 0):
        pass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", DECODERS + SEQ2SEQ)
def test_generation_follows_the_adapters_with_and_without_beams(backbone, form):
    model, _ = attach(backbone, form=form)
    randomise(gl.attached(model), scale=0.5)
    inputs = rows(backbone, padded=False)
    del inputs["labels"]
    for beams in (1, 2):
        settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=0)
        with gl.using(model, IDS, num_beams=beams):
            mixed = model.generate(**inputs, **settings)
        alone = []
        for i, adapter in enumerate(IDS):
            with gl.using(model, adapter):
                alone.append(model.generate(**example(inputs, i), **settings)[0])
        assert torch.equal(mixed, torch.stack(alone))
    assert not torch.equal(mixed, model.generate(**inputs, **settings))
    with (
        gl.using(model, IDS),
        pytest.raises(ValueError, match="ids must be as many as the batch's 8 rows, or"),
    ):
        model.generate(**inputs, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_repeats_the_choice_within_the_block(form):
    model, attachment = attach("tiny-bert", form=form)
    inputs, gradients = rows("tiny-bert"), []
    model.train()
    for _ in range(2):
        torch.manual_seed(0)  # dropout
        model.zero_grad()
        with gl.using(model, IDS):
            model(**inputs).loss.backward()
        gradients.append([p.grad for part in attachment.parts for p in part.parameters()])
        gl.checkpointing(model)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_repeats_the_choice_of_its_pass_whenever_it_computes_again(form):
    """Two passes with other adapters, and both backward passes outside of their blocks, in another thread."""
    model, attachment = attach("tiny-bert", form=form)
    inputs, gradients = rows("tiny-bert"), []
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for _ in range(2):
        model.zero_grad()
        losses = []
        for ids in (1, IDS):
            with gl.using(model, ids):
                losses.append(model(**inputs).loss)
        backward = threading.Thread(target=sum(losses).backward)
        backward.start()
        backward.join()
        gradients.append([p.grad for part in attachment.parts for p in part.parameters()])
        gl.checkpointing(model)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_each_thread_has_a_choice_of_its_own(backbone, form):
    model, _ = attach(backbone, form=form)
    inputs, choices = rows(backbone), [0, 1, 2, IDS, IDS[::-1], [2, 2, 0, 0], None]
    meet = threading.Barrier(len(choices), timeout=60)

    def serve(ids):
        with gl.using(model, ids) if ids is not None else nullcontext():
            meet.wait()
            results = [outputs(model, inputs) for _ in range(5)]
            meet.wait()
        return results

    alone = []
    for ids in choices:
        with gl.using(model, 0 if ids is None else ids):
            alone.append(outputs(model, inputs))
    with ThreadPoolExecutor(len(choices)) as pool:
        for results, expected in zip(pool.map(serve, choices), alone, strict=True):
            assert all((result - expected).abs().max() < 1e-12 for result in results)


def test_a_copy_has_a_choice_of_its_own():
    model, _ = attach("tiny-bert")
    inputs = rows("tiny-bert")
    first = outputs(model, inputs)
    twin = copy.deepcopy(model)
    with gl.using(twin, 1):
        assert torch.equal(outputs(model, inputs), first)
        assert not torch.equal(outputs(twin, inputs), first)
    gl.attached(twin).detach()
    assert torch.equal(outputs(model, inputs), first)


# with other methods


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_weights_and_biases_trained_in_place_get_their_gradients(backbone):
    model, inputs = build(backbone), rows(backbone)
    attachment = gl.attach(model, gl.FLoRA(r=2, targets="all") + gl.FullFineTuning())
    randomise(attachment, scale=0.05)
    model(**inputs).loss.backward()
    gradients = {n: p.grad for n, p in attachment.anatomy.base_parameters().items() if p.grad is not None}
    names = {id(module): name for name, module in model.named_modules()}
    weights = {
        n: p.detach().clone().requires_grad_() for n, p in attachment.anatomy.base_parameters().items()
    }
    acting = dict(weights)
    for part in attachment.parts:
        name = f"{names[id(part.site.module)]}.weight"
        turned = type(part.site.module).__name__ == "Conv1D"
        factor = torch.ones_like(acting[name].t() if turned else acting[name])
        factor[slice(None) if part.site.rows is None else part.site.rows] = part.delta.product().detach()
        acting[name] = acting[name] * (factor.t() if turned else factor)
        part.unplug()
    loss = functional_call(model, acting, kwargs=inputs).loss
    wanted = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, wanted, strict=True):
        assert (gradients.get(name) is None) == (gradient is None), name
        assert gradient is None or (gradients[name] - gradient).abs().max() < 1e-11, name


def test_added_adapters_stand_on_a_quantised_base():
    model, inputs = build("tiny-llama"), rows("tiny-llama")
    attachment = gl.attach(model, gl.NF4() + gl.FLoRA(r=2, tasks=3, form="add", targets="all"))
    randomise(attachment)
    with gl.using(model, IDS):
        mixed = outputs(model, inputs)
    with gl.using(model, 2):
        assert (outputs(model, inputs)[0] - mixed[0]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="FLoRA must stand first at encoder.0.self.q"):
        gl.attach(build("tiny-bert"), gl.LoRA(r=1) + gl.FLoRA(r=1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_it_works_under_autocast_and_in_16_bits(backbone, form):
    model, _ = attach(backbone, dtype=torch.float32, form=form)
    inputs = rows(backbone)
    with gl.using(model, IDS):
        plain = outputs(model, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            model(**inputs).loss.backward()
            mixed = outputs(model, inputs)
        assert (mixed - plain).abs().max() < 0.1 * plain.abs().max()
    half, attachment = attach(backbone, dtype=torch.bfloat16, form=form)
    with gl.using(half, IDS):
        assert outputs(half, inputs).dtype == torch.bfloat16
        half(**inputs).loss.backward()
    assert {p.dtype for part in attachment.parts for p in part.parameters()} == {torch.float32}


# files


def saved_loras(backbone, folder, n=3, **arguments):
    paths, results = [], []
    for i in range(n):
        model = build(backbone)
        attachment = gl.attach(model, gl.LoRA(**({"r": 2, "alpha": 5, "targets": "all"} | arguments)), seed=i)
        head = {id(p) for p in attachment.anatomy.head().values()}
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad and id(p) not in head:
                    p.add_(
                        0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(i))
                    )
        paths.append(attachment.save(folder / f"{i}.safetensors"))
        results.append(outputs(model, rows(backbone)))
    return paths, results


@pytest.mark.parametrize("backbone", BACKBONES)
def test_saved_loras_serve_one_batch(backbone, tmp_path):
    paths, results = saved_loras(backbone, tmp_path)
    model, inputs = build(backbone), rows(backbone)
    attachment = gl.load_loras(model, paths)
    assert attachment.method == gl.FLoRA(r=2, tasks=3, form="add", alpha=5, targets="all")
    with gl.using(model, IDS):
        mixed = outputs(model, inputs)
    assert (mixed - torch.stack([results[a][i] for i, a in enumerate(IDS)])).abs().max() < 1e-12
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_variants_of_lora_are_served_too(tmp_path):
    paths, results = saved_loras("tiny-bert", tmp_path, rank_stabilized=True, freeze_A=True, dropout=0.1)
    model = build("tiny-bert")
    gl.load_loras(model, paths)
    with gl.using(model, 2):
        assert (outputs(model, rows("tiny-bert")) - results[2]).abs().max() < 1e-12


def test_files_that_do_not_go_together_are_refused(tmp_path):
    paths, _ = saved_loras("tiny-bert", tmp_path, n=2)
    (tmp_path / "b").mkdir()
    other, _ = saved_loras("tiny-bert", tmp_path / "b", n=1, r=3)
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LoRA(r=2, alpha=5, targets="all"))
    randomise(attachment)  # the head, too
    head = attachment.save(tmp_path / "head.safetensors")
    attachment.detach()
    gl.attach(model, gl.FLoRA(r=1)).save(tmp_path / "flora.safetensors")
    gl.attached(model).detach()
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    for files, words in (
        ([*paths, *other], "files like the first"),
        ([*paths, head], "files with the same task head"),
        ([*paths, tmp_path / "flora.safetensors"], "files of LoRA"),
        ([], "a list of one or more files"),
        (str(paths[0]), "a list of one or more files"),
    ):
        with pytest.raises(ValueError, match=f"paths must be {words}"):
            gl.load_loras(model, files)
    with pytest.raises(FileNotFoundError):
        gl.load_loras(model, [*paths, tmp_path / "none"])
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    gl.load_loras(model, paths)


# what it costs

COSTED = {
    f"{form}, {name}": gl.FLoRA(r=3, tasks=2, form=form, targets=targets).on(layers=layers)
    for form in FORMS
    for name, targets, layers in (
        ("q, v", ("q", "v"), None),
        ("all", "all", None),
        ("q, v of the last layer", ("q", "v"), -1),
        ("all of the last layer", "all", -1),
        ("ffn.in of the first layer", "ffn.in", 0),
    )
}


@pytest.mark.parametrize("name", COSTED)
def test_the_closed_form_is_the_measurement(name):
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, COSTED[name])
    assert_the_prediction_is_the_measurement(model, "tiny-bert")


def forward_flops(backbone, ids, **arguments):
    model, _ = attach(backbone, dtype=torch.float32, **arguments)
    with gl.using(model, ids):
        return costs.flops(model, rows(backbone, padded=False))[0]


@pytest.mark.parametrize("ids", [0, IDS], ids=["one", "mixed"])
@pytest.mark.parametrize("r", [1, 2, 4])
def test_multiplying_runs_the_base_product_r_times_adding_once(r, ids):
    """So on d_in = d_out = d, multiplying is the dearer one from r = 2 on where d > 4."""
    backbone, tokens, d, n = "tiny-bert", 4 * 9, 32, 4  # q and v of two layers
    base = costs.flops(gl.attach(build(backbone), gl.HeadOnly()).model, rows(backbone, padded=False))[0]
    one = 2 * tokens * d * d
    counted = {form: forward_flops(backbone, ids, r=r, form=form, targets=("q", "v")) for form in FORMS}
    assert counted["multiply"] == base + n * (r - 1) * one
    assert counted["add"] == base + n * 4 * tokens * r * d


def test_multiplying_one_map_of_a_fused_layer_costs_one_product_more():
    backbone, tokens, d = "tiny-gpt2", 4 * 9, 32
    base = costs.flops(
        gl.attach(build(backbone), gl.LoRA(r=1, targets="o")).model, rows(backbone, padded=False)
    )
    base = base[0] - 2 * 4 * tokens * d
    mine = forward_flops(backbone, IDS, r=3, targets=("q", "v"))
    assert mine == base + 4 * 3 * 2 * tokens * d * d


def test_one_added_adapter_keeps_what_pefts_lora_keeps():
    inputs = rows("tiny-bert")
    model, _ = attach("tiny-bert", dtype=torch.float32, form="add", r=4, targets=("q", "v"))
    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    theirs = peft.inject_adapter_in_model(config, build("tiny-bert", dtype=torch.float32))
    theirs.classifier.requires_grad_(True)
    assert costs.saved_bytes(model, inputs) <= costs.saved_bytes(theirs, inputs)
    assert all(a <= b for a, b in zip(costs.flops(model, inputs), costs.flops(theirs, inputs), strict=True))


def test_the_count_is_that_of_as_many_loras():
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("bert"))
    for form in FORMS:
        count = gl.attach(model, gl.FLoRA(r=8, tasks=5, form=form)).count()
        assert count.trainable == count.stored == 5 * 294_912  # LoRA's table 2, for BERT's size
        assert count.changed == 24 * 768 * 768
        gl.attached(model).detach()


REFUSED_VALUES = [
    (dict(r=0), "r must be a whole number of at least 1, got 0"),
    (dict(tasks=0), "tasks must be a whole number of at least 1, got 0"),
    (dict(tasks=2.0), "tasks must be a whole number of at least 1, got 2.0"),
    (dict(form="times"), "form must be 'multiply' or 'add', got 'times'"),
    (dict(alpha=4), "alpha must be None for form='multiply', which has no scale, got 4"),
    (dict(alpha=float("nan"), form="add"), "alpha must be a finite number or None, got nan"),
    (dict(targets=5), "targets must be a role or several of them, got 5"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED_VALUES, ids=str)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.FLoRA(**arguments)
    assert message in str(error.value)


def test_a_rank_that_does_not_fit_is_refused():
    model = build("tiny-bert")
    with pytest.raises(
        ValueError, match="r must be at most 32, the smaller side of encoder.0.self.q, got 33"
    ):
        gl.attach(model, gl.FLoRA(r=33))


def test_the_defaults_and_equal_values():
    assert gl.FLoRA() == gl.FLoRA(r=4, tasks=2, form="multiply", alpha=None, targets=["q", "v"])
    assert replace(gl.FLoRA(), form="add", alpha=2).alpha == 2
