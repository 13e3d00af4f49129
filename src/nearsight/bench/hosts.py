# SPDX-License-Identifier: Apache-2.0
"""What runs a network: PyTorch eager and compiled, and the hosts that take it as ONNX, in inference."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.node import as_nodes
from ..saved.export import to_onnx, trace

Step = Callable[[], Any]


def eager(model: nn.Module, images: Tensor) -> Step:
    """As it is."""
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor) -> Step:
    """``torch.compile``, with the weights as constants: batch norms are folded, and weights laid out for the processor."""
    run = torch.compile(model, options={"freezing": True})
    return lambda: run(images)


def onnxruntime(model: nn.Module, images: Tensor) -> Step | str:
    """ONNX's own operators, by onnxruntime's provider for CPUs."""
    if images.dtype != torch.float32:
        return f"onnxruntime has no convolutions of {_name(images.dtype)} on CPUs"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(_as_onnx(model, images), options, providers=["CPUExecutionProvider"])
    pictures = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, pictures)


def openvino(model: nn.Module, images: Tensor) -> Step | str:
    """The same ONNX, by OpenVINO's plugin for CPUs, which is told the type that it computes in."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    if images.dtype == torch.bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO does not compute in bfloat16 on this processor"
    hints = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[images.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    pictures = images.float()
    run = core.compile_model(core.read_model(_as_onnx(model.float(), pictures)), "CPU", hints)
    return lambda: run([pictures.numpy()])


HOSTS: dict[str, Callable[[nn.Module, Tensor], Step | str]] = {
    "eager": eager,
    "compiled": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}
NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
TAKES_LAYOUT = ("eager", "compiled")  # the others lay maps out as they like


def prepared(host: str, model: nn.Module, images: Tensor) -> Step | str:
    """A call of the network on these images in a host, of their dtype; a text says why there is none."""
    missing = [package for package in NEEDS.get(host, ()) if find_spec(package) is None]
    if missing:
        return (
            f"{', '.join(missing)} is not installed" if len(missing) == 1 else f"{', '.join(missing)} are not installed"
        )
    step = HOSTS[host](model.eval().to(images.dtype), images)
    return step if isinstance(step, str) else torch.no_grad()(step)


def _as_onnx(model: nn.Module, images: Tensor) -> bytes:
    with as_nodes():
        return to_onnx(trace(model, images, ()), {}, "plain").SerializeToString()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
