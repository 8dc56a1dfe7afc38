"""Pruning before training: what each score is, how much stays, and that what is gone stays away."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from common import SMALL, batch, build, outputs, randomise
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import guidelib as gl
from guidelib.core.method import Spec
from guidelib.core.points.pruned import Pruned
from guidelib.hybrid.sparse import SCORES, curved, gradient


def pruned(attachment) -> Pruned:
    (part,) = (part for part in attachment.parts if isinstance(part, Pruned))
    return part


def prepared(method, *, name="tiny-bert", seed=0):
    """An attachment whose entries are chosen."""
    attachment = gl.attach(build(name), method, seed=seed)
    method.prepare(attachment, [batch(name), batch(name, padded=False)])
    return attachment


def matrices(attachment) -> list[torch.Tensor]:
    part = pruned(attachment)
    return [part.matrix(name).detach() for name in part.shapes]


def places(part) -> torch.Tensor:
    """Of the kept entries, where all matrices are laid end to end."""
    starts = torch.tensor([0, *part._numels[:-1]]).cumsum(0)
    return part.indices + starts.repeat_interleave(part.sizes.long())


def step(model, inputs, optimizer):
    model.zero_grad()
    model(**inputs).loss.backward()
    optimizer.step()


# what stays


@pytest.mark.parametrize("score", SCORES)
def test_all_kept_it_is_the_dense_method_to_the_bit(score):
    inputs, found = batch("tiny-bert"), []
    for method in (gl.Sparse(gl.Compacter(r=4), 1.0, score), gl.Compacter(r=4)):
        attachment = prepared(method)
        trained = [p for p in attachment.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            step(attachment.model, inputs, optimizer)
        found.append((outputs(attachment.model, inputs), attachment.count().trainable))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("keep", [1e-9, 0.1, 0.25])
def test_the_best_of_all_matrices_stay_with_their_values(keep, score):
    method, dense = gl.SparseAdapter(8, keep, score), gl.attach(build("tiny-bert"), gl.PfeifferAdapter(8))
    if (keep, score) == (1e-9, "synflow"):  # one entry is no path
        with pytest.raises(ValueError, match="score must not be 'synflow' here"):
            prepared(method)
        return
    attachment = prepared(method)
    part, count = pruned(attachment), attachment.count()
    n, biases = 2 * 2 * 32 * 8, 2 * (32 + 8)
    k = max(1, round(keep * n))
    assert part.k == k == sum(int((w != 0).sum()) for w in matrices(attachment))
    assert count.trainable - count.head == count.changed - count.head == k + biases
    assert count.stored - count.head == 2 * k + 4 + biases
    starts = [p for part in dense.parts for name, p in part.named_parameters() if "weight" in name]
    for now, start in zip(matrices(attachment), starts, strict=True):
        assert torch.equal(now, start * (now != 0))
    assert part.start is None


def test_until_data_are_seen_the_places_are_random_and_spread():
    first, second = (pruned(gl.attach(build("tiny-bert"), gl.SparseAdapter(8), seed=s)) for s in (0, 1))
    assert first.sizes.tolist() == [64] * 4 and not torch.equal(first.indices, second.indices)
    random = pruned(prepared(gl.SparseAdapter(8, score="random")))
    assert torch.equal(random.indices, first.indices)


def test_what_is_trained_is_not_chosen_anew():
    attachment = gl.attach(build("tiny-bert"), gl.SparseAdapter(8))
    part, before = pruned(attachment), places(pruned(attachment)).clone()
    randomise(attachment)
    values = part.values.clone()
    attachment.method.prepare(attachment, [batch("tiny-bert")])
    assert torch.equal(places(part), before) and torch.equal(part.values, values) and part.start is None


def test_nothing_comes_back():
    """Neither by weight decay nor by the moments of entries that were there before the choice."""
    attachment = prepared(gl.SparseAdapter(8) + gl.SparseLoRA(4))
    parts = [part for part in attachment.parts if isinstance(part, Pruned)]
    before = [[part.matrix(name) != 0 for name in part.shapes] for part in parts]
    trained = [p for p in attachment.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        step(attachment.model, batch("tiny-bert"), optimizer)
    for part, masks in zip(parts, before, strict=True):
        for name, mask in zip(part.shapes, masks, strict=True):
            assert torch.equal(part.matrix(name) != 0, mask)


def test_vectors_and_shared_matrices():
    """Biases stay whole; Compacter's first factors are one matrix."""
    method = gl.Sparse(gl.Compacter(r=4, norms=False), 0.5, "magnitude")
    attachment = prepared(method)
    whole = gl.attach(build("tiny-bert"), gl.Compacter(r=4, norms=False)).count().trainable
    biases, head = 4 * (32 + 4), attachment.count().head
    assert attachment.count().trainable == head + biases + (whole - head - biases) // 2
    layers = [m for part in attachment.parts for m in part.modules() if hasattr(m, "A")]
    assert len(layers) == 8 and all(torch.equal(layer.A, layers[0].A) for layer in layers)
    assert len(pruned(attachment).shapes) == 1 + 2 * 8


