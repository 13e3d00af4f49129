# SPDX-License-Identifier: Apache-2.0
"""Every page of the site in Chromium, wide and narrow: no request goes out, none complains, none scrolls sideways.

`make walk` builds the site and runs this. It is not among the tests of `make test`, which does not build the site.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest
from playwright.sync_api import Browser, sync_playwright

SITE = Path(__file__).parents[2] / "build" / "docs" / "html"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# 404.html is shown in place of pages at any depth: its links begin at the root of a server.
PAGES = [page for page in sorted(SITE.rglob("*.html")) if page.name != "404.html"]
PARTS = sorted({page.relative_to(SITE).parts[0] for page in PAGES})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


def faults(browser: Browser, pages: list[Path], width: int, colours: str) -> list[str]:
    """What is wrong with pages on a screen of that width."""
    found: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=colours)
    page, name = context.new_page(), ""  # one for all: opening it takes longer than a page does

    def note(what: str) -> None:
        found.append(f"{name}: {what}")

    page.on("console", lambda message: note(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: note(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:", "about:")) else note(request.url),
    )
    for file in pages:
        name = file.name
        page.goto(file.as_uri())
        page.wait_for_load_state("load")
        inner = page.evaluate("document.documentElement.scrollWidth")
        if inner > width:
            note(f"{inner} pixels wide on a screen of {width}")
    context.close()
    return found


def test_the_site_is_there():
    assert len(PAGES) > 100, "make docs builds it"


@pytest.mark.parametrize("part", ["learn", "fr/learn"])
def test_every_chapter_opens_as_a_notebook_and_as_a_script(part):
    """The same cells of code in both, and a link to each on the page."""
    chapters = [page for page in PAGES if page.parent == SITE / part and page.name[0].isdigit()]
    assert len(chapters) == 8
    for page in chapters:
        notebook = nbformat.reads(page.with_suffix(".ipynb").read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
        script = page.with_suffix(".py").read_text(encoding="utf-8")
        compile(script, page.stem, "exec")
        cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        assert cells == [
            cell.source for cell in jupytext.reads(script, fmt="py:percent").cells if cell.cell_type == "code"
        ]
        links = [f'href="{page.stem}{ending}"' for ending in (".ipynb", ".py")]
        assert [link for link in links if link not in page.read_text(encoding="utf-8")] == []


def test_explorers_are_in_their_pages(browser):
    """Each frame holds a page that has drawn itself, as wide as its place."""
    for name, count in {"index.html": 1, "fr/index.html": 1, "gallery/explorers.html": 4}.items():
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.goto((SITE / name).as_uri())
        frames = page.locator("iframe.explorer")
        assert frames.count() == count
        for number in range(count):
            frames.nth(number).scroll_into_view_if_needed()
            inside = frames.nth(number).content_frame
            inside.locator("html[data-ready]").wait_for(state="attached")
            assert inside.locator("html").evaluate("html => html.scrollWidth - html.clientWidth") == 0
        page.close()


def test_examples_are_shown_with_the_names_that_they_use():
    text = (SITE / "reference" / "api" / "nearsight.Window.html").read_text(encoding="utf-8")
    assert "Examples that use this" in text
    assert "gallery/examples/plot_windows.html" in text


@pytest.mark.parametrize(("width", "colours"), [(1300, "light"), (390, "dark")])
@pytest.mark.parametrize("part", PARTS)
def test_walk(browser, part, width, colours):
    pages = [page for page in PAGES if page.relative_to(SITE).parts[0] == part]
    assert faults(browser, pages, width, colours) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<div style="width: 500px">wide</div>', "500"),
        ("<script>nothing.there</script>", "nothing is not defined"),
        ('<img src="https://example.org/x.png">', "https://example.org/x.png"),
    ],
)
def test_a_wrong_page_is_found_out(browser, tmp_path, body, fault):
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><link rel="icon" href="data:,"><body style="margin: 0">{body}</body>')
    assert fault in "\n".join(faults(browser, [page], 390, "light"))
    page.write_text('<!doctype html><link rel="icon" href="data:,"><body>good</body>')
    assert faults(browser, [page], 390, "light") == []
