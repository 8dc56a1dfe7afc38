"""The pretraining of ``tiny-t5``: schedule, steps, checkpoints, and the files of the model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from guidelib.core.method import expect
from guidelib.machine import versions
from guidelib.materials.checkpoints import no_progress_bars
from guidelib.pretraining.corpus import Corpus
from guidelib.pretraining.rows import END, MASK, OBJECTIVES, PAD, Text, collate, spoil, train_tokenizer

CONFIG = dict(
    d_model=128,
    d_kv=32,
    num_heads=4,
    d_ff=384,
    num_layers=4,
    num_decoder_layers=4,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)


@dataclass(frozen=True)
class Plan:
    """What a run is made of.  Two runs with equal plans and texts give equal weights on one machine.

    tokens: of text, all steps together.  batch: tokens of text in a step, at most.  length: tokens in a row,
    at most; ``late_length`` in the last quarter.  shares: of the rows, in the order of OBJECTIVES.  lr: the
    highest step of Adam as a share of a parameter's root mean square, as in Adafactor, T5's optimiser.
    """

    tokens: int
    seed: int = 0
    batch: int = 1200
    length: int = 40
    late_length: int = 64
    shares: tuple[float, ...] = (0.6, 0.2, 0.16, 0.04)
    lr: float = 1.5e-2
    warmup: int = 200
    clip: float = 1.0
    vocabulary: int = 4096

    def __post_init__(self):
        expect(self.tokens >= 1, "tokens", self.tokens, "at least 1")

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch)

    @property
    def late(self) -> int:
        """The step at which the last quarter begins.  Before it, nothing depends on ``tokens``."""
        return self.steps * 3 // 4

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: a linear rise, a plateau, and a linear fall to zero."""
        return self.lr * min(1, (step + 1) / self.warmup, (self.steps - step) / (self.steps - self.late))


def schedule(text: Text, plan: Plan, start: int = 0) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Step numbers from ``start`` with the rows of each.  What a step gets depends on the plan alone."""
    step = epoch = 0
    while step < plan.steps:
        length, last = (plan.late_length, plan.steps) if step >= plan.late else (plan.length, plan.late)
        for rows in text.batches(plan.batch, length, np.random.default_rng([plan.seed, 0, epoch])):
            if step == last:
                break
            if step >= start:
                yield step, rows
            step += 1
        epoch += 1


def losses(model: T5ForConditionalGeneration, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of each target token, (B, T); 0 where there is none."""
    logits = model(
        batch["input_ids"],
        batch["attention_mask"],
        decoder_input_ids=model._shift_right(batch["labels"]),
        use_cache=False,
    ).logits
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="none"
    )
    return flat.view(batch["labels"].shape)


