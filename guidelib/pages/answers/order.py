"""The exercises of notebooks/survey/order.ipynb."""

from scipy import integrate, stats

from guidelib.pages.exercises import exercise


@exercise(
    hint="C + D are all pairs, and C - D is tau times all pairs.",
    inputs=[(33, 0.25), (10, 7 / 9), (5, -0.2), (4, 1.0)],
)
def turned(n, tau):
    """By the share of the pairs."""
    return round((1 - tau) / 2 * (n * (n - 1) // 2))


@exercise(
    hint="itertools.permutations gives every order of b. Compare the tau of each with that of b itself.",
    inputs=[([1, 2, 3, 4], [1, 3, 2, 4]), ([3, 1, 2], [3, 1, 2]), ([5, 1, 4, 2, 3], [4, 2, 5, 1, 3])],
)
def chance(a, b):
    """Asked of scipy."""
    return stats.kendalltau(a, b, method="exact", alternative="greater").pvalue


@exercise(
    hint="The largest of n is at most x if all are, which has the probability Phi(x) ** n. What is the "
    "density of the largest?",
    inputs=[(1,), (2,), (17,), (33,)],
    tolerance=1e-3,
)
def winner(n):
    """The mean from the tails: the integral of 1 - F above zero, less that of F below."""
    above, _ = integrate.quad(lambda x: 1 - stats.norm.cdf(x) ** n, 0, 12)
    below, _ = integrate.quad(lambda x: stats.norm.cdf(x) ** n, -12, 0)
    return above - below
