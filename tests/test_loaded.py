# SPDX-License-Identifier: Apache-2.0
"""A trained network in use: `ns.load`, its predictions, `nearsight predict`, and the folder as timm reads it."""

from __future__ import annotations

import ast
import copy
import csv
import importlib
import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import lines_of
from PIL import Image
from torch import nn

import nearsight as ns
from nearsight import cli
from nearsight.errors import DataError, DtypeError, OptionError, ShapeError
from nearsight.picture import from_array
from nearsight.saved.timm_folder import write_timm_config
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, save_model
from nearsight.training.data.decoded import _transform
from nearsight.training.data.pictures import Changes
from nearsight.training.recipe import Recipe
from nearsight.training.train import train

CLASSES = ("ant", "bee", "cat", "dog")
VIEWS = {1: View(1, 12, (0.3,), (0.4,), "black"), 3: View(3, 12, (0.3, 0.4, 0.5), (0.4, 0.2, 0.3), "black")}
EXTRAS = ("lightning", "torchmetrics", "jsonargparse", "sklearn", "scipy", "matplotlib", "jinja2", "rich", "datasets")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder for each number of channels, without the time of a run."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    for channels, view in VIEWS.items():
        blueprint = Blueprint.of("sasa_nano,position=bias", CLASSES, view, "pets")
        network = blueprint.build()
        for parameter in network.parameters():  # as if trained: its answers depend on the picture
            nn.init.normal_(parameter, std=0.3)
        (folder / str(channels)).mkdir()
        save_model(folder / str(channels) / "model.safetensors", network, blueprint)
        write_timm_config(folder / str(channels), network, blueprint)
    return lambda channels=1: folder / str(channels)


@pytest.fixture
def cells():
    return np.random.default_rng(0).integers(0, 256, (20, 15, 3), dtype=np.uint8)


def probabilities(found) -> torch.Tensor:
    return torch.stack([one.probabilities for one in found])


# ------------------------------------------------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("channels", VIEWS)
def test_a_picture_is_seen_as_in_training_however_it_is_given(run, cells, tmp_path, channels):
    model = ns.load(str(run(channels)))
    picture = Image.fromarray(cells)
    picture.save(tmp_path / "x.png")
    seen = _transform(VIEWS[channels], Changes())(picture.convert("L" if channels == 1 else "RGB"))[None]
    with torch.no_grad():
        expected = model(seen).softmax(1)
    planar = torch.from_numpy(cells).permute(2, 0, 1)
    ways = [tmp_path / "x.png", str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), picture, cells, planar]
    ways += [cells.astype(np.uint16) * 257, (cells / 255).astype(np.float32), Image.open(tmp_path / "x.png")]
    for way in ways:
        assert torch.equal(model.preprocess(way), seen), type(way)
        assert torch.equal(probabilities(model.predict(way)), expected), type(way)
    everything = model.predict(iter([*ways, cells[None], [seen[0], planar[None]]]), batch_size=4)
    torch.testing.assert_close(probabilities(everything), expected.expand(len(ways) + 3, -1))
    assert expected.std() > 0.01


