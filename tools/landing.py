"""Draw what the site shows of itself: the two figures of the first page, the card for chats, the favicon.

    python tools/landing.py

The figures are written into book/intro.md, each between its two comments, the pictures into book/_static. The
numbers are measured on the packaged MiniLM; they do not depend on the machine.
"""

from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from PIL import Image

import guidelib as gl
from guidelib.materials.cards import put
from guidelib.pages import viz
from guidelib.pages.places import classes
from guidelib.survey import FIGURE, Label

ROOT = Path(__file__).resolve().parents[1]
PAGE, STATIC = ROOT / "book/intro.md", ROOT / "book/_static"
TITLE = "LoRA, adapters and their relatives, run and measured"
ROWS, LENGTH = 8, 32  # the batch that the chapters' tables of costs use
HATCHES = ("", "//", "\\\\", "..")
TERMS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimiser": "Adam’s state",
    "activations": "saved activations",
}
RANK, WIDTH = 8, 16
METHODS = {  # label of the button -> how the line above the bar names it, and the method
    "LoRA on q, v": (f"LoRA beside the queries and values, r = {RANK}", gl.LoRA(r=RANK)),
    "LoRA everywhere": (f"LoRA beside all linear layers, r = {RANK}", gl.LoRA(r=RANK, targets="all")),
    "Adapters": (f"Adapters behind both sub-layers, r = {WIDTH}", gl.Adapter(r=WIDTH)),
    "AdapterDrop": (
        f"Adapters in the upper half of the blocks, r = {WIDTH}",
        gl.AdapterDrop(gl.PfeifferAdapter(r=WIDTH), 3),
    ),
    "Head alone": ("The task head alone", gl.HeadOnly()),
}


CIRCLES = {"A": (150, 150), "S": (310, 150), "R": (230, 288)}  # their middles in the map
LOOKS = {
    "A": 'stroke="#0072b2"',
    "S": 'stroke="#d55e00" stroke-dasharray="9 4"',
    "R": 'stroke="#009e73" stroke-dasharray="2 4"',
}
RADIUS, SIZE, GAP = 140, 14, 11  # of the circles, of the type, and between two names
LINES = {  # the circles that a method stands in -> where its names begin, and how far apart lines are
    **dict(A=(54, 19), S=(76, 20), R=(332, 21)),
    **dict(AS=(84, 17), AR=(219, 19), SR=(240, 18), ASR=(186, 21)),
}
REGIONS = {
    "A": "additive",
    "S": "selective",
    "R": "reparametrisation",
    "AS": "additive and selective",
    "AR": "additive and reparametrisation",
    "SR": "selective and reparametrisation",
    "ASR": "all three",
}
CAPTION = (
    "The classes of the survey. A hybrid stands where circles overlap. Each name leads to its page. Drawn "
    "from where the parts of a method act and how they are written, after Figure 2 of the survey, with six "
    "names more. *The survey draws (IA)³ as additive, since it adds vectors. Here it stands where they act, "
    "in weights."
)


@dataclass(frozen=True)
class Memory:
    """Bytes by term, in the order of TERMS, and how many parameters are trained."""

    bytes: dict[str, int]
    trained: int

    @property
    def total(self) -> float:
        """MiB."""
        return sum(self.bytes.values()) / 2**20


def memory(model, method: gl.Method, batch: dict[str, torch.Tensor]) -> Memory:
    """What one training step with Adam in 32 bits holds."""
    attachment = gl.attach(model, method)
    costs = gl.measure(model, batch)
    attachment.detach()
    terms = (costs.memory.weights, costs.gradient_bytes, costs.optimizer_bytes, costs.saved_bytes)
    return Memory(dict(zip(TERMS, terms, strict=True)), costs.count.trainable)


