# SPDX-License-Identifier: Apache-2.0
"""Networks where they are deployed: each runtime, with our operator and without, each network beside its ResNet.

Both of a pair are written to a file, opened and run in the same way, on the same threads. What memory a session takes is the
rise of the peak of a process of its own over making it and some runs. Of Segment Anything's encoder the yardstick is the
network as its makers wrote it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..acceleration import accelerate
from ..attention import native
from ..attention.node import as_nodes
from ..deploy import onnxruntime_library, openvino_library
from ..errors import NearsightError, OptionError
from ..models import create_model
from ..private import compiled_ahead, loaded_ahead
from ..saved.export import to_onnx, trace
from .accelerated import draw_zeros
from .hosts import NEEDS, NO_CONVOLUTIONS, Step, not_installed, run_onnxruntime, run_openvino
from .memory import in_fresh_process, peak_memory
from .models import _images, _model
from .timing import Times, race

DTYPES = (torch.float32, torch.bfloat16)
ACCELERATED = " accelerated"  # after a network's name: its attention by our operation


class Pair(NamedTuple):
    """A network, its yardstick, and what both take; runs: whose memory counts, beside that of making the session."""

    network: str
    yardstick: str
    size: int
    batch: int = 8
    runs: int = 10
    runtimes: tuple[str, ...] | None = None  # None: all


PAIRS = (
    Pair("sasa_resnet26", "resnet26", 224),
    Pair("sasa_resnet50", "resnet50", 224),
    # Segment Anything's encoder, as its makers export it. It was made for 1024 pixels: --size 1024.
    Pair(f"samvit_base_patch16{ACCELERATED}", "samvit_base_patch16", 256, 1, 2, ("eager", "onnxruntime native")),
)


class Runtime(NamedTuple):
    """How a network becomes a file, and how the file, or without one the network's name, becomes a call."""

    write: Callable[[nn.Module, Tensor, Path], None] | None
    ending: str  # of the file; runtimes that share it share the file
    open: Callable[[str, Tensor], Step | str]
    packages: tuple[str, ...] = ()
    no_bfloat16: str | None = None  # why


def _write_onnx(model: nn.Module, images: Tensor, file: Path, *, operators: str) -> None:
    for module in model.modules():
        if "fused_attn" in vars(module):  # timm's, of three axes, which torch.onnx refuses
            vars(module).update(fused_attn=False)
    with as_nodes():
        program = trace(model.float(), images.float(), ())
    file.write_bytes(to_onnx(program, {}, operators).SerializeToString())


def _write_aoti(model: nn.Module, images: Tensor, file: Path) -> None:
    with native.as_operators():
        program = trace(model, images, ())
    compiled_ahead(program, str(file), {})


def _open_onnxruntime(file: str, images: Tensor, *, native: bool) -> Step:
    return run_onnxruntime(file, images, onnxruntime_library() if native else None)


def _open_openvino(file: str, images: Tensor, *, native: bool) -> Step | str:
    return run_openvino(file, images, openvino_library() if native else None)


def _open_aoti(file: str, images: Tensor) -> Step:
    run = loaded_ahead(file)
    return lambda: run(images)


def _open_eager(name: str, images: Tensor) -> Step:
    model = _network(name, images.dtype, images.shape[-1])
    return lambda: model(images)


RUNTIMES = {
    "eager": Runtime(None, "", _open_eager),
    "AOTInductor": Runtime(_write_aoti, ".pt2", _open_aoti),
    **{
        f"{name} {operators}": Runtime(
            partial(_write_onnx, operators=operators),
            f".{operators}.onnx",
            partial(opened, native=operators == "native"),
            NEEDS[name],
            reason,
        )
        for name, opened, reason in (
            ("onnxruntime", _open_onnxruntime, NO_CONVOLUTIONS),
            ("openvino", _open_openvino, None),
        )
        for operators in ("native", "plain")
    },
}


def measure(quick: bool, network: str | None = None, size: int | None = None) -> list[dict[str, Any]]:
    """Images per second and memory of every runtime and dtype, and how far its outputs are from the network's own.

    Args:
        network: alone, as it is called in the first column of ``PAIRS``; None for all, or for the first with ``quick``.
        size: of the images, in place of the pair's.

    Raises:
        OptionError: no such network.
    """
    rounds, seconds = (3, 10.0) if quick else (15, 30.0)
    chosen = [pair for pair in PAIRS if network in (None, pair.network, pair.yardstick)]
    if not chosen:
        raise OptionError(f"--network must be one of {', '.join(pair.network for pair in PAIRS)}; received {network!r}")
    print(
        "ratio: median of the rounds' ratios; memory: what making a session and some runs add to a fresh process's peak; "
        "off: from eager in float32, relative to the largest output"
    )
    print(
        f"{'':32}{'images/s: network':>18}{'yardstick':>11}{'ratio':>8}{'MB: network':>13}{'yardstick':>11}{'off':>9}"
    )
    rows = []
    for pair in chosen[:1] if quick else chosen:
        pair = pair._replace(size=size or pair.size)
        print(f"{pair.network} against {pair.yardstick}, {pair.size}, batch {pair.batch}")
        with tempfile.TemporaryDirectory() as folder:
            for runtime, dtype in product(RUNTIMES, DTYPES):
                if pair.runtimes is None or runtime in pair.runtimes:
                    named = {"runtime": runtime, "dtype": _name(dtype), "batch": pair.batch, "size": pair.size}
                    rows.append(named | _contest(runtime, dtype, pair, Path(folder), rounds, seconds))
                    _print(rows[-1])
    return rows


