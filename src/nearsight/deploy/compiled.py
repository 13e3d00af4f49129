# SPDX-License-Identifier: Apache-2.0
"""Libraries whose interface is of one version of a runtime: the user's compiler makes them, once, of the sources here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from ..built import SUFFIX, built, why_not_built
from ..errors import BackendError
from ..extras import need
from ..telling import telling

COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Runtime:
    """What a library is made for: an installed package, whose headers and libraries serve."""

    name: str
    package: str
    extra: str | None  # that brings it; None where every installation has it
    sources: tuple[str, ...]  # in csrc/
    headers: str  # in the package's folder, one that must be there
    include: str
    libraries: tuple[str, ...]  # patterns of files in the package's folder
    defined: tuple[str, ...] = ()


def kernel_library(what: str) -> Path:
    """The library of the kernel that needs no PyTorch, and registers itself with onnxruntime.

    Raises:
        BackendError: it was not built, for lack of a compiler; the message says why.
    """
    path = built(str(__package__), "libnearsight_onnxruntime")
    if path is None:
        raise BackendError(f"there is no operator for {what}: {why_not_built()}")
    return path


def library_for(runtime: Runtime) -> Path:
    """The library for a runtime: from the cache, or compiled now.

    It is kept in ``$XDG_CACHE_HOME/nearsight``, ``~/.cache/nearsight`` by default, under the runtime's version and a digest
    of all that it is made of. It finds the kernel's library where that is installed, or beside itself.

    Raises:
        PackageError: the runtime is not installed.
        BackendError: there is no compiler, there are no headers, or the compiler refuses; one line says which.
    """
    kernel = kernel_library(runtime.name)
    package = _folder_of(runtime)
    if not (package / runtime.headers).exists():
        raise BackendError(
            f"the installed {runtime.package} has no headers ({package / runtime.headers}), which the operator for "
            f"{runtime.name} is compiled against: its wheel of pip has them"
        )
    sources = [kernel.parent / "csrc" / source for source in runtime.sources]
    given = [str(source) for source in sources if source.suffix == ".cpp"]
    command = [*_compiler(runtime), *_flags(runtime, package), *given, *_linked(runtime, kernel, package)]
    digest = sha256(b"\0".join([*map(str.encode, command), *(source.read_bytes() for source in sources)]))
    version = metadata.version(runtime.package)
    name = f"libnearsight_{runtime.package}-{version}-{digest.hexdigest()[:12]}{SUFFIX}"
    folder = _cache()
    path = folder / name
    with _alone(path):
        if not path.exists():
            with telling(f"compiling the operator for {runtime.name} {version}, once"):
                _compile(command, path, runtime)
    return path


def _folder_of(runtime: Runtime) -> Path:
    if runtime.extra is not None:
        need((runtime.package,), f"the operator for {runtime.name}", runtime.extra)
    found = find_spec(runtime.package)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])


def _compiler(runtime: Runtime) -> list[str]:
    words = shlex.split(os.environ.get("CXX", ""))
    found = [words] if words else [[name] for name in COMPILERS]
    there = next((one for one in found if which(one[0])), None)
    if there is None:
        names = " ".join(words) or ", ".join(COMPILERS)
        raise BackendError(
            f"the operator for {runtime.name} is compiled on this machine, which has no C++17 compiler: looked for {names} "
            "(the environment variable CXX may name one)"
        )
    return [str(which(there[0])), *there[1:]]


def _flags(runtime: Runtime, package: Path) -> list[str]:
    return [
        *("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
        *(f"-D{name}" for name in runtime.defined),
        *("-isystem", str(package / runtime.include)),
    ]


def _linked(runtime: Runtime, kernel: Path, package: Path) -> list[str]:
    libraries = [kernel, *(file for pattern in runtime.libraries for file in sorted(package.glob(pattern)))]
    beside, whole = ("@loader_path", []) if sys.platform == "darwin" else ("$ORIGIN", ["-Wl,-z,defs"])
    places = dict.fromkeys([beside, *(str(library.parent) for library in libraries)])
    return [*map(str, libraries), *whole, *(f"-Wl,-rpath,{place}" for place in places)]


def _compile(command: Sequence[str], path: Path, runtime: Runtime) -> None:
    """Whole or not at all: what is half written stands under another name."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, errors="replace")
        if done.returncode != 0 or not made.exists():
            said = re.search(r"(?:error: .+|undefined reference to .+)", done.stderr)
            reason = said[0] if said else (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise BackendError(f"{command[0]} cannot build the operator for {runtime.name}: {reason}")
        os.replace(made, path)


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nearsight"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"there is nowhere to keep what is compiled: {error.filename}: {error.strerror}; the environment variable "
            "XDG_CACHE_HOME may name another folder"
        ) from error
    return folder


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of processes that want the same file one compiles it, and the others wait."""
    import fcntl  # not on Windows, where there is no kernel either

    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
