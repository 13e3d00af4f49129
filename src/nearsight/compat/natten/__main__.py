# SPDX-License-Identifier: Apache-2.0
"""Runs a program in which ``import natten`` gives the stand-in, in the processes that it starts as well.

    python -m nearsight.compat.natten [--rel-pos-bias] [--force] PROGRAM.py [ARGUMENTS...]
    python -m nearsight.compat.natten [--rel-pos-bias] [--force] -m MODULE [ARGUMENTS...]

Nothing of the program is changed, nor of what is installed. A process that Python starts anew, as ``multiprocessing`` does
by ``spawn`` and ``torchrun`` does for every rank, finds a module of that name on its path, which installs the stand-in.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ...errors import NearsightError
from . import install, metadata, natten_version

OF_A_CHILD = "from nearsight.compat.natten import install\n\ninstall(force=True, rel_pos_bias={rel_pos_bias})\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Install the stand-in and run the program as Python would, with its arguments, until it ends."""
    parser = argparse.ArgumentParser(
        prog="python -m nearsight.compat.natten",
        description="Run a program in which `import natten` gives nearsight's stand-in, in its child processes too.",
    )
    parser.add_argument("--rel-pos-bias", action="store_true", help="modules have a bias unasked, as up to NATTEN 0.16")
    parser.add_argument("--force", action="store_true", help="hide a natten that is installed")
    parser.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module's name, as of python -m")
    parser.add_argument("program", metavar="PROGRAM", help="a Python file")
    parser.add_argument("arguments", metavar="ARGUMENTS", nargs=argparse.REMAINDER, help="those of the program")
    given = parser.parse_args(arguments)
    if not given.is_module and not Path(given.program).is_file():
        parser.error(f"there is no file {given.program}; for a module write -m {given.program}")
    try:
        install(given.force, rel_pos_bias=given.rel_pos_bias)
    except NearsightError as error:
        parser.error(f"{error}; here: --force")
    sys.argv[:] = [given.program, *given.arguments]
    with TemporaryDirectory(prefix="nearsight-natten-") as folder:
        _tell_children(Path(folder), given.rel_pos_bias)
        # Where Python looks first: the program's folder, or for a module the current one. Processes that are spawned take
        # over the whole path.
        sys.path[0] = os.getcwd() if given.is_module else str(Path(given.program).resolve().parent)
        sys.path.insert(1, folder)
        if given.is_module and not _is_there(given.program):
            parser.error(f"there is no module {given.program}")
        if given.is_module:
            runpy.run_module(given.program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(given.program, run_name="__main__")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _tell_children(folder: Path, rel_pos_bias: bool) -> None:
    """A module natten for processes that start anew, and what pip would have written of it."""
    (folder / "natten.py").write_text(OF_A_CHILD.format(rel_pos_bias=rel_pos_bias))
    written = folder / f"natten-{natten_version()}.dist-info"
    written.mkdir()
    for name, text in metadata().items():
        (written / name).write_text(text)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


if __name__ == "__main__":
    main()
