# SPDX-License-Identifier: Apache-2.0
"""What takes long says what it is, on standard error; what is done in a moment says nothing."""

from __future__ import annotations

import time

import pytest

from nearsight import telling
from nearsight.cli import main
from nearsight.saved.view import View
from nearsight.saved.weights import WEIGHTS_FILE, Blueprint, save_model


@pytest.fixture
def slow(monkeypatch):
    """Everything takes longer than a moment."""

    class AtOnce:
        def __init__(self, seconds, function, arguments):
            self.start = lambda: function(*arguments)

        def cancel(self):
            pass

    monkeypatch.setattr(telling, "Timer", AtOnce)


@pytest.fixture
def run(tmp_path):
    blueprint = Blueprint("sasa_nano", tuple("0123456789"), View(1, 8, (0.3,), (0.4,)), "digits", img_size=8)
    save_model(tmp_path / WEIGHTS_FILE, blueprint.build(), blueprint)
    return tmp_path


def test_commands_say_what_they_do(slow, run, capsys):
    commands = {
        "measuring 360 images of digits ...": ["eval", run, "--data", "digits"],
        "converting test_resnet ...": ["convert", "test_resnet", "--init", "random", "--output", run / "converted"],
        "timing the layers of sasa_nano ...": ["profile", run, "--no-growth", "--rounds", "1", "--csv"],
    }
    for line, command in commands.items():
        assert main(list(map(str, command))) == 0
        captured = capsys.readouterr()
        assert line in captured.err.splitlines()
        assert line not in captured.out


def test_what_is_done_in_a_moment_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(telling, "MOMENT", 0.05)
    with telling.telling("quick"):
        pass
    with telling.telling("slow"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "slow ...\n"
