"""S4 - each group of layers its own sum of methods.  Chen et al. 2023, arXiv:2301.01821.

    S4 = (A + L).on(G1) + (A + P).on(G2) + (A + P + B).on(G3) + (P + B + L).on(G4)

    A = PfeifferAdapter(r),  L = LoRA(r),  P = PrefixTuning(length),  B = BitFit(add=True)

The paper searches a space of designs in four steps: how the layers fall into four consecutive groups, how a
budget of parameters is spread over the layers, which groups are tuned, and with which methods.  It found
what the defaults say: the two groups in the middle are the larger ones (a spindle), all layers have the same
number of parameters, all groups are tuned, and with the methods above.  The released code has none of this.

Count in a layer of width d, over its linear maps d_in -> d_out and its attentions:

    A  2 d r + r + d                        P  2 length (width of k), for each attention
    L  r (d_in + d_out), for each q and v   B  all biases: there is no size to choose

Our reading: the groups' sizes are as 1 : 2 : 2 : 1 for a spindle; an allocation that increases ends at twice
what it begins with, in equal steps; the methods in a layer share its parameters equally, but for the biases,
which have as many as there are, and what rounding leaves over goes to the methods with smaller steps.  The
stacks of an encoder-decoder are grouped each by itself.  alpha = 2 r, so that LoRA's scale is 2 everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, groupby
from operator import add

from guidelib.additive.adapters.bottleneck import PfeifferAdapter
from guidelib.additive.soft_prompts.prefix import PrefixTuning
from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Method, Plan, expect, is_number
from guidelib.reparametrization.lora import LoRA
from guidelib.selective.bitfit import BitFit

GROUPINGS = {  # the sizes of the four groups are as
    "spindle": (1, 2, 2, 1),
    "uniform": (1, 1, 1, 1),
    "bottleneck": (2, 1, 1, 2),
    "increasing": (1, 2, 3, 4),
    "decreasing": (4, 3, 2, 1),
}
ALLOCATIONS = {  # what the i-th of n layers gets; the average is 1
    "uniform": lambda i, n: 1.0,
    "increasing": lambda i, n: 2 / 3 * (1 + i / max(n - 1, 1)),
    "decreasing": lambda i, n: 2 / 3 * (2 - i / max(n - 1, 1)),
}


@dataclass(frozen=True)
class S4(Plan):
    """budget: how many parameters it may have, as a whole number, or below 1 as a share of the base model's.
    grouping, allocation: how the layers fall into groups, and how many parameters they get, see the names
    above.  strategy: of each group the letters of its methods; a group without any stays frozen.

    Raises ValueError where the budget is too small for the smallest of each method.
    """

    budget: float = 0.005
    grouping: str = "spindle"
    allocation: str = "uniform"
    strategy: tuple[str, ...] = ("AL", "AP", "APB", "PBL")

    def __post_init__(self):
        number = is_number(self.budget)
        right = number and self.budget > 0 and (self.budget < 1 or isinstance(self.budget, int))
        expect(right, "budget", self.budget, "a whole number of at least 1, or a share between 0 and 1")
        for name, known in {"grouping": GROUPINGS, "allocation": ALLOCATIONS}.items():
            value = getattr(self, name)
            expect(isinstance(value, str) and value in known, name, value, f"one of {', '.join(known)}")
        self.several("strategy", "group's letters")
        right = len(self.strategy) == 4 and all(isinstance(letters, str) for letters in self.strategy)
        right = right and all(sorted({*s} & {*COUNTS}) == sorted(s) for s in self.strategy)
        accepted = "four groups' letters, each once, of A, P, B and L"
        expect(right and any(self.strategy), "strategy", self.strategy, accepted)

    def plan(self, anatomy: Anatomy) -> Method:
        places = self.sizes(anatomy).items()
        alike = groupby(places, key=lambda place: (place[0][0], place[1]))  # next to each other, in one stack
        return reduce(
            add, (sum_of(sizes).on([layer for (_, layer), _ in run], stack) for (stack, sizes), run in alike)
        )

    def sizes(self, anatomy: Anatomy) -> dict[tuple[str, int], dict[str, int]]:
        """Of each layer that is tuned, by stack and number, the sizes of its methods by letter."""
        layers = list(self.layers(anatomy))
        expect(bool(layers), "strategy", self.strategy, "one that gives a method to the layers there are")
        budget = self.budget
        if budget < 1:
            head, parameters = anatomy.task_head(), anatomy.base_parameters().items()
            budget = int(budget * sum(p.numel() for name, p in parameters if name not in head))
        each = budget / sum(share for *_, share in layers)  # a layer with a share of 1
        found, least = {}, 0
        for stack, layer, letters, share in layers:
            counts = {letter: COUNTS[letter](anatomy.restrict(layer, stack)) for letter in letters}
            found[stack, layer] = solve(int(each * share), counts)
            least = max(least, math.ceil(budget / each / share * sum(map(sum, counts.values()))))
        expect(budget >= least, "budget", self.budget, f"at least {least:,} for the smallest of each method")
        return found

    def layers(self, anatomy: Anatomy) -> Iterator[tuple[str, int, str, float]]:
        """Of each layer that is tuned the stack, the number, its methods' letters and its share."""
        for stack, blocks in groupby(anatomy.blocks(), key=lambda block: block[0]):
            numbers = [layer for _, layer, _ in blocks]
            n, parts = len(numbers), GROUPINGS[self.grouping]
            ends = [math.floor(n * end / sum(parts) + 0.5) for end in accumulate(parts)]
            for i, layer in enumerate(numbers):
                letters = self.strategy[sum(i >= end for end in ends)]
                if letters:
                    yield stack, layer, letters, ALLOCATIONS[self.allocation](i, n)


