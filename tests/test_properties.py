"""Random methods, sums and restrictions on random tiny models: each is attached and goes the whole way, or it
is refused in one sentence and the model is as it was.

The same few hundred in every run; ``GUIDELIB_EXAMPLES=10000`` tries as many, ``GUIDELIB_SEED=1`` others.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from common import randomise
from hypothesis import HealthCheck, assume, given, note, seed, settings
from hypothesis import strategies as st
from transformers import AutoConfig

import guidelib as gl
from guidelib.additive.adapters.bottleneck import ACTIVATIONS
from guidelib.additive.adapters.linear import INITS
from guidelib.core.anatomy import ATTENTION_NAMES, SUBLAYER_NAMES
from guidelib.core.architectures import ARCHITECTURES, TARGET_NAMES
from guidelib.core.method import Method
from guidelib.core.points.sparse_delta import Selecting
from guidelib.core.points.sublayer import POINTS
from guidelib.hybrid.s4 import ALLOCATIONS, GROUPINGS
from guidelib.hybrid.sparse import SCORES as PRUNING
from guidelib.materials.backbones import MeanPoolClassifier
from guidelib.reparametrization.glora import FORMS
from guidelib.selective.fish_mask import SCORES

EXAMPLES, SEED = (int(os.environ.get(f"GUIDELIB_{name}", n)) for name, n in (("EXAMPLES", 400), ("SEED", 0)))

# models

BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
HEADS = {  # of a kind of model: transformers' class for each use
    **dict.fromkeys((*BERT_LIKE, "distilbert"), ("Model", "ModelForMaskedLM", "ModelForTokenClassification")),
    **dict.fromkeys(("t5", "mt5", "bart", "mbart"), ("Model", "ModelForSeq2SeqLM")),
}
HEADS["bart"] += ("ModelForSequenceClassification",)


@dataclass(frozen=True)
class Backbone:
    kind: str
    use: str
    crossing: bool
    heads: int
    head_size: int
    inner: int
    layers: tuple[int, int]
    gated: bool

    def build(self) -> transformers.PreTrainedModel:
        width, (first, second) = self.heads * self.head_size, self.layers
        config = dict(
            vocab_size=20, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=16,
            initializer_range=0.3, hidden_size=width, num_hidden_layers=first, intermediate_size=self.inner,
            num_attention_heads=self.heads, num_key_value_heads=1, head_dim=self.head_size, num_labels=3,
        )  # fmt: skip
        if self.kind == "distilbert":
            config |= dict(hidden_dim=self.inner)
        elif self.kind == "gpt2":
            config |= dict(n_inner=self.inner)
        elif self.kind == "electra":
            config |= dict(embedding_size=self.inner)
        elif self.kind in ("t5", "mt5"):
            config |= dict(d_kv=self.head_size + 1, d_ff=self.inner, num_decoder_layers=second)
            config |= dict(feed_forward_proj="gated-gelu" if self.gated else "relu", decoder_start_token_id=0)
        elif self.kind in ("bart", "mbart"):
            config |= dict(encoder_ffn_dim=self.inner, decoder_ffn_dim=self.inner + 1, init_std=0.3)
            config |= dict(decoder_layers=second, decoder_attention_heads=self.heads)
            config |= dict(decoder_start_token_id=1)
        if self.crossing:
            config |= dict(is_decoder=True, add_cross_attention=True)
        config = AutoConfig.for_model(self.kind, **config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.use == "mean pool":
                model = MeanPoolClassifier(config)
            else:
                model = getattr(transformers, f"Auto{self.use}").from_config(config)
        return model.double().eval()

    def batch(self, model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 20, (3, 5), generator=torch.Generator().manual_seed(1))
        ids[:, -1] = 1
        inputs = {"input_ids": ids}
        if self.use in ("ModelForSequenceClassification", "mean pool"):
            inputs["labels"] = torch.arange(3)
        elif self.use != "Model":
            inputs["labels"] = ids % 3 if self.use == "ModelForTokenClassification" else ids
        elif model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        if self.crossing:
            states = torch.randn(3, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
            inputs["encoder_hidden_states"] = states.double()
        return inputs


@st.composite
def backbones(draw) -> Backbone:
    kind = draw(st.sampled_from(sorted(ARCHITECTURES)))
    crossing = kind in (*BERT_LIKE, "gpt2") and draw(st.booleans())
    uses = HEADS.get(kind, ("Model", "ModelForCausalLM", "ModelForSequenceClassification"))
    if crossing:
        uses = ("Model", "ModelForCausalLM")
    elif kind in BERT_LIKE:
        uses += ("mean pool",)
    return Backbone(
        kind, draw(st.sampled_from(uses)), crossing,
        heads=draw(st.integers(2, 3)), head_size=draw(st.sampled_from((2, 4))), inner=draw(st.integers(4, 9)),
        layers=(draw(st.integers(2, 3)), draw(st.integers(2, 3))), gated=draw(st.booleans()),
    )  # fmt: skip


# methods

share = st.sampled_from((0.0, 0.1, 0.5))
positive = st.floats(0.1, 4.0)
roles = st.lists(st.sampled_from(("q", "k", "v", "o", "ffn.in", "ffn.out")), min_size=1, max_size=3)
places = st.lists(st.sampled_from(("self", "ffn", "attn")), min_size=1, max_size=2)
seldom = st.sampled_from((False, False, False, True))
FIELDS = {
    "only": st.just(()) | roles, "add": st.booleans(),
    "targets": st.just("all") | roles | roles | st.sampled_from(TARGET_NAMES),
    "inputs": st.just(("ffn.out",)) | st.sampled_from(((), "o", "ffn", "v")),
    "sublayers": places | places | st.sampled_from(SUBLAYER_NAMES),
    "r": st.integers(1, 3), "alpha": positive, "s": positive, "d": st.integers(1, 900),
    "dropout": share, "warmup": share, "final": share, "keep": share, "gamma": share, "consistency": share,
    "regularization": share, "beta1": st.just(0.5), "beta2": st.just(0.9), "interval": st.integers(1, 2),
    "target_r": st.integers(1, 2), "cost": share, "restarts": st.integers(0, 2), "tasks": st.integers(1, 3),
    "experts": st.integers(1, 3), "adapters": st.integers(2, 3), "seed": st.integers(0, 3),
    "shape": st.sampled_from((None, (1, 2), (2, 1), (2, 2), (4, 3))), "block": st.sampled_from((2, 6, 64)),
    "form": st.sampled_from(("add", "multiply")), "projection": st.sampled_from(("fastfood", "dense")),
    "shared": st.sampled_from(("up", "down", "none")), "activation": st.sampled_from(sorted(ACTIVATIONS)),
    "point": st.sampled_from(POINTS), "scale": positive | st.just("learned"),
    "linear": st.builds(gl.Dense, st.sampled_from(INITS)) | st.builds(
        gl.PHM, st.just(1), st.none() | st.integers(1, 2), st.booleans()),
    "length": st.integers(1, 3), "init": st.sampled_from(("vocabulary", "random", "fisher", (2,), ((3, 4),))),
    "reduction": st.integers(1, 2), "layers": st.none() | st.integers(-2, 1), "temperature": positive,
    "encoder": st.sampled_from(("lstm", "mlp")), "attentions": st.sampled_from(ATTENTION_NAMES),
    **dict.fromkeys(("hidden", "mlp", "bottleneck"), st.none() | st.integers(1, 4)),
    "mask": st.none() | st.integers(2, 19), "layer": st.none() | st.integers(1, 2),
    **dict.fromkeys(("first", "priming"), st.sampled_from((0.1, 0.5))), "rewind": seldom,
    "penalty": st.sampled_from((0.0, 1e-3)), "structured": st.booleans(), "gate_lr": positive,
    "lora": st.booleans(), "dense_lr": st.none() | positive, "residual": st.booleans(),
    "score": st.sampled_from(SCORES), "samples": st.integers(1, 4),
    "budget": st.integers(100, 3000) | st.sampled_from((0.3, 0.9)), "grouping": st.sampled_from([*GROUPINGS]),
    "allocation": st.sampled_from([*ALLOCATIONS]),
    "strategy": st.tuples(*[st.sampled_from(("A", "B", "LP", "APBL", ""))] * 4),
    "sources": st.just(()), "weights": st.none(), "space": st.none(),
    **{name: st.sampled_from(forms) for name, forms in FORMS.items()},
    **dict.fromkeys(("rank_stabilized", "freeze_A", "double", "scales", "norms", "original_norm"), seldom),
}  # fmt: skip
NAMES = ("NF4", *(name for names in gl.METHODS.values() for name in names))
WRAPPERS = ("AdapterDrop",)  # and Sparse, which is no method of the survey


@st.composite
def single(draw, name: str) -> Method:
    """One with random hyper-parameters of those that its class accepts."""
    kind = getattr(gl, name)
    fields = FIELDS | {"adapter": single("PfeifferAdapter")}
    if issubclass(kind, Selecting):
        fields |= {"targets": st.none() | FIELDS["targets"], "keep": st.sampled_from((0.01, 0.2, 1.0))}
    if kind in (gl.SparseAdapter, gl.SparseLoRA):
        fields |= {"score": st.sampled_from(PRUNING), "keep": st.sampled_from((0.05, 0.5, 1.0))}
    arguments = {field.name: draw(fields[field.name]) for field in dataclasses.fields(kind)}
    if arguments.get("form") == "multiply":
        arguments["alpha"] = None
    if "target_r" in arguments:
        arguments["target_r"] = min(arguments["target_r"], arguments["r"])
    try:
        return kind(**arguments)
    except ValueError:  # the values do not go together
        assume(False)


@st.composite
def sparse(draw, methods: st.SearchStrategy[Method]) -> Method:
    method, keep = draw(methods), draw(st.sampled_from((0.05, 0.5, 1.0)))
    try:
        return gl.Sparse(method, keep, draw(st.sampled_from(PRUNING)))
    except ValueError:  # it writes to what it adds
        assume(False)


def wider(methods: st.SearchStrategy[Method]) -> st.SearchStrategy[Method]:
    layer = st.integers(-2, 1) | st.integers(-2, 1) | st.integers(-4, 3)
    return st.one_of(
        st.builds(
            lambda method, layers, stack: method.on(layers, stack),
            methods,
            st.one_of(st.none(), layer, st.lists(layer, min_size=1, max_size=3)),
            st.sampled_from((None, None, None, "encoder", "decoder")),
        ),
        st.builds(gl.AdapterDrop, methods, drop=st.integers(0, 1), random=seldom),
        st.builds(gl.Gated, methods),
        sparse(methods),
        st.builds(lambda a, b: a + b, methods, methods),
    )


methods = st.recursive(
    st.sampled_from([name for name in NAMES if name not in WRAPPERS]).flatmap(single), wider, max_leaves=3
)


# what holds


def snapshot(model) -> tuple:
    """Everything that a refusal or ``detach`` has to leave as it was."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def check_same(model, before: tuple) -> None:
    tensors, *rest = snapshot(model)
    assert list(tensors) == list(before[0])
    assert [n for n, tensor in tensors.items() if not torch.equal(tensor, before[0][n])] == []
    assert rest == list(before[1:])


