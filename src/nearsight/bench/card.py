# SPDX-License-Identifier: Apache-2.0
"""A graphics card in five minutes: whether it computes what the reference does, and how fast, beside convolutions.

For those who have a card, and send what it writes to those who have none. First the contract: values and every gradient of
each backend that the device has, against the equation in float64 on the CPU. Then layers and networks in half precision
against channels_last convolutions, eager and compiled. What fails is written down with its traceback, and the rest goes on;
what the time does not reach is named.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import backends, local_attention
from ..attention.problem import describe
from ..errors import BackendError, OptionError
from ..files import make_folder, to_path, write_text
from ..layers import LocalSelfAttention2d
from ..models import create_model
from ..pages.csv_json import to_json
from ..pages.html import render
from ..window import Window
from .timing import Times, race, setting

SECONDS = 270.0  # after which nothing new is begun
BACKENDS = ("flex", "natten", "blocked")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the largest number of a result, or of 1: what a few roundings of inputs, weights and the stored output may add up to.
ALLOWED = {"float32": 5e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Check:
    """A problem of the contract."""

    name: str
    window: Window
    dtype: str = "float32"
    size: tuple[int, ...] = (19, 23)
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    tables: bool = False


CHECKS = (
    Check("SASA's layer", Window(7), tables=True),
    Check("the same in bfloat16", Window(7), "bfloat16", tables=True),
    Check("the same in float16", Window(7), "float16", tables=True),
    Check("slid inwards", Window(7, border="shift")),
    Check("slid inwards, dilated, bfloat16", Window((3, 5), border="shift", dilation=(2, 1)), "bfloat16"),
    Check("HaloNet's windows", Window((8, 5), shared_by=(4, 3)), "bfloat16", tables=True),
    Check("zeros, strided, narrow heads", Window((4, 3), border="zeros", stride=2), head_dim=8, tables=True),
    Check("a panorama, keys for two heads each", Window(5, border=("mask", "wrap")), kv_heads=2),
    Check("a video, causal", Window((3, 5, 5), causal=(True, False, False)), size=(5, 9, 11), tables=True),
)


@dataclass(frozen=True)
class Pair:
    """An attention and the convolution that it is timed against."""

    name: str
    attention: Callable[[], nn.Module]
    convolution: Callable[[], nn.Module]
    images: tuple[int, ...]


def layer(channels: int, size: int, batch: int, **arguments: Any) -> Pair:
    heads = {"num_heads": 8 if channels >= 128 else 4}
    told = "".join(f", {name} {value}" for name, value in arguments.items())
    return Pair(
        f"layer {channels} @ {size}x{size}{told}",
        lambda: LocalSelfAttention2d(channels, **{"kernel_size": 7, **heads, **arguments}),
        lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        (batch, channels, size, size),
    )


def network(name: str, size: int, batch: int, **arguments: Any) -> Pair:
    return Pair(
        name,
        lambda: create_model(name, **arguments),
        lambda: create_model(name, attention_stages=(), **arguments),
        (batch, arguments.get("in_chans", 3), size, size),
    )


STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # of a ResNet-50: channels, cells per axis


def races(device: str) -> list[tuple[Pair, str, bool]]:
    """What is timed, the most telling first: a pair, a dtype, and whether both are compiled."""
    if device == "cpu":  # to see that it runs
        pairs = [layer(16, 14, 2), network("sasa_nano", 16, 2, in_chans=1)]
        return [(pairs[0], "bfloat16", False), (pairs[1], "bfloat16", False), (pairs[0], "bfloat16", True)]
    layers = [layer(channels, size, 64) for channels, size in STAGES]
    whole = network("sasa_resnet26", 224, 64)
    slid = {"border": "shift", "position": "none"}  # what NATTEN takes too
    return [
        *((pair, "bfloat16", False) for pair in layers),
        (whole, "bfloat16", False),
        (layers[0], "bfloat16", True),
        (whole, "bfloat16", True),
        *((pair, "float16", False) for pair in layers),
        (whole, "float16", False),
        *((layer(channels, size, 64, **slid), "bfloat16", False) for channels, size in STAGES),
        (layers[2], "bfloat16", True),
        (layer(64, 56, 64, backend="blocked"), "bfloat16", True),
    ]


def run_card(device: str, folder: str | PathLike[str]) -> None:
    """Measure, print, and write ``card.json`` and ``card.html`` into the folder.

    Raises:
        OptionError: there is no such device.
        BackendError: a check failed; it is raised when all is written.
        PackageError: jinja2 is not installed.
    """
    if device not in ("cuda", "cpu"):
        raise OptionError(f"--device must be cuda or cpu; received {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("PyTorch sees no CUDA card; --device cpu shows that everything runs, on small sizes")
    folder = to_path(folder)
    make_folder(folder)
    begin = time.perf_counter()
    report: dict[str, Any] = {"device": device, **_card(device), **setting(), "backends": backends()}
    report |= {"checks": [], "races": [], "seconds": 0.0}
    _write(folder, report)  # what cannot be written is told at once
    try:
        _tell(report["checks"], _checks(device, begin), _check_line)
        _tell(report["races"], _races(device, begin), _race_line)
    finally:  # who stops it keeps what was found
        report["seconds"] = time.perf_counter() - begin
        _write(folder, report)
    print(f"wrote {folder / 'card.json'} and {folder / 'card.html'}")
    wrong = [
        f"{one['backend']}, {one['name']}" for one in report["checks"] if one["verdict"] not in ("right", LEFT_OUT)
    ]
    if wrong:
        raise BackendError(f"{len(wrong)} of the checks failed: {'; '.join(wrong)}: please send {folder / 'card.json'}")


LEFT_OUT = "the time was over"


def _card(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"card": "none: the CPU, on small sizes"}
    facts = torch.cuda.get_device_properties(0)
    return {
        "card": facts.name,
        "compute capability": f"{facts.major}.{facts.minor}",
        "memory": facts.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _write(folder: Path, report: dict[str, Any]) -> None:
    from importlib.metadata import version

    page = render("card.html.jinja", report=report, version=version("nearsight"))
    write_text(folder / "card.json", to_json({"nearsight": version("nearsight"), **report}) + "\n")
    write_text(folder / "card.html", page)


def _tell(found: list[dict[str, Any]], rows: Iterator[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> None:
    for row in rows:
        found.append(row)
        print(line(row), flush=True)


# ---------------------------------------------------------------------------------------------------------- the contract


def _checks(device: str, begin: float) -> Iterator[dict[str, Any]]:
    """Half of the time at most."""
    for check in CHECKS:
        wanted = None
        for backend in BACKENDS:
            row = {"backend": backend, "name": check.name, "dtype": check.dtype}
            if time.perf_counter() - begin > SECONDS / 2:
                yield row | {"verdict": LEFT_OUT}
                continue
            try:
                tensors = inputs(check)
                reason, gradients = _able(backend, check, tensors, device)
                if reason is None:
                    wanted = wanted or _results("reference", check, tensors, "cpu", torch.float64, True)
                    found = _results(backend, check, tensors, device, DTYPES[check.dtype], gradients)
                    yield row | judged(found, wanted, ALLOWED[check.dtype])
                elif device == "cuda" and backend == "flex":
                    yield row | {"verdict": "refused", "reason": reason}
            except Exception as error:  # whatever a card's compiler does is a finding
                yield row | failure(error)


def inputs(check: Check) -> list[Tensor]:
    """Query, key and value, and the tables, in float64: numbers that the dtype of the check can hold."""
    generator = torch.Generator().manual_seed(0)
    window, rank, depth = check.window, len(check.size), check.head_dim
    shapes = [(2, check.heads, *window.output_size(check.size), depth), *[(2, check.kv_heads, *check.size, depth)] * 2]
    if check.tables:
        entries = [axis.table_size for axis in window.axes(rank)]
        shapes += [(check.heads, *entries), *((check.heads, count, depth) for count in entries)]
    numbers = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [one.to(DTYPES[check.dtype]).double() for one in numbers]


def _able(backend: str, check: Check, tensors: Sequence[Tensor], device: str) -> tuple[str | None, bool]:
    """Why a backend cannot take a check, or None; and whether it has gradients here."""
    reason = None
    for gradients in (True, False):
        moved = [one.to(device, DTYPES[check.dtype]).detach().requires_grad_(gradients) for one in tensors]
        query, key, value, *tables = moved
        bias, relative = (tables[0], tables[1:]) if tables else (None, None)
        reason = backends(describe(query, key, value, check.window, bias, relative))[backend]
        if reason is None or device == "cuda":
            return reason, gradients
    return reason, False


def _results(
    backend: str, check: Check, tensors: Sequence[Tensor], device: str, dtype: torch.dtype, gradients: bool
) -> list[Tensor]:
    """The values, and the gradients by everything."""
    moved = [one.to(device, dtype).detach().requires_grad_(gradients) for one in tensors]
    query, key, value, *tables = moved
    bias, relative = (tables[0], tables[1:]) if tables else (None, None)
    out = local_attention(query, key, value, check.window, bias=bias, relative=relative, backend=backend)
    if not gradients:
        return [out]
    # Numbers of both signs that every dtype holds.
    incoming = torch.arange(out.numel(), device=device).remainder(7).sub(3).view(out.shape).to(dtype)
    return [out, *torch.autograd.grad(out, moved, incoming)]


def judged(found: Sequence[Tensor], wanted: Sequence[Tensor], allowed: float) -> dict[str, Any]:
    """The errors by name, each as a part of the largest number that is wanted, or of 1."""
    names = ["values", "query", "key", "value", "bias", *(f"relative {axis}" for axis in range(3))]
    errors = {
        name: ((one.detach().cpu().double() - right).abs().max() / right.abs().max().clamp(min=1)).item()
        for name, one, right in zip(names, found, wanted, strict=False)
    }
    right = all(error <= allowed for error in errors.values())  # of NaN it is not
    return {
        "verdict": "right" if right else "wrong",
        "largest error": max(errors.values(), key=lambda error: (error != error, error)),
        "allowed": allowed,
        "gradients": len(found) > 1,
        "errors": errors,
    }


def failure(error: Exception) -> dict[str, Any]:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return {"verdict": "failed", "reason": reason[:300], "traceback": traceback.format_exc()}


def _check_line(row: dict[str, Any]) -> str:
    error = f"{row['largest error']:.1e} of {row['allowed']:.0e}" if "allowed" in row else row.get("reason", "")
    without = ", values alone" if row.get("gradients") is False else ""
    return f"{row['backend']:10}{row['name']:40}{row['dtype']:10}{row['verdict']}{without}  {error}"


# -------------------------------------------------------------------------------------------------------------- the speed


def _races(device: str, begin: float) -> Iterator[dict[str, Any]]:
    for pair, dtype, compiled in races(device):
        for mode in ("inference", "training"):
            row = {"name": pair.name, "dtype": dtype, "compiled": compiled, "mode": mode, "batch": pair.images[0]}
            if time.perf_counter() - begin > SECONDS:
                yield row | {"verdict": LEFT_OUT}
                continue
            try:
                yield row | _race(pair, DTYPES[dtype], compiled, mode, device)
            except Exception as error:  # as above
                yield row | failure(error)
            torch.compiler.reset() if compiled else None
            torch.cuda.empty_cache() if device == "cuda" else None


def _race(pair: Pair, dtype: torch.dtype, compiled: bool, mode: str, device: str) -> dict[str, Any]:
    made = {"attention": pair.attention, "convolution": pair.convolution}
    steps = {who: _step(make(), pair.images, dtype, compiled, mode, device) for who, make in made.items()}
    began = time.perf_counter()
    for step in steps.values():
        step()  # compiles
    prepared = time.perf_counter() - began
    found = race(steps, *((15, 1.0) if device == "cuda" else (2, 0.1)))
    row: dict[str, Any] = {who: {**_facts(found[who]), "peak_memory": _peak(steps[who], device)} for who in steps}
    return {
        "verdict": "ran",
        **row,
        "faster": found["attention"].faster_than(found["convolution"]),
        "prepared_s": prepared,
    }


def _facts(times: Times) -> dict[str, float]:
    return {"median_ms": times.median, "min_ms": min(times.ms), "max_ms": max(times.ms)}


def _step(
    model: nn.Module, images: tuple[int, ...], dtype: torch.dtype, compiled: bool, mode: str, device: str
) -> Callable[[], None]:
    """A call, or a forward and backward under autocast, that ends when the device has done it."""
    training = mode == "training"
    inner = torch.float32 if training else dtype
    model = model.to(device, inner).to(memory_format=torch.channels_last).train(training)
    x = torch.randn(images, device=device, dtype=inner).to(memory_format=torch.channels_last)
    # Without a card the logic alone is looked at, and inductor would take a minute.
    run = torch.compile(model, backend="inductor" if device == "cuda" else "eager") if compiled else model
    parameters = list(model.parameters())

    def step() -> None:
        if training:
            with torch.autocast(device, dtype):
                out = run(x)
            torch.autograd.grad(out, parameters, out.detach())
        else:
            with torch.no_grad():
                run(x)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _peak(step: Callable[[], None], device: str) -> int | None:
    """Bytes that a step adds to what is allocated already; None on the CPU, which does not count."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _race_line(row: dict[str, Any]) -> str:
    how = f"{row['name']:42}{row['dtype']:10}{'compiled' if row['compiled'] else 'eager':10}{row['mode']:11}"
    if row["verdict"] != "ran":
        return f"{how}{row['verdict']}  {row.get('reason', '')}"
    both = [row[who] for who in ("attention", "convolution")]
    times = "".join(f"{one['median_ms']:10.3f} ms" for one in both)
    memory = "".join(f"{one['peak_memory'] / 1e6:9.0f} MB" for one in both if one["peak_memory"] is not None)
    return f"{how}{times}{row['faster']:8.2f}x{memory}"
