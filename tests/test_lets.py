"""LeTS: the sparse delta, the gates, and the LSTM over the layers."""

from __future__ import annotations

import copy

import pytest
import torch
from common import BACKBONES, batch, build, outputs, randomise, states
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig

import guidelib as gl
from guidelib.additive.other.lets import SPEED, Shared, _site
from guidelib.costs.step import flops


def network_of(attachment: gl.Attachment) -> Shared:
    (part,) = attachment.parts
    (network,) = part.networks.values()
    return network


@pytest.mark.parametrize("backbone", BACKBONES)
def test_without_deltas_and_without_U_it_is_the_backbone(backbone):
    model, inputs = build(backbone), batch(backbone)
    before = outputs(model, inputs)
    network = network_of(gl.attach(model, gl.LeTS()))
    assert not torch.equal(outputs(model, inputs), before)
    with torch.no_grad():
        network.U.zero_()
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-t5v1-random"])
def test_the_equation_with_dense_deltas_and_torchs_lstm(backbone):
    """In value and gradient.  The maps' inputs are taken by hooks of their own."""
    model, inputs = build(backbone), batch(backbone, padded=False)
    attachment = gl.attach(model, gl.LeTS(keep=0.2, hidden=5))
    randomise(attachment)
    network = network_of(attachment)
    with torch.no_grad():
        network.gates.copy_(torch.tensor([0.3, -0.2], dtype=torch.float64))
    stack = [*attachment.anatomy.bodies()][-1]
    body, given, trails = attachment.anatomy.bodies()[stack], {}, []
    for layer in range(2):
        hook = lambda module, args, layer=layer: given.update({layer: args[0]})  # noqa: E731
        _site(body, layer).module.register_forward_pre_hook(hook)
    network.register_forward_hook(lambda module, args, out: trails.append((args[0].states, out)))
    model(**inputs)
    h, state = trails[0]

    cell = nn.LSTMCell(32, 5).double()
    order = [0, 1, 3, 2]  # torch's gates are input, forget, new, output
    with torch.no_grad():
        for its, mine in (
            (cell.weight_ih, network.W),
            (cell.weight_hh, network.V),
            (cell.bias_ih, network.b),
        ):
            its.copy_(torch.cat([mine.chunk(4)[i] for i in order]))
        cell.bias_hh.zero_()
    own, dense = network.own["0"], torch.zeros(network.own["0"].shape, dtype=torch.float64)
    for place, value in zip(own.index.tolist(), own.values.tolist(), strict=True):
        dense[divmod(place, dense.shape[1])] = value
    dense.requires_grad_()
    read, u = None, [h[0] + given[0] @ dense.T, h[1]]
    rms = [states.square().mean(-1, keepdim=True).sqrt() for states in h.values()]
    for layer in range(2):
        read = cell((u[layer] / rms[layer]).flatten(0, 1), read)
    expected = u[1] + rms[1] * (read[0] @ network.U.T).view_as(u[1])
    expected = expected if body.closing is None else body.closing.forward(expected)
    assert (state - expected).abs().max() < 1e-12

    weight = torch.randn(state.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mine = torch.autograd.grad((state * weight).sum(), [own.values, network.W, network.U, network.gates])
    theirs = torch.autograd.grad((expected * weight).sum(), [dense, cell.weight_ih, network.U])
    assert (mine[0] - theirs[0].flatten()[own.index.long()]).abs().max() < 1e-12 < mine[0].abs().max()
    W = torch.cat([theirs[1].chunk(4)[i] for i in order])
    assert (mine[1] - W).abs().max() < 1e-12 and (mine[2] - theirs[2]).abs().max() < 1e-12
    # straight through: of the open gate what more of the delta would do, times the slope of its sigmoid
    open_, shut = torch.sigmoid(torch.tensor([3.0, -3.0], dtype=torch.float64))
    assert abs(mine[3][0] - SPEED * open_ * shut * (theirs[0] * dense).sum()) < 1e-12
    assert mine[3][1].abs() > 0  # and a closed gate learns what it would do if it were open


def test_what_is_kept_and_counted():
    count = gl.count(BertConfig(), gl.LeTS())
    k, m, d = round(0.1 * 768 * 768), 96, 768
    assert count.trainable - count.head == 12 * (k + 1) + 4 * m * (d + m + 1) + d * m
    assert count.stored == count.trainable + 12 * k
    assert round(100 * (count.trainable - count.head) / count.total, 1) == 1.0

    def kept(method):
        model = build("tiny-bert", dtype=torch.float32)
        gl.attach(model, method)
        return gl.costs.saved_bytes(model, batch("tiny-bert"))

    # nothing that grows with a delta's numbers; with a delta, its map's input and the state it is added to
    some, more = kept(gl.LeTS(keep=0.01)), kept(gl.LeTS(keep=0.9))
    assert some == more
    assert some - kept(gl.LeTS().on(layers=-1)) < 2 * 4 * 3 * 9 * 32
    attachment = gl.attach(build("tiny-bert"), gl.LeTS())
    assert {own.index.dtype for own in network_of(attachment).own.values()} == {torch.int32}


def test_the_file_holds_numbers_and_their_places(tmp_path):
    sizes = [
        gl.attach(build("tiny-bert", dtype=torch.float32), gl.LeTS(keep)).save(tmp_path / str(keep)).stat()
        for keep in (0.25, 0.5)
    ]
    assert abs(sizes[1].st_size - sizes[0].st_size - 2 * 256 * (4 + 4)) < 64  # two maps of 32 x 32


def test_snips_scores_choose_the_places():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    plain, method = copy.deepcopy(model), gl.LeTS(keep=0.05)
    attachment = gl.attach(model.train(), method)
    network, start = network_of(attachment), copy.deepcopy(network_of(attachment))
    for layer in range(2):
        weight = plain.encoder.encoder.layer[layer].attention.output.dense.weight
        at = network.own[str(layer)].index.long()
        rest = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, at, False)
        assert weight.abs().flatten()[at].min() >= weight.abs().flatten()[rest].max()
    two = [{name: rows[i : i + 1] for name, rows in inputs.items()} for i in (0, 2)]
    flags, random = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    method.prepare(attachment, two)
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    found = [own.index.clone() for own in network.own.values()]
    for layer in range(2):  # by hand: what moving single weights of a whole delta does to the loss
        full = copy.deepcopy(start)
        own = full.own[str(layer)]
        own.index, own.values = (
            torch.arange(1024, dtype=torch.int32),
            nn.Parameter(torch.zeros(1024).double()),
        )
        attachment.parts[0].networks["encoder"] = full.eval()
        scores = torch.autograd.grad(sum(model.eval()(**each).loss for each in two), own.values)[0]
        scores = (scores * plain.encoder.encoder.layer[layer].attention.output.dense.weight.flatten()).abs()
        assert torch.equal(scores.topk(51).indices.sort().values, found[layer].long())
        assert not torch.equal(found[layer], start.own[str(layer)].index)
    attachment.parts[0].networks["encoder"] = network
    randomise(attachment)
    method.prepare(attachment, [inputs])  # what was trained stays where it is
    assert all(map(torch.equal, found, (own.index for own in network.own.values())))


