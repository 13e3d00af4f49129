# SPDX-License-Identifier: Apache-2.0
"""``nearsight export``: a trained network as one file that runs without nearsight, for pictures and batches of any size.

The file holds operators of PyTorch or ONNX alone: attention is written out as matrix products over blocks of queries, as
the backend ``blocked`` computes it. What is written was run before and compared with the network.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import DataError, OptionError, TrainingError
from ..inspect.finite import why_not_finite
from .files import write_bytes
from .weights import KEY, Blueprint, load_model

FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
AXES = ("batch", "height", "width")
TOLERANCE = 1e-4  # of the largest output, or of one
BATCH = 2  # of the example that is traced

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the network."""

    file: Path
    shape: tuple[int | str, ...]  # what it takes; a name stands for any size
    tried: tuple[tuple[int, ...], ...]  # shapes that both were run on
    difference: float  # the largest, relative to the largest output or to one


def export_to_file(run: Path, form: str, output: Path | None = None) -> Exported:
    """Write the network of a run's folder, or of a file of weights, as ONNX or as a program of torch.export.

    Batch, height and width stay open. Where the network cannot leave its size open, as with learned absolute positions or
    global attention with tables, the batch alone does; the result's ``shape`` says which.

    Args:
        run: what :func:`nearsight.training.weights.load_model` takes.
        form: ``"onnx"`` or ``"pt2"``.
        output: the file; None puts it beside the weights.

    Raises:
        OptionError: an unknown form, or an output with another ending.
        DataError: weights that cannot be read.
        TrainingError: packages that are missing, a network that cannot be exported, a program that computes something
            else, a file that cannot be written. Nothing is written then.
    """
    if form not in FORMATS:
        raise OptionError(f"--format must be one of {', '.join(FORMATS)}; received {form!r}")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise TrainingError(f"`nearsight export` to ONNX needs {', '.join(missing)}: pip install 'nearsight[export]'")
    file = (run if run.is_dir() else run.parent) / f"model{FORMATS[form]}" if output is None else output
    if file.suffix != FORMATS[form]:
        raise OptionError(f"--output must end in {FORMATS[form]} for this format; received {file}")
    if not file.parent.is_dir():
        raise DataError(f"there is no folder {file.parent} to write {file.name} into")
    model, blueprint = load_model(run)
    _check_finite(model, blueprint)
    program = _trace(model, blueprint)
    content, runs = (_onnx if form == "onnx" else _pt2)(program.program, blueprint)
    differences = [_difference(model, runs, shape) for shape in program.tried]
    difference = torch.tensor(differences).max().item()  # NaN if one of them is, as Python's max would not have it
    if not difference <= TOLERANCE:  # NaN is not <=
        raise TrainingError(
            f"the exported {blueprint.model} differs from the network by {difference:.1e} of its largest output, where "
            f"{TOLERANCE:.0e} is allowed; nothing was written"
        )
    write_bytes(file, content)
    return Exported(file, program.shape, program.tried, difference)


@torch.no_grad()
def _check_finite(model: nn.Module, blueprint: Blueprint) -> None:
    """Before the minutes of tracing: with NaN nothing can be compared."""
    size = blueprint.view.size
    reason = why_not_finite(model(torch.zeros(1, blueprint.view.channels, size, size)), model)
    if reason is not None:
        raise TrainingError(f"{blueprint.model} cannot be exported: {reason}; nothing was written")


# -------------------------------------------------------------------------------------------------------------- tracing


class Traced(NamedTuple):
    program: Any  # torch.export's ExportedProgram
    shape: tuple[int | str, ...]
    tried: tuple[tuple[int, ...], ...]


def _trace(model: nn.Module, blueprint: Blueprint) -> Traced:
    channels, size = blueprint.view.channels, blueprint.view.size
    # Not square, so that no rule ties height to width. What is tried afterwards was not seen here.
    attempts = (
        (AXES, (BATCH, channels, size, size + 32), ((1, channels, size + 64, size + 32), (3, channels, size, size))),
        (AXES[:1], (BATCH, channels, size, size), ((1, channels, size, size), (3, channels, size, size))),
    )
    reasons = []
    for names, example, tried in attempts:
        try:
            program = trace(model, torch.zeros(example), names)
        except Exception as error:  # whatever a network's own code raises when sizes are symbols
            reasons.append(error)
            continue
        height, width = AXES[1:] if len(names) > 1 else example[2:]
        return Traced(program, (AXES[0], channels, height, width), tried)
    text = (str(reasons[-1]) or type(reasons[-1]).__name__).strip().splitlines()[0]
    raise TrainingError(f"{blueprint.model} cannot be exported: {text}") from reasons[-1]


def trace(model: nn.Module, example: Tensor, names: tuple[str, ...] = AXES) -> Any:
    """The network as a program of ``torch.export``; of batch, height and width, those named stay open.

    Shapes: ``example`` (B, C, H, W), whose open sizes are two or more.

    Example:
        >>> from nearsight import create_model
        >>> program = trace(create_model("sasa_nano").eval(), torch.zeros(2, 3, 32, 64))
        >>> program.module()(torch.zeros(1, 3, 40, 24)).shape
        torch.Size([1, 1000])
    """
    axes = {name: axis for name, axis in zip(AXES, (0, 2, 3), strict=True) if name in names}
    sizes = dict.fromkeys(axes.values(), torch.export.Dim.DYNAMIC)
    with torch.no_grad(), _sizes_of_one():
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)


@contextmanager
def _sizes_of_one() -> Iterator[None]:
    """Without it, PyTorch takes a size that it was not shown as 1 to be two or more for ever."""
    from torch.fx.experimental import _config

    before = _config.backed_size_oblivious  # pyright: ignore[reportAttributeAccessIssue]
    _config.backed_size_oblivious = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        _config.backed_size_oblivious = before  # pyright: ignore[reportAttributeAccessIssue]


# -------------------------------------------------------------------------------------------------------------- formats


def _pt2(program: Any, blueprint: Blueprint) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{KEY}.json": blueprint.to_json()})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx(program: Any, blueprint: Blueprint) -> tuple[bytes, Run]:
    content = to_onnx(program, {KEY: blueprint.to_json()}).SerializeToString()
    return content, onnx_session(content)


def to_onnx(program: Any, notes: dict[str, str]) -> Any:
    """A program of :func:`trace` as an ONNX model, with notes in its metadata."""
    model = torch.onnx.export(program, input_names=["pictures"], output_names=["logits"], dynamo=True, verbose=False)
    assert model is not None
    proto = model.model_proto
    for name, text in notes.items():
        proto.metadata_props.add(key=name, value=text)
    return proto


def onnx_session(content: bytes) -> Run:
    """An ONNX model as a function of pictures, run by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pictures: torch.from_numpy(session.run(None, {name: pictures.numpy()})[0])


@torch.no_grad()
def _difference(model: nn.Module, run: Run, shape: tuple[int, ...]) -> float:
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    expected = model(pictures)
    return ((run(pictures) - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
