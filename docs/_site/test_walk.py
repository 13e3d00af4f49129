# SPDX-License-Identifier: Apache-2.0
"""Every page of the site in Chromium, wide and narrow: no request goes out, none complains, none scrolls sideways.

`make walk` builds the site and runs this. It is not among the tests of `make test`, which does not build the site.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

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
