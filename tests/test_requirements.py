# SPDX-License-Identifier: Apache-2.0
"""What the package imports is what pyproject.toml declares, extra by extra, with floors that are safe."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import nearsight as ns
from nearsight import cli, extras
from nearsight.deploy.compiled import Runtime

SOURCE = Path(ns.__file__).parent
ROOT = Path(__file__).parents[1]
PACKAGE_OF = {**extras.PACKAGE_OF, "yaml": "pyyaml"}  # whose modules have another name
# Of these nearsight makes use where they are: they are never asked for.
PEERS = {"natten", "natten_mps", "fvcore", "openvino", "segment_anything", "transformers"}
# The extras with which the files of a room are used, each of which has to bring all that they import.
ROOMS = {
    "inspect": ("explore",),
    "attention/plain_graph.py": ("export",),
    "bench": ("profile",),
    "bench/hosts.py": ("export",),
    "pages": ("train", "explore"),
    "saved/export.py": ("export",),
    "saved/tidy.py": ("export",),
    "training": ("train",),
    "training/data/arrays.py": ("train", "explore"),
    "training/data/pictures.py": ("train", "explore"),
    "training/data/hub.py": ("train+datasets",),
    "training/data/shards.py": ("train+webdataset",),
    "commands": ("train+profile",),
}
SHOWN_WITH_RICH = {"conversion/report.py"}  # where it is installed


@cache
def declared() -> dict[str, dict[str, Requirement]]:
    """The requirements of the plain package, "", and of every extra, with those of the plain one."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = {"": re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)}
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^\[", text, re.MULTILINE | re.DOTALL).group(1)
    lists |= dict(re.findall(r"^(\w+) = \[(.*?)\](?: #[^\n]*)?$", extras, re.MULTILINE | re.DOTALL))
    found = {}
    for name, body in lists.items():
        requirements = [Requirement(one) for one in re.findall(r'"([^"]+)"', body)]
        found[name] = {one.name.lower().replace("_", "-"): one for one in requirements}
    return {name: {**found[""], **one} for name, one in found.items()}


def imports_of(text: str) -> set[str]:
    """The packages of others that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    outer = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) - {"nearsight"} - PEERS
    return {PACKAGE_OF.get(name, name).replace("_", "-") for name in outer}


def missing(file: str, text: str) -> list[str]:
    """What a file imports and an extra with which it is used does not bring."""
    room = next((room for room in sorted(ROOMS, key=len, reverse=True) if file.startswith(room)), None)
    wrong = []
    for extra in ROOMS[room] if room else ("",):
        brought = set().union(*(declared()[part] for part in extra.split("+")))
        lacking = imports_of(text) - brought - ({"rich"} if file in SHOWN_WITH_RICH else set())
        wrong += [f"{file}: {name} is not in {extra or 'dependencies'}" for name in sorted(lacking)]
    return wrong


def test_every_import_is_declared():
    files = {str(file.relative_to(SOURCE)): file.read_text() for file in SOURCE.rglob("*.py")}
    assert len(files) > 50
    assert [line for file, text in files.items() for line in missing(file, text)] == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("files.py", "def f():\n    import scipy.stats", ["files.py: scipy is not in dependencies"]),
        ("training/x.py", "from onnxruntime import a", ["training/x.py: onnxruntime is not in train"]),
        ("inspect/x.py", "import lightning", ["inspect/x.py: lightning is not in explore"]),
        ("training/x.py", "import datasets", ["training/x.py: datasets is not in train"]),
        ("layers.py", "from yaml import load\nimport torch, math", []),
    ],
)
def test_an_undeclared_import_is_found(file, text, found):
    assert missing(file, text) == found


def test_what_is_asked_for_is_in_the_extra_that_is_named():
    """Every `need` of the package."""
    found = 0
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need":
                modules = [one.value for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)]
                if not modules and file.name == "compiled.py":  # of each runtime, below
                    continue
                modules = {
                    extras.PACKAGE_OF.get(name, name) for name in modules or getattr(extras, node.args[0].id, [])
                }
                assert modules <= declared()[node.args[2].value].keys(), (file.name, node.lineno)
                found += 1
    assert found >= 10
    asked = [one for one in vars(ns.deploy).values() if isinstance(one, Runtime) and one.extra]
    assert asked
    assert all(runtime.package in declared()[runtime.extra] for runtime in asked)


# Commands that do with less than `train`: with all optional packages gone that their extra does not bring.
ALONE = [
    ("", "models sasa_nano"),
    ("", "convert resnet18 --init random --kernel-size 3 --output FOLDER"),
    ("explore", "explore sasa_nano,in_chans=1 digits:3 --output FOLDER/page.html"),
    ("profile", "profile sasa_nano --size 8 --rounds 1 --no-growth --output FOLDER"),
]


@pytest.mark.parametrize(("extra", "command"), ALONE, ids=[command.split()[0] for _, command in ALONE])
def test_a_command_needs_its_extra_and_no_other_package(extra, command, anew, monkeypatch, tmp_path, capsys):
    module_of = {package: module for module, package in extras.PACKAGE_OF.items()}
    brought_by_others = {"scipy", "rich"} if extra == "explore" else set()  # by scikit-learn
    optional = set().union(*(declared()[one] for one in declared() if one != "docs"))  # SciPy asks for Sphinx by itself
    for package in optional - declared()[extra].keys() - brought_by_others - {"nearsight"}:
        monkeypatch.setitem(sys.modules, module_of.get(package, package.replace("-", "_")), None)
    assert cli.main([part.replace("FOLDER", str(tmp_path)) for part in command.split()]) == 0, capsys.readouterr().err


@pytest.fixture
def anew():
    """The rooms below the networks are imported again, with what they import at their heads; afterwards all is as before."""
    rooms = ("bench", "commands", "conversion", "inspect", "pages", "picture", "saved", "training")
    there = {
        name: module for name, module in sys.modules.items() if name.split(".")[1:2] and name.startswith("nearsight.")
    }
    for name in there:
        if name.split(".")[1] in rooms:
            del sys.modules[name]
    yield
    sys.modules.update(there)
    for name, module in there.items():
        if name.count(".") == 1:
            setattr(ns, name.split(".")[1], module)


@pytest.mark.parametrize(
    ("extra", "package", "bad"),
    [
        ("datasets", "datasets", "2.19.2"),  # runs the script of a data set unasked
        ("train", "lightning", "2.5.2"),  # IndexError in its progress bar with rich 14.1 and later
    ],
)
def test_versions_that_do_harm_are_refused(extra, package, bad):
    assert not declared()[extra][package].specifier.contains(bad)


def test_floors_are_not_above_what_is_installed():
    every = {name: one for part in declared().values() for name, one in part.items() if name != "nearsight"}
    above = {
        name: str(one)
        for name, one in every.items()
        if not one.specifier.contains(Version(metadata.version(name)), True)
    }
    assert above == {}