# scores


def masked_loss(model, part, start, inputs):
    """The loss as a function of a mask for each matrix."""

    def loss(*masks):
        part.whole = {name: w * m for (name, w), m in zip(start.items(), masks, strict=True)}
        return model(**inputs).loss

    return loss


def taken(name="tiny-bert"):
    attachment = gl.attach(build(name), gl.SparseAdapter(4))
    part = pruned(attachment)
    return attachment.model, part, dict(part.start), batch(name)


def test_snip_is_the_slope_along_a_mask():
    model, part, start, inputs = taken()
    loss = masked_loss(model, part, start, inputs)
    masks = [torch.ones_like(w).requires_grad_() for w in start.values()]
    slopes = torch.autograd.grad(loss(*masks), masks)
    scores = gl.SparseAdapter(4).method.scores(model, part, [inputs])
    for slope, score in zip(slopes, scores.values(), strict=True):
        assert (slope.abs() - score).abs().max() < 1e-12
    twice = gl.SparseAdapter(4).method.scores(model, part, [inputs, inputs])
    assert all((2 * scores[name] - twice[name]).abs().max() < 1e-12 for name in scores)


@pytest.mark.parametrize(
    ("name", "error"),
    [("tiny-bert", 1e-6), ("tiny-t5-random", 1e-3)],  # T5 always has a softmax in 32 bits
)
def test_grasp_is_a_numerical_hessian_vector_product(name, error):
    model, part, start, inputs = taken(name)
    g = gradient(model, part, start, [inputs])
    size = sum(each.square().sum() for each in g.values()).sqrt()
    ends = []
    for sign in (1, -1):
        moved = {n: w + sign * 1e-4 * g[n] / size for n, w in start.items()}
        ends.append(gradient(model, part, moved, [inputs]))
    for n, Hg in curved(model, part, start, [inputs]).items():
        numerical = (ends[0][n] - ends[1][n]) * size / 2e-4
        assert (Hg - numerical).abs().max() < error * numerical.abs().max()
    scores = replace(gl.SparseAdapter(4, score="grasp")).method.scores(model, part, [inputs])
    Hg = curved(model, part, start, [inputs])
    assert all(torch.equal(scores[n], start[n] * Hg[n]) for n in start)


def test_grasp_keeps_what_the_gradients_length_rests_on():
    """Without an entry of a high score |g|^2 falls by twice as much, to the first order."""
    model, part, start, inputs = taken()
    with sdpa_kernel(SDPBackend.MATH):
        scores = gl.SparseAdapter(4, score="grasp").method.scores(model, part, [inputs])
    name = next(iter(start))
    place = int(scores[name].argmax())

    def length(shrunk):
        moved = {n: w.clone() for n, w in start.items()}
        moved[name].view(-1)[place] *= 1 - shrunk
        return sum(float(g.square().sum()) for g in gradient(model, part, moved, [inputs]).values())

    slope = (length(1e-4) - length(-1e-4)) / 2e-4
    assert slope == pytest.approx(-2 * float(scores[name].flatten()[place]), rel=1e-4)


def loaded_up(score):
    """What is left of the adapter of each layer, if that of the second starts a hundred times as small."""
    attachment = gl.attach(build("tiny-bert"), gl.SparseAdapter(8, 0.05, score))
    part = pruned(attachment)
    for name in [*part.start][2:]:
        part.start[name] = part.start[name] / 100
    part._take_values()
    attachment.method.prepare(attachment, [batch("tiny-bert")])
    return part.sizes.tolist()


def test_synflow_leaves_a_path_through_each_adapter_where_magnitude_does_not():
    assert loaded_up("magnitude")[2:] == [0, 0]
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.SparseAdapter(8, 0.02, "synflow"))
    attachment.method.prepare(attachment, [])
    part = pruned(attachment)
    for down, up in zip(*[iter(part.shapes)] * 2, strict=True):
        through = part.matrix(up).abs() @ part.matrix(down).abs()
        assert through.any()
        # no entry that is kept leads nowhere
        alive = part.matrix(down).abs().sum(1) > 0
        assert torch.equal(alive, part.matrix(up).abs().sum(0) > 0)


