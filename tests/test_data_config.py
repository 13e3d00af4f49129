# SPDX-License-Identifier: Apache-2.0
"""A model knows how it sees pictures, and is shown them so by whoever asks: training, evaluation, the explorer and timm."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import nearsight as ns
from nearsight.models.data_config import class_names, data_config, seen
from nearsight.saved.opened import open_model
from nearsight.saved.view import View
from nearsight.saved.weights import WEIGHTS_FILE, Blueprint, load_model, save_model
from nearsight.training.data.decoded import _transform
from nearsight.training.data.pictures import Changes

VIEW = View(1, 12, (0.3,), (0.4,))
CLASSES = tuple("abcdefghij")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    blueprint = Blueprint.of("sasa_nano", CLASSES, VIEW, "digits")
    save_model(tmp_path / WEIGHTS_FILE, blueprint.build(), blueprint)
    cells = np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8)
    Image.fromarray(cells).save(tmp_path / "three.png")
    return tmp_path


def test_a_saved_model_says_how_it_was_trained(folder):
    model, blueprint = load_model(folder)
    config = resolve_model_data_config(model)
    assert config == VIEW.data_config() == data_config(model)
    assert class_names(model) == blueprint.classes == CLASSES
    assert View.of(model) == VIEW
    assert (config["crop_pct"], config["interpolation"], config["crop_mode"]) == (1.0, "bilinear", "center")


def test_all_see_the_same(folder):
    model, _ = load_model(folder)
    picture = Image.open(folder / "three.png")
    evaluated = _transform(VIEW, Changes())(picture)
    assert torch.equal(create_transform(**resolve_model_data_config(model))(picture), evaluated)
    assert torch.equal(seen(picture, data_config(model))[0], evaluated)


def test_the_explorer_names_the_class_that_the_command_names(folder, tmp_path, capsys):
    from nearsight.cli import main

    model, _ = load_model(folder)
    picture = folder / "three.png"
    page = ns.explore(model, picture)
    with torch.no_grad():
        best = model(_transform(VIEW, Changes())(Image.open(picture))[None]).softmax(1).topk(3).indices[0].tolist()
    assert '"height": 12' in page.html
    assert main(["explore", str(folder), str(picture), "--output", str(tmp_path / "page.html")]) == 0
    command = (tmp_path / "page.html").read_text()
    predictions = [re.search(r'"prediction": ?(\[.*?\])', text)[1] for text in (page.html, command)]
    assert predictions[0] == predictions[1]
    assert [predictions[0].index(f'"{CLASSES[place]}"') for place in best] == sorted(
        predictions[0].index(f'"{CLASSES[place]}"') for place in best
    )


def test_a_network_by_name_is_seen_as_timm_says():
    model = timm.create_model("nat_mini", num_classes=0, depths=(1,), num_heads=(1,), embed_dim=16)
    config = data_config(model)
    assert (config["crop_pct"], config["interpolation"], config["input_size"]) == (0.875, "bicubic", (3, 224, 224))
    cells = np.random.default_rng(0).integers(0, 256, (260, 300, 3), dtype=np.uint8)
    picture = Image.fromarray(cells)
    image, shown = seen(picture, config)
    assert torch.equal(image, create_transform(**resolve_model_data_config(model))(picture))
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_another_number_of_channels_has_the_mean_of_their_means():
    model = ns.create_model("sasa_nano", in_chans=1, pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.6)})
    assert data_config(model)["mean"] == (pytest.approx(0.3),)
    assert data_config(model)["input_size"] == (1, 32, 32)
    assert class_names(model) is None


def test_a_run_that_is_opened_has_its_own_view(folder):
    opened = open_model(str(folder), size=20)
    assert (opened.view, opened.classes) == (View(1, 20, (0.3,), (0.4,)), CLASSES)
