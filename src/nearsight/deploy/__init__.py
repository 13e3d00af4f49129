# SPDX-License-Identifier: Apache-2.0
"""Networks where they are deployed: the native operator for runtimes other than PyTorch, none of which is needed here."""

from __future__ import annotations

from .compiled import Runtime, kernel_library, library_for

__all__ = ["aoti_library", "onnxruntime_library", "openvino_library"]

OPENVINO = Runtime(
    name="OpenVINO",
    package="openvino",
    extra="openvino",
    sources=("nearsight.h", "node.h", "node.cpp", "openvino/local_attention.cpp"),
    headers="include/openvino/core/op_extension.hpp",
    include="include",
    libraries=(
        *("libs/libopenvino.so*", "libs/libopenvino_onnx_frontend.so*", "libs/libtbb.so*"),
        *("libs/libopenvino.*dylib", "libs/libopenvino_onnx_frontend.*dylib", "libs/libtbb.*dylib"),
    ),
)


PYTORCH = Runtime(
    name="PyTorch",
    package="torch",
    extra=None,
    sources=("nearsight.h", "pytorch/attend.cpp"),
    headers="include/torch/csrc/stable/library.h",
    include="include",
    libraries=("lib/libtorch_cpu.so", "lib/libtorch_cpu.dylib"),
    defined=("TORCH_TARGET_VERSION=0x020d000000000000",),  # 2.13 and later have all that is used
)


def onnxruntime_library() -> str:
    """The library that makes ``nearsight::LocalAttention`` known to onnxruntime 1.17 and later, for its session options.

    What ``nearsight export --operators native`` writes asks for it. It needs no PyTorch, runs on the session's own threads,
    and computes to the bit what the native kernel does here. docs/howto/deploy.md specifies the operator.

    Raises:
        BackendError: it was not built, for lack of a compiler; the message says why.

    Example:
        >>> import onnxruntime
        >>> options = onnxruntime.SessionOptions()
        >>> options.register_custom_ops_library(onnxruntime_library())
    """
    return str(kernel_library("onnxruntime"))


def openvino_library() -> str:
    """The library that makes ``nearsight::LocalAttention`` known to the installed OpenVINO, for ``Core.add_extension``.

    It reads the same ONNX files as :func:`onnxruntime_library`'s. OpenVINO's C++ interface is of one version, so this is
    compiled on this machine, against the headers of pip's wheel, in 10 seconds; it is kept for the next time. It runs on
    OpenVINO's own threads.

    Raises:
        PackageError: OpenVINO is not installed.
        BackendError: there is no compiler, or it refuses; the message says why.

    Example:
        >>> import openvino
        >>> core = openvino.Core()
        >>> core.add_extension(openvino_library())
    """
    return str(library_for(OPENVINO))


def aoti_library() -> str:
    """The library that registers ``nearsight::attend`` with PyTorch from C++: for programs without Python that run what
    ``nearsight export --format aoti`` wrote, and load this first.

    It is written against PyTorch's stable interface and compiled on this machine, against the headers of the installed
    PyTorch, in 5 seconds; it is kept for the next time, and serves PyTorch 2.13 and later. It runs on PyTorch's own threads.
    In Python ``import nearsight`` does as well; whichever is first, the other adds what is lacking.

    Raises:
        BackendError: there is no compiler, or it refuses; the message says why.

    Example:
        >>> torch.ops.load_library(aoti_library())
        >>> run = torch._inductor.aoti_load_package("runs/demo/model-aoti.pt2")
        >>> logits = run(pictures)
    """
    return str(library_for(PYTORCH))
