"""What training costs: the closed forms equal the measurement, and that equals what torch really holds."""

from __future__ import annotations

import gc

import peft
import pytest
import torch
from common import (
    BACKBONES,
    TWO_CLASSES,
    assert_the_prediction_is_the_measurement,
    batch,
    build,
    predicted_and_measured,
    randomise,
)
from transformers import BertConfig, BertForSequenceClassification

import guidelib as gl
from guidelib import costs
from guidelib.core.method import Sum
from guidelib.costs import closed_form
from guidelib.materials.backbones import MeanPoolClassifier
from guidelib.reparametrization import nf4

METHODS = {  # without what a method adds to the loss, which is not in the closed form
    "full": gl.FullFineTuning(),
    "head": gl.HeadOnly(),
    "biases": gl.BitFit(),
    "biases of the paper's subset": gl.BitFit(only=("q", "ffn.in")),
    "norms": gl.NormTuning(),
    "attention": gl.CrossAttentionTuning("self"),
    "lora q, v": gl.LoRA(r=4),
    "lora all": gl.LoRA(r=2, targets="all"),
    "lora on the last layer": gl.LoRA(r=3, targets="all").on(layers=-1),
    "lora on the first layer": gl.LoRA(r=3).on(layers=0),
    **{f"lora {role}": gl.LoRA(r=5, targets=role) for role in ("q", "k", "v", "o", "ffn.in", "ffn.out")},
    "sum": gl.LoRA(r=2, targets="k").on(layers=0) + gl.LoRA(r=3, targets=("k", "ffn")),
    "sum on one weight": gl.LoRA(r=2) + gl.LoRA(r=3),
    "sum with full": gl.LoRA(r=2) + gl.FullFineTuning(),
    "adapter": gl.Adapter(r=4),
    "adapter behind attention": gl.Adapter(r=4, sublayers="self", activation="relu", norms=False),
    "adapter before dropout": gl.Adapter(r=3, activation="identity", point="before dropout"),
    "adapter with the norm": gl.PfeifferAdapter(r=4, original_norm=True),
    "adapter with the norm on the first layer": gl.PfeifferAdapter(r=4, original_norm=True).on(layers=0),
    "parallel": gl.ParallelAdapter(r=4),
    "parallel to both": gl.ParallelAdapter(r=4, sublayers=("self", "ffn"), scale="learned"),
    "adapter drop": gl.AdapterDrop(gl.Adapter(r=3, activation="silu"), drop=1),
    "adamix": gl.AdaMix(r=4, consistency=0),
    "fusion": gl.AdapterFusion(3, gl.PfeifferAdapter(r=4), 0),
    "fusion of gelu": gl.AdapterFusion(2, gl.PfeifferAdapter(r=3, activation="gelu"), 0),
    "fusion of identity": gl.AdapterFusion(2, gl.PfeifferAdapter(r=3, activation="identity"), 0),
    "fusion with the norm": gl.AdapterFusion(2, gl.PfeifferAdapter(r=4, original_norm=True), 0),
    "fusion above lora": gl.LoRA(r=2) + gl.AdapterFusion(2, gl.PfeifferAdapter(r=4), 0),
    "far": gl.FAR(keep=0.25),
    "far everywhere": gl.FAR(keep=0.5, targets="all"),
    "adapters at one place": gl.Adapter(r=3) + gl.ParallelAdapter(r=2) + gl.PfeifferAdapter(r=2),
    "adapter and lora": gl.ParallelAdapter(r=3, sublayers="self") + gl.LoRA(r=2, targets="all"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
def test_the_prediction_is_the_measurement_to_the_byte_and_to_the_operation(backbone, method):
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, METHODS[method])
    assert_the_prediction_is_the_measurement(model, backbone)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
def test_the_prediction_holds_without_a_mask_in_64_bits_and_when_merged(backbone):
    model = build(backbone)
    attachment = gl.attach(model, gl.LoRA(r=2, targets="all"))
    inputs = batch(backbone, padded=False)
    del inputs["attention_mask"]
    predicted, measured = predicted_and_measured(model, inputs)
    assert predicted == measured
    attachment.merge()
    predicted, measured = predicted_and_measured(model, batch(backbone))
    assert predicted == measured


def test_the_prediction_holds_for_the_packaged_backbone():
    model, _ = gl.load_backbone("minilm", TWO_CLASSES)
    gl.attach(model, gl.LoRA(r=8, targets="all"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (16, 64), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    predicted, measured = predicted_and_measured(
        model, {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(16) % 2}
    )
    assert predicted == measured


def house_bert():
    """The model that the published measurements were made with: 6 x 384, random weights, with pooler."""
    config = BertConfig(
        **dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536),
        **dict(vocab_size=30522, num_labels=2),
    )
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    return model.to_empty(device="cpu")


def house_batch():
    ids = torch.arange(16 * 64).reshape(16, 64) + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}


@pytest.fixture(scope="module")
def house():
    """The model, its inputs, and the measurements of fully trained and LoRA models by name."""
    torch.manual_seed(0)
    model, inputs = house_bert(), house_batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():  # positions and token types, which to_empty left unset
            buffer.copy_(torch.arange(512) if "int" in str(buffer.dtype) and buffer.shape[-1] == 512 else 0)
        model.bert.embeddings.token_type_ids.zero_()
        model.bert.embeddings.position_ids.copy_(torch.arange(512))
    return model, inputs


PUBLISHED = {  # bytes kept; trainable parameters, None where the head was trained with them
    "full": (gl.FullFineTuning(), 154_419_844, 22_713_986),
    "lora r=8 on q, v": (gl.LoRA(r=8), 104_472_708, 74_498),
    "lora r=8 on all": (gl.LoRA(r=8, targets="all"), 152_445_060, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bytes_of_the_known_model(house, name):
    model, inputs = house
    method, expected, trainable = PUBLISHED[name]
    attachment = gl.attach(model, method)
    try:
        assert trainable in (None, attachment.count().trainable)
        assert costs.saved_bytes(model, inputs) == expected
        assert closed_form.predict(model, inputs) is None  # it has another head
    finally:
        attachment.detach()


def test_operations_of_the_known_model_relative_to_its_forward_pass(house):
    """LoRA on q and v: 1.007 and 0.972 of the base's forward pass, where full fine-tuning has 1 and 2.

    Those numbers are without attention's own products, of 2 (rows x tokens^2 x d) each.  A layer has two;
    in the backward pass each factor that depends on something trained costs as much again.
    """
    model, inputs = house
    product = 2 * 16 * 64**2 * 384
    full, backward_full = costs.flops(model, inputs)
    attachment = gl.attach(model, gl.LoRA(r=8))
    forward, backward = costs.flops(model, inputs)
    attachment.detach()
    base = full - 6 * 2 * product
    forward -= 6 * 2 * product
    backward -= (5 * 4 + 3) * product  # the first layer's keys depend on nothing trained
    assert base == pytest.approx(2 * 16 * 64 * 12 * 384**2 * 6, rel=3e-4)
    assert round((backward_full - 6 * 4 * product) / base, 3) == 2.0
    assert (round(forward / base, 3), round(backward / base, 3)) == (1.007, 0.972)


@pytest.mark.parametrize(
    ("backbone", "targets", "pattern"),
    [
        ("tiny-bert", ("q", "v"), r".*\.(query|value)"),
        ("tiny-bert", "all", r".*\.layer\..*\.(query|key|value|dense)"),
        ("tiny-llama", ("q", "v"), r".*\.(q_proj|v_proj)"),
        ("tiny-t5-random", "all", r".*(Attention\.[qkvo]|\.wi_0|\.wi_1|\.wo)"),
    ],
)
def test_no_more_than_peft_needs(backbone, targets, pattern):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    gl.attach(model, gl.LoRA(r=4, alpha=8, targets=targets))
    base = build(backbone, dtype=torch.float32)
    head = [name for name in ("classifier",) if hasattr(base, name)]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=pattern, modules_to_save=head or None)
    theirs = peft.get_peft_model(base, config)

    def count(m):
        return sum(p.numel() for p in m.parameters() if p.requires_grad)

    assert count(model) == count(theirs)
    assert costs.saved_bytes(model, inputs) <= costs.saved_bytes(theirs, inputs)
    for ours, other in zip(costs.flops(model, inputs), costs.flops(theirs, inputs), strict=True):
        assert 0 < ours <= other


def test_what_a_method_adds_to_the_loss_is_in_the_costs():
    """AdaMix runs the model twice, AdaLoRA multiplies its factors with themselves."""

    def step(method):
        model = build("tiny-bert", dtype=torch.float32)
        gl.attach(model, method)
        return gl.measure(model, batch("tiny-bert"))

    once, twice = step(gl.AdaMix(r=4, consistency=0)), step(gl.AdaMix(r=4))
    assert (twice.forward_flops, twice.backward_flops) == (2 * once.forward_flops, 2 * once.backward_flops)
    assert 2 * once.saved_bytes < twice.saved_bytes < 2.1 * once.saved_bytes
    plain, penalised = step(gl.AdaLoRA(r=3, target_r=2, gamma=0)), step(gl.AdaLoRA(r=3, target_r=2))
    grams = 2 * (4 * (32 + 32) + (64 + 32) + (32 + 64)) * 2 * 3 * 3  # P' P and Q Q', layer by layer
    assert penalised.forward_flops == plain.forward_flops + grams
    assert penalised.backward_flops == plain.backward_flops + 2 * grams
    assert penalised.saved_bytes > plain.saved_bytes and penalised.operations == plain.operations


def test_what_a_method_draws_is_the_same_at_every_measurement():
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, gl.AdapterDrop(drop=1, random=True))
    found = set()
    for seed in range(8):
        torch.manual_seed(seed)
        found.add(gl.measure(model, batch("tiny-bert")))
    assert len(found) == 1
    assert closed_form.predict(model, batch("tiny-bert")) is None


# the measurement itself


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dropout", [False, True])
def test_measuring_leaves_no_trace(backbone, dropout):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    gl.attach(model, gl.LoRA(r=2, dropout=0.25) + gl.AdaMix(r=2))
    model(**inputs).loss.backward()
    model.train()
    torch.manual_seed(4)
    before = {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "inputs": {name: tensor.clone() for name, tensor in inputs.items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }
    marks = traces(model)
    gl.measure(model, inputs, dropout=dropout)
    assert traces(model) == marks
    after = {
        "state": model.state_dict(),
        "inputs": inputs,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }
    for kind in before:
        assert before[kind].keys() == after[kind].keys()
        assert all(torch.equal(tensor, after[kind][name]) for name, tensor in before[kind].items())


def traces(model):
    """Everything of a model that is no tensor and that a measurement could have left changed."""
    return {
        "random state": torch.get_rng_state().tolist(),
        "training": [module.training for module in model.modules()],
        "dropout": [
            (n, a, v) for n, m in model.named_modules() for a, v in vars(m).items() if isinstance(v, float)
        ],
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "flags": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "generation": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_numbers_do_not_depend_on_the_repeat_nor_on_the_mode(backbone):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    gl.attach(model, gl.LoRA(r=2))
    first = gl.measure(model, inputs)
    model.train()
    second = gl.measure(model, inputs)
    assert first == second and first.operations > 0
    closed = closed_form.predict(model, inputs)
    assert (closed is None) == (backbone not in ("tiny-bert", "tiny-roberta"))
    assert closed is None or closed.saved_bytes == first.predicted.saved_bytes == first.saved_bytes


def test_dropout_keeps_more():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    without, with_dropout = gl.measure(model, inputs), gl.measure(model, inputs, dropout=True)
    assert with_dropout.saved_bytes > without.saved_bytes
    assert with_dropout.predicted.saved_bytes == with_dropout.saved_bytes


def test_a_known_graph_is_counted_by_hand():
    """y = W x with a trained W keeps x; its operations are 2 n for each of the two products."""

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 4)

        def forward(self, x):
            return (torch.tanh(self.inner(x * 2)),)

    model = Linear()
    inputs = {"x": torch.randn(5, 8)}
    # x * 2 for the weight, tanh's output for its own gradient
    assert costs.saved_bytes(model, inputs) == 4 * (5 * 8 + 5 * 4)


def test_operations_are_those_that_make_or_change_a_tensor():
    class Model(torch.nn.Module):
        config = BertConfig()

        def __init__(self):
            super().__init__()
            self.linear, self.dropout = torch.nn.Linear(8, 4), torch.nn.Dropout(0.5)

        def forward(self, x):
            x = self.dropout(x).to(x.dtype).contiguous().view(5, 8).t().t()  # nothing
            x = self.linear(x)
            x[0] = 0  # a view, and one that is changed
            x = x.relu_() + x.detach()
            return torch.cat((x.to(torch.float64), x.t().contiguous().t().double()), dim=1).chunk(2)

    # linear, fill, relu and +; the cast, the copy and its cast; and cat
    assert costs.operations(Model(), {"x": torch.randn(5, 8)}) == 8


@pytest.mark.parametrize(("backbone", "each"), [("tiny-bert", 4), ("tiny-llama", 4), ("tiny-gpt2", 5)])
def test_lora_adds_two_products_a_scale_and_a_sum(backbone, each):
    """And where three maps are one layer, the copy that puts their outputs together again."""
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    base = costs.operations(model, inputs)
    attachment = gl.attach(model, gl.LoRA(r=2))
    assert costs.operations(model, inputs) == base + each * len(attachment.parts)


def test_gradient_and_optimizer_bytes_are_what_torch_holds():
    for method in (gl.FullFineTuning(), gl.LoRA(r=4, targets="all"), gl.HeadOnly()):
        model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
        gl.attach(model, method)
        measured = gl.measure(model, inputs)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"])).loss.backward()
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained)
        optimizer.step()
        moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
        assert len(moments) == 2 * len(trained)
        assert measured.memory.gradients == gradients
        assert measured.memory.optimizer == sum(t.numel() * t.element_size() for t in moments)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["full", "lora all"])
