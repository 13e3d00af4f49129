# SPDX-License-Identifier: Apache-2.0
"""The documentation's site, as far as it can be told without building it: no public name is missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import nearsight as ns
from nearsight import errors, positions

DOCS = Path(__file__).parents[1] / "docs"
# Rooms whose public names are for users, beside those of the package itself.
ROOMS = ("compat.natten", "conversion", "deploy", "inspect", "layers", "saved")


def public() -> set[str]:
    """Every public name, once: without its room where the package has it too."""
    found = set(ns.__all__)
    for room in ROOMS:
        names = importlib.import_module(f"nearsight.{room}").__all__
        found |= {f"{room}.{name}" for name in names if name not in ns.__all__}
    for module, kind in ((errors, Exception), (positions, positions.Position)):
        room = module.__name__.removeprefix("nearsight.")
        found |= {
            f"{room}.{name}"
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, kind) and not name.startswith("_")
        }
    return found


def listed(page: str) -> list[str]:
    """What the page of the API has in its tables."""
    return [name for block in re.findall(r"autosummary::\n.*\n\n((?:   .+\n)+)", page) for name in block.split()]


def test_every_public_name_has_a_page():
    names = listed((DOCS / "reference" / "api.rst").read_text())
    assert len(names) == len(set(names))
    assert public() - set(names) == set()
    assert len(public()) > 60


def test_every_recipe_is_on_its_page():
    page = (DOCS / "reference" / "recipes.md").read_text()
    shown = re.findall(r"literalinclude} \.\./\.\./recipes/(\w+\.yaml)", page)
    assert sorted(shown) == sorted(file.name for file in (DOCS.parent / "recipes").glob("*.yaml"))
