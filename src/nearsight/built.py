# SPDX-License-Identifier: Apache-2.0
"""What csrc/ became when nearsight was installed: where the libraries are, or why there are none."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

SUFFIX = {"darwin": ".dylib"}.get(sys.platform, ".so")


def built(package: str, stem: str) -> Path | None:
    """The library of that name in a package; None where it was not built."""
    # In an editable installation the package has two folders: that of the sources and that of what was built.
    folders = [Path(folder) for folder in sys.modules[package].__path__]
    return next((path for folder in folders if (path := folder / f"{stem}{SUFFIX}").exists()), None)


def why_not_built() -> str:
    """Why there is no library, and what to do about it."""
    if sys.platform == "win32":
        return "it is not written for Windows yet"
    return f"{_kept_reason()}. {REMEDY}"


def _kept_reason() -> str:
    """What csrc/build_backend.py kept of a build that failed: its first line is the reason, the log follows."""
    try:
        installed = metadata.distribution("nearsight")
        kept = installed.read_text("no-kernel.txt")
    except metadata.PackageNotFoundError:
        return "nearsight was not installed, it runs from a folder of sources"
    if not kept:
        return "its library was not among the installed files, and no failed build is on record"
    files = (file for file in installed.files or () if file.name == "no-kernel.txt")
    log = next((f" (the log: {installed.locate_file(file)})" for file in files), "")
    return f"when nearsight was installed, {kept.splitlines()[0]}{log}"


REMEDY = (
    "Mend that and install nearsight again, past pip's cache: "
    "pip install --no-cache-dir --force-reinstall --no-deps nearsight, or . in a checkout"
)