def new_model(plan: Plan, config: dict) -> T5ForConditionalGeneration:
    """The model before the first step."""
    ids = dict(pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        return T5ForConditionalGeneration(T5Config(vocab_size=plan.vocabulary, **ids, **config)).eval()


@torch.no_grad()
def held_out_losses(model, text: Text, length: int, rows: int | None = None) -> dict[str, float]:
    """Mean loss per target token of each objective, on the same ``rows`` rows at every call.

    "hidden" is the loss of ``spans`` without the sentinels and end tokens: pieces of text that the model
    has to guess.
    """
    rng = np.random.default_rng(0)
    cut = text.rows(length, rng)
    cut = [cut[i] for i in rng.permutation(len(cut))[:rows]]
    result = {}
    for objective in OBJECTIVES:
        sums = {objective: [0.0, 0]} | ({"hidden": [0.0, 0]} if objective == "spans" else {})
        for i in range(0, len(cut), 64):
            batch = collate([spoil(text.ids[a:b], objective, text.ids, rng) for a, b in cut[i : i + 64]])
            each = losses(model, batch).double()
            for name, lowest in ((objective, 0), ("hidden", MASK + 1)):
                if name in sums:
                    chosen = batch["labels"] >= lowest
                    sums[name][0] += float(each[chosen].sum())
                    sums[name][1] += int(chosen.sum())
        result |= {name: round(total / count, 4) for name, (total, count) in sums.items()}
    return result


def unigram_loss(text: Text, held_out: Text, vocabulary: int) -> float:
    """Loss per token of a model that knows only how frequent each token is (add-one smoothing)."""
    counts = np.bincount(text.ids, minlength=vocabulary) + 1
    return float(-np.log(counts / counts.sum())[held_out.ids].mean())


def pretrain(
    texts: Corpus,
    plan: Plan,
    out: Path,
    *,
    checkpoint_seconds: float = 150,
    log_every: int = 100,
    held_out_every: int = 1000,
    stop_after: int | None = None,
    config: dict | None = None,
) -> Path:
    """Train, or go on from ``out``'s checkpoint, and write the model's files into ``out``/model (returned).

    ``out`` gets log.jsonl (a line every ``log_every`` steps) and checkpoint.pt, which a finished run leaves
    behind.  ``stop_after``: stop at that step with a checkpoint, for tests.  Raises ValueError if ``out``
    holds a run with another plan or other texts.
    """
    out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = out / "checkpoint.pt", out / "log.jsonl"
    digest = hashlib.sha256("\n".join([*texts.train, "", *texts.held_out]).encode()).hexdigest()
    settings = json.loads(json.dumps({"plan": asdict(plan), "config": config or CONFIG, "texts": digest}))
    tokenizer = train_tokenizer(texts.train, plan.vocabulary)
    settings["tokenizer"] = hashlib.sha256(
        tokenizer.backend_tokenizer.to_str(pretty=True).encode()
    ).hexdigest()

    text, held_out = Text(texts.train, tokenizer), Text(texts.held_out, tokenizer)
    model = new_model(plan, config or CONFIG).train()
    # T5's weights differ sixtyfold in size: one rate for all would be too high for the small ones (the
    # query's) or too low for the large (the embedding).
    optimizer = torch.optim.AdamW(
        [{"params": [p]} for p in model.parameters()], betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    start, seen, seconds = 0, {"steps": 0, "text": 0, "source": 0, "target": 0}, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        stored = state["settings"]["plan"]
        other = Plan(**stored | {"shares": tuple(stored["shares"])})
        done = state["seen"]["steps"]
        same = state["settings"] | {"plan": None} == settings | {"plan": None}
        if not (
            same
            and replace(other, tokens=plan.tokens) == plan
            and done <= min(plan.late, other.late)
            or state["settings"] == settings
        ):
            raise ValueError(
                f"out: {out} holds a run with another plan or other texts; choose another folder, or a plan "
                "that differs in nothing but the number of tokens, before the last quarter"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        seen, seconds, start = state["seen"], state["seconds"], state["seen"]["steps"]
        lines = log_file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        log_file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        since = state["since"]
    else:
        first = held_out_losses(model, held_out, plan.length, 256)
        record = {
            "step": 0,
            "held_out": first,
            "unigram": round(unigram_loss(text, held_out, plan.vocabulary), 4),
        }
        log_file.write_text(json.dumps(record) + "\n", encoding="utf-8")
        since = [[0.0, 0] for _ in OBJECTIVES]

    def save() -> None:
        partial = state_file.with_suffix(".partial")
        torch.save(
            {
                "settings": settings,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "seen": seen,
                "seconds": seconds,
                "since": since,
            },
            partial,
        )
        os.replace(partial, state_file)

    before = saved = time.perf_counter()
    bounds = np.cumsum(plan.shares)
    for step, rows in schedule(text, plan, start):
        rng = np.random.default_rng([plan.seed, 1, step])
        kinds = np.minimum(np.searchsorted(bounds, rng.random(len(rows)), side="right"), len(OBJECTIVES) - 1)
        pairs = [
            spoil(text.ids[a:b], OBJECTIVES[k], text.ids, rng) for (a, b), k in zip(rows, kinds, strict=True)
        ]
        batch = collate(pairs)
        each = losses(model, batch)
        count = (batch["labels"] != -100).sum(1)
        (each.sum() / count.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        for group in optimizer.param_groups:
            size = float(group["params"][0].detach().square().mean().sqrt())
            group["lr"] = plan.rate(step) * max(1e-3, size)
        optimizer.step()
        optimizer.zero_grad()
        per_row = each.detach().sum(1).double()
        for k in range(len(OBJECTIVES)):
            chosen = torch.from_numpy(kinds == k)
            since[k][0] += float(per_row[chosen].sum())
            since[k][1] += int(count[chosen].sum())
        seen["steps"] = step + 1
        seen["text"] += sum(b - a for a, b in rows)
        seen["source"] += int(batch["attention_mask"].sum())
        seen["target"] += int(count.sum())
        now = time.perf_counter()
        seconds, before = seconds + now - before, now
        if seen["steps"] % log_every == 0 or seen["steps"] == plan.steps:
            record = {
                "step": seen["steps"],
                "tokens": seen["text"],
                "loss": {o: round(s / max(1, n), 4) for o, (s, n) in zip(OBJECTIVES, since, strict=True)},
                "norm": round(float(norm), 3),
                "lr": float(f"{plan.rate(step):.4g}"),
                "seconds": round(seconds, 1),
            }
            since = [[0.0, 0] for _ in OBJECTIVES]
            if seen["steps"] % held_out_every == 0:
                record["held_out"] = held_out_losses(model, held_out, plan.length, 256)
            with open(log_file, "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            left = seconds / seen["steps"] * (plan.steps - seen["steps"])
            print(json.dumps(record), f"{left / 60:.0f} min left", flush=True)
        if seen["steps"] == stop_after:
            save()
            return out
        if now - saved > checkpoint_seconds:
            save()
            saved = now
    save()
    model.eval()
    facts = {
        "parameters": model.num_parameters(),
        "plan": settings["plan"],
        "steps": seen["steps"],
        "tokens": {key: seen[key] for key in ("text", "source", "target")},
        "corpus": {"sha256": digest, "train": len(text.ids), "held_out": len(held_out.ids), **texts.facts},
        "held_out": held_out_losses(model, held_out, plan.length),
        "random_weights": held_out_losses(new_model(plan, config or CONFIG), held_out, plan.length),
        "unigram": round(unigram_loss(text, held_out, plan.vocabulary), 4),
        "hours": round(seconds / 3600, 2),
        "versions": versions() | {"tokenizers": tokenizers.__version__},
    }
    return _write(out / "model", model, tokenizer, facts, log_file)


def _write(folder: Path, model, tokenizer, facts: dict, log_file: Path) -> Path:
    """The files of the package.  ``folder`` appears when it is complete, or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        ids = dict(pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=PAD)
        model.generation_config = GenerationConfig(**ids)
        with no_progress_bars():
            model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        shutil.copy(log_file, new / "pretraining.jsonl")
        for file in new.iterdir():
            file.chmod(0o644)  # safetensors leaves its file readable to its owner alone
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)
    for file in sorted(folder.iterdir()):
        print(hashlib.sha256(file.read_bytes()).hexdigest(), file.name)
    return folder
