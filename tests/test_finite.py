# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite: an error in one line where a result needs them, null in JSON and nothing in CSV."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight import bench, cli
from nearsight.errors import OptionError, TrainingError
from nearsight.finite import why_not_finite
from nearsight.pages.csv_json import to_csv, to_json, write_csv
from nearsight.saved import export
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, save_model
from nearsight.training import data, measures
from nearsight.training.callbacks import _to_csv
from nearsight.training.data import load_pictures, loader
from nearsight.training.evaluate import evaluate
from nearsight.training.recipe import Recipe
from nearsight.training.task import Classifier


def strict(text):
    """JSON as a parser takes it that knows the standard alone: Python's own also takes NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A network whose last bias holds one NaN, in a folder as a run leaves it."""
    folder = tmp_path_factory.mktemp("broken")
    model = ns.create_model("sasa_nano", num_classes=10, in_chans=1)
    with torch.no_grad():
        list(model.parameters())[-1][3] = torch.nan
    pictures = load_pictures("digits")
    save_model(
        folder / "model.safetensors", model, Blueprint("sasa_nano", pictures.classes, pictures.view(8), "digits")
    )
    return folder


def fails(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nearsight: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_network_of_nan_has_no_accuracy(broken, capsys, form):
    message = fails(capsys, "eval", broken, "--data", "digits", *form)
    assert "not finite for 360 of 360 images: 1 of its " in message
    assert "%" not in message


def test_a_network_of_nan_has_no_page_no_program_and_no_conversion(broken, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert "not finite for 1 of 1 images" in fails(capsys, "explore", broken, "digits:3", "--output", page)
    program = tmp_path / "model.pt2"
    assert "not finite" in fails(capsys, "export", broken, "--format", "pt2", "--output", program)
    convolutions, folder = tmp_path / "convolutions", tmp_path / "converted"
    convolutions.mkdir()
    model = ns.create_model("conv_nano", num_classes=10, in_chans=1)
    nn.init.constant_(list(model.parameters())[-1], torch.inf)
    blueprint = Blueprint("conv_nano", data.arrays.DIGITS, View(1, 8, (0.5,), (0.5,)), "digits")
    save_model(convolutions / "model.safetensors", model, blueprint)
    for init in ("exact", "random"):
        assert "cannot be converted" in fails(capsys, "convert", convolutions, "--init", init, "--output", folder)
    assert not any(path.exists() for path in (page, program, folder))


class Answers(nn.Module):
    """Logits that hold a given number for one image, by the image's first pixel."""

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.number = number

    def forward(self, images):
        logits = images.flatten(1)[:, :10].clone()
        logits[images.flatten(1).sum(1).argmax(), 7] = self.number
        return logits * self.weight


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_answer_that_is_not_finite_is_enough(number):
    pictures = load_pictures("digits")
    test = pictures.test.dataset(pictures.view(8), training=False)
    with pytest.raises(
        TrainingError, match="not finite for 1 of 360 images, though its weights are; there is no accuracy"
    ):
        evaluate(Answers(number), loader(test, 360, 0))
    assert evaluate(Answers(5.0), loader(test, 360, 0)).count == 360


def test_a_loss_that_overflows_is_told_though_every_output_is_finite():
    pictures = load_pictures("digits")
    test = pictures.test.dataset(pictures.view(8), training=False)
    far = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(far[1].weight)
    nn.init.constant_(far[1].bias, -3e38)
    with torch.no_grad():
        far[1].bias[7] = 3e38
    with pytest.raises(TrainingError, match="the loss is inf, though every output of the network is finite"):
        evaluate(far, loader(test, 360, 0))


def test_which_part_of_an_output_is_broken():
    layer = nn.Linear(2, 2)
    good, bad = torch.zeros(4, 3), torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [1.0, -torch.inf]])
    assert why_not_finite({"one": good, "two": [good]}, layer) is None
    assert "for 2 of 3 images, though its weights are" in str(why_not_finite((good, bad), layer))
    nn.init.constant_(layer.bias, torch.inf)
    assert "1 of its 2 tensors hold NaN or infinity, the first is bias" in str(why_not_finite([bad], layer))


