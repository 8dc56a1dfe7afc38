"""Figures, sliders, panels, tables and listings: as data, in a kernel, and in a real browser."""

import base64
import io
import itertools
import json
import re
import sys
import textwrap

import ipywidgets
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from matplotlib.colors import rgb_to_hsv, to_rgb
from nbclient import NotebookClient
from PIL import Image

from guidelib.pages import viz

OLD_WIDGETS = ipywidgets.__version__.startswith("7.")

# How a colour looks with a kind of colour blindness, for linear RGB: Machado, Oliveira and Fernandes 2009.
SIGHT = {
    "full": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TOGETHER = [
    ("full", "head", "method", "other"),
    ("predicted", "measured"),
    ("weights", "gradients", "optimiser", "activations"),
    ("frozen", "trained"),
]


def linear(rgb):
    rgb = np.asarray(rgb)
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    dark, light = sorted(linear(rgb) @ [0.2126, 0.7152, 0.0722] for rgb in (a, b))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb):
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ rgb / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# What hue-rotate(180deg) does to RGB: W3C, Filter Effects Module Level 1, section 9.9.
HALF_TURN = [[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]]


def dark(rgb):
    """A colour of a picture on a dark page, after guide.css: invert(0.93) hue-rotate(180deg)."""
    return np.clip(HALF_TURN @ (0.93 - 0.86 * np.asarray(rgb)), 0, 1)


def test_the_tests_cover_all_colours():
    assert set(viz.COLOURS) == set(itertools.chain(*TOGETHER))


@pytest.mark.parametrize("names", TOGETHER, ids="-".join)
@pytest.mark.parametrize("sight", SIGHT)
def test_colours_that_appear_together_differ_for_every_sight(names, sight):
    for page, least in ((np.asarray, 20), (dark, 18)):
        shown = {name: linear(page(to_rgb(viz.COLOURS[name]))) for name in names}
        seen = {name: lab(np.clip(SIGHT[sight] @ colour, 0, 1)) for name, colour in shown.items()}
        for a, b in itertools.combinations(names, 2):
            assert np.linalg.norm(seen[a] - seen[b]) > least, (a, b)


def test_a_picture_lies_on_the_dark_page_and_keeps_its_hues():
    assert np.allclose(255 * dark((1, 1, 1)), 18, atol=0.5)  # the theme's #121212
    for name in ("method", "other", "predicted"):
        before, after = (
            rgb_to_hsv(colour)[0] for colour in (to_rgb(viz.COLOURS[name]), dark(to_rgb(viz.COLOURS[name])))
        )
        assert abs(before - after) < 0.03, name


@pytest.mark.parametrize("name", viz.COLOURS)
def test_colours_stand_out_from_the_background(name):
    rgb = to_rgb(viz.COLOURS[name])
    assert contrast(rgb, (1, 1, 1)) > 3
    assert contrast(dark(rgb), dark((1, 1, 1))) > 3


def test_lines_differ_without_colour():
    shapes = [(line["marker"], line["linestyle"]) for line in viz.LINES.values()]
    assert len(set(shapes)) == len(shapes)
    with viz.style():
        cycle = [json.dumps(entry["linestyle"]) for entry in plt.rcParams["axes.prop_cycle"]]
    assert len(set(cycle)) == len(cycle)


def test_style_returns_what_was_there():
    with matplotlib.rc_context({"font.size": 31, "axes.titlesize": "xx-large"}):
        before = dict(matplotlib.rcParams)
        with viz.style():
            assert plt.rcParams["font.size"] == 12
            assert plt.rcParams["axes.facecolor"] == "white"
            assert plt.rcParams["figure.facecolor"] == "white"  # opaque: the dark page does not shine through
        assert dict(matplotlib.rcParams) == before


def draw(ax, r):
    ax.plot([1, 2, 3], [r, 2 * r, 3 * r], **viz.LINES["method"])
    ax.set_title(f"rank {r}")


def describe(r):
    return f'A line that rises to {3 * r} </script> & "so"'


def bundle(**options):
    defaults = {"values": [1, 2, 1000], "label": "Rank r <", "alt": describe, "caption": "It rises & rises."}
    return viz.slider(draw, **{**defaults, **options})._repr_mimebundle_()


