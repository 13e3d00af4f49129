# SPDX-License-Identifier: Apache-2.0
"""Weights that others saved are found wherever they are in their file, and no code in it runs."""

from __future__ import annotations

from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from nearsight.errors import DataError
from nearsight.saved.foreign import read_weights


@pytest.fixture(scope="module")
def networks():
    """Last step's and mean."""
    torch.manual_seed(0)
    return [timm.create_model("test_resnet", num_classes=2) for _ in range(2)]


def prefixed(prefix: str, network: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: one for name, one in network.state_dict().items()}


def averaged(network: nn.Module) -> dict[str, torch.Tensor]:
    return torch.optim.swa_utils.AveragedModel(network).state_dict()


# What is saved of (last step's, mean), where the weights are in it, and whether these are the mean.
WRAPPED = {
    "alone": (lambda last, mean: last.state_dict(), "", False),
    "PyTorch's tutorial": (
        lambda last, mean: {
            "epoch": 5,
            "model_state_dict": last.state_dict(),
            "optimizer_state_dict": torch.optim.AdamW(last.parameters()).state_dict(),
            "loss": torch.tensor(0.5),
        },
        "model_state_dict",
        False,
    ),
    "timm's training": (
        lambda last, mean: {
            "arch": "x",
            "args": Namespace(lr=0.1),
            "state_dict": last.state_dict(),
            "state_dict_ema": mean.state_dict(),
        },
        "state_dict_ema",
        True,
    ),
    "several words": (lambda last, mean: {"net": prefixed("module._orig_mod.", last)}, "net.module._orig_mod", False),
    "Lightning": (
        lambda last, mean: {"state_dict": {**prefixed("model.", last), **prefixed("ema.module.", mean)}, "loops": {}},
        "state_dict.ema.module",
        True,
    ),
    "Lightning's criterion": (
        lambda last, mean: {"state_dict": {**prefixed("backbone.", last), "criterion.weight": torch.ones(2)}},
        "state_dict.backbone",
        False,
    ),
    "SWA": (lambda last, mean: {"model": last.state_dict(), "swa": averaged(mean)}, "swa.module", True),
    "deep": (lambda last, mean: {"train": {"model": {"params": last.state_dict()}}}, "train.model.params", False),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_weights_are_where_the_names_are(kind, networks, tmp_path):
    make, place, is_mean = WRAPPED[kind]
    torch.save(make(*networks), tmp_path / "x.pth")
    expected = networks[is_mean].state_dict()
    found, where = read_weights(str(tmp_path / "x.pth"), "x", expected.keys())
    assert where == place
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_safetensors_and_older_files(networks, tmp_path):
    names = networks[0].state_dict().keys()
    save_file(prefixed("module.", networks[0]), tmp_path / "x.safetensors")
    torch.save({"model": networks[0].state_dict()}, tmp_path / "old.tar", _use_new_zipfile_serialization=False)
    assert read_weights(tmp_path / "x.safetensors", "x", names)[1] == "module"
    assert read_weights(tmp_path / "old.tar", "x", names)[1] == "model"


class Planted:
    def __reduce__(self):
        return print, ("it ran",)


def test_no_code_runs_and_what_does_not_fit_is_told(networks, tmp_path, capsys):
    names = networks[0].state_dict().keys()
    for content in ({"model": networks[0].state_dict(), "args": Planted()}, networks[0]):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(DataError, match=r"would run code; torch.save\(model.state_dict\(\), FILE\) writes one"):
            read_weights(tmp_path / "x.pth", "x", names)
    assert capsys.readouterr().out == ""
    torch.save({"a": {"b": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(DataError, match="does not fit resnet: it holds no tensor by a name of the network's"):
        read_weights(tmp_path / "x.pth", "resnet", names)
    with pytest.raises(DataError, match="there is no nowhere"):
        read_weights("nowhere", "x", names)
