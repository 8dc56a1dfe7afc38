"""Run by test_processes.py, in two processes: the losses of every method that is spread over them, and of one
process that has the whole batch."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from common import METHOD_CASES, batch, build
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import guidelib as gl
from guidelib.core.anatomy import Anatomy


def losses(case: str, way: str) -> list[float]:
    """Of three steps on four examples; with ``way`` each process has two of them."""
    model = build("tiny-bert")
    gl.attach(model, METHOD_CASES[case].method)
    if way == "FSDP2":
        for _, _, block in Anatomy(model).blocks():
            fully_shard(block)
        fully_shard(model)
    called = DistributedDataParallel(model) if way == "DDP" else model
    inputs, rank = batch("tiny-bert", rows=4), dist.get_rank()
    if way:
        inputs = {name: rows[2 * rank : 2 * rank + 2] for name, rows in inputs.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = called(**inputs).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if way:
            dist.all_reduce(mean)
            mean /= 2
        seen.append(float(mean))
    return seen


if __name__ == "__main__":
    dist.init_process_group("gloo")
    result = {case: {way: losses(case, way) for way in ("", "DDP", "FSDP2")} for case in sys.argv[2:]}
    if dist.get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(result, file)
    dist.destroy_process_group()
