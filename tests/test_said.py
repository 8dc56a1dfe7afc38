"""Intrinsic SAID: Fastfood against its own matrices, the subspace against full fine-tuning, and the seed."""

from __future__ import annotations

import math

import pytest
import torch
from common import TWO_CLASSES, batch, build, outputs, randomise
from transformers import AutoConfig, AutoModel

import guidelib as gl
from guidelib import costs
from guidelib.core.points.part import standing
from guidelib.reparametrization.fastfood import RADIX, Fastfood, hadamard, walsh_hadamard

CPU = torch.device("cpu")
DOUBLE = {"dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sylvester(n):
    """The Walsh-Hadamard matrix, entry by entry: the sign is the parity of the shared bits."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)], **DOUBLE)


def columns(projection, d):
    return torch.stack([projection(unit) for unit in torch.eye(d, **DOUBLE)], dim=1)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 128, 512])
@pytest.mark.parametrize("order", [2, 4, RADIX])
def test_the_walsh_hadamard_transform(n, order):
    small, x = hadamard(order), torch.randn(n, **DOUBLE, generator=seeded())
    assert torch.equal(small.double(), sylvester(order))
    once = walsh_hadamard(x, small)
    assert (once - sylvester(n) @ x).abs().max() < 1e-12
    assert (walsh_hadamard(once, small) - n * x).abs().max() < 1e-10 * n  # H H = n I


def test_gradients_of_the_transform_and_of_fastfood():
    x = torch.randn(32, **DOUBLE, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: walsh_hadamard(x, hadamard(RADIX)), (x,))
    projection = Fastfood(50, 20, seeded(), CPU)
    assert torch.autograd.gradcheck(projection, (x[:20].detach().requires_grad_(),))


@pytest.mark.parametrize(
    ("size", "d"), [(50, 20), (64, 64), (33, 5), (20, 50), (16, 64), (7, 1), (1, 3), (1, 1)]
)
def test_fastfood_is_the_product_of_its_matrices(size, d):
    """S H G Pi H B is formed as six matrices of (n, n), then cut to D rows and d columns."""
    n = 1 << (max(size, d) - 1).bit_length()
    generator = seeded(3)
    signs = torch.ones(n, **DOUBLE)
    signs[:d] = torch.randint(2, (d,), generator=generator) * 2.0 - 1
    order = torch.randperm(n, dtype=torch.int32, generator=generator)
    gaussian = torch.randn(n, generator=generator).double()
    h, permutation = sylvester(n), torch.eye(n, **DOUBLE)[order.long()]
    scale = 1 / math.sqrt(size * gaussian.square().sum())
    whole = scale * h @ gaussian.diag() @ permutation @ h @ signs.diag()
    p = columns(Fastfood(size, d, seeded(3), CPU), d)
    assert p.shape == (size, d)
    assert (p - whole[:size, :d]).abs().max() < 1e-6 * p.abs().max()  # it holds 32 bits
    assert ((whole[:size].norm(dim=1) - math.sqrt(n / size)).abs() < 1e-12).all()
    assert abs(whole[:size].square().sum() - n) < 1e-10 * n


@pytest.mark.parametrize("size", [20, 100, 128])
def test_the_scale_of_all_columns(size):
    """With d a power of two of at least D, no column is cut: each row has sqrt(n / D), all n together n."""
    p = columns(Fastfood(size, 128, seeded(), CPU), 128)
    assert ((p.norm(dim=1) - math.sqrt(128 / size)).abs() < 1e-5).all()
    assert abs(p.square().sum() - 128) < 1e-3


@pytest.mark.parametrize(("size", "d"), [(300, 100), (40, 1000)])
def test_no_number_is_cut_off_and_the_columns_have_length_one(size, d):
    """A known implementation pads theta_d with a negative length where a tensor is small, which cuts it."""
    p = columns(Fastfood(size, d, seeded(), CPU), d)
    lengths = p.norm(dim=0)
    assert lengths.min() > 0.3
    assert abs(lengths.square().mean() - 1) < 0.1
    cut = torch.nn.functional.pad(torch.ones(1000), (0, 64 - 1000))
    assert cut.shape == (64,)


def test_dense_and_fastfood_are_the_same_method():
    inputs, models = batch("tiny-bert"), []
    for projection in ("fastfood", "dense"):
        model = build("tiny-bert")
        attachment = gl.attach(model, gl.IntrinsicSAID(d=100, projection=projection))
        randomise(attachment)
        models.append((model, attachment.parts[0]))
    (fast, part), (dense, other) = models
    before = outputs(dense, inputs)
    for mine, theirs in zip(part.projections, other.projections, strict=True):
        theirs.P = columns(mine, len(part.theta))
    assert (outputs(fast, inputs) - before).abs().max() > 1e-6  # before, another matrix
    assert (outputs(fast, inputs) - outputs(dense, inputs)).abs().max() < 1e-12
    for model in (fast, dense):
        model(**inputs).loss.backward()
    for a, b in ((part.theta, other.theta), (part.scales, other.scales)):
        assert a.grad.abs().max() > 1e-6 and (a.grad - b.grad).abs().max() < 1e-12


def test_dense_columns_have_length_one_on_average():
    part = gl.attach(build("tiny-bert"), gl.IntrinsicSAID(d=100, projection="dense")).parts[0]
    lengths = torch.stack([projection.P.square().sum(0) for projection in part.projections])
    assert abs(lengths.mean() - 1) < 0.02


def test_scales_of_one_are_did():
    inputs, results = batch("tiny-bert"), []
    m = len(gl.attach(build("tiny-bert"), gl.IntrinsicSAID(d=100)).parts[0].replaced)
    for method in (gl.IntrinsicSAID(d=64 + m), gl.IntrinsicSAID(d=64, scales=False)):
        model = build("tiny-bert")
        (part,) = gl.attach(model, method).parts
        with torch.no_grad():
            part.theta.normal_(generator=seeded(5))
        model(**inputs).loss.backward()
        results.append((part, outputs(model, inputs)))
    (said, ours), (did, theirs) = results
    assert said.theta.shape == did.theta.shape == (64,) and did.scales is None
    assert torch.equal(ours, theirs) and said.theta.grad.abs().max() > 1e-6
    assert (said.theta.grad - did.theta.grad).abs().max() < 1e-12
    with torch.no_grad():  # and a scale is what its tensor's movement is multiplied by
        said.scales[3] = 2.5
        for i, (name, weight) in enumerate(said.replaced.items()):
            moved = did.effective(name, weight) - weight
            assert moved.abs().max() > 1e-6
            assert (
                said.effective(name, weight) - weight - (2.5 if i == 3 else 1) * moved
            ).abs().max() < 1e-12


class Reflection(torch.nn.Module):
    """The rows of tensor i of the orthonormal matrix I - 2 u u^T."""

    def __init__(self, u, i, sizes):
        super().__init__()
        self.u, self.rows = u, slice(sum(sizes[:i]), sum(sizes[: i + 1]))

    def forward(self, x):
        return (x - 2 * self.u * (self.u @ x))[self.rows]


def test_a_step_in_all_dimensions_is_a_step_of_full_fine_tuning():
    """With orthonormal columns and d = D, P P^T = I, and so the step of theta is P P^T g = g."""
    inputs, models = batch("tiny-bert"), []
    layer = gl.FullFineTuning().on(layers=0), gl.IntrinsicSAID(d=100, projection="dense").on(layers=0)
    for method in layer:
        model = build("tiny-bert")
        models.append((model, gl.attach(model, method)))
    (full, _), (subspace, attachment) = models
    (part,) = attachment.parts
    size = sum(p.numel() for p in part.replaced.values())
    sizes = [p.numel() for p in part.replaced.values()]
    mirror = torch.nn.functional.normalize(torch.randn(size, generator=seeded(), **DOUBLE), dim=0)
    part.theta = torch.nn.Parameter(torch.zeros(size, **DOUBLE))
    part.projections = torch.nn.ModuleList(Reflection(mirror, i, sizes) for i in range(len(sizes)))
    with torch.no_grad():
        part.scales.fill_(1).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in full.named_parameters()}
    for model, _ in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    attachment.merge()
    for name, parameter in full.named_parameters():
        assert (parameter - subspace.get_parameter(name)).abs().max() < 1e-12, name
    moved = [name for name, p in full.named_parameters() if (p - before[name]).abs().max() > 1e-6]
    assert len(moved) >= len(part.replaced)


def test_the_count_is_d():
    with torch.device("meta"):  # no projection is drawn there
        config = AutoConfig.for_model("t5", d_model=768, d_kv=64, num_heads=12, d_ff=3072, num_layers=12)
        model = AutoModel.from_config(config)
    for method in (gl.IntrinsicSAID(d=20_000), gl.IntrinsicSAID(d=20_000, scales=False)):
        attachment = gl.attach(model, method)
        count = attachment.count()
        assert count.trainable == count.stored == 20_000 and count.head == count.norms == 0
        assert count.changed == count.total and round(100 * count.trainable / count.total, 3) == 0.009
        assert all(buffer.is_meta for buffer in attachment.parts[0].buffers())
        attachment.detach()


def test_the_head_is_trained_in_place_and_everything_else_moves():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.IntrinsicSAID(d=100))
    (part,), head = attachment.parts, attachment.anatomy.head()
    count = attachment.count()
    assert len(head) == 2 and count.trainable == count.stored == 100 + count.head
    assert part.replaced.keys() == attachment.anatomy.base_parameters().keys() - head.keys()
    assert count.changed == count.total
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomise(attachment)
    attachment.merge()
    for name in attachment.anatomy.base_parameters():
        assert not torch.equal(model.get_parameter(name), plain[name]), name
    assert torch.isfinite(outputs(model, inputs)).all()


def test_a_tied_weight_has_one_projection():
    model = build("tiny-gpt2")
    attachment = gl.attach(model, gl.IntrinsicSAID(d=100))
    (part,) = attachment.parts
    embedding = model.transformer.wte.weight
    assert embedding is model.lm_head.weight
    assert sum(p is embedding for p in part.replaced.values()) == 1
    assert len(part.projections) == len(part.scales) == len({id(p) for p in part.replaced.values()})
    randomise(attachment)
    acting = [standing(layer).weight for layer in (model.transformer.wte, model.lm_head)]
    assert torch.equal(*acting) and not torch.equal(acting[0], embedding)
    assert model.transformer.wte.weight is model.lm_head.weight is embedding


def test_only_the_chosen_layers_move():
    model = build("tiny-bert")
    attachment = gl.attach(model, gl.IntrinsicSAID(d=50).on(layers=-1))
    inside = dict(list(attachment.anatomy.blocks())[-1][2].named_parameters())
    assert {id(p) for p in attachment.parts[0].replaced.values()} == {id(p) for p in inside.values()}
    size = sum(p.numel() for p in inside.values())
    assert attachment.count().changed == size + attachment.count().head


def test_the_seed_and_nothing_else_makes_the_projections():
    inputs, seen = batch("tiny-bert"), {}
    for name, seed, attach_seed, dtype in (
        ("first", 0, 0, torch.float64),
        ("same", 0, 7, torch.float64),
        ("other", 1, 0, torch.float64),
        ("32 bits", 0, 0, torch.float32),
    ):
        torch.manual_seed(len(seen))
        state = torch.get_rng_state()
        model = build("tiny-bert", dtype=dtype)
        attachment = gl.attach(model, gl.IntrinsicSAID(d=100, seed=seed), seed=attach_seed)
        randomise(attachment)
        assert torch.equal(torch.get_rng_state(), state)
        seen[name] = outputs(model, inputs).double()
    assert torch.equal(seen["first"], seen["same"])
    assert (seen["first"] - seen["other"]).abs().max() > 1e-3
    assert (seen["first"] - seen["32 bits"]).abs().max() < 1e-5


def test_two_tensors_of_one_size_move_apart():
    part = gl.attach(build("tiny-bert"), gl.IntrinsicSAID(d=100)).parts[0]
    with torch.no_grad():
        part.theta.fill_(1)
        moved = [
            part.effective(name, p) - p
            for name, p in part.replaced.items()
            if name.endswith(("query.weight", "key.weight"))
        ]
    assert len(moved) == 4
    assert all(not torch.allclose(a, b) for i, a in enumerate(moved) for b in moved[:i])


def test_a_file_holds_d_numbers_and_finds_the_same_subspace(tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    torch.manual_seed(1)
    attachment = gl.attach(model, gl.IntrinsicSAID(d=100, seed=5))
    randomise(attachment)
    assert sum(t.numel() for t in attachment.state().values()) == 100 + attachment.count().head
    path = attachment.save(tmp_path / "said.safetensors")
    assert path.stat().st_size < 8 * attachment.count().stored + 4096
    fresh = build("tiny-bert")
    torch.manual_seed(2)
    assert gl.load(fresh, path).method == gl.IntrinsicSAID(d=100, seed=5)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_memory_of_the_projections_and_of_the_scales():
    """Two numbers for each weight, rounded up to a power of two; a scale keeps no vector of its tensor."""
    inputs, kept = batch("tiny-bert"), {}
    for scales in (True, False):
        model = build("tiny-bert", dtype=torch.float32)
        attachment = gl.attach(model, gl.IntrinsicSAID(d=100, scales=scales))
        (part,) = attachment.parts
        kept[scales] = costs.saved_bytes(model, inputs)
    m, d = len(part.replaced), len(part.theta)
    rounded = sum(1 << (max(p.numel(), 100) - 1).bit_length() for p in part.replaced.values())
    assert sum(buffer.numel() for buffer in part.buffers()) == 2 * rounded + m * (d + RADIX**2)
    # the theta of a step is a parameter, so that only the scalars are new
    assert 0 <= kept[True] - kept[False] <= 4 * m
    full = build("tiny-bert", dtype=torch.float32)
    gl.attach(full, gl.FullFineTuning())
    size = sum(p.numel() for p in part.replaced.values() if p.dim() == 2)
    assert kept[False] > costs.saved_bytes(full, inputs)  # "higher": theta' is kept besides
    assert kept[False] - costs.saved_bytes(full, inputs) < 4 * 1.2 * size


def test_the_loss_falls():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.IntrinsicSAID(d=100))
    for parameter in attachment.anatomy.head().values():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(attachment.parts[0].parameters(), lr=0.03)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_leaves_the_projection_in_32_bits():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    attachment = gl.attach(model, gl.IntrinsicSAID(d=100))
    randomise(attachment)
    (part,) = attachment.parts
    name, weight = next(iter(part.replaced.items()))
    expected = part.effective(name, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part.effective(name, weight), expected)
        model(**inputs).loss.backward()
    assert part.theta.grad.dtype == torch.float32 and part.theta.grad.abs().max() > 0


def test_it_adds_to_other_methods():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    before = outputs(model, inputs)
    attachment = gl.attach(model, gl.IntrinsicSAID(d=100) + gl.LoRA(r=2))
    assert torch.equal(outputs(model, inputs), before)
    randomise(attachment)
    acting = outputs(model, inputs)
    attachment.merge()
    assert (outputs(model, inputs) - acting).abs().max() < 1e-12
    attachment.detach()
    assert torch.equal(outputs(model, inputs), before)


def test_the_defaults_fit_the_packaged_backbone():
    model, _ = gl.load_backbone("minilm", TWO_CLASSES)
    count = gl.attach(model, gl.IntrinsicSAID()).count()
    assert count.trainable - count.head == 20_000 and count.changed == count.total


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(d=0), "d must be a whole number of at least 1, got 0"),
        (dict(d=10.0), "d must be a whole number of at least 1, got 10.0"),
        (dict(d="64"), "d must be a whole number of at least 1, got '64'"),
        (dict(scales=1), "scales must be True or False, got 1"),
        (dict(projection="sparse"), "projection must be 'fastfood' or 'dense', got 'sparse'"),
        (dict(projection=None), "projection must be 'fastfood' or 'dense', got None"),
        (dict(seed=-1), "seed must be a whole number from 0 to 2**63 - 1, got -1"),
        (dict(seed=0.5), "seed must be a whole number from 0 to 2**63 - 1, got 0.5"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.IntrinsicSAID(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(d=30), r"d must be more than 37, since each of the 37 tensors has a scale, got 30"),
        (dict(d=10**6), r"d must be at most \d+, the number of parameters that it moves, got 1000000"),
        (dict(d=10_000, projection="dense"), r"projection must be 'fastfood' here: \d+ x 10000 numbers are"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_a_model_are_refused(arguments, message):
    model = build("tiny-bert")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        gl.attach(model, gl.IntrinsicSAID(**arguments))
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())
