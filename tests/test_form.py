"""The form of the pages in a real browser: what only a browser knows of the rules in notebook_rules."""

import notebook_rules as rules
import pytest

SCREEN, SCREENS, MORE = 900, 15, {"additive/adapters": 18}  # 900 pixels high; the most of a method's page
PAGES = [page.removeprefix("notebooks/") for page in rules.pages() if page.startswith("notebooks/")]


@pytest.fixture(scope="module", params=PAGES)
def opened(request, browser, book):
    """The name of a page in the form, and the page."""
    context = browser.new_context(viewport={"width": 1280, "height": SCREEN})
    page = context.new_page()
    page.goto((book.html / f"notebooks/{request.param}.html").as_uri(), wait_until="load")
    page.evaluate("() => window.MathJax?.startup?.promise")
    yield request.param, page
    context.close()


def test_there_are_pages():
    assert {"reparametrization/lora", "foundations/first_run"} <= set(PAGES)


def test_a_method_takes_few_screens(opened):
    name, page = opened
    height = page.evaluate("() => document.documentElement.scrollHeight")
    assert height <= SCREEN * MORE.get(name, SCREENS), f"{height / SCREEN:.1f} screens"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_its_box(opened, width):
    """Code, messages, pictures. A table may be, on a phone, where it scrolls."""
    page = opened[1]
    page.set_viewport_size({"width": width, "height": SCREEN})
    selector = "article pre, article figure" + (", article [role=group]" if width == 1280 else "")
    page.evaluate("() => document.querySelectorAll('details').forEach(each => { each.open = true })")
    wide = page.eval_on_selector_all(
        selector,
        """nodes => nodes.filter(node => node.scrollWidth > node.clientWidth + 1)
            .map(node => `${node.scrollWidth} > ${node.clientWidth}: ${node.textContent.slice(0, 50)}`)""",
    )
    page.evaluate("() => document.querySelectorAll('details').forEach(each => { each.open = false })")
    page.set_viewport_size({"width": 1280, "height": SCREEN})
    assert not wide


def test_88_columns_of_code_fit_a_line(opened):
    """A line of as many columns as notebook_rules allows is not broken at 1280 px."""
    lines = opened[1].evaluate(
        """columns => [...document.querySelectorAll('div.cell_input pre')].slice(0, 3).map(pre => {
            const probe = pre.cloneNode(false);
            probe.textContent = 'x'.repeat(columns);
            pre.after(probe);
            const one = probe.getBoundingClientRect().height;
            probe.textContent = 'x';
            const height = probe.getBoundingClientRect().height;
            probe.remove();
            return one / height;
        })""",
        rules.COLUMNS,
    )
    visible = [ratio for ratio in lines if ratio == ratio]  # what is folded has no height
    assert visible and max(visible) == 1


def test_folds_say_what_is_in_them(opened):
    labels = opened[1].eval_on_selector_all(
        "div.cell details > summary .collapsed", "nodes => nodes.map(node => node.textContent.trim())"
    )
    solutions = sum("Solution" in label for label in labels)
    assert solutions >= 2 and "Set-up" in labels
    assert all(label in ("Solution", "Set-up") or label.startswith("Code of this") for label in labels)


def test_a_first_column_breaks_no_word_on_a_phone(opened):
    page = opened[1]
    page.set_viewport_size({"width": 390, "height": SCREEN})
    broken = page.evaluate(
        """() => [...document.querySelectorAll('article [role=group] tr > :first-child')].flatMap(cell => {
            const text = cell.firstChild;
            return text ? [...text.data.matchAll(/[^\\s-]+/g)].filter(word => {
                const range = document.createRange();
                range.setStart(text, word.index);
                range.setEnd(text, word.index + word[0].length);
                return range.getClientRects().length > 1;
            }).map(word => word[0]) : [];
        })"""
    )
    page.set_viewport_size({"width": 1280, "height": SCREEN})
    assert not broken


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_place_can_be_seen_on_any_page(opened, scheme):
    """Its lines and words take the colour of the text, which stands out from what is behind them."""
    name, page = opened
    if not page.locator("figure.guidelib-place svg").count():
        assert name.startswith(rules.OF_NO_METHOD)
        pytest.skip("a page of no method has none")
    page.evaluate("scheme => { document.documentElement.dataset.theme = scheme }", scheme)
    drawing = page.locator("figure.guidelib-place svg").first
    assert "five places" in drawing.get_attribute("aria-label")
    text, behind = drawing.evaluate(
        """svg => {
            let node = svg, colour = 'rgba(0, 0, 0, 0)';
            for (; node && colour === 'rgba(0, 0, 0, 0)'; node = node.parentElement)
                colour = getComputedStyle(node).backgroundColor;
            return [getComputedStyle(svg.querySelector('text')).fill, colour];
        }"""
    )
    page.evaluate("() => { document.documentElement.dataset.theme = 'light' }")
    assert contrast(text, behind) > 7


def contrast(*colours):
    """Of two colours such as "rgb(18, 18, 18)": WCAG 2.2."""

    def luminance(colour):
        shares = [int(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
        red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)
