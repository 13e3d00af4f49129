# SPDX-License-Identifier: Apache-2.0
"""``nearsight export``: a trained network as one file that runs without nearsight, for pictures and batches of any size.

With ``operators="plain"`` the file holds operators of PyTorch or ONNX alone: attention is written out as matrix products
over blocks of queries, as the backend ``blocked`` computes it. With ``"native"`` an ONNX file has one node for each
attention, which onnxruntime runs by the library of :func:`nearsight.deploy.onnxruntime_library`, and a package of
AOTInductor calls the operator ``nearsight::attend``, which :func:`nearsight.deploy.aoti_library` brings where there is no
Python. What is written was run before and compared with the network.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import native
from ..attention.node import DOMAIN, as_nodes
from ..attention.plain_graph import write_out
from ..deploy import onnxruntime_library
from ..errors import DataError, OptionError, TrainingError
from ..extras import need
from ..files import to_path, write_bytes
from ..finite import why_not_finite
from ..models.data_config import class_names
from ..modes import evaluating
from ..pages.brief import Brief
from ..private import compiled_ahead, open_sizes_of_one
from ..telling import telling
from .tidy import tidy
from .view import View
from .weights import KEY, load_model

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
USUAL_OPERATORS = {"onnx": "plain", "pt2": "plain", "aoti": "native"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPERATORS = ("plain", "native")
AXES_OF_PICTURES = {"batch": 0, "height": 2, "width": 3}
AXES = tuple(AXES_OF_PICTURES)
TOLERANCE = 1e-4  # of the largest output, or of one
BATCH = 2  # of the example that is traced

Program = Callable[[Tensor], Tensor]


class Subject(NamedTuple):
    """What is known of a network beside its operators."""

    name: str
    view: View
    notes: str  # for whoever reads the file, in JSON


@dataclass(frozen=True, repr=False)
class Exported(Brief):
    """What was written, and how far it is from the network."""

    file: Path
    shape: tuple[int | str, ...]  # what it takes; a name stands for any size
    tried: tuple[tuple[int, ...], ...]  # shapes that both were run on
    difference: float  # the largest, relative to the largest output or to one
    fixed: str | None = None  # why height and width are not open, where they were asked to be


def export_to_file(
    run: str | PathLike[str],
    form: str,
    output: str | PathLike[str] | None = None,
    size: int | str | None = None,
    operators: str | None = None,
) -> Exported:
    """Write the network of a run's folder, or of a file of weights, as ONNX, as a program of torch.export, or compiled by
    AOTInductor for processors like this one.

    Batch, height and width stay open. Where the network cannot leave its size open, as with learned absolute positions or
    global attention with tables, the batch alone does; the result's ``shape`` says which.

    Args:
        run: what :func:`nearsight.saved.weights.load_model` takes.
        form: ``"onnx"``, ``"pt2"`` or ``"aoti"``.
        output: the file; None puts it beside the weights.
        size: of the pictures that the file takes, ``N`` or ``"HxW"``; None leaves it open, or takes the network's own where
            it cannot be.
        operators: ``"plain"``, the format's own; or ``"native"``, one operator of ours for each attention, of ONNX and of
            packages of AOTInductor. None takes plain ones, but for these packages.

    Raises:
        BackendError: ``"native"``, and the operator was not built.
        OptionError: an unknown form or kind of operators, an output with another ending, or a size that is none.
        DataError: weights that cannot be read.
        PackageError: ONNX needs packages that are not installed.
        TrainingError: a network that cannot be exported, a program that computes something
            else, a file that cannot be written. Nothing is written then.
    """
    if form not in FORMATS:
        raise OptionError(f"--format must be one of {', '.join(FORMATS)}; received {form!r}")
    operators = operators or USUAL_OPERATORS[form]
    _check_operators(operators, form)
    sides = None if size is None else _sides(size)
    if form == "onnx":
        need(ONNX_PACKAGES, "`nearsight export` to ONNX", "export")
    run = to_path(run)
    beside = run if run.is_dir() else run.parent
    usual = f"model{'-aoti' if form == 'aoti' else ''}{FORMATS[form]}"
    file = beside / usual if output is None else to_path(output)
    if file.suffix != FORMATS[form]:
        raise OptionError(f"--output must end in {FORMATS[form]} for this format; received {file}")
    _check_folder(file)
    model, blueprint = load_model(run)
    subject = Subject(blueprint.model, blueprint.view, blueprint.to_json())
    return _written(model, subject, form, file, sides, operators)


def export_onnx(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    operators: str = "plain",
    sizes: str | tuple[int, int] = "open",
) -> Exported:
    """Write any network of pictures as ONNX, in evaluation mode; see :func:`export_to_file`.

    Shapes: the file takes (B, C, H, W), where C, and the size that it is traced at, are those of the model's own
    ``pretrained_cfg``, as timm's and ours have one.

    Args:
        model: on the CPU, in float32.
        path: the file, ending in ``.onnx``.
        operators: ``"plain"``, or ``"native"``: one node for each attention of nearsight's.
        sizes: ``"open"``, or the height and width in pixels that alone are taken.

    Raises:
        as :func:`export_to_file`.

    Example:
        >>> model = create_model("sasa_nano", num_classes=10)
        >>> export_onnx(model, "sasa.onnx", operators="native", sizes=(32, 32)).shape  # doctest: +SKIP
        ('batch', 3, 32, 32)
    """
    _check_operators(operators, "onnx")
    if sizes != "open" and (isinstance(sizes, str) or len(sizes) != 2):
        raise OptionError(f"sizes must be 'open' or height and width; received {sizes!r}")
    sides = None if isinstance(sizes, str) else _sides("x".join(map(str, sizes)))
    need(ONNX_PACKAGES, "ONNX", "export")
    file = to_path(path)
    if file.suffix != FORMATS["onnx"]:
        raise OptionError(f"the file must end in {FORMATS['onnx']}; received {file}")
    _check_folder(file)
    elsewhere = {str(parameter.device) for parameter in model.parameters()} - {"cpu"}
    if elsewhere:
        raise OptionError(
            f"a network is exported on the CPU; this one is on {', '.join(sorted(elsewhere))}: model.cpu()"
        )
    view = View.of(model)
    known = json.dumps({"classes": class_names(model), "view": asdict(view)})
    subject = Subject(type(model).__name__, view, known)
    with evaluating(model):
        return _written(model, subject, "onnx", file, sides, operators)


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise DataError(f"there is no folder {file.parent} to write {file.name} into")


def _written(
    model: nn.Module, subject: Subject, form: str, file: Path, sides: tuple[int, int] | None, operators: str
) -> Exported:
    _check_finite(model, subject, sides or (subject.view.size, subject.view.size))
    write = {"onnx": partial(_onnx, operators=operators), "pt2": _pt2, "aoti": _aoti}[form]
    as_one = {"onnx": as_nodes, "aoti": native.as_operators if operators == "native" else nullcontext}
    with as_one.get(form, nullcontext)():
        content, exported = _made(model, subject, write, sides)
    write_bytes(file, content)
    return replace(exported, file=file)


def _check_operators(operators: str, form: str) -> None:
    if operators not in OPERATORS:
        raise OptionError(f"--operators must be one of {', '.join(OPERATORS)}; received {operators!r}")
    if operators == "native":
        if form == "pt2":
            raise OptionError(f"--operators native is for --format onnx and aoti; received --format {form}")
        onnxruntime_library()  # to say now that there is no kernel, and not after the tracing


def _sides(size: int | str) -> tuple[int, int]:
    """Height and width of ``N`` or ``HxW``."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", str(size))
    if found is None:
        raise OptionError(f"--size must be N or HxW, in pixels; received {size!r}")
    return int(found[1]), int(found[2] or found[1])