def test_slider_is_deterministic():
    first = bundle()
    with matplotlib.rc_context({"font.size": 31, "figure.dpi": 50, "figure.facecolor": "black"}):
        plt.figure()
        assert bundle() == first  # nor do a reader's own settings change it
        plt.close("all")
    assert bundle(start=1) != first
    assert not plt.get_fignums()  # nothing is left for the notebook to show twice


def test_slider_stands_alone_where_scripts_are_removed():
    shown = bundle(start=1)
    soup = BeautifulSoup(shown["text/html"], "html.parser")
    for script in soup("script"):
        script.decompose()
    image = soup.img
    assert image["alt"] == shown["text/plain"] == describe(2)
    assert image["src"] == "data:image/png;base64," + shown["image/png"]
    with Image.open(io.BytesIO(base64.b64decode(shown["image/png"]))) as png:
        assert png.size == (int(image["width"]), int(image["height"])) == (748, 489)
        colours = png.convert("RGB").getcolors(1000)
        assert png.mode == "P" and max(colours)[1] == (255, 255, 255)
    assert soup.figcaption.text == "It rises & rises."
    assert soup.label.text.strip() == "Rank r <" and soup.label.input
    assert soup.output.text == soup.input["aria-valuetext"] == "2"
    assert not soup.find(id=True)  # equal sliders on one page cannot clash
    assert repr(viz.slider(draw, [1, 2], label="r", alt="A line")) == "A line"
    assert "figcaption" not in bundle(caption="")["text/html"]


def test_slider_asks_for_nothing_and_animates_nothing():
    html = re.sub(r"[A-Za-z0-9+/=]{200,}", "", bundle()["text/html"])
    assert not re.search(
        r"https?:|src=(?!\"data:image/png;base64,)|url\(|import|fetch|transition|animation", html
    )
    assert len(bundle()["text/html"]) < 100_000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"values": [1]}, "at least two values"),
        ({"start": 3}, "start must be an index into the 3 values"),
        ({"start": -1}, "start must be"),
        ({"start": 1.0}, "start must be"),
        ({"alt": " "}, "alt must describe"),
        ({"alt": lambda r: None}, "alt must describe the picture in words, not None"),
        ({"values": range(1, 6)}, "50,000 is the most"),
    ],
)
def test_slider_refuses(options, words, monkeypatch):
    assert viz._LARGEST == 1_000_000
    monkeypatch.setattr(viz, "_LARGEST", 50_000)
    with pytest.raises(ValueError, match=words):
        bundle(**options)


def test_slider_notices_drawing_beside_the_axes():
    with pytest.raises(ValueError, match="draw left the axes empty at value 1"):
        viz.slider(lambda ax, r: plt.plot([1, 2]), [1, 2], label="r", alt="A line")
    plt.close("all")


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("GUIDELIB_LIVE", "1")


