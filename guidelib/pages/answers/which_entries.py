"""The exercises of notebooks/selective/which_entries.ipynb."""

from guidelib.pages.exercises import exercise


@exercise(
    hint="What is the probability that none of the k entries falls into a given row of m?",
    inputs=[(10, 4, 3), (4, 4, 13), (384, 384, 60), (1536, 384, 241), (1536, 384, 2949)],
)
def rows(n, m, k):
    """A row stays untouched if each entry, one after the other, falls into what is left beside it."""
    untouched = 1.0
    for drawn in range(k):
        untouched *= max(n * m - m - drawn, 0) / (n * m - drawn)
    return n * (1 - untouched)


@exercise(
    hint="A list takes four bytes an entry that is chosen, a map one bit an entry that is there.",
    inputs=[(9216, 22_565_376), (1_000_000, 22_565_376), (705_168, 22_565_376), (705_169, 22_565_376)],
)
def index_bytes(k, D):
    """The smaller of both codings."""
    return min(4 * k, (D + 7) // 8)


@exercise(hint="A value, its index, its gradient and two moments, each in 32 bits.")
def room():
    """Counted: k entries of a 7 B model, by the kinds of numbers that a step holds for each."""
    held = {"value": 4, "index": 4, "gradient": 4, "first moment": 4, "second moment": 4}
    return round(0.005 * 6_738_415_616) * sum(held.values())
