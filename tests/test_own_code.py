# SPDX-License-Identifier: Apache-2.0
"""`--import MODULE`: networks and positions of one's own are trained, compared and loaded; no file imports by itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import nearsight as ns
from nearsight import cli, own_code, positions
from nearsight.errors import DataError, OptionError
from nearsight.own_code import import_own, imported
from nearsight.training import compare
from nearsight.training.recipe import Recipe, read_recipe

MODULE = """
from torch import nn
import nearsight as ns
from nearsight.positions import Position

class Tiny(nn.Sequential):
    def __init__(self, num_classes=10, in_chans=3, width=4):
        layers = nn.Conv2d(in_chans, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)
        super().__init__(*layers)

class Nowhere(Position):
    def __init__(self, **_):
        super().__init__()

ns.models.register("NAME", Tiny)
ns.positions.register("NAME", Nowhere)
"""


def name_of(file: Path) -> str:
    """Of what a test's module registers: no two tests share one, as no two modules may."""
    return re.sub(r"\W", "_", file.parent.name)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A file that was not imported, whatever was before; afterwards it is as if it never had been."""
    monkeypatch.setattr(own_code, "_imported", [])
    file = tmp_path / "mine.py"
    file.write_text(MODULE.replace("NAME", name_of(file)))
    before, factories = set(sys.modules), dict(positions._FACTORIES)
    path = list(sys.path)
    yield file
    positions._FACTORIES.clear()
    positions._FACTORIES.update(factories)
    assert sys.path == path
    for name in set(sys.modules) - before:
        if name.startswith("nearsight_own"):
            del sys.modules[name]


def fails(capsys, *arguments) -> str:
    """The one line that a mistake leaves on stderr."""
    assert cli.main([str(one) for one in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def forget(monkeypatch) -> None:
    """As in another process, which has imported nothing."""
    monkeypatch.setattr(own_code, "_imported", [])
    for name in [one for one in sys.modules if one.startswith("nearsight_own")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_network_of_one_s_own_is_trained_and_no_file_imports_it(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    words = ["--model", f"{name_of(module)},width=6", "--epochs", "2", "--output", run]
    assert cli.main(["train", "--import", "mine.py", *map(str, words)]) == 0
    out = capsys.readouterr().out
    first, second = [line for line in out.splitlines() if line.startswith("epoch ")]  # into a log, a line for each
    assert first.startswith("epoch    1 of 2: train_loss ")
    assert second.startswith("epoch    2 of 2: train_loss ")
    assert yaml.safe_load((run / "config.yaml").read_text())["import"] == [str(module)]
    model = ns.load(run)
    assert type(model).__name__ == "Tiny"
    picture = torch.zeros(8, 8, dtype=torch.uint8)
    said = model.predict(picture)[0].probabilities
    forget(monkeypatch)
    monkeypatch.setattr(own_code, "import_own", None)  # nothing may import now
    rule = (
        f"imports {module}, which no file does by itself: if you trust it, add --import {module} (in Python: import it"
    )
    assert f"model.safetensors: it {rule}" in fails(capsys, "predict", run, "x.png")
    assert f"last.ckpt: it {rule}" in fails(capsys, "predict", run / "last.ckpt", "x.png")
    for command in (["train", "--resume", "--output", run], ["train", "--config", run / "config.yaml"]):
        assert f"config.yaml {rule}" in fails(capsys, *command)
    assert f"config.yaml {rule}" in fails(capsys, "compare", "--config", run / "config.yaml", "--models", "a", "b")
    monkeypatch.undo()
    forget(monkeypatch)
    moved = tmp_path / "elsewhere" / "mine.py"
    moved.parent.mkdir()
    moved.write_text("moved = True")
    import_own(str(moved))  # a file of the same name is taken for one that was moved
    assert torch.equal(ns.load(run).predict(picture)[0].probabilities, said)
    assert read_recipe(run / "config.yaml").model == f"{name_of(module)},width=6"


def test_a_position_of_one_s_own(module):
    import_own(module)
    assert imported() == (str(module),)
    import_own(module)  # once
    assert imported() == (str(module),)
    network = ns.create_model(f"sasa_nano,position={name_of(module)}", num_classes=2)
    assert not [name for name, _ in network.named_parameters() if "position" in name]
    assert type(ns.create_model(name_of(module), num_classes=4)).__name__ == "Tiny"


def test_the_runs_of_a_comparison_get_the_flag(module, tmp_path, monkeypatch):
    import_own(module)
    given = []

    class Started(Exception):
        pass

    def start(command, **_):
        given.extend(command)
        raise Started

    monkeypatch.setattr(compare.subprocess, "Popen", start)
    with pytest.raises(Started):
        compare.compare({"": [name_of(module)]}, Recipe(epochs=1), 1, tmp_path / "twins")
    assert f"--import={module}" in given
    assert yaml.safe_load((tmp_path / "twins" / "compare.yaml").read_text())["import"] == [str(module)]
    forget(monkeypatch)
    with pytest.raises(DataError, match=r"compare.yaml imports .*mine.py, which no file does by itself"):
        compare.compare({"": ["sasa_nano"]}, Recipe(epochs=1), 1, tmp_path / "twins")


MISTAKES = {
    "nowhere.py": "cannot import {folder}/nowhere.py: No such file or directory",
    "no_such_module": "cannot import no_such_module: ModuleNotFoundError: No module named 'no_such_module'",
    "a b": "--import takes a dotted name or a .py file; received 'a b'",
    "": "--import needs a module: a dotted name, or a .py file",
    "wrong.py": "cannot import {folder}/wrong.py: ZeroDivisionError: division by zero (line 2 of {folder}/wrong.py)",
    "leaves.py": "cannot import {folder}/leaves.py: SystemExit: 3 (line 1 of {folder}/leaves.py)",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.py").write_text("x = 0\n1 / x\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    expected = MISTAKES[name].format(folder=tmp_path)
    assert fails(capsys, "info", "--import", name).endswith(expected)
    assert fails(capsys, "info", f"--import={name}").endswith(expected)
    assert imported() == ()


def test_help_runs_no_code(module, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--import", str(module), "--help"])
    assert "--import MODULE" in capsys.readouterr().out
    assert imported() == ()


@pytest.mark.parametrize("noted", ["mine.py", [1], {"a": 1}])
def test_what_a_config_imports_is_a_list_of_texts(noted, module, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"import": noted}))
    with pytest.raises(DataError, match="must list what it imports as texts"):
        read_recipe(tmp_path / "config.yaml")


def test_what_cannot_be_registered():
    with pytest.raises(OptionError, match="there is a network 'resnet18' already"):
        ns.models.register("resnet18", nn.Identity)
    with pytest.raises(OptionError, match="is a word of letters, digits and underscores; received 'a-b'"):
        ns.models.register("a-b", nn.Identity)
    with pytest.raises(OptionError, match=r"must take num_classes and in_chans by name; it takes \(width\)"):
        ns.models.register("narrow", lambda width: nn.Identity())


def test_a_name_belongs_to_one_factory():
    def passes(num_classes, in_chans):
        return nn.Identity()

    ns.models.register("passes", passes)
    ns.models.register("passes", passes)
    with pytest.raises(OptionError, match="there is a network 'passes' already"):
        ns.models.register("passes", lambda num_classes, in_chans: nn.Identity())
    with pytest.raises(OptionError, match="passes comes without weights"):
        ns.create_model("passes", pretrained=True)
