"""Saved bytes and operations of a training step, from the sizes alone.

A step is walked through once, operation by operation, with two rules of autograd:

* an operation keeps tensors only if something at or below it is trained ("live");
* a linear layer keeps its input if its own weight (or a branch beside it) is trained, never because it is
  passed through: for that its weight is enough, and the weight is there anyway.

The tensors kept are collected by name, so one that two operations need counts once.  Written for BERT-like
encoders with the mean-pool head, and for the model's own loss, without what a method adds to it; the tests
hold it equal to the measurement, to the byte and to the operation.  `predict` in predict.py says as much of
any model by running the step on shapes, and explains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from guidelib.core.anatomy import ADDED, Anatomy, Site
from guidelib.core.points.prefix import PrefixPart
from guidelib.core.points.prompt import PromptPart
from guidelib.core.points.sublayer import SublayerPart
from guidelib.core.points.weight_delta import BranchCost, DeltaPart

COVERED = ("bert", "roberta", "xlm-roberta", "camembert")
ACTIVATIONS = ("gelu", "silu", "gelu_pytorch_tanh")  # one operation, which keeps its input


@dataclass(frozen=True)
class Prediction:
    """saved_bytes, forward_flops and backward_flops as `Step` defines them; kept: bytes by tensor
    name."""

    saved_bytes: int
    forward_flops: int
    backward_flops: int
    kept: Mapping[str, int]


def predict(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> Prediction | None:
    """The prediction for one step of ``model`` on ``batch``, or None for a model without a closed form.

    Covered are BERT-like encoders with a mean-pool head in 32 or 64 bits, with fused (sdpa) attention and an
    activation of one operation, on ids and a mask of whole numbers, without dropout and gradient
    checkpointing; and methods made of in-place selection, weight deltas, adapters, and prompts and prefixes
    that are trained themselves.
    """
    anatomy = Anatomy(model)
    added = getattr(model, ADDED, {}).values()
    if (
        anatomy.kind not in COVERED
        or type(model).__name__ != "MeanPoolClassifier"
        or not {"input_ids", "labels"} <= set(batch)
        or "position_ids" in batch
        or ("attention_mask" in batch and batch["attention_mask"].is_floating_point())
        or model.config._attn_implementation != "sdpa"
        or model.config.hidden_act not in ACTIVATIONS
        or model.dtype not in (torch.float32, torch.float64)  # 16-bit models mix in 32-bit statistics
        or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        # set with gradient checkpointing and left by transformers when that is switched off again
        or getattr(model, "_require_grads_hooks", None)
        or not all(isinstance(part, DeltaPart) or _adapter_cost(part) or _plain(part) for part in added)
    ):
        return None
    return _Step(model, anatomy, batch).run()


@dataclass
class _Step:
    model: PreTrainedModel
    anatomy: Anatomy
    batch: Mapping[str, torch.Tensor]
    kept: dict[str, int] = field(default_factory=dict)
    forward: int = 0
    backward: int = 0

    def run(self) -> Prediction:
        config, ids = self.model.config, self.batch["input_ids"]
        self.size = next(self.model.parameters()).element_size()
        self.rows, self.length = ids.shape
        self.texts = self.tokens = ids.numel()  # B T
        self.width, self.heads = config.hidden_size, config.num_attention_heads
        mask = self.batch.get("attention_mask")
        self.padded = mask is not None and not bool(mask.all())
        self.merged = getattr(getattr(self.model, ADDED, None), "attachment", None)
        self.merged = self.merged is not None and self.merged.merged
        self.deltas, self.adapters, self.prefixes, self.prompts = {}, {}, {}, 0
        if not self.merged:
            for part in getattr(self.model, ADDED, {}).values():
                if isinstance(part, SublayerPart):
                    self.adapters.setdefault(part.sublayer.name, []).append(part)
                elif isinstance(part, PrefixPart):
                    before = self.prefixes.get(part.attention.layer, 0)
                    self.prefixes[part.attention.layer] = before + len(part.prefix.P)
                elif isinstance(part, PromptPart):
                    self.prompts += part.length
                else:
                    self.deltas.setdefault(part.site.name, []).append((part.name, part.delta))

        self.length += self.prompts  # in the blocks
        self.tokens = self.rows * self.length
        live, name = self.embedding(), "embedding"
        for _, layer, block in self.anatomy.blocks():
            sites = {site.role: site for site in self.anatomy.restrict(layer).linears()}
            live, name = self.block(layer, block, sites, live, name)
        self.tokens = self.texts
        self.head(live)
        return Prediction(sum(self.kept.values()), self.forward, self.backward, self.kept)

    def keep(self, name: str, numbers: int, size: int | None = None) -> None:
        self.kept[name] = numbers * (self.size if size is None else size)

    def embedding(self) -> bool:
        """The embedding tables and their LayerNorm; ids are inputs, so the tables keep nothing of their
        own."""
        embeddings = self.anatomy.base.embeddings
        tables = embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings
        live = self.prompts > 0 or any(_trained(table.weight) for table in tables)
        if _trained(embeddings.token_type_embeddings.weight) and "token_type_ids" not in self.batch:
            # RoBERTa gathers them by position, row by row
            self.keep("token type ids", self.length if self.anatomy.kind == "bert" else self.tokens, 8)
        if self.anatomy.kind != "bert" and _trained(embeddings.position_embeddings.weight):
            self.keep("position ids", self.tokens, 8)
        return self.norm("embedding norm", embeddings.LayerNorm, live)

    def norm(self, name: str, norm: torch.nn.LayerNorm, live: bool) -> bool:
        live = live or _trained(norm.weight) or _trained(norm.bias)
        if live:
            self.keep(f"{name} input", self.tokens * self.width)
            self.keep(f"{name} statistics", 2 * self.tokens)
        return live

    def linear(self, site: Site, live: bool, name: str, tokens: int | None = None) -> bool:
        """One linear map of an input called ``name``, with whatever stands beside it; is its output live?"""
        d_out, d_in = site.shape
        return self.product(site.name, d_out, d_in, site.module, live, name, tokens)

    def product(self, label, d_out, d_in, module, live, name, tokens=None) -> bool:
        tokens = self.tokens if tokens is None else tokens
        weight_flops = 2 * tokens * d_out * d_in
        self.forward += weight_flops
        self.backward += weight_flops * (_trained(module.weight) + live)
        if _trained(module.weight):
            self.keep(name, tokens * d_in)
        out_live = live or _trained(module.weight) or (module.bias is not None and _trained(module.bias))
        for part, delta in self.deltas.get(label, ()):
            cost = delta.cost()
            self.forward += tokens * cost.forward + cost.forward_once
            self.backward += tokens * (cost.backward + live * cost.backward_input) + cost.backward_once
            if cost.keeps_input:
                self.keep(name, tokens * d_in)
            self.keep(part, _kept(cost, tokens, live))
            out_live = True
        return out_live

    def block(self, layer: int, block, sites: dict[str, Site], live: bool, name: str) -> tuple[bool, str]:
        attention, feedforward = f"{layer}.attention", f"{layer}.ffn"
        into, stream = live, name
        flowing = {role: self.linear(sites[f"self.{role}"], live, name) for role in "qkv"}
        prefix = self.prefixes.get(layer, 0)
        if prefix:  # before the keys and values, whether or not those are live
            flowing |= {"k": True, "v": True}
        keys = self.length + prefix
        scores = 2 * self.rows * self.length * keys * self.width  # of one of the two products
        self.forward += 2 * scores
        mixed = any(flowing.values())
        # the gradient of either factor of the two products, where that factor is live
        weights = flowing["q"] or flowing["k"]
        self.backward += scores * (flowing["q"] + flowing["k"] + flowing["v"] + weights)
        if mixed:
            for role, seen in {"q": self.length, "k": keys, "v": keys}.items():
                self.keep(f"{attention} {role}", self.rows * seen * self.width)
            self.keep(f"{attention} output", self.tokens * self.width)
            self.keep(f"{attention} log-sum-exp", self.tokens * self.heads)
            if self.padded:
                self.keep(f"{attention} mask", self.rows * self.length * keys)
        live = self.linear(sites["self.o"], mixed, f"{attention} output")
        live = self.hooks(f"encoder.{layer}.self", block.attention.output.LayerNorm, live, into, stream)
        live = self.norm(f"{attention} norm", block.attention.output.LayerNorm, live or into)
        into = live
        inner = self.linear(sites["ffn.in"], live, f"{feedforward} input")
        if inner:
            self.keep(f"{feedforward} activation input", self.tokens * sites["ffn.in"].shape[0])
        live = self.linear(sites["ffn.out"], inner, f"{feedforward} activation")
        live = self.hooks(f"encoder.{layer}.ffn", block.output.LayerNorm, live, into, f"{feedforward} input")
        live = self.norm(f"{feedforward} norm", block.output.LayerNorm, live or into)
        return live, f"{layer} output"

    def hooks(self, place: str, norm: torch.nn.LayerNorm, live: bool, into: bool, stream: str) -> bool:
        """What is added to the output h of a sub-layer with input x; is the new output live?

        ``live`` says it of h and ``into`` of x, which is called ``stream``.
        """
        for part in self.adapters.get(place, ()):
            cost = _adapter_cost(part)
            read, read_live = f"{part.name} input", live
            if part.method.reads == "input":
                read, read_live = stream, into
            elif part.method.reads == "normed":
                read_live = self.norm(f"{part.name} norm", norm, live or into)
            self.forward += self.tokens * cost.forward + cost.forward_once
            self.backward += self.tokens * (cost.backward + read_live * cost.backward_input)
            self.backward += cost.backward_once
            if cost.keeps_input:
                self.keep(read, self.tokens * self.width)
            self.keep(part.name, _kept(cost, self.tokens, read_live))
            live = True
        return live

    def head(self, live: bool) -> None:
        """Mean over the unmasked tokens, a linear map and the cross-entropy."""
        classes = self.model.config.num_labels
        if live and "attention_mask" in self.batch:
            self.keep("pooling mask", self.tokens)
            self.keep("pooling lengths", self.rows)
        live = self.product(
            "head", classes, self.width, self.model.classifier, live, "pooled", tokens=self.rows
        )
        if live:
            self.keep("log-probabilities", self.rows * classes)
            self.keep("loss normaliser", 1)


def _trained(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad


def _plain(part: torch.nn.Module) -> bool:
    """Whether it is a prompt or prefix with its own numbers, and nothing that makes them."""
    made = part.prompt if isinstance(part, PromptPart) else getattr(part, "prefix", None)
    return type(part) in (PromptPart, PrefixPart) and [name for name, _ in made.named_parameters()] == ["P"]


def _kept(cost: BranchCost, tokens: int, live: bool) -> int:
    """Numbers kept beside the input, which is ``live`` or not."""
    always = tokens * cost.kept + cost.kept_once
    return always + live * (tokens * cost.kept_input + cost.kept_input_once)


def _adapter_cost(part: torch.nn.Module) -> BranchCost | None:
    """What an adapter costs per token, or None where there is no closed form."""
    try:
        return part.module.cost() if isinstance(part, SublayerPart) else None
    except (AttributeError, NotImplementedError):
        return None
