"""Where things are: every linear map is found once in every architecture, and seen the right way round."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from common import BACKBONES, batch, build, outputs
from torch import nn
from transformers import AutoConfig, AutoModel, ViTConfig, ViTModel
from transformers.pytorch_utils import Conv1D

import guidelib as gl
from guidelib.core.anatomy import Anatomy
from guidelib.core.architectures import ARCHITECTURES

SIZES = {  # by the configurations' various names; what one of them does not know it ignores
    **dict(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=64),
    **dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, embedding_size=12
    ),
    **dict(num_key_value_heads=2, head_dim=4),
}
T5_SIZES = dict(vocab_size=50, d_model=16, d_kv=6, num_heads=4, num_layers=2, d_ff=24)
BART_SIZES = dict(
    **dict(
        vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=1, max_position_embeddings=64, d_model=16
    ),
    **dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    **dict(encoder_ffn_dim=24, decoder_ffn_dim=24),
)
DISTILBERT_SIZES = dict(
    vocab_size=50, dim=16, hidden_dim=24, n_layers=2, n_heads=4, max_position_embeddings=64
)
OTHER_SIZES = {
    "t5": T5_SIZES,
    "mt5": T5_SIZES,
    "bart": BART_SIZES,
    "mbart": BART_SIZES,
    "distilbert": DISTILBERT_SIZES,
}
ROLES = {  # per layer: how many linear maps there are, and in how many stacks
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "gpt2"), 2 * 6),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), 2 * 7),
    **dict(t5=2 * 6 + 2 * 10, mt5=2 * 7 + 2 * 11, bart=2 * 6 + 2 * 10, mbart=2 * 6 + 2 * 10),
}


def small(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **OTHER_SIZES.get(kind, SIZES))
    return AutoModel.from_config(config).double().eval()


CROSSING = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "gpt2")  # if configured so


def crossing(kind):
    """A decoder that reads an encoder's states by cross-attention in every block."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, is_decoder=True, add_cross_attention=True)
    return AutoModel.from_config(config).double().eval()


MODELS = [
    *((build, name) for name in BACKBONES),
    *((small, kind) for kind in ARCHITECTURES),
    *((crossing, kind) for kind in CROSSING),
]


def call(model):
    """One forward pass, with the states of an encoder where the model can read them."""
    ids = torch.arange(3, 13).reshape(2, 5)
    more = {"decoder_input_ids": ids + 1} if model.config.is_encoder_decoder else {}
    if getattr(model.config, "add_cross_attention", False):
        states = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        more = {"encoder_hidden_states": states}
    with torch.no_grad():
        return model(input_ids=ids, **more)[0]


@pytest.fixture(params=MODELS, ids=lambda pair: f"{pair[0].__name__}-{pair[1]}")
def model(request):
    make, name = request.param
    return make(name)


def test_every_supported_architecture_is_covered_here():
    assert ROLES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", ROLES)
def test_the_number_of_linear_maps(kind):
    sites = Anatomy(small(kind)).linears()
    assert len(sites) == ROLES[kind]
    assert len({site.name for site in sites}) == len(sites)


def outputs_of(layer):
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def test_the_roles_cover_every_linear_layer_of_the_blocks_exactly_once(model):
    anatomy = Anatomy(model)
    for stack, layer, block in anatomy.blocks():
        covered = {}
        for site in anatomy.restrict(layer, stack).linears():
            assert (site.stack, site.layer) == (stack, layer)
            rows = range(outputs_of(site.module))[site.rows or slice(None)]
            covered.setdefault(site.module, []).extend(rows)
        there = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D)]
        assert there and set(there) == set(covered)
        for module, rows in covered.items():
            assert rows == list(range(outputs_of(module)))


def test_no_block_is_forgotten(model):
    """Outside the blocks there are only heads, poolers and projections of the embedding."""
    anatomy = Anatomy(model)
    inside = {module for _, _, block in anatomy.blocks() for module in block.modules()}
    outside = {
        n.split(".")[-1]
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m not in inside
    }
    assert outside <= {"classifier", "lm_head", "dense", "embeddings_project"}
    dense = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and m not in inside and n.endswith("dense")
    ]
    assert all(name.endswith("pooler.dense") for name in dense)
    assert len(list(anatomy.blocks())) == (4 if model.config.is_encoder_decoder else 2)


