"""Prompt tuning - trained vectors before the text.  Lester, Al-Rfou and Constant 2021, arXiv:2104.08691.

    E' = [P; E(x)]        P: (l, d) trained, E(x): (T, d) the embedded tokens

count = l d.  Everything else is frozen.  In an encoder-decoder P stands before the encoder's input.  There is
no start that leaves the model as it was: something more is attended to, whatever it is.  It does not merge,
and every block computes with l tokens more.

The paper starts P from embeddings of the labels' words, of frequent words, or at random within 0.5, and takes
a rate of 0.3 and l = 100.  Our reading: where the vocabulary is in the order of frequency, as a tokenizer's
nearly is, its first 5,000 entries are the frequent words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.core.anatomy import Anatomy, Body
from guidelib.core.method import Method, expect, is_number, is_whole
from guidelib.core.points.choice import Choosing
from guidelib.core.points.part import Part
from guidelib.core.points.prompt import PromptPart
from guidelib.core.points.weight_delta import added_dtype

FREQUENT = 5000  # entries of the vocabulary


@dataclass(frozen=True)
class PromptTuning(Method):
    """``length`` trained vectors before the tokens of the first stack: an encoder's, or a decoder's that has
    none.

    init: "vocabulary", embeddings of frequent tokens; "random", uniform within ``scale``; or token ids, whose
    embeddings come first (of several ids in a tuple the mean: the pieces of a word), and frequent ones behind
    them.  tasks: how many prompts there are, of which ``using`` chooses one for each text.
    """

    length: int = 20
    init: str | tuple[int | tuple[int, ...], ...] = "vocabulary"
    scale: float = 0.5
    tasks: int = 1

    def __post_init__(self):
        for name in ("length", "tasks"):
            value = getattr(self, name)
            expect(is_whole(value), name, value, "a whole number of at least 1")
        if not isinstance(self.init, str):
            several = isinstance(self.init, Iterable)
            expect(several, "init", self.init, "'vocabulary', 'random', token ids, or tuples of them")
            words = tuple(tuple(word) if isinstance(word, list | tuple) else word for word in self.init)
            object.__setattr__(self, "init", words)
            ids = [i for word in words for i in (word if isinstance(word, tuple) else (word,))]
            right = words and () not in words and all(is_whole(i, 0) for i in ids)
            expect(right, "init", self.init, "token ids, or tuples of them")
            expect(len(words) <= self.length, "init", self.init, f"at most {self.length} words, the length")
        else:
            expect(self.init in ("vocabulary", "random"), "init", self.init, "'vocabulary', 'random' or ids")
        expect(is_number(self.scale) and self.scale >= 0, "scale", self.scale, "a number of at least 0")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        body = first_body(anatomy)
        starts = torch.stack([self.start(body) for _ in range(self.tasks)])
        return [PromptPart(self, body, Vectors(starts[0]) if self.tasks == 1 else Several(starts))]

    def start(self, body: Body) -> torch.Tensor:
        """P (l, d) as it is drawn."""
        table = body.embedding.weight.detach()
        like = {"device": table.device, "dtype": added_dtype(table)}
        if self.init == "random":
            return torch.empty(self.length, body.width, **like).uniform_(-self.scale, self.scale)
        words = () if self.init == "vocabulary" else self.init
        n = len(table)
        largest = max(
            (i for word in words for i in (word if isinstance(word, tuple) else (word,))), default=0
        )
        expect(largest < n, "init", largest, f"token ids below {n}, the size of the vocabulary")
        ids = [torch.tensor(word, device=table.device) for word in words]
        rows = [body.embedding(of).detach().view(-1, body.width).mean(0) for of in ids]  # as a text has them
        own = [row[None].to(**like) for row in rows]
        return torch.cat((*own, frequent(body, self.length - len(words))))


class Vectors(nn.Module):
    """A prompt (l, d), or a prefix (P, 2, width)."""

    def __init__(self, start: torch.Tensor):
        super().__init__()
        self.P = nn.Parameter(start)

    @property
    def length(self) -> int:
        return len(self.P)

    def forward(self, rows: int = 1) -> torch.Tensor:
        return self.P


class Several(Choosing):
    """Prompts, or prefixes, of which each text has its own."""

    def __init__(self, starts: torch.Tensor):
        super().__init__()
        self.P = nn.Parameter(starts)
        self.tasks = len(starts)

    @property
    def length(self) -> int:
        return self.P.shape[1]

    def forward(self, rows: int = 1) -> torch.Tensor:
        return self.P[self.index(rows, self.P.device)]  # (l, d) or (rows, l, d)


def frequent(body: Body, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """The embeddings (n, d) of tokens drawn from the frequent ones; a generator is the CPU's."""
    table = body.embedding.weight.detach()
    where = table.device if generator is None else "cpu"
    drawn = torch.randint(min(FREQUENT, len(table)), (n,), generator=generator, device=where)
    return body.embedding(drawn.to(table.device)).detach().to(added_dtype(table))


def first_body(anatomy: Anatomy) -> Body:
    """Where a prompt goes.  Raises ValueError where the restriction leaves the first block out."""
    body = next(iter(anatomy.bodies().values()))
    whole = any(stack == body.stack and layer == 0 for stack, layer, _ in anatomy.blocks())
    expect(
        whole,
        "layers",
        "a restriction without the first one",
        "one with layer 0, before which a prompt stands",
    )
    return body
