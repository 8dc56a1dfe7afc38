"""You are here: the five places in a block where a method can act, with those of one method lit.

What is lit is read from the parts that the method attaches, not declared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import BertConfig, BertForSequenceClassification, BertLMHeadModel

import guidelib
from guidelib.core.attaching import Attachment, attach
from guidelib.core.method import Method, expect
from guidelib.core.points.late import LatePart
from guidelib.core.points.part import Part
from guidelib.core.points.prefix import PrefixPart
from guidelib.core.points.prompt import PromptPart
from guidelib.core.points.pruned import Pruned
from guidelib.core.points.side import SidePart
from guidelib.core.points.sparse_delta import Support
from guidelib.core.points.sublayer import SublayerPart
from guidelib.core.points.weight_delta import DeltaPart
from guidelib.core.points.weight_space import WeightSpacePart
from guidelib.hybrid.compacter import PHMLinear
from guidelib.pages.diagrams import Diagram
from guidelib.pages.viz import Output
from guidelib.reparametrization.krona import Kronecker
from guidelib.selective.far import LearnersPart

PLACES = ("a weight", "a sub-layer’s output", "the context", "beside the network", "which parameters train")
WEIGHTS = {"self.q": "q", "self.k": "k", "self.v": "v", "self.o": "o", "ffn.in": "in", "ffn.out": "out"}
SPOTS = {  # what can be lit -> how, and which place that is
    **dict.fromkeys(WEIGHTS.values(), {"beside": 1, "recomputed": 1, "trained": 5, "bias": 5}),
    **dict.fromkeys(("attention", "FFN"), {"behind": 2, "beside": 2}),
    "norms": {"beside": 1, "trained": 5, "bias": 5},
    "norm behind them": {"trained": 5},
    "context": {"added": 3},
    "keys and values": {"added": 3},
    "side network": {"reading": 4},
}
DEPTH = 12


def place(method: Method | str | Mapping[str, str]) -> Output:
    """The drawing for a method, for the name of one of guidelib's (with its defaults), or for spots that you
    name, each with what happens there, such as {"context": "added"} (see `SPOTS`).

    Raises ValueError for an unknown name, spot or way.
    """
    if isinstance(method, str):
        known = [name for names in guidelib.METHODS.values() for name in names]
        expect(method in known, "method", method, f"one of {', '.join(known)}")
        method = getattr(guidelib, method)()
    where = ""
    if isinstance(method, Method):
        lit, where = _lit(method)
    else:
        expect(isinstance(method, Mapping), "method", method, "a method such as LoRA(r=8), a name, or spots")
        for spot, how in method.items():
            expect(spot in SPOTS, "spot", spot, f"one of {', '.join(SPOTS)}")
            expect(how in SPOTS[spot], f"spot {spot!r}", how, f"one of {', '.join(SPOTS[spot])}")
        lit = list(method.items())
    numbers = {SPOTS[spot][how] for spot, how in lit}
    words = _words(lit, where)
    diagram = _draw(lit, numbers, words)
    here = " (here)" if len(numbers) < len(PLACES) else ""  # where all are lit, it is the picture of them
    items = "".join(
        f"<li><strong>{name}{here}</strong></li>" if n in numbers else f"<li>{name}</li>"
        for n, name in enumerate(PLACES, 1)
    )
    dashed = ", dashed is recomputed" if any(how == "recomputed" for _, how in lit) else ""
    html = (
        '<figure class="guidelib-diagram guidelib-place" style="margin:0;color:inherit;display:flex;'
        'flex-wrap:wrap;align-items:center;gap:.5rem 2rem">'
        f'<div style="flex:0 1 {diagram.size[0]}px;min-width:15rem">{diagram.svg()}</div>'
        '<figcaption style="flex:1 1 14rem;padding:0;color:inherit;text-align:left">'
        f'<ol style="margin:0 0 .5rem;padding-left:1.4rem">{items}</ol>{words} '
        f"Grey is frozen, orange is trained{dashed}.</figcaption></figure>"
    )
    return Output(text_html=html, text_plain=diagram.alt)


def places_of(method: Method) -> tuple[int, ...]:
    """The places where the method acts, as numbers from 1 into `PLACES`; none for the head alone."""
    return tuple(sorted({SPOTS[spot][how] for spot, how in _lit(method)[0]}))


Lit = list[tuple[str, str]]  # spots, each with how it is lit; one may be so in two ways


def classes(method: Method) -> str:
    """The circles of the survey's Figure 2 that a method stands in, by where its parts act: some of "A", "S"
    and "R", in this order.

    A, additive: a part adds something to activations or to the context, or runs beside the network.
    S, selective: parameters of the base are trained in place, or some entries are chosen and others are not.
    R, reparametrisation: a weight is replaced by a function of itself, or an added map is written with fewer
    numbers than it has entries.  Norms that are trained beside parts do not make a method selective.
    """
    attachment, found = _attached(method), set()
    for part in attachment.parts:
        if isinstance(part, Support | LearnersPart):
            found.add("S")
        elif isinstance(part, DeltaPart | WeightSpacePart):
            found.add("R")
        elif isinstance(part, SublayerPart | PrefixPart | PromptPart | LatePart | SidePart):
            found.add("A")
        if any(isinstance(module, PHMLinear | Kronecker) for module in part.modules()):
            found.add("R")
    norms = attachment.anatomy.norms() if attachment.parts else {}
    if {name for name, p in attachment.model.named_parameters() if p.requires_grad} & (
        attachment.anatomy.base_parameters().keys() - norms - attachment.anatomy.task_head()
    ):
        found.add("S")
    return "".join(each for each in "ASR" if each in found)


def _attached(method: Method) -> Attachment:
    """On a BERT of 12 blocks without numbers, which has cross-attention if nothing else is asked for."""
    crossing = getattr(method, "attentions", None) == ("cross",)
    with torch.device("meta"):
        config = BertConfig(num_hidden_layers=DEPTH, is_decoder=crossing, add_cross_attention=crossing)
        return attach((BertLMHeadModel if crossing else BertForSequenceClassification)(config), method)


def _lit(method: Method) -> tuple[Lit, str]:
    """What the method lights, and in which of the blocks."""
    attachment = _attached(method)
    found = [*map(_of_part, attachment.parts), *_of_selection(attachment)]
    lit = list(dict.fromkeys(pair for pairs, _ in found for pair in pairs))
    layers = set().union(*(at for _, at in found))
    if not layers or len(layers) == DEPTH:
        crossing = attachment.model.config.add_cross_attention
        return lit, f", in {'the cross-attention of ' * crossing}every block" if layers else ""
    upper = sorted(layers) == list(range(min(layers), DEPTH))
    return lit, f", in {'the upper ' * upper}{len(layers)} of {DEPTH} blocks"


def _of_part(part: Part) -> tuple[Lit, set[int]]:
    every = set(range(DEPTH))
    if isinstance(part, Pruned):
        return [], set()  # it acts where those do that it is of
    trained = any(p.requires_grad for p in part.parameters())
    if isinstance(part, DeltaPart):
        return [(WEIGHTS[part.site.role], "beside")], {part.site.layer}
    if isinstance(part, SublayerPart):
        spot = "FFN" if part.sublayer.role == "ffn" else "attention"
        return [(spot, "beside" if part.method.reads == "input" else "behind")], {part.sublayer.layer}
    if isinstance(part, PrefixPart):
        return [("keys and values", "added")], {part.attention.layer}
    if isinstance(part, PromptPart | LatePart):
        return [("context", "added")], set(range(getattr(part, "layer", 0), DEPTH))
    if isinstance(part, SidePart):
        return [("side network", "reading")], set().union(*(each.layers for each in part.networks.values()))
    if isinstance(part, WeightSpacePart) and trained:
        return [(spot, "beside") for spot in (*WEIGHTS.values(), "norms")], every
    if isinstance(part, WeightSpacePart) or any(buffer.numel() for buffer in part.buffers()):
        return [(spot, "recomputed") for spot in WEIGHTS.values()], every  # the base in another form
    return [], set()  # one that switches others


def _of_selection(attachment: Attachment) -> list[tuple[Lit, set[int]]]:
    found = []
    for site in attachment.anatomy.linears("all"):
        weight, bias = site.module.weight, site.module.bias
        how = "trained" if weight.requires_grad else "bias" if bias.requires_grad else None
        if how:
            found.append(([(WEIGHTS[site.role.replace("cross", "self")], how)], {site.layer}))
    trained = {name: p for name, p in attachment.anatomy.norms().items() if p.requires_grad}
    if trained:
        behind = {id(p) for s in attachment.anatomy.sublayers("attn") for p in s.norm.parameters()}
        spot = "norm behind them" if {id(p) for p in trained.values()} <= behind else "norms"
        gains = trained.keys() - attachment.anatomy.biases().keys()
        found.append(([(spot, "trained" if gains else "bias")], set()))
    return found


def _words(lit: Lit, where: str) -> str:
    if not lit:
        return "It acts nowhere in a block: the task head alone is trained."
    sentence = {
        "beside": "beside {}",
        "behind": "behind {}",
        "trained": "trained in place: {}",
        "bias": "the biases of {}",
        "recomputed": "rebuilt from a smaller form: {}",
        "added": "something is added: to {}",
        "reading": "{} reads the states",
    }
    groups: dict[str, list[str]] = {}
    for spot, how in lit:
        groups.setdefault(how, []).append(spot if spot in (*WEIGHTS.values(), "attention") else f"the {spot}")
    parts = []
    for how, spots in groups.items():
        listed = " and ".join(filter(None, (", ".join(spots[:-1]), spots[-1])))
        parts.append(sentence[how].format(listed))
    text = f"{'; '.join(parts)}{where}."
    return text[0].upper() + text[1:]


def _draw(lit: Lit, numbers: set[int], words: str) -> Diagram:
    d = Diagram(300, 330, alt=f"A transformer block with the five places where a method can act. {words}")
    middle, left, right = 140, 45, 235

    def weight(x: float, y: float, width: float, name: str) -> None:
        recomputed = "skipped" if (name, "recomputed") in lit else "frozen"
        d.box(x, y, width, 24, name, "trained" if (name, "trained") in lit else recomputed)
        if (name, "beside") in lit:
            d.box(x + width + 2, y, 8, 24, kind="trained")
        if (name, "bias") in lit:
            d.box(x, y + 24, width, 5, kind="trained")

    def sublayer(top: float, name: str, weights: list[str], gap: float) -> None:
        d.box(left, top, right - left, 58, kind="frame")
        d.text(left + 8, top + 13, name, anchor="start", size=12)
        for i, each in enumerate(weights):
            weight(left + 12 + i * gap, top + 27, gap - 14, each)
        plus = top - 38
        d.dot(
            right - 14,
            top + 13,
            "1",
            lit=any((w, h) in lit for w in weights for h in ("beside", "recomputed")),
        )
        d.line((middle, top + 70), (22, top + 70), (22, plus))
        d.arrow((22, plus), (middle - 9, plus))
        behind = (name, "behind") in lit
        if behind:
            d.line((middle, top), (middle, top - 7))
            d.box(middle - 18, top - 21, 36, 14, kind="trained")
        d.arrow((middle, top - 21 if behind else top), (middle, plus + 9))
        d.text(middle, plus, "+", size=18)
        d.dot(middle + 34, top - 14, "2", lit=any(spot == name for spot, _ in lit))
        if (name, "beside") in lit:
            d.box(right + 6, top + 10, 14, 40, kind="trained")
            d.line((middle, top + 66), (right + 13, top + 66), (right + 13, top + 50))
            d.arrow((right + 13, top + 10), (right + 13, plus), (middle + 9, plus))

    def norm(top: float, *spots: str) -> None:
        trained = any((spot, "trained") in lit for spot in ("norms", *spots))
        d.box(left, top, right - left, 18, kind="trained" if trained else "frozen")
        d.text(middle, top + 9, "norm", size=12)
        if ("norms", "bias") in lit:
            d.box(left, top + 18, right - left, 5, kind="trained")
        if ("norms", "beside") in lit:
            d.box(right + 2, top, 8, 18, kind="trained")
            d.dot(right + 22, top + 9, "1", lit=True)
        d.dot(left - 12, top + 9, "5", lit=5 in numbers)

    d.text(middle, 318, "x", size=15)
    d.arrow((middle, 308), (middle, 290))
    d.dot(middle + 26, 318, "3", lit=("context", "added") in lit)
    if ("context", "added") in lit:
        d.box(middle - 62, 309, 46, 18, kind="trained")
    sublayer(232, "attention", ["q", "k", "v", "o"], 44)
    if ("keys and values", "added") in lit:
        d.box(right + 10, 252, 26, 26, kind="trained")
        d.arrow((right + 10, 265), (right, 265), kind="trained")
        d.dot(right + 23, 240, "3", lit=True)
    d.line((middle, 185), (middle, 178))
    norm(160, "norm behind them")
    d.arrow((middle, 160), (middle, 142))
    sublayer(84, "FFN", ["in", "out"], 88)
    d.line((middle, 37), (middle, 30))
    norm(12)
    d.arrow((middle, 12), (middle, 0))
    side = ("side network", "reading") in lit
    if side:
        d.box(270, 20, 22, 200, kind="trained")
        for y in (151, 34):
            d.arrow((middle, y), (270, y), kind="trained")
    d.dot(281, 120, "4", lit=side)
    return d
