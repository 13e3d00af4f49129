# SPDX-License-Identifier: Apache-2.0
"""Plots: what is drawn stands in the CSV, files come together, and colours can be told apart by everybody."""

import base64
import csv
import importlib
import io
import math
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nearsight
from nearsight.errors import TrainingError
from nearsight.inspect.equivariance import PARTS
from nearsight.pages import drawings, palette, style
from nearsight.pages.charts import COLOURS, DASHES, MARKERS, Chart, Series, charts_to_csv, draw_charts, write_plot
from nearsight.pages.style import to_svg_file

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(nearsight.__file__).parent


def read(text):
    return list(csv.reader(io.StringIO(text)))


# -------------------------------------------------------------------------------------------------------------- colours

# Viénot, Brettel and Mollon 1999: linear RGB as those see it who lack the long or the middle cones.
SEEN = {
    "any": np.eye(3),
    "protanopia": np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
    "deuteranopia": np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
APART = 12  # CIE 1976 differences: a glance tells them apart from about 10 on


def lab(colour, sight):
    """CIE L*a*b* of a hexadecimal colour as it is seen."""
    rgb = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ (SEEN[sight] @ linear) / TO_XYZ.sum(1), 0.00886))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def too_close(colours):
    """Pairs that somebody could not tell apart."""
    return [
        (one, other, sight)
        for sight in SEEN
        for one, other in combinations(colours, 2)
        if np.linalg.norm(lab(one, sight) - lab(other, sight)) < APART
    ]


def test_colours_can_be_told_apart_with_any_colour_vision():
    assert too_close(COLOURS) == []
    assert too_close([colour for colour, _ in PARTS.values()]) == []


def test_colours_that_cannot_would_be_found():
    """A red and a green of one brightness: clear to most people, alike to those without long or middle cones."""
    assert {sight for *_, sight in too_close(["#b04a3a", "#6b7a1f"])} >= {"deuteranopia"}
    assert too_close(["#b04a3a", "#6b7a1f"])[0][2] != "any"


def test_there_is_one_palette():
    """A colour that means something stands in palette.py alone: drawings, style and script take it from there."""
    for file in (*SOURCE.rglob("*.py"), *SOURCE.rglob("*.js")):
        found = set(re.findall(r'"#[0-9a-f]{6}"', file.read_text())) - {'"#000000"', '"#ffffff"'}
        own = {"palette.py": 7, "style.py": 2}.get(
            file.name, 0
        )  # of style.py text on a colour, and what stands for the ink
        assert len(found) <= own, f"{file} has colours of its own: {found}"
    meant = dict(re.findall(r"--(\w+): (#\w+)", palette.as_css()))
    assert (meant["query"], meant["block"], meant["weight"]) == (palette.BLUE, palette.SKY, palette.ORANGE)
    assert {name: meant[name] for name in PARTS} == {name: colour for name, (colour, _) in PARTS.items()}
    for name in ("page.html.jinja", "explore.html.jinja"):
        assert 'file("palette.css")' in (SOURCE / "pages" / "templates" / name).read_text()


def test_where_nothing_is_preferred_all_is_pale():
    assert drawings.full_colour(np.full((3, 3), 1 / 9)) == 2 / 9
    assert drawings.full_colour(np.array([0.9, 0.1, 0.0])) == pytest.approx(1.0)  # two cells: twice 1/2
    assert drawings.full_colour(np.array([0.5, *[0.05] * 10])) == 0.5


