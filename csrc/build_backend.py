# SPDX-License-Identifier: Apache-2.0
"""How pip builds nearsight: scikit-build-core's hooks; where the kernel cannot be built, pure Python and the reason.

pip shows nothing of a build that ends well, so a kernel that was left out would be missed in silence. The reason and
the log are kept in the metadata of the package, where `nearsight.backends()` and `nearsight info` find them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from scikit_build_core import build as hooks
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)
from scikit_build_core.errors import ScikitBuildError

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

RECORD = "no-kernel.txt"  # src/nearsight/attention/native/library.py reads it
LOG_LINES = 200
Settings = dict[str, "list[str] | str"]


def build_wheel(folder: str, settings: Settings | None = None, metadata: str | None = None) -> str:
    return _build(hooks.build_wheel, folder, settings, metadata)


def build_editable(folder: str, settings: Settings | None = None, metadata: str | None = None) -> str:
    return _build(hooks.build_editable, folder, settings, metadata)


def _build(hook: Callable[..., str], folder: str, settings: Settings | None, metadata: str | None) -> str:
    with _heard() as heard:
        try:
            return hook(folder, settings, metadata)
        except (SystemExit, ScikitBuildError) as error:
            failure = error
    log = bytes(heard).decode(errors="replace")
    reason = reason_in(log) or f"the build ended with: {failure}"
    print(f"\n*** nearsight goes on without its kernel: {reason}", flush=True)
    pure: Settings = {"wheel.cmake": "false", "wheel.platlib": "false"}
    name = hook(folder, {**(settings or {}), **pure}, metadata)
    _add(Path(folder) / name, RECORD, f"{reason}\n\n" + "\n".join(log.splitlines()[-LOG_LINES:]) + "\n")
    return name


def reason_in(log: str) -> str:
    """What a build's log says of why it failed, or "". A compiler's own words come before CMake's."""
    if "No CMAKE_CXX_COMPILER could be found" in log:
        return "no C++17 compiler was found"
    said = re.search(r"\b(?:(?:fatal |internal compiler )?error: (.+)|(undefined reference to .+))$", log, re.MULTILINE)
    words = (said.group(1) or said.group(2)) if said else ""
    if broken := re.search(r'The C\+\+ compiler\s+"([^"]*)"\s+is not able to compile', log):
        compiler = broken.group(1)
        if words:
            return f"{compiler} cannot compile the simplest program with these flags: {words}"
        return f"no C++17 compiler was found: {compiler} cannot compile the simplest program"
    if words:
        return f"the compiler said: {words}"
    by_cmake = re.search(r"^CMake Error[^\n]*:\s+(.+(?:\n  .+)*)", log, re.MULTILINE)
    return f"CMake said: {' '.join(by_cmake.group(1).split())[:300]}" if by_cmake else ""


@contextmanager
def _heard() -> Iterator[bytearray]:
    """What this process and its children write meanwhile, which is passed on as it comes."""
    heard = bytearray()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    outer = {stream: os.dup(stream) for stream in (1, 2)}
    reading, writing = os.pipe()

    def pass_on() -> None:
        while piece := os.read(reading, 1 << 16):
            heard.extend(piece)
            os.write(outer[1], piece)

    passing = threading.Thread(target=pass_on)
    passing.start()
    for stream in outer:
        os.dup2(writing, stream)
    os.close(writing)
    try:
        yield heard
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for stream, before in outer.items():
            os.dup2(before, stream)
        passing.join()
        for descriptor in (reading, *outer.values()):
            os.close(descriptor)


def _add(wheel: Path, name: str, text: str) -> None:
    """One more file among the metadata of a wheel, which lists the digests of all its files."""
    with ZipFile(wheel) as old:
        files = {entry: old.read(entry) for entry in old.infolist()}
    (record,) = (entry for entry in files if entry.filename.endswith(".dist-info/RECORD"))
    data = text.encode()
    path = record.filename.removesuffix("RECORD") + name
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    files[record] = f"{path},sha256={digest},{len(data)}\n".encode() + files[record]
    with ZipFile(wheel, "w", ZIP_DEFLATED) as new:
        for entry, content in files.items():
            if entry is record:
                new.writestr(path, data)
            new.writestr(entry, content)
