"""The book builds from clean, and its pages in a real browser that has no network."""

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
# What fades in has a low contrast at first.
NOTHING_MOVES = "() => document.getAnimations().forEach(animation => animation.finish())"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): ...

    def do_GET(self):
        if self.path == "/favicon.ico":  # a browser asks for it by itself, and the book has none
            self.send_response(204)
            self.end_headers()
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def book(tmp_path_factory, build_book):
    """The book, built from clean outside the checkout, once for all tests."""
    return build_book(rules.ROOT, tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="module")
def site(book):
    """The address of the built book, served on this machine only."""
    handler = functools.partial(Handler, directory=book.html)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def tab(browser, site):
    """One page of the browser for all pages of the book, and what happens in it.

    A page of its own for each would load and compile the theme's scripts anew, and so would a route that
    guards the network; the browser itself has none (tests/conftest.py).
    """
    context = browser.new_context(viewport=DESKTOP)
    seen = SimpleNamespace(page=context.new_page(), outside=[], errors=[], not_found=[])
    seen.page.on("request", lambda request: request.url.startswith(site) or seen.outside.append(request.url))
    seen.page.on("console", lambda message: message.type == "error" and seen.errors.append(message.text))
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("response", lambda response: response.status >= 400 and seen.not_found.append(response.url))
    yield seen
    context.close()


@pytest.fixture(scope="module", params=rules.pages())
def opened(request, tab, site):
    """One page of the table of contents, and what happened since it was opened."""
    for happened in (tab.outside, tab.errors, tab.not_found):
        happened.clear()
    tab.name = request.param
    tab.page.set_viewport_size(DESKTOP)
    tab.page.goto(f"{site}{request.param}.html", wait_until="load")
    tab.page.evaluate("() => window.MathJax?.startup?.promise")
    # Chapters fold away solutions; what is inside is tested too.
    tab.page.evaluate(
        "() => document.querySelectorAll('details').forEach(details => { details.open = true })"
    )
    tab.page.evaluate(NOTHING_MOVES)
    return tab


def source_of(page):
    """The Markdown of a page, without code."""
    path = rules.ROOT / f"{page}.md"
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        cells = rules.read(rules.ROOT / f"{page}.ipynb").cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"(`+)[^`].*?\1", "", text, flags=re.S)


def test_the_book_builds_without_a_warning(book):
    assert book.exit_code == 0, book.log


@pytest.mark.parametrize("page", rules.pages())
def test_every_listed_page_is_built(book, page):
    assert (book.html / f"{page}.html").is_file()


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
            "guidelib-slider" in output.get("data", {}).get("text/html", "") for _, _, output in outputs
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


def same_words_once(page):
    """Leave of the highlighted code one word of each kind: thousands have the same few colours."""
    page.evaluate("""() => {
        const seen = new Set();
        const kind = node => node.tagName === 'ARTICLE' ? '' :
            `${node.tagName}.${node.className} ${node.getAttribute('style')} < ${kind(node.parentElement)}`;
        for (const word of document.querySelectorAll('article .highlight span')) {
            if (word.children.length) continue;
            if (seen.has(kind(word))) word.replaceWith(word.textContent); else seen.add(kind(word));
        }
        document.querySelector('article').normalize();
    }""")


# After those that look at the code, before those on a small screen.
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(opened, scheme):
    same_words_once(opened.page)
    opened.page.evaluate("scheme => { document.documentElement.dataset.theme = scheme }", scheme)
    opened.page.evaluate(NOTHING_MOVES)
    # Without preload: axe would look for the style sheets' own imports beside the page, and miss them.
    options = {"resultTypes": ["violations"], "preload": False}
    if scheme == "dark":  # what does not depend on colours was found in the light
        options["runOnly"] = ["color-contrast", "link-in-text-block"]
    results = Axe().run(opened.page, context="article", options=options)
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
    opened.page.set_viewport_size(PHONE)
    width = opened.page.evaluate("() => document.documentElement.scrollWidth")
    widest = opened.page.evaluate("""() => [...document.querySelectorAll('article *')]
        .filter(node => node.getBoundingClientRect().right > 390).map(node => node.outerHTML.slice(0, 99))""")
    assert width <= 390, f"the page is {width} px wide; perhaps because of {widest[:3]}"


def test_the_menu_opens_on_a_phone(opened):
    opened.page.set_viewport_size(PHONE)
    opened.page.locator("button.primary-toggle:visible").click()
    menu = opened.page.locator("#pst-primary-sidebar-modal")
    assert menu.is_visible() and menu.get_by_role("link", name="Notation").is_visible()
    opened.page.keyboard.press("Escape")


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


@functools.cache
def parsed(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def ids(path):
    return {node[name] for name in ("id", "name") for node in parsed(path).find_all(attrs={name: True})}


@pytest.mark.parametrize("page", rules.pages())
def test_local_links_lead_somewhere(book, page):
    here = f"http://site/{page}.html"
    broken = []
    for link in parsed(book.html / f"{page}.html").select("a[href], link[href]"):
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
