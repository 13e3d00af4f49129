# SPDX-License-Identifier: Apache-2.0
"""How the kernel is built: old compilers, flags from outside that would make it wrong, and why a build failed."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from nearsight import built
from nearsight.attention import native
from nearsight.attention.native import library as lib

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
FLAGS_OF = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def tool(name: str) -> str:
    path = shutil.which(name)
    assert path, f"this test needs {name}"
    return path


def compile_(compiler: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-psabi", "-I", CSRC, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------------- old compilers


def old_compilers() -> list[list[str]]:
    """Those that are installed, and one of today that lacks what they lack: before 12 one builtin, before 9 another."""
    posing = [tool("g++"), "-U__GNUC__", "-D__GNUC__=8", "-D__builtin_shufflevector=no", "-D__builtin_convertvector=no"]
    return [posing, *([old] for old in ("g++-9", "g++-10", "g++-11") if shutil.which(old))]


@pytest.mark.parametrize(
    "isa", ["baseline", *([pytest.param("avx2", marks=pytest.mark.sweep), "avx512"] if ON_X86 else [])]
)
def test_old_gcc_takes_the_kernel(isa):
    for compiler, *flags in old_compilers():
        finished = compile_(compiler, *flags, *FLAGS_OF[isa], f"-DNEARSIGHT_KERNEL=kernel_{isa}", CSRC / "kernel.cpp")
        assert finished.returncode == 0, finished.stderr[-3000:]


# -------------------------------------------------------------------------------------------------- flags from outside


def configured(folder: Path, *arguments: str, **environment: str) -> tuple[dict[str, str], str]:
    """The command of each object, by its name, and that of the link."""
    command = [tool("cmake"), "-G", "Unix Makefiles", "-S", ROOT, "-B", folder, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    environment = {"PATH": os.environ["PATH"], "CXX": "g++", **environment}
    finished = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    commands = json.loads((folder / "compile_commands.json").read_text())
    objects = {one["command"].split(" -o ")[1].split()[0]: one["command"] for one in commands}
    return objects, (folder / "CMakeFiles" / "nearsight.dir" / "link.txt").read_text()


def macros(command: str) -> set[str]:
    """What the compiler of a command defines by itself under its flags."""
    words = command.split(" -o ")[0].split()
    finished = subprocess.run(
        [*words, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
    )
    return {line.split()[1] for line in finished.stdout.splitlines() if line.split()[2:] != ["0"]}


HOSTILE = "-ffast-math -Ofast -ffinite-math-only -fno-signed-zeros -march=native -mtune=native -mavx512bf16 -flto -mbmi"
COMPILED_WHERE_THEY_RUN = ("openvino", "pytorch")


@pytest.mark.slow
@pytest.mark.skipif(not ON_X86, reason="names flags of x86-64")
def test_flags_from_outside_change_neither_arithmetic_nor_instruction_set(tmp_path):
    """All ways at once: the compiler's own, CXXFLAGS, LDFLAGS, and what pip's --config-settings hands to CMake."""
    environment = {"CXX": f"g++ {HOSTILE}", "CXXFLAGS": HOSTILE, "LDFLAGS": HOSTILE}
    objects, link = configured(tmp_path, f"-DCMAKE_CXX_FLAGS_RELEASE=-O2 {HOSTILE}", **environment)
    files = [file.stem for file in CSRC.rglob("*.cpp") if file.parent.name not in COMPILED_WHERE_THEY_RUN]
    times = {"kernel": 4, "nearsight": 2, "threads": 2}  # instruction sets, and two libraries
    assert len(objects) == sum(times.get(file, 1) for file in files)
    for name, command in objects.items():
        defined = macros(command)
        assert not defined & {"__FAST_MATH__", "__FINITE_MATH_ONLY__", "__ASSOCIATIVE_MATH__", "__NO_SIGNED_ZEROS__"}
        assert not defined & {"__BMI__", "__LZCNT__"}
        assert ("__AVX512BF16__" in defined) == ("kernel_avx512_bf16" in name)
        assert ("__AVX512F__" in defined) == ("kernel_avx512" in name)
        assert ("__SSE3__" in defined) == ("kernel_avx" in name), name
    # Any of these, without its opposite behind it, links start-up code that turns denormal numbers off.
    for flag in ("-ffast-math", "-funsafe-math-optimizations"):
        assert link.rfind(flag) < link.rfind(flag.replace("-f", "-fno-", 1))
    assert "-Ofast" not in link
    assert link.rfind("-flto") < link.rfind("-fno-lto")


# ------------------------------------------------------------------------------------------------------- other systems

# CMake is told that it builds for a Mac, and tries the compiler on nothing that asks for a Mac's libraries.
MAC = (
    *("-DCMAKE_SYSTEM_NAME=Darwin", "-DCMAKE_CXX_COMPILER_WORKS=1", "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY"),
    *("-DCMAKE_HAVE_LIBC_PTHREAD=1", "-DCMAKE_CXX_COMPILER=clang++"),
)


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["arm64", pytest.param("x86_64", marks=pytest.mark.sweep)])
def test_what_a_mac_would_compile(processor, tmp_path):
    """OpenMP is compiled in and left open, for PyTorch's own; instruction sets are those of the processor it is for."""
    tool("clang++")
    target = f"-DCMAKE_CXX_COMPILER_TARGET={processor}-apple-macos11"
    # As pip says which of a Mac's two processors it builds for.
    objects, link = configured(tmp_path, *MAC, target, f"-DCMAKE_OSX_ARCHITECTURES={processor}", CXX="clang++")
    kernels = {name.split("kernel_")[1].split(".")[0] for name in objects if "/kernel_" in name}
    assert kernels == {"baseline"} | ({"avx2", "avx512", "avx512_bf16"} if processor == "x86_64" else set())
    threads = {name: "-Xclang -fopenmp" in command for name, command in objects.items() if "threads" in name}
    assert threads == {name: "onnxruntime" not in name for name in threads}
    assert "-dynamiclib" in link
    assert "dynamic_lookup" in link
    assert "libnearsight.dylib" in link
    for flag in ("-march=armv8-a", "-static-libstdc++", "version-script", "gc-sections", "-lomp"):
        assert flag not in link + "".join(objects.values())


