# SPDX-License-Identifier: Apache-2.0
"""What runs a network in inference: PyTorch eager, folded and compiled, and the hosts that take it as ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration.folding import NORMS, fold_batch_norms
from ..attention.node import as_nodes
from ..saved.export import to_onnx, trace

Step = Callable[[], Any]


def eager(model: nn.Module, images: Tensor) -> Step:
    """As it is."""
    return lambda: model(images)


def folded(model: nn.Module, images: Tensor) -> Step | str:
    """As it is, but that batch norms are part of the convolutions before them, in any network alike; attention stays."""
    model = copy.deepcopy(model)
    names, _, reason = fold_batch_norms(model)
    if not names and any(isinstance(one, NORMS) for one in model.modules()):
        return f"no batch norm can be folded: {reason or 'none follows a convolution'}"
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor) -> Step:
    """``torch.compile``, with the weights as constants: batch norms are folded, and weights laid out for the processor."""
    run = torch.compile(model, options={"freezing": True})
    return lambda: run(images)


def onnxruntime(model: nn.Module, images: Tensor) -> Step | str:
    """ONNX's own operators, by onnxruntime's provider for CPUs."""
    return run_onnxruntime(_as_onnx(model, images), images) if images.dtype == torch.float32 else NO_CONVOLUTIONS


def openvino(model: nn.Module, images: Tensor) -> Step | str:
    """The same ONNX, by OpenVINO's plugin for CPUs, which is told the type that it computes in."""
    return run_openvino(_as_onnx(model.float(), images.float()), images)


NO_CONVOLUTIONS = "onnxruntime has no convolutions of bfloat16 on CPUs"


def run_onnxruntime(content: bytes | str, images: Tensor, library: str | None = None) -> Step:
    """An ONNX model, or the path of its file, and perhaps a library of operators."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    pictures = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, pictures)


def run_openvino(content: bytes | str, images: Tensor, library: str | None = None) -> Step | str:
    """The same for OpenVINO, in the dtype of the images: the model is one of float32."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    if images.dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO does not compute in bfloat16 on this processor"
    if library is not None:
        core.add_extension(library)
    hints = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[images.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    pictures = images.float().numpy()
    run = core.compile_model(core.read_model(content), "CPU", hints)
    return lambda: run([pictures])


HOSTS: dict[str, Callable[[nn.Module, Tensor], Step | str]] = {
    "eager": eager,
    "folded": folded,
    "compiled": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
TAKES_LAYOUT = ("eager", "folded", "compiled")  # the others lay maps out as they like


def prepared(host: str, model: nn.Module, images: Tensor) -> Step | str:
    """A call of the network on these images in a host, of their dtype; a text says why there is none."""
    reason = not_installed(NEEDS.get(host, ()))
    if reason is not None:
        return reason
    step = HOSTS[host](model.eval().to(images.dtype), images)
    return step if isinstance(step, str) else torch.no_grad()(step)


def not_installed(packages: Sequence[str]) -> str | None:
    """Which of the packages are missing, in words."""
    missing = [package for package in packages if find_spec(package) is None]
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed" if missing else None


def _as_onnx(model: nn.Module, images: Tensor) -> bytes:
    with as_nodes():
        return to_onnx(trace(model, images, ()), {}, "plain").SerializeToString()