def test_file_bytes_are_those_of_the_file(backbone, method, tmp_path):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    attachment = gl.attach(model, METHODS[method])
    path = attachment.save(tmp_path / "a.safetensors")
    size = gl.measure(model, inputs).file_bytes
    assert size == path.stat().st_size
    payload = 4 * attachment.count().stored
    assert payload < size < payload + 16_384


def test_a_model_without_a_method_can_be_measured():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    plain = gl.measure(model, inputs)
    gl.attach(model, gl.FullFineTuning())
    full = gl.measure(model, inputs)
    assert plain.count is None and full.count is not None
    assert (plain.memory, plain.predicted) == (full.memory, full.predicted)
    assert (plain.forward_flops, plain.backward_flops) == (full.forward_flops, full.backward_flops)


def test_nothing_to_train_is_an_error():
    model = build("tiny-bert").requires_grad_(False)
    with pytest.raises(
        ValueError, match="model must be a model with trainable parameters, got 'MeanPoolClassifier'"
    ):
        gl.measure(model, batch("tiny-bert"))


def test_without_labels_the_first_output_stands_in_for_the_loss():
    model, inputs = build("tiny-gpt2", dtype=torch.float32), batch("tiny-gpt2")
    gl.attach(model, gl.LoRA(r=2))
    with_labels = gl.measure(model, inputs)
    del inputs["labels"]
    without = gl.measure(model, inputs)
    assert without.forward_flops == with_labels.forward_flops
    assert 0 < without.saved_bytes < with_labels.saved_bytes


