"""Sparse deltas and FishMask: what is chosen, that nothing else moves, what is kept, and Fisher's numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import batch, build, outputs, randomise
from test_half import base, fit, fresh
from test_layers import Int8, swap
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers import AutoConfig, AutoModel, BertConfig, BertForMaskedLM
from transformers.modeling_outputs import SequenceClassifierOutput

import guidelib as gl
from guidelib.core.batches import singles
from guidelib.core.files import write
from guidelib.core.points import sparse_delta
from guidelib.core.points.sparse_delta import SparseDelta
from guidelib.core.points.weight_space import WeightSpacePart
from guidelib.reparametrization import nf4
from guidelib.selective.fish_mask import _log_likelihoods, fisher


def part_of(attachment) -> SparseDelta:
    (part,) = attachment.parts
    return part


def support(part: SparseDelta) -> torch.Tensor:
    """The chosen places where all parameters are laid end to end."""
    starts = torch.tensor([0, *part._numels[:-1]]).cumsum(0)
    return part.indices + starts.repeat_interleave(part.sizes.long())


def flat(model, part: SparseDelta) -> torch.Tensor:
    return torch.cat([model.get_parameter(name).detach().flatten() for name in part.replaced])


# the support


@pytest.mark.parametrize("keep", [1e-9, 0.01, 0.37, 1.0])
def test_the_support_is_k_different_entries_spread_over_all_parameters(keep):
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.FishMask(keep=keep))
    part, head = part_of(attachment), attachment.anatomy.head()
    assert part.replaced.keys() == attachment.anatomy.base_parameters().keys() - head.keys()
    size = sum(p.numel() for p in part.replaced.values())
    k = max(1, round(keep * size))
    assert part.values.shape == part.indices.shape == (k,) and part.indices.dtype == torch.int32
    chosen = support(part)
    assert len(chosen.unique()) == k and int(chosen[-1]) < size
    shares = [int(n) - keep * p.numel() for n, p in zip(part.sizes, part.replaced.values(), strict=True)]
    assert max(map(abs, shares)) <= 1
    count = attachment.count()
    assert count.trainable == count.changed == k + count.head
    assert count.stored == 2 * k + len(part.replaced) + count.head


def test_the_first_support_is_random_and_repeatable():
    def chosen(seed):
        attachment = gl.attach(build("tiny-bert"), gl.FishMask(), seed=seed)
        return part_of(attachment).indices

    assert torch.equal(chosen(0), chosen(0)) and not torch.equal(chosen(0), chosen(1))


def test_a_tied_table_is_chosen_from_once():
    model = build("tiny-t5-random")
    part = part_of(gl.attach(model, gl.FishMask(keep=1.0)))
    assert part.k == sum(p.numel() for p in {*model.parameters()} - {part.values})
    assert "shared.weight" in part.replaced and "lm_head.weight" not in part.replaced


def test_exactly_k_entries_of_the_merged_model_differ():
    model = build("tiny-bert")
    before = flat(model, part := part_of(attachment := gl.attach(model, gl.FishMask(keep=0.02))))
    randomise(attachment)
    attachment.merge()
    moved = (flat(model, part) != before).nonzero()[:, 0]
    assert torch.equal(moved, support(part)) and len(moved) == part.k == round(0.02 * len(before))


def test_targets_choose_among_the_maps_of_these_roles():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.FishMask(keep=0.5, targets=("q", "ffn.in")).on(layers=1))
    weights = {site.module for site in attachment.anatomy.linears(("q", "ffn.in")) if site.layer == 1}
    assert len(part_of(attachment).replaced) == 2 * len(weights) == 4  # with their biases
    with pytest.raises(ValueError, match="all maps of the layer that holds decoder.0.self.q"):
        gl.attach(build("tiny-gpt2"), gl.FishMask(targets="q"))
    gl.attach(build("tiny-gpt2"), gl.FishMask(targets=("q", "k", "v")))


def test_two_supports_change_their_union():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.FishMask(keep=0.3) + gl.FishMask(keep=0.2))
    first, second = (set(support(part).tolist()) for part in attachment.parts)
    count = attachment.count()
    assert first & second and count.changed == len(first | second) + count.head
    attachment.detach()
    assert gl.attach(model, gl.FishMask() + gl.FullFineTuning()).count().changed == count.total


def test_the_count_is_a_share_of_the_base():
    """FishMask's 0.5 % of BERT-large."""
    bert = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("bert", **bert))
    count = gl.attach(model, gl.FishMask()).count()
    assert count.total == 335_141_888 and count.trainable == count.changed == 1_675_709