def test_synflow_conserves_its_flow():
    """At each hidden unit the scores of what comes in and of what goes out have the same sum, relu or not."""
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.SparseAdapter(8, 0.25, "synflow"))
    part = pruned(attachment)
    (name, down), (_, up) = [*part.start.items()][:2]
    module = part.holders[0].module
    weights = {"down.bias": module.down.bias, "up.bias": module.up.bias}
    part.whole = {n: w.abs().requires_grad_() for n, w in part.start.items()}
    flow = functional_call(module, weights, (torch.ones(1, 32, dtype=torch.float64),)).sum()
    assert (flow - (up.abs() @ down.abs()).sum()).abs() < 1e-12
    g_down, g_up = torch.autograd.grad(flow, [*part.whole.values()][:2])
    assert ((g_down * down.abs()).sum(1) - (g_up * up.abs()).sum(0)).abs().max() < 1e-12


# the trap


@pytest.mark.parametrize("score", SCORES[1:])
@pytest.mark.parametrize(
    ("method", "zeros"),
    [(gl.LoRA(r=2), 4), (gl.ParallelAdapter(r=4), 2), (SMALL + gl.LoRA(r=2, targets="q"), 2)],
)
def test_where_a_matrix_starts_at_zero_only_a_random_choice_is_taken(method, zeros, score):
    model = build("tiny-bert")
    with pytest.raises(ValueError, match=f"score must be 'random' where {zeros} of .* zero, got '{score}'"):
        gl.attach(model, gl.Sparse(method, score=score))
    assert not hasattr(model, "guidelib") and all(p.requires_grad for p in model.parameters())
    attachment = prepared(gl.Sparse(method, score="random"))
    assert attachment.count().trainable > attachment.count().head


def test_scores_that_are_all_zero_choose_nothing():
    attachment = gl.attach(build("tiny-bert"), gl.SparseAdapter(8))
    with pytest.raises(ValueError, match="score must not be 'snip' here, where it is 0 for all entries"):
        attachment.method.prepare(attachment, [])  # no data
    assert pruned(attachment).start is not None and pruned(attachment).whole is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": 3}, "method must be a method such as LoRA"),
        ({"keep": 0}, "keep must be a share of the entries, more than 0 and at most 1, got 0"),
        ({"score": "fisher"}, "score must be one of random, magnitude, snip, grasp, synflow, got 'fisher'"),
        ({"method": gl.ReLoRA()}, "method must be one whose parameters the optimiser alone moves"),
        ({"method": SMALL + gl.AdaMix(r=4)}, "the optimiser alone moves, got AdaMix"),
        ({"method": gl.MAM()}, "the optimiser alone moves, got PrefixTuning"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.Sparse(**{"method": SMALL} | arguments)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (gl.Sparse(gl.SparseAdapter()), "method must be one that is not sparse already, got SparseAdapter"),
        (gl.Sparse(gl.BitFit()), "method must be one that adds matrices, not vectors alone, got BitFit"),
        (gl.Sparse(gl.PrefixTuning(3), score="synflow"), "score must be another one where a part is no map"),
    ],
)
def test_what_cannot_be_pruned_is_refused(method, words):
    model = build("tiny-bert")
    with pytest.raises(ValueError, match=words):
        gl.attach(model, method)
    assert not hasattr(model, "guidelib")


# everything else


@pytest.mark.parametrize("keep", [0.01, 0.25])
def test_a_file_brings_the_places(keep, tmp_path):
    inputs = batch("tiny-bert")
    attachment = prepared(gl.SparseAdapter(8, keep) + gl.SparseLoRA(8, keep=keep, score="synflow"))
    randomise(attachment)
    fresh = build("tiny-bert")
    loaded = gl.load(fresh, attachment.save(tmp_path / "sparse.safetensors"))
    assert torch.equal(outputs(fresh, inputs), outputs(attachment.model, inputs))
    for mine, theirs in zip(attachment.parts, loaded.parts, strict=True):
        if isinstance(mine, Pruned):
            assert torch.equal(places(mine), places(theirs)) and theirs.start is None
    loaded.method.prepare(loaded, [inputs])
    assert torch.equal(outputs(fresh, inputs), outputs(attachment.model, inputs))


def test_sparse_lora_merges_to_the_product_of_its_sparse_factors():
    attachment = prepared(gl.SparseLoRA(8))
    randomise(attachment)
    model, part = attachment.model, pruned(attachment)
    layer = model.encoder.encoder.layer[0].attention.self.query
    before, acting = layer.weight.clone(), outputs(model, batch("tiny-bert"))
    A, B = (part.matrix(name) for name in [*part.shapes][:2])
    attachment.merge()
    assert (layer.weight - before - 32 / 8 * B @ A).abs().max() < 1e-12
    assert (outputs(model, batch("tiny-bert")) - acting).abs().max() < 1e-12
    attachment.unmerge()
    assert torch.equal(layer.weight, before)


