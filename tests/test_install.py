# SPDX-License-Identifier: Apache-2.0
"""What `pip install .` makes of the sdist: a kernel where there is a C++ compiler, pure Python where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from elftools.elf.elffile import ELFFile

from nearsight.built import SUFFIX

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# What a library is made of on the machine of its user, against the headers of a runtime that is installed there.
SOURCES = ("nearsight.h", "node.h", "node.cpp", "openvino/local_attention.cpp", "pytorch/attend.cpp")
WEIGHTS = "nearsight/models/weights/sasa_nano.digits.safetensors"
LIBRARY = f"nearsight/attention/native/libnearsight{SUFFIX}"
# What is built is not timed, and one kernel shows what three would: test_build.py looks at all that are compiled.
WIDER = " ".join(f"-DNEARSIGHT_COMPILER_HAS_{isa}=OFF" for isa in ("AVX2", "AVX512"))
QUICKLY = {"CMAKE_ARGS": f"-DCMAKE_CXX_FLAGS_RELEASE=-O0 {WIDER}"}
BESIDE = ("--config-settings=build-dir=build",)  # in the sources' folder: what is made again there is compiled once
NO_COMPILER = {"CXX": "/bin/false"}
BAD_FLAG = {"CXXFLAGS": "-fno-such-flag"}
# Prints where the package is from, why there is no native kernel, and what the default computes for equal values.
PROGRAM = """
import torch, nearsight as ns
ones = torch.ones(1, 1, 5, 5, 4)
print(ns.__file__, ns.backends()["native"], ns.local_attention(ones, ones, ones, ns.Window(3)).unique().item(), sep="\\n")
"""


def pip(*arguments: str | Path, python: Path | str = sys.executable, **environment: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **QUICKLY, **environment})
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]


def wheel_of(source: Path, **environment: str) -> Path:
    options = ("--no-deps", "--no-build-isolation", *BESIDE, "--wheel-dir", source / "dist")
    pip("wheel", *options, source, **environment)
    (wheel,) = (source / "dist").iterdir()
    return wheel


def fresh_python(folder: Path) -> Path:
    """A virtual environment that has what this one has, except nearsight."""
    venv.create(folder, with_pip=False)
    packages = folder / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    # A folder named in a .pth file is searched, but the .pth files in it are not read, nearsight's own among them.
    (packages / "outer.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / Path(sys.executable).relative_to(sys.prefix)


def answers(python: Path, folder: Path) -> tuple[str, str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run([python, "-c", PROGRAM], capture_output=True, text=True, cwd=folder, env=environment)
    assert finished.returncode == 0, finished.stderr
    file, reason, result = finished.stdout.splitlines()
    return file, reason, result


def run(*command: str | Path, folder: Path) -> str:
    finished = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def shown_and_needed(library: Path) -> tuple[set[str], set[str]]:
    """The names that a library for Linux has for others, and the libraries that it asks for."""
    with library.open("rb") as file:
        elf = ELFFile(file)
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        shown = {one.name for one in symbols if one["st_shndx"] != "SHN_UNDEF" and one.name}
        tags = elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        return shown, {tag.needed.split(".so")[0] for tag in tags}


def test_the_sdist_holds_what_is_needed_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "LICENSE", "csrc/nearsight.h", "csrc/exported.map", "tests/check_wheel.py"} <= names
    assert not [name for name in names if name.endswith((SUFFIX, ".pyc", ".png", ".whl"))]
    assert sdist.stat().st_size < 3e6


def test_with_a_compiler(source, tmp_path):
    wheel = wheel_of(source)
    assert wheel.name.startswith("nearsight-")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = ZipFile(wheel).namelist()
    assert {
        LIBRARY,
        f"nearsight/deploy/libnearsight_onnxruntime{SUFFIX}",
        *(f"nearsight/deploy/csrc/{source}" for source in SOURCES),
        "nearsight/pages/templates/explore.js",
        "nearsight/pages/templates/page.css",
        WEIGHTS,
    } <= {*names}
    sources = {name for name in names if name.endswith((".cpp", ".h", ".txt")) and "dist-info" not in name}
    assert sources == {f"nearsight/deploy/csrc/{source}" for source in SOURCES}
    python = fresh_python(tmp_path / "venv")
    pip("install", "--no-deps", wheel, python=python)
    file, reason, result = answers(python, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert (reason, result) == ("None", "1.0")
    run(python, ROOT / "tests" / "check_wheel.py", "native", folder=tmp_path)
    if sys.platform == "linux":  # as far as this machine's compiler allows; a release is built where it allows more
        told = run(sys.executable, "-m", "auditwheel", "show", wheel, folder=tmp_path)
        assert "manylinux_2_" in told or "musllinux_1_" in told, told
        for stem, others in (
            ("attention/native/libnearsight", set()),
            ("deploy/libnearsight_onnxruntime", {"RegisterCustomOps"}),
        ):
            shown, needed = shown_and_needed(Path(file).parent / f"{stem}{SUFFIX}")
            assert not {name for name in shown if not name.startswith("nearsight_")} ^ others
            assert not {"libstdc++", "libgomp"} & needed
    check_editable(source, tmp_path / "editable", "None")


def test_without_a_compiler(source, tmp_path):
    wheel = wheel_of(source, **NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(SUFFIX)]
    assert WEIGHTS in names
    python = fresh_python(tmp_path / "venv")
    pip("install", "--no-deps", wheel, python=python)
    file, reason, result = answers(python, tmp_path)
    assert Path(file).is_relative_to(tmp_path / "venv")
    assert "no C++17 compiler" in reason
    assert "pip install --no-cache-dir --force-reinstall" in reason
    log = Path(reason.split("(the log: ")[1].split(")")[0])
    assert log.is_relative_to(tmp_path / "venv")
    assert "/bin/false" in log.read_text()
    assert result == "1.0"


def check_editable(source: Path, folder: Path, expected: str, **environment: str) -> None:
    """The sources stay where they are, the library lies with the installed packages."""
    python = fresh_python(folder)
    options = ("--no-deps", "--no-build-isolation", *BESIDE, "--editable")
    pip("install", *options, source, python=python, **environment)
    file, reason, result = answers(python, folder)
    assert Path(file).is_relative_to(source)
    assert expected in reason
    assert result == "1.0"


def test_editable_where_the_compiler_fails(source, tmp_path):
    check_editable(source, tmp_path / "venv", "-fno-such-flag", **BAD_FLAG)
