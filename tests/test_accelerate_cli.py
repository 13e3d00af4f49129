# SPDX-License-Identifier: Apache-2.0
"""``nearsight accelerate``: one network measured both ways."""

from __future__ import annotations

import json

import pytest
import torch

from nearsight.bench import accelerated
from nearsight.cli import main

SAM = "samvit_base_patch16,img_size=64,depth=1,embed_dim=12,num_heads=2,window_size=3,neck_chans=4"


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Fresh ones take seconds to begin."""
    monkeypatch.setattr(accelerated, "in_fresh_process", lambda function, *arguments: function(*arguments))


@pytest.mark.parametrize("mode", [[], ["--training"]])
def test_it_measures_both(mode, capsys):
    assert main(["accelerate", SAM, "--size", "96", "--rounds", "2", "--threads", "1", "--json", *mode]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["accelerated"] == ["blocks.0", "blocks.0.attn"]
    assert 0 < found["difference"] < 1e-5
    assert all(speed > 0 for speed in found["images_per_second"])
    (layer,) = found["layers"]  # and not the block around it
    assert (layer["name"], layer["shape"]) == ("blocks.0.attn", [4, 3, 3, 12])
    assert 0 < found["share"] < 1
    assert found["ceiling"] == pytest.approx(1 / (1 - found["share"]))
    assert found["setting"]["threads"] == 1


def test_the_share_is_that_of_the_layers_in_the_step(capsys, monkeypatch):
    """On a clock on which their attention takes 30 seconds, the rest of a block 10, ours 16 and a block 20."""
    from timm.models.vision_transformer_sam import Attention, Block

    from nearsight.acceleration.timm_sam import SamAttention, SamBlock

    now = [0.0]

    def counted(kind, cost):
        was = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: now.__setitem__(0, now[0] + cost) or was(self, x))

    counted(Attention, 30.0)
    counted(Block, 10.0)
    counted(SamAttention, 16.0)
    counted(SamBlock, 20.0)
    monkeypatch.setattr(accelerated.time, "process_time", lambda: now[0])
    assert main(["accelerate", SAM, "--rounds", "1", "--threads", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    heading, row = (line.split() for line in out[-3:-1])
    at = heading.index("share") - len(heading)
    assert row[at - 1 : at + 2] == ["2.00", "0.75", "4.00"]
    assert any(line.split() == ["blocks.0.attn", "4x3x3x12", "3e+04", "1.6e+04"] for line in out)


def test_the_bench_has_a_row_for_every_family(tmp_path, capsys, monkeypatch):
    file = tmp_path / "numbers.json"
    rows = ((SAM, 64, 1, (False, True)), ("natten:NeighborhoodAttention2D", 9, 1, (False,)))
    known = {given.partition(":")[0].partition("_")[0] for given, *_ in accelerated.FAMILIES}
    assert known >= {"samvit", "halonet26t", "botnet26t", "swin", "swinv2", "torchvision", "natten"}
    monkeypatch.setattr(accelerated, "FAMILIES", rows)
    monkeypatch.setattr(accelerated, "find_spec", lambda _: None)
    assert main(["bench", "accelerated", "--quick", "--threads", "1", "--json", str(file)]) == 0
    (run,) = json.loads(file.read_text())["runs"]
    assert [(row["model"], row["training"]) for row in run["rows"]] == [(SAM, False), (SAM, True), (rows[1][0], False)]
    assert run["rows"][0]["ceiling"] > 1
    assert run["rows"][2]["why_not"] == "natten is not installed"
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == [rows[1][0], "natten is not installed"]


def test_torchvisions_networks_have_a_name():
    opened = accelerated._open("torchvision:mobilenet_v3_small", 32)
    assert opened.network(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_what_is_not_known_is_said_to_be(capsys):
    assert main(["accelerate", "sasa_nano", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "nothing to accelerate: no attention that is known" in out
    assert out.splitlines()[-2].endswith("0.0e+00")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["halonet26t", "--size", "64"], "halonet26t cannot take 64x64 images"),
        (["sasa_nano", "--rounds", "0"], "--rounds must be at least 1; received 0"),
        (["no_such_network"], "there is no model 'no_such_network'"),
    ],
)
def test_mistakes_are_one_line(arguments, reason, capsys):
    assert main(["accelerate", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("nearsight: error: ")
    assert reason in error
