# SPDX-License-Identifier: Apache-2.0
"""What a user gets back shows itself: in ten lines at a prompt, with right numbers, and as pages in a notebook."""

from __future__ import annotations

import dataclasses
import html
import importlib
import pkgutil
import re
from collections import namedtuple
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight.bench.growth import Growth, Point
from nearsight.bench.profile import profile
from nearsight.conversion import convert
from nearsight.errors import OptionError, ShapeError
from nearsight.inspect import Translation, draw_equivariance
from nearsight.pages.brief import Rows, brief, html_table
from nearsight.saved.opened import open_model
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint
from nearsight.training.assess import Assessment
from nearsight.training.compare_report import Comparison
from nearsight.training.data import load_pictures
from nearsight.training.evaluate import Evaluation
from nearsight.training.measures import Measures
from nearsight.training.recipe import Recipe
from nearsight.training.train import TrainedRun

LINES, CHARACTERS = 10, 1000


@cache
def model():
    small = {"depths": (1, 1), "widths": (8, 8), "stem_width": 8, "num_heads": 2}
    return ns.create_model("sasa_nano", num_classes=10, in_chans=1, **small)


@cache
def images():
    return torch.randn(2, 1, 8, 8)


@cache
def maps():
    return ns.attention_maps(model(), images())


@cache
def page():
    return ns.explore(model(), images()[0], title="the digits")


@cache
def equivariance():
    return ns.equivariance_by_layer(model(), images(), Translation(1, 1))


@cache
def cost():
    return profile(model(), images(), rounds=1)


def evaluation(classes=10):
    labels = torch.arange(360) % classes
    logits = nn.functional.one_hot(labels, classes).float()
    logits[:4] = logits[4:8]
    return Evaluation(labels, logits, torch.arange(360))


def blueprint():
    return Blueprint("sasa_nano", tuple(f"class number {n}" for n in range(1000)), View(1, 8, (0.5,), (0.5,)), "digits")


def run(folder):
    return TrainedRun(Recipe(epochs=3).filled({"lr": 0.01}), folder, model(), evaluation())


def comparison():
    runs = {
        (name, seed): Measures(name, seed, 0.9, 10, 10, 1.0, 1.0, 1e6, 0.1, (1.0,) * 50, 8, "adamw", 0.1, "10" * 5000)
        for name in (f"sasa_micro,kernel_size={k}" for k in range(3, 30, 2))
        for seed in (0, 1)
    }
    epochs = {key: [{"epoch": 1, "val_accuracy": 0.5, "train_loss": 1.0}] * 50 for key in runs}
    return Comparison.of({"": list(dict.fromkeys(name for name, _ in runs))}, runs, epochs)


def deep():
    """A network of sixteen attention layers and some seventy others."""
    return ns.create_model("sasa_resnet50", num_classes=10, widths=(8, 8, 8, 8), stem_width=8, num_heads=2)


def growth():
    points = [Point(name, n, n * n, 1, 0.1, None, 1, None) for name in ("local", "global") for n in range(7, 40)]
    return Growth(points, 7, 16, 4, 10.0, {"threads": 1})


def opened():
    return dataclasses.replace(open_model("sasa_nano"), classes=blueprint().classes)


MADE = {
    "exploration": (lambda folder: page(), "'the digits': a page of"),
    "maps": (lambda folder: maps(), "2 attention maps of 2 images"),
    "many maps": (lambda folder: ns.attention_maps(deep(), torch.randn(1, 3, 64, 64)), "16 attention maps of 1 image"),
    "map": (lambda folder: maps()[0], "weights=float32 (2, 2, 8, 8, 5, 5)"),
    "statistics": (lambda folder: ns.attention_statistics(maps()), "distance, px"),
    "one layer's": (lambda folder: ns.attention_statistics(maps())[0], "diversity="),
    "equivariance": (lambda folder: equivariance(), "encoding"),
    "conversion": (
        lambda folder: convert(ns.create_model("conv_nano", num_classes=10), init="random", kernel_size=3),
        "converted (random)",
    ),
    "profile": (lambda folder: cost(), "forward pass of 2 x 1 x 8 x 8: "),
    "growth": (lambda folder: growth(), "global attention takes longer than local: predicted from n = k = 7 on"),
    "run": (run, "evaluation=Evaluation(356 of 360 right, 98.89%; "),
    "recipe": (lambda folder: Recipe(lr=0.5), "Recipe(model='sasa_nano', data='digits', lr=0.5)"),
    "evaluation": (lambda folder: evaluation(), "Evaluation(356 of 360 right, 98.89%; loss "),
    "assessment": (
        lambda folder: Assessment(blueprint(), "digits", "test", evaluation(), blueprint().classes, None, False),
        "Assessment(sasa_nano on digits: 98.89% (356 of 360 test images), 95 % interval 97.2 to 99.6 %)",
    ),
    "comparison": (lambda folder: comparison(), "... 7 more ..."),
    "blueprint": (lambda folder: blueprint(), "1,000 in all"),
    "opened": (lambda folder: opened(), "network=SasaResNet of 84,906 parameters"),
    "pictures": (lambda folder: load_pictures("digits"), "train=ArraySplit(images=uint8 (1293, 1, 8, 8)"),
    "window": (lambda folder: ns.Window(7, shared_by=4), "shared_by=4"),
    "position": (lambda folder: ns.LocalSelfAttention2d(8, position="bias", num_heads=2).position, "table=(2, 7, 7)"),
    "backends": (lambda folder: ns.backends(), "'reference': None"),
}


