"""Prompts and prefixes: what they are equal to, and where they stand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from common import (
    BACKBONES,
    DECODERS,
    SEQ2SEQ,
    assert_the_prediction_is_the_measurement,
    batch,
    build,
    outputs,
    padded_left,
    randomise,
    states,
)
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
    T5ForTokenClassification,
)

import guidelib as gl
from guidelib.additive.soft_prompts.reparametrized import LSTM
from guidelib.core.anatomy import Anatomy
from guidelib.costs import operations
from guidelib.materials.configs import load_config

TOKENS = (7, 30, 11, 200)


# what they are equal to


def near(backbone):
    """How near two runs over texts of different lengths come in 64 bits.

    transformers takes the norms of LLaMA and T5 in 32 bits, where the last bit of a mean may depend on how
    many rows there are: a processor adds several at once.
    """
    return 1e-6 if backbone in ("tiny-llama", "tiny-t5-random", "tiny-t5v1-random") else 1e-12


@pytest.mark.parametrize("backbone", BACKBONES)
def test_vectors_of_real_tokens_are_those_tokens(backbone):
    model, inputs = build(backbone), batch(backbone)
    own = torch.tensor(TOKENS).expand(len(inputs["input_ids"]), -1)
    longer = inputs | {
        "input_ids": torch.cat((own, inputs["input_ids"]), 1),
        "attention_mask": torch.cat((torch.ones_like(own), inputs["attention_mask"]), 1),
    }
    expected = states(model, longer)
    gl.attach(model, gl.PromptTuning(length=4, init=TOKENS))
    found = states(model, inputs)
    if backbone not in SEQ2SEQ:
        expected, text = expected[:, 4:], inputs["attention_mask"].bool()
        expected, found = expected[text], found[text]
    assert (found - expected).abs().max() < near(backbone)


def keys_and_values(model, inputs):
    """What each attention keeps of the tokens, (P, 2, width)."""
    with torch.no_grad():
        layers = model(**inputs, use_cache=True).past_key_values.layers
    return [torch.stack((each.keys, each.values), 3)[0].permute(1, 2, 0, 3).flatten(2) for each in layers]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", DECODERS)
def test_a_prefix_of_real_keys_and_values_is_those_tokens(backbone, implementation):
    """At the positions that the text has behind them, which a prefix does not shift."""
    model, inputs = build(backbone), batch(backbone)
    model.set_attn_implementation(implementation)
    own = torch.tensor([TOKENS])
    rows, n = inputs["input_ids"].shape
    before = keys_and_values(model, {"input_ids": own})
    longer = torch.cat((own.expand(rows, -1), inputs["input_ids"]), 1)
    mask = torch.cat((torch.ones(rows, 4), inputs["attention_mask"]), 1).long()
    with torch.no_grad():
        expected = model(input_ids=longer, attention_mask=mask).logits[:, 4:]
    attachment = gl.attach(model, gl.PrefixTuning(length=4))
    for part, values in zip(attachment.parts, before, strict=True):
        part.prefix.P.data.copy_(values)
    positions = torch.arange(4, 4 + n).expand(rows, -1)
    found = outputs(
        model, {k: inputs[k] for k in ("input_ids", "attention_mask")} | {"position_ids": positions}
    )
    assert (found - expected)[inputs["attention_mask"].bool()].abs().max() < near(backbone)


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-llama", "tiny-t5-random"])
def test_attention_with_a_prefix_is_a_mixture(backbone):
    """(1 - lambda) of the attention to the text and lambda of that to the prefix, in each attention."""
    from guidelib.core.points import prefix

    model, inputs = build(backbone), batch(backbone, padded=False)
    attachment = gl.attach(model, gl.PrefixTuning(length=3))
    randomise(attachment)
    seen, attend = [], prefix.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def look(module, query, key, value, mask, **kwargs):
        result = attend(module, query, key, value, mask, **kwargs)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        scores = query @ key.mT * scale
        if (bias := kwargs.get("position_bias")) is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        own, text = scores[..., :3], scores[..., 3:]
        share = torch.sigmoid(own.logsumexp(-1) - text.logsumexp(-1)).unsqueeze(-1)
        mixture = (1 - share) * (text.softmax(-1) @ value[:, :, 3:]) + share * (
            own.softmax(-1) @ value[:, :, :3]
        )
        seen.append((mixture.transpose(1, 2) - result[0]).abs().max())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prefix.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", look)
        outputs(model, inputs)
    assert len(seen) == len(attachment.parts) and max(seen) < 1e-12


def test_zeros_are_no_prefix():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    base = outputs(model, inputs)
    for part in gl.attach(model, gl.PrefixTuning(length=3)).parts:
        part.prefix.P.data.zero_()
    assert (outputs(model, inputs) - base).abs().max() > 1e-4


# PEFT's


def theirs(model, kind, task):
    peft = get_peft_model(copy.deepcopy(model), kind(task_type=task, num_virtual_tokens=4)).double().eval()
    return peft, next(iter(peft.prompt_encoder["default"].parameters()))


def results(model, inputs, trained, text=...):
    """The logits of the text, and the gradients."""
    loss = (logits := model(**inputs).logits[:, -inputs["input_ids"].shape[1] :][text]).square().mean()
    loss.backward()
    return logits.detach(), [p.grad for p in trained]


@pytest.mark.parametrize("backbone", DECODERS)
def test_a_prompt_is_pefts_on_a_decoder(backbone):
    model, inputs = build(backbone), batch(backbone)
    del inputs["labels"]
    text = inputs["attention_mask"].bool()
    peft, vectors = theirs(model, PromptTuningConfig, "CAUSAL_LM")
    part = gl.attach(model, gl.PromptTuning(length=4)).parts[0]
    part.prompt.P.data.copy_(vectors)
    mine, (gradient,) = results(model, inputs, [part.prompt.P], text)
    its, (expected,) = results(peft, inputs, [vectors], text)
    assert (mine - its).abs().max() < 1e-12 and (
        gradient - expected
    ).abs().max() < 1e-12 < expected.abs().max()


@pytest.mark.parametrize("backbone", SEQ2SEQ)
def test_half_of_pefts_prompt_of_an_encoder_decoder_is_dead(backbone):
    """The function is ours; it trains twice as many, and half of them never get a gradient."""
    model, inputs = build(backbone), batch(backbone)
    peft, vectors = theirs(model, PromptTuningConfig, "SEQ_2_SEQ_LM")
    attachment = gl.attach(model, gl.PromptTuning(length=4))
    P = attachment.parts[0].prompt.P
    P.data.copy_(vectors[:4])
    losses = [each(**inputs).loss for each in (model, peft)]
    for loss in losses:
        loss.backward()
    assert (losses[0] - losses[1]).abs() < 1e-12 and (P.grad - vectors.grad[:4]).abs().max() < 1e-12
    assert len(vectors) == 2 * len(P) and not vectors.grad[4:].any() and P.grad.any(1).all()


@pytest.mark.parametrize("backbone", DECODERS)
def test_a_prefix_is_pefts_at_its_positions(backbone):
    """PEFT's prefix goes by way of a cache, which shifts the text by its length."""
    model, inputs = build(backbone), batch(backbone)
    del inputs["labels"]
    text, rows = inputs["attention_mask"].bool(), len(inputs["input_ids"])
    peft, table = theirs(model, PrefixTuningConfig, "CAUSAL_LM")
    parts = gl.attach(model, gl.PrefixTuning(length=4)).parts
    for part, layer in zip(parts, peft.get_prompt(1).layers, strict=True):
        part.prefix.P.data.copy_(
            torch.stack((layer.keys[0], layer.values[0]), 2).transpose(0, 1).transpose(1, 2).flatten(2)
        )
    shifted = inputs | {"position_ids": torch.arange(4, 13).expand(rows, -1)}
    mine, gradients = results(model, shifted, [part.prefix.P for part in parts], text)
    its, (expected,) = results(peft, inputs, [table], text)
    assert (mine - its).abs().max() < 1e-12
    assert torch.cat([g.flatten() for g in gradients]).norm() == pytest.approx(
        float(expected.norm()), abs=1e-12
    )
    assert (outputs(model, inputs) - outputs(model, shifted))[text].abs().max() > (
        1e-4 if backbone == "tiny-gpt2" else 1e-6
    )


