"""Keeping less: the same loss and gradients, fewer bytes, and no product twice."""

from __future__ import annotations

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from common import BACKBONES, METHOD_CASES, batch, build, outputs, randomise
from test_costs import house  # noqa: F401  (a fixture)
from test_training import QUICK, TASK, TOKENIZER
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import guidelib as gl
from guidelib import costs
from guidelib.costs.step import prepared, step_loss
from guidelib.training.recompute import keep_less

CASES = [
    (case, backbone)
    for case in METHOD_CASES
    for backbone in BACKBONES
    if backbone not in METHOD_CASES[case].refuses
]


@pytest.fixture(params=CASES, ids=lambda pair: "-".join(pair))
def attached(request):
    """(backbone name, model with the method attached and moved from its start)."""
    name, backbone = request.param
    model = build(backbone)
    randomise(gl.attach(model, METHOD_CASES[name].method))
    return backbone, model


def step(model, inputs, less):
    """The loss, every gradient by name, and the random state after a step with dropout."""
    model.zero_grad()
    torch.manual_seed(3)
    with keep_less() if less else nullcontext():
        loss = model(**inputs).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, torch.get_rng_state()


def assert_the_same_step(model, inputs):
    loss, gradients, state = step(model, inputs, less=False)
    loss_less, gradients_less, state_less = step(model, inputs, less=True)
    assert torch.equal(loss, loss_less) and torch.equal(state, state_less)
    assert gradients.keys() == gradients_less.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_less[name]), name


class Living(TorchDispatchMode):
    """The bytes of the storages that operations made and that are still alive, whoever holds them."""

    def __init__(self):
        super().__init__()
        self.seen, self.functions = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def nbytes(self, there):
        gc.collect()
        there = {tensor.untyped_storage()._cdata for tensor in there}
        return sum(n for key, (ref, n) in self.seen.items() if not ref.expired() and key not in there)


def living_bytes(model, inputs, less):
    """What saved_bytes counts, found without looking at what autograd is given to keep."""
    there = [*model.parameters(), *model.buffers(), *inputs.values()]
    with prepared(model, inputs), Living() as living, keep_less() if less else nullcontext():
        loss = step_loss(model, inputs)
    return living.nbytes([*there, loss])


# every method, every backbone


def test_loss_gradients_and_random_draws_are_the_same_to_the_bit(attached):
    backbone, model = attached
    assert_the_same_step(model.train(), batch(backbone))


@pytest.mark.parametrize(
    ("case", "backbone"),
    [(c, b) for c, b in CASES if b == "tiny-bert" or c in ("full", "lora-all")],
)
def test_never_more_is_kept_what_is_counted_is_alive_and_no_product_is_repeated(case, backbone):
    model, inputs = build(backbone), batch(backbone)
    randomise(gl.attach(model, METHOD_CASES[case].method))
    without, less = (costs.saved_bytes(model, inputs, keep_less=flag) for flag in (False, True))
    assert less <= without
    assert less == living_bytes(model, inputs, less=True)
    assert without == living_bytes(model, inputs, less=False)
    assert costs.flops(model, inputs, keep_less=True) == costs.flops(model, inputs)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["full", "lora-all"])
def test_much_less_is_kept_where_the_inputs_of_linear_layers_are(backbone, method):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone, rows=4, length=32)
    gl.attach(model, METHOD_CASES[method].method)
    less, without = (costs.saved_bytes(model, inputs, keep_less=flag) for flag in (True, False))
    assert less < 0.9 * without


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(backbone, dtype):
    model = build(backbone, dtype=dtype)
    randomise(gl.attach(model, gl.LoRA(r=2, targets="all", dropout=0.1)))
    assert_the_same_step(model.train(), batch(backbone))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_beside_gradient_checkpointing(backbone):
    model = build(backbone)
    randomise(gl.attach(model, gl.LoRA(r=2, targets="all")))
    gl.checkpointing(model)
    assert_the_same_step(model.train(), batch(backbone))
    checkpointed = costs.saved_bytes(model, batch(backbone))
    assert costs.saved_bytes(model, batch(backbone), keep_less=True) <= checkpointed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_either_attention(attention):
    model = build("tiny-bert")
    gl.attach(model, gl.FullFineTuning())
    model.set_attn_implementation(attention)
    assert_the_same_step(model.train(), batch("tiny-bert"))


