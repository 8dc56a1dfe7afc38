"""Several of a kind in one part, and which of them each example of a batch uses: see ``using``."""

from __future__ import annotations

import torch
from torch import nn

from guidelib.core.method import expect
from guidelib.core.points.passes import notes


class Choosing(nn.Module):
    """Parameters with ``tasks`` entries along their first dimension, of which one acts for each example.

    ids: the one in use where ``using`` chooses none: a number for the whole batch, or a tensor of one per
    example; then each may stand for ``num_beams`` rows.
    """

    tasks: int
    ids: int | torch.Tensor = 0
    num_beams = 1

    @property
    def choice(self) -> tuple[int | torch.Tensor, int]:
        """ids and num_beams of the pass that runs in this thread."""
        return notes().get(self, (self.ids, self.num_beams))

    def index(self, rows: int, device: torch.device) -> int | torch.Tensor:
        """Which entry acts: for a batch of ``rows``, or one for each row.  Raises ValueError if the batch has
        another number of examples than were chosen for."""
        ids, num_beams = self.choice
        if isinstance(ids, int):
            return ids
        n = len(ids)
        accepted = f"as many as the batch's {rows} rows, or rows / num_beams in beam search"
        fits = rows == n or rows == n * num_beams
        expect(fits, "ids", f"{n} of them with num_beams={num_beams}", accepted)
        return ids.to(device).repeat_interleave(rows // n)
