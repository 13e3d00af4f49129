# SPDX-License-Identifier: Apache-2.0
"""The wheel for arm64: made here, its NEON code run under emulation and held against this machine's instruction set."""

import os
import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from test_install import LIBRARY, wheel_of

from nearsight.attention import native
from nearsight.attention.native import library as lib

ROOT = Path(__file__).parents[1]
PROBLEMS = "200"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-I", ROOT / "csrc"]


def results(file: Path) -> list[np.ndarray]:
    """As tests/native_driver.cpp writes them."""
    words = np.fromfile(file, "<i4")
    found, at = [], 0
    while at < len(words):
        count = int(words[at])
        found.append(words[at + 2 : at + 2 + count].view("<f4"))
        at += 2 + count
    return found


def is_bfloat16(numbers: np.ndarray) -> bool:
    return not np.any(numbers.view(np.int32) & 0xFFFF)


def build_for_arm64(compiler: str, source: Path, folder: Path) -> Path:
    """The driver with the library of the wheel that is made for arm64 on this machine."""
    cross = "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_FLAGS_RELEASE=-O2"
    wheel = wheel_of(source, CXX=compiler, CMAKE_ARGS=cross, _PYTHON_HOST_PLATFORM="linux-aarch64")
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    library = Path(ZipFile(wheel).extract(LIBRARY, folder))
    return build(compiler, library, folder / "driver-there")


def build(compiler: str, library: Path, program: Path) -> Path:
    driver, run_path = ROOT / "tests" / "native_driver.cpp", f"-Wl,-rpath,{library.parent}"
    subprocess.run([compiler, *FLAGS, "-fopenmp", driver, library, run_path, "-o", program], check=True)
    return program


@pytest.mark.sweep
@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_arm64_computes_the_same(source, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs the Debian packages g++-aarch64-linux-gnu and qemu-user")
    there = build_for_arm64(compiler, source, tmp_path)
    here = build("g++", Path(lib.loaded()._name), tmp_path / "driver-here")
    runs = {"neon": [emulator, "-L", "/usr/aarch64-linux-gnu", there], "auto": [here]}
    found = {}
    for isa, command in runs.items():
        file = tmp_path / f"{isa}.bin"
        environment = {**os.environ, "NEARSIGHT_ISA": isa}
        subprocess.run([*command, PROBLEMS, "1", file], check=True, env=environment)
        found[isa] = results(file)
    assert len(found["neon"]) == len(found["auto"]) > 5 * int(PROBLEMS)
    for ours, theirs in zip(found["neon"], found["auto"], strict=True):
        rtol = 2**-7 if is_bfloat16(ours) else 1e-5
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-5)