@pytest.mark.parametrize("name", ["prefix", "prefix-mlp"])
def test_a_prefix_is_adapterhubs(name):
    """Whose positions are those of the text.  tests/golden/make_adapters.py wrote the file."""
    golden = load_file(Path(__file__).parent / "golden/adapters.safetensors")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    ids = dict(vocab_size=40, max_position_embeddings=12, type_vocab_size=1, pad_token_id=0)
    model = BertModel(BertConfig(**sizes, **ids), add_pooling_layer=False).double().eval()
    model.load_state_dict({k.removeprefix("base/"): t for k, t in golden.items() if k.startswith("base/")})
    values, gradients = (
        {k.rsplit("self_prefix.", 1)[1]: t for k, t in golden.items() if k.startswith(f"{name}/{kind}")}
        for kind in ("value", "gradient")
    )
    parts = gl.attach(model, gl.PrefixTuning(length=5, mlp=None if name == "prefix" else 7)).parts
    if name == "prefix":  # (P, layers * 2, width)
        mine = {"control_trans": [part.prefix.P for part in parts]}
        per_layer = {k: list(t.view(5, 2, 2, 32).unbind(1)) for k, t in values.items()}
        expected = {k: list(t.view(5, 2, 2, 32).unbind(1)) for k, t in gradients.items()}
    else:
        made, layers = parts[0], parts[0].encoder.layers
        mine = {"wte.weight": [made.E]} | {
            f"control_trans.{2 * i}.{kind}": [getattr(layers[i], kind)]
            for i in range(2)
            for kind in ("weight", "bias")
        }
        per_layer, expected = ({k: [t] for k, t in found.items()} for found in (values, gradients))
    assert mine.keys() == per_layer.keys() == expected.keys()
    for key, parameters in mine.items():
        for parameter, value in zip(parameters, per_layer[key], strict=True):
            parameter.data.copy_(value)
    output = model(golden["input_ids"], golden["attention_mask"]).last_hidden_state
    assert (output - golden[f"{name}/output"]).abs().max() < 1e-12
    (output * golden["weights"]).sum().backward()
    for key, parameters in mine.items():
        for parameter, gradient in zip(parameters, expected[key], strict=True):
            assert (parameter.grad - gradient).abs().max() < 1e-12, key


