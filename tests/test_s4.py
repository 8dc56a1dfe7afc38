"""S4: groups, a budget and its solver; and plans, whose expression depends on the model."""

import copy
import re
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from common import BACKBONES, batch, build, outputs, randomise
from test_adapters import meta

import guidelib as gl
from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Plan, Spec
from guidelib.hybrid.s4 import ALLOCATIONS, COUNTS, GROUPINGS, solve

T5_BASE = dict(model_type="t5", d_model=768, num_heads=12, num_layers=12, d_ff=3072)
MINILM = dict(
    model_type="bert", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)


def groups(method, anatomy):
    return [letters for _, _, letters, _ in method.layers(anatomy)]


def counts(attachment):
    """Parameters trained in each layer, by stack and number: added ones and the base's own."""
    found = Counter()
    for part in attachment.parts:
        stack, layer = re.search(r"_(encoder|decoder)_(?:block_)?(\d+)_", part.name).groups()
        found[stack, int(layer)] += sum(p.numel() for p in part.parameters())
    for stack, layer, block in attachment.anatomy.blocks():
        found[stack, layer] += sum(p.numel() for p in block.parameters() if p.requires_grad)
    return {place: n for place, n in sorted(found.items()) if n}


@pytest.mark.parametrize(
    ("grouping", "depth", "sizes"),
    [
        ("spindle", 12, (2, 4, 4, 2)),
        ("spindle", 6, (1, 2, 2, 1)),
        ("spindle", 4, (1, 1, 1, 1)),
        ("spindle", 2, (0, 1, 1, 0)),
        ("spindle", 1, (0, 1, 0, 0)),
        ("uniform", 12, (3, 3, 3, 3)),
        ("bottleneck", 12, (4, 2, 2, 4)),
        ("increasing", 10, (1, 2, 3, 4)),
        ("decreasing", 10, (4, 3, 2, 1)),
    ],
)
def test_layers_fall_into_consecutive_groups(grouping, depth, sizes):
    anatomy = Anatomy(meta(MINILM | dict(num_hidden_layers=depth)))
    strategy = ("A", "P", "B", "L")
    found = groups(gl.S4(grouping=grouping, strategy=strategy), anatomy)
    assert found == [letter for letter, n in zip(strategy, sizes, strict=True) for _ in range(n)]


def test_on_t5_base_half_a_percent_is_spread_equally():
    """The paper's model and budget: 24 layers, none off by more than its smallest step."""
    model = meta(T5_BASE)
    budget = int(0.005 * sum(p.numel() for p in model.parameters()))
    attachment = gl.attach(model, gl.S4())
    found, each = counts(attachment), budget / 24
    count = attachment.count()
    assert len(found) == 24 and sum(found.values()) == count.trainable == 1_092_364 <= budget == 1_114_517
    for place, n in found.items():
        assert 0 <= each - n < 3072, place  # of a prefix in two attentions; all other steps are smaller


def test_what_a_layer_has_is_what_its_sizes_say():
    method = gl.S4(76_800)
    attachment = gl.attach(meta(MINILM), method)
    found, anatomy = counts(attachment), attachment.anatomy
    for (stack, layer), sizes in method.sizes(anatomy).items():
        inside = anatomy.restrict(layer, stack)
        each = [(COUNTS[letter](inside), size) for letter, size in sizes.items()]
        assert found[stack, layer] == sum(fixed + step * size for (fixed, step), size in each)
    assert list(found.values()) == [12_680, 12_679, 12_679, 12_293, 12_293, 12_672]


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_no_allocation_spends_more_than_there_is(grouping, allocation):
    found = counts(gl.attach(meta(MINILM), gl.S4(76_800, grouping, allocation)))
    assert 70_000 < sum(found.values()) <= 76_800
    numbers = [found["encoder", layer] for layer in range(6)]
    if allocation == "increasing":
        assert numbers[5] > 1.8 * numbers[0]
    elif allocation == "decreasing":
        assert numbers[0] > 1.8 * numbers[5]