# nothing else moves


def train(model, inputs, optimizer, steps, mask=None):
    for _ in range(steps):
        model.zero_grad()
        model(**inputs).loss.backward()
        for name, rows in (mask or {}).items():
            model.get_parameter(name).grad.mul_(rows)
        optimizer.step()


def masks(part):
    """The same support as a mask of zeros and ones for every parameter."""
    flat = torch.zeros(sum(part._numels), dtype=torch.float64).index_fill(0, support(part), 1)
    pieces = flat.split(part._numels)
    return {n: m.view(p.shape) for (n, p), m in zip(part.replaced.items(), pieces, strict=True)}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_masked_gradient_lets_the_rest_move_and_a_sparse_delta_does_not(decay):
    """Weight decay moves what is masked, and so do the moments of the time before the mask came on."""
    inputs, kind = batch("tiny-bert"), {"lr": 0.01, "weight_decay": decay}
    probe = build("tiny-bert")
    mask = masks(part_of(gl.attach(probe, gl.FishMask(keep=0.05))))

    model = build("tiny-bert")
    optimizer = torch.optim.AdamW(model.parameters(), **kind)
    for steps, given, moves in ((2, mask, decay > 0), (2, None, True), (1, mask, True)):
        before = {name: model.get_parameter(name).detach().clone() for name in mask}
        train(model, inputs, optimizer, steps, given)
        outside = [(model.get_parameter(n) != before[n])[mask[n] == 0].any() for n in mask]
        assert any(outside) == moves

    model = build("tiny-bert")
    attachment = gl.attach(model, gl.FishMask(keep=0.05))
    part, start = part_of(attachment), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **kind)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):  # the second support comes with the moments of the first
        train(model, inputs, optimizer, 3)
        assert all(torch.equal(model.get_parameter(name), start[name]) for name in part.replaced)
        attachment.merge()
        moved = flat(model, part) != torch.cat([start[name].flatten() for name in part.replaced])
        assert set(moved.nonzero()[:, 0].tolist()) <= set(support(part).tolist()) and moved.any()
        attachment.unmerge()
        part.choose([torch.rand(p.shape, generator=generator) for p in part.chosen_from])


def test_without_decay_a_mask_from_the_start_is_the_same_training():
    inputs, finals = batch("tiny-bert"), []
    probe = part_of(gl.attach(build("tiny-bert"), gl.FishMask(keep=0.05)))
    for method in (gl.FullFineTuning(), gl.FishMask(keep=0.05)):
        model = build("tiny-bert")
        attachment = gl.attach(model, method)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0
        )
        train(model, inputs, optimizer, 4, None if attachment.parts else masks(probe))
        attachment.merge()
        finals.append(flat(model, probe))
    assert (finals[0] - finals[1]).abs().max() < 1e-9 and (finals[0] - flat(build("tiny-bert"), probe)).any()


def test_beside_a_16_bit_base_the_values_are_in_32_bits():
    model = build("tiny-bert", dtype=torch.bfloat16)
    part = part_of(gl.attach(model, gl.FishMask(keep=0.05)))
    assert part.values.dtype == torch.float32
    with torch.no_grad():
        for _ in range(100):  # each too small for 16 bits beside a weight of 0.1
            part.values.add_(1e-4)
    names = [n for n in part.replaced if part.moves(n)]
    for name in names:
        weight = model.get_parameter(name)
        moved = part.effective(name, weight)
        exact = weight.float().flatten().index_add(0, part.update(name)[1], part.update(name)[0])
        assert moved.dtype == torch.bfloat16 and torch.equal(moved.flatten(), exact.bfloat16())
    assert any((part.effective(n, model.get_parameter(n)) != model.get_parameter(n)).any() for n in names)


# what it takes


def kept(method):
    """Bytes for the backward pass, and its floating-point operations."""
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, method)
    inputs = batch("tiny-bert")
    return gl.costs.saved_bytes(model, inputs), gl.costs.flops(model, inputs)[1]