@pytest.mark.parametrize(
    ("method", "gelus", "norms"),
    # the last layer's inputs come from a norm below it whose own input is not kept, so they are kept
    [(gl.HeadOnly(), 0, 0), (gl.LoRA(r=2, targets="all").on(layers=-1), 1, 1), (gl.FullFineTuning(), 2, 4)],
)
def test_below_what_is_trained_nothing_is_kept_nor_recomputed(method, gelus, norms):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, method)
    *_, (_, _, last) = gl.anatomy.Anatomy(model).blocks()
    there = [*model.parameters(), *model.buffers(), *inputs.values()]
    below = []
    with prepared(model, inputs):
        for less in (False, True):
            with Living() as living, keep_less() if less else nullcontext():
                handle = last.register_forward_pre_hook(lambda *_: below.append(living.nbytes(there)))  # noqa: B023
                loss = step_loss(model, inputs)
            handle.remove()
    assert below[1] <= below[0]
    with Living() as living:
        loss.backward()
    names = [function._schema.name for function in living.functions]
    assert (names.count("aten::gelu"), names.count("aten::native_layer_norm")) == (gelus, norms)


# the known model


KNOWN = {  # bytes kept without and with
    "full": (gl.FullFineTuning(), 154_419_844, 96_223_876),
    "lora r=8 on q, v": (gl.LoRA(r=8), 104_472_708, 96_608_388),
    "lora r=8 on all": (gl.LoRA(r=8, targets="all"), 152_445_060, 97_394_820),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_known_model(house, name):  # noqa: F811
    model, inputs = house
    method, without, less = KNOWN[name]
    attachment = gl.attach(model, method)
    try:
        assert costs.saved_bytes(model, inputs) == without
        assert costs.saved_bytes(model, inputs, keep_less=True) == less <= 0.7 * KNOWN["full"][1]
    finally:
        attachment.detach()


# the option


def test_measure_has_the_option():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2, targets="all"))
    without, less = gl.measure(model, inputs), gl.measure(model, inputs, keep_less=True)
    assert less.predicted.saved_bytes == less.saved_bytes < 0.8 * without.saved_bytes
    assert (less.forward_flops, less.backward_flops) == (without.forward_flops, without.backward_flops)
    with_dropout = gl.measure(model, inputs, dropout=True, keep_less=True).saved_bytes
    assert less.saved_bytes < with_dropout < gl.measure(model, inputs, dropout=True).saved_bytes


def test_fit_has_the_option(monkeypatch):
    packed = []
    pack = gl.recompute._Record.pack
    monkeypatch.setattr(gl.recompute._Record, "pack", lambda *a: packed.append(0) or pack(*a))
    losses = []
    for less in (False, True):
        model = build("tiny-bert", dtype=torch.float32)
        gl.attach(model, gl.LoRA(r=4, targets="all"))
        losses.append(gl.fit(model, TASK, TOKENIZER, **QUICK, keep_less=less).losses)
        assert bool(packed) == less
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_no_effect_without_gradients():
    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    gl.attach(model, gl.LoRA(r=2))
    before = outputs(model, inputs)
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    written = model.generate(inputs["input_ids"], **settings)
    with keep_less():
        assert torch.equal(outputs(model, inputs), before)
        assert torch.equal(model.generate(inputs["input_ids"], **settings), written)
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, before)


def test_the_model_is_left_alone_and_an_error_leaves_nothing_behind():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.FullFineTuning())
    _, expected, _ = step(model, inputs, less=False)
    with keep_less():
        loss = model(**inputs).loss
        twin = copy.deepcopy(model)
    with pytest.raises(ZeroDivisionError), keep_less():
        model(**inputs)
        1 / 0  # noqa: B018
    assert costs.saved_bytes(model, inputs) == living_bytes(model, inputs, less=False)
    for one in (model, twin):
        _, gradients, _ = step(one, inputs, less=False)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    del loss


def test_nothing_stays_after_the_backward_pass():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.FullFineTuning())
    with Living() as living:
        with keep_less():
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()
    assert living.nbytes([loss, *inputs.values(), *model.parameters(), *model.buffers()]) == 0


def test_tensors_are_freed_while_the_backward_pass_runs():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    first, last = (next(iter(part.parameters())) for part in (gl.attached(model).parts[i] for i in (0, -1)))
    alive = []
    for less in (False, True):
        with prepared(model, inputs), Living() as living, keep_less() if less else nullcontext():
            loss = step_loss(model, inputs)
        there = [*model.parameters(), *model.buffers(), *inputs.values()]
        handles = [p.register_hook(lambda _: alive.append(living.nbytes(there))) for p in (last, first)]  # noqa: B023
        loss.backward()
        [handle.remove() for handle in handles]
    late, early, late_less, early_less = alive
    assert early_less <= early < late and early_less < late_less