def test_pefts_prefix_leaves_t5s_encoder_alone_and_half_of_it_is_dead():
    model, inputs = build("tiny-t5-random"), batch("tiny-t5-random")
    peft, table = theirs(model, PrefixTuningConfig, "SEQ_2_SEQ_LM")
    with torch.no_grad():
        encoded = [each.get_encoder()(inputs["input_ids"])[0] for each in (model, peft.base_model)]
    assert torch.equal(*encoded)
    peft(**inputs).loss.backward()
    assert (table.grad != 0).double().mean() <= 0.5
    attachment = gl.attach(model, gl.PrefixTuning(length=4))
    assert {part.attention.name for part in attachment.parts} == {
        f"{stack}.{layer}.{role}" for layer in (0, 1) for stack, role in
        (("encoder", "self"), ("decoder", "self"), ("decoder", "cross"))
    }  # fmt: skip
    model(**inputs).loss.backward()
    assert all(part.prefix.P.grad.any(-1).all() for part in attachment.parts)


def test_checkpointing_drops_pefts_prefix_and_not_ours():
    """Then there are no keys for the mask that PEFT has made longer."""

    def loss(each):
        torch.manual_seed(0)
        return each.train()(**inputs).loss.item()

    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    peft, _ = theirs(model, PrefixTuningConfig, "CAUSAL_LM")
    gl.attach(model, gl.PrefixTuning(length=4))
    before = loss(model)
    for each in (model, peft.base_model):
        gl.checkpointing(each)
    assert abs(loss(model) - before) < 1e-12
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        loss(peft)


# what comes out is the text's


@pytest.mark.parametrize("kind", ["pooler", "last token"])
def test_heads_see_the_text_alone(kind):
    """BERT's pooler reads the first token and not the first vector, GPT-2's classifier the last that is no
    padding."""
    small = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99, intermediate_size=32
    )
    if kind == "pooler":
        model = BertForSequenceClassification(BertConfig(**small))
    else:
        model = GPT2ForSequenceClassification(
            GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99, pad_token_id=0)
        )
    model, ids = model.double().eval(), torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    body, seen = model.base_model, []
    gl.attach(model, gl.PromptTuning(length=3))
    with torch.no_grad():
        states = body(**inputs).last_hidden_state
        hook = (model.bert.pooler.dense if kind == "pooler" else model.score).register_forward_hook(
            lambda module, args, out: seen.append(args[0])
        )
        model(**inputs)
    hook.remove()
    assert states.shape[:2] == ids.shape
    expected = states[:, 0] if kind == "pooler" else states
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("backbone", DECODERS)
def test_as_many_logits_are_kept_as_asked_for(backbone):
    model, inputs = build(backbone), batch(backbone)
    gl.attach(model, gl.PromptTuning(length=3))
    del inputs["labels"]
    every = outputs(model, inputs)
    last = outputs(model, inputs | {"logits_to_keep": 2})
    assert every.shape[1] == 9 and last.shape[1] == 2 and (last - every[:, -2:]).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", ["tiny-gpt2", "tiny-bert", "tiny-roberta"])
def test_positions_are_counted_from_the_text(backbone):
    """Also where nobody says so, and padding stands on the left: the model alone would count that, too."""
    model, inputs = build(backbone), batch(backbone, padded=False)
    randomise(gl.attach(model, gl.PromptTuning(length=4)))
    left = padded_left(model, inputs, 5)
    del left["position_ids"]
    assert (states(model, left)[:, 5:] - states(model, inputs)).abs().max() < 1e-12


# counts, and what is refused


T5 = {  # d_model, heads, layers of version 1.1
    "small": (512, 6, 8),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
    "XL": (2048, 32, 24),
    "XXL": (4096, 64, 24),
}


def test_published_counts():
    prompts = {}
    for name, (d_model, num_heads, num_layers) in T5.items():
        config = T5Config(d_model=d_model, num_heads=num_heads, num_layers=num_layers, d_ff=4 * d_model)
        prompts[name] = gl.count(config, gl.PromptTuning(length=100)).trainable
    assert prompts == {"small": 51_200, "base": 76_800, "large": 102_400, "XL": 204_800, "XXL": 409_600}
    gpt2_medium = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    assert gl.count(gpt2_medium, gl.PrefixTuning(length=5)).stored == 245_760
    assert gl.count(BertConfig(), gl.PrefixTuning(length=10)).stored == 184_320
    t0 = T5Config(d_model=2048, num_heads=32, num_layers=24, d_ff=5120, feed_forward_proj="gated-gelu")
    assert gl.count(t0, gl.PrefixTuning(length=2)).stored == 589_824


