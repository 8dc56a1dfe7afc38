"""LT-SFT, lottery-ticket sparse fine-tuning - train everything, see what moved, and train that alone.
Ansell, Ponti, Korhonen and Vulic 2022, arXiv:2110.07560, section 3.

    1. theta_1 = theta_0 after full fine-tuning
    2. the support: the k entries with the largest |theta_1 - theta_0|;  back to theta_0
    3. theta_2 = theta_0 after fine-tuning of the support alone;  phi = theta_2 - theta_0

The rewinding is what the lottery ticket hypothesis is about.  The head goes back as well, and the optimiser
starts afresh.  Sparse differences of several trainings can be added up: theta_0 + phi_language + phi_task.

count = k = keep * D of D entries.  Stored: k values and k indices.  Merges exactly.  The first phase takes
the memory of full fine-tuning, and the base's weights besides.

The authors also pull theta to theta_0 by an L1 penalty, which is left out here.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from guidelib.core.anatomy import ADDED
from guidelib.core.attaching import Attachment, attach_saved, load
from guidelib.core.method import Sum, expect, is_number
from guidelib.core.points.sparse_delta import Narrowing, SparseDelta


@dataclass(frozen=True)
class LTSFT(Narrowing):
    """Train the share ``keep`` of the entries that full fine-tuning moves most.

    first: the share of the steps that full fine-tuning takes.  In either phase the learning rate falls to
    zero.
    """

    first: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        share = is_number(self.first) and 0 < self.first < 1
        expect(share, "first", self.first, "a share of the steps, more than 0 and less than 1")

    def switch(self, total: int) -> int:
        """After how many steps the support is chosen."""
        return max(1, min(round(self.first * total), total - 1))

    def lr_factor(self, step: int, total: int) -> float:
        switch = self.switch(total)
        start, end = (0, switch) if step < switch else (switch, total)
        return (end - step) / (end - start) * total / (total - step) if step < total else 1.0

    def prepare(self, attachment, batches):
        part = self.part(attachment)
        was_open = part.dense is not None
        super().prepare(attachment, batches)
        if part.dense is not None and not was_open:
            part.start = {name: p.detach().clone() for name, p in attachment.anatomy.head().items()}

    @torch.no_grad()
    def after_step(self, attachment, step, total, optimizer):
        part = self.part(attachment)
        if part.dense is None or step < self.switch(total):
            return
        scores = [moved.abs() for moved in part.dense]
        part.close()
        part.choose(scores)
        for name, value in part.start.items():
            parameter = attachment.model.get_parameter(name)
            parameter.copy_(value)
            for moment in optimizer.state.get(parameter, {}).values():
                moment.zero_()  # the number of steps among them
        part.start = {}


def load_deltas(model: PreTrainedModel, paths: Sequence[str | os.PathLike]) -> Attachment:
    """Attach the sum of the sparse differences that the files ``paths`` hold.

    Where several have a task head, that of the last one is taken: it is the task that the model then does.

    Raises what ``load`` raises, and ValueError if a file holds something else.  The model is then as it was.
    """
    several = isinstance(paths, Sequence) and not isinstance(paths, str | bytes)
    expect(several and len(paths) > 0, "paths", paths, "a list of one or more files")
    methods, saved, beside, seen = [], {}, {}, Counter()
    for path in map(os.fspath, paths):
        attachment = load(model, path)
        try:
            parts = attachment.parts
            sparse = all(isinstance(part, SparseDelta) and part.dense is None for part in parts)
            accepted = "files of FishMask, LTSFT or DiffPruning that were trained to the end"
            expect(bool(parts) and sparse, "paths", f"{path} with {attachment.method!r}", accepted)
            methods.append(attachment.method)
            for part in parts:  # by the names that they have in a sum
                kind = type(part.method).__name__
                seen[kind] += 1
                name = f"{ADDED}.{kind}" + f"_{seen[kind]}" * (seen[kind] > 1)
                own = {"indices": part.indices, "sizes": part.sizes, "values": part.values.detach()}
                saved |= {f"{name}.{key}": tensor.clone() for key, tensor in own.items()}
            mine = {n: t.clone() for n, t in attachment.state().items() if not n.startswith(f"{ADDED}.")}
            for name in (mine.keys() & beside.keys()) - attachment.anatomy.head().keys():
                fits = mine[name].equal(beside[name])
                expect(fits, "paths", f"{path}, which trains {name!r} in place", "files that agree on that")
            beside |= mine
        finally:
            attachment.detach()
    return attach_saved(model, Sum(tuple(methods)), saved | beside, attachment.anatomy.drawn)