def test_a_site_is_the_map_that_the_layer_computes_and_a_live_view_of_it(model):
    for site in Anatomy(model).linears():
        rows = site.rows or slice(None)
        d_out, d_in = site.shape
        x = torch.randn(3, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        bias = 0 if site.bias is None else site.bias

        def own():
            with torch.no_grad():
                return site.module(x)[..., rows]  # noqa: B023 (used at once)

        before = own()
        assert before.shape == (3, d_out)
        assert (before - (x @ site.weight.t() + bias)).abs().max() < 1e-12, site.name
        assert not site.weight.requires_grad and site.weight.data_ptr() != 0
        whole = site.module.weight.detach().clone()
        site.weight.add_(1)
        assert (own() - before - x.sum(-1, keepdim=True)).abs().max() < 1e-12, site.name
        assert (site.module.weight != whole).sum() == d_out * d_in  # and nothing beside it
        if site.bias is not None:
            site.bias.add_(1)
            assert (own() - before - x.sum(-1, keepdim=True) - 1).abs().max() < 1e-12, site.name


def test_fused_projections_are_cut_in_three():
    model = build("tiny-gpt2")
    q, k, v = Anatomy(model).restrict(0).linears(("q", "k", "v"))
    fused = model.transformer.h[0].attn.c_attn
    assert (q.module, k.module, v.module) == (fused,) * 3
    assert torch.equal(torch.cat((q.weight, k.weight, v.weight)), fused.weight.detach().t())
    assert torch.equal(torch.cat((q.bias, k.bias, v.bias)), fused.bias.detach())


TARGETS = [
    ("tiny-bert", "q", ["encoder.0.self.q", "encoder.1.self.q"]),
    ("tiny-bert", ("v", "q"), [f"encoder.{i}.self.{r}" for i in (0, 1) for r in "qv"]),  # in our order
    ("tiny-bert", ("q", "self.q", "q"), ["encoder.0.self.q", "encoder.1.self.q"]),  # each once
    ("tiny-bert", "ffn", [f"encoder.{i}.ffn.{r}" for i in (0, 1) for r in ("in", "out")]),
    ("tiny-llama", "ffn", [f"decoder.{i}.ffn.{r}" for i in (0, 1) for r in ("in", "gate", "out")]),
    ("tiny-bart", "cross", [f"decoder.{i}.cross.{r}" for i in (0, 1) for r in "qkvo"]),
    ("tiny-bart", "o", [*(f"encoder.{i}.self.o" for i in (0, 1)),
                        *(f"decoder.{i}.{kind}.o" for i in (0, 1) for kind in ("self", "cross"))]),
    ("tiny-t5-random", "self.k", [f"{stack}.{i}.self.k" for stack in ("encoder", "decoder") for i in (0, 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("backbone", "targets", "names"), TARGETS, ids=lambda value: str(value)[:24])
def test_targets(backbone, targets, names):
    assert [site.name for site in Anatomy(build(backbone)).linears(targets)] == names


def test_a_gated_network_has_the_value_and_the_gate_where_they_belong():
    """The activation sits on the gate: silu(gate x) * (in x)."""
    llama, t5 = build("tiny-llama"), build("tiny-t5-random")
    by_role = {site.role: site.module for site in Anatomy(llama).restrict(0).linears("ffn")}
    mlp = llama.model.layers[0].mlp
    assert by_role == {"ffn.in": mlp.up_proj, "ffn.gate": mlp.gate_proj, "ffn.out": mlp.down_proj}
    by_role = {site.role: site.module for site in Anatomy(t5).restrict(1, "decoder").linears("ffn")}
    dense = t5.decoder.block[1].layer[2].DenseReluDense
    assert by_role == {"ffn.in": dense.wi_1, "ffn.gate": dense.wi_0, "ffn.out": dense.wo}
    with torch.no_grad():  # the gate is the one that the activation is applied to: a gate of zero closes it
        x = torch.randn(2, 32, dtype=torch.float64)
        dense.wi_0.weight.zero_()
        assert torch.count_nonzero(dense(x)) == 0


RESTRICTIONS = [
    (dict(layers=0), ["encoder.0", "decoder.0"]),
    (dict(layers=-1), ["encoder.1", "decoder.1"]),
    (dict(layers=(-1, 0, 1, 1)), ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]),
    (dict(layers=range(1)), ["encoder.0", "decoder.0"]),
    (dict(layers=[-2], stack="decoder"), ["decoder.0"]),
    (dict(stack="encoder"), ["encoder.0", "encoder.1"]),
    (dict(), ["encoder.0", "encoder.1", "decoder.0", "decoder.1"]),
]


@pytest.mark.parametrize(("arguments", "blocks"), RESTRICTIONS)
def test_restrict(arguments, blocks):
    anatomy = Anatomy(build("tiny-bart"))
    limited = anatomy.restrict(**arguments)
    assert [f"{stack}.{layer}" for stack, layer, _ in limited.blocks()] == blocks
    assert {(site.stack, site.layer) for site in limited.linears("q")} == {
        (s, n) for s, n, _ in limited.blocks()
    }
    assert {(a.stack, a.layer) for a in limited.attentions()} == {(s, n) for s, n, _ in limited.blocks()}
    assert len(list(anatomy.blocks())) == 4  # the first one is not changed


NESTED = [  # one after the other, and what is left
    ([dict(layers=0), dict(layers=(0, 1), stack="decoder")], ["decoder.0"]),
    ([dict(stack="encoder"), dict(layers=0)], ["encoder.0"]),
    ([dict(layers=0), dict(stack="encoder")], ["encoder.0"]),
    ([dict(layers=-1), dict(layers=(0, 1)), dict(stack="decoder"), dict(stack="decoder")], ["decoder.1"]),
]


@pytest.mark.parametrize(("steps", "blocks"), NESTED, ids=lambda value: str(value)[:40])
def test_a_restriction_of_a_restriction_is_their_intersection(steps, blocks):
    anatomy, method = Anatomy(build("tiny-bart")), gl.LoRA(r=2, targets="self.q")
    for arguments in steps:
        anatomy, method = anatomy.restrict(**arguments), method.on(**arguments)
    assert [f"{stack}.{layer}" for stack, layer, _ in anatomy.blocks()] == blocks
    attachment = gl.attach(build("tiny-bart"), method)
    assert [part.place for part in attachment.parts] == [f"{block}.self.q" for block in blocks]


def test_the_order_of_two_restrictions_makes_no_difference():
    """Even where the layer is in one stack alone."""
    uneven = AutoConfig.for_model("bart", **(BART_SIZES | dict(encoder_layers=3, decoder_layers=1)))
    model, method = AutoModel.from_config(uneven), gl.LoRA(r=2, targets="q")
    expected = method.on(layers=2, stack="encoder")
    assert method.on(layers=2).on(stack="encoder") == method.on(stack="encoder").on(layers=2) == expected
    assert [part.place for part in gl.attach(model, expected).parts] == ["encoder.2.self.q"]


def test_an_empty_intersection_is_refused():
    model = build("tiny-bart")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method, words in (
        (gl.LoRA(r=2).on(layers=0).on(layers=1), "layers (0,) of stack None: none of them is among enc"),
        (gl.FullFineTuning().on(stack="encoder").on(stack="decoder"), "none of them is among decoder [0, 1]"),
        (gl.AdapterDrop(gl.PfeifferAdapter(r=2).on(layers=0), 1), "layers (0,) of stack None: none of them"),
        (gl.AdapterDrop(gl.LoRA(r=2), 1).on(layers=0), "drop must be less than 1, the number of layers, got"),
    ):
        with pytest.raises(ValueError) as error:
            gl.attach(model, method)
        assert words in str(error.value)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(layers=0.5), "layers must be None, a whole number or several of them, got 0.5"),
        (dict(layers="all"), "layers must be None, a whole number or several of them, got 'all'"),
        (dict(stack=0), "stack must be None or a stack's name, got 0"),
    ],
)
def test_impossible_restrictions(arguments, words):
    with pytest.raises(ValueError) as error:
        gl.LoRA().on(**arguments)
    assert words in str(error.value)


