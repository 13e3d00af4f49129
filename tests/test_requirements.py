# SPDX-License-Identifier: Apache-2.0
"""What the package imports is what pyproject.toml declares, extra by extra, with floors that are safe."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import nearsight as ns

SOURCE = Path(ns.__file__).parent
ROOT = Path(__file__).parents[1]
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # whose modules have another name
PEERS = {"natten", "natten_mps", "fvcore", "openvino"}  # of which nearsight makes use where they are: never asked for
# The extras with which the files of a room are used, each of which has to bring all that they import.
ROOMS = {
    "inspect": ("train", "explore"),
    "picture.py": ("train", "explore"),
    "models/data_config.py": ("train", "explore"),
    "bench": ("train",),
    "bench/hosts.py": ("train+export",),
    "pages": ("train", "explore"),
    "saved/export.py": ("train+export",),
    "training": ("train",),
    "commands": ("train",),
}
SHOWN_WITH_RICH = {"conversion/report.py"}  # where it is installed


def declared() -> dict[str, dict[str, Requirement]]:
    """The requirements of the plain package, "", and of every extra, with those of the plain one."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = {"": re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)}
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^\[", text, re.MULTILINE | re.DOTALL).group(1)
    lists |= dict(re.findall(r"^(\w+) = \[(.*?)\](?: #.*)?$", extras, re.MULTILINE | re.DOTALL))
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
        ("layers.py", "from yaml import load\nimport torch, math", []),
    ],
)
def test_an_undeclared_import_is_found(file, text, found):
    assert missing(file, text) == found


@pytest.mark.parametrize(
    ("package", "bad"),
    [
        ("datasets", "2.19.2"),  # runs the script of a data set unasked
        ("lightning", "2.5.2"),  # IndexError in its progress bar with rich 14.1 and later
    ],
)
def test_versions_that_do_harm_are_refused(package, bad):
    assert not declared()["train"][package].specifier.contains(bad)


def test_floors_are_not_above_what_is_installed():
    every = {name: one for part in declared().values() for name, one in part.items() if name != "nearsight"}
    above = {
        name: str(one)
        for name, one in every.items()
        if not one.specifier.contains(Version(metadata.version(name)), True)
    }
    assert above == {}
