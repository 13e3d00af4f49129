# SPDX-License-Identifier: Apache-2.0
"""`nearsight convert`: a folder that loads, evaluates and converts as any other; and mistakes in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import nearsight as ns
from nearsight import cli
from nearsight.conversion import GatedPositionalSelfAttention
from nearsight.models import create_model
from nearsight.saved.weights import Blueprint, load_model, save_model
from nearsight.training.data import load_pictures


@pytest.fixture
def trained(tmp_path):
    """A convolutional network in a folder as a run leaves it."""
    pictures = load_pictures("digits")
    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    blueprint = Blueprint("conv_nano", pictures.classes, pictures.view(8), "digits")
    save_model(folder / "model.safetensors", create_model("conv_nano", num_classes=10, in_chans=1), blueprint)
    return folder


def output_of(capsys, *arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments) -> str:
    """The one line that a mistake leaves on stderr."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nearsight: error: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_a_trained_network_answers_the_same_after_conversion(trained, tmp_path, capsys):
    exact = tmp_path / "exact"
    shown = output_of(capsys, "convert", trained, "--init", "exact", "--margin", 1, "--output", exact)
    assert "4 converted (exact), 1 skipped" in shown
    assert "largest relative difference of the outputs: 0.0e+00" in shown
    answers = [
        json.loads(output_of(capsys, "eval", folder, "--data", "digits", "--json")) for folder in (trained, exact)
    ]
    assert answers[0] == answers[1]
    network, blueprint = load_model(exact)
    layers = [module for module in network.modules() if isinstance(module, GatedPositionalSelfAttention)]
    assert [layer.margin for layer in layers] == [1] * 4
    assert blueprint.converted["init"] == "exact"
    report = json.loads((exact / "report.json").read_text())
    assert report["model"] == "conv_nano"
    assert len(report["converted"]) == 4
    message = fails(capsys, "convert", exact, "--init", "random", "--output", tmp_path / "again")
    assert "is converted already (exact)" in message
    assert "holds a model already" in fails(capsys, "convert", trained, "--init", "exact", "--output", exact)


def test_random_weights_are_told(trained, tmp_path, capsys):
    """By a name alone; trained ones, of a run or of a file, need no word."""
    state = tmp_path / "mine.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), state)
    ways = {"name": ["test_resnet"], "file": ["test_resnet", "--checkpoint", state], "folder": [trained]}
    for way, arguments in ways.items():
        said = ["convert", *arguments, "--init", "exact", "--json", "--output", tmp_path / way]
        assert cli.main([str(word) for word in said]) == 0
        captured = capsys.readouterr()
        json.loads(captured.out)
        assert ("weights of test_resnet are random" in captured.err) == (way == "name"), way
        assert json.loads((tmp_path / way / "report.json").read_text())["random_weights"] == (way == "name")


def test_weights_from_a_file(tmp_path, capsys):
    """The classifier and the stem of the file say how many classes and channels there are."""
    network = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    save_file(network.state_dict(), tmp_path / "mine.safetensors")
    arguments = (
        "convert",
        "test_resnet",
        "--init",
        "exact",
        "--stages",
        4,
        "--checkpoint",
        tmp_path / "mine.safetensors",
    )
    report = json.loads(output_of(capsys, *arguments, "--output", tmp_path / "late", "--json"))
    assert report["converted"] == ["layer4.0.conv1", "layer4.0.conv2"]
    loaded, _ = load_model(tmp_path / "late")
    x = torch.randn(1, 1, 64, 50)
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(x), network.eval()(x), rtol=1e-5, atol=1e-6)


