"""Selection - a method that trains some of the base model's own parameters in place and adds none.

Nothing has to be merged: the trained weights are the model's weights.  The attachment keeps a copy of what
it selects, so that ``detach`` can give the base back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Method
from guidelib.core.points.part import Part


@dataclass(frozen=True)
class Selection(Method):
    """Base of the methods that are a choice of parameters, made by what they are and never by a part of their
    name.  A subclass fills in ``select``."""

    def select(self, anatomy: Anatomy) -> set[str]:
        """The names of the base parameters to train, without the task head (which every method trains)."""
        raise NotImplementedError

    def parts(self, anatomy: Anatomy, saved: dict[str, torch.Tensor]) -> list[Part]:
        return []