def test_one_method_at_two_places_is_two_methods():
    one = gl.AdaLoRA(r=2, target_r=1, targets="q")
    low = one.on(layers=0)
    for method in (one + one, low.on(stack="encoder") + low.on(stack="encoder"), (one + low) + (one + one)):
        attachment = gl.attach(build("tiny-bert"), method)
        mine = [attachment.parts_of(getattr(member, "method", member)) for member in method.methods]
        assert sum(map(len, mine)) == len(attachment.parts) and all(mine)


BAD_RESTRICTIONS = [
    ("tiny-bert", dict(layers=2), ["layers must be whole numbers from -2 to 1 for the encoder", "got [2]"]),
    ("tiny-bert", dict(layers=(0, -3)), ["from -2 to 1", "got [-3]"]),
    ("tiny-bert", dict(layers=("0",)), ["whole numbers", "got ['0']"]),
    ("tiny-bert", dict(layers=(0.0,)), ["whole numbers", "got [0.0]"]),
    ("tiny-bert", dict(layers=()), ["whole numbers", "got ()"]),
    ("tiny-bert", dict(layers=(True,)), ["whole numbers", "got [True]"]),
    ("tiny-bert", dict(stack="decoder"), ["stack must be one of encoder for bert", "got 'decoder'"]),
    ("tiny-bart", dict(stack="both"), ["stack must be one of encoder, decoder for bart", "got 'both'"]),
]