def solve(budget: int, counts: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The size of each method of a layer, by letter, such that together they have at most ``budget``
    parameters; none is below 1, whatever the budget.  counts: letter -> (parameters of any size, and for each
    1 of the size)."""
    # the biases first, since they leave nothing to choose; at last what has the smallest steps
    order = sorted(counts, key=lambda letter: (counts[letter][1] > 0, -sum(counts[letter])))
    sizes = dict.fromkeys(counts, 1)
    for left, letter in zip(range(len(order), 0, -1), order, strict=True):
        fixed, step = counts[letter]
        if step:
            sizes[letter] = max(1, (budget // left - fixed) // step)
        budget -= fixed + step * sizes[letter]
    return sizes


def sum_of(sizes: dict[str, int]) -> Method:
    """The methods of a layer: letters, each with its size."""
    make = {
        "A": lambda r: PfeifferAdapter(r=r),
        "P": lambda length: PrefixTuning(length=length),
        "B": lambda _: BitFit(add=True),
        "L": lambda r: LoRA(r=r, alpha=2.0 * r),
    }
    return reduce(add, (make[letter](size) for letter, size in sizes.items()))


def _adapter(anatomy: Anatomy) -> tuple[int, int]:
    widths = [sublayer.width for sublayer in anatomy.sublayers("ffn")]
    return sum(widths), sum(2 * d + 1 for d in widths)


def _biases(anatomy: Anatomy) -> tuple[int, int]:
    there, parameters = BitFit(add=True).select(anatomy), anatomy.parameters()
    added = BitFit(add=True).parts(anatomy, {})
    return sum(parameters[name].numel() for name in there) + sum(part.b.numel() for part in added), 0


COUNTS = {  # how many parameters a method has in one layer: of any size, and for each 1 of the size
    "A": _adapter,
    "P": lambda anatomy: (0, sum(2 * place.key.shape[0] for place in anatomy.attentions())),
    "B": _biases,
    "L": lambda anatomy: (0, sum(sum(site.shape) for site in anatomy.linears(("q", "v")))),
}