REFUSED = [
    (lambda: gl.PromptTuning(length=0), "length must be a whole number of at least 1, got 0"),
    (lambda: gl.PromptTuning(init="words"), "init must be 'vocabulary', 'random' or ids, got 'words'"),
    (
        lambda: gl.PromptTuning(length=1, init=(1, 2)),
        r"init must be at most 1 words, the length, got \(1, 2\)",
    ),
    (lambda: gl.PromptTuning(init=((),)), r"init must be token ids, or tuples of them, got \(\(\),\)"),
    (lambda: gl.PromptTuning(scale=-1), "scale must be a number of at least 0, got -1"),
    (lambda: gl.PrefixTuning(length=1.5), "length must be a whole number of at least 1, got 1.5"),
    (lambda: gl.PrefixTuning(mlp=0), "mlp must be a whole number of at least 1, or None, got 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_a_model_is_refused():
    model = build("tiny-bert")
    for method, message in (
        (gl.PromptTuning(init=(10**6,)), "init must be token ids below [0-9]+, the size of the vocabulary"),
        (gl.PromptTuning().on(layers=1), "layers must be one with layer 0, before which a prompt stands"),
        (gl.PrefixTuning(attentions="cross"), "attentions: 'cross' is not in this bert model; it has self"),
    ):
        with pytest.raises(ValueError, match=message):
            gl.attach(model, method)
    gl.attach(model, gl.PromptTuning(length=2))
    inputs = batch("tiny-bert")
    with pytest.raises(ValueError, match=r"attention_mask must be \(texts, tokens\), ones and zeros, beside"):
        model(**inputs | {"attention_mask": inputs["attention_mask"][:, None, None].bool()})


# what makes them while they are trained


def test_the_lstm_is_torchs():
    ours, theirs = LSTM(5, 3, layers=2).double(), torch.nn.LSTM(5, 3, 2, bidirectional=True).double()
    for i, (given, carried) in enumerate(zip(ours.inputs, ours.states, strict=True)):
        end = f"l{i // 2}" + "_reverse" * (i % 2)
        for kind in ("weight", "bias"):
            getattr(theirs, f"{kind}_ih_{end}").data.copy_(getattr(given, kind))
            getattr(theirs, f"{kind}_hh_{end}").data.copy_(getattr(carried, kind))
    x = torch.randn(7, 5, dtype=torch.float64)
    assert (ours(x) - theirs(x)[0]).abs().max() < 1e-14


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_p_tuning_is_pefts(encoder):
    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    del inputs["labels"]
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=6,
        encoder_reparameterization_type=encoder.upper(),
    )
    peft = get_peft_model(copy.deepcopy(model), config).double().eval()
    its = dict(peft.prompt_encoder["default"].named_parameters())
    part = gl.attach(model, gl.PTuning(length=4, encoder=encoder, hidden=6)).parts[0]
    mine = part.prompt.encoder
    layers = (mine if encoder == "mlp" else mine[1]).layers
    pairs = [(part.prompt.E, its["embedding.weight"])]
    for i, layer in enumerate(layers):
        pairs += [
            (layer.weight, its[f"mlp_head.{2 * i}.weight"]),
            (layer.bias, its[f"mlp_head.{2 * i}.bias"]),
        ]
    for i in range(4) if encoder == "lstm" else ():
        end = f"l{i // 2}" + "_reverse" * (i % 2)
        for ours, name in ((mine[0].inputs[i], "ih"), (mine[0].states[i], "hh")):
            pairs += [(getattr(ours, k), its[f"lstm_head.{k}_{name}_{end}"]) for k in ("weight", "bias")]
    assert len(pairs) == len(its)
    for ours, theirs in pairs:
        ours.data.copy_(theirs)
    text = inputs["attention_mask"].bool()
    a, gradients = results(model, inputs, [ours for ours, _ in pairs], text)
    b, expected = results(peft, inputs, [theirs for _, theirs in pairs], text)
    assert (a - b).abs().max() < 1e-12
    assert all((x - y).abs().max() < 1e-12 for x, y in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-gpt2", "tiny-bart"])
@pytest.mark.parametrize(
    "method", [gl.PTuning(length=3), gl.PrefixTuning(length=3, mlp=8)], ids=["prompt", "prefix"]
)
def test_what_made_them_goes_and_the_function_stays(method, backbone, tmp_path):
    model, inputs = build(backbone), batch(backbone)
    attachment = gl.attach(model, method)
    randomise(attachment)
    before, trained = outputs(model, inputs), attachment.count().trainable
    through = attachment.save(tmp_path / "training.safetensors")
    method.finish(attachment)
    assert (outputs(model, inputs) - before).abs().max() < 1e-12
    flat = gl.attach(
        build(backbone), type(method)(length=3) if "Prefix" in repr(method) else gl.PromptTuning(3)
    )
    assert attachment.count().stored == attachment.count().trainable == flat.count().stored < trained
    path = attachment.save(tmp_path / "trained.safetensors")
    assert path.stat().st_size < through.stat().st_size
    for file in (path, through):
        fresh = build(backbone)
        gl.load(fresh, file)
        assert (outputs(fresh, inputs) - before).abs().max() < 1e-12


def test_counts_while_it_is_trained():
    bert = BertConfig()
    assert gl.count(bert, gl.PrefixTuning(length=10, mlp=512)).trainable == 9_857_024  # PEFT's


# several in one batch

SEVERAL = [gl.PromptTuning(length=4, tasks=3), gl.PrefixTuning(length=3, tasks=3)]


@pytest.mark.parametrize("method", SEVERAL, ids=["prompts", "prefixes"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_text_of_a_batch_is_as_with_its_own_alone(backbone, method):
    model, inputs = build(backbone), batch(backbone)
    randomise(gl.attach(model, method))
    with gl.using(model, [2, 0, 1]):
        mixed = outputs(model, inputs)
    for row, task in enumerate((2, 0, 1)):
        with gl.using(model, task):
            alone = outputs(model, {name: value[row : row + 1] for name, value in inputs.items()})
        text = inputs["attention_mask"][row].bool() if backbone in DECODERS else ...
        assert (mixed[row] - alone[0])[text].abs().max() < 1e-12
    assert (mixed - outputs(model, inputs)).abs().max() > 1e-6


@pytest.mark.parametrize("method", SEVERAL, ids=["prompts", "prefixes"])
@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-t5-random"])
def test_generation_follows_them_with_and_without_beams(backbone, method):
    model, inputs = build(backbone), batch(backbone, padded=False, rows=2)
    del inputs["labels"]
    randomise(gl.attach(model, method), 1.0)
    for beams in (1, 3):
        settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=beams, pad_token_id=0)
        with gl.using(model, [2, 1], num_beams=beams):
            mixed = model.generate(**inputs, **settings)
        for row, task in enumerate((2, 1)):
            with gl.using(model, task):
                one = model.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, **settings)
            assert torch.equal(mixed[row], one[0])


@pytest.mark.parametrize("method", SEVERAL, ids=["prompts", "prefixes"])
def test_what_is_computed_again_has_the_choice_of_its_pass(method):
    model, inputs = build("tiny-gpt2").train(), batch("tiny-gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    randomise(attachment := gl.attach(model, method))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            gl.checkpointing(model)
        model.zero_grad()
        with gl.using(model, [2, 0, 2]):
            loss = model(**inputs).loss
        loss.backward()
        gradients.append([p.grad.clone() for part in attachment.parts for p in part.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert (
            (plain - again).abs().max() < 1e-12 and plain[0].any() and plain[2].any() and not plain[1].any()
        )


# starts and subspaces


def test_spot_starts_where_its_source_ends(tmp_path):
    model, inputs = build("tiny-t5-random"), batch("tiny-t5-random")
    paths, prompts, found = [], [], []
    for seed in (0, 1):
        attachment = gl.attach(model, gl.PromptTuning(length=4), seed=seed)
        prompts.append(attachment.parts[0].prompt.P.detach().clone())
        found.append(outputs(model, inputs))
        paths.append(attachment.save(tmp_path / f"{seed}.safetensors"))
        attachment.detach()
    attachment = gl.attach(model, gl.SPoT(length=4, sources=paths[:1]))
    assert torch.equal(outputs(model, inputs), found[0])
    attachment.detach()
    attachment = gl.attach(model, gl.SPoT(length=4, sources=paths, weights=(0.25, 0.75)))
    mixed = 0.25 * prompts[0] + 0.75 * prompts[1]
    assert (attachment.parts[0].prompt.P - mixed).abs().max() < 1e-12
    path = attachment.save(tmp_path / "spot.safetensors")
    attachment.detach()
    for source in paths:
        source.unlink()  # a file needs none of its sources
    assert (gl.load(model, path).parts[0].prompt.P - mixed).abs().max() < 1e-12


def test_spot_refuses_what_is_no_prompt_of_its_size(tmp_path):
    model = build("tiny-bert")
    for name, method in (("lora", gl.LoRA(r=2)), ("long", gl.PromptTuning(length=5))):
        attachment = gl.attach(model, method)
        path = attachment.save(tmp_path / f"{name}.safetensors")
        attachment.detach()
        with pytest.raises(ValueError, match="sources must be files with (one|prompts of)"):
            gl.attach(model, gl.SPoT(length=4, sources=[path]))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        gl.attach(model, gl.SPoT(length=4, sources=[tmp_path / "none.safetensors"]))
    assert not hasattr(model, "guidelib")


def test_the_most_similar_prompt_is_the_prompt_itself():
    prompts = [torch.randn(6, 8) + i for i in range(3)]
    for pairs in (False, True):
        found = gl.prompt_similarity(prompts, pairs=pairs)
        assert found.shape == (3, 3) and torch.allclose(found, found.T)
    means = gl.prompt_similarity(prompts)
    assert torch.allclose(means.diag(), torch.ones(3).double()) and (means.argmax(1) == torch.arange(3)).all()
    by_hand = torch.nn.functional.cosine_similarity(
        prompts[0][:, None].double(), prompts[1][None].double(), dim=-1
    )
    assert gl.prompt_similarity(prompts, pairs=True)[0, 1] == pytest.approx(float(by_hand.mean()))


def test_as_many_dimensions_as_prompts_give_each_of_them_back():
    prompts = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for hidden, exact in ((16, True), (1, False)):  # the decoder's middle has to be as wide, too
        space = gl.fit_space(prompts, 3, hidden=hidden, steps=1000, lr=1e-2)
        error = float((space(torch.stack(prompts)) - torch.stack(prompts)).square().mean())
        assert error < 1e-6 if exact else error > 0.05
    assert not any(p.requires_grad for p in space.parameters())


def test_the_loss_of_the_tasks_takes_part():
    prompts, seen = [torch.zeros(2, 3), torch.ones(2, 3)], []

    def loss(i, prompt):
        seen.append(i)
        return (prompt - 5).square().mean() * 1e4  # another prompt than the one that was trained

    space = gl.fit_space(
        prompts, 2, hidden=8, losses=[lambda p, i=i: loss(i, p) for i in range(2)], steps=400, lr=0.02
    )
    assert seen[:4] == [0, 1, 0, 1] and (space(prompts[0]) - 5).abs().max() < 1


def test_a_learned_space_is_saved_and_used(tmp_path):
    model, inputs = build("tiny-gpt2"), batch("tiny-gpt2")
    prompts = [torch.randn(4, 32) for _ in range(3)]
    space = gl.fit_space(prompts, 3, hidden=8, steps=50)
    path = space.save(tmp_path / "space.safetensors")
    again = gl.PromptSpace.load(path)
    assert torch.equal(again(prompts[0]), space(prompts[0]))
    method = gl.IPT(length=4, d=3, space=path)
    attachment = gl.attach(model, method)
    z = space.encode(prompts[1])
    attachment.parts[0].prompt.z.data.copy_(z)
    assert attachment.count().trainable == 3
    assert (attachment.parts[0].prompt() - space.decode(z)).abs().max() < 1e-6
    before = outputs(model, inputs)
    unfinished = attachment.save(tmp_path / "training.safetensors")
    method.finish(attachment)
    assert attachment.count().stored == 4 * 32 and (outputs(model, inputs) - before).abs().max() < 1e-12
    finished = attachment.save(tmp_path / "trained.safetensors")
    for file in (unfinished, finished):
        fresh = build("tiny-gpt2")
        gl.load(fresh, file)
        assert (outputs(fresh, inputs) - before).abs().max() < 1e-12
    path.unlink()
    gl.load(build("tiny-gpt2"), finished)
    with pytest.raises(FileNotFoundError, match="space: there is no file"):
        gl.load(build("tiny-gpt2"), unfinished)


def test_the_published_size_of_the_auto_encoder():
    with torch.device("meta"):
        space = gl.PromptSpace(100, 768, 250, 768)
    assert sum(p.numel() for p in space.parameters()) == 78_452_218


# halfway up


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-t5-random"])
def test_nothing_below_a_late_prompt_has_a_graph(backbone):
    model, inputs = build(backbone), batch(backbone)
    gl.attach(model, gl.LatePromptTuning(length=3, layer=1))
    blocks = [
        block
        for stack, _, block in gl.anatomy.Anatomy(model).blocks()
        if stack != "decoder" or "t5" not in backbone
    ]
    seen = []
    for block in blocks:
        block.register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    model(**inputs)
    assert not seen[0].requires_grad and seen[1].requires_grad
    assert seen[0].shape[-2] == 9


def test_the_masked_token_is_what_the_head_reads():
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, gl.WARP(length=3, mask=5))
    longer = torch.cat((torch.full((3, 4), 5), inputs["input_ids"]), 1)
    mask = torch.cat((torch.ones(3, 4).long(), inputs["attention_mask"]), 1)
    attachment.parts[0].prompt.vectors.P.data.copy_(model.get_input_embeddings().weight[5])
    read = states(model, inputs)
    attachment.detach()
    expected = states(model, {"input_ids": longer, "attention_mask": mask})[:, 3:4]
    assert (read - expected).abs().max() < 1e-12 and read.shape[1] == 9


# costs


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta"])
@pytest.mark.parametrize(
    "method",
    [
        gl.PromptTuning(length=4),
        gl.PrefixTuning(length=3),
        gl.PromptTuning(length=2) + gl.PrefixTuning(length=3).on(layers=1) + gl.LoRA(r=2),
    ],
    ids=["prompt", "prefix", "sum"],
)
def test_the_closed_form_is_the_measurement(method, backbone):
    model = build(backbone, dtype=torch.float32)
    gl.attach(model, method)
    assert_the_prediction_is_the_measurement(model, backbone)


def test_what_makes_a_prompt_has_no_closed_form():
    model = build("tiny-bert", dtype=torch.float32)
    gl.attach(model, gl.PTuning(length=3))
    assert gl.closed_form.predict(model, batch("tiny-bert")) is None


GPT2 = dict(n_embd=64, n_layer=3, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2)
COMPARED = {
    "prompt": (PromptTuningConfig, {}, gl.PromptTuning(length=20)),
    "prefix": (PrefixTuningConfig, {}, gl.PrefixTuning(length=20)),
    "prefix-mlp": (
        PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 32},
        gl.PrefixTuning(length=20, mlp=32),
    ),
    "p-tuning": (
        PromptEncoderConfig,
        {"encoder_reparameterization_type": "MLP"},
        gl.PTuning(length=20, encoder="mlp"),
    ),
}


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("padded", [False, True])
def test_no_more_bytes_are_saved_than_by_peft(name, padded):
    kind, settings, method = COMPARED[name]
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=20, **settings)
    peft = get_peft_model(copy.deepcopy(model), config)
    gl.attach(model, method)
    inputs = batch("tiny-gpt2", padded=padded, rows=4, length=32)
    inputs = {key: value % 99 if key == "input_ids" else value.clamp(max=98) for key, value in inputs.items()}
    ours, theirs = (gl.costs.saved_bytes(each, inputs) for each in (model, peft))
    assert ours <= theirs


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-bart"])
def test_a_text_that_is_too_long_beside_its_prompt_is_refused(backbone):
    model = build(backbone)
    body = next(iter(gl.anatomy.Anatomy(model).bodies().values()))
    fits = body.places - body.first - 4
    gl.attach(model, gl.PromptTuning(length=4))
    outputs(model, batch(backbone, padded=False, length=fits))
    with pytest.raises(ValueError, match=f"length: PromptTuning_.* a text of {fits + 1} tokens need"):
        outputs(model, batch(backbone, padded=False, length=fits + 1))


@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-distilbert", *DECODERS, *SEQ2SEQ])
def test_a_prompt_and_a_late_one_stand_in_either_order(backbone):
    late, early, found = gl.LatePromptTuning(length=3), gl.PromptTuning(length=2), []
    for method in (late + early, early + late):
        model = build(backbone)
        for part in gl.attach(model, method).parts:
            vectors = part.prompt.P.data
            vectors.copy_(torch.linspace(-1, 1, vectors.numel()).view_as(vectors))
        found.append(outputs(model, batch(backbone)))
    assert found[0].shape == found[1].shape and (found[0] - found[1]).abs().max() < 1e-12


@pytest.mark.parametrize("method", [gl.PromptTuning(length=2), gl.LatePromptTuning(length=2, bottleneck=3)])
def test_embeddings_may_be_narrower_than_the_blocks(method):
    config = ElectraConfig(
        embedding_size=6,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=9,
        vocab_size=20,
    )
    model = ElectraModel(config).double().eval()
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        base = model(ids).last_hidden_state
        gl.attach(model, method)
        found = model(ids).last_hidden_state
    assert found.shape == base.shape and not torch.equal(found, base)


def test_a_prefix_without_a_gate_pays_for_none():
    """It joins its keys and its values to those of each attention, and does nothing else."""
    model, inputs = build("tiny-bert"), {"input_ids": torch.tensor([TOKENS])}
    base = operations(model, inputs)
    gl.attach(model, gl.PrefixTuning(length=3))
    assert operations(model, inputs) == base + 2 * 2


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("method", [gl.PrefixTuning(3), gl.Gated(gl.PrefixTuning(3))], ids=repr)
def test_a_static_cache_sees_the_tokens_that_are_there(backbone, method):
    """At the first pass it has room for more keys than there are, and the kernel counts from the first."""
    model = build(backbone)
    randomise(gl.attach(model, method))
    ids = torch.randint(3, 200, (2, 5))
    cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        plain, cached = model(input_ids=ids).logits, model(input_ids=ids, past_key_values=cache).logits
    torch.testing.assert_close(cached, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "method",
    [
        gl.PTuning(2, hidden=4) + gl.PromptTuning(2),
        gl.IPT(2, hidden=4) + gl.PromptTuning(2),
        gl.PrefixTuning(2, mlp=4).on(layers=0) + gl.PrefixTuning(2).on(layers=1),
    ],
    ids=["p-tuning", "ipt", "prefix"],
)
def test_a_file_from_before_the_end_beside_another_prompt(method, tmp_path):
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    attachment = gl.attach(model, method)
    randomise(attachment)
    path, expected = attachment.save(tmp_path / "early.safetensors"), outputs(model, inputs)
    fresh = build("tiny-bert")
    gl.load(fresh, path)
    assert torch.equal(outputs(fresh, inputs), expected)


@pytest.mark.parametrize("both", [gl.WARP(3) + gl.PromptTuning(2), gl.PromptTuning(2) + gl.WARP(3)], ids=repr)
def test_a_pooler_reads_what_is_left_when_two_have_added_to_the_text(both):
    model = BertForSequenceClassification(load_config("tiny-bert")).double().eval()
    gl.attach(model, both)
    inputs = batch("tiny-bert", padded=False)
    del inputs["labels"]
    with torch.no_grad():
        found = model.bert(**inputs)
        pooler = model.bert.pooler
        expected = type(pooler).forward(pooler, found.last_hidden_state)
    torch.testing.assert_close(found.pooler_output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backbone", ["tiny-t5-random", "tiny-bart"])
def test_late_prompts_refuse_a_decoder_with_an_encoder(backbone):
    model = build(backbone)
    with pytest.raises(ValueError, match="stack must be an encoder, or a decoder without one, got 'decoder'"):
        gl.attach(model, gl.LatePromptTuning(3).on(stack="decoder"))


def test_positions_that_run_out_while_a_text_is_written():
    model = build("tiny-gpt2")
    gl.attach(model, gl.PromptTuning(4))
    ids = torch.randint(3, 200, (1, model.config.n_positions - 6))
    with pytest.raises(ValueError, match="need 257 positions, and this model has 256"):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5)


@pytest.mark.parametrize("method", [gl.PromptTuning(4), gl.LatePromptTuning(4)], ids=["prompt", "late"])
@pytest.mark.parametrize("backbone", ["tiny-gpt2", "tiny-llama", "tiny-t5-random"])
def test_a_cache_without_room_for_the_prompt_is_refused(backbone, method):
    model, inputs = build(backbone), batch(backbone, padded=False)
    del inputs["labels"]
    randomise(gl.attach(model, method))
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    if model.config.is_encoder_decoder:  # whose prompt is in the encoder, which has no cache
        kept = model.generate(**inputs, **settings, cache_implementation="static")
        assert torch.equal(model.generate(**inputs, **settings), kept)
    else:
        with pytest.raises(
            ValueError, match="cache_implementation: .* a static cache has no room; 'dynamic'"
        ):
            model.generate(**inputs, **settings, cache_implementation="static")


def test_a_random_space_is_drawn_by_the_seed_alone(monkeypatch):
    """By the CPU's generator, or d numbers in a file would mean another prompt on another device."""
    body = next(iter(Anatomy(build("tiny-bert")).bodies().values()))
    first = gl.IPT(length=3, d=2).drawn(body)
    torch.manual_seed(7)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    again, state = gl.IPT(length=3, d=2).drawn(body), torch.get_rng_state()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[torch.zeros(2, 4), torch.zeros(3, 4)]), "prompts must be one or more of the same"),
        (dict(hidden=0), "hidden must be a whole number of at least 1, got 0"),
        (dict(d=2.0), "d must be a whole number of at least 1, got 2.0"),
    ],
)
def test_what_no_space_can_be_fitted_to(arguments, message):
    with pytest.raises(ValueError, match=message):
        gl.fit_space(**dict(prompts=[torch.zeros(2, 4)], d=1, steps=1) | arguments)


