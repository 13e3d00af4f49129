# SPDX-License-Identifier: Apache-2.0
"""Plants the faults of tests/faults.py one by one, and says whether the tests notice: `python tests/plant.py [NAME ...]`.

Works on a copy of the tree, which it removes. A fault in C++ is built without optimisation and for one instruction set, and
the tests run in a fork of this process, which has loaded PyTorch: so each takes seconds. Ends with 1 if a fault survives. It
is for `make test` to say that the tests pass without any.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hypothesis  # noqa: F401  loaded for the forks
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
from faults import FAULTS, LOWEST, Fault

ROOT = Path(__file__).parents[1]
WIDER = ("avx2", "avx512", "avx512_bf16")
OPTIONS = ("-x", "-q", "-n", "0", "-m", "not sweep", "-p", "no:cacheprovider")
NOTICED = (pytest.ExitCode.TESTS_FAILED, -1)  # -1: the process died of it
PROCESSOR = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
PATIENCE = 600  # seconds, after which a process that does not end is killed, and has died of the fault
WHOLE = "tests/test_contract.py::test_by_hand"  # passes in a copy that is one


class Copy:
    """The tree in a folder of its own, and what runs its tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = self.folder / fault.file
        right = path.read_text()
        assert right.count(fault.old) == 1, f"{fault.name}: {fault.file} holds its text {right.count(fault.old)} times"
        path.write_text(right.replace(fault.old, fault.new))
        try:
            yield
        finally:
            path.write_text(right)

    def build(self, isa: str) -> None:
        """The library with the lowest instruction set and, if it is another one, ``isa``."""
        build = self.folder / f"build-{isa}"
        without = [f"-DNEARSIGHT_COMPILER_HAS_{name.upper()}=OFF" for name in WIDER if name != isa]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        configure = ["cmake", "-S", self.folder, "-B", build, "-DCMAKE_CXX_FLAGS_RELEASE=-O0", *without]
        for command in (configure, ["cmake", "--build", build, "--parallel", "2"]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the copy does not build:\n{done.stdout}{done.stderr}")
        (library,) = build.glob("libnearsight.*")
        target = self.folder / "src" / "nearsight" / "attention" / "native" / library.name
        target.unlink(missing_ok=True)  # and no file that a process has mapped is written to
        shutil.copy(library, target)

    def notices(self, tests: str) -> bool:
        """Whether the tests fail; a process that dies of a fault has failed too.

        Raises:
            SystemExit: none of them ran.
        """
        log = self.folder / "log"
        child = os.fork()
        if child == 0:
            self._become(tests, log)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if max(code, -1) not in (pytest.ExitCode.OK, *NOTICED):
            raise SystemExit(f"these tests do not run: {tests}\n{log.read_text()}")
        return code != pytest.ExitCode.OK

    def _become(self, tests: str, log: Path) -> None:
        """pytest in the copy, with the copy's nearsight: past an editable installation, which answers before the path."""
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            signal.alarm(PATIENCE)
            os.chdir(self.folder)
            sys.path[:] = [str(self.folder / "src"), *(path for path in sys.path if path != str(Path(__file__).parent))]
            sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in type(one).__module__]
            import nearsight

            assert Path(nearsight.__file__).is_relative_to(self.folder), nearsight.__file__
            code = int(pytest.main([*OPTIONS, *shlex.split(tests)]))
            sys.stdout.flush()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            code = pytest.ExitCode.INTERNAL_ERROR
        os._exit(code)


def main(names: Sequence[str]) -> int:
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in names if name not in known]:
        print(f"no such fault: {', '.join(unknown)}; there are:", *known, sep="\n  ")
        return 2
    faults = [known[name] for name in names] or list(FAULTS)
    survived, left = [], []
    with tempfile.TemporaryDirectory(prefix="nearsight-faults-") as folder:
        copy = Copy(Path(folder))
        copy.build(LOWEST)
        if copy.notices(WHOLE):
            raise SystemExit("the copy fails without a fault; does `make test` pass?")
        for fault in faults:
            if fault.isa != LOWEST and fault.isa not in PROCESSOR:
                print(f"no {fault.isa} here     {fault.name}", flush=True)
                left.append(fault.name)
                continue
            begun = time.monotonic()
            with copy.planted(fault):
                copy.build(fault.isa)
                caught = copy.notices(fault.tests)
            print(f"{'caught  ' if caught else 'SURVIVED'} {time.monotonic() - begun:5.1f} s  {fault.name}", flush=True)
            survived += [] if caught else [fault.name]
    print(f"{len(faults) - len(survived) - len(left)} of {len(faults)} faults are caught, {len(left)} cannot run here")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
