# SPDX-License-Identifier: Apache-2.0
"""The programs of examples/deploy: each is built by the lines at its head, and answers as the network does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight.attention import native
from nearsight.saved import export
from nearsight.saved.view import View

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
ROOT = Path(__file__).parents[1]


class Stripes(nn.Sequential):
    """A small network that says how it sees pictures."""

    pretrained_cfg = MappingProxyType(
        {
            "input_size": (3, 16, 16),
            "mean": (0.5, 0.25, 0.125),
            "std": (0.5, 0.25, 0.2),
            "label_names": ["a", "b c", "d"],
        }
    )

    def __init__(self) -> None:
        attention = ns.LocalSelfAttention2d(3, 8, 3, num_heads=2)
        super().__init__(attention, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Stripes().eval()


def written(model: nn.Module, form: str, path: Path) -> Path:
    view = View.of(model)
    notes = json.dumps({"classes": Stripes.pretrained_cfg["label_names"], "view": vars(view)})
    export._written(model, export.Subject("stripes", view, notes), form, path, None, "native")
    return path


@pytest.fixture(scope="module")
def onnx_file(network, tmp_path_factory) -> Path:
    return written(network, "onnx", tmp_path_factory.mktemp("onnx") / "model.onnx")


def a_picture(folder: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 14, 3), dtype=np.uint8)
    path = folder / "picture.ppm"
    path.write_bytes(b"P6\n14 20\n255\n" + pixels.tobytes())
    return path, pixels


def answered(name: str, runtime: str, model: Path, picture: Path, folder: Path) -> subprocess.CompletedProcess:
    """Build a program by the lines at its head, and run it as they say."""
    head = (ROOT / "examples" / "deploy" / name).read_text().split("\n\n#include")[0]
    lines = "\n".join(re.findall(r"^//     (.*)$", head, re.MULTILINE)).splitlines()
    *build, run = lines
    (call,) = re.findall(r'^\./classify \S+ "\$\(nearsight deploy (\w+) \| head -1\)" picture.pgm$', run)
    assert call == runtime
    script = "\n".join([*build, f'./classify {model} "$(nearsight deploy {runtime} | head -1)" {picture}'])
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


@torch.no_grad()
def check_answer(done: subprocess.CompletedProcess, network: nn.Module, pixels: np.ndarray) -> None:
    assert done.returncode == 0, done.stderr
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    pictures = (torch.from_numpy(pixels).movedim(-1, 0) / 255 - mean) / std
    expected = network(pictures[None])[0]
    answer = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert list(answer) == config["label_names"]
    torch.testing.assert_close(torch.tensor([float(one) for one in answer.values()]), expected, atol=2e-6, rtol=1e-5)


def test_onnxruntime(network, onnx_file, tmp_path):
    picture, pixels = a_picture(tmp_path)
    check_answer(answered("onnxruntime.cpp", "onnxruntime", onnx_file, picture, tmp_path), network, pixels)
    told = subprocess.run([tmp_path / "classify", onnx_file, "no.so", picture], capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith("no.so: cannot open shared object file")


@pytest.mark.sweep
def test_openvino(network, onnx_file, tmp_path):
    picture, pixels = a_picture(tmp_path)
    check_answer(answered("openvino.cpp", "openvino", onnx_file, picture, tmp_path), network, pixels)


@pytest.mark.sweep
def test_aotinductor(network, tmp_path):
    package = written(network, "aoti", tmp_path / "model.pt2")
    picture, pixels = a_picture(tmp_path)
    check_answer(answered("aoti.cpp", "aoti", package, picture, tmp_path), network, pixels)