def test_windows_is_told_that_there_is_no_kernel(backend, tmp_path):
    command = [tool("cmake"), "-G", "Unix Makefiles", "-S", ROOT, "-B", tmp_path, "-DCMAKE_SYSTEM_NAME=Windows"]
    finished = subprocess.run([*command, "-DCMAKE_CXX_COMPILER_WORKS=1"], capture_output=True, text=True)
    assert backend.reason_in(finished.stderr) == "CMake said: the kernel is not written for Windows yet"


LOOSE = ("-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-ffinite-math-only", "-freciprocal-math")


@pytest.mark.parametrize("flag", [*LOOSE, "-fno-signed-zeros"])
def test_loose_arithmetic_that_comes_another_way_is_refused(flag):
    finished = compile_(tool("g++"), flag, "-x", "c++", CSRC / "flags.h")
    assert "IEEE" in finished.stderr
    assert finished.returncode != 0


@pytest.mark.skipif(not ON_X86, reason="names flags of x86-64")
@pytest.mark.parametrize("flag", ["-mavx2", "-msse4.2", "-mbmi", "-march=haswell", "-march=x86-64-v2"])
def test_instruction_sets_that_come_another_way_are_refused(flag):
    finished = compile_(tool("g++"), flag, "-x", "c++", CSRC / "flags.h")
    assert "chooses the instruction set when it runs" in finished.stderr
    assert finished.returncode != 0