def test_autograd_keeps_what_full_fine_tuning_keeps_and_not_the_changed_weights(monkeypatch):
    method = gl.FishMask(keep=0.015, targets="all")
    (sparse, few), (full, _) = kept(method), kept(gl.FullFineTuning())
    model = build("tiny-bert", dtype=torch.float32)
    part = part_of(gl.attach(model, method))
    matrices = [p for p in part.replaced.values() if p.dim() == 2]
    assert sparse <= full
    monkeypatch.setattr(sparse_delta, "DENSE", math.inf)  # the whole gradient of each weight
    dense, products = kept(method)
    tokens = batch("tiny-bert")["input_ids"].numel()
    assert dense == sparse and products - few == 2 * tokens * sum(p.numel() for p in matrices)
    monkeypatch.setattr(SparseDelta, "_forward", WeightSpacePart._forward)  # W' as a tensor of its own
    q, k, v, *others = matrices  # nothing is trained below the first three
    assert kept(method)[0] - sparse == sum(p.nbytes for p in others)


@pytest.mark.parametrize("rows", [1, 40])
def test_entries_of_a_product_that_is_never_formed(rows, monkeypatch):
    monkeypatch.setattr(sparse_delta, "GATHERED", 100)
    left, right = torch.randn(rows, 7).double(), torch.randn(rows, 5).double()
    indices = torch.tensor([0, 4, 5, 17, 34], dtype=torch.int32)
    entries = sparse_delta._entries(left, right, indices)
    assert (entries - (left.t() @ right).flatten()[indices.long()]).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2"])
def test_under_autocast_it_is_what_the_definition_gives(backbone, monkeypatch):
    results = []
    for way in (SparseDelta._forward, WeightSpacePart._forward):
        monkeypatch.setattr(SparseDelta, "_forward", way)
        model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
        randomise(attachment := gl.attach(model, gl.FishMask(keep=0.1)), 0.05)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        results.append((loss.detach(), part_of(attachment).values.grad))
    (loss, gradient), (other, same) = results
    assert loss == other and gradient.dtype == torch.float32
    assert (gradient - same).norm() < 0.02 * same.norm()


# Fisher information