@pytest.mark.parametrize("method", ["full", "lora all"])
def test_checkpointing_keeps_less_and_computes_more(method):
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert", rows=8, length=32)
    gl.attach(model, METHODS[method])
    before = gl.measure(model, inputs)
    gl.checkpointing(model)
    model.disable_input_require_grads()  # enabling asks the embeddings' output for a gradient
    after = gl.measure(model, inputs)
    assert closed_form.predict(model, inputs) is None
    assert after.saved_bytes < 0.5 * before.saved_bytes
    assert after.forward_flops == before.forward_flops
    assert before.backward_flops < after.backward_flops <= before.backward_flops + before.forward_flops
    gl.checkpointing(model, on=False)
    assert gl.measure(model, inputs) == before
    assert closed_form.predict(model, inputs) is not None
    model.enable_input_require_grads()
    assert closed_form.predict(model, inputs) is None


def test_other_models_have_no_closed_form():
    with_pooler = BertForSequenceClassification(
        BertConfig(
            vocab_size=384, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
        )
    )
    assert closed_form.predict(with_pooler, batch("tiny-bert")) is None
    assert closed_form.predict(build("tiny-distilbert"), batch("tiny-distilbert")) is None
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    assert isinstance(model, MeanPoolClassifier) and closed_form.predict(model, inputs) is not None
    inputs.pop("labels")
    assert closed_form.predict(model, inputs) is None