def test_panel_outside_alive_notebook(monkeypatch, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    monkeypatch.delenv("GUIDELIB_LIVE", raising=False)
    calls = []
    for setting in (None, "0"):
        if setting:
            monkeypatch.setenv("GUIDELIB_LIVE", setting)
            monkeypatch.setenv("JPY_SESSION_NAME", "a.ipynb")
        assert viz.panel(lambda r, scale=1: calls.append(r), r=[1, 2], scale=[1]) is None
        assert capsys.readouterr().out == "Run this notebook live to choose r, scale here.\n"
    assert not calls


def test_what_counts_aslive(monkeypatch):
    monkeypatch.delenv("GUIDELIB_LIVE", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not viz.live()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "google.colab", sys)
        assert viz.live()
        patch.setenv("GUIDELIB_LIVE", "0")
        assert not viz.live()
    with monkeypatch.context() as patch:
        patch.setenv("JPY_SESSION_NAME", "lora.ipynb")
        assert viz.live()
    import IPython

    shell = type("Shell", (), {"user_ns": {"__vsc_ipynb_file__": "lora.ipynb"}})
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert viz.live()


def test_panel_runs_the_function_again(live):
    calls = []
    panel = viz.panel(
        lambda r, name, scale=1.5: calls.append((r, name, scale)), r=[1, 2, 1024], name=["q", "v"]
    )
    slider, menu = panel.children[:2]
    assert [type(control).__name__ for control in (slider, menu)] == ["SelectionSlider", "Dropdown"]
    assert [text for text, _ in slider.options] == ["1", "2", "1,024"]
    slider.value = 1024
    menu.value = "v"
    first = [] if OLD_WIDGETS else [(1, "q", 1.5)]  # ipywidgets 7 waits until it is shown
    assert calls == [*first, (1024, "q", 1.5), (1024, "v", 1.5)]


def test_panel_refuses(live):
    for wrong in ([], 3, "qv"):
        with pytest.raises(ValueError, match="r must be a list of values"):
            viz.panel(lambda r: r, r=wrong)
    for choices in ({}, {"r": [1], "s": [1]}):
        with pytest.raises(ValueError, match="choices must fit the arguments"):
            viz.panel(lambda r: r, **choices)


def test_panel_in_a_kernel_shows_output_figure_result_and_error(live):
    cells = [
        """
        import matplotlib.pyplot as plt
        from guidelib.pages import viz
        def compute(r):
            print("rank", r)
            with viz.style():
                plt.plot([0, r])
            return {"inverse": 1 / r}
        panel = viz.panel(compute, r=[4, 2, 0])
        panel
        """,
        "panel.children[0].value = 2",
        "panel.children[0].value = 0",
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell)) for cell in cells]
    )
    client = NotebookClient(notebook, kernel_name="python3", timeout=60)
    # Without a front end for widgets, what the panel shows becomes the cell's output. nbclient's own front
    # end would send messages, and now and then one of them hides a reply of the kernel until the time-out.
    client.comm_open_handlers = {}
    client.execute()
    shown = [json.dumps(cell.outputs) for cell in notebook.cells]
    if not OLD_WIDGETS:  # without a front end, ipywidgets 7 clears it away
        assert "application/vnd.jupyter.widget-view+json" in shown[0]
    for output, rank in zip(shown, (4, 2), strict=False):
        assert f"rank {rank}" in output and f"'inverse': {1 / rank}" in output and "image/png" in output
    assert "rank 0" in shown[2] and "ZeroDivisionError" in shown[2]


ROWS = [
    {"method": "LoRA <r>", "parameters": 12_345_678, "share": "0.3 %", "merges": True, "bytes": None},
    {"method": "BitFit", "parameters": 3, "share": "10.2 %", "merges": False, "bytes": 0.123456},
]


def test_table():
    made = viz.table(ROWS, caption="Counts")
    assert repr(made) == textwrap.dedent("""\
        Counts
        method    parameters   share  merges   bytes
        --------  ----------  ------  ------  ------
        LoRA <r>  12,345,678   0.3 %  yes          –
        BitFit             3  10.2 %  no      0.1235""")
    soup = BeautifulSoup(made._repr_mimebundle_()["text/html"], "html.parser")
    assert soup.caption.text == "Counts"
    assert [(cell.text, cell["scope"]) for cell in soup.thead("th")] == [(name, "col") for name in ROWS[0]]
    assert [(cell.text, cell["scope"]) for cell in soup.tbody("th")] == [
        ("LoRA <r>", "row"),
        ("BitFit", "row"),
    ]
    ends = [re.search("text-align:(left|right)", cell["style"])[1] for cell in soup.tbody.tr(["th", "td"])]
    assert ends == ["left", "right", "right", "left", "right"]
    assert repr(viz.table([{"loss": 1234.5678}, {"loss": 1e-8}])) == " loss\n-----\n1,235\n1e-08"
    assert repr(viz.table([{"n": np.int64(1234567)}, {"n": np.float32(0.123456789)}])).split()[-2:] == [
        "1,234,567",
        "0.1235",
    ]


@pytest.mark.parametrize("zero", [-0.0, "-0.0", "−0.00", -0])
def test_no_table_has_a_negative_zero(zero):
    assert repr(viz.table([{"gain": zero}])).split()[-1] in ("0", "0.0", "0.00")
    assert repr(viz.table([{"gain": "-0.01"}])).split()[-1] == "-0.01"


def test_table_refuses():
    with pytest.raises(ValueError, match="at least one row"):
        viz.table([])
    with pytest.raises(ValueError, match=r"row 1 has \['b'\]"):
        viz.table([{"a": 1}, {"b": 1}])


NAMES = {"values": ["LoRA", "R < B"], "start": 1, "alt": lambda name: f"A line, {name}."}


def named(ax, name):
    draw(ax, len(name))