@pytest.mark.parametrize(
    ("backbone", "arguments", "words"), BAD_RESTRICTIONS, ids=lambda value: str(value)[:30]
)
def test_bad_restrictions(backbone, arguments, words):
    model = build(backbone)
    for attempt in (
        lambda: Anatomy(model).restrict(**arguments),
        lambda: gl.attach(model, gl.LoRA(r=2).on(**arguments)),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        for word in words:
            assert word in str(error.value)
    assert not hasattr(model, "guidelib") and all(p.requires_grad for p in model.parameters())


def both(names):
    return {f"{name}.{end}" for name in names for end in ("weight", "bias")}


BART_PARTS = {"encoder": ("self_attn", "final"), "decoder": ("self_attn", "encoder_attn", "final")}
NORMS = {
    "tiny-bert": both([
        "encoder.embeddings.LayerNorm",
        *(f"encoder.encoder.layer.{i}.{part}output.LayerNorm" for i in (0, 1) for part in ("attention.", "")),
    ]),
    "tiny-distilbert": both([
        "encoder.embeddings.LayerNorm",
        *(f"encoder.transformer.layer.{i}.{part}_layer_norm" for i in (0, 1) for part in ("sa", "output")),
    ]),
    "tiny-gpt2": both(["transformer.ln_f"] + [f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]),
    "tiny-llama": {"model.norm.weight"} | {
        f"model.layers.{i}.{part}_layernorm.weight" for i in (0, 1) for part in ("input", "post_attention")
    },
    "tiny-t5-random": {
        *(f"{stack}.final_layer_norm.weight" for stack in ("encoder", "decoder")),
        *(f"encoder.block.{i}.layer.{j}.layer_norm.weight" for i in (0, 1) for j in (0, 1)),
        *(f"decoder.block.{i}.layer.{j}.layer_norm.weight" for i in (0, 1) for j in (0, 1, 2)),
    },
    "tiny-bart": both([
        *(f"model.{stack}.layernorm_embedding" for stack in ("encoder", "decoder")),
        *(f"model.{stack}.layers.{i}.{part}_layer_norm"
          for stack, parts in BART_PARTS.items() for i in (0, 1) for part in parts),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("backbone", NORMS)
def test_norms(backbone):
    model = build(backbone)
    norms = Anatomy(model).norms()
    assert set(norms) == NORMS[backbone]
    assert all(norms[name] is model.get_parameter(name) for name in norms)


def test_biases_of_bert_are_those_of_its_linear_layers_and_norms():
    model = build("tiny-bert")
    blocks = [
        f"encoder.encoder.layer.{i}.{part}.bias"
        for i in (0, 1)
        for part in (
            *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            *("attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
        )
    ]
    biases = Anatomy(model).biases()
    assert set(biases) == {*blocks, "encoder.embeddings.LayerNorm.bias", "classifier.bias"}
    assert all(bias.dim() == 1 and bias is model.get_parameter(name) for name, bias in biases.items())


@pytest.mark.parametrize(
    ("backbone", "n"),
    # GPT-2: fused, projection, two of the network, two norms a block, and the last norm
    [("tiny-gpt2", 2 * 6 + 1), ("tiny-llama", 0), ("tiny-t5-random", 0), ("tiny-t5v1-random", 0)],
)
def test_the_number_of_biases(backbone, n):
    model = build(backbone)
    assert len(Anatomy(model).biases()) == n
    if "t5" in backbone:  # there is such a table, and it is not an additive bias vector
        assert any("relative_attention_bias" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_architectures_that_differ_in_their_biases_alone(kind):
    roles = {name.split(".")[-2] for name in Anatomy(small(kind)).biases()}
    assert roles == ({"q_proj", "k_proj", "v_proj"} if kind == "qwen2" else set())


def test_the_head_is_what_a_task_starts_from_random_weights():
    encoder = build("tiny-bert")
    head = Anatomy(encoder).head()
    assert set(head) == {"classifier.weight", "classifier.bias"}
    assert head["classifier.weight"] is encoder.classifier.weight
    task = gl.Task("t", "classification", ("no", "yes"), None, None, None)
    assert set(Anatomy(gl.load_backbone("tiny-llama", task)[0]).head()) == {"score.weight"}
    assert Anatomy(gl.load_backbone("tiny-bert")[0]).head() == {}  # bare
    assert (
        Anatomy(build("tiny-t5-random")).head() == {} and Anatomy(build("tiny-gpt2")).head() == {}
    )  # pretrained


TASK_LAYERS = {"pre_classifier", "classifier", "score", "classification_head", "qa_outputs"}
TASK_LAYERS |= {"sequence_summary", "multiple_choice_head"}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_head_of_every_class_of_an_architecture(kind):
    config = small(kind).config
    bare = transformers.MODEL_MAPPING[type(config)]
    ends = ("Classification", "Answering", "Choice", "DoubleHeadsModel")
    classes = [
        (name, c)
        for name, c in vars(inspect.getmodule(bare)).items()
        if name.startswith(bare.__name__.removesuffix("Model"))
    ]
    tasks = [c for name, c in classes if name.endswith(ends)]
    pretrained = [
        c for name, c in classes if name.endswith(("LM", "LMHeadModel", "Generation", "PreTraining"))
    ]
    assert len(tasks) >= 2 and pretrained
    for tied in (True, False):
        config.tie_word_embeddings = tied
        for cls in tasks:
            model = cls(config)
            names = {n for n, _ in model.named_parameters() if n.split(".")[0] in TASK_LAYERS}
            assert Anatomy(model).head().keys() == names != set(), cls
        for cls in (bare, *pretrained):
            assert Anatomy(cls(config)).head() == {}, cls
    for cls in pretrained:  # and a layer more
        model = type("Own", (cls,), {})(config)
        model.fc = nn.Linear(4, 2)
        assert {"fc.weight", "fc.bias"} <= Anatomy(model).head().keys(), cls


def test_attentions():
    bart, gpt2 = build("tiny-bart"), build("tiny-gpt2")
    encoder, decoder = bart.model.encoder.layers, bart.model.decoder.layers
    assert [(a.stack, a.layer, a.role, a.module) for a in Anatomy(bart).attentions()] == [
        ("encoder", 0, "self", encoder[0].self_attn),
        ("encoder", 1, "self", encoder[1].self_attn),
        ("decoder", 0, "self", decoder[0].self_attn),
        ("decoder", 0, "cross", decoder[0].encoder_attn),
        ("decoder", 1, "self", decoder[1].self_attn),
        ("decoder", 1, "cross", decoder[1].encoder_attn),
    ]
    assert [a.module for a in Anatomy(gpt2).attentions("self")] == [
        block.attn for block in gpt2.transformer.h
    ]
    assert [a.value.name for a in Anatomy(bart).attentions("cross")] == [
        "decoder.0.cross.v",
        "decoder.1.cross.v",
    ]
    with pytest.raises(ValueError, match="attentions: 'cross' is not in this gpt2 model; it has self"):
        Anatomy(gpt2).attentions("cross")


def test_every_attention_is_called(model):
    """The modules that are named run in a forward pass, each once."""
    anatomy, calls = Anatomy(model), []
    for attention in anatomy.attentions():
        attention.module.register_forward_hook(lambda module, args, output: calls.append(module))
    call(model)
    assert calls == [attention.module for attention in anatomy.attentions()]


def test_the_embedding_is_the_token_embedding(model):
    embedding = Anatomy(model).embedding
    assert isinstance(embedding, nn.Embedding) and embedding.num_embeddings == model.config.vocab_size


def test_base_parameters_leave_out_what_was_added():
    model = build("tiny-bert")
    names = [name for name, _ in model.named_parameters()]
    attachment = gl.attach(model, gl.LoRA(r=2))
    assert len(list(model.parameters())) == len(names) + 8
    assert list(attachment.anatomy.base_parameters()) == names
    assert outputs(model, batch("tiny-bert")).shape == (3, 2)


def test_unknown_models():
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError) as error:
        gl.attach(vit, gl.LoRA())
    for word in ("architecture 'vit' is not supported", *ARCHITECTURES, "architectures.ARCHITECTURES"):
        assert word in str(error.value)
    for other in (nn.Linear(2, 2), None, "tiny-bert"):
        with pytest.raises(TypeError, match=f"PreTrainedModel, got {type(other).__name__}"):
            gl.attach(other, gl.LoRA())
