# SPDX-License-Identifier: Apache-2.0
"""Classes may be called anything: no name breaks a file, a page, a picture or a line, nor takes a result with it."""

import csv
import io
import json
import os
import shutil
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from nearsight.cli import main
from nearsight.pages import drawings
from nearsight.pages.csv_json import write_csv
from nearsight.pages.names import readable, short
from nearsight.pages.style import to_png, to_svg, to_svg_file
from nearsight.saved.weights import load_model
from nearsight.training import compare as comparison
from nearsight.training import compare_report, data, report
from nearsight.training import train as training
from nearsight.training.compare import compare
from nearsight.training.recipe import Recipe

ODD = (
    "$5_to_$10",
    "caf\udce9",
    "two\nlines",
    '"quoted"',
    "<script>x</script>",
    "x" * 300,
    "שלום",
    "a,b",
    "=1+1",
    "",
    "+1a",
    "-1a",
    "@sum",
    "\ttab",
    "\rreturn",
    "\x1b[31mred",
    "\u202eturned",
    "日本",
    r"$\frac{1}",
    "\ud800",
)
SPEC = "sasa_nano,depths=[1],widths=[8],stem_width=8,num_heads=2"


def texts(page: str) -> str:
    found = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.handle_starttag = lambda tag, attributes: found.append(tag) if tag == "script" else None
    parser.feed(page)
    return "\n".join(found)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("caf\udce9", r"caf\xe9"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\ud800", r"\ud800"),
        ("a\u2028b", r"a\u2028b"),
        ("\u202etxt", r"\u202etxt"),
        ("שלום 日本 é 👩\u200d🌾 $<&\"' \\n", "שלום 日本 é 👩\u200d🌾 $<&\"' \\n"),
    ],
)
def test_what_cannot_be_shown_is_written_out_and_all_else_stays(name, shown):
    assert readable(name) == shown
    shown.encode()


def test_names_in_pictures_are_short_and_never_nothing():
    assert short("") == '""'
    assert len(short("x" * 300)) == 24
    assert short("x" * 24) == "x" * 24
    assert short(f"{'a' * 50}end") == f"{'a' * 16}…{'a' * 4}end"


@pytest.mark.parametrize("name", ODD)
def test_a_cell_is_one_line_and_no_formula(name):
    ((header, number), (cell, value)) = csv.reader(io.StringIO(write_csv([name, "n"], [(name, -0.5)]), newline=""))
    assert header == cell
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert cell.removeprefix("'") == readable(name)
    assert (number, value) == ("n", "-0.5")  # numbers stay numbers