def test_names_are_chosen_from_a_menu():
    html = viz.slider(named, label="method", **NAMES)._repr_mimebundle_()["text/html"]
    soup = BeautifulSoup(html, "html.parser")
    assert [option.text for option in soup.label.select("option")] == NAMES["values"]
    assert soup.select_one("option[selected]").text == "R < B" and soup.img["alt"] == "A line, R < B."
    assert not soup("input") and soup.figure["class"] == ["guidelib-menu"]


# From here on in a browser. Its event loop would be in the way of the kernel above.
@pytest.fixture
def open_page(browser):
    """Shows HTML on a phone without a network; fails on any request or error."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    problems = []
    context.route("**/*", lambda route: (problems.append(route.request.url), route.abort()))

    def show(body, colours="background:white;color:#222"):
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.set_content(
            f'<!doctype html><html lang="en"><title>Test</title><body style="{colours}"><main>'
            f"<h1>Test</h1>{body}</main></body></html>"
        )
        return page

    yield show
    context.close()
    assert not problems


def state(figure):
    image = figure.locator("img")
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 748
    announced = figure.locator("output").inner_text()
    assert figure.locator("input").get_attribute("aria-valuetext") == announced
    return announced, image.get_attribute("alt"), image.get_attribute("src")


def test_a_menu_changes_its_own_picture(open_page):
    made = [viz.slider(named, label="method", **NAMES)._repr_mimebundle_()["text/html"] for _ in range(2)]
    page = open_page("".join(made))
    first, second = page.locator("figure.guidelib-menu img").all()
    before = first.get_attribute("src")
    page.get_by_label("method").first.select_option("LoRA")
    assert first.get_attribute("alt") == "A line, LoRA." and first.get_attribute("src") != before
    assert second.get_attribute("src") == before and second.get_attribute("alt") == "A line, R < B."


def test_two_equal_sliders_move_by_keyboard_and_apart(open_page):
    page = open_page(bundle()["text/html"] * 2)
    first, second = page.locator("figure.guidelib-slider").all()
    start = state(first)
    assert start == state(second) and start[:2] == ("1", describe(1))
    first.locator("input").focus()
    page.keyboard.press("ArrowRight")
    middle = state(first)
    assert middle[:2] == ("2", describe(2)) and middle[2] != start[2]
    page.keyboard.press("End")
    assert state(first)[:2] == ("1,000", describe(1000))
    assert state(second) == start
    page.keyboard.press("Home")
    assert state(first) == start
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    assert state(second) == middle and state(first) == start


def test_slider_is_found_by_its_label_and_touch(open_page):
    page = open_page(bundle(start=2)["text/html"])
    handle = page.get_by_role("slider", name="Rank r <", exact=True)
    box = handle.bounding_box()
    assert box["height"] >= 24 and box["width"] > 100
    page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
    assert state(page.locator("figure"))[0] == "1"


@pytest.mark.parametrize("order", ["script first", "script last"])
def test_slider_may_be_inserted_before_or_after_its_script(open_page, order):
    page = open_page('<div id="here"></div>')
    figure, script = re.fullmatch(r"(.*</figure>)<script>(.*)</script>", bundle()["text/html"], re.S).groups()
    steps = [
        lambda: page.evaluate("script => { (0, eval)(script) }", script),
        # As notebooks do it: scripts inside do not run.
        lambda: page.evaluate("html => { document.getElementById('here').innerHTML = html }", figure),
    ]
    for step in steps if order == "script first" else reversed(steps):
        step()
    page.locator("input").focus()
    page.keyboard.press("ArrowRight")
    assert state(page.locator("figure"))[:2] == ("2", describe(2))


@pytest.mark.parametrize(
    "colours", ["background:white;color:#222", "background:#111;color:#ddd"], ids=["light", "dark"]
)
def test_accessible_and_readable_on_a_phone(open_page, colours):
    page = open_page(
        bundle()["text/html"] + viz.table(ROWS * 3, caption="Counts")._repr_mimebundle_()["text/html"],
        colours,
    )
    wanted = page.evaluate("() => getComputedStyle(document.body).color")
    for part in ("figcaption", "label", "output", "td", "caption"):
        assert page.locator(part).first.evaluate("node => getComputedStyle(node).color") == wanted
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert Axe().run(page).response["violations"] == []