def test_the_mask_of_a_file_is_not_chosen_again(tmp_path):
    inputs, method = batch("tiny-bert"), gl.LeTS(keep=0.05)
    attachment = gl.attach(build("tiny-bert"), method)
    method.prepare(attachment, [inputs])
    randomise(attachment)
    path = attachment.save(tmp_path / "lets.safetensors")
    expected = outputs(attachment.model, inputs)
    loaded = gl.load(build("tiny-bert"), path)
    loaded.method.prepare(loaded, [{name: rows[:1] for name, rows in inputs.items()}])
    assert torch.equal(outputs(loaded.model, inputs), expected)
    for i, network in enumerate((network_of(attachment), network_of(loaded))):
        with torch.no_grad():
            network.own["0"].index[0] = 1024 * (1 - i) - i  # behind the last, before the first
        gl.attached((attachment, loaded)[i].model).save(path)
        with pytest.raises(ValueError, match="does not fit: index must be places from 0 to 1023"):
            gl.load(build("tiny-bert"), path)


def test_gates_are_drawn_in_training_and_settled_afterwards(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.LeTS(keep=0.3))
    randomise(attachment)
    network = network_of(attachment)
    with torch.no_grad():
        network.gates.copy_(torch.tensor([-0.05, 0.2]))
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([torch.stack([*network.shares().values()]).detach() for _ in range(2000)])
    assert set(draws.flatten().tolist()) == {0.0, 1.0}
    assert (draws.mean(0) - torch.sigmoid(torch.tensor([-0.5, 2.0]))).abs().max() < 0.03
    model.eval()
    assert torch.stack([*network.shares().values()]).tolist() == [0.0, 1.0]

    before, acting = (flops(model, inputs), gl.costs.operations(model, inputs)), outputs(model, inputs)
    stored = attachment.count().stored
    attachment.method.finish(attachment)
    assert [*network.own] == ["1"] and network.gates is None
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    assert before[0][0] - flops(model, inputs)[0] == 2 * 3 * 9 * 32 * 32
    assert before[1] > gl.costs.operations(model, inputs)
    assert stored - attachment.count().stored == 2 * 307 + 2
    assert attachment.method.regularizer(attachment) is None
    attachment.method.finish(attachment)
    path, acting = attachment.save(tmp_path / "lets.safetensors"), outputs(model, inputs)
    loaded = gl.load(build("tiny-bert"), path)
    assert torch.equal(outputs(loaded.model, inputs), acting)
    assert loaded.state().keys() == attachment.state().keys()
    loaded.model(**inputs).loss.backward()  # and it can be trained on
    assert network_of(loaded).own["1"].values.grad.abs().max() > 0


