"""The side network as an attachment point, LST and Attention Fusion."""

from __future__ import annotations

import copy

import pytest
import torch
from common import BACKBONES, DECODERS, SEQ2SEQ, batch, build, key_bias, outputs, randomise, states
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)

import guidelib as gl
from guidelib.additive.other import narrow
from guidelib.core.anatomy import Anatomy, sites_in
from guidelib.core.points.side import SidePart
from guidelib.reparametrization import nf4

METHODS = {
    "lst": gl.LST(reduction=4),
    "lst-random": gl.LST(reduction=2, layers=0, init="random"),
    "fusion": gl.AttentionFusion(),
    "lets": gl.LeTS(),
}


def part_of(attachment: gl.Attachment) -> SidePart:
    (part,) = attachment.parts
    return part


@torch.no_grad()
def open_the_ladder(attachment: gl.Attachment) -> None:
    """Let the side's state alone count, from the backbone's embeddings to its head."""
    for ladder in part_of(attachment).networks.values():
        ladder.alpha.fill_(100.0)  # sigmoid(100 / 0.1) is 1
        for linear in filter(lambda each: isinstance(each, nn.Linear), (ladder.enter, ladder.up)):
            nn.init.eye_(linear.weight)


def bert(layers: int = 2, inner: int = 64, **more) -> BertForSequenceClassification:
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=layers, intermediate_size=inner,
        vocab_size=300, **more,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


# LST


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_ladder_as_wide_as_the_backbone_is_a_copy_of_it(backbone):
    """With all layers, pruned by a factor of 1, with open gates: exactly, and with its gradients."""
    model, inputs = build(backbone), batch(backbone)
    before, whole = outputs(model, inputs), copy.deepcopy(model)
    attachment = gl.attach(model, gl.LST(reduction=1, layers=range(2)))
    open_the_ladder(attachment)
    assert torch.equal(outputs(model, inputs), before)
    for each in (model, whole):
        each(**inputs).loss.backward()
    anatomy, ladders = Anatomy(whole), part_of(attachment).networks
    for stack, layer, block in anatomy.blocks():
        mine = dict(ladders[stack].blocks[layer].named_parameters())
        for name, theirs in block.named_parameters():
            assert (mine[name].grad - theirs.grad).abs().max() < 1e-12, name


def test_published_counts():
    base = T5Config(d_model=768, d_kv=64, num_heads=12, num_layers=12, d_ff=3072)
    assert gl.count(base, gl.LST()).trainable == 3_878_712
    kept = (1, 2, 3, 5, 6, 7, 9, 10, 11)
    assert gl.count(base, gl.LST(layers=kept)).trainable == 3_878_712
    large = T5Config(d_model=1024, d_kv=128, num_heads=32, num_layers=24, d_ff=16384)
    assert gl.count(large, gl.LST(layers=-1)).trainable == 2_494_896


@pytest.mark.parametrize(
    ("depth", "kept"), [(1, (0,)), (2, (0, 1)), (5, (0, 2, 3, 4)), (12, (1, 2, 3, 5, 6, 7, 9, 10, 11))]
)
def test_every_fourth_layer_is_left_out_and_never_the_last(depth, kept):
    attachment = gl.attach(bert(depth), gl.LST(reduction=4))
    assert part_of(attachment).networks["encoder"].layers == kept


def test_the_equation_by_hand():
    model, inputs = build("tiny-bert"), batch("tiny-bert", padded=False)
    attachment = gl.attach(model, gl.LST(reduction=4, temperature=0.3))
    randomise(attachment)
    ladder, seen = part_of(attachment).networks["encoder"], []
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in ladder.blocks]
    state = states(model, inputs)
    for handle in handles:
        handle.remove()
    attachment.detach()
    with torch.no_grad():
        h = model.base_model(inputs["input_ids"], output_hidden_states=True).hidden_states
        s = F.linear(h[0], ladder.enter.weight, ladder.enter.bias)
        for layer in range(2):
            mu = 1 / (1 + torch.exp(-ladder.alpha[layer] / 0.3))
            down = ladder.down[layer]
            s = ladder.blocks[layer](mu * s + (1 - mu) * (h[layer + 1] @ down.weight.T + down.bias))
            assert (s - seen[layer]).abs().max() < 1e-12
        assert (s @ ladder.up.weight.T + ladder.up.bias - state).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("reduction", [1, 2])
