"""The exercises of notebooks/hybrid/s4.ipynb."""

import re

import torch
from transformers import BertConfig

import guidelib as gl
from guidelib.pages.exercises import exercise


@exercise(
    hint="The larger of two numbers is their mean and half of their distance. What is the standard deviation "
    "of the distance of two means over n seeds, and what is the mean of a normal number without its sign?",
    inputs=[(1.0, 1), (1.0, 8), (0.5, 3)],
    tolerance=1e-3,
)
def luck(sigma, n):
    """By how much the better of two equals looks better than it is: the integral over their distance."""
    deviation = sigma * (2 / n) ** 0.5
    distance = torch.linspace(0, 8 * deviation, 20_001, dtype=torch.float64)
    density = torch.exp(-((distance / deviation) ** 2) / 2) / (deviation * (2 * torch.pi) ** 0.5)
    return float(torch.trapezoid(distance * density, distance))  # half of twice that: both signs


@exercise(
    hint="Keep a list of what each layer has now. In every round: which layers could take their step, and "
    "which of these has the least?",
    inputs=[
        (100, [(0, 12), (10, 5), (0, 7)]),
        (60, [(0, 8), (0, 8), (0, 8)]),
        (76_800, [(384, 769)] * 3 + [(0, 1536)] * 3),
    ],
)
def spend(budget, counts):
    """Sizes that are raised one by one."""
    sizes, left = [1] * len(counts), budget - sum(map(sum, counts))
    has = list(map(sum, counts))
    while steps := [i for i, (_, step) in enumerate(counts) if step <= left]:
        i = min(steps, key=lambda i: (has[i], i))
        sizes[i], has[i], left = sizes[i] + 1, has[i] + counts[i][1], left - counts[i][1]
    return sizes


@exercise(hint="Of the four groups, which has the dearest methods at size 1? A bias vector has no size.")
def smallest():
    """What the refusal of a budget of 1 says."""
    try:
        gl.count(BertConfig(), gl.S4(1))
    except ValueError as refused:
        return int(re.search(r"at least ([\d,]+)", str(refused))[1].replace(",", ""))