def test_what_a_file_does_not_say_is_typed(tmp_path, capsys):
    """Classes, size, mean and deviation; what is not typed is timm's, crop and interpolation too."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2).eval()
    torch.save({"epoch": 3, "model_state_dict": network.state_dict()}, tmp_path / "mine.pth")
    arguments = ["convert", "test_resnet", "--init", "exact", "--stages", "4", "--checkpoint", tmp_path / "mine.pth"]
    (tmp_path / "names.txt").write_text("cat\n\nblack dog\n")
    colours = ["--mean", "0.1", "0.2", "0.3", "--std", "0.5", "0.6", "0.7"]
    for way, names in {"typed": ["cat", "black dog"], "file": [tmp_path / "names.txt"]}.items():
        output_of(capsys, *arguments, "--classes", *names, "--size", 96, *colours, "--output", tmp_path / way)
        model = ns.load(tmp_path / way)
        assert model.classes == ("cat", "black dog")
        assert (model.view.size, model.view.mean, model.view.std) == (96, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    config = timm.data.resolve_model_data_config(network)
    assert (model.view.crop_pct, model.view.interpolation) == (config["crop_pct"], config["interpolation"])
    assert model.view.crop_pct != 1
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 120, 3), dtype=np.uint8))
    config |= {"input_size": (3, 96, 96), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    with torch.no_grad():
        expected = network(timm.data.create_transform(**config)(picture)[None]).softmax(1)[0]
    torch.testing.assert_close(model.predict(picture)[0].probabilities, expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "file" / "report.json").read_text())["weights"] == "mine.pth (model_state_dict)"
    wrong = {
        ("--classes", "a", "b", "c"): "--classes must name all 2 classes of the network; received 3",
        ("--classes", "a", "a"): "each class has a name of its own; received 'a' twice",
        ("--classes", "nowhere.txt"): "two names or more, or a file with one a line; nowhere.txt: No such file",
        ("--mean", "0.5"): "--mean must have a number for each of 3 channels; received 1",
        ("--std", "0.5", "0", "1"): "--std must be finite and above 0; received 0",
        ("--mean", "nan", "0", "1"): "--mean must be finite; received nan",
        ("--size", "0"): "--size must be at least 1; received 0",
    }
    for words, message in wrong.items():
        assert message in fails(capsys, *arguments, *words, "--output", tmp_path / "x")
    message = fails(capsys, "convert", tmp_path / "typed", "--init", "exact", "--size", 8, "--output", tmp_path / "x")
    assert "has its weights already, and says how it sees pictures: leave out" in message


def test_fresh_attention_with_its_options(tmp_path, capsys):
    arguments = ("--kernel-size", 3, "--num-heads", 4, "--position", "bias", "--kernels", 3, "--names", "layer2.*")
    shown = output_of(capsys, "convert", "test_resnet", "--init", "random", *arguments, "--output", tmp_path / "fresh")
    assert "2 converted (random)" in shown
    network, _ = load_model(tmp_path / "fresh")
    assert network.get_submodule("layer2.0.conv1").num_heads == 4


MISTAKES = {
    ("nope18", "--init", "exact"): "there is no model 'nope18'",
    ("test_resnet",): "the following arguments are required: --init",
    ("test_resnet", "--init", "exact", "--names", "zz*"): "names: the model has no spatial convolution for 'zz*'",
    ("test_resnet", "--init", "exact", "--kernel-size", "3"): "kernel_size cannot be set with init='exact'",
    ("test_resnet", "--init", "random", "--num-heads", "0"): "num_heads must be an int of at least 1; received 0",
    ("test_resnet", "--init", "exact", "--checkpoint", "nowhere.pth"): "there is no nowhere.pth",
    ("test_resnet,num_classes=5", "--init", "exact"): "follows from its weights; leave it out of the name",
    ("test_vit", "--init", "exact"): "test_vit: nothing to convert",
    ("sasa_nano", "--init", "random"): "sasa_nano: nothing to convert: 4 layers attend already",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(arguments, tmp_path, capsys):
    assert MISTAKES[arguments] in fails(capsys, "convert", *arguments, "--output", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint(tmp_path, capsys):
    damaged = tmp_path / "mine.pth"
    damaged.write_bytes(b"no weights")
    arguments = ("convert", "test_resnet", "--init", "exact", "--checkpoint", damaged, "--output", tmp_path / "x")
    assert "it is damaged, of another kind, or would run code" in fails(capsys, *arguments)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    arguments = (*arguments[:5], tmp_path / "other.safetensors", *arguments[6:])
    assert "does not fit test_resnet" in fails(capsys, *arguments)
    assert not (tmp_path / "x").exists()
