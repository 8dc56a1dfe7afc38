"""FAR: what learns, that the map stays the map, and what priming leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from common import batch, build, outputs, randomise
from test_half import base, fit, fresh
from test_lt_sft import adamw
from test_sparse import train
from transformers import AutoConfig, AutoModel

import guidelib as gl

FFN = ("ffn.in", "ffn.out")


def deltas(attachment):
    return [part.delta for part in attachment.parts]


def test_two_smaller_maps_put_back_in_order_are_the_map():
    """What the authors make of a layer: outputs that learn and others, and the inverse permutation."""
    model, x = build("tiny-bert"), torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).double()
    attachment = gl.attach(model, gl.FAR(keep=0.3))
    part = attachment.parts[0]
    layer, delta, rows = part.site.module, part.delta, part.delta.rows.long()
    others = torch.tensor([i for i in range(len(layer.weight)) if i not in rows])
    back = torch.cat((others, rows)).argsort()
    assert not torch.equal(back, torch.arange(len(back)))

    learner = [(p.detach()[rows]).clone().requires_grad_() for p in (layer.weight, layer.bias)]

    def reconfigured(x):
        frozen = F.linear(x, layer.weight[others], layer.bias[others])
        return torch.cat((frozen, F.linear(x, *learner)), dim=-1)[..., back]

    before = F.linear(x, layer.weight, layer.bias)
    assert (reconfigured(x) - before).abs().max() < 1e-12 and torch.equal(layer(x), before)
    with torch.no_grad():
        for mine, theirs in zip(delta.learners, learner, strict=True):
            step = torch.randn(mine.shape, generator=torch.Generator().manual_seed(4)).double()
            mine.add_(step), theirs.add_(step)
    ours, theirs = layer(x), reconfigured(x)
    assert (ours - theirs).abs().max() < 1e-12 and (ours - before).abs().max() > 0.1
    pairs = (
        torch.autograd.grad(y.square().sum(), p) for y, p in ((ours, [*delta.learners]), (theirs, learner))
    )
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*pairs, strict=True))


def test_it_is_the_sparse_delta_of_whole_rows():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.FAR(keep=0.25))
    model(**inputs).loss.backward()
    places, gradients = {}, {}
    for part in attachment.parts:
        start = next(n for n, m in model.named_modules() if m is part.site.module)
        weight, bias = part.delta.learners
        d_in, rows = weight.shape[1], part.delta.rows.long()
        places[f"{start}.weight"] = (rows[:, None] * d_in + torch.arange(d_in)).flatten()
        places[f"{start}.bias"] = rows
        gradients |= {f"{start}.weight": weight.grad.flatten(), f"{start}.bias": bias.grad}
    attachment.detach()
    k, size = sum(map(len, places.values())), sum(model.get_parameter(n).numel() for n in places)
    (part,) = gl.attach(model, gl.FishMask(keep=k / size, targets="ffn")).parts
    assert part.replaced.keys() == places.keys()
    part.support(
        torch.cat([places[name] for name in part.replaced]),
        torch.tensor([len(places[name]) for name in part.replaced]),
    )
    model(**inputs).loss.backward()
    wanted = torch.cat([gradients[name] for name in part.replaced])
    assert wanted.abs().max() > 1e-3 and (part.values.grad - wanted).abs().max() < 1e-12


def test_with_all_outputs_kept_it_is_the_training_of_the_whole_maps():
    inputs, finals = batch("tiny-bert"), []
    for method in (gl.FAR(keep=1.0), gl.FullFineTuning()):
        model = build("tiny-bert")
        attachment = gl.attach(model, method)
        if not attachment.parts:
            maps = {site.module for site in attachment.anatomy.linears("ffn")}
            mine = {id(p) for layer in maps for p in layer.parameters()}
            mine |= {id(p) for p in attachment.anatomy.head().values()}
            for p in model.parameters():
                p.requires_grad_(id(p) in mine)
        train(model, inputs, adamw(model), 4)
        attachment.merge()
        finals.append({n: p.detach() for n, p in model.named_parameters() if "guidelib" not in n})
    start = dict(build("tiny-bert").named_parameters())
    far = {name for name, p in finals[1].items() if (p - start[name]).abs().max() > 1e-4}
    assert len(far) == 2 * 2 * 2 + 2
    assert all((p - finals[0][name]).abs().max() < 1e-9 for name, p in finals[1].items())


@pytest.mark.parametrize("rewind", [False, True])
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-t5-random"])
def test_the_rows_that_moved_most_learn_on(backbone, rewind):
    model, inputs = build(backbone), batch(backbone)
    base_outputs = outputs(model, inputs)
    attachment = gl.attach(model, gl.FAR(keep=0.2, priming=0.5, rewind=rewind))
    method, count = attachment.method, attachment.count()
    first = [delta.rows.clone() for delta in deltas(attachment)]
    method.prepare(attachment, [])
    assert attachment.count().changed > 4 * (count.changed - count.head)
    assert torch.equal(outputs(model, inputs), base_outputs)
    for step in (1, 2):
        train(model, inputs, adamw(model), 1)
        primed = [[p.detach().clone() for p in delta.primed] for delta in deltas(attachment)]
        method.after_step(attachment, step, 4, None)
    assert attachment.count() == count
    for before, was, delta in zip(first, primed, deltas(attachment), strict=True):
        distance = was[0].abs().sum(1) + (was[1].abs() if len(was) > 1 else 0)
        wanted = distance.topk(len(before)).indices.sort().values
        assert torch.equal(delta.rows.long(), wanted)
        for mine, all_ in zip(delta.learners, was, strict=True):
            assert torch.equal(mine, torch.zeros_like(mine) if rewind else all_[wanted])
            assert mine.requires_grad and all_.abs().max() > 1e-4
    assert any(not torch.equal(a, d.rows) for a, d in zip(first, deltas(attachment), strict=True))
    acting = outputs(model, inputs)
    if not count.head:
        assert torch.equal(acting, base_outputs) == rewind


def test_fit_primes_once(tmp_path):
    model = fresh("tiny-bert", gl.FAR(keep=0.1, priming=0.4), torch.float32)
    attachment = gl.attached(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if "guidelib" not in n}
    first = [delta.rows.clone() for delta in deltas(attachment)]
    fit(model, lr=1e-2)
    rows = [delta.rows.clone() for delta in deltas(attachment)]
    assert all(delta.trained and delta.primed is None for delta in deltas(attachment))
    assert any(not torch.equal(a, b) for a, b in zip(first, rows, strict=True))
    path = attachment.save(tmp_path / "far.safetensors")
    again = copy.deepcopy(base("tiny-bert"))
    loaded = gl.load(again, path)
    fit(again, lr=1e-3)
    assert all(torch.equal(a, delta.rows) for a, delta in zip(rows, deltas(loaded), strict=True))
    attachment.merge()
    for part in attachment.parts:
        weight = next(n for n, m in model.named_modules() if m is part.site.module) + ".weight"
        moved = (model.get_parameter(weight) != start[weight]).any(1).nonzero()[:, 0]
        assert torch.equal(moved.int(), part.delta.rows)


def test_a_priming_that_was_broken_off_goes_on_from_its_file(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.FAR(keep=0.2))
    attachment.method.prepare(attachment, [])
    randomise(attachment)
    path, again = attachment.save(tmp_path / "far.safetensors"), build("tiny-bert")
    loaded = gl.load(again, path)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    primed = [delta.primed for delta in deltas(loaded)]
    loaded.method.prepare(loaded, [])
    assert all(a is delta.primed for a, delta in zip(primed, deltas(loaded), strict=True))


def test_the_count_on_distilbert():
    """Of the maps' 28,334,592 parameters, 42.7 % of the model, a tenth of the outputs."""
    one = 307 * 769 + 77 * 3073
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("distilbert"))
    count = gl.attach(model, gl.FAR(keep=0.1)).count()
    assert count.trainable == count.changed == 6 * one == 2_836_224
    assert count.stored == count.trainable + 6 * (307 + 77) and count.total == 66_362_880


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": 0}, "keep must be a share of the outputs, more than 0 and at most 1, got 0"),
        ({"priming": 1}, "priming must be a share of the steps, more than 0 and less than 1, got 1"),
        ({"rewind": "yes"}, "rewind must be True or False, got 'yes'"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.FAR(**arguments)
