# SPDX-License-Identifier: Apache-2.0
"""The border to the disk: what may come from elsewhere is read here, and what is written is whole or not there.

Whoever made a file may have meant harm. So only regular files are opened, since a pipe or a device would be waited for, and
texts of settings are small and hold no references. See docs/reference/security.md.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from .errors import TrainingError

UNFINISHED = ".part"  # what a temporary file's name ends with
LARGEST_TEXT = 1 << 24  # bytes of a table that is read whole
LARGEST_YAML = 1 << 16  # characters of settings, which take a second to read
MOST_LISTS = 500  # in settings: the time that PyYAML takes grows with the square of how deep they lie in each other


def to_path(path: str | PathLike[str]) -> Path:
    """What a public function is given as a file or folder; ``~`` is the user's home, as for a shell."""
    return Path(path).expanduser()


# ------------------------------------------------------------------------------------------------------------- reading


def open_regular(path: str | PathLike[str]) -> BinaryIO:
    """Open a file to read; a link may lead to it.

    Raises:
        OSError: it is not there, or it is a folder, a pipe, a socket or a device, which would be waited for.
    """
    _require_regular(os.stat(path), path)  # opening a device can already do something
    # A pipe that has taken the file's place meanwhile is not waited for either.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(handle), path)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_text(path: str | PathLike[str], most: int = LARGEST_TEXT, errors: str = "strict") -> str:
    """A small text file, in UTF-8; ``errors`` as in ``bytes.decode``.

    Raises:
        OSError: what :func:`open_regular` raises, or a file of more than ``most`` bytes.
        UnicodeDecodeError: it is no text.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
    return content.decode(errors=errors)


def read_yaml(text: str) -> Any:
    """Plain values out of YAML. Numbers may be written 1e-3, which YAML 1.1 takes for text.

    An alias repeats what an anchor names, and aliases of aliases make a few lines stand for more than a machine can hold:
    settings need none, so there are none.

    Raises:
        ValueError: it is no YAML, too long, or it holds an alias, a tag of Python's, or more levels than can be read.

    Example:
        >>> read_yaml("{lr: 1e-3, kernel_size: [3, 5]}")
        {'lr': 0.001, 'kernel_size': [3, 5]}
    """
    import yaml

    if len(text) > LARGEST_YAML:
        raise ValueError(f"it has more than {LARGEST_YAML} characters")
    if text.count("[") + text.count("{") > MOST_LISTS:
        raise ValueError(f"it has more than {MOST_LISTS} lists and tables")
    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it has too many levels") from error


def _loader() -> Any:
    import yaml
    from yaml.composer import ComposerError

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ComposerError(None, None, "it holds an alias, which settings may not")
            return super().compose_node(parent, index)

    Plain.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Plain


def _require_regular(found: os.stat_result, path: str | PathLike[str]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


# ------------------------------------------------------------------------------------------------------------- writing


def write_whole(path: str | PathLike[str], content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: after a crash at any moment the old file or the new one is there.

    Who may read the file follows from the umask. The temporary file beside it has a name that cannot be guessed, and neither
    that nor ``path`` is followed where it is a link.

    Raises:
        OSError: the folder cannot be written to, the disk is full, or a folder or device has the name.
    """
    path = to_path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # of a folder the system says so itself
        raise OSError(errno.EINVAL, "what has this name is no regular file", str(path))
    temporary = path.with_name(f".nearsight-{secrets.token_hex(8)}{UNFINISHED}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_bytes(path: str | PathLike[str], content: bytes) -> None:
    """:func:`write_whole` with a message for the user.

    Raises:
        TrainingError: the folder cannot be written to, or the disk is full.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error


def write_text(path: str | PathLike[str], content: str) -> None:
    """:func:`write_bytes` for text, in UTF-8; bytes of a file's name that are none are written ``\\udc80`` and so on."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def make_folder(path: str | PathLike[str]) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        TrainingError: it cannot be made.
    """
    try:
        to_path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {path}: {error.strerror}; name another --output") from error


def make_inner_folder(path: str | PathLike[str]) -> None:
    """Make a folder inside a run's or a comparison's own, which may have come from elsewhere: no link leads out of it.

    Raises:
        TrainingError: it cannot be made, or it, or something in it, is a link.
    """
    path = to_path(path)
    if os.path.islink(path):
        raise TrainingError(f"{path} must be a folder, and it is a link: remove it, or name another --output")
    make_folder(path)
    links = [entry.path for entry in os.scandir(path) if entry.is_symlink()]
    if links:
        raise TrainingError(f"{links[0]} is a link, where files are to be written: remove it, or name another --output")


def remove_leftovers(folder: str | PathLike[str]) -> None:
    """Delete the temporary files of a process that was killed in the midst of writing."""
    for file in to_path(folder).glob(f".nearsight-*{UNFINISHED}"):
        if not file.is_dir():
            file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself is safe from a power cut only once the folder is on the disk too."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
