"""Tiny models, batches and methods that several test modules share.  A new method is one row of
METHOD_CASES."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel

import guidelib as gl
from guidelib.core.anatomy import Anatomy

TWO_CLASSES = gl.Task("two-classes", "classification", ("no", "yes"), None, None, None)
ENCODERS = ("tiny-bert", "tiny-roberta", "tiny-distilbert")
DECODERS = ("tiny-gpt2", "tiny-llama")
SEQ2SEQ = ("tiny-t5-random", "tiny-t5v1-random", "tiny-bart")
BACKBONES = ENCODERS + DECODERS + SEQ2SEQ


@dataclass(frozen=True)
class Case:
    """A method as the generic tests see it.

    identity: whether the model computes exactly what it did right after attaching ("exact"), nearly so
    ("near", with the bound on the largest output change) or something else ("none").  refuses: backbone ->
    words of the error. silent: parameters whose gradient is zero by nature, by name.
    """

    method: gl.Method
    identity: str = "exact"
    bound: float = 0.0
    refuses: dict[str, str] = field(default_factory=dict)
    silent: Callable[[str], bool] = lambda name: False


def key_bias(name: str) -> bool:
    """A key bias adds the same number to all scores of a query, which the softmax takes away again."""
    return name.endswith(("key.bias", "k_lin.bias", "k_proj.bias"))


def added_key_bias(name: str) -> bool:
    return key_bias(name) or name.endswith("_k.b")


def fusion_key_bias(name: str) -> bool:
    """It adds the same number to the scores of all adapters."""
    return key_bias(name) or name.endswith("K.bias")


SMALL = gl.PfeifferAdapter(r=4)
NO_NORM_BEHIND = {name: "no norm behind" for name in (*DECODERS, "tiny-t5-random", "tiny-t5v1-random")}
NO_HEAD = {name: "no task head" for name in DECODERS + SEQ2SEQ}
NO_CROSS = {name: "'cross' is not in this" for name in ENCODERS + DECODERS}
NO_BIASES = {name: "have no biases" for name in ("tiny-llama", "tiny-t5-random", "tiny-t5v1-random")}
NO_CLASSES = {name: "an encoder with a task head" for name in DECODERS + SEQ2SEQ}
METHOD_CASES = {
    "full": Case(gl.FullFineTuning(), silent=key_bias),
    "head": Case(gl.HeadOnly(), refuses=NO_HEAD),
    "bitfit": Case(gl.BitFit(), refuses=NO_BIASES, silent=key_bias),
    "bitfit-subset": Case(
        gl.BitFit(only=("q", "ffn.in")), refuses=NO_BIASES | {"tiny-gpt2": "that of decoder.0.self.k as well"}
    ),
    "bitfit-add": Case(gl.BitFit(add=True), silent=added_key_bias),
    "norms": Case(gl.NormTuning()),
    "cross-attention": Case(gl.CrossAttentionTuning(), refuses=NO_CROSS, silent=key_bias),
    "self-attention": Case(gl.CrossAttentionTuning("self", norms=False), silent=key_bias),
    "attention": Case(gl.CrossAttentionTuning("attn"), silent=key_bias),
    "lora": Case(gl.LoRA(r=4, alpha=8)),
    "lora-all": Case(gl.LoRA(r=2, targets="all")),
    "rslora": Case(gl.LoRA(r=4, alpha=8, rank_stabilized=True)),
    "lora-fa": Case(gl.LoRA(r=3, targets="all", freeze_A=True)),
    "lora-sum": Case(
        gl.LoRA(r=2, targets="k").on(layers=0) + gl.LoRA(r=3, targets=("k", "ffn")).on(layers=-1)
    ),
    "qlora": Case(gl.QLoRA(r=4), identity="near", bound=8.0),  # T5's random logits reach 10
    "nf4-lora": Case(gl.NF4(double=False) + gl.LoRA(r=2).on(layers=-1), identity="near", bound=8.0),
    "flora-multiply": Case(gl.FLoRA(r=3, tasks=2, targets="all")),
    "flora-add": Case(gl.FLoRA(r=3, tasks=2, form="add", targets="all")),
    "adalora": Case(gl.AdaLoRA(r=4, target_r=2, alpha=8)),
    "relora": Case(gl.ReLoRA(r=3, alpha=8, targets=("q", "v"))),
    "krona": Case(gl.KronA(s=2.0)),
    "krona-all": Case(gl.KronA(shape=(2, 8), targets="all")),
    "said": Case(gl.IntrinsicSAID(d=200)),
    "dora": Case(gl.DoRA(r=4)),
    "dora-all": Case(gl.DoRA(r=2, alpha=6, targets="all", dropout=0.25)),
    "glora": Case(gl.GLoRA(r=2, D="none", E="vector")),  # D scales the biases, and untrained ones are zero
    "glora-vectors": Case(
        gl.GLoRA(r=2, A="vector", C="vector", D="none", E="vector", targets="all"),
        silent=lambda name: "_k." in name and name.endswith((".C", ".E")),  # a key's bias
    ),
    "glora-mergeable": Case(gl.GLoRA(r=2, A="scalar", C="none", D="none", E="none", targets=("v", "ffn"))),
    "did": Case(gl.IntrinsicSAID(d=64, scales=False)),
    "adapter": Case(gl.Adapter(r=4), "near", 1e-3),
    "adapter-everywhere": Case(
        gl.Adapter(r=3, sublayers=("attn", "ffn"), point="before dropout"), "near", 1e-3
    ),
    "pfeiffer": Case(SMALL, "near", 0.3),
    "pfeiffer-norm": Case(gl.PfeifferAdapter(r=4, original_norm=True), "near", 0.05, NO_NORM_BEHIND),
    "parallel": Case(gl.ParallelAdapter(r=4)),
    "parallel-everywhere": Case(gl.ParallelAdapter(r=3, sublayers=("attn", "ffn"), scale="learned")),
    "adapter-fusion": Case(gl.AdapterFusion(2, SMALL), "near", 0.3, silent=fusion_key_bias),
    "adapter-drop": Case(gl.AdapterDrop(SMALL, 1), "near", 0.3),
    "adapter-drop-random": Case(gl.AdapterDrop(SMALL, 1, random=True), "near", 0.3),
    "adamix": Case(gl.AdaMix(r=4, experts=3), "near", 1e-3),
    "phm": Case(gl.PHMAdapter(r=4), "near", 0.3),
    "phm-low-rank": Case(gl.ParallelAdapter(r=4, linear=gl.PHM(n=2, rank=2)), "near", 0.3),
    "compacter": Case(gl.Compacter(r=4), "near", 1e-3),
    "compacter++": Case(gl.CompacterPlusPlus(r=4), "near", 1e-3),
    "krona-res": Case(gl.KronARes()),
    "krona-res-everywhere": Case(gl.KronARes(sublayers=("attn", "ffn"), residual=False)),
    "mam": Case(gl.MAM(length=3, mlp=4, r=4), "none"),
    "unipelt": Case(gl.UniPELT(length=3, mlp=4, bottleneck=4, r=2), "none"),
    "gated": Case(gl.Gated(gl.LoRA(r=2, targets="all") + gl.PrefixTuning(length=2)), "none"),
    "sparse-adapter": Case(gl.SparseAdapter(r=8, score="magnitude"), "near", 0.3),
    "sparse-lora": Case(gl.SparseLoRA(r=8, score="synflow"), "near", 1.0),
    "sparse-compacter": Case(gl.Sparse(gl.Compacter(r=4), 0.5, "random"), "near", 1e-3),
    "sparse-sum": Case(
        gl.Sparse(gl.AdapterDrop(SMALL, 1, random=True) + gl.LoRA(r=2), score="random"), "near", 0.3
    ),
    "s4": Case(gl.S4(budget=8000), "none", silent=added_key_bias),
    "s4-uneven": Case(
        gl.S4(0.4, "bottleneck", "increasing", ("", "L", "AL", "AP")).on(layers=(0, 1)),
        "none",
    ),
    "prompt": Case(gl.PromptTuning(length=4), "none"),
    "prompts": Case(gl.PromptTuning(length=3, tasks=2), "none"),
    "prefixes": Case(gl.PrefixTuning(length=2, tasks=2), "none"),
    "prompt-lstm": Case(gl.PTuning(length=3, hidden=4), "none"),
    "prompt-mlp": Case(gl.PTuning(length=3, encoder="mlp"), "none"),
    "warp": Case(gl.WARP(length=3, mask=5), "none", refuses=NO_CLASSES),
    "warp-trained": Case(gl.WARP(length=3), "none", refuses=NO_CLASSES),
    "spot": Case(gl.SPoT(length=3), "none"),
    "ipt": Case(gl.IPT(length=3, d=4, hidden=5), "none"),
    "prompt-late": Case(gl.LatePromptTuning(length=3), "none"),
    "prompt-generated": Case(
        gl.LatePromptTuning(length=2, bottleneck=4),
        "none",
        refuses=dict.fromkeys(DECODERS, "must not see what it is to write"),
    ),
    "prefix-mlp": Case(gl.PrefixTuning(length=3, mlp=8), "none"),
    "prefix": Case(gl.PrefixTuning(length=3), "none"),
    "ia3": Case(gl.IA3()),
    "ia3-all": Case(gl.IA3(targets="all", inputs=("o", "ffn"))),
    "ia3-tasks": Case(gl.IA3(tasks=2)),
    "ia3-lora": Case(gl.IA3(targets=("v", "ffn")) + gl.LoRA(r=2, targets=("v", "ffn.out"))),
    "lst": Case(gl.LST(reduction=4), "none", silent=key_bias),
    "lst-one": Case(gl.LST(reduction=2, layers=-1, init="fisher"), "none", silent=key_bias),
    "fishmask": Case(gl.FishMask(keep=0.01)),
    "fishmask-ffn": Case(gl.FishMask(keep=0.25, targets="ffn", score="magnitude")),
    "lt-sft": Case(gl.LTSFT(keep=0.02)),
    "diff-pruning": Case(
        gl.DiffPruning(keep=0.02), silent=lambda name: ".gates." in name or ".dense." in name
    ),  # of a key bias, say
    "diff-pruning-ffn": Case(
        gl.DiffPruning(keep=0.1, targets="ffn", structured=True), silent=lambda name: ".gates." in name
    ),
    "far": Case(gl.FAR(keep=0.2)),
    "far-all": Case(
        gl.FAR(keep=0.5, targets="all"), silent=lambda name: "_k." in name and name.endswith(".1")
    ),
    "attention-fusion": Case(gl.AttentionFusion(), "none"),
    "lets": Case(gl.LeTS(hidden=3), "near", 1.0),
    "lets-one": Case(gl.LeTS(keep=0.3).on(layers=-1), "near", 1.0),
    "adapter-lora": Case(gl.Adapter(r=3) + gl.LoRA(r=2, targets=("q", "ffn.out")), "near", 1e-3),
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A tiny model in eval mode: an encoder with a classification head, the others as language models."""
    return copy.deepcopy(_built(name, seed, dtype))  # a quarter of the time that building takes