def test_pruning_keeps_whole_units_of_the_backbone(backbone, reduction):
    """Each number of a side block stands in the block, and all of its units at the same places."""
    model, generator = build(backbone), torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # no number twice
        nn.init.normal_(parameter, generator=generator)
    attachment = gl.attach(model, gl.LST(reduction=reduction))
    anatomy, streams = attachment.anatomy, set()
    for stack, body in anatomy.bodies().items():
        ladder = part_of(attachment).networks[stack]
        for layer, small in zip(ladder.layers, ladder.blocks, strict=True):
            whole = {site.role: site.weight for site in sites_in(body.blocks[layer], body.names)}
            left = {site.role: site.weight.detach() for site in sites_in(small, body.names)}
            where = {role: _rows_and_columns(whole[role], left[role]) for role in left}
            streams |= {where[role][1] for role in left if role.endswith((".q", "ffn.in"))}
            streams |= {where[role][0] for role in left if role.endswith((".o", "ffn.out"))}
            assert where["ffn.in"][0] == where["ffn.out"][1]
            if backbone != "tiny-llama":  # in which heads share keys and values
                assert where["self.q"][0] == where["self.k"][0]
                assert where["self.v"][0] == where["self.o"][1]
            heads = [{n // 8 for n in where[role][0]} for role in ("self.q", "self.k")]
            assert all(
                h == set(range(len(whole[f"self.{r}"]) // 8)) for h, r in zip(heads, "qk", strict=True)
            )
    assert len(streams) == 1 and len(streams.pop()) == 32 // reduction


def _rows_and_columns(whole: torch.Tensor, left: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the numbers of ``left`` stand in ``whole``, in which all are different."""
    places = {value: divmod(n, whole.shape[1]) for n, value in enumerate(whole.flatten().tolist())}
    found = [[places[value] for value in row] for row in left.tolist()]
    rows, columns = tuple(row[0][0] for row in found), tuple(place[1] for place in found[0])
    assert found == [[(i, j) for j in columns] for i in rows]
    return rows, columns


def test_a_narrow_head_turns_as_one_of_its_width_does():
    """LLaMA's rotary positions: every rho-th frequency is what a narrower model computes for itself."""
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=48, vocab_size=99
    )
    small = copy.deepcopy(config)
    small.hidden_size, small.head_dim = 8, 4
    wide, narrow_ = (LlamaForCausalLM(c).model.rotary_emb for c in (config, small))
    positions = torch.arange(20)[None]
    for a, b in zip(wide(torch.zeros(1), positions), narrow_(torch.zeros(1), positions), strict=True):
        assert (a[..., ::4] - b).abs().max() < 1e-6


def test_what_matters_most_stays():
    model = build("tiny-bert")
    anatomy = Anatomy(model)
    stream, inner = (3, 7, 20, 31, 2, 11, 12, 30), (0, 9, 17, 18, 40, 41, 50, 63) * 2
    sites = {site.role: site for site in anatomy.restrict(1).linears()}
    for _, _, block in anatomy.blocks():
        for site in sites_in(block, anatomy.stacks["encoder"]):
            if site.role in ("self.o", "ffn.out"):
                site.weight[list(stream)] *= 10
    sites["ffn.in"].weight[list(inner)] *= 100
    attachment = gl.attach(model, gl.LST(reduction=4))
    small = part_of(attachment).networks["encoder"].blocks[1]
    left = {site.role: site for site in sites_in(small, anatomy.stacks["encoder"])}
    rows, columns = _rows_and_columns(sites["ffn.out"].weight, left["ffn.out"].weight.detach())
    assert rows == tuple(sorted(stream)) and set(inner) <= set(columns)


def test_the_fisher_information_decides_where_it_is_asked():
    """It is the mean square of each example's gradient, in the backbone without a side network."""
    model, inputs = build("tiny-bert"), batch("tiny-bert")
    plain, method = copy.deepcopy(model), gl.LST(reduction=4, init="fisher")
    attachment = gl.attach(model, method)
    start = copy.deepcopy(part_of(attachment).networks)
    flags = [p.requires_grad for p in model.parameters()]
    method.prepare(attachment, [inputs])
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    squares = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for i in range(3):
        plain.zero_grad()
        plain(**{name: rows[i : i + 1] for name, rows in inputs.items()}).loss.backward()
        for name, p in plain.named_parameters():
            squares[name] += p.grad.square()
    body = Anatomy(plain).bodies()["encoder"]
    score = lambda site: squares[next(n for n, p in plain.named_parameters() if p is site.parameter)]  # noqa: E731
    stream = narrow.stream({body: [0, 1]}, 4, score)
    for layer, block in enumerate(start["encoder"].blocks):
        narrow.prune(block, body, layer, 4, score, stream)
        mine = part_of(attachment).networks["encoder"].blocks[layer].state_dict()
        assert all(torch.equal(mine[name], value) for name, value in block.state_dict().items())
    before = attachment.state()
    randomise(attachment)
    moved = {name: tensor.clone() for name, tensor in attachment.state().items()}
    method.prepare(attachment, [inputs])  # what was trained, or came from a file, stays
    assert all(torch.equal(moved[name], tensor) for name, tensor in attachment.state().items())
    assert before.keys() == moved.keys()


def test_both_stacks_have_a_ladder_and_the_decoders_reads_the_encoders():
    model, inputs = build("tiny-t5v1-random"), batch("tiny-t5v1-random")
    attachment = gl.attach(model, gl.LST(reduction=4))
    randomise(attachment)
    before = outputs(model, inputs)
    encoded = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert encoded.last_hidden_state.shape[-1] == 32 + 8
    given = {"encoder_outputs": encoded, **inputs}
    del given["input_ids"]
    assert (outputs(model, given) - before).abs().max() < 1e-12
    with torch.no_grad():
        part_of(attachment).networks["encoder"].enter.bias.add_(0.5)
    assert (outputs(model, inputs) - before).abs().max() > 1e-6
    given["encoder_outputs"] = (encoded.last_hidden_state[..., :32],)
    with pytest.raises(ValueError, match="encoder_outputs must come from this model's encoder"):
        outputs(model, given)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("backbone", [*DECODERS, *SEQ2SEQ[:1]])
def test_the_sides_keys_stand_in_the_models_cache(backbone, cache):
    model, inputs = build(backbone), batch(backbone, padded=False)
    inputs.pop("labels")
    randomise(gl.attach(model, gl.LST(reduction=4)))
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    plain = model.generate(**inputs, **settings, use_cache=False)
    kept = model.generate(**inputs, **settings, cache_implementation=cache)
    assert torch.equal(plain.sequences, kept.sequences)
    found = getattr(kept.past_key_values, "self_attention_cache", kept.past_key_values)
    assert [layer.keys.shape[-1] for layer in found.layers] == [8, 8, 2, 2]


def test_a_window_holds_for_the_side_as_well():
    config = MistralConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=48, vocab_size=99, sliding_window=4, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).double().eval()
    randomise(gl.attach(model, gl.LST(reduction=2)))
    ids = torch.arange(1, 21).view(2, 10)
    found = [model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*found)


# Attention Fusion


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_query_is_the_mean_and_a_large_one_picks_a_layer(backbone):
    model, inputs = build(backbone), batch(backbone)
    before = outputs(model, inputs)
    anatomy, seen = Anatomy(model), []
    stack = [*anatomy.bodies()][-1]
    body = anatomy.bodies()[stack]
    attachment = gl.attach(model, gl.AttentionFusion().on(stack=stack))
    fusion = part_of(attachment).networks[stack]
    handle = fusion.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    outputs(model, inputs)
    trail, state = seen.pop()
    closing = (lambda h: h) if body.closing is None else body.closing
    mean = sum(trail.states.values()) / 2
    assert (closing(mean) - state).abs().max() < 1e-12
    handle.remove()
    # a query with which the last block's states have a product that is larger by 1, for each token
    with torch.no_grad():
        gap = (trail.states[1] - trail.states[0]).flatten(0, 1)
        ones = torch.ones(len(gap), 1, dtype=gap.dtype)
        fusion.q.copy_(torch.linalg.lstsq(gap, ones, driver="gelsd").solution[:, 0])
        assert (gap @ fusion.q - 1).abs().max() < 1e-6
        fusion.q.mul_(1000)
    assert (outputs(model, inputs) - before).abs().max() < 1e-12
    attachment.detach()
    attachment = gl.attach(model, gl.AttentionFusion().on(layers=-1, stack=stack))
    assert torch.equal(outputs(model, inputs), before)  # of one layer it is the backbone


def test_weights_that_are_the_same_for_all_tokens_are_elmos_mix():
    """States with a coordinate of their layer's own, the query along it: the softmax of these numbers."""
    model, inputs = bert(3).double(), batch("tiny-bert", padded=False)
    anatomy, scores = Anatomy(model), (0.3, -1.0, 2.0)
    for (_, _, block), score in zip(anatomy.blocks(), scores, strict=True):
        norm = block.output.LayerNorm
        with torch.no_grad():
            norm.weight[5], norm.bias[5] = 0, score
    attachment = gl.attach(model, gl.AttentionFusion())
    with torch.no_grad():
        part_of(attachment).networks["encoder"].q[5] = 1
        h = model.bert(inputs["input_ids"], output_hidden_states=True)
        weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
        mixed = sum(w * state for w, state in zip(weights, h.hidden_states[1:], strict=True))
    assert (mixed - h.last_hidden_state).abs().max() < 1e-12


def test_its_count_is_the_papers():
    attachment = gl.attach(bert(), gl.AttentionFusion())
    assert part_of(attachment).networks["encoder"].q.numel() == 32
    count = gl.count(BertConfig(), gl.AttentionFusion())
    assert count.trainable - count.head == 768 and round(100 * 768 / 85_054_464, 4) == 0.0009


# the attachment point


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_tensor_of_the_backbone_has_a_graph(backbone, name):
    model, inputs = build(backbone), batch(backbone)
    attachment, graphs = gl.attach(model.train(), METHODS[name]), {}
    gl.checkpointing(model)  # which may leave a hook that asks for the embeddings' gradient
    backbone_modules = part_of(attachment).closed

    def look(module, args, kwargs, output):
        tensors = (*args, *kwargs.values(), *(output if isinstance(output, tuple) else (output,)))
        graphs[module] = [t for t in tensors if isinstance(t, torch.Tensor) and t.grad_fn is not None]

    bodies = {body.module for body in attachment.anatomy.bodies().values()}  # whose output is the network's
    closing = {body.closing for body in attachment.anatomy.bodies().values()}
    for module in set(backbone_modules) - bodies - closing:
        module.register_forward_hook(look, with_kwargs=True)
    loss = model(**inputs).loss
    assert loss.requires_grad and len(graphs) > 20
    assert [type(module).__name__ for module, found in graphs.items() if found] == []


def saved(model, method: gl.Method) -> int:
    attachment = gl.attach(model, method)
    kept = gl.costs.saved_bytes(model, batch("tiny-bert", rows=4, length=10))
    attachment.detach()
    return kept


def test_what_is_kept_depends_neither_on_the_backbones_inner_width_nor_on_its_depth():
    fusion = gl.AttentionFusion()
    for method in (fusion, gl.LeTS()):
        assert saved(bert(inner=64), method) == saved(bert(inner=512), method)
    assert saved(bert(2), fusion) == saved(bert(5), fusion.on(layers=(0, 1)))
    lst = gl.LST(reduction=4, layers=(0, 1))
    assert saved(bert(2), lst) == saved(bert(5), lst)
    # the side's own inner width is the backbone's by rho: of each token before and behind the GELU
    side = 2 * 2 * 4 * 10 * (512 - 64) // 4 * 4
    assert saved(bert(inner=512), lst) - saved(bert(inner=64), lst) == side
    full = [saved(bert(inner=inner), gl.FullFineTuning()) for inner in (64, 512)]
    assert full[1] - full[0] == 4 * side


def test_an_adapter_keeps_more():
    model = bert(6)
    kept = [saved(model, m) for m in (gl.AttentionFusion(), gl.LST(8), gl.LoRA(r=2), gl.FullFineTuning())]
    assert kept == sorted(kept) and kept[1] < 0.5 * kept[2]


@pytest.mark.parametrize("name", METHODS)
def test_the_backbone_stays_in_evaluation_mode_while_the_rest_trains(name):
    model, inputs = bert(hidden_dropout_prob=0.5), batch("tiny-bert")
    gl.attach(model, gl.LoRA(r=2)).detach()
    attachment = gl.attach(model.train(), METHODS[name])
    part, blocks = part_of(attachment), [block for _, _, block in attachment.anatomy.blocks()]
    for mode in (True, False, True):
        model.train(mode)
        assert model.training == model.dropout.training == mode
        assert all(module.training == mode for module in part.networks.modules())
        assert not any(module.training for block in blocks for module in block.modules())
    found = []
    blocks[-1].register_forward_hook(lambda module, args, out: found.append(out))
    losses = [model(**inputs).loss.item() for _ in range(2)]
    assert torch.equal(*found) and losses[0] != losses[1]  # the head has dropout, and so have side blocks
    attachment.detach()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_pooler_reads_the_networks_state_and_is_trained(name):
    model, inputs = bert().double(), batch("tiny-bert")
    attachment = gl.attach(model, METHODS[name], also="pooler")
    randomise(attachment)
    model(**inputs).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.bert.pooler.parameters())
    inputs.pop("labels")
    with torch.no_grad():
        for dictionary in (True, False):
            output = model.bert(**inputs, return_dict=dictionary)
            state, pooled = output[:2]
            assert torch.equal(model.bert.pooler.forward(state), pooled)


def test_a_bare_backbone_gives_the_networks_state():
    model = BertModel(bert().config).eval()
    ids = batch("tiny-bert", padded=False)["input_ids"]
    attachment = gl.attach(model, gl.LST(4))
    with torch.no_grad():
        shapes = [h.shape[-1] for h in model(ids, output_hidden_states=True).hidden_states]
    assert shapes == [32, 32, 32]  # none of the side's
    attachment.detach()
    attachment = gl.attach(model, gl.AttentionFusion().on(layers=-1))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
        assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
        assert len(output.hidden_states) == 3
    attachment.detach()
    assert torch.equal(model(ids).last_hidden_state, output.last_hidden_state)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_beside_sixteen_bits_the_network_computes_in_32(backbone, name):
    model, inputs = build(backbone, dtype=torch.bfloat16), batch(backbone)
    attachment = gl.attach(model, METHODS[name])
    assert {p.dtype for p in part_of(attachment).parameters()} == {torch.float32}
    exact = build(backbone, dtype=torch.bfloat16).float()
    gl.attach(exact, METHODS[name])
    output, expected = model(**inputs), outputs(exact, inputs)
    assert output.logits.dtype == torch.bfloat16
    assert (output.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    output.loss.backward()
    assert all(p.grad is not None or key_bias(n) for n, p in part_of(attachment).named_parameters())
    if backbone not in DECODERS + SEQ2SEQ:
        return
    inputs.pop("labels")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", ["tiny-bert", "tiny-llama", "tiny-t5-random"])
def test_autocast_runs_the_network_in_sixteen_bits(backbone, name):
    model, inputs = build(backbone, dtype=torch.float32), batch(backbone)
    attachment = gl.attach(model, METHODS[name])
    expected = model(**inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert abs(loss - expected) < 0.05 * expected
    assert all(p.grad is not None for p in part_of(attachment).parameters())


@pytest.mark.parametrize("name", METHODS)
def test_the_backbone_may_stand_in_four_bits(name):
    model, inputs = build("tiny-llama"), batch("tiny-llama")
    attachment = gl.attach(model, gl.NF4() + METHODS[name])
    model(**inputs).loss.backward()
    side = next(part for part in attachment.parts if isinstance(part, SidePart))
    assert all(p.grad is not None for p in side.parameters())


def test_the_fisher_information_is_that_of_the_base_also_beside_four_bits():
    inputs, found = batch("tiny-llama"), []
    for method in (gl.LST(4, init="fisher"), gl.NF4() + gl.LST(4, init="fisher")):
        attachment = gl.attach(build("tiny-llama"), method)
        acting = outputs(attachment.model, inputs)
        method.prepare(attachment, [inputs])
        found.append([p for part in attachment.parts for p in part.parameters()])
        assert not torch.equal(outputs(attachment.model, inputs), acting)
    assert all(map(torch.equal, *found))


def test_what_is_trained_in_the_backbone_stands_not_beside_a_side_network():
    model = build("tiny-bert")
    for method in (gl.LST(4), gl.AttentionFusion()):
        mine = type(method).__name__
        for other in (gl.LoRA(r=2), gl.Adapter(r=2), gl.PromptTuning(2), gl.PrefixTuning(2), gl.IA3()):
            its = type(other).__name__
            for both in (method + other, other + method):
                with pytest.raises(ValueError, match=f"{mine} runs the backbone without .* {its} at"):
                    gl.attach(model, both)
        with pytest.raises(ValueError, match=f"{mine} runs the backbone without gradients, in which 'enc"):
            gl.attach(model, method + gl.FullFineTuning())
        with pytest.raises(ValueError, match="runs the backbone without gradients, in which"):
            gl.attach(model, method, also="embedding")
    with pytest.raises(ValueError, match="LST runs the backbone without .* AttentionFusion at"):
        gl.attach(model, gl.LST(4) + gl.AttentionFusion())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())
    assert gl.attach(model, gl.LST(4) + gl.HeadOnly()).count().norms == 0
    # a table of tokens that a language model's head shares learns from there
    tied = gl.attach(build("tiny-gpt2"), gl.LST(4), also="embedding")
    tied.model(**batch("tiny-gpt2")).loss.backward()
    assert tied.anatomy.embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("backbone", "method", "words"),
    [
        ("tiny-bert", lambda: gl.LST(0), "reduction must be a whole number of at least 1, got 0"),
        ("tiny-bert", lambda: gl.LST(init="zero"), "init must be one of magnitude, fisher, random"),
        ("tiny-bert", lambda: gl.LST(temperature=0), "temperature must be a positive number, got 0"),
        ("tiny-bert", lambda: gl.LST(layers="all"), "layers must be None, a whole number or several"),
        ("tiny-bert", lambda: gl.LST(4, layers=7), "layers must be whole numbers from -2 to 1"),
        ("tiny-bert", lambda: gl.LST(3), "reduction must be a divisor of the encoder's width 32, got 3"),
        ("tiny-bert", lambda: gl.LST(16), "a divisor of the encoder's head width 8, got 16"),
        ("tiny-llama", lambda: gl.LST(8), "head width 8 / 2, which is turned in pairs, got 8"),
        ("tiny-bart", lambda: gl.LST(4).on(stack="decoder"), "both stacks need a side network"),
        ("tiny-bart", lambda: gl.AttentionFusion().on(stack="encoder"), "the final state is the last"),
        ("tiny-bert", lambda: gl.AttentionFusion(-1), "temperature must be a positive number"),
        ("tiny-bert", lambda: gl.LeTS(keep=0), "keep must be a share of the weights, more than 0 and at"),
        ("tiny-bert", lambda: gl.LeTS(keep=1.5), "keep must be a share of the weights"),
        ("tiny-bert", lambda: gl.LeTS(hidden=0), "hidden must be a whole number of at least 1, or None"),
        ("tiny-bert", lambda: gl.LeTS(cost=-1), "cost must be a finite number of at least 0, got -1"),
        ("tiny-bert", lambda: gl.LeTS().on(layers=7), "layers must be whole numbers from -2 to 1"),
        ("tiny-bert", lambda: gl.LeTS() + gl.LoRA(r=2), "LeTS runs the backbone without .* LoRA at"),
        ("tiny-bert", lambda: gl.LST(4) + gl.LeTS(), "LST runs the backbone without .* LeTS at"),
        ("tiny-bart", lambda: gl.LeTS().on(stack="encoder"), "the final state is the last stack's"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(backbone, method, words):
    model = build(backbone)
    with pytest.raises(ValueError, match=words):
        gl.attach(model, method())
    assert not hasattr(model, "guidelib")


def test_a_decoder_that_attends_to_another_model_is_refused():
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=99,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="model must be one with its own encoder, got"):
        gl.attach(BertModel(config), gl.LST(4))


def test_each_module_gets_back_the_mode_that_it_was_put_in():
    model = build("tiny-bert").train()
    dropout = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    dropout.eval()
    attachment = gl.attach(model, gl.LST(reduction=2))
    assert not any(m.training for m in attachment.parts[0].closed)
    attachment.detach()
    assert not dropout.training and model.base_model.encoder.training
    attachment = gl.attach(model, gl.LST(reduction=2))
    model.eval()
    attachment.detach()
    assert not any(m.training for m in model.modules())


def test_the_backbone_rests_also_where_it_alone_is_put_in_training_mode():
    model, inputs = build("tiny-bert", dtype=torch.float32), batch("tiny-bert")
    attachment = gl.attach(model, gl.AttentionFusion())
    wanted = outputs(model, inputs)
    model.base_model.train()
    assert torch.equal(outputs(model, inputs), wanted)
    attachment.detach()
    assert all(module.training for module in model.base_model.encoder.modules())


def test_weights_that_were_released_choose_nothing():
    for method, phase in ((gl.LeTS(keep=0.02), "prepare"), (gl.LST(4, init="fisher"), "prepare")):
        model, inputs = build("tiny-llama"), batch("tiny-llama")
        attachment = gl.attach(model, gl.NF4() + method)
        nf4.release(model)
        with pytest.raises(ValueError, match="model must be one that has them; release"):
            getattr(attachment.method, phase)(attachment, [inputs])


def test_a_trained_side_network_is_prepared_again_without_the_base_weights():
    for method in (gl.LeTS(keep=0.02), gl.LST(4, init="fisher")):
        model, inputs = build("tiny-llama"), batch("tiny-llama")
        attachment = gl.attach(model, gl.NF4() + method)
        attachment.method.prepare(attachment, [inputs])
        randomise(attachment)
        wanted = copy.deepcopy(attachment.state())
        nf4.release(model)
        attachment.method.prepare(attachment, [inputs])
        state = attachment.state()
        assert all(state[name].equal(tensor) for name, tensor in wanted.items() if name in state)


@pytest.mark.parametrize("method", [gl.LeTS(keep=0.02), gl.LST(4, init="fisher"), gl.AttentionFusion()])
def test_what_looks_at_data_or_measures_leaves_the_modes_to_give_back(method):
    model, inputs = build("tiny-bert").train(), batch("tiny-bert")
    attachment = gl.attach(model, method)
    attachment.method.prepare(attachment, [inputs])
    gl.measure(model, inputs)
    attachment.detach()
    assert all(module.training for module in model.modules())