@pytest.mark.parametrize("names", [ODD, [""] * 3, [r"$\frac{" + str(n) for n in range(3)]])
def test_every_name_can_be_drawn_and_without_a_warning(names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawings.confusion_matrix(np.eye(len(names), dtype=int), names)
        svg = to_svg(figure, " ".join(names))
        to_png(figure)
        to_svg_file(figure)
    drawn = "".join(ElementTree.fromstring(svg).itertext())
    assert all(short(name) in drawn for name in names)


@pytest.fixture
def odd_digits(monkeypatch):
    """A few digits, under odd names."""
    whole = data.SOURCES["digits"]

    def few(*args):
        pictures = whole(*args)
        parts = {name: getattr(pictures, name) for name in ("train", "validation", "test")}
        small = {name: data.ArraySplit(part.images[:64], part.labels[:64]) for name, part in parts.items()}
        return replace(pictures, classes=ODD[:10], **small)

    monkeypatch.setitem(data.SOURCES, "digits", few)


def test_a_run_on_classes_of_any_name(odd_digits, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", "--model", SPEC, "--data", "digits", "--epochs", "1", "--lr", "0.01", "--output", str(run)]
    assert main(arguments) == 0
    page = (run / "report.html").read_bytes().decode()
    shown = texts(page)
    assert readable(ODD[4]) in shown
    assert "script" not in shown.splitlines()  # no such element
    capsys.readouterr()
    assert main(["eval", str(run), "--data", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == [readable(name) for name in ODD[:10]]
    assert load_model(run)[1].classes == tuple(map(readable, ODD[:10]))
    assert main(["explore", str(run), "digits:3", "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes().decode()
    capsys.readouterr().out.encode()


def test_folders_and_files_whose_names_are_no_utf8(tmp_path, capsys):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    for name in (b"\xff", b"=1"):
        os.makedirs(folder + b"/" + name)
        for number in range(30):
            Image.new("L", (8, 8), number).save(folder + b"/" + name + b"/%d\xfe\x1b.png" % number)
    with open(folder + b"/=1/0\xfe\x1b.png", "wb") as file:
        file.write(b"no picture")
    run = tmp_path / "run"
    arguments = ["--model", SPEC, "--data", f"folder:{os.fsdecode(folder)}", "--epochs", "1", "--batch-size", "16"]
    assert main(["train", *arguments, "--workers", "0", "--output", str(run)]) == 0
    said = capsys.readouterr()
    assert r"0\xfe\x1b.png" in said.err
    assert "\x1b" not in said.err.replace("\x1b[", "")
    (run / "report.html").read_bytes().decode()
    assert load_model(run)[1].classes == ("=1", r"\xff")
    shutil.rmtree(folder)


def test_class_names_of_shards_are_lines_and_nothing_else(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes("\ufeffone\u2028more\r\nwith\x0bpage\n".encode() + b"\xff\n")
    names = data.shards._read_names(file)
    assert names == ("one\u2028more", "with\x0bpage", "\udcff")


# ------------------------------------------------------------------------------------------ reports that cannot be drawn


def fail(*args, **kwargs):
    raise RuntimeError("no such\nfont")


@pytest.mark.parametrize(
    ("room", "name"), [(drawings, "confusion_matrix"), (training, "write_report"), (report, "render")]
)
def test_a_report_that_cannot_be_drawn_takes_nothing_with_it(odd_digits, tmp_path, capsys, monkeypatch, room, name):
    run = tmp_path / "run"
    monkeypatch.setattr(room, name, fail)
    assert main(["train", "--model", SPEC, "--data", "digits", "--epochs", "1", "--output", str(run)]) == 0
    said = capsys.readouterr()
    assert "test     accuracy " in said.out
    assert f"nearsight: warning: cannot draw {run}/report.html: no such font; the results are kept\n" in said.err
    assert "Traceback" not in said.err
    accuracy = said.out.partition("test     accuracy ")[2].partition("%")[0]
    if name != "render":
        assert f"{accuracy} % of 64 test images" in (run / "report.html").read_text()
    load_model(run)


def test_resume_draws_a_report_that_could_not_be_drawn(odd_digits, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(drawings, "confusion_matrix", fail)
        main(["train", "--model", SPEC, "--data", "digits", "--epochs", "1", "--output", str(run)])
    assert "Confusion matrix" not in (run / "report.html").read_text()
    assert main(["train", "--resume", "--output", str(run)]) == 0
    assert "Confusion matrix" in (run / "report.html").read_text()


def test_a_comparison_ends_although_nothing_can_be_drawn(odd_digits, tmp_path, capsys, monkeypatch):
    def here(run, recipe, lock):
        training.train(recipe, run)

    monkeypatch.setattr(comparison, "_train", here)
    monkeypatch.setattr(drawings, "confusion_matrix", fail)
    monkeypatch.setattr(compare_report, "draw_charts", fail)
    torch.manual_seed(0)
    table = compare({"": [SPEC]}, Recipe(data="digits", epochs=1), 1, tmp_path / "compared")
    said = capsys.readouterr()
    assert 0 <= table.rows[0].accuracy.mean <= 1
    assert (tmp_path / "compared" / "table.csv").is_file()
    assert f"cannot draw {tmp_path}/compared/compare.html: no such font" in said.err
