# SPDX-License-Identifier: Apache-2.0
"""The explorer, seen by a browser: what it draws are the weights that the model has. Screenshots are left in artifacts/."""

import base64
import csv
import io
import itertools
import re
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from timm.data import resolve_model_data_config
from torch import nn

import nearsight as ns
from nearsight import cli
from nearsight.errors import DataError, OptionError, ShapeError
from nearsight.inspect import equivariance_by_layer, explore, maps
from nearsight.inspect.equivariance import decisive
from nearsight.inspect.explore import Exploration, read_picture
from nearsight.inspect.transforms import Reflection, Translation
from nearsight.models import create_model
from nearsight.models.data_config import seen
from nearsight.models.first_weights import is_untrained
from nearsight.saved.opened import UNTRAINED
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, save_model
from nearsight.training.data import load_pictures

explorer = import_module("nearsight.inspect.explore")  # the package has a function of this name
ARTIFACTS = Path(__file__).parent.parent / "artifacts"
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
FLAGS = [f"--{flag}" for flag in (*FLAGS, "disable-component-update", "disable-sync")]
H, W = 10, 14  # of the image: rows and columns cannot be exchanged unseen
STEP = 1 / 255  # weights are stored in steps of the query's largest
MEAN, ROLLOUT = -1, -2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        ns.LocalSelfAttention2d(3, 8, 5, num_heads=2),
        nn.AvgPool2d(2),
        ns.HaloSelfAttention2d(8, block_size=3, halo_size=1, num_heads=2),
        ns.LocalSelfAttention2d(8, kernel_size=3, stride=2, num_heads=4, border="wrap", position="bias"),
        ns.GlobalSelfAttention2d(8, num_heads=2, position="learned", map_size=(3, 4)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def file(model, image, tmp_path_factory):
    page = ns.explore(model, image, classes=["cat", "dog", "<b>hen</b>"], title="A <b>small</b> net")
    return page.save(tmp_path_factory.mktemp("explore") / "page.html")


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page; afterwards, that it said nothing on the console and asked nothing of the network."""
    contexts, told, asked = [], [], []

    def visit(file, width=1280, height=900, touch=False, colours="light"):
        size = {"width": width, "height": height}
        context = browser.new_context(viewport=size, has_touch=touch, is_mobile=touch, color_scheme=colours)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        settle(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert sum(url.startswith("file:") for url in asked) == len(contexts)


def settle(page):
    """Wait until what was asked to be drawn is drawn."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def point_at(page, row, column):
    box = page.locator("#stage").bounding_box()
    page.mouse.move(box["x"] + (column + 0.5) * box["width"] / W, box["y"] + (row + 0.5) * box["height"] / H)
    settle(page)


def state(page):
    return page.evaluate("() => nearsight.state")


def shown(page, layer, head, row, column):
    """What the page holds of a head's memory block, on the cells of the layer's map."""
    found = page.evaluate(
        """([layer, head, y, x]) => {
            const found = nearsight.block(nearsight.layers[layer], head, y, x);
            return {...found, values: Array.from(found.values)};
        }""",
        [layer, head, row, column],
    )
    cells = np.zeros(found["map"])
    values = np.array(found["values"]).reshape(len(found["rows"]), len(found["columns"]))
    for (a, down), (b, across) in itertools.product(enumerate(found["rows"]), enumerate(found["columns"])):
        if down >= 0 and across >= 0:
            cells[down, across] += values[a, b]
    return cells


def drawn(page, rows, columns):
    """How opaque the overlay is in the middle of each cell, of so many, as a share of the full colour."""
    pixels = page.evaluate(
        """([rows, columns]) => {
            const overlay = document.getElementById("overlay"), canvas = new OffscreenCanvas(overlay.width, overlay.height);
            const context = canvas.getContext("2d", {willReadFrequently: true});
            context.drawImage(overlay, 0, 0);
            return Array.from({length: rows * columns}, (_, n) => context.getImageData(
                Math.floor((n % columns + 0.5) * canvas.width / columns),
                Math.floor((Math.floor(n / columns) + 0.5) * canvas.height / rows), 1, 1).data[3]);
        }""",
        [rows, columns],
    )
    return np.array(pixels).reshape(rows, columns) / 255 / 0.9


# ----------------------------------------------------------------------------------------------------- what is drawn


def test_moving_the_pointer_lights_up_the_weights_that_the_model_has(visit, file, model, image):
    """Of the first layer, from the operation on its own q and k and the oracle's memory blocks."""
    layer, page = model[0], visit(file)
    query, key, _ = (part.unflatten(1, (2, 4)).movedim(2, -1) for part in layer.qkv(image[None]).chunk(3, 1))
    relative = layer.tables_on((H, W))[1]
    weights = ns.attention_weights(query, key, ns.Window(5), relative=relative)[0].detach().numpy()
    axes = [oracle.Axis(H, 5), oracle.Axis(W, 5)]
    page.select_option("#head", "1")
    for row, column in [(4, 9), (0, 0), (9, 5), (3, 13)]:
        point_at(page, row, column)
        wanted, covered = np.zeros((2, H, W)), np.zeros((H, W), bool)
        for place, cell, _ in oracle.block(axes, (row, column)):
            wanted[(slice(None), *cell)] = weights[(slice(None), row, column, *place)]
            covered[cell] = True
        for head in (0, 1):
            found = shown(page, 0, head, row, column)
            np.testing.assert_allclose(found, wanted[head], atol=STEP * wanted[head].max())
        opaque = drawn(page, H, W)
        assert (opaque[~covered] == 0).all()
        full = max(wanted[1].max(), 2 / covered.sum())  # of a block where nothing is preferred all cells are pale
        np.testing.assert_allclose(opaque[covered], (wanted[1] / full)[covered], atol=0.015)
        share = 100 / covered.sum()
        assert f"(1/n is {share:.{int(share < 9.95)}f} %)" in page.text_content("#readout")
        assert f"Query at row {row}, column {column} of 10 \u00d7 14 cells" in page.text_content("#readout")


def test_every_layer_and_head_shows_its_own_weights(visit, file, model, image):
    page, found = visit(file), ns.attention_maps(model, image)
    assert page.evaluate("() => nearsight.layers.map(layer => layer.name)") == ["0", "2", "3", "4"]
    for row, column in [(0, 0), (5, 11), (9, 13)]:
        for index, layer in enumerate(found):
            block = layer.memory_block((row, column))
            for head, wanted in enumerate(block):
                np.testing.assert_allclose(shown(page, index, head, row, column), wanted, atol=STEP * wanted.max())
            mean = shown(page, index, MEAN, row, column)
            np.testing.assert_allclose(mean, block.mean(0), atol=STEP * block.max())


def test_the_small_pictures_follow_the_pointer_and_choose(visit, file):
    page = visit(file, height=1600)
    pictures = "() => [...document.querySelectorAll('.tile canvas')].map(canvas => canvas.toDataURL())"
    point_at(page, 2, 2)
    before = page.evaluate(pictures)
    point_at(page, 8, 12)
    after = page.evaluate(pictures)
    assert len(before) == (2 + 2 + 4 + 2) + 2 * 4  # the heads, and of each layer the mean and the rollout
    assert all(one != other for one, other in zip(before, after, strict=True))
    page.click(".layer:nth-child(3) .tile:nth-child(4)")
    assert (state(page)["layer"], state(page)["head"]) == (2, 2)
    assert page.locator(".tile[aria-pressed=true]").get_attribute("aria-label") == "3, head 3"
    assert page.input_value("#layer") == "2"


def test_all_small_pictures_are_on_paper(visit, file):
    """Those far below the screen too, which are else drawn when they are scrolled to."""
    page = visit(file, height=200)
    blank = """() => [...document.querySelectorAll(".tile canvas")].filter(canvas => canvas.toDataURL() ===
        Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height}).toDataURL()).length"""
    assert page.evaluate(blank) > 0
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(blank) == 0


def test_rollout_is_drawn(visit, file, model, image):
    page, found = visit(file), ns.attention_maps(model, image)
    pixels = [(0, 0), (6, 3), (9, 13)]
    for layer, (index, pixel) in itertools.product(range(4), enumerate(pixels)):
        wanted = ns.attention_rollout(found, pixels)[layer, index]
        np.testing.assert_allclose(shown(page, layer, ROLLOUT, *pixel), wanted, atol=STEP * wanted.max())
    page.select_option("#layer", "1")
    page.select_option("#head", str(ROLLOUT))
    point_at(page, 6, 3)
    wanted = ns.attention_rollout(found, [(6, 3)])[1, 0]
    np.testing.assert_allclose(drawn(page, H, W), wanted / wanted.max(), atol=0.015)


def test_position_tables_are_drawn(visit, file, model):
    page = visit(file)
    pictures = """() => [...document.querySelectorAll("#tables canvas")].map(canvas => [canvas.height, canvas.width,
        ...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data])"""
    page.select_option("#layer", "2")
    bias = model[3].tables_on((5, 7))[0].detach().numpy()
    found = page.evaluate(pictures)
    assert len(found) == 4
    for head, (rows, columns, *pixels) in enumerate(found):
        pixels = np.array(pixels).reshape(rows, columns, 4)
        np.testing.assert_allclose(pixels[..., 3] / 255, np.abs(bias[head]) / np.abs(bias).max(), atol=0.01)
        strong = pixels[..., 3] > 20
        np.testing.assert_array_equal((pixels[..., 0] < pixels[..., 2])[strong], (bias[head] > 0)[strong])
    page.select_option("#layer", "0")  # row and column vectors, of two heads each: offsets down, channels across
    assert [picture[:2] for picture in page.evaluate(pictures)] == [[5, 2]] * 4
    page.select_option("#layer", "3")  # an absolute embedding
    assert [picture[:2] for picture in page.evaluate(pictures)] == [[3, 4]] * 8


def test_prediction_and_names(visit, file, model, image):
    page = visit(file)
    probabilities = model(image[None])[0].softmax(0).tolist()
    names = page.locator("#bars dt").all_text_contents()
    assert sorted(names) == ["<b>hen</b>", "cat", "dog"]
    shares = [float(text.split()[0]) for text in page.locator("#bars dd:not([aria-hidden])").all_text_contents()]
    order = [["cat", "dog", "<b>hen</b>"].index(name) for name in names]
    np.testing.assert_allclose(shares, [100 * probabilities[index] for index in order], atol=0.5)
    assert shares == sorted(shares, reverse=True)
    assert page.text_content("h1") == "A <b>small</b> net"


def test_equivariance_has_a_section(visit, file, model, image):
    page, rows = visit(file), decisive(equivariance_by_layer(model, image, Translation(1, 1)))
    assert page.text_content("#transform") == "Translation(1, 1)"
    assert page.locator("#errors .track").count() == len(rows)
    names = page.locator("#errors > span:not(.amount)").all_text_contents()
    assert names == [row.layer for row in rows]
    worst = max(rows, key=lambda row: row.own or 0)
    assert page.text_content("#worst").startswith(f"{worst.layer} breaks it most: ")
    most = max(max(row.own or 0, row.error or 0) for row in rows)
    lengths = page.evaluate("""() => [...document.querySelectorAll("#errors .track")].map(track =>
        [...track.querySelectorAll("b")].reduce((sum, bar) => sum + bar.getBoundingClientRect().width, 0)
        / track.getBoundingClientRect().width)""")
    np.testing.assert_allclose(lengths, [(row.own or 0) / most for row in rows], atol=0.01)


# -------------------------------------------------------------------------------------------- keyboard, touch, screens


def test_the_keyboard(visit, file):
    page = visit(file)
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "stage"
    at = state(page)
    for key, (down, across) in {
        "ArrowRight": (0, 1),
        "ArrowDown": (1, 1),
        "ArrowLeft": (1, 0),
        "ArrowUp": (0, 0),
    }.items():
        page.keyboard.press(key)
        assert (state(page)["y"], state(page)["x"]) == (at["y"] + down, at["x"] + across)
    choices = [
        ("l", 1, MEAN),
        ("Shift+L", 0, MEAN),
        ("h", 0, 0),
        ("Shift+H", 0, MEAN),
        ("2", 0, 1),
        ("9", 0, 1),
        ("r", 0, ROLLOUT),
    ]
    for key, layer, head in [
        *choices,
        ("l", 1, ROLLOUT),
        ("m", 1, MEAN),
        ("l", 2, MEAN),
        ("l", 3, MEAN),
        ("l", 0, MEAN),
    ]:
        page.keyboard.press(key)
        assert (state(page)["layer"], state(page)["head"]) == (layer, head), key
    page.keyboard.press("l")
    page.keyboard.press("l")  # the strided layer: its queries are four pixels apart
    for _ in range(9):  # and at the edge it stops
        page.keyboard.press("ArrowLeft")
    assert 0 <= state(page)["x"] < 2
    page.keyboard.press("ArrowRight")
    assert 4 <= state(page)["x"] < 6
    zoom = state(page)["zoom"]
    page.keyboard.press("z")
    assert state(page)["zoom"] is not zoom


def test_a_click_holds_the_query(visit, file):
    page = visit(file)
    point_at(page, 3, 3)
    page.mouse.down()
    page.mouse.up()
    point_at(page, 8, 8)
    assert (state(page)["y"], state(page)["x"], state(page)["held"]) == (3, 3, True)
    assert page.text_content("#readout").endswith("Held.")
    page.click("#pin")
    point_at(page, 8, 8)
    assert (state(page)["y"], state(page)["x"]) == (8, 8)


def test_touch(visit, file):
    page = visit(file, width=390, height=844, touch=True)
    box = page.locator("#stage").bounding_box()

    def place(row, column):
        return {"x": box["x"] + (column + 0.5) * box["width"] / W, "y": box["y"] + (row + 0.5) * box["height"] / H}

    page.touchscreen.tap(**place(2, 11))
    assert (state(page)["y"], state(page)["x"]) == (2, 11)
    finger = page.context.new_cdp_session(page)
    for kind, points in (("Start", [place(5, 5)]), ("Move", [place(6, 6)]), ("Move", [place(8, 1)]), ("End", [])):
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
    settle(page)
    assert (state(page)["y"], state(page)["x"]) == (8, 1)
    assert page.evaluate("() => scrollY") == 0  # the finger moved the query and not the page


def test_a_tap_chooses(visit, file):
    page = visit(file, width=390, height=844, touch=True)
    page.locator(".layer:nth-child(2) .tile:nth-child(3)").tap()
    page.wait_for_function("() => nearsight.state.layer === 1 && nearsight.state.head === 1")


def brightness(colour):
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(
    ("width", "colours"),
    [
        *((1280, "light"), (390, "dark"), (320, "light")),
        *(pytest.param(*screen, marks=pytest.mark.sweep) for screen in ((1280, "dark"), (390, "light"), (320, "dark"))),
    ],
)
def test_screens(visit, file, width, colours):
    """Nothing is wider than the screen, and text stands out from its background as WCAG's level AA asks."""
    page = visit(file, width=width, height=844 if width < 500 else 900, touch=width < 500, colours=colours)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    over = """() => [...document.querySelectorAll("main *")].filter(one => !one.closest(".scroll, svg, noscript")
        && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(over) == []
    texts = """() => ["h1", ".note", "label", "#readout", ".tile", ".above", ".below", "select", ".button", "#errors span"]
        .map(name => { const one = document.querySelector(name); let at = one;
            while (getComputedStyle(at).backgroundColor === "rgba(0, 0, 0, 0)") at = at.parentElement;
            return [name, getComputedStyle(one).color, getComputedStyle(at).backgroundColor]; })"""
    for name, ink, ground in page.evaluate(texts):
        low, high = sorted((brightness(ink), brightness(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ink, ground)
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert bool(brightness(ground) > 0.5) == (colours == "light")
    if width != 320:
        height = page.evaluate("() => document.documentElement.scrollHeight")
        page.set_viewport_size(
            {"width": width, "height": height}
        )  # small pictures are drawn when they are on the screen
        page.wait_for_timeout(200)
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(
            path=ARTIFACTS / f"explore-{'desktop' if width > 500 else 'phone'}-{colours}.png", full_page=True
        )


def test_weights_as_csv(visit, file, model, image):
    page = visit(file)
    point_at(page, 4, 9)
    with page.expect_download() as download:
        page.evaluate("() => document.getElementById('save-block').click()")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    for layer in ns.attention_maps(model, image):
        block = layer.memory_block((4, 9))
        found = np.zeros_like(block)
        for row in rows:
            if row["layer"] == layer.layer and row["head"] != "rollout":
                at = int(row["head"]) - 1, int(row["key_row"]), int(row["key_column"])
                found[at] = float(row["weight"])
                centre = [float(row["key_y_pixels"]), float(row["key_x_pixels"])]
                np.testing.assert_allclose(centre, (np.array(at[1:]) + 0.5) * layer.cell_size)
        np.testing.assert_allclose(found, block, atol=1.01 * STEP * block.max())


def test_in_a_notebook(browser, visit, model, image, tmp_path):
    cell = tmp_path / "notebook.html"
    page = ns.explore(model, image)._repr_html_()
    cell.write_text(f"<!DOCTYPE html><html data-ready><link rel='icon' href='data:,'><body>{page}</body></html>")
    notebook = visit(cell)
    frame = notebook.frames[1]
    frame.wait_for_selector("html[data-ready]")
    frame.press("#stage", "ArrowRight")
    assert frame.evaluate("() => nearsight.state.x") == W // 2 + 1
    assert frame.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


# --------------------------------------------------------------------------------------------------------- large models


def test_a_page_of_large_maps_stays_small(visit, tmp_path):
    """4 heads, 572 queries and cells each, twice: 2.7 MB of weights. What is kept is right at the query that is nearest."""
    torch.manual_seed(0)
    model = nn.Sequential(*[ns.GlobalSelfAttention2d(8, num_heads=4, map_size=26) for _ in range(2)])
    image = torch.randn(8, 22, 26)
    file = explore(model, image, picture=torch.rand(3, 22, 26), transform=None).save(tmp_path / "large.html")
    assert 1e6 < file.stat().st_size < 5e6
    assert "Fewer queries per axis, to keep the page below 5 MB: 0 (every 2nd)." in file.read_text()
    page, found = visit(file), ns.attention_maps(model, image)
    for row, column in [(0, 25), (17, 4)]:
        for layer, off in ((0, 1), (1, 0)):
            block = "([layer, y, x]) => nearsight.block(nearsight.layers[layer], 2, y, x).own"
            own = page.evaluate(block, [layer, row, column])
            assert max(abs(own[0] - row), abs(own[1] - column)) <= off
            wanted = found[layer].memory_block(own)[2]
            np.testing.assert_allclose(shown(page, layer, 2, row, column), wanted, atol=STEP * wanted.max())
    assert page.locator("#equivariance").is_hidden()


def test_a_page_of_too_many_queries_shows_a_grid_of_them(visit, monkeypatch, model, image, tmp_path):
    monkeypatch.setattr(maps, "KEPT", 7000)
    monkeypatch.setattr(explorer, "COARSE", 5)
    file = explore(model, image, transform=None).save(tmp_path / "grid.html")
    page, (found, *_) = visit(file), ns.attention_maps(model, image, queries=list(np.ndindex(H, W))[:1])
    assert "too many queries to compute all: there are at most 5 x 5 of each layer" in page.text_content("body")
    assert ROLLOUT not in page.evaluate("() => [...document.getElementById('head').options].map(one => +one.value)")
    own = page.evaluate("() => nearsight.block(nearsight.layers[0], 1, 6, 6).own")
    (found, *_) = ns.attention_maps(model, image, queries=[own])
    wanted = found.memory_block(own)[1]
    np.testing.assert_allclose(shown(page, 0, 1, 6, 6), wanted, atol=STEP * wanted.max())


def test_many_layers_are_shown_evenly_apart(monkeypatch):
    monkeypatch.setattr(explorer, "WEIGHT_BYTES", 20_000)
    model = nn.Sequential(*[ns.LocalSelfAttention2d(8, 8, 7, num_heads=2) for _ in range(30)])
    page = explore(model, torch.randn(8, 8, 8), picture=torch.rand(1, 8, 8), transform=None).html
    shown = [int(name) for name in re.findall(r'"name": "(\d+)"', page)]
    assert f"{len(shown)} of 30 layers are shown, evenly apart" in page
    assert shown[-1] == 29
    assert max(np.diff(shown)) - min(np.diff(shown)) <= 1


# ------------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_upright_square_and_as_the_model_sees_it(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))  # left half white
    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by 90 degrees clockwise: the white half comes to the top
    picture.save(tmp_path / "photo.png", exif=turned)
    config = View(1, 10, (0.25,), (0.5,)).data_config()
    image, shown = seen(read_picture(tmp_path / "photo.png", channels=1), config)
    assert image.shape == shown.shape == (1, 10, 10)
    assert shown[0, 0].min() > 0.99 > 0.01 > shown[0, -1].max()
    torch.testing.assert_close(image, (shown - 0.25) / 0.5)


def test_a_file_is_explored_by_the_models_own_view(tmp_path):
    Image.new("RGB", (50, 40), (255, 0, 0)).save(tmp_path / "red.png")
    model = create_model("sasa_nano", num_classes=3)
    assert View.of(model).data_config() == resolve_model_data_config(
        model
    )  # a run's says how it was trained, this timm's
    page = explore(model, tmp_path / "red.png")
    assert '"height": 32' in page.html
    source = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page.html)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert pixels.shape == (32, 32, 3)
    assert (pixels == (255, 0, 0)).all()


def test_a_page_says_that_its_network_was_never_trained_where_that_is_known(image):
    model = create_model("sasa_nano", num_classes=3)
    page = explore(model, image, transform=None)
    assert page.title == f"{type(model).__name__}, untrained"
    assert UNTRAINED in page.html
    with torch.no_grad():
        model.head.fc.bias += 1  # as one step of training does
    page = explore(model, image, transform=None)
    assert "untrained" not in page.html.lower()
    mine = nn.Sequential(ns.LocalSelfAttention2d(3, 8, num_heads=2))
    assert "untrained" not in explore(mine, image, transform=None).html.lower()  # who knows


def test_what_a_network_was_given_is_not_untrained(tmp_path):
    model = create_model("sasa_nano", num_classes=3)
    assert is_untrained(model)
    assert not is_untrained(nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert not is_untrained(create_model("sasa_nano", num_classes=3, checkpoint_path=str(tmp_path / "weights.pth")))
    other = create_model("sasa_nano", num_classes=3)
    other.load_state_dict(create_model("sasa_nano", num_classes=3).state_dict())
    assert not is_untrained(other)
    with torch.device("meta"):
        assert not is_untrained(create_model("sasa_nano", num_classes=3))


def test_what_cannot_be_explored():
    with pytest.raises(ShapeError, match=r"one image, \(C, H, W\) or \(1, C, H, W\).*received \(2, 8, 5, 5\)"):
        explore(ns.LocalSelfAttention2d(8, num_heads=2), torch.randn(2, 8, 5, 5))
    with pytest.raises(ShapeError, match=r"axes of the attention: \[1\]"):
        explore(ns.LocalSelfAttention1d(8), torch.randn(8, 5, 5))
    with pytest.raises(OptionError, match=r"no attention layer of nearsight; it is made of Conv2d \(1\)"):
        explore(nn.Conv2d(3, 3, 3), torch.randn(3, 8, 8))


def test_a_model_that_breaks_is_left_as_it_was(model, image):
    broken = nn.Sequential(*model, nn.Linear(99, 1)).train()
    with pytest.raises(RuntimeError):
        explore(broken, image)
    assert all(module.training for module in broken.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in broken.modules())
    broken.eval()  # its layers are shared


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(DataError, match=r"cannot write .*nowhere/page.html: No such file or directory"):
        Exploration("page").save(tmp_path / "nowhere" / "page.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(DataError, match=r"cannot write .*folder.html: Is a directory"):
        Exploration("page").save(tmp_path / "folder.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.html"]


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model file as a run leaves it, without the time of a run."""
    folder, pictures = tmp_path_factory.mktemp("run"), load_pictures("digits")
    torch.manual_seed(0)
    blueprint = Blueprint("sasa_nano", pictures.classes, pictures.view(8), "digits")
    save_model(folder / "model.safetensors", create_model("sasa_nano", num_classes=10, in_chans=1), blueprint)
    return folder


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_explore_a_run_by_the_command_line(run, photo, tmp_path, capsys, visit):
    page = tmp_path / "digit.html"
    assert cli.main(["explore", str(run), "digits:3", "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"The page: {page}\n"
    label = load_pictures("digits").test.labels[3]
    assert visit(page).text_content(".soft") == f"Trained on digits. Test image digits:3, of class {label}."
    assert cli.main(["explore", "sasa_nano,num_classes=5", str(photo), "--size", "24", "--output", str(page)]) == 0
    assert '"height": 24' in page.read_text()


def mistake(capsys, *arguments):
    """The one line that a mistake leaves on stderr."""
    assert cli.main(["explore", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


def test_an_image_that_cannot_be_read(run, photo, tmp_path, capsys):
    text, half, page = tmp_path / "text.png", tmp_path / "half.jpg", tmp_path / "page.html"
    text.write_text("no picture")
    half.write_bytes(photo.read_bytes()[:700])
    for file, why in [
        (text, f"cannot read the image {text}: it is damaged, or no picture that Pillow knows"),
        (half, f"cannot read the image {half}: it is damaged"),
        (tmp_path, f"cannot read the image {tmp_path}"),
        (tmp_path / "none.png", f"there is no image {tmp_path / 'none.png'}"),
        ("digits:360", "digits has 360 test images, counted from 0; received digits:360"),
        ("digit:3", "data must be one of digits, "),
    ]:
        assert why in mistake(capsys, run, file, "--output", page)
    assert not page.exists()


def test_a_model_without_our_layers(photo, tmp_path, capsys):
    message = mistake(capsys, "resnet10t", photo, "--size", "64", "--output", tmp_path / "page.html")
    assert "no attention layer of nearsight; it is made of Conv2d (14), BatchNorm2d (14)" in message
    assert (
        "nearsight.convert(model, init='exact'), or `nearsight convert`, puts attention in the place of its" in message
    )
    assert not (tmp_path / "page.html").exists()


def test_a_checkpoint_of_another_shape(run, photo, tmp_path, capsys):
    pictures, other = load_pictures("digits"), tmp_path / "other.safetensors"
    blueprint = Blueprint("sasa_nano", pictures.classes, pictures.view(8), "digits")
    save_model(other, create_model("sasa_nano", num_classes=7, in_chans=1), blueprint)
    message = mistake(capsys, other, photo)
    assert f"{other} does not hold a model that can be rebuilt: " in message
    assert "size mismatch for head.fc.weight" in message
    assert "torch.Size([7, 192])" in message
    assert "torch.Size([10, 192])" in message


def test_other_mistakes_are_one_line(run, photo, tmp_path, capsys):
    assert "there is no model 'sasa_nan'; did you mean sasa_nano" in mistake(capsys, "sasa_nan", photo)
    assert "--size must be at least 1; received 0" in mistake(capsys, run, photo, "--size", "0")
    assert f"cannot write {tmp_path}" in mistake(capsys, run, photo, "--output", tmp_path)
    message = mistake(capsys, "sasa_nano,in_chans=4", photo, "--size", "24")
    assert "a picture has 1 channel or 3, and the model takes 4" in message


def test_a_reflection_can_be_asked_for(model, image):
    assert '"transform": "Reflection(-1)"' in explore(model, image, transform=Reflection()).html
