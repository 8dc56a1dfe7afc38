"""Figures, sliders, panels, tables and source listings that read well in a notebook and on a static page.

Nothing here loads anything from the network: all that an output needs is inside its own HTML.
"""

import base64
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

_BLACK, _DARK, _GREY, _BLUE, _ORANGE, _PINK = "#1B1B1B", "#4D4D4D", "#8A8A8A", "#0072B2", "#D55E00", "#CC79A7"

#: Colours by meaning. The members of one group stay apart for the three common kinds of colour blindness,
#: and every colour keeps a contrast of 3:1 with the background, also behind the site's dark-mode filter.
COLOURS: dict[str, str] = {
    **{"full": _BLACK, "head": _GREY, "method": _ORANGE, "other": _BLUE},
    **{"predicted": _PINK, "measured": _BLUE},
    **{"weights": _DARK, "gradients": _ORANGE, "optimiser": _BLUE, "activations": _PINK},
    **{"frozen": _GREY, "trained": _ORANGE},
}
#: Keyword arguments of `Axes.plot` by meaning: the colour, and a marker and a dash that survive grey print.
LINES: dict[str, dict[str, str]] = {
    name: {"color": COLOURS[name], "marker": marker, "linestyle": dash}
    for name, marker, dash in [
        ("full", "s", "--"),
        ("head", "D", ":"),
        ("method", "o", "-"),
        ("other", "^", "-."),
        ("predicted", "none", "--"),
        ("measured", "o", "none"),
    ]
}
_STYLE = {
    "figure.figsize": (5.2, 3.4),  # 12 pt on 5.2 inches is about 11 px where a phone shows it 350 px wide
    "figure.dpi": 144,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
    "font.size": 12,
    "axes.titlesize": 12,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "lines.linewidth": 2,
    "svg.hashsalt": "guidelib",
    "axes.prop_cycle": plt.cycler(color=[_ORANGE, _BLUE, _BLACK, _PINK, _GREY])
    + plt.cycler(linestyle=["-", "-.", "--", (0, (5, 1)), ":"]),
}


def style() -> AbstractContextManager:
    """The house style, as a context: `with style(): fig, ax = plt.subplots()`."""
    return plt.style.context(_STYLE, after_reset=True)


class Output:
    """What a notebook shows, by media type: a front end takes the richest it knows, a terminal the text."""

    def __init__(self, **bundle: str):
        self.bundle = {kind.replace("_", "/"): content for kind, content in bundle.items()}

    def __repr__(self) -> str:
        return self.bundle["text/plain"]

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return self.bundle


def _text(value: Any) -> str:
    """A value as a reader sees it: 22,713,216 and 0.01235 and yes; other types by `str`."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        value = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return re.sub(r"^[-−](?=0(\.0*)?$)", "", str(value))  # no negative zero


# One listener on the document serves every slider of a page. It needs no ids, so equal sliders do not clash,
# and it does not matter whether the script runs before or after its figure is inserted. Text colours are
# inherited: the theme, JupyterLab and Colab set their own. padding:0 undoes the frame of the dark theme. The
# data attribute keeps JupyterLab's shortcuts off the arrow keys. autocomplete="off" keeps a reload from
# moving the handle without the picture. Inside the label, the output would become part of its name.
_SLIDER = """<figure class="guidelib-{kind}" style="margin:0;max-width:38rem;color:inherit">
<img src="data:image/png;base64,{png}" alt="{alt}" width="{width}" height="{height}"
 style="display:block;width:100%;height:auto;padding:0">
<div style="display:flex;flex-wrap:wrap;align-items:center;gap:0 .75rem;margin:.5rem 0">
<label style="display:flex;flex:1 1 14rem;flex-wrap:wrap;align-items:center;gap:0 .75rem;margin:0">{label}
{control}</div>
{caption}
<script type="application/json">{frames}</script>
</figure>"""
_RANGE = """<input type="range" min="0" max="{last}" step="1" value="{start}" aria-valuetext="{text}"
 autocomplete="off" data-lm-suppress-shortcuts="true"
 style="flex:1 1 8rem;min-width:0;height:2rem;accent-color:#0072B2">