@functools.cache
def _built(name: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    task = TWO_CLASSES if name in ENCODERS else None
    return gl.load_backbone(name, task, seed=seed, dtype=dtype)[0].to(dtype)


def batch(name: str, *, padded: bool = True, rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Random ids with labels; the last row ends in padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 259, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -3:] = 0
        ids[-1, -3:] = 0
    if name in ENCODERS:
        labels = torch.arange(rows) % 2
    elif name in DECODERS:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.randint(3, 259, (rows, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def padded_left(model: PreTrainedModel, inputs: dict[str, torch.Tensor], n: int) -> dict[str, torch.Tensor]:
    """The same texts with n more places of padding on their left, and the positions of their tokens, where
    the model can be told."""
    shape, fill = inputs["input_ids"].shape, {"input_ids": 0, "attention_mask": 0, "labels": -100}
    inputs = {
        name: F.pad(value, (n, 0), value=fill[name]) if value.shape == shape else value
        for name, value in inputs.items()
    }
    body = next(iter(Anatomy(model).bodies().values()))
    if "position_ids" in inspect.signature(type(body.module).forward).parameters:
        inputs["position_ids"] = body.first + (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


def states(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head reads for each token, without gradient: of an encoder-decoder the logits."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(**inputs).logits
        return model.base_model(**{k: v for k, v in inputs.items() if k != "labels"}).last_hidden_state


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, without gradient."""
    with torch.no_grad():
        return model(**inputs).logits


def randomise(attachment: gl.Attachment, scale: float = 0.1) -> None:
    """Move everything trainable away from its start, or tests of what was trained would test nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attachment.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))


def predicted_and_measured(model, inputs):
    """Bytes and floating-point operations of a step, by the closed form and as counted."""
    closed = gl.closed_form.predict(model, inputs)
    return (
        (closed.saved_bytes, closed.forward_flops, closed.backward_flops),
        (gl.costs.saved_bytes(model, inputs), *gl.costs.flops(model, inputs)),
    )


def assert_the_prediction_is_the_measurement(model: PreTrainedModel, backbone: str) -> None:
    """The closed form to the byte and to the operation: two shapes of batch, with padding and without."""
    for rows, length in ((3, 9), (5, 17)):
        for padded in (True, False):
            inputs = batch(backbone, padded=padded, rows=rows, length=length)
            predicted, measured = predicted_and_measured(model, inputs)
            assert predicted == measured, (rows, length, padded)
            assert all(number > 0 for number in measured)


def assert_count(config: dict, method: gl.Method, expected: int) -> gl.Count:
    """What ``method`` trains and stores on a bare model of that configuration, made without weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    count = gl.attach(model, method).count()
    assert count.trainable == count.stored == expected
    return count
