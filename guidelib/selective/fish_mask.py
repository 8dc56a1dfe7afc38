"""FishMask - train the entries that carry the most Fisher information.  Sung, Nair and Raffel 2021,
arXiv:2111.09839, section 3.

    F_j = 1/N sum_i E_{y ~ p(y | x_i)} (d log p(y | x_i) / d theta_j)^2        the k largest are trained

The gradient is that of one example, and it is squared before the mean is taken.  The square of a batch's
gradient is something else: gradients that point apart cancel there.

count = k = keep * D of D entries.  Stored: k values and k indices.  Merges exactly.

The mask is chosen once, in evaluation mode and with the head as it stands then.  The authors take the head's
size off k; here it is counted apart, as for every method.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guidelib.core.anatomy import Anatomy
from guidelib.core.batches import Batch, singles
from guidelib.core.method import Attached, expect, is_whole
from guidelib.core.modes import modes_kept
from guidelib.core.points.part import expect_there
from guidelib.core.points.sparse_delta import Selecting

SCORES = ("expected", "empirical", "magnitude", "random")


@dataclass(frozen=True)
class FishMask(Selecting):
    """Train the share ``keep`` of the entries with the highest scores, taken over all parameters.

    score: "expected" takes the mean over the labels that the model itself expects: exactly over the classes,
    and for each token over one label that is drawn.  "empirical" takes the label of the data.  Two baselines
    need no data: "magnitude", |theta|, and "random".  samples: how many examples are looked at.
    """

    score: str = "expected"
    samples: int = 1024

    def __post_init__(self):
        super().__post_init__()
        expect(self.score in SCORES, "score", self.score, f"one of {', '.join(SCORES)}")
        expect(is_whole(self.samples), "samples", self.samples, "a whole number of at least 1")

    def prepare(self, attachment: Attached, batches: Iterable[Batch]) -> None:
        part = self.part(attachment)
        if part.trained or self.score == "random":
            return
        if self.score == "magnitude":
            expect_there(part.chosen_from)
            part.choose(p.detach().abs() for p in part.chosen_from)
            return
        model = attachment.model
        examples = itertools.islice(singles(batches, model.device), self.samples)
        with modes_kept(model):
            part.open()
            try:
                scores = fisher(model.eval(), [*part.dense], examples, self.score == "expected")
            finally:
                part.close()
        part.choose(scores)


def fisher(
    model: nn.Module, parameters: Sequence[torch.Tensor], examples: Iterable[Batch], expected: bool
) -> list[torch.Tensor]:
    """The diagonal of the Fisher information of ``parameters``, as the mean over ``examples``."""
    total, seen = [torch.zeros_like(p) for p in parameters], 0
    generator = torch.Generator().manual_seed(0)
    for example in examples:
        seen += 1
        terms = _log_likelihoods(model(**example), example, expected, generator, _ahead(model))
        for i, (probability, value) in enumerate(terms, 1):
            gradients = torch.autograd.grad(
                value, parameters, retain_graph=i < len(terms), materialize_grads=True, allow_unused=True
            )
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_.addcmul_(gradient, gradient, value=probability)
    return [sum_ / max(seen, 1) for sum_ in total]


def _ahead(model: nn.Module) -> bool:
    """Whether a token is predicted a place before its own, as in a decoder alone."""
    return hasattr(model, "config") and Anatomy(model).predicts_next


def _log_likelihoods(
    outputs, example: Batch, expected: bool, generator: torch.Generator, ahead: bool = False
) -> list[tuple[float, torch.Tensor]]:
    """Labels' probabilities and log-likelihoods.  Of tokens it is the mean; of an example without labels the
    sum of the first output stands in for it."""
    if "labels" not in example:
        return [(1.0, outputs[0].sum())]
    if not expected:
        return [(1.0, -outputs.loss)]
    logits = outputs.logits
    if logits.dim() == 2:
        of_classes = logits[0].log_softmax(-1)
        return [(float(value.detach().exp()), value) for value in of_classes]
    labels = example["labels"]
    if ahead:
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits = logits[labels != -100]
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
    return [(1.0, -F.cross_entropy(logits, drawn[:, 0].to(logits.device)))]
