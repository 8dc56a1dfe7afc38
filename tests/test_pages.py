"""The built pages in a real browser that has no network."""

import functools
import http.server
import re
import threading
from types import SimpleNamespace
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import notebook_rules as rules
import pytest
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup

# What the theme logs on each page, harmlessly; nothing else may be logged as an error.
THEME_ERRORS = ("Got invalid theme mode",)
# What is not ours to repair: the rule of axe-core, and the start of the element that breaks it.
THEME_VIOLATIONS = {
    # Sphinx marks a bibliography as a list, but its entries not as list items.
    ("aria-required-children", '<div role="list" class="citation-list">'),
}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): ...


@pytest.fixture(scope="module")
def site(book):
    """The address of the built book, served on this machine only."""
    handler = functools.partial(Handler, directory=book.html)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module", params=rules.pages())
def opened(request, browser, site):
    """One page of the table of contents in a fresh browser context, and what happened while it was open."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    seen = SimpleNamespace(name=request.param, page=context.new_page(), outside=[], errors=[], not_found=[])

    def guard(route):
        if route.request.url.startswith(site):
            route.continue_()
        else:
            seen.outside.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    seen.page.on("console", lambda message: message.type == "error" and seen.errors.append(message.text))
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("response", lambda response: response.status >= 400 and seen.not_found.append(response.url))
    seen.page.goto(f"{site}{request.param}.html", wait_until="load")
    seen.page.evaluate("() => window.MathJax?.startup?.promise")
    # Chapters fold away solutions; what is inside is tested too.
    seen.page.evaluate(
        "() => document.querySelectorAll('details').forEach(details => { details.open = true })"
    )
    # All names, all numbers, ... in the code of a page look alike: of each kind, one is left to look at.
    seen.page.evaluate("""() => {
        const kinds = new Set()
        for (const token of document.querySelectorAll('pre span[class]')) {
            const kind = token.className + token.closest('.cell_input, .cell_output')?.className
            if (kinds.has(kind)) token.replaceWith(token.textContent)
            kinds.add(kind)
        }
    }""")
    yield seen
    context.close()


def source_of(page):
    """The Markdown of a page, without code."""
    path = rules.ROOT / f"{page}.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        cells = rules.read(rules.ROOT / f"{page}.ipynb").cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"(`+)[^`].*?\1", "", text, flags=re.S)


def test_mathematics_is_typeset(opened):
    containers = opened.page.locator("article mjx-container").count()
    assert containers == opened.page.locator("article .math").count()
    if re.search(r"\$[^$]+\$|\\begin\{", source_of(opened.name)):
        assert containers, "the source has mathematics and the page has none"
    assert (
        opened.page.locator("mjx-merror, [data-mjx-error], mjx-container [style*='color: red']").count() == 0
    )
    text = opened.page.evaluate("""() => {
        const article = document.querySelector('article').cloneNode(true);
        article.querySelectorAll('pre, code, script, style, mjx-container').forEach(node => node.remove());
        return article.textContent;
    }""")
    raw = re.search(r".*(\$\$|\\[(\[]|\$[^$\n]*\\[a-z]+[^$\n]*\$).*", text)
    assert not raw, f"mathematics is shown as source: {raw[0]}"


def test_sliders_move(opened):
    """One step with the keyboard changes the picture, its description, and what is announced."""
    stored = f"{opened.name}.ipynb"
    expected = 0
    if (rules.ROOT / stored).exists():
        outputs = rules.outputs(rules.read(rules.ROOT / stored))
        expected = sum(
            '<figure class="guidelib-slider"' in output.get("data", {}).get("text/html", "")
            for _, _, output in outputs
        )
    sliders = opened.page.locator("figure.guidelib-slider")
    assert sliders.count() == expected
    for slider in sliders.all():
        handle, image, announced = (
            slider.locator(part) for part in ("input[type=range]", "img", "output[aria-live]")
        )

        def state(handle=handle, image=image, announced=announced):
            return (
                image.evaluate("image => image.naturalWidth ? image.currentSrc : 'the image is broken'"),
                announced.inner_text(),
                handle.get_attribute("aria-valuetext"),
            )

        states = [state()]
        at_end = handle.evaluate("handle => handle.value === handle.max")
        handle.focus()
        for key in ("ArrowLeft", "ArrowRight") if at_end else ("ArrowRight", "ArrowLeft"):
            opened.page.keyboard.press(key)
            image.evaluate("image => image.decode()")
            states.append(state())
        start, moved, back = states
        assert all(before != after for before, after in zip(start, moved, strict=True)), (
            "the slider does not move"
        )
        assert back == start
        assert moved[0].startswith("data:image/")
        assert moved[1] == moved[2]


# In the dark nothing differs but the colours.
@pytest.mark.parametrize(
    ("scheme", "only"), [("light", {}), ("dark", {"runOnly": ["color-contrast"]})], ids=["light", "dark"]
)
def test_accessibility(opened, scheme, only):
    opened.page.evaluate("scheme => { document.documentElement.dataset.theme = scheme }", scheme)
    # Without preload: axe would look for the style sheets' own imports beside the page, and miss them.
    results = Axe().run(
        opened.page, context="article", options={"resultTypes": ["violations"], "preload": False} | only
    )
    opened.page.evaluate("() => { document.documentElement.dataset.theme = 'light' }")
    problems = [
        f"{violation['id']}: {node['html'][:300]}\n{node['failureSummary']}"
        for violation in results.response["violations"]
        for node in violation["nodes"]
        if violation["impact"] in ("serious", "critical")
        and not any(
            violation["id"] == rule and node["html"].startswith(start) for rule, start in THEME_VIOLATIONS
        )
    ]
    assert not problems, "\n".join(problems)


def test_images_are_described(opened):
    for alt in opened.page.eval_on_selector_all(
        "img", "images => images.map(image => image.getAttribute('alt'))"
    ):
        assert alt and alt.strip(), "an image has no alternative text"
        assert not re.fullmatch(r"\S*(/|\.(png|svg|jpe?g|gif|webp)$)\S*", alt), f"{alt!r} is a file name"


def test_a_phone_need_not_scroll_sideways(opened):
    opened.page.set_viewport_size({"width": 390, "height": 844})
    width = opened.page.evaluate("() => document.documentElement.scrollWidth")
    widest = opened.page.evaluate("""() => [...document.querySelectorAll('article *')]
        .filter(node => node.getBoundingClientRect().right > 390).map(node => node.outerHTML.slice(0, 99))""")
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    assert width <= 390, f"the page is {width} px wide; perhaps because of {widest[:3]}"


def test_the_menu_opens_on_a_phone(opened):
    opened.page.set_viewport_size({"width": 390, "height": 844})
    opened.page.locator("button.primary-toggle:visible").click()
    menu = opened.page.locator("#pst-primary-sidebar-modal")
    assert menu.is_visible() and menu.get_by_role("link", name="Notation").is_visible()
    opened.page.keyboard.press("Escape")
    opened.page.set_viewport_size({"width": 1280, "height": 900})


def test_colab_button(opened):
    """Chapters can be opened in Colab, at the address that the notebook itself names; other pages cannot.
    The first page opens a chapter."""
    links = opened.page.eval_on_selector_all(
        "a[href*='colab.research.google.com']", "links => links.map(a => a.href)"
    )
    notebook = rules.ROOT / f"{opened.name}.ipynb"
    if opened.name == rules.pages()[0]:
        assert len(links) == 1 and links[0] in map(rules.colab, rules.notebooks())
    else:
        assert set(links) == ({rules.colab(notebook)} if notebook.exists() else set())


# Last of those with an open page, so that all that the others set off is seen.
def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(opened):
    assert not opened.outside
    assert not opened.not_found
    assert not [error for error in opened.errors if not error.startswith(THEME_ERRORS)]


@pytest.mark.parametrize("page", rules.pages())
def test_local_links_lead_somewhere(book, page):
    @functools.cache
    def ids(path):
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        return {node[name] for node in soup.find_all(True) for name in ("id", "name") if node.has_attr(name)}

    here = f"http://site/{page}.html"
    soup = BeautifulSoup((book.html / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
    broken = []
    for link in soup.select("a[href], link[href]"):
        address, anchor = urldefrag(urljoin(here, link["href"]))
        if not address.startswith("http://site/") or link["href"] in ("#", ""):
            continue
        target = book.html / unquote(urlsplit(address).path).lstrip("/")
        if target.is_dir():
            target /= "index.html"
        if not target.is_file() or (
            anchor and target.suffix == ".html" and unquote(anchor) not in ids(target)
        ):
            broken.append(link["href"])
    assert not broken
