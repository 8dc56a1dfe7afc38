"""What the pages show of an experiment: one table and one figure of its verdicts, one figure of its rates."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from guidelib.core.method import expect
from guidelib.experiments.verdict import Verdict
from guidelib.pages.viz import COLOURS, Output, style, table

_LOOKS = {  # verdict -> colour and marker; the colour never carries the meaning alone
    "above": (COLOURS["method"], "^"),
    "below": (COLOURS["other"], "v"),
    "equal": (COLOURS["full"], "o"),
    "open": (COLOURS["head"], "D"),
}


def verdict_table(verdicts: Sequence[Verdict], *, also: Sequence[Verdict] = (), caption: str = "") -> Output:
    """The verdicts of `guidelib.experiments.compare` as a table, a row per method.

    Test score: mean ± standard deviation over the seeds.  Difference: from the reference, within pairs of
    equal seeds, with its 95 % interval.  A rate with * was at the edge of those tried, so there is no
    verdict.  also: the verdicts on the same methods in another task, which get one column.  Raises ValueError
    where there is no row.
    """
    expect(bool(verdicts), "verdicts", verdicts, "at least one")
    rows = {v.method: _row(v) for v in verdicts}
    for v in also:
        rows[v.method][f"on {v.task}"] = (
            "–" if v.difference is None else f"{_signed(v.difference)} {v.verdict}"
        )
    return table(list(rows.values()), caption=caption)


def _row(v: Verdict) -> dict[str, str | int]:
    return {
        "method": v.method,
        "rate": np.format_float_positional(v.lr, trim="-") + "*" * v.edge,
        "seeds": len(v.scores),
        "test score": f"{v.mean:.1f}" + f" ± {v.deviation:.1f}" * (len(v.scores) > 1),
        "difference": _difference(v),
        "verdict": "–" if v.difference is None else v.verdict,
    }


def _difference(v: Verdict) -> str:
    """In points with its interval, such as "+2.5 [+1.5, +3.6]"."""
    if v.difference is None:
        return "–"
    return f"{_signed(v.difference)} [{_signed(v.low)}, {_signed(v.high)}]"


def _signed(points: float) -> str:
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def verdict_figure(verdicts: Sequence[Verdict], *, margin: float = 1.0) -> Figure:
    """Each method's difference from the reference with its 95 % interval; grey: the margin of "equal".

    Raises ValueError where nothing was compared.
    """
    rows = [v for v in verdicts if v.difference is not None]
    expect(bool(rows), "verdicts", verdicts, "at least one with a difference from the reference")
    with style():
        figure, ax = plt.subplots(figsize=(5.6, 1.2 + 0.32 * len(rows)))
        draw_verdicts(ax, rows, margin=margin)
        figure.legend(loc="outside upper center", ncols=4)
        plt.close(figure)
    return figure


def draw_verdicts(ax: Axes, rows: Sequence[Verdict], *, margin: float = 1.0) -> None:
    """What `verdict_figure` draws, on ``ax`` and without its legend.  Each of the rows has a difference."""
    ax.axvspan(-margin, margin, color="#EEEEEE", zorder=0)
    ax.axvline(0, color=COLOURS["head"], linewidth=1)
    for verdict, (colour, marker) in _LOOKS.items():
        at = [(i, v) for i, v in enumerate(rows) if v.verdict == verdict]
        if at:
            middle = [v.difference for _, v in at]
            ends = [[v.difference - v.low for _, v in at], [v.high - v.difference for _, v in at]]
            ax.errorbar(
                *(middle, [i for i, _ in at]),
                xerr=ends,
                fmt=marker,
                color=colour,
                linewidth=1.5,
                capsize=3,
                label=verdict,
            )
    ax.set_yticks(range(len(rows)), [v.method for v in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="points of test score from the reference")
    ax.grid(axis="y", visible=False)


def rate_figure(verdicts: Sequence[Verdict]) -> Figure:
    """Validation score against learning rate, a line per method, with its chosen rate marked."""
    expect(bool(verdicts), "verdicts", verdicts, "at least one")
    with style():
        figure, ax = plt.subplots()
        looks = len(plt.rcParams["axes.prop_cycle"])
        for i, v in enumerate(verdicts):
            if v.lr == 0:  # nothing was trained
                ax.axhline(v.rates[0], color=COLOURS["head"], linewidth=1, label=v.method)
                continue
            rates = sorted(v.rates)
            again = {"linewidth": 3.5, "alpha": 0.5} if i >= looks else {}  # the colours come again
            (line,) = ax.plot(rates, [v.rates[lr] for lr in rates], label=v.method, **again)
            ax.plot(v.lr, v.rates[v.lr], marker="o", color=line.get_color())
        ax.set(xscale="log", xlabel="learning rate", ylabel="validation score")
        if len(verdicts) > 1:
            figure.legend(loc="outside upper center", ncols=2)
        plt.close(figure)
    return figure
