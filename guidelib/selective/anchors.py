"""The two anchors that every method is compared with: train everything, or nothing but the task head."""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.core.anatomy import Anatomy, expect_numbers
from guidelib.core.points.selection import Selection


@dataclass(frozen=True)
class FullFineTuning(Selection):
    """Train every parameter; restricted with ``on``, every parameter of those blocks.

    The attachment keeps a copy of the base, so the weights are in memory twice.  Raises TypeError if some are
    quantised.
    """

    def select(self, anatomy: Anatomy) -> set[str]:
        expect_numbers(anatomy.parameters())
        return set(anatomy.parameters())


@dataclass(frozen=True)
class HeadOnly(Selection):
    """Train the task head on frozen features.  count = the head, d_model * labels + labels for one linear
    layer.

    Raises ValueError on a model without a task head.
    """

    def select(self, anatomy: Anatomy) -> set[str]:
        if not anatomy.head():
            raise ValueError(
                f"HeadOnly: {type(anatomy.model).__name__} has no task head to train; "
                "load the backbone with a classification task"
            )
        return set()