@pytest.mark.skipif(not ON_X86, reason="names flags of x86-64")
@pytest.mark.parametrize(
    ("unit", "kernel", "flags"),
    [
        ("isa", "", ["-mavx2"]),
        ("geometry", "", ["-mavx2"]),
        ("kernel", "kernel_baseline", ["-mavx2"]),
        ("kernel", "kernel_avx2", FLAGS_OF["avx512"]),
        ("kernel", "kernel_avx512", FLAGS_OF["avx512_bf16"]),
    ],
)
def test_every_unit_has_the_instruction_set_of_its_name_only(unit, kernel, flags):
    named = [f"-DNEARSIGHT_KERNEL={kernel}"] if kernel else []
    finished = compile_(tool("g++"), "-E", *flags, *named, CSRC / f"{unit}.cpp")
    assert "chooses the instruction set when it runs" in finished.stderr


# -------------------------------------------------------------------------------------------------- why a build failed

LOGS = {
    "no C++17 compiler was found": """
CMake Error at CMakeLists.txt:7 (project):
  No CMAKE_CXX_COMPILER could be found.
""",
    "no C++17 compiler was found: /bin/false cannot compile the simplest program": """
CMake Error at /usr/share/cmake/CMakeTestCXXCompiler.cmake:60 (message):
  The C++ compiler

    "/bin/false"

  is not able to compile a simple test program.
""",
    "g++ cannot compile the simplest program with these flags: unrecognized command-line option '-fnonsense'": """
CMake Error at /usr/share/cmake/CMakeTestCXXCompiler.cmake:60 (message):
  The C++ compiler

    "g++"

  is not able to compile a simple test program.

  It fails with the following output:

    g++: error: unrecognized command-line option '-fnonsense'
""",
    "the compiler said: '__builtin_shufflevector' was not declared in this scope": """
-- Configuring done
FAILED: CMakeFiles/kernel_baseline.dir/csrc/kernel.cpp.o
csrc/simd-inl.h:120:29: error: '__builtin_shufflevector' was not declared in this scope
csrc/simd-inl.h:121:29: error: another
""",
    "the compiler said: Killed signal terminated program cc1plus": """
g++: fatal error: Killed signal terminated program cc1plus
""",
    "the compiler said: undefined reference to `absent'": """
ld: x.o: in function `f':
x.cpp:(.text+0x9): undefined reference to `absent'
""",
    "CMake said: Could NOT find Threads (missing: Threads_FOUND)": """
CMake Error at FindPackageHandleStandardArgs.cmake:230 (message):
  Could NOT find Threads (missing: Threads_FOUND)
Call Stack (most recent call first):
  CMakeLists.txt:120 (find_package)
""",
    "": "-- Configuring done\n",
}


@pytest.fixture(scope="module")
def backend():
    specification = importlib.util.spec_from_file_location("build_backend", CSRC / "build_backend.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("reason", LOGS)
def test_the_reason_in_a_log(reason, backend):
    assert backend.reason_in(LOGS[reason]) == reason


class Installed(SimpleNamespace):
    files = ()

    def read_text(self, name: str) -> str | None:
        return self.kept if name == "no-kernel.txt" else None


@pytest.mark.parametrize(
    ("kept", "expected"),
    [("the compiler said: no\n\nlog", "the compiler said: no"), (None, "no failed build is on record")],
)
def test_the_reason_is_shown(kept, expected, monkeypatch):
    monkeypatch.setattr(built.metadata, "distribution", lambda name: Installed(kept=kept))
    monkeypatch.setattr(built, "SUFFIX", ".absent")
    lib.find.cache_clear()
    try:
        reason = native.unavailable()
    finally:
        lib.find.cache_clear()
    assert reason is not None
    assert expected in reason
    assert "pip install --no-cache-dir --force-reinstall" in reason
    assert "\n" not in reason


def test_what_a_build_writes_is_heard_and_passed_on(backend, capfd):
    with backend._heard() as heard:
        subprocess.run(["sh", "-c", "echo one; echo two >&2"], check=True)
    assert sorted(bytes(heard).split()) == [b"one", b"two"]
    assert sorted(capfd.readouterr().out.split()) == ["one", "two"]
