# SPDX-License-Identifier: Apache-2.0
"""The files of a run: whole or not there, and a message for the user where they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TrainingError
from ..files import remove_leftovers, write_whole
from ..inspect.plots import to_png, to_svg_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["make_folder", "make_inner_folder", "remove_leftovers", "write_bytes", "write_plot", "write_text"]


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`nearsight.files.write_whole` with a message for the user.

    Raises:
        TrainingError: the folder cannot be written to, or the disk is full.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, content: str) -> None:
    """:func:`write_bytes` for text, in UTF-8; bytes of a file's name that are none are written ``\\udc80`` and so on."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        TrainingError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {path}: {error.strerror}; name another --output") from error


def make_inner_folder(path: Path) -> None:
    """Make a folder inside a run's or a comparison's own, which may have come from elsewhere: no link leads out of it.

    Raises:
        TrainingError: it cannot be made, or it, or something in it, is a link.
    """
    if os.path.islink(path):
        raise TrainingError(f"{path} must be a folder, and it is a link: remove it, or name another --output")
    make_folder(path)
    links = [entry.path for entry in os.scandir(path) if entry.is_symlink()]
    if links:
        raise TrainingError(f"{links[0]} is a link, where files are to be written: remove it, or name another --output")


def write_plot(path: Path, figure: Figure, numbers: str, formats: Sequence[str] = ("svg", "png")) -> None:
    """A picture in every format, and beside it the numbers that it shows: ``path`` with .csv, .svg, .png."""
    write_text(path.with_name(f"{path.name}.csv"), numbers)
    for name, draw in (("svg", to_svg_file), ("png", to_png)):
        if name in formats:
            write_bytes(path.with_name(f"{path.name}.{name}"), draw(figure))