# single graphs, by hand


def test_a_known_graph_is_counted_by_hand():
    """Between two linear layers a norm and a GELU: of five tensors the norm's input remains."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)
            self.norm = nn.LayerNorm(16)

        def forward(self, x):
            return (self.two(F.gelu(self.norm(self.one(x)))),)

    model, inputs = Net(), {"x": torch.randn(5, 8)}
    norm = 5 * 16 + 2 * 5  # its input, mean and deviation
    assert costs.saved_bytes(model, inputs) == 4 * (norm + 5 * 16 + 5 * 16)  # the GELU's input and output
    assert costs.saved_bytes(model, inputs, keep_less=True) == 4 * norm


def gradient(function, less, **arguments):
    x = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6).requires_grad_()
    weight = torch.eye(6, dtype=torch.float64).requires_grad_()
    with keep_less() if less else nullcontext():
        y = function(x, weight)
    return torch.autograd.grad(y.sum(), (x, weight), **arguments)


def changed_before(x, w):
    y = torch.sin(x)
    y = y.add_(1)  # no recipe any more: the sine alone is not it
    return (y @ w).exp()


def changed_input(x, w):
    inner = x @ w
    y = torch.sigmoid(inner)
    inner.add_(1)  # the sigmoid does not need it, and it is no longer the sigmoid's input
    return torch.sin(y) * torch.cos(inner) @ w


def kept_before_it_changed(x, w):
    inner = x @ w
    torch.cos(inner)  # keeps it as it is now
    inner.add_(1)
    return torch.sin(inner) @ w


def changed_after(x, w):
    inner = x @ w
    kept = torch.sin(inner)
    shifted = kept + 1
    out = shifted @ w
    shifted = shifted * 2
    return out + shifted.mul_(3)


def parts_of_a_product(x, w):
    q, k = (F.gelu(x @ w)).split(3, dim=-1)
    return q.t() @ F.silu(k.contiguous())


def long_chain(x, w):
    for _ in range(600):  # deeper than Python recurses
        x = torch.sin(x) * 1.1
    return x @ w


def double_use(x, w):
    y = F.layer_norm(x @ w, (6,))
    return (y @ w) + (y @ w.t()) * torch.tanh(y)


GRAPHS = (
    *(changed_before, changed_input, kept_before_it_changed, changed_after),
    *(parts_of_a_product, long_chain, double_use),
)


@pytest.mark.parametrize("function", GRAPHS)
def test_graphs_that_could_go_wrong(function):
    for a, b in zip(gradient(function, False), gradient(function, True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", (parts_of_a_product, long_chain, double_use))
def test_a_second_backward_pass_and_second_derivatives(function):
    results = []
    for less in (False, True):
        x = torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        weight = torch.eye(6, dtype=torch.float64).requires_grad_()
        with keep_less() if less else nullcontext():
            y = function(x, weight).sum()
        first = torch.autograd.grad(y, (x, weight), retain_graph=True)
        again = torch.autograd.grad(y, (x, weight), create_graph=True)
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(first, again, strict=True))
        results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in again), (x, weight))))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_a_graph_that_stays_does_not_grow():
    x, weight = (torch.randn(8, 8, requires_grad=True) for _ in range(2))
    with Living() as living, keep_less():
        loss = (F.gelu(x @ weight) @ weight).sum()
    before = living.nbytes([])
    with living:
        torch.autograd.grad(loss, weight, retain_graph=True)
    assert living.nbytes([]) == before


@pytest.mark.parametrize("less", [False, True])
def test_a_change_in_place_between_the_passes_is_an_error(less):
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    with keep_less() if less else nullcontext():
        inner = x @ weight
        loss = (F.gelu(inner) @ weight).sum()
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="changed in place since|modified by an inplace operation"):
        loss.backward()


def test_random_operations_are_not_repeated():
    """Dropout's mask is kept; what follows from it is not."""
    x = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(64, 64, requires_grad=True)
    torch.manual_seed(0)
    with Living() as living, keep_less():
        loss = (F.dropout(F.gelu(x @ weight), 0.5) @ weight).sum()
    state = torch.get_rng_state()
    assert living.nbytes([x, weight, loss]) == 2 * 4 * 64 * 64  # the GELU's input and the mask
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