class Logistic(nn.Module):
    """p(1 | x) = sigmoid(w x)."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x, labels):
        score = x @ self.w
        logits = torch.stack((torch.zeros_like(score), score), dim=1)
        return SequenceClassifierOutput(F.cross_entropy(logits, labels), logits)


def logistic():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator).double()
    model = Logistic(torch.randn(6, generator=generator).double())
    return model, {"x": x, "labels": torch.randint(2, (50,), generator=generator)}


def test_the_diagonal_of_logistic_regression():
    model, data = logistic()
    p, x = torch.sigmoid(data["x"] @ model.w).detach()[:, None], data["x"]

    def found(expected):
        return fisher(model, [model.w], singles([data], "cpu"), expected)[0]

    assert (found(True) - (p * (1 - p) * x**2).mean(0)).abs().max() < 1e-12
    assert (found(False) - ((data["labels"][:, None] - p) * x).square().mean(0)).abs().max() < 1e-12
    (of_batch,) = torch.autograd.grad(model(**data).loss, model.w)
    assert (of_batch**2 / found(False)).max() < 0.5  # the mistake: the square of the mean is far smaller


@pytest.mark.parametrize("score", ["expected", "empirical"])
def test_the_mask_is_the_top_k_of_torch_func_s_gradients_of_single_examples(score):
    model, inputs = build("tiny-bert"), batch("tiny-bert", padded=False, rows=5)
    model.set_attn_implementation("eager")
    del inputs["attention_mask"]
    attachment = gl.attach(model, gl.FishMask(keep=0.03, score=score))
    part, bare = part_of(attachment), build("tiny-bert")
    bare.set_attn_implementation("eager")
    weights = {name: bare.get_parameter(name).detach() for name in part.replaced}

    def value(weights, row, label):
        logits = functional_call(bare, weights, kwargs={"input_ids": row[None]}).logits
        return logits[0].log_softmax(0) @ label

    wanted, mistake = 0, 0
    each = vmap(grad(value), (None, 0, None if score == "expected" else 0))
    one = torch.eye(2).double()
    for label in range(2) if score == "expected" else (inputs["labels"],):
        gradients = each(weights, inputs["input_ids"], one[label])
        of_all = torch.cat([gradients[name].flatten(1) for name in part.replaced], dim=1)
        p = outputs(model, inputs).softmax(1)[:, label, None] if score == "expected" else 1
        wanted = wanted + (p * of_all**2).mean(0)
        mistake = mistake + (p * of_all).mean(0) ** 2
    attachment.method.prepare(attachment, [{n: rows[:2] for n, rows in inputs.items()}, inputs])
    two = support(part)
    attachment.detach()
    attachment = gl.attach(model, gl.FishMask(keep=0.03, score=score))
    attachment.method.prepare(attachment, [inputs])
    part, chosen = part_of(attachment), support(part_of(attachment))
    assert torch.equal(chosen, wanted.topk(part.k).indices.sort().values)
    assert not torch.equal(two, chosen) and not torch.equal(
        chosen, mistake.topk(part.k).indices.sort().values
    )
    assert set(part.sizes.tolist()) != {0} and not part.trained


def test_scoring_leaves_the_model_as_it_was():
    model = build("tiny-bert").train()
    attachment = gl.attach(model, gl.FishMask(keep=0.02))
    before = copy.deepcopy(model.state_dict())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    attachment.method.prepare(attachment, [batch("tiny-bert")])
    assert model.training and names == [n for n, p in model.named_parameters() if p.requires_grad]
    after = model.state_dict()
    assert [*before] == [*after] and all(p.grad is None for p in model.parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"guidelib.FishMask.indices", "guidelib.FishMask.sizes"}


def test_samples_are_the_first_examples():
    def chosen(samples, rows):
        attachment = gl.attach(build("tiny-bert"), gl.FishMask(keep=0.02, samples=samples))
        inputs = batch("tiny-bert", rows=5)
        inputs = {name: tensor[:rows] for name, tensor in inputs.items()}
        attachment.method.prepare(attachment, [inputs])
        return part_of(attachment).indices

    assert torch.equal(chosen(2, 5), chosen(9, 2)) and not torch.equal(chosen(2, 5), chosen(3, 5))


@pytest.mark.parametrize("backbone", ["tiny-gpt2", "tiny-t5-random"])
def test_for_tokens_the_labels_are_drawn(backbone):
    found = []
    for score in ("expected", "expected", "empirical"):
        attachment = gl.attach(build(backbone), gl.FishMask(keep=0.02, score=score))
        attachment.method.prepare(attachment, [batch(backbone)])
        found.append(support(part_of(attachment)))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])

    class Sure:
        logits = torch.tensor([[[0.0, 50.0], [50.0, 0.0], [50.0, 0.0]]])

    labels = {"labels": torch.tensor([[0, 1, -100]])}
    ((p, value),) = _log_likelihoods(Sure, labels, True, torch.Generator().manual_seed(0))
    assert p == 1 and abs(float(value)) < 1e-6


def test_the_baselines_need_no_data():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.FishMask(keep=0.02, score="magnitude"))
    attachment.method.prepare(attachment, [])
    part = part_of(attachment)
    sizes = flat(model, part).abs()
    assert sizes[support(part)].min() >= sizes.sort(descending=True).values[part.k - 1]
    attachment = gl.attach(build("tiny-bert"), gl.FishMask(keep=0.02, score="random"))
    before = part_of(attachment).indices.clone()
    attachment.method.prepare(attachment, [batch("tiny-bert")])
    assert torch.equal(before, part_of(attachment).indices)


# training and files


def test_fit_chooses_once_and_a_file_brings_its_support(tmp_path):
    method = gl.FishMask(keep=0.02, samples=8)
    model = fresh("tiny-bert", method, torch.float32)
    start = support(part := part_of(gl.attached(model)))
    fit(model)
    chosen = support(part)
    assert part.trained and not torch.equal(start, chosen)
    path = gl.attached(model).save(tmp_path / "mask.safetensors")
    again = copy.deepcopy(base("tiny-bert"))
    loaded = part_of(gl.load(again, path))
    assert torch.equal(support(loaded), chosen) and torch.equal(loaded.values, part.values)
    for continued, each in ((model, part), (again, loaded)):
        before = each.values.detach().clone()
        fit(continued, lr=1e-4)
        assert torch.equal(support(each), chosen) and not torch.equal(each.values, before)


def test_after_a_training_that_failed_the_support_is_chosen_again():
    model = fresh("tiny-bert", gl.FishMask(keep=0.02, samples=2), torch.float32)
    part = part_of(gl.attached(model))
    with pytest.raises(FloatingPointError):
        fit(model, lr=1e30)
    assert not part.trained and fit(model).losses and part.trained


def test_a_file_has_the_size_of_its_values_and_indices(tmp_path):
    model = build("tiny-bert", dtype=torch.float32)
    attachment = gl.attach(model, gl.FishMask(keep=0.1))
    part, head = part_of(attachment), attachment.count().head
    path = attachment.save(tmp_path / "mask.safetensors")
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + 8 * part.k + 4 * len(part.replaced) + 4 * head


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("indices", lambda t: t.flip(0)),
        ("indices", lambda t: t - 1000),
        ("indices", lambda t: t + 10**6),
        ("indices", lambda t: t[:-1]),
        ("sizes", lambda t: t + 1),
        ("sizes", lambda t: t[:-1]),
    ],
)
def test_a_file_with_an_impossible_support_is_refused(name, change, tmp_path):
    attachment = gl.attach(build("tiny-bert"), gl.FishMask(keep=0.1))
    state = attachment.state()
    key = f"guidelib.FishMask.{name}"
    state[key] = change(state[key]).contiguous()
    path = write(tmp_path / "mask.safetensors", state, attachment._metadata(state))
    model = build("tiny-bert")
    with pytest.raises(ValueError, match="does not fit: indices must be .* ascending places"):
        gl.load(model, path)
    assert not hasattr(model, "guidelib")


def test_a_table_that_was_resized_is_not_touched():
    model = build("tiny-gpt2")
    attachment = gl.attach(model, gl.FishMask(keep=0.02))
    model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="was resized to"):
        model(**batch("tiny-gpt2"))
    attachment.detach()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"keep": 0}, "keep must be a share of the entries, more than 0 and at most 1, got 0"),
        ({"keep": 1.5}, "keep must be a share"),
        ({"keep": "all"}, "keep must be a share"),
        ({"targets": 3}, "targets must be a role"),
        ({"score": "hessian"}, "score must be one of expected, empirical, magnitude, random, got 'hessian'"),
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.FishMask(**arguments)


def test_a_quantised_parameter_is_refused():
    model = build("tiny-bert", dtype=torch.float32)
    swap(model, Int8)
    with pytest.raises(TypeError, match="is quantised"):
        gl.attach(model, gl.FishMask())


def test_expected_scores_of_a_decoder_are_taken_where_its_loss_is():
    """A token is predicted a place before its own."""
    model = build("tiny-gpt2")
    labels = torch.randint(3, 200, (1, 6))
    ids = labels.clone()
    labels[:, :4] = -100
    output = model(input_ids=ids, labels=labels)
    generator = torch.Generator().manual_seed(0)
    ((_, value),) = _log_likelihoods(output, {"labels": labels}, True, generator, ahead=True)
    (read,) = torch.autograd.grad(value, output.logits, retain_graph=True)
    (trained,) = torch.autograd.grad(output.loss, output.logits)
    places = [gradient.abs().sum(-1).nonzero()[:, 1].tolist() for gradient in (read, trained)]
    assert places[0] == places[1] == [3, 4]


def test_an_encoders_tokens_are_scored_at_their_own_places():
    inputs = {"input_ids": torch.arange(3, 10)[None], "labels": torch.full((1, 7), -100)}
    inputs["labels"][0, 0] = 5
    config = BertConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = 4
    model = BertForMaskedLM(config).double().eval()
    weight = model.bert.encoder.layer[0].output.dense.weight
    (expected,) = fisher(model, [weight], [inputs], expected=True)
    assert expected.any()


def test_weights_that_were_released_have_no_size_to_choose_by():
    model = build("tiny-bert")
    mask = gl.FishMask(0.01, targets=("q", "v"), score="magnitude")
    attachment = gl.attach(model, gl.NF4(targets="q") + mask)
    nf4.release(model)
    with pytest.raises(ValueError, match="model must be one that has them; release"):
        attachment.method.prepare(attachment, [])
