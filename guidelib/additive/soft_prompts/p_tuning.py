"""P-tuning - a prompt that a small network makes of trained inputs.  Liu et al. 2021, arXiv:2103.10385.

    P = MLP(LSTM(E))        E: (l, d) trained, the LSTM reads it in both directions; or P = MLP(E)

The network ties the vectors of a prompt together while they are trained.  Afterwards P alone is kept: count =
l d stored, and many more trained.  Sizes and layers are those of PEFT's, which follow the authors' code: two
LSTM layers, and behind them two linear ones; without it three linear layers.

The paper places the vectors anywhere in a template.  Here they stand before the text, as in prompt tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from guidelib.additive.soft_prompts.prompt import Vectors, first_body
from guidelib.additive.soft_prompts.reparametrized import LSTM, MLP, Encoded
from guidelib.core.anatomy import ADDED, Anatomy
from guidelib.core.method import Attached, Method, expect, is_whole
from guidelib.core.points.part import Part
from guidelib.core.points.prompt import PromptPart
from guidelib.core.points.weight_delta import added_dtype


@dataclass(frozen=True)
class PTuning(Method):
    """``length`` vectors before the text, made by a network until ``finish`` replaces it by what it makes.

    encoder: "lstm" or "mlp".  hidden: its width, that of the embeddings by default.
    """

    length: int = 20
    encoder: str = "lstm"
    hidden: int | None = None

    def __post_init__(self):
        expect(is_whole(self.length), "length", self.length, "a whole number of at least 1")
        expect(self.encoder in ("lstm", "mlp"), "encoder", self.encoder, "'lstm' or 'mlp'")
        whole = self.hidden is None or is_whole(self.hidden)
        expect(whole, "hidden", self.hidden, "a whole number of at least 1, or None")

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        body = first_body(anatomy)
        table = body.embedding.weight
        d, like = body.width, {"device": table.device, "dtype": added_dtype(table)}
        whole = f"{ADDED}.{type(self).__name__}_{body.stack}.prompt.P"
        if whole in saved:  # in a file written after training
            return [PromptPart(self, body, Vectors(torch.zeros(self.length, d, **like)))]
        hidden = self.hidden or d
        if self.encoder == "mlp":
            encoder = MLP(d, hidden, hidden, d, **like)
        else:
            encoder = torch.nn.Sequential(LSTM(d, hidden, **like), MLP(2 * hidden, 2 * hidden, d, **like))
        return [PromptPart(self, body, Encoded(self.length, d, encoder, **like))]

    @torch.no_grad()
    def finish(self, attachment: Attached) -> None:
        """Keep the prompt, and let the network go."""
        for part in attachment.parts_of(self):
            if isinstance(part.prompt, Encoded):
                part.prompt = Vectors(part.prompt().clone())
