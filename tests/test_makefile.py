# SPDX-License-Identifier: Apache-2.0
"""A checkout that was moved or copied with its .venv, or whose Python is gone, is told so before anything runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """As after `make`: the sources, and a .venv in which nearsight is installed from them."""
    place = tmp_path / "a checkout"
    (place / "src" / "nearsight").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", place)
    (place / "src" / "nearsight" / "__init__.py").touch()
    venv.create(place / ".venv", symlinks=True)
    (packages(place) / "editable.pth").write_text(f"{place / 'src'}\n")
    for part in ("train", "dev"):
        (place / ".venv" / f".installed-{part}").touch()
    return place


def packages(place: Path) -> Path:
    return place / ".venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)


def sound(place: Path) -> bool:
    """What `make sound` says, on which every target that needs the .venv waits."""
    finished = subprocess.run(["make", "sound"], cwd=place, capture_output=True, text=True)
    assert "make distclean" in finished.stdout or finished.returncode == 0, finished
    return finished.returncode == 0


def test_where_it_was_made(checkout):
    assert sound(checkout)


def test_moved(checkout):
    assert not sound(checkout.rename(checkout.with_name("moved")))


def test_copied(checkout):
    copy = checkout.with_name("copy")
    shutil.copytree(checkout, copy, symlinks=True)
    assert not sound(copy)
    assert sound(checkout)


def test_seen_through_a_link(checkout):
    link = checkout.with_name("link")
    link.symlink_to(checkout)
    assert sound(link)


def test_its_python_is_gone(checkout):
    for python in (checkout / ".venv" / "bin").glob("python*"):
        python.unlink()
        python.symlink_to("/no/such/python")
    assert not sound(checkout)


def test_its_python_is_a_newer_one(checkout):
    """Which looks for packages elsewhere."""
    packages(checkout).parent.rename(packages(checkout).parent.with_name("python3.1"))
    assert not sound(checkout)


def test_not_there_yet_or_not_finished(checkout):
    for part in ("train", "dev"):
        os.unlink(checkout / ".venv" / f".installed-{part}")
    (packages(checkout) / "editable.pth").unlink()
    assert sound(checkout)
    shutil.rmtree(checkout / ".venv")
    assert sound(checkout)


def test_every_target_that_uses_the_venv_waits_for_it():
    commands = subprocess.run(["make", "-n", "-B", "quick"], cwd=ROOT, capture_output=True, text=True).stdout
    assert commands.index("SOUND") < commands.index("-m pytest")


def test_pytorch_for_cpus_is_installed_first_where_that_is_asked_for():
    plan = ["make", "--dry-run", "demo", "VENV=/no/such/place"]
    usual, chosen = (
        subprocess.check_output([*plan, *more], cwd=ROOT, text=True).splitlines() for more in ([], ["TORCH=cpu"])
    )
    added = [line for line in chosen if line not in usual]
    assert len(added) == 1
    assert added[0].endswith("--index-url https://download.pytorch.org/whl/cpu torch torchvision")
    assert chosen.index(added[0]) < next(place for place, line in enumerate(chosen) if "--editable" in line)
