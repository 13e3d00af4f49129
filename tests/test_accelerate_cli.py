# SPDX-License-Identifier: Apache-2.0
"""``nearsight accelerate``: one network measured both ways."""

from __future__ import annotations

import json

import pytest

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
    assert found["setting"]["threads"] == 1


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