def test_series_differ_without_their_colours_too():
    looks = {(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n in range(42)}
    assert len(looks) == 42
    assert len({(COLOURS[n % len(COLOURS)], DASHES[n % len(DASHES)]) for n in range(12)}) == 12
    chart = Chart("epoch", "loss", {"": [Series(str(n), [1, 2], [n, n]) for n in range(4)]})
    (axes,) = draw_charts([chart]).axes
    assert len({line.get_linestyle() for line in axes.lines}) == 4


# --------------------------------------------------------------------------------------------------------------- charts


@pytest.fixture
def chart():
    curve = Series("curve", [1, 2, 3], [2.0, 1.5, 1.25], [0.5, 0.25, 0.125])
    return Chart(
        "epoch", "loss", {"one": [curve, Series("bare", [1, 2], [4.0, 3.0])], "two": [Series("p", [7], [8], [1])]}
    )


def test_every_point_is_in_the_csv_and_in_the_drawing(chart):
    header, *lines = read(chart.to_csv())
    assert header == ["panel", "series", "epoch", "loss", "standard deviation"]
    one, two = draw_charts([chart]).axes
    assert [axes.get_title(loc="left") for axes in (one, two)] == ["one", "two"]
    drawn = [["one", line.get_label(), *point] for line in one.lines for point in zip(*line.get_data(), strict=True)]
    assert drawn == [[panel, series, float(x), float(y)] for panel, series, x, y, _ in lines if panel == "one"]
    (band,) = one.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    spread = [(float(x), float(y), float(sd)) for panel, _, x, y, sd in lines if panel == "one" and sd]
    assert corners >= {(x, y + side * sd) for x, y, sd in spread for side in (-1, 1)}
    assert lines[-1] == ["two", "p", "7", "8", "1"]
    assert two.lines[0].get_xydata().tolist() == [[7, 8]]


def test_charts_of_one_figure_share_a_table(chart):
    other = Chart("epoch", "accuracy", {"": [Series("curve", [1], [0.5])]})
    header, *lines = read(charts_to_csv([chart, other]))
    assert header == ["y is", "panel", "series", "epoch", "y", "standard deviation"]
    assert [line[0] for line in lines] == ["loss"] * 6 + ["accuracy"]
    assert lines[-1] == ["accuracy", "", "curve", "1", "0.5", ""]
    assert [line[1:] for line in lines[:-1]] == read(chart.to_csv())[1:]


def test_a_plot_is_written_with_its_numbers(chart, tmp_path):
    write_plot(tmp_path / "v1.5", draw_charts([chart]), chart.to_csv())
    assert {file.name for file in tmp_path.iterdir()} == {"v1.5.csv", "v1.5.svg", "v1.5.png"}
    assert (tmp_path / "v1.5.csv").read_text() == chart.to_csv()
    assert "<svg" in (tmp_path / "v1.5.svg").read_text()
    assert Image.open(tmp_path / "v1.5.png").convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_same_plot_gives_the_same_bytes(chart):
    assert to_svg_file(draw_charts([chart])) == to_svg_file(draw_charts([chart]))


def test_a_plot_that_cannot_be_written(chart):
    with pytest.raises(TrainingError, match=r"cannot write /dev/null/x\.csv"):
        write_plot(Path("/dev/null/x"), draw_charts([chart]), chart.to_csv())


def test_a_grid_shows_signs_and_sizes():
    figure = drawings.grid([[np.array([[2.0, -1.0], [0.0, 1.0]])]], ["row"], ["column"])
    (axes,) = figure.axes
    shades = axes.images[0].get_array()
    blue, orange = (np.array(drawings._rgb(colour))[:3] for colour in (style.BLUE, style.ORANGE))
    assert np.allclose(shades[..., 3], [[1, 0.5], [0, 0.5]])
    assert np.allclose(shades[0, 0, :3], blue)
    assert np.allclose(shades[0, 1, :3], orange)
    assert (axes.get_title(), axes.get_ylabel()) == ("column", "row")


# -------------------------------------------------------------------------------------------------------------- gallery


def test_the_gallery_is_whole_and_small():
    """Every picture is shown, has its numbers beside it, and none makes the repository heavy."""
    folder = ROOT / "docs" / "images" / "gallery"
    shown = set(
        re.findall(r"\(../images/gallery/([\w-]+\.svg)\)", (ROOT / "docs" / "gallery" / "networks.md").read_text())
    )
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {name for name in files if name.endswith(".svg")} == shown
    assert set(files) == shown | {name.replace(".svg", ".csv") for name in shown}
    assert max(files.values()) < 200 * 1024
    assert sum(files.values()) < 1024 * 1024


def test_the_gallery_s_words_are_its_numbers():
    text = " ".join((ROOT / "docs" / "gallery" / "networks.md").read_text().split())
    folder = ROOT / "docs" / "images" / "gallery"
    for data, distance, entropy, end in (
        ("digits", "1.7 to 3.3 on digits", "2.1 to 1.3 bits", "1.4 times the largest logit on digits"),
        ("fashion-mnist", "2.0 to 8.6 on Fashion-MNIST", "2.0 to 1.7", "0.28 times the largest on Fashion-MNIST"),
    ):
        lines = [line for line in read((folder / f"{data}-statistics.csv").read_text()) if line[2].startswith("mean")]
        for name, words in (("distance, pixels", distance), ("entropy, bits", entropy)):
            values = [float(line[4]) for line in lines if line[0] == name]
            assert words.startswith(f"{values[0]:.1f} to {values[-1]:.1f}")
            assert words in text
        *_, last = csv.DictReader(io.StringIO((folder / f"{data}-equivariance.csv").read_text()))
        number = end.split()[0]
        assert f"{float(last['error']):.{len(number) - 2}f}" == number
        assert end in text


# ---------------------------------------------------------------------------------------------------- pictures of the docs


def test_every_picture_has_its_command_and_its_place():
    """`make pictures` names what draws each, the documentation shows each, and no file is left over."""
    recipe = (ROOT / "Makefile").read_text().partition("\npictures:")[2].partition("\n\n")[0]
    commands = [line.replace("$(IMAGES)", "docs/images").split() for line in recipe.splitlines()[1:]]
    assert [command[1] for command in commands if not (ROOT / command[1]).is_file()] == []
    drawn = {ROOT / word for command in commands for word in command[2:] if word.startswith("docs/images")}
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown = {
        (page.parent / place).resolve()
        for page in pages
        for place in re.findall(r"\]\(([\w./-]+\.(?:svg|png))\)", page.read_text())
    }
    files = {file for file in (ROOT / "docs" / "images").rglob("*") if file.is_file()}
    assert {file for file in files if drawn.isdisjoint((file, *file.parents))} == set()
    assert {file for file in files if file.suffix != ".csv"} == shown


@pytest.mark.parametrize("name", ["windows", "convert_heads", "memory_blocks"])
def test_what_the_code_draws_today_is_the_picture_that_is_shown(name, monkeypatch):
    """Its texts and its colours, as often, and its rasters: where exactly they stand is Matplotlib's."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script, images = importlib.import_module(name), ROOT / "docs" / "images"
    numbers = [script.read((images / f"{name}.csv").read_text())] if name == "convert_heads" else []

    def told(svg):
        return Counter(re.findall(r"(?:fill|stroke): #\w+|>[^<>\n]+</text>", svg))

    def cells(svg):
        """Of each raster, which shows 8 x 8 pixels, their colours."""
        files = re.findall(r"data:image/png;base64,([^\"]+)", svg)
        rasters = [Image.open(io.BytesIO(base64.b64decode(file))).convert("RGBA") for file in files]
        return np.array([np.array(raster.resize((8, 8), Image.Resampling.NEAREST), dtype=int) for raster in rasters])

    committed, drawn = (images / f"{name}.svg").read_text(), to_svg_file(script.draw(*numbers)).decode()
    assert told(drawn) == told(committed)
    assert told(committed).total() > (30 if name == "memory_blocks" else 100)
    assert len(cells(committed)) == (8 if name == "memory_blocks" else 0)
    assert np.abs(cells(drawn) - cells(committed)).max(initial=0) <= 3  # of 255: other processors add in another order


def test_the_heads_that_are_told_of_are_those_that_are_drawn(monkeypatch):
    """The table of convert.md: how far heads moved, how many of them outward, and how many gates are open how far."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    script = importlib.import_module("convert_heads")
    heads = script.read((ROOT / "docs" / "images" / "convert_heads.csv").read_text())
    assert script.read(script.to_csv(heads)) == heads
    text = (ROOT / "docs" / "howto" / "convert.md").read_text()
    for layer in dict.fromkeys(head.layer for head in heads):
        its = [(head, script.home(head.head, 9)) for head in heads if head.layer == layer]
        moved = [math.dist((head.row, head.column), home) for head, home in its]
        outward = [math.hypot(head.row, head.column) > math.hypot(*home) for head, home in its if home != (0, 0)]
        gates = [head.gate for head, _ in its]
        row = next(line for line in text.splitlines() if line.startswith(f"| {layer}")).split(" | ")
        assert row[1:3] == [f"{np.mean(moved):.2f} ({max(moved):.2f})", f"{sum(outward)} of {len(outward)}"]
        assert row[4] == (f"{np.count_nonzero(gates)} of {len(gates)}" if any(gates) else "none")
        assert float(row[5].strip(" |")) == round(max(gates), 2)
