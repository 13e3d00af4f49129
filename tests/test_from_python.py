# SPDX-License-Identifier: Apache-2.0
"""`nearsight.train`: networks and data that are objects of Python's, in the same loop and the same folder."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import nearsight as ns
from nearsight.cli import main
from nearsight.errors import DataError, DtypeError, OptionError
from nearsight.saved.trained_on import read_trained
from nearsight.training.data import given_pictures
from nearsight.training.data.given import check_sendable
from nearsight.training.recipe import read_recipe

CLASSES = ("dark", "light")


class Tiny(nn.Module):
    """As many write one: ``view`` after a convolution, and weights that are tied."""

    def __init__(self, classes=2, channels=1, width=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.again = nn.Conv2d(channels, width, 3, padding=1)
        self.again.weight = self.conv.weight
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 64, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x) + self.again(x)).relu().view(len(x), -1))


class Pictures(Dataset):
    """32 grey pictures of 8x8 in eight bits, by their brightness in two classes; a label is what ``label`` makes of it."""

    classes = CLASSES

    def __init__(self, count=32, show: Any = Image.fromarray, label: Any = int):
        noise = np.random.default_rng(count).integers(0, 120, (count, 8, 8))
        self.cells = (noise + 120 * (np.arange(count) % 2)[:, None, None]).astype(np.uint8)
        self.show, self.label = show, label

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return self.show(self.cells[index]), self.label(index % 2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Pictures())


def scaled(cells, mean=0.0, std=1.0):
    """What torchvision's ToTensor and Normalize make of a grey picture."""
    return (torch.from_numpy(cells)[None].float() / 255 - mean) / std


train = partial(ns.train, epochs=1, batch_size=8)


