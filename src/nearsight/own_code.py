# SPDX-License-Identifier: Apache-2.0
"""``--import MODULE``: code of one's own, which runs because its user says so and never because a file does.

What was imported is noted in what a run leaves, so that whoever opens it is told what to add. The processes that nearsight
starts are given the same flags.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from hashlib import sha256
from os import PathLike
from pathlib import Path

from .errors import DataError, OptionError
from .files import open_regular, to_path

KEY = "import"  # in the files that note it
_imported: list[str] = []


def imported() -> tuple[str, ...]:
    """What :func:`import_own` has imported in this process: dotted names, and files by their absolute paths."""
    return tuple(_imported)


def import_own(module: str | PathLike[str]) -> None:
    """Run a module, once, that registers networks or position encodings of one's own.

    Args:
        module: a dotted name, looked for as any import is; or a ``.py`` file, for which ``sys.path`` is neither asked nor
            changed, so that it imports none that lies beside it.

    Raises:
        OptionError: no such module, or its code raises something; the message says where.

    Example:
        >>> import_own("my_networks.py")
        >>> create_model("my_network")
    """
    name = os.fspath(module)
    if name.endswith(".py") or os.sep in name:
        name = str(to_path(name).resolve())
        _run(name, lambda: _import_file(Path(name)))
    elif re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        _run(name, lambda: importlib.import_module(name))
    else:
        raise OptionError(f"--import takes a dotted name or a .py file; received {name!r:.100}")
    if name not in _imported:
        _imported.append(name)


def refuse_unimported(names: object, source: object) -> None:
    """See that what a file says it needs was imported, by its user; nothing is imported here.

    A file may have been moved meanwhile: another of the same name is taken for it.

    Args:
        names: what the file notes.
        source: the file, for the message.

    Raises:
        DataError: one that was not; or no list of names.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{source} must list what it imports as texts; received {names!r:.100}")
    lacking = [name for name in names if not _is_there(name)]
    if lacking:
        flags = " ".join(f"--import {name}" for name in lacking)
        raise DataError(
            f"{source} imports {', '.join(lacking)}, which no file does by itself: if you trust it, add {flags} (in Python: "
            "import it first)"
        )


def _is_there(name: str) -> bool:
    if name in _imported or name in sys.modules:
        return True
    files = [*_imported, *(getattr(module, "__file__", None) or "" for module in [*sys.modules.values()])]
    return name.endswith(".py") and (name in files or Path(name).name in {Path(one).name for one in _imported})


def _import_file(path: Path) -> None:
    open_regular(path).close()
    name = f"nearsight_own_{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"  # nobody else's
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _run(name: str, load: Callable[[], object]) -> None:
    try:
        load()
    except (Exception, SystemExit) as error:  # whatever its code raises
        reason = _why(error)
    else:
        return
    raise OptionError(f"cannot import {name}: {reason}")  # out here: of what it raised nothing is a reason of ours


def _why(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    if where.filename in (__file__, open_regular.__code__.co_filename):  # before any of its lines
        return getattr(error, "strerror", None) or str(error)
    said = " ".join(str(error).split()) or "no more is said"
    at = "" if where.filename.startswith("<frozen") else f" (line {where.lineno} of {where.filename})"
    return f"{type(error).__name__}: {said}{at}"


def flags(names: Iterable[str]) -> list[str]:
    """What another process of nearsight is given to import the same."""
    return [f"--import={name}" for name in names]
