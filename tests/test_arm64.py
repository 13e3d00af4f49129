# SPDX-License-Identifier: Apache-2.0
"""The NEON code: compiled for arm64, run under emulation, and held against what this machine's instruction set computes."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

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


def build_for_arm64(compiler: str, folder: Path) -> Path:
    units = {
        "csrc/kernel.cpp": ["-O2", "-ffp-contract=fast", "-DNEARSIGHT_KERNEL=kernel_baseline"],
        **{f"csrc/{file.name}": [] for file in (ROOT / "csrc").glob("*.cpp") if file.stem != "kernel"},
        "tests/native_driver.cpp": [],
    }

    def build(source: str) -> Path:
        target = folder / f"{Path(source).stem}.o"
        subprocess.run([compiler, *FLAGS, *units[source], "-c", ROOT / source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, units))
    program = folder / "driver"
    subprocess.run([compiler, "-static", *objects, "-o", program], check=True)
    return program


def build_here(folder: Path) -> Path:
    """The same driver with the library that is installed."""
    library = Path(lib.loaded()._name)
    driver, program = ROOT / "tests" / "native_driver.cpp", folder / "driver-here"
    run_path = f"-Wl,-rpath,{library.parent}"
    subprocess.run(["g++", *FLAGS, "-fopenmp", driver, library, run_path, "-o", program], check=True)
    return program


@pytest.mark.sweep
@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_arm64_computes_the_same(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not (compiler and emulator):
        pytest.skip("needs the Debian packages g++-aarch64-linux-gnu and qemu-user")
    there, here = build_for_arm64(compiler, tmp_path), build_here(tmp_path)
    runs = {"neon": [emulator, there], "auto": [here]}
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
