"""Late prompt tuning - a prompt that joins the text halfway up.  Liu et al. 2022, arXiv:2210.11292.

    H_k = [P; H_k]  before block k        P: (l, d) trained, or made of the text: P = W_2 relu(W_1 mean(H_k))

Nothing below block k is trained, so the backward pass ends there, and below it the sequence is the text
alone.  count = l d; with the generator (NPG in the paper) m (d + 1) + l d (m + 1), for W_1 (m, d) and W_2 (l
d, m) with biases.  It does not merge.

Our reading: the prompt has no positions, since those are added before the first block: rotary embeddings do
not turn it, and T5's bias for it is 0.  The generator reads the mean over the text's tokens.  It has seen all
of the text, so it is refused beside blocks that must not look ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from guidelib.additive.soft_prompts.prompt import Vectors
from guidelib.additive.soft_prompts.reparametrized import MLP
from guidelib.core.anatomy import Anatomy
from guidelib.core.method import Method, expect, is_whole
from guidelib.core.points.late import LatePart
from guidelib.core.points.part import Part
from guidelib.core.points.weight_delta import added_dtype


@dataclass(frozen=True)
class LatePromptTuning(Method):
    """``length`` vectors before the tokens from block ``layer`` on, of an encoder, or a decoder without one.

    layer: None for the middle.  bottleneck: m of the generator that makes the vectors for each text; None
    trains them.  The paper takes 20 vectors without a generator, and 5 with one of m = 128.
    """

    length: int = 20
    layer: int | None = None
    bottleneck: int | None = None

    def __post_init__(self):
        for name in ("length", "layer", "bottleneck"):
            value = getattr(self, name)
            right = (value is None and name != "length") or is_whole(value)
            expect(right, name, value, "a whole number of at least 1" + ", or None" * (name != "length"))

    def parts(self, anatomy: Anatomy, saved: Mapping[str, torch.Tensor]) -> list[Part]:
        body = next(iter(anatomy.bodies().values()))
        blocks = [block for stack, _, block in anatomy.blocks() if stack == body.stack]
        whole = anatomy.depth(body.stack)
        expect(
            len(blocks) == whole,
            "layers",
            f"a restriction to {len(blocks)}",
            f"all {whole}; layer= says where the prompt joins",
        )
        expect(whole > 1, "model", "one of a single layer", "one of two or more, to join between them")
        layer = whole // 2 if self.layer is None else self.layer
        expect(1 <= layer < whole, "layer", layer, f"from 1 to {whole - 1} in this model")
        attentions = [a for a in anatomy.attentions() if a.stack == body.stack]
        ahead = [a for a in attentions if a.looks_back]
        alone = all(a.role == "self" for a in attentions)
        expect(alone, "stack", body.stack, "an encoder, or a decoder without one")
        d = attentions[0].key.shape[1]  # of the blocks; ELECTRA's embeddings may be narrower
        expect(
            not (self.bottleneck and ahead),
            "bottleneck",
            self.bottleneck,
            "None beside a decoder, which must not see what it is to write",
        )
        table = body.embedding.weight
        like = {"device": table.device, "dtype": added_dtype(table)}
        if self.bottleneck:
            prompt = Generator(self.length, d, self.bottleneck, **like)
        else:
            prompt = Vectors(torch.empty(self.length, d, **like).uniform_(-0.5, 0.5))
        reads = self.bottleneck is not None
        return [LatePart(self, body, blocks[layer:], layer, bool(ahead), prompt, reads)]


class Generator(nn.Module):
    """The mean (B, d) of a text's states -> its prompt (B, l, d)."""

    def __init__(self, length: int, d: int, m: int, **like):
        super().__init__()
        self.length, self.made = length, MLP(d, m, length * d, **like)

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        return self.made(mean).unflatten(-1, (self.length, -1))
