# SPDX-License-Identifier: Apache-2.0
"""Exported networks compute what the networks do, on sizes and batches that were not seen at export; `nearsight export`."""

from __future__ import annotations

import re
import sys
from math import prod

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import lines_of
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

import nearsight as ns
from nearsight.attention.node import as_nodes
from nearsight.cli import main
from nearsight.models.sasa import sasa_nano
from nearsight.saved import export
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, save_model

# One attention each, of the family's own kind; neither kernel nor block divides the maps.
NETWORKS = {
    "sasa_nano": {"depths": (1,), "widths": (8,), "stem_width": 8, "num_heads": 2},
    "halo_h0": {"depths": (1,), "widths": (8,), "num_heads": 2, "block_size": 4, "halo_size": 1, "stem_width": 8},
    "dinat_mini": {"depths": (1,), "num_heads": (2,), "embed_dim": 8, "kernel_size": 3, "dilations": ((2,),)},
}
SEEN = (2, 2, 44, 60)
UNSEEN = [(1, 2, 97, 61), (3, 2, 25, 132), (1, 2, 19, 23)]


def network(name: str) -> nn.Module:
    model = ns.create_model(name, in_chans=2, num_classes=3, **NETWORKS[name]).eval()
    for parameter in model.parameters():  # as if trained: tables of zeros would hide a wrong entry
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["halo_h0", "dinat_mini"])
def test_exported_network_computes_the_same_on_other_sizes(name):
    """The third, SASA, goes through the command below."""
    model = network(name)
    program = export.trace(model, torch.randn(SEEN))
    with as_nodes():
        onnx_model = export.to_onnx(export.trace(model, torch.randn(SEEN)), {}, "plain")
    assert {node.domain for node in onnx_model.graph.node} == {""}, "operators of ONNX itself alone"
    assert not onnx_model.functions
    run = export.onnx_session(onnx_model.SerializeToString())
    for shape in UNSEEN:
        pictures = torch.randn(shape)
        with torch.no_grad():
            expected = model(pictures)
            assert expected.std() > 1e-2  # it depends on the picture
            torch.testing.assert_close(run(pictures), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(program.module()(pictures), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- memory


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.movedim(1, -1)[:, None]
        return ns.local_attention(heads, heads, heads, ns.Window(7, border="wrap"))


class Gathered(nn.Module):
    """The same but for the borders, with a copy of every window, as F.unfold makes it."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            (torch.arange(n)[:, None] + torch.arange(-3, 4)).clamp(min=0).minimum(torch.tensor(n - 1))
            for n in x.shape[2:]
        )
        keys = x[:, :, rows[:, None, :, None], columns[:, None, :]].flatten(4)
        weights = ((x[..., None] * keys).sum(1) / 32**0.5).softmax(-1)
        return (weights[:, None] * keys).sum(-1)


@torch.no_grad()
def largest(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Numbers in the largest tensor that the exported operator makes on a size that it was not exported with."""
    with as_nodes():
        model = export.to_onnx(export.trace(module, torch.randn(2, shape[1], 28, 42)), {}, "plain")
    made = [name for node in model.graph.node for name in node.output if name != "logits"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    session, pictures = onnxruntime.InferenceSession(model.SerializeToString()), torch.randn(shape)
    result, *others = session.run(None, {"pictures": pictures.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), module(pictures), rtol=1e-4, atol=1e-4)
    return max(array.size for array in others)


@pytest.mark.sweep
def test_exported_attention_holds_no_copy_of_every_window():
    """For a block of 4 x 4 queries it copies 10 x 10 keys of 32 numbers; a copy of every window would be 49 keys a query."""
    shape = (1, 32, 36, 48)
    assert largest(Gathered(), shape) == 49 * prod(shape)
    assert largest(Attention(), shape) == 10 * 10 * prod(shape) // (4 * 4)


# --------------------------------------------------------------------------------------------------------- the command


@register_model
def sasa_for_export(pretrained: bool = False, **kwargs) -> nn.Module:
    return sasa_nano(pretrained, **{**NETWORKS["sasa_nano"], **kwargs})


@pytest.fixture
def trained(tmp_path):
    """A run's folder, without the time of a run."""

    def make(model: str):
        blueprint = Blueprint(model, ("cat", "dog", "owl"), View(1, 8, (0.5,), (0.25,)), "pets")
        network = blueprint.build().eval()
        save_model(tmp_path / "model.safetensors", network, blueprint)
        return tmp_path, network, blueprint

    return make


def fails(capsys, *arguments) -> str:
    """The one line that a mistake leaves on stderr."""
    assert main([str(one) for one in ("export", *arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
def test_command_writes_onnx(trained, capsys, tmp_path, monkeypatch):
    folder, network, blueprint = trained("sasa_for_export")
    assert main(["export", str(folder), "--format", "onnx"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"{folder / 'model.onnx'}: takes batch x 1 x height x width\nrun on 1x1x72x40 and 3x1x8x8: at most"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.safetensors"]
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    notes = {note.key: note.value for note in model.metadata_props}
    assert Blueprint.from_json(notes["nearsight"]) == blueprint
    sizes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert sizes == {"pictures": ["batch", 1, "height", "width"], "logits": ["batch", 3]}
    inner = {size.dim_param for value in model.graph.value_info for size in value.type.tensor_type.shape.dim}
    assert not [name for name in inner if re.search(r"\bs\d+\b", name)], "letters of the tracing are left"
    pictures = torch.randn(5, 1, 13, 21)
    found = onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], {"pictures": pictures.numpy()})[0]
    expected = network(pictures).detach()
    assert expected.std() > 1e-2  # it depends on the picture
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("seven.png")
    page: dict = {}
    exec(lines_of("howto/use.md", "Without nearsight: ONNX"), page)
    model = ns.load(folder)
    torch.testing.assert_close(torch.from_numpy(page["pictures"]), model.preprocess("seven.png"))
    assert capsys.readouterr().out.strip() == model.predict("seven.png")[0].name


@pytest.mark.slow
def test_command_writes_a_program_of_torch_export(trained, capsys):
    folder, network, blueprint = trained("sasa_for_export,depths=[1],widths=[8],num_heads=2,stem_width=8")
    file = folder / "other.pt2"
    assert main(["export", str(folder / "model.safetensors"), "--format", "pt2", "--output", str(file)]) == 0
    notes = {"nearsight.json": ""}
    program = torch.export.load(file, extra_files=notes)
    assert Blueprint.from_json(notes["nearsight.json"]) == blueprint
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "nearsight" in name], "it needs no nearsight to run"
    pictures = torch.randn(1, 1, 13, 21)
    torch.testing.assert_close(program.module()(pictures), network(pictures), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_network_of_one_size_says_so(trained):
    folder, _, _ = trained("sasa_for_export,kernel_size=global")
    assert export.export_to_file(folder, "pt2").shape == ("batch", 1, 8, 8)


def test_program_that_computes_something_else_is_not_written(trained, monkeypatch, capsys):
    folder, network, _ = trained("sasa_for_export")
    before = sorted(folder.iterdir())
    monkeypatch.setattr(export, "trace", lambda *_: None)
    for wrong, amount in ((lambda x: network(x) + 0.01, "1.0e-02"), (lambda x: network(x) * float("nan"), "nan")):
        monkeypatch.setattr(export, "_pt2", lambda *_, wrong=wrong: (b"program", wrong))
        line = fails(capsys, folder, "--format", "pt2")
        assert f"differs from the network by {amount} of its largest output, where 1e-04 is allowed" in line
        assert sorted(folder.iterdir()) == before
    monkeypatch.setattr(export, "_pt2", lambda *_: (b"program", network))
    assert main(["export", str(folder), "--format", "pt2"]) == 0
    assert (folder / "model.pt2").read_bytes() == b"program"


def test_mistakes_are_one_line(trained, tmp_path, monkeypatch, capsys):
    folder, _, _ = trained("sasa_for_export")
    assert "--format" in fails(capsys, folder)
    assert "choose from" in fails(capsys, folder, "--format", "tflite")
    assert "must end in .onnx" in fails(capsys, folder, "--format", "onnx", "--output", folder / "model.pt2")
    assert "there is no folder" in fails(capsys, folder, "--format", "pt2", "--output", folder / "a" / "b.pt2")
    assert "`nearsight train` leaves them" in fails(capsys, tmp_path / "nothing", "--format", "pt2")
    for size in ("0", "8x", "8x8x8", "-3", "wide", ""):
        line = fails(capsys, folder, "--format", "pt2", f"--size={size}")
        assert f"--size must be N or HxW, in pixels; received {size!r}" in line
    monkeypatch.setattr(export, "trace", lambda *_: 1 / 0)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = fails(capsys, folder, "--format", "onnx")
    assert "needs onnxscript: pip install 'nearsight[export]'" in line
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_network_that_cannot_be_exported_says_why(capsys, trained, monkeypatch):
    folder, _, _ = trained("sasa_for_export")

    def refuse(*_):
        raise RuntimeError("this network asks its pictures\nfor more")

    monkeypatch.setattr(export, "trace", refuse)
    line = fails(capsys, folder, "--format", "pt2")
    said = "nearsight: error: sasa_for_export cannot be exported: this network asks its pictures"
    assert line == f"{said}; where another size may do: --size N or HxW"
    assert fails(capsys, folder, "--format", "pt2", "--size", "16") == said


@pytest.mark.parametrize("place", ["saved", "run"])
def test_open_sizes_that_fail_after_tracing_are_fixed_and_told(place, capsys, trained, monkeypatch):
    """A program that cannot be saved, or runs on no other pictures, is not done; one of a fixed size may be."""
    folder, network, _ = trained("sasa_for_export")
    monkeypatch.setattr(export, "trace", lambda model, example, names: (names, example.shape))

    def save(program, _):
        names, shape = program
        if len(names) > 1 and place == "saved":
            raise AssertionError("s77 is no size")

        def run(pictures):
            assert len(names) == 1, "s77 is no size"
            assert pictures.shape[2:] == shape[2:]
            return network(pictures)

        return b"program", run

    monkeypatch.setattr(export, "_pt2", save)
    for size, text in ((None, "8 x 8"), ("12", "12 x 12"), ("12x16", "12 x 16")):
        assert main(["export", str(folder), "--format", "pt2", *(["--size", size] if size else [])]) == 0
        out = capsys.readouterr().out
        assert f"takes batch x 1 x {text}\n" in out
        assert ("height and width are fixed, --size N|HxW takes others" in out) == (size is None)
        assert ("s77 is no size" in out) == (size is None)