@torch.no_grad()
def _check_finite(model: nn.Module, subject: Subject, sides: tuple[int, int]) -> None:
    """Before the minutes of tracing: with NaN nothing can be compared."""
    try:
        logits = model(torch.zeros(1, subject.view.channels, *sides))
    except Exception as error:  # a network raises what it likes about sizes that it cannot take
        height, width = sides
        raise TrainingError(f"{subject.name} cannot take {height}x{width} images: {_first_line(error)}") from error
    reason = why_not_finite(logits, model)
    if reason is not None:
        raise TrainingError(f"{subject.name} cannot be exported: {reason}; nothing was written")


# -------------------------------------------------------------------------------------------------------------- tracing


def _made(
    model: nn.Module, subject: Subject, form: Callable[..., tuple[bytes, Program]], sides: tuple[int, int] | None
) -> tuple[bytes, Exported]:
    """The file's content, saved, loaded and tried, with as many sizes open as that works for.

    A program that was traced with open sizes may fail when it is saved, or on pictures of other sizes.
    """
    channels, size = subject.view.channels, subject.view.size
    height, width = sides or (size, size)
    fixed = (AXES[:1], (BATCH, channels, height, width), ((1, channels, height, width), (3, channels, height, width)))
    # Not square, so that no rule ties height to width. What is tried afterwards was not seen here.
    free = (AXES, (BATCH, channels, size, size + 32), ((1, channels, size + 64, size + 32), (3, channels, size, size)))
    reasons = []
    for names, example, tried in [fixed] if sides else [free, fixed]:
        try:
            with telling(f"tracing {subject.name} with {' and '.join(names)} open"):
                program = trace(model, torch.zeros(example), names)
            with telling(f"writing {subject.name} in the operators of the format"):
                content, run = form(program, subject)
            with telling(f"running what was written on {len(tried)} sizes, beside the network"):
                differences = [_difference(model, run, shape) for shape in tried]
        except Exception as error:  # whatever a network's own code raises when sizes are symbols
            reasons.append(error)
            continue
        difference = torch.tensor(differences).max().item()  # NaN if one of them is, as Python's max would not have it
        if not difference <= TOLERANCE:  # NaN is not <=
            raise TrainingError(
                f"the exported {subject.name} differs from the network by {difference:.1e} of its largest output, "
                f"where {TOLERANCE:.0e} is allowed; nothing was written"
            )
        shape = (AXES[0], channels, *(AXES[1:] if len(names) > 1 else example[2:]))
        return content, Exported(Path(), shape, tried, difference, _first_line(reasons[0]) if reasons else None)
    advice = "" if sides else "; where another size may do: --size N or HxW"
    raise TrainingError(f"{subject.name} cannot be exported: {_first_line(reasons[-1])}{advice}") from reasons[-1]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def trace(model: nn.Module, example: Tensor, names: tuple[str, ...] = AXES) -> Any:
    """The network as a program of ``torch.export``; of batch, height and width, those named stay open.

    Shapes: ``example`` (B, C, H, W), whose open sizes are two or more.

    Example:
        >>> from nearsight import create_model
        >>> program = trace(create_model("sasa_nano").eval(), torch.zeros(2, 3, 32, 64))
        >>> program.module()(torch.zeros(1, 3, 40, 24)).shape
        torch.Size([1, 1000])
    """
    sizes = {axis: torch.export.Dim.DYNAMIC for name, axis in AXES_OF_PICTURES.items() if name in names}
    with torch.no_grad(), open_sizes_of_one():
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)