@pytest.mark.parametrize(("value", "told"), [(-math.inf, "an output became -inf"), (math.nan, "the loss became nan")])
def test_an_output_of_a_step_is_held_as_its_loss_is(value, told):
    """A logit of minus infinity for a class that is not the true one leaves the loss finite."""
    logits = torch.zeros(4, 3)
    logits[1, 2] = value
    loss = nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long))
    task = SimpleNamespace(current_epoch=1, recipe=Recipe(lr=0.1))
    with pytest.raises(TrainingError, match=rf"{told} in epoch 2, validation: .*smaller --lr than 0\.1"):
        Classifier._check_finite(task, loss, logits, "validation")
    Classifier._check_finite(task, loss.new_ones(()), torch.zeros(4, 3), "validation")


@pytest.mark.parametrize("order", [(0.0, math.nan), (math.nan, 0.0)])
def test_an_export_that_differs_by_nan_on_either_size_is_not_written(broken, tmp_path, monkeypatch, order):
    found = iter(order)
    monkeypatch.setattr(export, "_check_finite", lambda *arguments: None)
    monkeypatch.setattr(export, "_difference", lambda *arguments: next(found))
    monkeypatch.setattr(export, "trace", lambda *arguments: None)
    monkeypatch.setattr(export, "_pt2", lambda *arguments: (b"", None))
    with pytest.raises(TrainingError, match="differs from the network by nan"):
        export.export_to_file(broken, "pt2", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_the_equivariance_of_what_is_not_finite_is_no_number():
    """One translation of four that ends in NaN is not lost among the others."""

    class Fragile(nn.Module):
        def forward(self, x):
            return torch.where(x[:, 0, 0, :1] > 0, torch.nan, 1.0)

    image = torch.zeros(1, 1, 4, 4)
    image[..., -1, 0] = 1
    with pytest.raises(TrainingError, match="moves by a pixel"):
        measures.moved_by_a_pixel(Fragile(), image)


def test_explore_refuses_numbers_that_are_not_finite():
    model, image = ns.create_model("sasa_nano", num_classes=4), torch.zeros(3, 8, 8)
    image[0, 0, 0] = torch.nan
    with pytest.raises(OptionError, match="the image holds NaN or infinity"):
        ns.explore(model, image)


@dataclass
class Row:
    name: str
    value: float


def test_json_has_null_and_csv_nothing_where_a_number_is_not_finite(tmp_path, monkeypatch):
    values = [1.5, math.nan, np.float32("inf"), -math.inf]
    assert strict(to_json({"all": tuple(values), "deep": [{"x": np.float64("nan")}]})) == {
        "all": [1.5, None, None, None],
        "deep": [{"x": None}],
    }
    assert write_csv(["a", "b", "c", "d"], [values]) == "a,b,c,d\n1.5,,,\n"
    assert to_csv([Row("x", math.inf)]) == "name,value\nx,\n"
    assert _to_csv([{"epoch": 1, "val_loss": math.nan}]) == "epoch,val_loss\n1,\n"
    monkeypatch.setattr("nearsight.bench.core.measure", lambda quick: [{"ms": math.nan}])
    bench.run("core", threads=1, json_file=tmp_path / "bench.json")
    assert strict((tmp_path / "bench.json").read_text())["runs"][0]["rows"] == [{"ms": None}]


def test_a_row_of_json_is_a_line():
    value = {"a": [[1, math.nan], [3, 4]], "b": [{"x": "[\n", "y": {}}], 3: {"c": ()}, "d": {"e": 1}}
    text = to_json(value)
    assert strict(text) == {"a": [[1, None], [3, 4]], "b": [{"x": "[\n", "y": {}}], "3": {"c": []}, "d": {"e": 1}}
    assert text.splitlines()[1:5] == ['  "a": [', "    [1, null],", "    [3, 4]", "  ],"]
    assert to_json({"rows": [{"x": 1, "y": "z"}]}).splitlines()[2] == '    {"x": 1, "y": "z"}'


def test_what_eval_and_profile_print_is_json(tmp_path, capsys, broken):
    pictures = load_pictures("digits")
    blueprint = Blueprint("sasa_nano", pictures.classes, pictures.view(8), "digits")
    save_model(tmp_path / "model.safetensors", ns.create_model("sasa_nano", num_classes=10, in_chans=1), blueprint)
    assert cli.main(["eval", str(tmp_path), "--data", "digits", "--json"]) == 0
    assert strict(capsys.readouterr().out)["images"] == 360
    assert cli.main(["profile", str(broken), "--rounds", "1", "--no-growth", "--json"]) == 0
    assert strict(capsys.readouterr().out)["model"] == "sasa_nano"