def quietly(*arguments, **settings):
    with redirect_stdout(io.StringIO()):
        return train(*arguments, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    output = tmp_path_factory.mktemp("own") / "run"
    said = io.StringIO()
    with redirect_stdout(said):
        found = train(model=Tiny(), data=Pictures(), output=output, epochs=2, lr=0.01)
    return found, output, said.getvalue()


# ------------------------------------------------------------------------------------------------------- what it leaves


def test_a_run_leaves_what_the_command_does(run):
    found, output, said = run
    there = {file.name for file in output.iterdir()}
    assert there == {
        *("config.yaml", "last.ckpt", "metrics.csv", "model.safetensors", "report.html", "timing.csv", "trained.npz")
    }
    assert "model    python:Tiny" in said
    assert "22 training, 3 validation, 7 test images, 8x8x1, 2 classes" in said
    assert found.evaluation.count == 7
    assert len((output / "metrics.csv").read_text().splitlines()) == 3
    assert "nearsight train --config" not in (output / "report.html").read_text()


def test_its_config_says_that_it_cannot_be_run_again(run, tmp_path, capsys):
    _, output, _ = run
    text = (output / "config.yaml").read_text()
    assert text.startswith("# Its model and data came from Python")
    assert yaml.safe_load(text)["model"] == "python:Tiny"
    assert read_recipe(output / "config.yaml").data == "python:Pictures"
    assert main(["train", "--config", str(output / "config.yaml"), "--output", str(tmp_path / "again")]) == 2
    refused = capsys.readouterr().err
    assert "the data Pictures was given from Python" in refused
    assert refused.count("\n") == 1


def test_it_is_loaded_into_a_network_like_it(run):
    found, output, _ = run
    cells = Pictures().cells[:4]
    torch.manual_seed(1)
    fresh = Tiny()
    model = ns.load(output, model=fresh)
    assert model is fresh
    assert model.classes == CLASSES
    images = model.preprocess(list(cells))
    assert torch.equal(model(images), found.model.eval()(images))
    assert model.predict(cells[1])[0].classes == CLASSES
    again = ns.load(output, model=model)  # one that was loaded before
    assert torch.equal(again(images), model(images))


def test_without_it_one_line_says_so(run, capsys, tmp_path):
    _, output, _ = run
    with pytest.raises(DataError, match=r"network Tiny was given from Python.*nearsight\.load\(RUN, model=network\)"):
        ns.load(output)
    for command in (["eval", str(output), "--data", "digits"], ["export", str(output), "--format", "pt2"]):
        assert main(command) == 2
        refused = capsys.readouterr().err
        assert "given from Python" in refused
        assert refused.count("\n") == 1
    with pytest.raises(DataError, match="Tiny"):
        ns.load(output, model=Tiny(width=5))
    with pytest.raises(DataError, match=r"\(2, 2\).*received \(2, 3\)"):
        ns.load(output, model=Tiny(classes=3))
    with pytest.raises(DtypeError, match=r"a network that is made, as Tiny\(\)"):
        ns.load(output, model=Tiny)  # pyright: ignore


def test_a_network_that_a_file_rebuilds_is_not_given(tmp_path):
    quietly(model="sasa_nano", data=Pictures(), output=tmp_path / "named")
    assert json.loads((tmp_path / "named" / "config.json").read_text())["architecture"] == "sasa_nano"
    assert ns.load(tmp_path / "named").classes == CLASSES
    with pytest.raises(OptionError, match=r"rebuild its network, sasa_nano: leave out model="):
        ns.load(tmp_path / "named", model=Tiny())


def test_it_is_the_loop_of_the_command_and_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    """Two epochs at once, and one, a stop and another, end with the same bits."""
    from nearsight.training.callbacks import Journal
    from nearsight.training.train import Interrupted

    whole, _, _ = run
    written = Journal.on_train_epoch_end

    def stopped(self, trainer, module):
        written(self, trainer, module)
        raise SystemExit

    torch.manual_seed(0)
    monkeypatch.setattr(Journal, "on_train_epoch_end", stopped)
    with pytest.raises(Interrupted, match=r"same call, output='.*', resume=True"):
        quietly(model=Tiny(), data=Pictures(), output=tmp_path / "half", epochs=2, lr=0.01)
    monkeypatch.setattr(Journal, "on_train_epoch_end", written)
    found = quietly(model=Tiny(), data=Pictures(), output=tmp_path / "half", epochs=2, lr=0.01, resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name]), name


def test_bars_count_epochs_from_one(tmp_path, monkeypatch):
    """Where Lightning asks for their names, which it does not promise."""
    from nearsight.training import train as room
    from nearsight.training.callbacks import Bar

    named = []

    class Noting(Bar):
        def _add_task(self, total_batches, description, visible=True):
            named.append(description.strip())
            return super()._add_task(total_batches, description, visible)

        def _update(self, progress_bar_id, current, visible=True):
            if self.progress is not None:
                named.extend(task.description.strip() for task in self.progress.tasks)
            return super()._update(progress_bar_id, current, visible)

    monkeypatch.setattr(room, "progress", Noting)
    quietly(model=Tiny(), data=Pictures(), output=tmp_path / "run", epochs=2)
    assert [name for name in dict.fromkeys(named) if name.startswith("Epoch")] == ["Epoch 1/2", "Epoch 2/2"]


# ------------------------------------------------------------------------------------------------- what data may look like


def test_pictures_keep_their_channels_and_size():
    grey = given_pictures(Pictures())
    assert (grey.channels, grey.size, grey.classes, len(grey.train.labels)) == (1, 8, CLASSES, 22)
    coloured = given_pictures(Pictures(show=lambda cells: np.stack([cells] * 3, 2)))
    assert (coloured.channels, coloured.mean) == (3, (0.485, 0.456, 0.406))
    several = given_pictures(Pictures(show=lambda cells: Image.fromarray(cells[: 6 + cells[0, 0] % 2])))
    assert several.size is None
    assert several.fitting(224) == 32


