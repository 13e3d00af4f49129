# SPDX-License-Identifier: Apache-2.0
"""Macs and Windows, as far as names go: what is loaded where, and what is done without there."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from importlib import reload
from pathlib import Path

import pytest
import torch

from nearsight import built
from nearsight.attention.native import library as lib
from nearsight.errors import BackendError

# Loaded under this system's own name, all that follows finds a Windows: what Python has not there is gone.
WINDOWS = """
import os, sys, lightning, timm, torch, torch.distributed, torchmetrics, sklearn.metrics, multiprocessing.context
from lightning.pytorch.callbacks import RichProgressBar
import torch.multiprocessing, matplotlib.pyplot, subprocess, tempfile
sys.platform = "win32"
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("fork", "register_at_fork", "wait", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "getuid", "geteuid"):
    delattr(os, name)
"""
PROGRAM = """
import nearsight as ns
print(ns.backends()["native"])
layer = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2)
layer(torch.randn(1, 8, 5, 7)).sum().backward()
from nearsight.files import open_regular, write_whole
write_whole("file", b"whole")
assert open_regular("file").read() == b"whole"
from nearsight.training import callbacks
assert callbacks._peak_memory() != callbacks._peak_memory(), "not known"
from nearsight.bench.growth import _extra_memory
assert _extra_memory([None]) == [None]
try:
    ns.deploy.onnxruntime_library()
except ns.errors.BackendError as error:
    print(error)
from nearsight.cli import main
assert main(["info"]) == 0
sys.exit(main(["compare", "--models", "sasa_nano", "conv_nano", "--data", "digits", "--output", "comparison"]))
"""


@pytest.mark.slow
def test_windows_has_blocked(tmp_path):
    """The package is imported, a layer trained, files written; what is not there is said."""
    hidden = "import nearsight.built; nearsight.built.SUFFIX = '.absent'"  # what was built for this machine
    program = "\n".join([WINDOWS, hidden, PROGRAM])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert "there is no native kernel, and 'blocked' serves: it is not written for Windows yet\n" in done.stdout, (
        done.stderr
    )
    assert "there is no operator for onnxruntime: it is not written for Windows yet\n" in done.stdout
    assert done.stderr.endswith("which Windows cannot: use WSL there\n")
    assert done.returncode == 2


@pytest.mark.parametrize(("platform", "suffix"), [("darwin", ".dylib"), ("linux", ".so")])
def test_the_name_of_a_library(platform, suffix, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    try:
        reload(built)
        assert suffix == built.SUFFIX
    finally:
        monkeypatch.undo()
        reload(built)


@pytest.mark.parametrize(
    "runtime",
    [
        "torch/lib/libgomp-a34b3233.so.1",
        "torch.libs/libgomp-98b21ff3.so.1",
        "torch/lib/libomp.dylib",
        "torch/lib/libiomp5md.dll",
    ],
)
def test_openmp_is_pytorch_s_own(runtime, tmp_path, monkeypatch):
    """Where PyTorch's packages for each system keep it. It comes first, and before the library itself."""
    (tmp_path / runtime).parent.mkdir(parents=True)
    (tmp_path / runtime).touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    asked = []

    def load(path: str, mode: int = 0) -> None:
        asked.append((Path(path), mode))
        if path.endswith("libnearsight"):
            raise OSError("enough")

    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(BackendError, match="enough"):
        lib.load("libnearsight")
    assert asked == [(tmp_path / runtime, ctypes.RTLD_GLOBAL), (Path("libnearsight"), 0)]
