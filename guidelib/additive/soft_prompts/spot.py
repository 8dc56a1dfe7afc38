"""SPoT - a prompt that starts from the prompts of other tasks.  Vu et al. 2022, arXiv:2110.07904.

    P starts from P_source, or from sum_i w_i P_i of several sources

It is prompt tuning in all but the start: count = l d.  Which source helps can be told from the prompts
themselves: of two tasks that are alike, the prompts are.  ``prompt_similarity`` gives the two measures of the
paper: the cosine of the prompts' mean vectors, and the mean cosine over all pairs of their vectors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from guidelib.additive.soft_prompts.prompt import Vectors, first_body, frequent
from guidelib.core.anatomy import ADDED, Anatomy
from guidelib.core.files import read
from guidelib.core.method import Method, expect, is_number, is_whole
from guidelib.core.points.part import Part
from guidelib.core.points.prompt import PromptPart
from guidelib.core.values import has_values


@dataclass(frozen=True)
class SPoT(Method):
    """``length`` vectors before the text, which start from the saved prompts ``sources``.

    sources: files that ``save`` wrote, with prompts of this length for this backbone.  weights: one of each,
    equal ones by default.  Without sources, and in a file that ``load`` reads, it is prompt tuning.
    """

    length: int = 20
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None

    def __post_init__(self):
        expect(is_whole(self.length), "length", self.length, "a whole number of at least 1")
        paths = isinstance(self.sources, Iterable) and not isinstance(self.sources, str | bytes)
        sources = tuple(self.sources) if paths else ()
        paths = paths and all(isinstance(path, str | os.PathLike) for path in sources)
        expect(paths, "sources", self.sources, "a list of files")
        object.__setattr__(self, "sources", tuple(map(os.fspath, sources)))
        if self.weights is not None:
            weights = tuple(self.weights) if isinstance(self.weights, Iterable) else ()
            right = len(weights) == len(self.sources) > 0
            right = right and all(is_number(w) for w in weights)
            expect(right, "weights", self.weights, "a finite number for each of the sources, or None")
            object.__setattr__(self, "weights", weights)

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        body = first_body(anatomy)
        vectors = Vectors(frequent(body, self.length))
        if self.sources and not saved and has_values(body.embedding.weight):
            weights = self.weights or (1 / len(self.sources),) * len(self.sources)
            prompts = [read_prompt(anatomy, path) for path in self.sources]
            for path, prompt in zip(self.sources, prompts, strict=True):
                expect(
                    prompt.shape == vectors.P.shape,
                    "sources",
                    f"{os.path.basename(path)!r} with a prompt of {tuple(prompt.shape)}",
                    f"files with prompts of {tuple(vectors.P.shape)}",
                )
            vectors.P.data.copy_(sum(w * p.double() for w, p in zip(weights, prompts, strict=True)))
        return [PromptPart(self, body, vectors)]


def read_prompt(anatomy: Anatomy, path: str | os.PathLike) -> torch.Tensor:
    """The prompt (l, d) of a file.  Raises as ``load`` does, and ValueError if there is not exactly one."""
    tensors = read(anatomy, path)[1]
    others = (f"{ADDED}.LatePromptTuning", f"{ADDED}.WARP")  # states of another layer, or a mask among them
    found = [
        tensor
        for name, tensor in tensors.items()
        if name.endswith(".prompt.P") and tensor.dim() == 2 and not name.startswith(others)
    ]
    file = f"{os.path.basename(path)!r} with {len(found)} prompts before a text"
    expect(len(found) == 1, "sources", file, "files with one")
    return found[0]


def prompt_similarity(prompts: Sequence[torch.Tensor], *, pairs: bool = False) -> torch.Tensor:
    """How alike n prompts (l, d) are, (n, n): cosines of their mean vectors or, with ``pairs``, mean cosines
    over all pairs of their vectors.  Raises ValueError for none."""
    expect(len(prompts) > 0, "prompts", prompts, "one or more")
    if pairs:  # the mean of all products is the product of the means
        unit = torch.stack([F.normalize(prompt.double(), dim=-1).mean(0) for prompt in prompts])
        return unit @ unit.T
    means = F.normalize(torch.stack([prompt.double().mean(0) for prompt in prompts]), dim=-1)
    return means @ means.T
