# SPDX-License-Identifier: Apache-2.0
"""The site's playground, in a browser: its geometry is that of Window, and hands, keys and readers all move it."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

import nearsight as ns
from nearsight.errors import OptionError
from nearsight.window import BORDERS, Axis

STATIC = Path(__file__).parents[1] / "docs" / "_static"
CELLS = (12, 16)
NAMES = {"kernel_size": "kernelSize", "shared_by": "sharedBy"}  # the script's, where they are others
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, folder, language="en", width=1300):
    """The page's figure alone, with what the browser complained of."""
    html = re.search(r"```\{raw\} html\n(.*?)```", (STATIC.parent / "learn" / "playground.md").read_text(), re.DOTALL)[
        1
    ]
    file = folder / "page.html"
    here = html.replace("../_static", STATIC.as_uri())
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    file.write_text(f'<!doctype html><html lang="{language}">{head}{here}')
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    return page, complaints


@pytest.fixture
def page(browser, tmp_path):
    page, complaints = opened(browser, tmp_path)
    yield page
    assert complaints == []
    page.close()


def some_axes(count: int) -> list[tuple[Axis, int]]:
    chance = random.Random(0)
    found = []
    while len(found) < count:
        kernel_size = chance.randint(1, 9)
        axis = Axis(
            kernel_size,
            stride=chance.randint(1, 3),
            dilation=chance.randint(1, 3),
            border=chance.choice(BORDERS),
            causal=chance.random() < 0.3,
            shared_by=chance.choice([1, 1, chance.randint(1, kernel_size)]),
        )
        found.append((axis, chance.randint(1, 20)))
    return found


ASKED = """cases => cases.map(([axis, cells]) => {
    const queries = NearsightWindow.outputSize(axis, cells);
    const neighbours = [...Array(queries).keys()].map(query => NearsightWindow.neighbours(axis, cells, query));
    return [neighbours, NearsightWindow.tableSize(axis), NearsightWindow.zeroEntry(axis)];
})"""


def test_its_geometry_is_that_of_window(page):
    cases = some_axes(100)
    asked = [[{NAMES.get(name, name): value for name, value in vars(axis).items()}, cells] for axis, cells in cases]
    for (axis, cells), (neighbours, table_size, zero) in zip(cases, page.evaluate(ASKED, asked), strict=True):
        assert neighbours == axis.neighbours(cells).tolist(), (axis, cells)
        assert (table_size, zero) == (axis.table_size, axis.zero), axis


def shown(page) -> tuple[ns.Window, str, dict[tuple[int, int], int]]:
    """The window that the page writes down, what it says of the query, and how often it marks each cell."""
    code = page.locator(".code").text_content()
    assert re.fullmatch(r"ns\.Window\([\w=\", ()]*\)", code)
    counts = json.loads(page.locator(".playground").get_attribute("data-seen"))
    return eval(code, {"ns": ns}), page.locator("[aria-live]").text_content(), {eval(cell): n for cell, n in counts}


def expected(window: ns.Window, query: tuple[int, int]) -> dict[tuple[int, int], int]:
    rows, columns = (
        [cell for cell in axis.neighbours(n)[place, :, 0].tolist() if cell >= 0]
        for axis, n, place in zip(window.axes(2), CELLS, query, strict=True)
    )
    found: dict[tuple[int, int], int] = {}
    for cell in [(row, column) for row in rows for column in columns]:
        found[cell] = found.get(cell, 0) + 1
    return found


def test_what_it_shows_is_what_the_code_that_it_writes_sees(page):
    for name in page.locator("select").first.locator("option").evaluate_all("all => all.map(one => one.value)"):
        if not name:
            continue
        page.locator("select").first.select_option(name)
        window, said, counts = shown(page)
        assert counts == expected(window, (5, 7)), name
        assert f"sees {len(counts)} cells" in said
        sizes = [axis.table_size for axis in window.axes(2)]
        assert f"have {sizes[0]} \N{MULTIPLICATION SIGN} {sizes[1]} entries" in said
        assert page.locator("svg.table rect").count() == sizes[0] * sizes[1] + 1
        assert page.locator("svg rect.seen").count() == len(counts)
        pairs = 1
        for axis, n in zip(window.axes(2), CELLS, strict=True):
            pairs *= int((axis.neighbours(n)[..., 0] != -1).sum())
        assert f" {pairs:,} pairs" in page.locator("p").last.text_content()


def test_it_is_moved_by_keys_alone(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.keyboard.press("Tab")
    for _ in range(2):
        page.keyboard.press("ArrowRight")  # the first slider: kernel_size
    assert shown(page)[0] == ns.Window(7)
    while page.evaluate("document.activeElement.tagName") != "svg":
        page.keyboard.press("Tab")
    for key in ["ArrowUp"] * 9 + ["ArrowLeft"] * 3:
        page.keyboard.press(key)
    window, said, counts = shown(page)
    assert counts == expected(window, (0, 4))
    assert "row 0, column 4 sees 28 cells" in said


def test_the_query_is_dragged(page):
    place = page.locator("svg").first
    place.scroll_into_view_if_needed()
    page.evaluate(
        "window.at = (row, column) => { const p = new DOMPoint(column, row).matrixTransform("
        "document.querySelector('svg').getScreenCTM()); return [p.x, p.y]; }"
    )
    page.mouse.move(*page.evaluate("at(5.5, 7.5)"))
    page.mouse.down()
    page.mouse.move(*page.evaluate("at(11.5, 15.5)"))
    page.mouse.up()
    page.mouse.move(*page.evaluate("at(3.5, 3.5)"))  # no button is held
    window, said, counts = shown(page)
    assert counts == expected(window, (11, 15))
    assert "row 11, column 15" in said


def test_a_window_is_shared_by_no_more_than_its_cells(page):
    page.locator("select").first.select_option("Swin")
    slider = page.locator("input[type=range]").first
    slider.fill("2")
    assert shown(page)[0] == ns.Window(2, shared_by=2)
    with pytest.raises(OptionError):
        ns.Window(2, shared_by=4)


@pytest.mark.parametrize("language", ["en", "fr"])
def test_it_fits_a_phone_and_speaks_the_page_s_language(browser, tmp_path, language):
    page, complaints = opened(browser, tmp_path, language, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    text = page.locator(".playground").inner_text()
    assert "undefined" not in text
    assert ("fenêtre" in text) == (language == "fr")
    assert ("The query" in text) == (language == "en")
    assert complaints == []
    page.close()