# -------------------------------------------------------------------------------------------------------------- formats


def _pt2(program: Any, subject: Subject) -> tuple[bytes, Program]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{KEY}.json": subject.notes})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _aoti(program: Any, subject: Subject) -> tuple[bytes, Program]:
    """Compiled for the processor that it is made on. The program lies in a folder of PyTorch's own while it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.pt2"
        run = compiled_ahead(program, path, {KEY: subject.notes})
        return Path(path).read_bytes(), run


def _onnx(program: Any, subject: Subject, operators: str) -> tuple[bytes, Program]:
    content = to_onnx(program, {KEY: subject.notes}, operators).SerializeToString()
    return content, onnx_session(content)


def to_onnx(program: Any, notes: dict[str, str], operators: str = "native") -> Any:
    """A program of :func:`trace` as an ONNX model, with notes in its metadata.

    With ``"plain"`` operators the nodes that :func:`as_nodes` left in the program are written out.
    """
    model = torch.onnx.export(program, input_names=["pictures"], output_names=["logits"], dynamo=True, verbose=False)
    assert model is not None
    proto = model.model_proto
    tidy(proto)
    if operators == "plain":
        write_out(proto)
    _name_axes(proto.graph)
    for name, text in notes.items():
        proto.metadata_props.add(key=name, value=text)
    return proto


def _name_axes(graph: Any) -> None:
    """Call the open sizes batch, height and width, in place of the letters that they were traced by."""
    sizes = graph.input[0].type.tensor_type.shape.dim
    letters = {sizes[axis].dim_param: name for name, axis in AXES_OF_PICTURES.items() if sizes[axis].dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:  # one letter, or a sum of several
                size.dim_param = re.sub(r"\w+", lambda found: letters.get(found[0], found[0]), size.dim_param)


def onnx_session(content: bytes) -> Program:
    """An ONNX model as a function of pictures, run by onnxruntime."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if any(opset.domain == DOMAIN for opset in onnx.load_from_string(content).opset_import):
        options.register_custom_ops_library(onnxruntime_library())
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pictures: torch.from_numpy(session.run(None, {name: pictures.numpy()})[0])


@torch.no_grad()
def _difference(model: nn.Module, run: Program, shape: tuple[int, ...]) -> float:
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    expected = model(pictures)
    return ((run(pictures) - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