def test_tensors_pass_as_they_are_and_the_network_can_be_shown_pictures():
    data = Pictures(show=partial(scaled, mean=0.5, std=0.25))
    pictures = given_pictures(data, mean=[0.5], std=[0.25])
    items = pictures.train.dataset(pictures.view(8), training=True)
    train: Any = pictures.train
    for index, place in enumerate(train.chosen):
        image, label = data[place]
        for item in (index, index + 5 * len(train)):  # of any epoch
            assert torch.equal(items[item][0], image)
            assert items[item][1] == label
    with pytest.raises(OptionError, match=r"between 0 and 1 need mean= and std="):
        given_pictures(data)
    plain = given_pictures(Pictures(show=scaled))
    assert (plain.mean, plain.std) == ((0.0,), (1.0,))


def test_a_picture_is_known_again_whatever_it_comes_as():
    """Pillow's, uint8 tensors, and what was made of them by scaling and normalising."""
    shown = {
        Image.fromarray: {},
        torch.from_numpy: {},
        partial(scaled, mean=0.5, std=0.25): {"mean": [0.5], "std": [0.25]},
    }
    found = []
    for show, known in shown.items():
        pictures = given_pictures(Pictures(show=show), **known)
        found.append(pictures.train.dataset(pictures.view(8), training=False).digests())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert len(found[0].unique()) == 22


def test_what_was_trained_on_is_noted(run):
    _, output, _ = run
    noted = read_trained(output)
    assert noted is not None
    assert len(noted) == 22