def test_the_kept_tensors_are_named_and_add_up():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=4).on(layers=1))
    prediction = closed_form.predict(model, inputs)
    assert sum(prediction.kept.values()) == prediction.saved_bytes
    tokens, width = 27, 32
    assert prediction.kept["1.attention q"] == 4 * tokens * width
    assert not any(
        name.startswith("0.") and name != "0 output" for name in prediction.kept
    )  # below what is trained


# the plan


PLANS = [  # of a billion parameters -> GB of weights, gradients, master copy, optimizer; multiple
    (dict(trainable=10**9), (4, 4, 0, 8), 4.0),
    (dict(trainable=10**9, precision="mixed"), (2, 2, 4, 8), 8.0),
    (dict(trainable=10**9, precision="bf16"), (2, 2, 0, 4), 4.0),
    (dict(trainable=0), (4, 0, 0, 0), 1.0),
    (dict(trainable=0, precision="mixed"), (2, 0, 0, 0), 1.0),
    (dict(trainable=10**7), (4, 0.04, 0, 0.08), 1.03),
    (dict(trainable=10**7, precision="mixed"), (2, 0.02, 0.04, 0.08), 1.07),
    (dict(trainable=10**9, activations=5 * 10**9), (4, 4, 0, 8), 5.25),
]


