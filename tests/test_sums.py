"""What methods do to each other on one model, and what else may happen to a model that carries one."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from common import batch, build, outputs, randomise
from test_training import QUICK, TASK, TOKENIZER
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import guidelib as gl
from guidelib.core.points import passes
from guidelib.reparametrization.fastfood import Fastfood


def bert(layers: int = 2) -> BertModel:
    sizes = dict(vocab_size=60, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes)).double().eval()


IDS = torch.arange(3, 17).view(2, 7)
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


@pytest.mark.parametrize("method", [gl.FLoRA(r=2, tasks=3, form="add"), gl.IA3(tasks=3)])
def test_a_file_that_is_written_while_one_of_several_is_merged_leaves_that_one(method, tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, method)
    randomise(attachment)
    with gl.using(model, 2):
        attachment.merge()
    before = outputs(model, inputs)
    attachment.save(tmp_path / "merged.safetensors")
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("method", [gl.LTSFT(), gl.ReLoRA(r=2, restarts=1)])
def test_members_with_one_schedule_have_it_once(method):
    rates = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["lr"])

    for tried in (method, method.on(0) + method.on(1)):
        model, seen = build("tiny-bert", dtype=torch.float32), []
        gl.attach(model, tried)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("guidelib.training.fit.PrinterCallback", Look)  # which is taken out again
            patch.setattr(Trainer, "remove_callback", lambda trainer, which: trainer.add_callback(Look()))
            gl.fit(model, TASK, TOKENIZER, **QUICK)
        rates.append(seen)
    assert rates[0] == rates[1] and max(rates[0]) <= 1.1 * QUICK.get("lr", 1e-3)


@pytest.mark.parametrize(
    "method",
    [gl.SparseLoRA(4, 4, keep=0.3, score="magnitude"), gl.FishMask(0.02, score="magnitude")],
)
def test_a_state_dict_brings_its_places(method):
    model, other, inputs = build("tiny-bert"), build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, method)
    attachment.method.prepare(attachment, [])
    randomise(attachment)
    gl.attach(other, method)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))


def test_what_is_compiled_sees_a_method_come_and_go():
    model = bert().requires_grad_(False)
    model.compile(backend="eager")
    base = model(IDS).last_hidden_state
    attachment = gl.attach(model, gl.LoRA(r=2))
    randomise(attachment)
    acting = model(IDS).last_hidden_state
    assert (acting - base).abs().max() > 1e-3
    attachment.merge()
    assert torch.allclose(model(IDS).last_hidden_state, acting)
    attachment.unmerge()
    assert torch.equal(model(IDS).last_hidden_state, acting)
    attachment.detach()
    assert torch.equal(model(IDS).last_hidden_state, base)


@pytest.mark.parametrize(
    ("backbone", "first", "second"),
    [
        ("tiny-bert", gl.Gated(gl.LoRA(2, targets="q")), gl.DoRA(2, targets="q")),
        ("tiny-llama", gl.PfeifferAdapter(4), gl.DoRA(2, targets="ffn.out")),
        ("tiny-llama", gl.BitFit(add=True), gl.DoRA(2, targets="q")),
    ],
)
def test_what_acts_on_a_maps_output_stands_behind_who_reads_its_weight(backbone, first, second):
    with pytest.raises(ValueError, match="DoRA must stand first at .*, since it reads the base weight"):
        gl.attach(build(backbone), first + second)
    gl.attach(build(backbone), second + first)


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("tiny-bart", gl.Adapter(4) + gl.UniPELT(2, 4, 4, 2)),
        ("tiny-bart", gl.UniPELT(2, 4, 4, 2) + gl.Adapter(4)),
        ("tiny-bert", gl.ParallelAdapter(4, sublayers="attn") + gl.Gated(gl.PrefixTuning(2))),
        ("tiny-bert", gl.PfeifferAdapter(4, sublayers="attn", original_norm=True) + gl.UniPELT(2, 4, 4, 2)),
    ],
)
def test_a_gated_prefix_keeps_the_notes_of_others(backbone, method):
    model, inputs = build(backbone), batch(backbone)
    randomise(gl.attach(model, method))
    assert outputs(model, inputs).isfinite().all() and not passes.notes()


def test_late_prompts_and_gates_in_either_order_see_the_same_padding():
    for one, two in (
        (gl.Gated(gl.LoRA(2)), gl.LatePromptTuning(3)),
        (gl.LatePromptTuning(2, layer=2, bottleneck=4), gl.LatePromptTuning(3, layer=1)),
    ):
        found = []
        for method in (one + two, two + one):
            model = bert(4)
            attachment = gl.attach(model, method)
            for part in attachment.parts:  # the same numbers, whatever the order
                generator = torch.Generator().manual_seed(len(type(part).__name__) + part.place.count("1"))
                for p in part.parameters():
                    p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 4
            found.append(model(IDS, MASK).last_hidden_state)
        assert found[0].shape == found[1].shape == (2, 7, 32)
        assert torch.allclose(found[0][MASK.bool()], found[1][MASK.bool()], atol=1e-9)


def test_a_prompt_in_front_of_a_late_one_is_cut_off_where_it_stands():
    late, prompt = gl.LatePromptTuning(4, layer=1), gl.PromptTuning(2)
    lengths = []
    for method in (late + prompt, prompt + late):
        model = bert(4)
        gl.attach(model, method)
        states = model(IDS, output_hidden_states=True).hidden_states
        lengths.append([each.shape[1] for each in states])
    assert lengths == [[7] * 5] * 2


def test_a_cache_of_an_earlier_generation_is_refused_where_tokens_would_be_lost():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    gl.attach(model, gl.PromptTuning(length=3))
    ids, options = torch.arange(3, 9)[None], dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    first = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, use_cache=True, **options
    )
    longer = torch.cat((first.sequences, torch.arange(20, 24)[None]), 1)
    with pytest.raises(ValueError, match="past_key_values: between the .* 3 are missing beside PromptTuning"):
        model.generate(
            longer,
            attention_mask=torch.ones_like(longer),
            past_key_values=first.past_key_values,
            **options,
        )


def test_a_cast_leaves_a_projection_what_it_is():
    def made():
        return Fastfood(768, 2000, torch.Generator().manual_seed(0), torch.device("cpu"))

    theta = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(made().half().float()(theta), made()(theta))
    half = made().half()
    assert half.G.dtype == torch.float32


def test_a_forward_says_which_arguments_it_takes(tmp_path):
    model, inputs = build("tiny-t5-random", dtype=torch.float32), batch("tiny-t5-random")
    wanted = inspect.signature(model.forward)
    attachment = gl.attach(model, gl.AdapterDrop(gl.PfeifferAdapter(2), 1, random=True))
    assert inspect.signature(model.forward) == wanted
    rows = [{name: rows[i] for name, rows in inputs.items()} for i in range(len(inputs["input_ids"]))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    copied = copy.deepcopy(model)
    attachment.detach()
    assert "forward" not in vars(model) and "forward" in vars(copied)


def test_gates_beside_rows_are_counted():
    for method in (gl.Gated(gl.FAR(keep=0.1)), gl.Gated(gl.LoRA(2))):
        count = gl.attach(build("tiny-bert"), method).count()
        assert count.changed == count.trainable