def test_what_is_chosen_does_not_depend_on_where_the_method_stands():
    alone = pruned(prepared(gl.SparseAdapter(8, score="magnitude").on(layers=1)))
    restricted = gl.Sparse(gl.PfeifferAdapter(8).on(layers=1), score="magnitude")
    assert torch.equal(alone.indices, pruned(prepared(restricted)).indices)
    both = prepared(gl.SparseAdapter(8) + gl.SparseAdapter(4).on(layers=0))
    first, second = (part for part in both.parts if isinstance(part, Pruned))
    assert (first.name, second.name) == ("Sparse", "Sparse_2") and (first.k, second.k) == (256, 64)


def test_the_choice_leaves_the_model_as_it_was():
    attachment = gl.attach(build("tiny-bert"), gl.SparseAdapter(8, score="grasp"))
    model = attachment.model.train()
    attachment.method.prepare(attachment, [batch("tiny-bert")])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert pruned(attachment).whole is None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        pruned(gl.attached(twin)).values.zero_()
    assert pruned(attachment).values.all()


def test_mam_and_the_fusion_of_adapters_are_pruned_as_in_the_paper():
    for method in (gl.MAM(3, None, 4), gl.AdapterFusion(2, SMALL)):
        attachment = prepared(gl.Sparse(method, 0.25, "random"))
        whole = gl.attach(build("tiny-bert"), method).count()
        assert attachment.count().trainable < 0.4 * whole.trainable


def test_below_the_backbone_of_a_side_network_it_is_refused():
    with pytest.raises(ValueError, match="runs the backbone without gradients, in which Sparse"):
        gl.attach(build("tiny-bert"), gl.SparseLoRA(4) + gl.LST(reduction=4))


def test_sizes_of_the_comparison():
    """On MiniLM, as many as LoRA with r = 8 and the adapter with r = 16 have."""
    for sparse, dense in (
        (gl.SparseAdapter(64, 0.25), gl.PfeifferAdapter(16)),
        (gl.SparseLoRA(32, keep=0.25), gl.LoRA(8)),
    ):
        counts = [gl.predict("minilm", m, batch=1, length=2).count.trainable for m in (sparse, dense)]
        biases = 6 * 48 if isinstance(sparse, gl.SparseAdapter) else 0
        assert counts[0] - counts[1] == biases


def test_an_expression_is_a_value():
    for method in (gl.SparseAdapter(r=8), gl.SparseLoRA(), gl.Sparse(gl.LoRA(), 0.5, "random")):
        assert Spec.from_json(method.to_json()) == method
    assert gl.SparseAdapter(r=8).method == gl.Sparse(gl.PfeifferAdapter(r=8))


@pytest.mark.parametrize(
    "method", [gl.KronA(), gl.FLoRA(form="add"), gl.KronARes(residual=False)], ids=lambda m: type(m).__name__
)
def test_methods_without_a_vector_can_be_pruned(method):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.Sparse(method, 0.5, "random"))
    randomise(attachment)
    assert torch.isfinite(outputs(model, inputs)).all()


def test_vectors_are_never_pruned():
    model = build("tiny-bert")
    with pytest.raises(ValueError, match="method must be one that adds matrices, not vectors alone"):
        gl.attach(model, gl.Sparse(gl.IA3(), 0.25, "random"))
    attachment = gl.attach(model, gl.Sparse(gl.Gated(gl.LoRA(r=2)), 0.5, "random"))
    names = attachment.parts[-1].shapes
    assert names and not any("gating" in name for name in names)


def test_vectors_that_multiply_may_stand_beside_what_is_pruned():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.Sparse(gl.PfeifferAdapter(4) + gl.IA3(), 0.25, "magnitude"))
    attachment.method.prepare(attachment, [])
    (pruned,) = attachment.parts_of(attachment.method)
    assert {type(part.method) for part in pruned.holders} == {gl.PfeifferAdapter}


@pytest.mark.parametrize("method", [gl.IA3(tasks=2), gl.FLoRA(r=2)])
def test_what_multiplies_is_not_pruned(method):
    with pytest.raises(ValueError, match="method must be one that adds, for which 0 is nothing"):
        gl.attach(build("tiny-llama"), gl.Sparse(method, 0.25, "random"))


def test_scores_that_are_no_numbers_choose_nothing():
    model, inputs = build("tiny-llama"), batch("tiny-llama")
    attachment = gl.attach(model, gl.SparseAdapter(8))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="score must not be 'snip' here, where it is NaN or infinity"):
        attachment.method.prepare(attachment, [inputs])


def test_a_pruned_model_can_be_pickled():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.SparseAdapter(8))
    again = pickle.loads(pickle.dumps(model))
    assert gl.attached(again).model is again and torch.equal(outputs(again, inputs), outputs(model, inputs))