@pytest.mark.parametrize(
    ("letter", "method"),
    [
        ("A", gl.PfeifferAdapter(r=16)),
        ("L", gl.LoRA(r=8, alpha=16)),
        ("P", gl.PrefixTuning(length=16)),
        ("B", gl.BitFit()),
    ],
)
def test_one_letter_everywhere_is_that_method(letter, method):
    ours, theirs = (
        gl.attach(meta(MINILM), m).count() for m in (gl.S4(76_800, strategy=(letter,) * 4), method)
    )
    if letter == "B":  # S4 leaves the norm of the embedding as it is
        assert ours.trainable == theirs.trainable - 384 == 6 * 4224
    else:
        assert ours == theirs


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_is_the_disjoint_union_of_what_its_groups_are(backbone):
    inputs, found = batch(backbone), []
    whole = gl.S4(9000)
    pieces = whole.plan(Anatomy(build(backbone)))
    for method in (whole, pieces):
        model = build(backbone)
        attachment = gl.attach(model, method, seed=1)
        randomise(attachment)
        found.append((attachment.count(), outputs(model, inputs)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    alone = [gl.attach(build(backbone), piece).count() for piece in getattr(pieces, "methods", (pieces,))]
    head = alone[0].head
    assert sum(count.trainable - head for count in alone) == found[0][0].trainable - head <= 9000


def test_the_budget_is_of_the_layers_that_are_tuned():
    method = gl.S4(76_800, strategy=("", "", "A", "L"))
    assert set(counts(gl.attach(meta(MINILM), method))) == {("encoder", n) for n in (3, 4, 5)}
    restricted = counts(gl.attach(meta(MINILM), gl.S4(76_800).on(layers=(1, 2, 3, 4))))
    assert set(restricted) == {("encoder", n) for n in (1, 2, 3, 4)}  # four groups of one layer
    assert all(19_200 - 1536 < n <= 19_200 for n in restricted.values())


def test_sizes_of_a_layer():
    counts = {"A": (10, 5), "L": (0, 12), "B": (7, 0)}
    assert solve(100, counts) == {"A": 7, "L": 4, "B": 1}  # 7, then 45 of 93 / 2, then 48 of 48
    assert solve(1, counts) == {"A": 1, "L": 1, "B": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0}, "budget must be a whole number of at least 1, or a share"),
        ({"budget": 1.5}, "budget must be .*, got 1.5"),
        ({"budget": True}, "budget must be .*, got True"),
        ({"grouping": "round"}, "grouping must be one of spindle, uniform, .*, got 'round'"),
        ({"allocation": ["uniform"]}, "allocation must be one of uniform, increasing, decreasing"),
        ({"strategy": ("A", "P", "B")}, "strategy must be four groups' letters"),
        ({"strategy": ("A", "P", "B", "X")}, "strategy must be four groups' letters"),
        ({"strategy": ("AA", "P", "B", "L")}, "strategy must be four groups' letters"),
        ({"strategy": ("",) * 4}, "strategy must be four groups' letters"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        gl.S4(**arguments)


def test_a_budget_that_is_too_small_is_refused():
    model = meta(MINILM)
    with pytest.raises(ValueError, match="budget must be at least 39,168 for the smallest of each method"):
        gl.attach(model, gl.S4(39_167))
    assert not hasattr(model, "guidelib")
    assert gl.attach(model, gl.S4(39_168)).count().trainable <= 39_168


def test_a_group_may_have_no_layers():
    with pytest.raises(ValueError, match="strategy must be one that gives a method to the layers there are"):
        gl.attach(build("tiny-bert"), gl.S4(9000, strategy=("A", "", "", "A")))


# plans


@dataclass(frozen=True)
class Late(Plan):
    """Needs a phase: AdaLoRA in the upper half of the layers."""

    def plan(self, anatomy):
        n = anatomy.depth("encoder")
        return gl.AdaLoRA(r=4, target_r=2).on(layers=range(n // 2, n))


def test_phases_go_to_what_was_planned_for_the_model():
    """One plan on two models of different depth, restricted and in a sum: each has its own methods."""
    late, found = Late(), []
    for depth in (2, 4):
        method = late if depth == 2 else gl.LoRA(r=2, targets="k") + late
        model = gl.load_backbone("tiny-bert")[0] if depth == 2 else meta(MINILM).to_empty(device="cpu")
        found.append(gl.attach(model, method))
    first, second = found
    assert first.method.inner(first.anatomy) is first.method.inner(first.anatomy)
    mine = first.method.inner(first.anatomy).method
    assert len(first.parts_of(mine)) == len(first.parts) > 0
    assert first.method.regularizer(first) is not None and first.method.regularizer(first).requires_grad
    theirs = second.method.methods[1].inner(second.anatomy).method
    assert theirs is not mine and not first.parts_of(theirs)
    assert len(second.parts_of(theirs)) == len(second.parts) - 6


def test_a_plan_is_made_once_for_an_attachment():
    attachment = gl.attach(build("tiny-bert"), gl.S4(8000).on(layers=(0, 1)) + gl.NormTuning())
    assert len(attachment.anatomy.planned) == 1
    twin = copy.deepcopy(attachment.model)
    again = gl.attached(twin)
    ((plan, method),) = again.anatomy.planned
    assert plan is again.method.methods[0].method is not attachment.method.methods[0].method
    made = {id(part.method) for part in again.parts}
    assert made <= {id(m) for on in method.methods for m in (on.method, *getattr(on.method, "methods", ()))}


def test_it_is_a_value():
    s4 = gl.S4(strategy=["A", "P", "B", "L"])
    assert Spec.from_json(s4.to_json()) == s4 != gl.S4()
