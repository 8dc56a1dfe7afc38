"""Drawings in one grammar: grey is frozen, orange is trained, dashed is recomputed or skipped.

A drawing is SVG in the page itself.  Its lines and words take the colour of the page, light or dark, and what
is trained has a thicker edge besides its colour.  Nothing in it needs a script.
"""

from __future__ import annotations

import math
import re
from html import escape

from guidelib.core.method import expect
from guidelib.pages.viz import COLOURS, Output

KINDS = {  # what a box stands for -> colour, opacity of its filling, width of its edge, dashes
    "frozen": (COLOURS["frozen"], 0.25, 1.2, ""),
    "trained": (COLOURS["trained"], 0.35, 2.6, ""),
    "skipped": (COLOURS["frozen"], 0, 1.6, "5 4"),  # recomputed as well
    "frame": ("currentColor", 0, 1, ""),
}
_CAPTION = '<figcaption style="padding:0;color:inherit;text-align:left;margin:.5rem 0 0">{}</figcaption>'


class Diagram(Output):
    """A drawing of ``width`` by ``height`` units, about a pixel each; y grows downwards.

    alt: what it shows, in words.  Draw with ``box``, ``arrow``, ``line``, ``text`` and ``dot``, and let it be
    the last line of the cell.  In words, _x and _{xy} stand lower, ^x and ^{xy} higher.
    """

    def __init__(self, width: float, height: float, *, alt: str, caption: str = ""):
        described = isinstance(alt, str) and len(alt.split()) > 2
        expect(described, "alt", alt, "a description of the drawing in words")
        self.size, self.alt, self.caption = (width, height), alt, caption
        self.drawn: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, words: str = "", kind: str = "frozen"):
        """A rectangle with its left upper corner at (x, y).  kind: frozen, trained, skipped or frame."""
        expect(kind in KINDS, "kind", kind, f"one of {', '.join(KINDS)}")
        colour, opacity, edge, dashes = KINDS[kind]
        self._add(
            "rect",
            {"x": x, "y": y, "width": width, "height": height, "rx": 4, "fill": colour}
            | {"fill-opacity": opacity, "stroke": colour, "stroke-width": edge}
            | ({"stroke-dasharray": dashes} if dashes else {}),
        )
        return self.text(x + width / 2, y + height / 2, words) if words else self

    def line(self, *points: tuple[float, float], kind: str = "frame"):
        """Straight lines from point to point."""
        expect(kind in KINDS, "kind", kind, f"one of {', '.join(KINDS)}")
        colour, _, edge, dashes = KINDS[kind]
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        look = {"points": path, "fill": "none", "stroke": colour, "stroke-width": edge + 0.3}
        return self._add("polyline", look | ({"stroke-dasharray": dashes} if dashes else {}))

    def arrow(self, *points: tuple[float, float], kind: str = "frame"):
        """A line with a head at its last point."""
        (x0, y0), (x, y) = points[-2:]
        long = math.hypot(x - x0, y - y0)
        dx, dy = ((x - x0) / long, (y - y0) / long) if long else (0, 0)
        corners = [(x, y)] + [(x - 7 * dx - 3.5 * s * dy, y - 7 * dy + 3.5 * s * dx) for s in (1, -1)]
        self.line(*points[:-1], (x - 5 * dx, y - 5 * dy), kind=kind)
        return self._add(
            "polygon", {"points": " ".join(f"{a:.4g},{b:.4g}" for a, b in corners), "fill": KINDS[kind][0]}
        )

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", size: float = 14, bold=False):
        """Words around (x, y); anchor: start, middle or end."""
        look = {"x": x, "y": y, "dy": ".35em", "text-anchor": anchor, "font-size": size}
        look |= {"fill": "currentColor"} | ({"font-weight": 700} if bold else {})
        return self._add("text", look, _shifted(words, size))

    def dot(self, x: float, y: float, words: str, *, lit: bool = False):
        """A number in a circle, filled where it is ``lit``."""
        colour = COLOURS["trained"]
        look = {"stroke": colour, "stroke-width": 2} if lit else {"stroke": "currentColor", "stroke-width": 1}
        look |= {"fill": colour, "fill-opacity": 0.35} if lit else {"fill": "none"}
        self._add("circle", {"cx": x, "cy": y, "r": 9.5} | look)
        return self.text(x, y, words, size=12, bold=lit)

    def svg(self) -> str:
        width, height = self.size
        look = f"display:block;width:100%;max-width:{width:g}px;height:auto;color:inherit"
        return (
            f'<svg role="img" aria-label="{escape(self.alt)}" viewBox="0 0 {width:g} {height:g}" '
            f'style="{look}" font-family="inherit">{"".join(self.drawn)}</svg>'
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        caption = _CAPTION.format(escape(self.caption)) if self.caption else ""
        html = (
            f'<figure class="guidelib-diagram" style="margin:0;color:inherit">{self.svg()}{caption}</figure>'
        )
        return {"text/html": html, "text/plain": self.alt}

    def __repr__(self) -> str:
        return self.alt

    def _add(self, tag: str, look: dict, content: str = ""):
        attributes = " ".join(
            f'{k}="{v:g}"' if isinstance(v, float) else f'{k}="{v}"' for k, v in look.items()
        )
        self.drawn.append(f"<{tag} {attributes}>{content}</{tag}>")
        return self


def _shifted(words: str, size: float) -> str:
    """Text with lower and higher parts, moved by hand: not every browser knows baseline-shift."""
    svg, back = "", 0.0
    for mark, group, single, plain in re.findall(r"([_^])(?:\{([^}]*)\}|(\S))|([^_^]+)", words):
        shift = {"_": 0.25, "^": -0.4}.get(mark, 0.0) * size
        content = escape(group or single or plain)
        small = f' font-size="{0.75 * size:g}"' if mark else ""
        svg += f'<tspan dy="{shift - back:g}"{small}>{content}</tspan>' if shift != back else content
        back = shift
    return svg
