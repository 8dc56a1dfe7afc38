"""Cross-attention tuning - train how a decoder looks at what its encoder has read.  Gheini, Ren and May 2021,
arXiv:2104.08771, section 3.

    h = softmax(q(x) k(m)^T / sqrt(d_h)) v(m),   y = o(h)        q, k, v, o trained        m from the encoder

count = 4 d n for each block of the decoder, n being the width of all heads together, and the norm of that
sub-layer.  They are the model's own, so there is nothing to merge.  Nothing in the encoder is trained, nor
below it, so no gradient goes there: its states reach autograd as constants.

For a new language the paper trains the embedding of that side as well: ``attach(..., also="embedding")``.
Where both sides share one table, as in T5, that takes the gradient through the encoder again.
"""

from __future__ import annotations

from dataclasses import dataclass

from guidelib.core.anatomy import ATTENTION_NAMES, Anatomy, Targets, expect_numbers
from guidelib.core.method import expect
from guidelib.core.points.selection import Selection


@dataclass(frozen=True)
class CrossAttentionTuning(Selection):
    """Train the four maps of each attention that ``attentions`` names, with their biases: cross, self, or
    attn for both, which is attention tuning.

    norms: whether to train the norm of the sub-layer, too.  T5's table of relative positions stays frozen.
    """

    attentions: Targets = "cross"
    norms: bool = True

    def __post_init__(self):
        self.several("attentions", "kind of attention")
        right = bool(self.attentions) and {*self.attentions} <= {*ATTENTION_NAMES}
        accepted = f"one or more of {', '.join(ATTENTION_NAMES)}"
        expect(right, "attentions", self.attentions, accepted)
        expect(isinstance(self.norms, bool), "norms", self.norms, "True or False")

    def select(self, anatomy: Anatomy) -> set[str]:
        modules = [site.module for site in anatomy.linears(self.attentions, "attentions")]
        if self.norms:
            modules += [sublayer.norm for sublayer in anatomy.sublayers(self.attentions)]
        ids = {id(p) for module in modules for p in module.parameters()}
        chosen = {name: p for name, p in anatomy.parameters().items() if id(p) in ids}
        expect_numbers(chosen)
        return set(chosen)