def run(model, inputs) -> torch.Tensor:
    """The logits, or the states of a bare model, without gradient."""
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if "labels" in inputs else output[0]


def train(attachment: gl.Attachment, inputs) -> None:
    """Two steps with all that ``fit`` calls.  What is frozen does not move by one bit."""
    model, method = attachment.model, attachment.method
    trained = [p for p in model.parameters() if p.requires_grad]
    own = method.rewrites(attachment.anatomy)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad and n not in own}
    optimizer = torch.optim.AdamW(trained, lr=0.01) if trained else None
    try:
        method.prepare(attachment, [inputs])
    except ValueError as refusal:
        assume("it is 0 for all entries" not in str(refusal))  # a relu that is shut, say
        raise
    for step in (1, 2):
        model.train().zero_grad()
        output = model(**inputs)
        loss = output.loss if "labels" in inputs else output[0].square().mean()
        terms = [loss, method.regularizer(attachment)]
        terms += [method.batch_loss(attachment, inputs, output)] if "labels" in inputs else []
        loss = sum(term for term in terms if term is not None)
        assert loss.isfinite()
        if trained and loss.requires_grad:  # the states of a bare backbone do not depend on a head
            loss.backward()
            optimizer.step()
            method.after_step(attachment, step, 2, optimizer)
        assert method.lr_factor(step, 2) >= 0
    method.finish(attachment)
    model.zero_grad()
    still = {n: p for n, p in model.named_parameters() if n in frozen and not p.requires_grad}
    assert [n for n, p in still.items() if not torch.equal(p, frozen[n])] == []