@pytest.mark.parametrize("name", MADE)
def test_at_a_prompt(name, tmp_path):
    make, said = MADE[name]
    text = repr(make(tmp_path))
    assert said in text, text
    assert len(text) <= CHARACTERS, text
    assert text.count("\n") < LINES, text


def records() -> dict[str, type]:
    """Every dataclass of the package."""
    found = {}
    others = ("libnearsight", "libnearsight_onnxruntime", "natten_modules")  # no Python, and what needs NATTEN
    for module in pkgutil.walk_packages(ns.__path__, "nearsight."):
        if not module.name.endswith(("__main__", "nearsight_command", *others)):
            found |= {
                f"{one.__module__}.{one.__name__}": one
                for one in vars(importlib.import_module(module.name)).values()
                if isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == module.name
            }
    return found


UNBOUNDED = re.compile(r"\b(Tensor|ndarray|Module|Sequence|Mapping|dict|list|html|svg)\b|tuple\[\w+, \.\.\.\]")
SMALL = {
    "Axis",
    "Window",
    "Problem",
    "View",
    "_Form",
    "LayerError",
    "Exported",
    "Reach",
    "Shape",
    "Times",
    "ModelResult",
    "Check",
    "Runtime",
    "Pair",
    "LayerTimes",
    "Contest",
}  # a few


def test_no_record_shows_all_that_it_holds():
    """Those that may hold much have a `repr` of their own."""
    assert len(records()) > 25
    generated = [
        name
        for name, one in records().items()
        if one.__name__ not in SMALL
        and any(UNBOUNDED.search(f"{field.name}: {field.type}") for field in dataclasses.fields(one))
        and "__create_fn__"
        in one.__repr__.__qualname__ + getattr(one.__repr__, "__wrapped__", one.__repr__).__qualname__
    ]
    assert generated == []


# ---------------------------------------------------------------------------------------------------------- in a notebook


def test_pages_and_tables_in_a_notebook(tmp_path):
    assert html.unescape(re.search('srcdoc="([^"]*)"', page()._repr_html_())[1]) == page().html
    done = run(tmp_path)
    assert done._repr_html_().startswith("<pre>TrainedRun(")
    (tmp_path / "report.html").write_text("<p>the report</p>")
    assert 'srcdoc="&lt;p&gt;the report&lt;/p&gt;"' in done._repr_html_()
    table = comparison()._repr_html_()
    assert table.count("<tr>") == 1 + 14
    assert "no model is known to be ahead" in table
    assert maps()._repr_html_().count("<tr>") == 1 + 2
    assert cost()._repr_html_().count("<tr>") == 1 + len(cost().rows)


def test_names_are_escaped_in_tables():
    assert "<td>&lt;b&gt;</td>" in html_table([["name"], ["<b>"]], "one")


def test_figures_show_themselves():
    drawn = (maps().plot(), maps().plot((0, 7), image_index=1, heads=True), maps()[1:].plot())
    for figure in (drawn[2], draw_equivariance(equivariance())):
        assert figure._repr_png_()[:4] == b"\x89PNG"
    assert [len(figure.axes) for figure in drawn] == [1 + 2, sum(layer.num_heads for layer in maps()), 1 + 1]


def test_what_is_plotted_is_the_block_of_the_pixel():
    overlay = maps().plot((2, 5), image_index=1).axes[1].images[1].get_array()
    weights = maps()[0].memory_block((2, 5), 1).mean(0)
    assert np.unravel_index(overlay[..., 3].argmax(), weights.shape) == np.unravel_index(
        weights.argmax(), weights.shape
    )


def test_maps_that_cannot_be_drawn_say_why():
    layer = nn.Sequential(ns.LocalSelfAttention1d(4, kernel_size=3, num_heads=1))
    with pytest.raises(ShapeError, match=r"maps of two axes .* received maps of \[1\] axes"):
        ns.attention_maps(layer, torch.randn(1, 4, 9)).plot()
    with pytest.raises(OptionError, match="there are no maps to draw"):
        maps()[:0].plot()
    asked = ns.attention_maps(model(), images(), queries=[(6, 1)])
    assert len(asked.plot().axes) == 3  # of the query that was asked for
    with pytest.raises(ShapeError, match="was not asked for"):
        asked.plot((0, 0))


# -------------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(2, 3), "float32 (2, 3)"),
        (np.array([1.5, 2.0]), "[1.5, 2]"),
        (nn.Linear(2, 3), "Linear of 9 parameters"),
        ((1,), "(1,)"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, ... 9 in all]"),
        ({"a": "b" * 100}, "{'a': '" + "b" * 60 + "'... 100 characters}"),
        (0.1 + 0.2, "0.3"),
        (None, "None"),
    ],
)
def test_a_value_in_a_few_words(value, said):
    assert brief(value) == said


def test_a_table_stays_a_list():
    Pair = namedtuple("Pair", "name size")
    rows = Rows(Pair(f"n{size}", size) for size in range(20))
    assert rows[0] == ("n0", 0)
    assert isinstance(rows[3:5], Rows)
    assert list(rows[3:5]) == [("n3", 3), ("n4", 4)]
    shown = repr(rows).splitlines()
    assert shown[:3] == ["20 rows", "name  size", "n0       0"]
    assert shown[6] == "... 13 more ..."
    assert shown[-1] == "n19     19"
    assert repr(Rows()) == "0 rows"