def test_grey_deep_transparent_turned_and_coloured_by_a_palette(run, cells, tmp_path):
    """Each is what a person sees, in a file and in memory alike; to a network of one channel and of three."""
    grey = np.arange(300, dtype=np.uint8).reshape(20, 15)
    clear = np.dstack([cells, np.where(grey > 100, 255, 0).astype(np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    kinds = {
        "grey": (Image.fromarray(grey), grey, {}),
        "deep": (Image.fromarray(grey.astype(np.uint16) * 257), grey, {}),
        "transparent": (Image.fromarray(clear), np.where(clear[..., 3:] == 255, cells, 0), {}),
        "turned": (Image.fromarray(cells), np.rot90(cells, -1), {"exif": exif}),
        "palette": (
            Image.fromarray(cells).quantize(8),
            np.asarray(Image.fromarray(cells).quantize(8).convert("RGB")),
            {},
        ),
    }
    for kind, (picture, seen, options) in kinds.items():
        picture.save(tmp_path / f"{kind}.png", **options)
        for channels in VIEWS:
            model = ns.load(run(channels))
            found = model.preprocess([tmp_path / f"{kind}.png", Image.open(tmp_path / f"{kind}.png"), seen])
            assert torch.equal(found[0], found[1]), kind
            assert torch.equal(found[0], found[2]), kind
    assert torch.equal(model.preprocess(clear), model.preprocess(kinds["transparent"][1]))


def test_predictions_have_names_and_are_the_same_whatever_is_beside_them(run, cells):
    model = ns.load(run())
    pictures = [cells, cells[::-1], cells[:, :9]]
    found = model.predict(pictures)
    for picture, one in zip(pictures, found, strict=True):
        torch.testing.assert_close(model.predict(picture)[0].probabilities, one.probabilities)
        assert one.name == CLASSES[one.probabilities.argmax()]
        assert one.probability == one.probabilities.max().item()
        assert sum(share for _, share in one.top(9)) == pytest.approx(1)
        assert [name for name, _ in one.top(9)] == [
            CLASSES[place] for place in one.probabilities.argsort(descending=True)
        ]
        assert repr(one) == f"Prediction({one.name!r}, {100 * one.probability:.1f} %)"
    with pytest.raises(OptionError, match="at least 1 class can be named; received 0"):
        found[0].top(0)


def test_it_is_evaluated_whatever_mode_it_is_in_and_left_in_it(run, cells):
    model = ns.load(run())
    assert not model.training
    expected = probabilities(model.predict(cells))
    model.train()
    model.head.eval()
    state = {name: one.clone() for name, one in model.state_dict().items()}
    assert torch.equal(probabilities(model.predict(cells)), expected)
    assert model.training
    assert not model.head.training
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    with torch.no_grad():
        assert not torch.equal(model(model.preprocess(cells)).softmax(1), expected)  # batch norms in training
    model(model.preprocess(cells)).sum().backward()  # nothing was left that no gradient passes


def test_what_the_network_sees_passes_as_it_is_at_any_size(run):
    model = ns.load(run())
    tensors = [torch.randn(1, 12, 12), torch.randn(1, 12, 12), torch.randn(1, 20, 16), torch.randn(1, 12, 12)]
    found = model.predict(tensors)
    with torch.no_grad():
        for tensor, one in zip(tensors, found, strict=True):
            torch.testing.assert_close(one.probabilities, model(tensor[None]).softmax(1)[0])
    assert torch.equal(model.preprocess(torch.stack(tensors[:2])), torch.stack(tensors[:2]))
    with pytest.raises(ShapeError, match="one shape; received 1x12x12, 1x20x16"):
        model.preprocess(tensors)


def test_weights_in_another_dtype_and_on_another_device(run, cells):
    model = ns.load(run(), dtype=torch.bfloat16)
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model.preprocess(cells).dtype == torch.bfloat16
    said = probabilities(model.predict([cells, torch.randn(1, 12, 12)]))
    assert said.dtype == torch.float32
    assert said.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)  # the softmax is not in bfloat16
    model = ns.load(run(), device="meta")
    assert model.preprocess(cells).device.type == "meta"
    with pytest.raises(OptionError, match="device must be one that there is; received 'cuda:99'"):
        ns.load(run(), device="cuda:99")
    with pytest.raises(DtypeError, match=r"dtype must be a floating point one.*received torch.int8"):
        ns.load(run(), dtype=torch.int8)


def test_it_stays_the_network_that_it_was_and_can_be_copied(run, cells):
    model = ns.load(run())
    expected = probabilities(model.predict(cells))
    assert type(model).__name__ == "SasaResNet"
    assert isinstance(model, type(ns.create_model("sasa_nano")))
    assert model.state_dict().keys() == ns.create_model("sasa_nano,position=bias").state_dict().keys()
    model.view = VIEWS[1]
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False)]
    for other in copies:
        assert type(other) is type(model)
        assert (other.classes, other.view) == (CLASSES, VIEWS[1])
        assert torch.equal(probabilities(other.predict(cells)), expected)
    compiled = torch.compile(copies[0], backend="eager")
    assert torch.equal(probabilities(compiled.predict(cells)), expected)
    model.reset_classifier(2)
    with pytest.raises(
        OptionError, match=r"one output for each of its 4 classes; received \(1, 2\): set the model's .classes"
    ):
        model.predict(cells)
    model.classes = ("no", "yes")
    assert model.predict(cells)[0].name in model.classes


