"""ReLoRA - high rank from several low-rank updates.  Lialin et al. 2023, arXiv:2307.05695, section 3.

    every restart:  W <- W + (alpha / r) B A;   A (r, d_in) random, B (d_out, r) zero again

Each cycle is a LoRA, so after n restarts W_T - W_0 has a rank of up to (n + 1) r.  A restart does not change
the function: only where training goes from there.  Adam's moments belong to the old A and B, so most of them
are dropped, and the learning rate warms up again (a "jagged" schedule).

The authors drop the smallest entries of either moment by itself.  Here both keep the same ones (our reading,
see ``_keep_largest``).

count = r (d_in + d_out) per target, as LoRA.  What is stored is more: the rewritten weights themselves,
d_in d_out per target, besides the last A and B.  Merges exactly; a restart rounds in a 16-bit base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, Targets
from guidelib.core.method import expect, is_number, is_whole
from guidelib.core.values import draw
from guidelib.reparametrization.lora import LoRA


@dataclass(frozen=True)
class ReLoRA(LoRA):
    """LoRA that is merged into the weights ``restarts`` times, at equal distances, and starts again.

    r, alpha, targets, dropout: as in LoRA; the authors pretrain all linear maps with r = 128.  keep: the
    share of Adam's moments that survives a restart, the entries with the largest mean gradient; 0.0 resets
    them.  warmup: the share of a cycle over which the learning rate, that of the task head included, rises
    after a restart.
    """

    targets: Targets = "all"
    restarts: int = 3
    keep: float = 0.1
    warmup: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        expect(is_whole(self.restarts, 0), "restarts", self.restarts, "a whole number of at least 0")
        for name in ("keep", "warmup"):
            value = getattr(self, name)
            expect(is_number(value) and 0 <= value <= 1, name, value, "a share from 0 to 1")

    def parts(self, anatomy, saved):
        parts = super().parts(anatomy, saved)
        for part in parts:  # after all of LoRA's draws, so that the first cycle is LoRA's
            part.seed = draw(2**31) + 2**31 * bool(saved)
            part.first = self.restarts > 0  # none beside it may depend on the weight, which is rewritten
        return parts

    def rewrites(self, anatomy: Anatomy) -> set[str]:
        names = {id(p): name for name, p in anatomy.base_parameters().items()}
        return {names[id(site.parameter)] for site in anatomy.linears(self.targets) if self.restarts}

    def starts(self, total: int) -> list[int]:
        """The steps after which a cycle starts: 0, and the restarts (fewer if there are too few steps)."""
        cycles = min(self.restarts + 1, total)
        return sorted({total * k // cycles for k in range(cycles)})

    def lr_factor(self, step: int, total: int) -> float:
        start = max(s for s in self.starts(total) if s <= step)
        rising = self.warmup * total / (self.restarts + 1)
        return 1.0 if start == 0 else min(1.0, (step - start) / rising) if rising else 1.0

    @torch.no_grad()
    def after_step(self, attachment, step, total, optimizer):
        if step not in self.starts(total):
            return
        # as in attach: repeatable, and the global random state does not move
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for part in attachment.parts_of(self):
                a, b, weight = part.delta.A, part.delta.B, part.site.weight
                weight.copy_(weight + part.delta.delta())
                b.zero_()  # at once, or an interrupted restart would leave the update there twice
                torch.manual_seed(part.seed + step)
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
                for factor in (a, b):
                    _keep_largest(optimizer.state.get(factor, {}), factor, self.keep)

    def finish(self, attachment):
        for part in attachment.parts_of(self):
            part.seed += 2**31  # a further training draws other directions


def _keep_largest(state: dict[str, torch.Tensor], factor: torch.Tensor, share: float) -> None:
    """Zero all but a share of the entries in the optimiser's moments of ``factor``."""
    moments = [t for t in state.values() if torch.is_tensor(t) and t.shape == factor.shape]  # not the step
    if moments:
        # one choice for all, by the mean gradient: one whose mean square is dropped is divided by almost zero
        dropped = factor.numel() - round(share * factor.numel())
        entries = moments[0].abs().flatten().topk(dropped, largest=False).indices
        for moment in moments:
            moment.view(-1)[entries] = 0