@torch.no_grad()
def _contest(runtime: str, dtype: torch.dtype, pair: Pair, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """The two in turn, and each alone in a process; or why they do not run."""
    images = _pictures(pair.batch, pair.size, dtype)
    names = (pair.network, pair.yardstick)
    steps: dict[str, Step] = {}
    files = {name: _file(runtime, name, dtype, folder) for name in names}
    for name, file in files.items():
        step = _opened(runtime, name, images, file)
        if isinstance(step, str):
            return {"why_not": step}
        steps[name] = torch.no_grad()(step)
    off = [_difference(steps[name](), _network(name, torch.float32, pair.size)(images.float())) for name in names]
    times = race(steps, rounds, seconds)
    half = images.dtype == torch.bfloat16
    asked = (half, pair.size, torch.get_num_threads(), pair.batch, pair.runs)
    memory = [in_fresh_process(session_memory, runtime, files[name], *asked) for name in names]
    network, yardstick = (
        _facts(name, pair.batch, times[name], *one) for name, *one in zip(names, off, memory, strict=True)
    )
    return {"network": network, "yardstick": yardstick, "ratio": times[names[0]].faster_than(times[names[1]])}


def _file(runtime: str, name: str, dtype: torch.dtype, folder: Path) -> str:
    """The file that a runtime opens, or where there is none the network's name."""
    ending = RUNTIMES[runtime].ending
    if not ending:
        return name
    numbers = "" if ending.endswith(".onnx") else f".{_name(dtype)}"  # ONNX holds float32, runtimes choose
    return str(folder / f"{name.replace(' ', '_')}{numbers}{ending}")


def _opened(runtime: str, name: str, images: Tensor, file: str) -> Step | str:
    """The network of that name in a runtime; it is written if it has not been."""
    write, _, opened, packages, no_bfloat16 = RUNTIMES[runtime]
    reason = not_installed(packages) or (no_bfloat16 if images.dtype == torch.bfloat16 else None)
    if reason is not None:
        return reason
    try:
        if write is not None and not Path(file).exists():
            write(_network(name, images.dtype, images.shape[-1]), images, Path(file))
        return opened(file, images)
    except NearsightError as error:  # no compiler, no library
        return str(error)


def session_memory(
    runtime: str, file: str, half: bool, size: int, threads: int, batch: int = 8, runs: int = 10
) -> float:
    """Bytes that a session and its runs add to the peak of this process, which must have done nothing else."""
    torch.set_num_threads(threads)
    images = _pictures(batch, size, torch.bfloat16 if half else torch.float32)
    for package in RUNTIMES[runtime].packages[-1:]:  # the runtime itself
        import_module(package)
    before = peak_memory()
    step = RUNTIMES[runtime].open(file, images)
    assert not isinstance(step, str), step
    with torch.no_grad():
        for _ in range(runs):
            step()
    return peak_memory() - before


def _facts(name: str, batch: int, times: Times, off: float, memory: float) -> dict[str, Any]:
    speed = batch * 1e3 / times.median
    return {"name": name, **times.facts(), "images_per_second": speed, "peak_memory": memory, "difference": off}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _network(name: str, dtype: torch.dtype, size: int) -> nn.Module:
    torch.manual_seed(0)
    own = name.removesuffix(ACCELERATED)
    if own.startswith("samvit"):
        model = create_model(own, img_size=size).eval()
        draw_zeros(model)
    else:
        model = _model(own, "contiguous").eval()
    if own != name:
        accelerate(model)
    return model.to(dtype)


def _pictures(batch: int, size: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(1)
    return _images("contiguous", batch, size).to(dtype)


def _difference(found: Any, expected: Tensor) -> float:
    found = found if isinstance(found, Tensor) else torch.as_tensor(found[0])
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


def _print(row: dict[str, Any]) -> None:
    title = f"  {row['runtime']:20}{row['dtype']:10}"
    if "why_not" in row:
        print(f"{title}{row['why_not']}", flush=True)
        return
    network, yardstick = row["network"], row["yardstick"]
    speeds = f"{network['images_per_second']:18.1f}{yardstick['images_per_second']:11.1f}{row['ratio']:8.2f}"
    memory = f"{network['peak_memory'] / 1e6:13,.0f}{yardstick['peak_memory'] / 1e6:11,.0f}"
    print(f"{title}{speeds}{memory}{network['difference']:9.0e}", flush=True)