MISTAKES = {
    "no file": ("nowhere.png", DataError, "there is no image nowhere.png"),
    "a folder": (".", DataError, r"cannot read the image \.: it is no regular file"),
    "no picture": (b"text", DataError, "it is damaged, or no picture"),
    "colours first": (np.zeros((3, 8, 8), np.uint8), ShapeError, r"the colours last; received \(3, 8, 8\)"),
    "grey pictures": (np.zeros((2, 5, 8, 8), np.uint8), ShapeError, r"received \(5, 8, 8\)"),
    "white unknown": (np.full((8, 8), 16.0), OptionError, "between 0 and 1; received 16 to 16"),
    "NaN": (np.full((8, 8), np.nan), OptionError, "between 0 and 1; received nan to nan"),
    "long numbers": (np.zeros((8, 8), np.int64), OptionError, "received int64, of which it is not known what is white"),
    "numbers": ([1, 2], DtypeError, "an image is a file, its bytes,.*received 1 of type int"),
    "nothing": (None, DtypeError, "received None of type NoneType"),
    "channels": (torch.zeros(3, 8, 8), ShapeError, r"\(1, H, W\) or a batch of those; received \(3, 8, 8\)"),
    "axes": (torch.zeros(8, 8), ShapeError, r"received \(8, 8\)"),
    "infinity": (
        torch.full((1, 8, 8), torch.inf),
        DataError,
        "is not finite for 1 of 1 images.*there is no prediction",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_is_no_image(run, kind):
    images, error, message = MISTAKES[kind]
    with pytest.raises(error, match=message):
        ns.load(run()).predict(images)


def test_nothing_is_loaded_from_nowhere(run, tmp_path):
    with pytest.raises(DataError, match="`nearsight train` leaves them"):
        ns.load(tmp_path)
    with pytest.raises(ShapeError, match="at least one image is needed"):
        ns.load(run()).preprocess([])
    assert ns.load(run()).predict([]) == []


def test_arrays_of_every_kind_are_pictures():
    assert from_array(np.array([[True, False]])).getpixel((0, 0)) == 255
    assert from_array(np.zeros((2, 3, 1), np.uint8)).mode == "L"
    assert [from_array(np.zeros((2, 3, n), np.float16)).mode for n in (2, 3, 4)] == ["LA", "RGB", "RGBA"]
    assert from_array(np.zeros((2, 3))).size == (3, 2)


# ------------------------------------------------------------------------------------------------------------- the command


def test_predict_names_what_it_cannot_read_and_does_the_others(run, cells, tmp_path, capsys):
    """A folder at any depth, a link in a circle, a number of classes, CSV; the exit code is 2 where one is missing."""
    folder = tmp_path / "new"
    (folder / "deep").mkdir(parents=True)
    for name, turned in (("b.png", cells), ("deep/a.PNG", cells[::-1]), (".hidden.png", cells)):
        Image.fromarray(turned).save(folder / name, "png")
    (folder / "notes.txt").write_text("")
    (folder / "round").symlink_to(folder)
    (folder / "=cmd.png").write_bytes(b"damaged")
    model = ns.load(run())
    arguments = ["predict", str(run()), str(folder), str(tmp_path / "nowhere.png"), str(folder / "b.png")]
    assert cli.main([*arguments, "--csv", "--top", "2"]) == 2
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    read = [str(folder / "b.png"), str(folder / "deep" / "a.PNG"), str(folder / "b.png")]
    assert [row["image"] for row in rows] == [name for name in read for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    expected = [said for one in model.predict(read) for said in one.top(2)]
    assert [(row["class"], float(row["probability"])) for row in rows] == [
        (name, pytest.approx(share, rel=1e-5)) for name, share in expected
    ]
    left_out, error = captured.err.splitlines()
    assert left_out == f"left out 1 files of {folder} that are not read as pictures: 1 .txt"
    assert error.startswith("nearsight: error: 2 of the images cannot be read: ")
    assert f"there is no image {tmp_path / 'nowhere.png'}" in error
    assert f"cannot read the image {folder / '=cmd.png'}: it is damaged" in error
    assert cli.main(["predict", str(run()), str(folder / "b.png")]) == 0
    name, share = expected[0]
    assert capsys.readouterr().out == f"{folder / 'b.png'}: {name} {100 * share:.1f} %\n"


def test_mistakes_of_predict_are_one_line(run, tmp_path, capsys):
    cases = {
        ("predict", "nowhere", "x.png"): "there is no nowhere; `nearsight train` leaves them",
        ("predict", str(run()), "x.png", "--top", "0"): "--top must be at least 1; received 0",
        ("predict", str(run()), str(tmp_path)): f"1 of the images cannot be read: there is no image in {tmp_path}",
        ("predict", str(run()), "x.png", "--background", "blu"): "background must be an opaque colour",
        ("predict", str(run())): "the following arguments are required: IMAGE",
    }
    for arguments, message in cases.items():
        assert cli.main(list(arguments)) == 2
        assert message in capsys.readouterr().err


def test_none_of_the_training_extra_is_needed(run, cells, tmp_path, capsys, monkeypatch):
    Image.fromarray(cells).save(tmp_path / "x.png")
    for parent, name in ((ns, "saved"), (importlib.import_module("nearsight.commands"), "predict")):
        monkeypatch.setattr(
            parent, name, getattr(parent, name, None), raising=False
        )  # what is loaded anew leaves no trace
    for name in [one for one in sys.modules if one.startswith(("nearsight.saved", "nearsight.commands.predict"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in (*EXTRAS, "nearsight.training", "nearsight.inspect"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import lightning  # noqa: F401
    assert cli.main(["predict", str(run(3)), str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(str(tmp_path / "x.png"))


# -------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("channels", VIEWS)
def test_timm_makes_it_from_the_folder_wherever_that_is(run, cells, tmp_path, channels):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in run(channels).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    model = ns.load(moved)
    other = timm.create_model(f"local-dir:{moved}", pretrained=True).eval()
    seen = timm.data.create_transform(**timm.data.resolve_model_data_config(other))(
        Image.fromarray(cells).convert("L" if channels == 1 else "RGB")
    )
    with torch.no_grad():
        assert torch.equal(other(seen[None]).softmax(1)[0], model.predict(cells)[0].probabilities)
    assert other.pretrained_cfg["label_names"] == list(CLASSES)
    assert ns.create_model(f"local-dir:{moved}", pretrained=True, num_classes=7)(seen[None]).shape == (1, 7)


def test_the_explorer_takes_folders_pictures_and_arrays_as_the_command_does(run, cells, tmp_path):
    Image.fromarray(cells).save(tmp_path / "x.png")
    assert cli.main(["explore", str(run()), str(tmp_path / "x.png"), "--output", str(tmp_path / "page.html")]) == 0
    expected = (tmp_path / "page.html").read_text()
    picture = Image.open(tmp_path / "x.png")
    for image in (picture, cells, torch.from_numpy(cells).permute(2, 0, 1)):
        assert ns.explore(str(run()), image).html == expected
    loaded = ns.explore(ns.load(run()), cells, title="sasa_nano,position=bias", subtitle="Trained on pets.")
    assert loaded.html == expected


def test_the_page_keeps_its_word(run, cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(run())
    for name in ("seven.png", "eight.png"):
        Image.fromarray(cells).save(name)
    exec(lines_of("howto/use.md", "In Python"))
    said, _ = ns.load("runs/digits").predict(["seven.png", "eight.png"])
    assert capsys.readouterr().out == f"{said.name} {said.probability} {said.top(3)}\n" * 2
    page: dict = {}
    exec(lines_of("howto/use.md", "With timm"), page)
    seen = page["transform"](Image.open("seven.png").convert("L"))[None]
    assert page["names"][page["model"](seen).argmax()] == said.name


def names_of_paths(text: str) -> list[str]:
    """Arguments of public functions that take a path and no text."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            kinds = {one.arg: ast.unparse(one.annotation) for one in arguments if one.annotation is not None}
            found += [f"{node.name}({name})" for name, kind in kinds.items() if "Path" in kind and "str" not in kind]
    return found


def test_a_text_does_wherever_a_path_does(run, tmp_path, monkeypatch):
    assert names_of_paths("def read(path: Path): ...\ndef _read(path: Path): ...") == ["read(path)"]
    source = Path(ns.__file__).parent
    wrong = {str(file): names_of_paths(file.read_text()) for file in source.rglob("*.py")}
    assert {file: names for file, names in wrong.items() if names} == {}
    monkeypatch.setenv("HOME", os.fspath(run().parent))
    assert ns.load("~/1").classes == CLASSES
    with pytest.raises(Exception, match="holds a run already"):
        train(Recipe(), str(run()))
