"""What an experiment has found, for a page: the table of its verdicts, and the sentence that it comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from guidelib.core.method import expect
from guidelib.experiments import compare
from guidelib.experiments.base import Row
from guidelib.experiments.verdict import Verdict
from guidelib.pages.results import verdict_table
from guidelib.pages.viz import Output


class Finding(Output):
    """The table of `verdict_table` and a sentence with all of them.  Gives the `Verdict` of a method
    by its label, so that a page can assert what it says.  verdicts: all of them, for the figures.
    also: label -> `Verdict` on the other task, if one was asked for."""

    def __init__(
        self,
        verdicts: Sequence[Verdict],
        reference: str,
        margin: float,
        caption: str,
        also: Sequence[Verdict],
    ):
        self.verdicts = list(verdicts)
        self.also = {verdict.method: verdict for verdict in also}
        self.text = _sentence(self.verdicts, reference, margin)
        shown = verdict_table(self.verdicts, also=also, caption=caption).bundle
        super().__init__(
            text_html=f'{shown["text/html"]}<p style="margin:.4rem 0 0">{escape(self.text)}</p>',
            text_plain=f"{shown['text/plain']}\n{self.text}",
        )

    def __getitem__(self, label: str) -> Verdict:
        found = {verdict.method: verdict for verdict in self.verdicts}
        expect(label in found, "label", label, f"one of {', '.join(found)}")
        return found[label]


def finding(
    result: Row,
    reference: str,
    *,
    task: str | None = None,
    also: str | None = None,
    methods: Sequence[str] | None = None,
    margin: float = 1.0,
    caption: str = "",
) -> Finding:
    """The verdicts on a stored result (see `guidelib.experiments.compare` for the arguments and errors), as a
    table with the sentence that they come to.  also: another of its tasks, whose differences and verdicts get
    a column beside them."""
    expect(isinstance(result, Mapping), "result", result, "a stored result, as load_results gives it")
    verdicts = compare(result, reference, task=task, methods=methods, margin=margin)
    there = [] if also is None else compare(result, reference, task=also, methods=methods, margin=margin)
    texts = any("chrf" in run.get("test", {}) for run in result["runs"])
    what = "Probability of the right token (geometric mean over the test split)" if texts else "Test score"
    beside = f", and on {also}" if there else ""
    edge = " * at the edge of the rates tried." if any(v.edge for v in verdicts) else ""
    caption = caption or (
        f"{what} in per cent, mean ± standard deviation over the seeds. Difference from {reference} within "
        f"pairs of equal seeds, with its 95 % interval{beside}.{edge}"
    )
    return Finding(verdicts, reference, margin, caption, there)


def _sentence(verdicts: Sequence[Verdict], reference: str, margin: float) -> str:
    names = {
        "above": "Above",
        "equal": f"Equal within {margin:g} point{'s' * (margin != 1)}",
        "open": "Not decided",
        "below": "Below",
        "none": "No verdict",
    }
    said = f"Against {reference}."
    for kind, name in names.items():
        of_kind = [v for v in verdicts if v.verdict == kind and v.method != reference]
        if of_kind:
            said += f" {name}: {'; '.join(v.method for v in of_kind)}."
    return said
