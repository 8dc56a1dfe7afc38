"""Draw what the site shows of itself: the figure of the first page, the card for chats, the favicon.

    python tools/landing.py

The figure is written into book/intro.md between its two comments, the pictures into book/_static. The numbers
are measured on the packaged MiniLM; they do not depend on the machine.
"""

from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from PIL import Image

import guidelib as gl
from guidelib.pages import viz

ROOT = Path(__file__).resolve().parents[1]
PAGE, STATIC = ROOT / "book/intro.md", ROOT / "book/_static"
START, END = "<!-- figure: memory -->\n", "\n<!-- end of figure: memory -->"
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
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    attachment.detach()
    terms = (weights, costs.gradient_bytes, costs.optimizer_bytes, costs.saved_bytes)
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
    text = PAGE.read_text(encoding="utf-8")
    before, found, rest = text.partition(START)
    if not found or END not in rest:
        raise ValueError(f"{PAGE.name} has no {START.strip()} with its end: the figure cannot be put there")
    rows = measured()
    PAGE.write_text(before + START + figure(rows) + END + rest.partition(END)[2], encoding="utf-8")
    (STATIC / "favicon.svg").write_text(favicon(), encoding="utf-8")
    draw_card(STATIC / "card.png", rows)


if __name__ == "__main__":
    main()