def test_splits_are_given_by_name_or_in_order():
    parts = {"train": Pictures(32), "valid": Pictures(10), "test": Pictures(12)}
    for data in (parts, tuple(parts.values())):
        pictures = given_pictures(data)
        assert [len(one) for one in (pictures.train, pictures.validation, pictures.test)] == [32, 10, 12]
    pictures = given_pictures((Pictures(40), Pictures(10)))
    assert [len(one) for one in (pictures.train, pictures.validation, pictures.test)] == [36, 4, 10]
    whole = Pictures(40)
    whole.targets = [index % 2 for index in range(40)]  # pyright: ignore
    assert given_pictures(Subset(whole, range(2, 34))).classes == CLASSES


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (Stream(), DtypeError, "Stream, which has no length"),
        (DataLoader(Pictures()), DtypeError, r"received a DataLoader: give its \.dataset"),
        (7, DtypeError, "received int, which has no length"),
        ([], DataError, "must have items; list is empty"),
        (torch.zeros(32, 1, 8, 8), DataError, r"item 0 of Tensor is a tensor \(1, 8, 8\).*TensorDataset"),
        ((np.zeros((32, 8, 8)), np.zeros(32)), DataError, r"pair of a picture and its label; item 0 of ndarray"),
        (TensorDataset(torch.zeros(32, 1, 8, 8)), DataError, "item 0 of TensorDataset is of type tuple with 1 parts"),
        (Pictures(label=str), DataError, "whole number; that of item 0 of Pictures is '0' of type str"),
        (Pictures(label=float), DataError, "whole number; that of item 0 of Pictures is 0.0"),
        (Pictures(label=lambda label: label - 1), DataError, "count from 0; that of item 0 of Pictures is -1"),
        (
            Pictures(label=lambda label: 2 * label),
            OptionError,
            "a class for each label, 0 to 2; received 2: dark, light",
        ),
        (Pictures(label=lambda label: 0), DataError, "two classes or more"),
        (Pictures(label=lambda label: {}[label]), DataError, "cannot read item 0 of Pictures: KeyError: 0"),
        (Pictures(4), DataError, "too few images to split"),
        (Pictures(show=lambda cells: scaled(cells)[:, 1:]), DataError, r"shape \(C, S, S\).*item 0.*\(1, 7, 8\)"),
        (Pictures(show=lambda cells: None), DataError, "item 0 of Pictures is no picture that can be read"),
        ({"train": Pictures(), "holdout": Pictures()}, DataError, "named train, val and test; received train, holdout"),
        ({"test": Pictures()}, DataError, "must have a split named train"),
        ((Pictures(),) * 4, DtypeError, r"\(train, test\) or \(train, val, test\); received 4"),
    ],
)
def test_other_data_is_one_clear_line(data, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as refused:
        train(model=Tiny(), data=data, output=tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_labels_that_change_are_no_labels():
    data = Pictures()
    data.targets = [1 - index % 2 for index in range(32)]  # pyright: ignore
    pictures = given_pictures(data)
    with pytest.raises(DataError, match=r"must stay what it is; that of item \d+ of Pictures is ., and was . before"):
        pictures.train.dataset(pictures.view(8), training=True)[0]


def test_colours_are_not_lost_without_a_word():
    data = Pictures(count=400)  # more than are looked at before
    data.show = lambda cells: cells if (cells != data.cells[1]).any() else np.stack([cells] * 3, 2)
    pictures = given_pictures(data)
    (part,) = (one for one in (pictures.train, pictures.validation, pictures.test) if 1 in one.chosen)  # pyright: ignore
    with pytest.raises(DataError, match="must be grey where the others are; item 1 of Pictures has colours"):
        part.dataset(pictures.view(8), training=False).digests()


# ------------------------------------------------------------------------------------------- networks, settings, processes


class Auxiliary(Tiny):
    """As torchvision's Inception: another kind of answer in training."""

    def forward(self, x):
        return (super().forward(x),) * 2 if self.training else super().forward(x)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"model": Tiny(channels=3)},
            OptionError,
            r"network Tiny cannot take float32 images \(2, 1, 8, 8\): Given groups",
        ),
        ({"model": Tiny().double()}, OptionError, "network Tiny cannot take float32 images"),
        (
            {"model": Tiny(classes=10)},
            OptionError,
            r"\(2, 2\), an output for each class of Pictures; received \(2, 10\)",
        ),
        ({"model": Auxiliary()}, OptionError, "for each class of Pictures; received tuple"),
        ({"model": nn.Flatten()}, OptionError, "weights that can be trained; Flatten has none"),
        ({"model": Tiny().requires_grad_(False)}, OptionError, "weights that can be trained; Tiny has none"),
        ({"model": Tiny}, DtypeError, r"a network, as Tiny\(\); received .*: call it"),
        ({"model": None}, DtypeError, "a name or a network"),
        ({"devices": 2}, OptionError, "model and data given as objects train in one process.*received 2 devices"),
        ({"drop_path": 0.1}, OptionError, "drop_path is built into a network that is made by its name"),
        ({"epoch": 3}, OptionError, "there is no setting epoch; did you mean epochs"),
        ({"epochs": "3"}, DtypeError, "epochs is of another type"),
        ({"classes": ["one"]}, OptionError, "a class for each label, 0 to 1; received 1: one"),
        ({"mean": [0.5]}, OptionError, "mean and std belong together"),
        ({"mean": [0.5] * 3, "std": [0.2] * 3}, OptionError, "mean must be 1 finite number, one per channel"),
        ({"data": "digits", "classes": ["one"]}, OptionError, "digits has its own: leave them out"),
    ],
)
def test_what_cannot_be_is_one_clear_line(settings, kind, message, tmp_path):
    with pytest.raises(kind, match=message) as refused:
        quietly(**{"model": Tiny(), "data": Pictures(), "output": tmp_path / "run", "epochs": 1, **settings})
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_network_is_as_it_was_where_it_is_refused():
    network = Auxiliary().eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(OptionError):
        quietly(model=network, data=Pictures())
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_workers_that_begin_afresh_need_data_that_can_be_sent(monkeypatch):
    pictures = given_pictures(Pictures(label=lambda label: label))
    check_sendable(pictures)  # copies of this process have it
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(OptionError, match=r"data that can be pickled, and Pictures cannot: .*lambda.*take workers=0"):
        check_sendable(pictures)
    check_sendable(given_pictures(Pictures()))
