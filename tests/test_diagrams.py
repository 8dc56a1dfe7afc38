"""Drawings, and the one of the five places: what is lit follows from what a method attaches."""

import xml.etree.ElementTree as ET

import pytest

import guidelib as gl
from guidelib.pages import places
from guidelib.pages.diagrams import KINDS, Diagram
from guidelib.pages.viz import COLOURS


def drawn(output):
    """The SVG of a drawing, parsed, so that it is well formed."""
    html = output._repr_mimebundle_()["text/html"]
    return ET.fromstring(html[html.index("<svg") : html.index("</svg>") + len("</svg>")])


def trained(output):
    return [box for box in drawn(output).iter("rect") if box.get("stroke") == COLOURS["trained"]]


def lit(output):
    """The numbers in a filled circle."""
    html = output._repr_mimebundle_()["text/html"]
    numbers = {n for n, line in enumerate(html.split("<li>")[1:], 1) if line.startswith("<strong>")}
    nodes = list(drawn(output))
    filled = [
        words.text
        for dot, words in zip(nodes, nodes[1:], strict=False)
        if dot.get("r") and dot.get("fill") != "none"
    ]
    assert {int(n) for n in filled} == numbers
    return numbers


EXPECTED = {  # method -> the places that its paper speaks of
    **dict.fromkeys(("FullFineTuning", "BitFit", "NormTuning", "CrossAttentionTuning"), {5}),
    "HeadOnly": set(),
    # Houlsby trains the norms as well, and Compacter's authors do
    **dict.fromkeys(("Adapter", "PHMAdapter", "Compacter", "CompacterPlusPlus"), {2, 5}),
    "PfeifferAdapter": {2},
    "SparseAdapter": {2},
    "ParallelAdapter": {2},
    "AdapterFusion": {2},
    "AdapterDrop": {2},
    "AdaMix": {2},
    "KronARes": {2},
    "MAM": {2, 3},
    "UniPELT": {1, 2, 3},
    "S4": {1, 2, 3, 5},
    **dict.fromkeys(gl.METHODS["soft prompts"], {3}),
    **dict.fromkeys(("LST", "AttentionFusion", "LeTS"), {4}),
}


@pytest.mark.parametrize("name", [name for names in gl.METHODS.values() for name in names])
def test_every_method_has_its_place(name):
    made = gl.place(name)
    assert lit(made) == set(places.places_of(getattr(gl, name)())) == EXPECTED.get(name, {1})
    assert bool(trained(made)) == (name != "HeadOnly")
    assert "five places" in repr(made) and drawn(made).get("aria-label") == repr(made)


def test_what_is_lit_follows_from_the_hyper_parameters():
    assert "Beside q and v, in every block." in repr(gl.place("LoRA"))
    assert "Beside in and out, in every block." in repr(gl.place(gl.LoRA(targets="ffn")))
    assert "Beside k, in the upper 2 of 12 blocks." in repr(
        gl.place(gl.LoRA(targets="k").on(layers=(10, 11)))
    )
    assert "in 1 of 12 blocks." in repr(gl.place(gl.LoRA().on(layers=0)))
    assert len(trained(gl.place("LoRA"))) == 2 and len(trained(gl.place(gl.LoRA(targets="all")))) == 6
    assert "Trained in place: q, k, v, o and the norm behind them, in the cross-attention of every" in repr(
        gl.place("CrossAttentionTuning")
    )
    assert "The biases of q, k, v, o, in, out and the norms, in every block." in repr(gl.place("BitFit"))
    assert "The biases of q and in, in every block." in repr(gl.place(gl.BitFit(only=("q", "ffn.in"))))
    assert "The side network reads the states, in 9 of 12 blocks." in repr(gl.place("LST"))
    assert "Rebuilt from a smaller form: q, k, v, o, in and out; beside q" in repr(gl.place("QLoRA"))


def test_a_drawing_of_all_five_places_says_of_none_that_it_is_here():
    every = dict(q="beside", attention="behind", context="added", norms="trained")
    assert "(here)" not in gl.place(every | {"side network": "reading"})._repr_mimebundle_()["text/html"]
    assert "(here)" in gl.place(every)._repr_mimebundle_()["text/html"]


@pytest.mark.parametrize("spot", places.SPOTS)
def test_every_spot_can_be_lit_by_name(spot):
    for how, number in places.SPOTS[spot].items():
        made = gl.place({spot: how})
        assert lit(made) == {number}
        assert how == "recomputed" or trained(made)


def test_place_refuses():
    for wrong, words in (
        ("LORA", "method must be one of FullFineTuning"),
        ({"x": "added"}, "spot must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            gl.place(wrong)
    with pytest.raises(ValueError, match="spot 'context' must be one of added, got 'beside'"):
        gl.place({"context": "beside"})


def test_a_diagram_is_svg_that_says_what_it_shows():
    made = Diagram(200, 100, alt='A box, W_0 & an arrow "up".', caption="Small < large.")
    made.box(10, 20, 60, 30, "W_0 < x^{10}").arrow((40, 90), (40, 50)).line((0, 0), (9, 9)).dot(80, 20, "1")
    svg = drawn(made)
    assert svg.get("role") == "img" and svg.get("aria-label") == 'A box, W_0 & an arrow "up".' == repr(made)
    (words, _) = svg.iter("text")
    assert "".join(words.itertext()) == "W0 < x10"
    low, back, high = (float(span.get("dy")) for span in words.iter("tspan"))
    assert low > 0 > high and low + back == 0
    assert "Small &lt; large." in made._repr_mimebundle_()["text/html"]
    assert "<script" not in made._repr_mimebundle_()["text/html"]


def test_what_is_trained_is_told_apart_without_colour():
    edges = {kind: (width, dashes) for kind, (_, _, width, dashes) in KINDS.items()}
    assert len(set(edges.values())) == len(edges)


def test_a_diagram_refuses():
    with pytest.raises(ValueError, match="alt must be a description"):
        Diagram(1, 1, alt="")
    with pytest.raises(ValueError, match="kind must be one of frozen, trained, skipped, frame, got 'hot'"):
        Diagram(1, 1, alt="Nothing to be seen.").box(0, 0, 1, 1, kind="hot")