@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(backbone=backbones(), method=methods, merged=st.booleans())
def test_attached_it_goes_the_whole_way_or_it_is_refused(backbone, method, merged):
    model = backbone.build()
    inputs, before = backbone.batch(model), snapshot(model)
    base = run(model, inputs)
    try:
        attachment = gl.attach(model, method)
    except ValueError as refusal:
        note(f"refused: {refusal}")
        assert str(refusal) and "\n" not in str(refusal)
        return check_same(model, before)
    assert run(model, inputs).isfinite().all()
    train(attachment, inputs)
    randomise(attachment)

    acting, weights = run(model, inputs), {n: t.clone() for n, t in model.state_dict().items()}
    assert acting.isfinite().all()
    if attachment.mergeable:
        attachment.merge()
        off = (run(model, inputs) - acting).abs().max() / acting.abs().max().clamp(min=1)
        assert off <= 1e-10
        attachment.unmerge()
        assert [n for n, t in model.state_dict().items() if not torch.equal(t, weights[n])] == []
        assert torch.equal(run(model, inputs), acting)
    else:
        try:
            attachment.merge()
            raise AssertionError("merged what says that it cannot be merged")
        except ValueError as refusal:
            assert "cannot be merged" in str(refusal)

    with tempfile.TemporaryDirectory() as folder:
        path = attachment.save(Path(folder, "method.safetensors"))
        fresh = backbone.build()
        loaded = gl.load(fresh, path)
    assert loaded.method == attachment.method
    assert torch.equal(run(fresh, inputs), acting)

    if merged and attachment.mergeable:
        attachment.merge()
    attachment.detach()
    check_same(model, before)
    assert torch.equal(run(model, inputs), base)


def test_every_method_is_among_them():
    """A new one is, once its hyper-parameters are in FIELDS."""
    for name in set(NAMES) - set(WRAPPERS):
        assert {field.name for field in dataclasses.fields(getattr(gl, name))} <= {*FIELDS, "adapter"}
    assert all(issubclass(getattr(gl, name), Method) for name in NAMES)