def test_a_space_is_written_whole_or_not_at_all(tmp_path):
    space = gl.fit_space([torch.zeros(2, 4)], 1, steps=1)
    with pytest.raises(FileNotFoundError, match="path: the folder .* does not exist; make it first"):
        space.save(tmp_path / "nowhere/space.safetensors")
    path = space.save(tmp_path / "space.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gl.PromptTuning(init=5), "init must be 'vocabulary', 'random', token ids"),
        (lambda: gl.SPoT(sources=[1]), "sources must be a list of files"),
        (lambda: gl.CrossAttentionTuning([["self"]]), "attentions must be a kind of attention or several"),
        (lambda: gl.AdapterFusion(2, regularization=float("inf")), "regularization must be"),
        (lambda: gl.attach(build("tiny-bert"), gl.LoRA(), seed="x"), "seed must be a whole number"),
        (lambda: gl.attach(build("tiny-bert"), gl.LoRA(), seed=1.5), "seed must be a whole number"),
        (lambda: gl.load_deltas(build("tiny-bert"), 5), "paths must be a list of one or more files"),
        (lambda: gl.load_loras(build("tiny-bert"), Path("x")), "paths must be a list of one or more files"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_late_prompt_and_a_sliding_window_are_refused_where_the_prompt_would_leave_it():
    config = MistralConfig(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.sliding_window = 4, 2, 8
    model = MistralForCausalLM(config).eval()
    gl.attach(model, gl.LatePromptTuning(3))
    ids = torch.arange(3, 11)[None]
    with pytest.raises(ValueError, match="use_cache: LatePromptTuning.* use_cache=False is accepted"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False).shape == (1, 12)
    assert model.generate(ids[:, :2], max_new_tokens=2, do_sample=False).shape == (1, 4)
    once, alone = model(ids), model(ids, use_cache=False)  # one pass loses nothing
    assert torch.equal(once.logits, alone.logits)
    gl.measure(model, {"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("method", [gl.PromptTuning(3), gl.LatePromptTuning(3, layer=1)])
def test_a_tuple_of_outputs_is_the_texts_too(method):
    model = BertModel(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    gl.attach(model.eval(), method, also="pooler")
    ids = torch.arange(3, 10)[None]
    found = model(ids, output_hidden_states=True)
    last, pooled, states = model(ids, output_hidden_states=True, return_dict=False)
    assert all(map(torch.equal, (last, pooled, *states), (*found[:2], *found.hidden_states)))
    assert {tensor.shape[1] for tensor in states} == {7}


@pytest.mark.parametrize("method", [gl.PromptTuning(3), gl.LatePromptTuning(3, layer=1)])
def test_a_call_without_tokens_is_the_models_to_refuse(method):
    model, mask = build("tiny-bert"), torch.ones(1, 7)
    gl.attach(model, method)
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=mask)


def test_a_prompt_starts_as_the_text_is_embedded():
    config = GemmaConfig(vocab_size=60, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 16
    model, ids = GemmaForCausalLM(config).double().eval(), torch.arange(5, 12)[None]
    wanted = model(ids).logits[:, 4:]
    gl.attach(model, gl.PromptTuning(4, init=(5, 6, 7, 8)))
    assert (model(ids[:, 4:]).logits - wanted).abs().max() < 1e-9


def test_warp_reads_the_mask_behind_padding_on_the_left():
    config = T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, num_labels=3)
    model, ids = T5ForTokenClassification(config).double().eval(), torch.arange(3, 10)[None]
    gl.attach(model, gl.WARP(3))
    alone = model(ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    behind = model(padded, attention_mask=(padded > 0).long()).logits[:, -1]
    assert (alone - behind).abs().max() < 1e-9


@pytest.mark.parametrize("method", [gl.LatePromptTuning(4, layer=1), gl.WARP(3)])
def test_a_prompt_does_not_start_from_what_is_none(method, tmp_path):
    path = gl.attach(build("tiny-bert"), method).save(tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="sources must be files with one, got .* with 0 prompts"):
        gl.attach(build("tiny-bert"), gl.SPoT(4, sources=(path,)))


def test_prompts_of_several_lengths_are_compared_pair_by_pair():
    prompts = [torch.randn(n, 5) for n in (2, 3)]
    cosines = torch.nn.functional.cosine_similarity(prompts[0][:, None], prompts[1][None], dim=-1)
    assert gl.prompt_similarity(prompts, pairs=True)[0, 1] == pytest.approx(float(cosines.mean()), abs=1e-6)
    with pytest.raises(ValueError, match="prompts must be one or more"):
        gl.prompt_similarity([])


def test_fitting_a_space_leaves_no_gradients_behind():
    model = torch.nn.Linear(5, 1)
    prompts = [torch.randn(2, 5) for _ in range(2)]
    gl.fit_space(prompts, 1, hidden=3, steps=2, losses=[lambda P: model(P).sum()] * 2)
    assert model.weight.grad is None
