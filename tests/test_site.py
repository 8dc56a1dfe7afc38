"""The site around the pages: the first page, the order of the chapters, type, print, glossary, search."""

import importlib.util
import re
from urllib.parse import urldefrag, urljoin

import notebook_rules as rules
import numpy as np
import pytest
import yaml
from bs4 import BeautifulSoup, SoupStrainer
from PIL import Image

LANDING, GLOSSARY = rules.ROOT / "book/intro.md", rules.ROOT / "book/glossary.md"
TOC = yaml.safe_load((rules.ROOT / "_toc.yml").read_text(encoding="utf-8"))
CHAPTERS = {  # title -> pages; the first part and the last are not about methods
    part["caption"]: [page["file"] for page in part["chapters"]] for part in TOC["parts"][1:-1]
}
FIRST_RUN = "notebooks/foundations/first_run"


def soup(book, page, *only):
    text = (book.html / f"{page}.html").read_text(encoding="utf-8")
    return BeautifulSoup(text, "html.parser", parse_only=SoupStrainer(only) if only else None)


def targets(links):
    """The pages that links of the first page lead to."""
    return [urljoin("book/", urldefrag(link["href"])[0]).removesuffix(".html") for link in links]


# --- the first page --------------------------------------------------------


@pytest.fixture(scope="module")
def landing():
    spec = importlib.util.spec_from_file_location("landing", rules.ROOT / "tools/landing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figure_and_the_pictures_are_the_computed_ones(landing, tmp_path, monkeypatch):
    page, static = landing.PAGE, landing.STATIC
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / "intro.md"
    copy.write_text(text.replace("380.8 MiB", "99 MiB"), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != text
    monkeypatch.setattr(landing, "PAGE", copy)
    monkeypatch.setattr(landing, "STATIC", tmp_path)
    landing.main()
    assert copy.read_text(encoding="utf-8") == text, "run python tools/landing.py"
    assert (tmp_path / "favicon.svg").read_text() == (static / "favicon.svg").read_text()
    drawn, stored = (np.asarray(Image.open(p / "card.png").convert("RGB")) for p in (tmp_path, static))
    assert drawn.shape == stored.shape == (630, 1200, 3)
    # other versions of the drawing libraries smooth the edges of letters in other ways
    assert np.abs(drawn.astype(int) - stored.astype(int)).mean() < 2
    assert (static / "card.png").stat().st_size < 25_000
    assert f"# {landing.TITLE}\n" in text
    copy.write_text("# A page\n", encoding="utf-8")
    with pytest.raises(ValueError, match="can be put there"):
        landing.main()


@pytest.fixture
def opened(browser, book):
    """Opens pages without a network."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()

    def show(name, theme="light"):
        page.goto((book.html / f"{name}.html").as_uri(), wait_until="load")
        page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        return page

    yield show
    context.close()


def test_the_first_screen_says_what_this_is(opened):
    page = opened("book/intro")
    title = page.locator("article h1").evaluate("""node => [node.getBoundingClientRect().height,
        parseFloat(getComputedStyle(node).fontSize)]""")
    assert title[0] < 2 * title[1], "the title takes more than one line"
    for part in (".guide-memory", ".guide-bar >> visible=true", ".guide-buttons a"):
        for node in page.locator(part).all():
            box = node.bounding_box()
            assert box["height"] and box["y"] + box["height"] <= 800, f"{part} is not on the first screen"
    looks = page.locator(".guide-buttons a").evaluate_all("""nodes => nodes.map(
        node => ['font', 'padding', 'borderWidth'].map(key => getComputedStyle(node)[key]))""")
    assert len(looks) == 3 and looks[0] == looks[1] == looks[2], "a button looks unlike the others"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_figure_is_live(opened, theme):
    """The arrow keys choose a method. Its bar is described in words, and as long as the words say."""
    page = opened("book/intro", theme)
    buttons = page.locator(".guide-memory input")
    buttons.first.focus()
    seen = []
    for _ in range(buttons.count()):
        bars = page.locator(".guide-bar >> visible=true")
        assert bars.count() == 2
        words = bars.nth(1).get_attribute("aria-label")
        sizes = [
            [float(x) for x in re.findall(r"([\d.]+) MiB", b.get_attribute("aria-label"))] for b in bars.all()
        ]
        widths = bars.nth(1).evaluate(
            "bar => [...bar.children].map(c => c.getBoundingClientRect().width / bar.clientWidth)"
        )
        assert widths == pytest.approx([size / sum(sizes[0]) for size in sizes[1]], abs=0.005)
        seen.append(words)
        page.keyboard.press("ArrowRight")
    assert len(set(seen)) == buttons.count() == len(seen) > 3
    assert page.locator(".guide-bar >> visible=true").nth(1).get_attribute("aria-label") == seen[0]


def test_the_buttons_lead_to_the_first_thing_to_read(book):
    read, colab, teach = soup(book, "book/intro").select(".guide-buttons a")
    assert targets([read]) == [FIRST_RUN]
    assert colab["href"] == rules.colab(rules.ROOT / f"{FIRST_RUN}.ipynb")
    assert targets([teach]) == ["book/how-to-use"]


def test_the_map_leads_to_every_method_that_is_written(book):
    links = targets(soup(book, "book/intro").select("#fig-taxonomy a"))
    methods = [page for title, pages in CHAPTERS.items() if title != "Foundations" for page in pages]
    others = tuple(f"notebooks/{name}" for name in rules.OF_NO_METHOD)
    assert {*links} == {page for page in methods if not page.startswith(others)}


def test_the_chapters_stand_in_the_order_of_the_menu(book):
    page = soup(book, "book/intro")
    cards = page.select(".guide-chapter")
    states = [card.select_one(".sd-badge").text for card in cards]
    written = {
        card.select_one(".sd-card-title").text.strip(): targets(card.select("li a"))
        for card, state in zip(cards, states, strict=True)
        if state == "Written"
    }
    assert list(written.items()) == list(CHAPTERS.items())
    assert states == sorted(states, key=["Written", "To come"].index)
    assert all(not card.select("a") for card, state in zip(cards, states, strict=True) if state == "To come")
    menu = [link["href"] for link in page.select(".bd-sidebar-primary li a")]
    assert [p for p in targets([{"href": href} for href in menu]) if p.startswith("notebooks/")] == [
        p for pages in CHAPTERS.values() for p in pages
    ]


def test_the_order_that_readers_need():
    order = [p.split("/")[-1] for p in rules.pages()]
    start = [p for p in order if p in ("first_run", "anatomy", "backbones", "memory", "adapters")]
    assert start == ["first_run", "anatomy", "backbones", "memory", "adapters"]
    assert order[order.index("qlora") + 1] == "keep_less"


# --- what search engines and chats show ------------------------------------


def properties(page):
    return {m.get("property") or m.get("name"): m["content"] for m in page.select("meta[content]") if m.attrs}


def test_every_page_says_what_it_is(book):
    base = rules.CONFIG["html"]["baseurl"]
    owner, name = rules.REPOSITORY.removeprefix("https://github.com/").split("/")
    assert base == f"https://{owner}.github.io/{name}/"
    descriptions = {}
    for page in ["index", *rules.pages()]:
        shown = soup(book, page, "meta", "link", "h1")
        meta = properties(shown)
        assert meta["og:title"] and "<" not in meta["og:title"]
        assert meta["description"] == meta["og:description"]
        assert 40 <= len(meta["description"]) <= 400 and "<" not in meta["description"], page
        assert meta["og:image"].startswith(base)
        assert (book.html / meta["og:image"].removeprefix(base)).is_file()
        assert meta["twitter:card"] == "summary_large_image" and len(meta["og:image:alt"].split()) > 10
        descriptions.setdefault(meta["description"], []).append(page)
        if page != "index":
            assert meta["og:title"] == shown.select("h1")[-1].get_text().removesuffix("#").strip()
            assert (book.html / page).parent.joinpath(shown.select_one("link[rel~=icon]")["href"]).is_file()
    assert not [pages for pages in descriptions.values() if len(pages) > 1]


def test_the_address_of_the_site_leads_to_the_first_page(browser, book):
    page = browser.new_page()
    page.goto((book.html / "index.html").as_uri())
    page.wait_for_url("**/book/intro.html")
    page.close()


# --- type ------------------------------------------------------------------

# What is wider than its box scrolls, and the box shows a shadow where it goes on.
CUT = """() => [...document.querySelectorAll(
    'article :is(section, div, p, li, dd, figure, fieldset, details, pre, table, td, th)')].filter(node => {
        if (node.scrollWidth <= node.clientWidth + 1 || node.clientWidth === 0) return false;
        const style = getComputedStyle(node);
        return style.overflowX !== 'auto' || !style.backgroundAttachment.includes('local');
    }).map(node => node.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("name", rules.pages())
def test_nothing_is_cut_and_everything_can_be_read(opened, name):
    page = opened(name)
    page.evaluate("() => window.MathJax?.startup?.promise")
    page.evaluate("() => document.querySelectorAll('details').forEach(details => { details.open = true })")
    sizes = """() => [...document.querySelectorAll('article :is(h1, h2, h3, h4)')]
        .filter(head => head.clientWidth).map(head => parseFloat(getComputedStyle(head).fontSize))"""
    for width, largest in ((1280, 36), (390, 28)):
        page.set_viewport_size({"width": width, "height": 844})
        assert not page.evaluate(CUT)
        assert max(page.evaluate(sizes)) <= largest
    columns = page.evaluate("""() => [...document.querySelectorAll(
        'article :is(.pst-scrollable-table-container, div[role=group]) :is(td, th):first-child')]
        .filter(cell => cell.clientWidth).map(cell => getComputedStyle(cell).position)""")
    assert set(columns) <= {"sticky"}
    page.set_viewport_size({"width": 1280, "height": 800})
    code = page.evaluate("""() => [...document.querySelectorAll('article .cell_input pre')].map(pre => {
        const ruler = document.createElement('span');
        ruler.textContent = 'x'.repeat(88);
        pre.append(ruler);
        const room = pre.getBoundingClientRect().right - parseFloat(getComputedStyle(pre).paddingRight);
        const over = ruler.getBoundingClientRect().width - (room - pre.getBoundingClientRect().left
            - parseFloat(getComputedStyle(pre).paddingLeft));
        ruler.remove();
        return over;
    })""")
    assert max(code, default=0) <= 0, "88 columns do not fit"
    faint = page.evaluate("""() => [...document.querySelectorAll('article :is(figcaption, caption)')].filter(
        c => getComputedStyle(c).color !== getComputedStyle(document.body).color
            || getComputedStyle(c).fontWeight < 400).length""")
    assert not faint
    # in the dark, pictures are turned over and lie on the page itself
    page.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(18, 18, 18)"
    looks = page.evaluate("""() => [...document.querySelectorAll('article img')].map(image =>
        [getComputedStyle(image).filter, getComputedStyle(image).backgroundColor])""")
    assert all(look == ["invert(0.93) hue-rotate(180deg)", "rgba(0, 0, 0, 0)"] for look in looks)


# --- paper -----------------------------------------------------------------


def test_on_paper_code_wraps_solutions_are_open_and_nothing_asks_to_be_pressed(opened):
    page = opened("notebooks/reparametrization/lora", "dark")
    state = """() => [document.documentElement.dataset.theme,
        document.querySelectorAll('details:not([open], .tag_hide-input details)').length]"""
    before = page.evaluate(state)
    assert before[0] == "dark" and before[1] >= 3
    page.emulate_media(media="print")
    page.evaluate("() => dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(state) == ["light", 0]
    assert not page.evaluate("""() => [...document.querySelectorAll(
        'button, input, .headerlink, nav.bd-links, .prev-next-footer, .tag_hide-input summary')]
        .filter(node => node.getClientRects().length).map(node => node.outerHTML.slice(0, 99))""")
    assert (
        page.evaluate("""() => [...document.querySelectorAll('article pre')].filter(pre =>
        pre.clientWidth && (pre.scrollWidth > pre.clientWidth + 1 ||
            getComputedStyle(pre).whiteSpace !== 'pre-wrap')).length""")
        == 0
    )
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.evaluate(state) == before
    assert page.pdf().startswith(b"%PDF")


# --- words and help --------------------------------------------------------


def entries(path):
    """Title of each section below the first -> its text."""
    parts = re.split(r"^## (.*)$", path.read_text(encoding="utf-8"), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True)), parts[::2]


def test_the_glossary_has_every_word_once_and_in_order():
    words, titles = entries(GLOSSARY)
    assert titles == sorted(set(titles), key=str.casefold) and len(titles) > 50
    long = [title for title, text in words.items() if len(re.findall(r"[.!?](\s|$)", text)) > 3]
    assert not long, f"more than three sentences: {long}"
    prose = [p for p in rules.ROOT.glob("book/*.md") if p != GLOSSARY]
    text = "\n".join(p.read_text(encoding="utf-8") for p in [*prose, *rules.notebooks()]).casefold()
    unused = [t for t in titles if t.casefold() not in text]
    assert not unused, f"no page says {unused}"


def test_the_words_that_the_pages_lean_on_are_explained():
    needed = (
        "anchors, attach, backbone, bottleneck, changed, crumbs, head, low rank, merge, operations, oracle, "
    )
    needed += "prefix, rank, role, saved activations, stored, targets, trainable"
    assert not set(needed.split(", ")) - set(entries(GLOSSARY)[1])


def test_a_word_has_an_address(book):
    page = soup(book, "book/glossary")
    for title in entries(GLOSSARY)[1]:
        assert page.find(id=re.sub(r"\W+", "-", title.casefold())), title
    assert "book/glossary" in rules.pages()
    for page in ("book/intro", "book/how-to-use"):
        hrefs = {link["href"].split("#")[0] for link in soup(book, page).select("article a[href]")}
        assert "glossary.html" in hrefs


def test_troubleshooting_quotes_what_is_said():
    text = (rules.ROOT / "book/troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### “(.*)”$", text, flags=re.M)
    sources = [rules.ROOT / "Makefile", *rules.ROOT.glob("guidelib/**/*.py")]
    said = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert len(quoted) > 5 and not [message for message in quoted if message not in said]


def test_how_to_use_names_the_address():
    text = (rules.ROOT / "book/how-to-use.md").read_text(encoding="utf-8")
    assert f"git clone {rules.REPOSITORY}\n" in text