def measured() -> dict[str, Memory]:
    """Full fine-tuning under "", then the methods under their labels."""
    model, _ = gl.load_backbone("minilm", "movie-reviews")
    ids = torch.full((ROWS, LENGTH), 1000)
    labels = torch.zeros(ROWS, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    methods = {"": gl.FullFineTuning()} | {label: method for label, (_, method) in METHODS.items()}
    return {label: memory(model, method, batch) for label, method in methods.items()}


def bar(name: str, shown: Memory, full: Memory) -> str:
    """A line of text and the bar below it, whose pieces have widths in per cent of full fine-tuning."""
    words = ", ".join(f"{term} {shown.bytes[key] / 2**20:.1f} MiB" for key, term in TERMS.items())
    pieces = "".join(
        f'<span class="guide-{key}" style="background-color:{viz.COLOURS[key]};'
        f'width:{100 * size / 2**20 / full.total:.2f}%"></span>'
        for key, size in shown.bytes.items()
    )
    share = "" if shown is full else f", {100 * shown.total / full.total:.0f} % of full"
    return (
        f"<p><strong>{escape(name)}</strong><span>{shown.total:.1f} MiB{share} · "
        f"trains {shown.trained:,} parameters</span></p>\n"
        f'<div class="guide-bar" role="img" aria-label="{escape(name)}: {words}.">{pieces}</div>'
    )


def figure(rows: dict[str, Memory]) -> str:
    """The figure as HTML. Which of the methods is shown is a matter of radio buttons and of guide.css."""
    full = rows[""]
    legend = "".join(
        f'<span><i class="guide-{key}" style="background-color:{viz.COLOURS[key]}"></i> {term}</span>'
        for key, term in TERMS.items()
    )
    buttons = "\n".join(
        f'<input type="radio" name="guide-method" id="guide-method-{i}"{" checked" if i == 1 else ""}>'
        f'<label for="guide-method-{i}">{escape(label)}</label>'
        for i, label in enumerate(METHODS, 1)
    )
    bars = "\n".join(
        f'<div class="guide-with">\n{bar(name, rows[label], full)}\n</div>'
        for label, (name, _) in METHODS.items()
    )
    batch = f"{ROWS} texts of {LENGTH} tokens"
    caption = f"Memory of one training step: MiniLM, {batch}, Adam, 32 bits. Measured."
    return f"""\
<figure class="guide-memory" id="fig-memory">
{bar("Full fine-tuning", full, full)}
<fieldset><legend>The same model with</legend>
{buttons}
</fieldset>
<div aria-live="polite">
{bars}
</div>
<p class="guide-legend">{legend}</p>
<figcaption>{caption}</figcaption>
</figure>"""


def interval(region: str, y: float) -> tuple[float, float]:
    """The widest stretch at the height of a line of text that is in the circles of ``region`` and in no
    other."""

    def inside(x: float, circle: str, at: float) -> bool:
        (cx, cy), margin = CIRCLES[circle], 2
        reach = RADIUS - margin if circle in region else RADIUS + margin
        return (x - cx) ** 2 + (at - cy) ** 2 < reach**2

    free = [
        all(inside(x, c, at) == (c in region) for c in CIRCLES for at in (y - 0.7 * SIZE, y + 0.25 * SIZE))
        for x in range(0, 461)
    ]
    best, start = (0, 0), None
    for x, is_free in enumerate([*free, False]):
        start = x if is_free and start is None else start
        if not is_free and start is not None:
            best, start = max(best, (start, x), key=lambda span: span[1] - span[0]), None
    return best


def width(word: str) -> float:
    """About how wide it is, in the fonts of most systems."""
    return SIZE * sum(0.66 if c.isupper() else 0.33 if c in "il()-t *³" else 0.6 for c in word)


def placed(region: str, labels: list[Label]) -> list[str]:
    """The names of a region as lines of text, each name a link: as many in a line as have room there."""
    (y, step), texts, left = LINES[region], [], list(labels)
    words = {label: (label.short or label.name).split("\n") for label in labels}
    wide = {label: max(map(width, words[label])) + GAP for label in labels}
    while left:
        if y > 430:
            raise ValueError(f"there is no room for {left[0].name} where its circles are")
        low, high = interval(region, y)
        fit = [
            line
            for n in (1, 2, 3)
            for line in combinations(left, n)
            if sum(wide[each] for each in line) <= high - low + GAP
        ]
        line = max(
            fit, key=lambda line: (max(wide[e] for e in line), sum(wide[e] for e in line)), default=()
        )  # the widest first, since there is less room further down
        x = (low + high - sum(wide[each] for each in line)) / 2
        for label in line:
            left.remove(label)
            star, middle = "" if label.kind == region else "*", x + wide[label] / 2
            spans = "".join(
                f'<tspan x="{middle:.0f}" dy="{step * bool(i)}">{escape(word)}{star}</tspan>'
                for i, word in enumerate(words[label])
            )
            link = f"../notebooks/{label.page}.html"
            texts.append(f'<a href="{link}"><text x="{middle:.0f}" y="{y}">{spans}</text></a>')
            x += wide[label]
        y += step
    return texts


def taxonomy() -> str:
    """The survey's Figure 2 as HTML: each method where the places put it that its parts act at."""
    regions: dict[str, list[Label]] = {region: [] for region in LINES}
    for label in FIGURE:
        regions[classes(getattr(gl, label.method)())].append(label)
    names = "\n".join(text for region, labels in regions.items() for text in placed(region, labels))
    said = {each: (each.short or each.name).replace("-\n", "").replace("\n", " ") for each in FIGURE}
    words = "; ".join(
        f"{REGIONS[region]}: {', '.join(said[each] for each in labels)}" for region, labels in regions.items()
    )
    circles = "\n".join(
        f'<circle cx="{x}" cy="{y}" r="{RADIUS}" {LOOKS[name]}/>' for name, (x, y) in CIRCLES.items()
    )
    return f"""\
<figure class="guide-figure" id="fig-taxonomy">
<svg viewBox="0 0 460 438" role="group" aria-labelledby="tax-title tax-desc" xmlns="http://www.w3.org/2000/svg">
<title id="tax-title">The three classes of the survey and their overlaps</title>
<desc id="tax-desc">Three overlapping circles, with the methods in them as links. In {escape(words)}.</desc>
<g fill="none" stroke-width="2.5">
{circles}
</g>
<g fill="currentColor" text-anchor="middle" font-size="{SIZE}">
<g font-weight="700" font-size="16">
<text x="130" y="34">Additive</text>
<text x="342" y="52">Selective</text>
<text x="230" y="311">Reparametrisation</text>
</g>
{names}
</g>
</svg>
<figcaption>{CAPTION}</figcaption>
</figure>"""


def favicon() -> str:
    """A frozen square weight, and a thin column and a flat row beside it that are trained."""
    frozen, trained = viz.COLOURS["frozen"], viz.COLOURS["trained"]
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">
<rect x="10" y="10" width="20" height="20" rx="2" fill="{frozen}"/>
<rect x="2" y="10" width="5" height="20" rx="1.5" fill="{trained}"/>
<rect x="10" y="2" width="20" height="5" rx="1.5" fill="{trained}"/>
</svg>
"""


def draw_card(path: Path, rows: dict[str, Memory]) -> None:
    """1200 by 630 pixels, the size that chats show without cropping."""
    full, label = rows[""], next(iter(METHODS))
    patterns = dict(zip(TERMS, HATCHES, strict=True))
    with viz.style(), plt.rc_context({"figure.constrained_layout.use": False}):
        card = plt.figure(figsize=(12, 6.3), dpi=100)
        ax = card.add_axes((0, 0, 1, 1), xlim=(0, 1200), ylim=(630, 0))
        ax.axis("off")

        def box(x: float, y: float, width: float, height: float, key: str) -> None:
            look = {"facecolor": viz.COLOURS[key], "edgecolor": "white", "hatch": patterns.get(key), "lw": 0}
            ax.add_patch(Rectangle((x, y), width, height, **look))

        def write(x: float, y: float, words: str, size: float, **more) -> None:
            ax.text(x, y, words, size=size, color=viz.COLOURS["full"], va="baseline", **more)

        box(70, 88, 74, 74, "frozen")
        box(44, 88, 18, 74, "trained")
        box(70, 62, 74, 18, "trained")
        write(178, 106, "Scaling Down to Scale Up", 36, weight="bold")
        write(178, 156, "the executable guide to parameter-efficient fine-tuning", 22)
        write(44, 252, TITLE, 26)
        for y, name, shown in ((345, "Full fine-tuning", full), (485, METHODS[label][0], rows[label])):
            write(44, y - 12, name, 20)
            write(1156, y - 12, f"{shown.total:.0f} MiB", 20, weight="bold", ha="right")
            x = 44.0
            for key, size in shown.bytes.items():
                width = 1112 * size / 2**20 / full.total
                box(x, y, width, 58, key)
                x += width
        x = 44.0
        for key, term in TERMS.items():
            box(x, 580, 26, 22, key)
            write(x + 36, 599, term, 17)
            x += 90 + 11 * len(term)
        card.savefig(path, metadata={"Software": None})
        plt.close(card)
    with Image.open(path) as image:  # few colours, and so few bytes
        image.convert("RGB").quantize(24, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    rows = measured()
    put(PAGE, {"figure: memory": figure(rows), "figure: map": taxonomy()})
    (STATIC / "favicon.svg").write_text(favicon(), encoding="utf-8")
    draw_card(STATIC / "card.png", rows)


if __name__ == "__main__":
    main()