def test_all_may_share_in_the_end(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.LeTS(cost=0.5))
    randomise(attachment)
    optimizer = torch.optim.Adam(network_of(attachment).parameters(), lr=0.05)
    for _ in range(30):  # the cost alone closes every gate
        optimizer.zero_grad()
        attachment.method.regularizer(attachment).backward()
        optimizer.step()
    attachment.method.finish(attachment)
    assert len(network_of(attachment).own) == 0
    loaded = gl.load(build("tiny-bert"), attachment.save(tmp_path / "lets.safetensors"))
    assert torch.equal(outputs(loaded.model, inputs), outputs(model, inputs))


def test_layers_says_who_may_compute_and_all_are_read():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.LeTS().on(layers=0))
    network = network_of(attachment)
    assert [*network.own] == ["0"] and network.layers == (0, 1)
    reads = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    assert len(reads) == 1  # nothing stands before a map that is not read


@pytest.mark.parametrize("how", ["checkpointing", "keep less"])
def test_recomputing_meets_the_same_gates(how):
    inputs, found = batch("tiny-bert"), []
    for less in (False, True):
        model = build("tiny-bert")
        model.eval()
        attachment = gl.attach(model, gl.LeTS(keep=0.5))
        randomise(attachment)
        model.train()
        if less and how == "checkpointing":
            gl.checkpointing(model)
        for seed in range(4):  # of which some close a gate
            torch.manual_seed(seed)
            if less and how == "keep less":
                with gl.recompute.keep_less():
                    loss = model(**inputs).loss
            else:
                loss = model(**inputs).loss
            loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *found)) and all(g.abs().max() > 0 for g in found[0])


def test_it_learns_what_a_sparse_delta_can_do():
    """A teacher with a delta at two places of one layer: the student finds where, and closes the other."""
    model, inputs = build("tiny-bert"), batch("tiny-bert", rows=16, padded=False)
    teacher = gl.attach(model, gl.LeTS(keep=0.002).on(layers=1))
    network = network_of(teacher)
    with torch.no_grad():
        network.U.zero_()
        network.own["1"].values.fill_(4.0)
    places, target = set(network.own["1"].index.tolist()), states(model, inputs)
    teacher.detach()
    method = gl.LeTS(keep=0.05, hidden=1, cost=0.02)
    student = gl.attach(model, method)
    assert places < set(network_of(student).own["1"].index.tolist())
    optimizer = torch.optim.Adam([p for p in model.guidelib.parameters()], lr=0.02)
    inputs.pop("labels")
    torch.manual_seed(0)
    for _ in range(150):
        model.train()
        optimizer.zero_grad()
        loss = F.mse_loss(model.base_model(**inputs).last_hidden_state, target)
        (loss + method.regularizer(student)).backward()
        optimizer.step()
    method.finish(student)
    own = network_of(student).own
    assert [*own] == ["1"]
    largest = own["1"].index[own["1"].values.abs().topk(2).indices]
    assert set(largest.tolist()) == places


def test_gates_that_all_closed_leave_nothing_to_choose():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.LeTS(hidden=3))
    with torch.no_grad():
        attachment.parts[0].networks["encoder"].gates.fill_(-1)
    attachment.method.finish(attachment)
    attachment.method.prepare(attachment, [inputs])
    assert torch.isfinite(outputs(model, inputs)).all()