@pytest.mark.parametrize(("arguments", "gigabytes", "multiple"), PLANS)
def test_memory_plan_by_hand(arguments, gigabytes, multiple):
    plan = gl.memory_plan(10**9, **arguments)
    assert (plan.weights, plan.gradients, plan.master, plan.optimizer) == tuple(
        round(n * 10**9) for n in gigabytes
    )
    assert plan.activations == arguments.get("activations", 0)
    assert plan.total == round(sum(gigabytes) * 10**9) + plan.activations
    assert plan.multiple == pytest.approx(multiple, abs=1e-12)


def test_mixed_precision_takes_sixteen_bytes_a_parameter():
    assert gl.memory_plan(7, 7, precision="mixed").total == 16 * 7
    assert gl.memory_plan(7, 7).total == 4 * 4 * 7


BAD_PLANS = [
    (dict(parameters=0, trainable=0), "parameters must be a whole number of at least 1, got 0"),
    (dict(parameters=-1, trainable=0), "parameters must be a whole number of at least 1, got -1"),
    (dict(parameters=1, trainable=-1), "trainable must be a whole number of at least 0, got -1"),
    (
        dict(parameters=1, trainable=1, activations=-5),
        "activations must be a whole number of at least 0, got -5",
    ),
    (
        dict(parameters=1, trainable=1, precision="int4"),
        "precision must be one of fp32, mixed, bf16, got 'int4'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_PLANS)
def test_impossible_plans(arguments, message):
    with pytest.raises(ValueError) as error:
        gl.memory_plan(**arguments)
    assert message in str(error.value)


def test_the_plan_agrees_with_the_measurement():
    """The plan's gradients and moments are those of measure, method by method."""
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    for method in METHODS.values():
        if isinstance(method, Sum):
            continue
        attachment = gl.attach(model, method)
        randomise(attachment)
        measured, count = gl.measure(model, inputs), attachment.count()
        plan = gl.memory_plan(count.total, count.trainable, activations=measured.saved_bytes)
        assert (plan.gradients, plan.optimizer) == (measured.memory.gradients, measured.memory.optimizer)
        assert plan.activations == measured.memory.activations
        # a plan knows neither buffers nor what a method adds
        added = sum(t.nbytes for part in attachment.parts for t in (*part.parameters(), *part.buffers()))
        rest = sum(b.nbytes for name, b in model.named_buffers() if not name.startswith("guidelib."))
        assert measured.memory.weights == plan.weights + added + rest
        attachment.detach()


def test_measuring_leaves_no_memory_behind():
    """A saved tensor that holds its own graph is never freed, and a notebook that measures ten times dies."""
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, gl.FullFineTuning())
    inputs = batch("tiny-bert", rows=8, length=64)

    def living():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    costs.saved_bytes(model, inputs)
    before = living()
    for _ in range(3):
        costs.saved_bytes(model, inputs)
    assert living() == before


@pytest.mark.parametrize("backbone", BACKBONES)
def test_16_bit_models_have_no_closed_form_and_are_predicted_on_shapes(backbone):
    model = build(backbone, dtype=torch.bfloat16)
    gl.attach(model, gl.LoRA(r=2))
    measured = gl.measure(model, batch(backbone))
    assert closed_form.predict(model, batch(backbone)) is None
    assert 0 < measured.saved_bytes == measured.predicted.saved_bytes


def test_weights_are_counted_where_they_are():
    """Once where they are shared, and of a base that NF4 has let go only the codes."""
    model, inputs = build("tiny-gpt2", dtype=torch.float32), batch("tiny-gpt2")
    attachment = gl.attach(model, gl.NF4() + gl.LoRA(r=2))
    weights = gl.measure(model, inputs).memory.weights
    assert weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    freed = nf4.release(model)
    layers = len({part.site.module for part in attachment.parts if isinstance(part, nf4.NF4Part)})
    assert gl.measure(model, inputs).memory.weights == weights - freed + 4 * layers  # a number for each


def test_operations_are_those_of_a_real_backward_pass():
    """Checkpointing makes the embeddings' output require a gradient, and the pass then runs to the bottom."""
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    gl.attach(model, gl.HeadOnly())
    _, plain = costs.flops(model, inputs)
    model.enable_input_require_grads()
    _, whole = costs.flops(model, inputs)
    assert plain < 100_000 < whole


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_batch_without_a_mask_is_measured(name):
    model = build(name)
    gl.attach(model, gl.LoRA(r=2))
    ids = batch(name)["input_ids"]
    found = gl.measure(model, {"input_ids": ids, "labels": ids})
    assert found.predicted == costs.step.count_step(model, {"input_ids": ids, "labels": ids})


def test_bart_in_float16_looks_at_its_states():
    method = gl.LoRA(r=2)
    predicted = gl.predict("tiny-bart", method, batch=3, length=9, dtype=torch.float16)
    model = build("tiny-bart", dtype=torch.float16)
    gl.attach(model, method)
    ids = torch.ones(3, 9, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert costs.saved_bytes(model, inputs) == predicted.saved_bytes


def test_no_layer_is_left_out_by_chance():
    model, inputs = build("tiny-bart"), batch("tiny-bart")
    gl.attach(model, gl.LoRA(r=2))
    whole = costs.flops(model, inputs), costs.saved_bytes(model, inputs)
    kept = costs.saved_bytes(model, inputs, dropout=True)
    model.model.encoder.layerdrop = 0.9
    assert (costs.flops(model, inputs), costs.saved_bytes(model, inputs)) == whole
    assert costs.saved_bytes(model, inputs, dropout=True) == kept
    assert gl.measure(model, inputs, dropout=True).predicted.saved_bytes == kept
    assert model.model.encoder.layerdrop == 0.9


def test_measuring_does_not_depend_on_the_callers_gradients():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    wanted = gl.measure(model, inputs)
    with torch.no_grad():
        assert gl.measure(model, inputs) == wanted


def test_an_interrupted_preparation_gives_the_modes_back(monkeypatch):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    before = [(m.training, m.p) for m in dropouts]
    train = type(model).train

    def interrupted(self, mode=True):
        train(self, mode)
        dropouts[0].p = 0.0
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "train", interrupted)
    was = dropouts[0].p
    with pytest.raises(KeyboardInterrupt):
        costs.saved_bytes(model, inputs)
    dropouts[0].p = was
    assert [(m.training, m.p) for m in dropouts] == before


@pytest.mark.parametrize(
    ("model", "given", "words"),
    [
        ("tiny-bert", {}, "model must be a transformers model"),
        (None, torch.ones(2, 3), "batch must be a mapping of names to tensors"),
        (None, {"output_hidden_states": True}, "batch must be a mapping of names to tensors"),
    ],
)
def test_what_is_no_model_or_batch_is_refused(model, given, words):
    with pytest.raises(ValueError, match=words):
        gl.measure(model or build("tiny-bert"), given)


def test_a_merged_method_alone_has_no_step():
    model = build("tiny-gpt2")
    attachment = gl.attach(model, gl.LoRA(r=2))
    attachment.merge()
    with pytest.raises(ValueError, match="model must be unmerged; call unmerge.. first, got 'a merged one'"):
        gl.measure(model, batch("tiny-gpt2"))


def test_the_positions_that_a_model_counts_from_are_not_room():
    with pytest.raises(ValueError, match="length must be at most 256, the positions of the encoder, got 257"):
        gl.predict("tiny-roberta", gl.LoRA(r=2), batch=1, length=257)


@pytest.mark.parametrize("change", ["eager", "gelu_new", "relu", "float mask", "position_ids"])
def test_where_the_closed_form_does_not_hold_there_is_none(change):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2))
    assert closed_form.predict(model, inputs) is not None
    if change == "eager":
        model.set_attn_implementation("eager")
    elif change in ("gelu_new", "relu"):
        model.config.hidden_act = change
    elif change == "float mask":
        inputs["attention_mask"] = inputs["attention_mask"].float()
    else:
        inputs["position_ids"] = torch.arange(9).expand(3, -1)
    assert closed_form.predict(model, inputs) is None