</label><output aria-live="polite" style="min-width:4em">{text}</output>"""
_MENU = """<select autocomplete="off" data-lm-suppress-shortcuts="true" style="max-width:100%;padding:.25rem">
{options}</select></label>"""
_SCRIPT = """<script>
if (!window.guidelibSlider) {
  window.guidelibSlider = true;
  document.addEventListener("input", event => {
    const figure = event.target.closest && event.target.closest(".guidelib-slider, .guidelib-menu");
    if (!figure) return;
    const frames = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const [png, alt, text] = frames[event.target.value];
    const image = figure.querySelector("img");
    image.src = "data:image/png;base64," + png;
    image.alt = alt;
    if (event.target.type !== "range") return;
    figure.querySelector("output").textContent = text;
    event.target.setAttribute("aria-valuetext", text);
  });
}
</script>"""
_LARGEST = 1_000_000  # bytes; a notebook with a few larger sliders opens badly on a phone


def _frame(draw: Callable[[Any, Any], object], value: Any) -> Image.Image:
    with style():
        figure = Figure()
        canvas, ax = FigureCanvasAgg(figure), figure.add_subplot()
        empty = len(ax.get_children())
        draw(ax, value)
        if figure.axes == [ax] and len(ax.get_children()) == empty:
            raise ValueError(f"draw left the axes empty at value {value!r}: draw on its first argument.")
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    return image.quantize(128, dither=Image.Dither.NONE)  # a third of the bytes; dithering would not compress


def slider(
    draw: Callable[[Any, Any], object],
    values: Sequence,
    *,
    label: str,
    alt: str | Callable[[Any], str],
    caption: str = "",
    start: int = 0,
) -> Output:
    """A figure that the reader moves through `values`, also offline and without a kernel: with a slider, or
    with a menu where the values are names.

    `draw(ax, value)` draws one frame on fresh Axes in the house style; draw on `ax`, not with `plt`.
    `label` names what moves ("rank r"). `alt` describes the picture: a text, or a function of the value.
    `start` is the index of the frame that stands where scripts do not run.
    Raises `ValueError` for fewer than two values, a `start` outside them, no `alt`, empty frames, over 1 MB.
    """
    values = list(values)
    if len(values) < 2:
        raise ValueError(f"values must hold at least two values to move between, not {values!r}.")
    if type(start) is not int or not 0 <= start < len(values):
        raise ValueError(f"start must be an index into the {len(values)} values, from 0 on, not {start!r}.")
    frames = []
    for value in values:
        words = alt(value) if callable(alt) else alt
        if not isinstance(words, str) or not words.strip():
            raise ValueError(f"alt must describe the picture in words, not {words!r} (at value {value!r}).")
        image, file = _frame(draw, value), io.BytesIO()
        image.save(file, "PNG", optimize=True)
        frames.append((base64.b64encode(file.getvalue()).decode(), words, _text(value)))
    png, words, text = frames[start]
    look = "padding:0;color:inherit;font-weight:inherit;text-align:left"
    names = all(isinstance(value, str) for value in values)
    if names:
        marks = [" selected" * (i == start) for i in range(len(frames))]
        items = zip(marks, (escape(name) for *_, name in frames), strict=True)
        options = "".join(
            f'<option value="{i}"{mark}>{name}</option>' for i, (mark, name) in enumerate(items)
        )
        control = _MENU.format(options=options)
    else:
        control = _RANGE.format(last=len(frames) - 1, start=start, text=escape(text))
    html = _SLIDER.format(
        **{"alt": escape(words), "label": escape(label), "control": control},
        caption=f'<figcaption style="{look}">{escape(caption)}</figcaption>' if caption else "",
        **{"png": png, "width": image.width, "height": image.height, "kind": "menu" if names else "slider"},
        frames=json.dumps(frames).replace("<", "\\u003c"),  # no "</script>" out of a text
    )
    if len(html) > _LARGEST:
        raise ValueError(
            f"values make a slider of {len(html):,} bytes, and {_LARGEST:,} is the most: use fewer."
        )
    return Output(text_html=html + _SCRIPT, image_png=png, text_plain=words)


def live() -> bool:
    """Whether somebody can use widgets: Colab, a Jupyter server or VS Code. GUIDELIB_LIVE decides first."""
    if chosen := os.environ.get("GUIDELIB_LIVE"):
        return chosen == "1"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    in_code = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return in_code or "google.colab" in sys.modules or "JPY_SESSION_NAME" in os.environ


def panel(function: Callable, **choices: Sequence):
    """Widgets that run `function(**choices)` again for every choice; make it the last line of a cell.

    Each keyword is an argument of `function` with the list of values to choose from: rising numbers become a
    slider, others a menu. The panel shows what the function prints, plots and returns, or its error.
    Outside a live notebook it prints one line and returns None; `function` does not run.
    """
    for name, values in choices.items():
        if not isinstance(values, (list, tuple, range)) or not values:
            raise ValueError(f"{name} must be a list of values to choose from, not {values!r}.")
    try:
        inspect.signature(function).bind(**choices)
    except TypeError as error:
        raise ValueError(f"choices must fit the arguments of the function: {error}.") from None
    if not live():
        return print(f"Run this notebook live to choose {', '.join(choices)} here.")
    import ipywidgets

    def control(name: str, values: Sequence):
        options = [(_text(value), value) for value in values]
        shared = {"options": options, "description": name, "style": {"description_width": "initial"}}
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if numbers and len(values) > 1 and list(values) == sorted(set(values)):
            # A slider that ran the computation at every step of a drag would queue up minutes of work.
            return ipywidgets.SelectionSlider(continuous_update=False, **shared)
        return ipywidgets.Dropdown(**shared)

    controls = {name: control(name, values) for name, values in choices.items()}
    # Keywords only: `interactive` would make widgets of its own for the defaults of `function`.
    return ipywidgets.interactive(lambda **chosen: function(**chosen), {"auto_display": True}, **controls)


def table(rows: Sequence[Mapping[str, Any]], *, caption: str = "") -> Output:
    """A table of rows that have the same keys; the first column names the row. A wide one scrolls by itself.

    Integers get thousands separators and floats four digits; give a string to choose otherwise.
    Columns of numbers are aligned right. Raises `ValueError` for no rows and for rows with different keys.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("rows must hold at least one row, not none.")
    header = list(rows[0])
    for i, row in enumerate(rows):
        if list(row) != header:
            raise ValueError(f"rows must all have the keys {header}; row {i} has {list(row)}.")
    body = [[_text(value) for value in row.values()] for row in rows]
    columns = list(zip(*body, strict=True))
    right = [all(re.match(r"[-+−~<>≈×]?\s?\d|–$", text) for text in column) for column in columns]

    widths = [max(map(len, (name, *column))) for name, column in zip(header, columns, strict=True)]

    def text(line: list[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    def html(line: list[str], first: str, other: str) -> str:
        cells = ""
        for i, content in enumerate(line):
            tag, end = other if i else first, "right" if right[i] else "left"
            look = f"padding:.2rem .5rem;text-align:{end}"
            if i == 0:  # it stays readable where it is held in place on a phone
                look += ";min-width:5.5rem"
            elif other == "td" and (right[i] or len(content) <= 12):
                look += ";white-space:nowrap"
            cells += f'<{tag} style="{look}">{escape(content)}</{tag[:2]}>'
        return f"<tr>{cells}</tr>"

    column, row = 'th scope="col"', 'th scope="row"'
    title = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    head, lines = html(header, column, column), "".join(html(line, row, "td") for line in body)
    # The class "dataframe" gives it the theme's, JupyterLab's and Colab's own table style, light and dark.
    return Output(
        text_html=f'<div role="group" tabindex="0" aria-label="{escape(caption or "Table")}" '
        f'style="overflow-x:auto"><table class="dataframe">{title}'
        f"<thead>{head}</thead><tbody>{lines}</tbody></table></div>",
        text_plain="\n".join(filter(None, [caption, *map(text, [header, ["-" * w for w in widths], *body])])),
    )
