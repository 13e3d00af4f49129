# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TrainingError
from ..inspect.plots import to_png, to_svg_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNFINISHED = ".part"  # what a temporary file's name ends with


def write_bytes(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: after a crash at any moment the old file or the new one is there.

    Raises:
        TrainingError: the folder cannot be written to, or the disk is full.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 is for secrets
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: Path, content: str) -> None:
    """:func:`write_bytes` for text, in UTF-8."""
    write_bytes(path, content.encode())


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        TrainingError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {path}: {error.strerror}; name another --output") from error


def write_plot(path: Path, figure: Figure, numbers: str, formats: Sequence[str] = ("svg", "png")) -> None:
    """A picture in every format, and beside it the numbers that it shows: ``path`` with .csv, .svg, .png."""
    write_text(path.with_name(f"{path.name}.csv"), numbers)
    for name, draw in (("svg", to_svg_file), ("png", to_png)):
        if name in formats:
            write_bytes(path.with_name(f"{path.name}.{name}"), draw(figure))


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed in the midst of writing."""
    for file in folder.glob(f".*{UNFINISHED}"):
        file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself is safe from a power cut only once the folder is on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
