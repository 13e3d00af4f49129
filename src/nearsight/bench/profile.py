# SPDX-License-Identifier: Apache-2.0
"""What each layer of a network costs: parameters, FLOPs, bytes and time, beside the least time that it could take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..inspect.layer_list import layers_of
from ..modes import evaluating
from ..pages.brief import cell, html_table, short_table
from ..pages.style import BLUE, INK, ORANGE, in_style, new_figure
from ..private import TorchDispatchMode, is_mutable, tree_leaves
from .timing import copy_rate, matrix_rate, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

DRAWN = 30  # rows
REST = "(calls of modules)"


@dataclass(frozen=True)
class LayerCost:
    """One layer; or, as ``ResNet.forward``, what a module that holds layers computes beside them.

    What neither computes nor holds anything, such as a dropout or a module that only calls others, shares the last row.

    parameters   those not counted in a row above
    flops        two per multiply-add
    bytes        of inputs, outputs, parameters and buffers, each once: what has to be read and written
    ms           median wall-clock milliseconds
    share        of the sum of all rows' times
    floor_ms     FLOPs at the rate of a large matrix product, or bytes at the rate of a large copy, whichever is longer
    times_floor  how far ms is from it; below one where data is still in a cache. None where nothing has to be done
    """

    layer: str
    kind: str
    parameters: int
    flops: int
    bytes: int
    ms: float
    share: float
    floor_ms: float
    times_floor: float | None


@dataclass(frozen=True, repr=False)
class Profile:
    """The rows of a network in the order of their running, and what they were measured with.

    ms       of a forward pass without looking into it; the rows' sum is longer by what looking costs
    gflops   billion operations a second of a large matrix product in the same process
    gbs      gigabytes a second of a large copy, both ways counted
    setting  of the machine, as :func:`nearsight.bench.timing.setting`
    """

    rows: list[LayerCost]
    input_size: tuple[int, ...]
    ms: float
    gflops: float
    gbs: float
    setting: dict[str, Any]

    def __repr__(self) -> str:
        return short_table(self._cells(), self._heading())

    def _repr_html_(self) -> str:
        return html_table(self._cells(), self._heading())

    def _heading(self) -> str:
        size = " x ".join(map(str, self.input_size))
        return (
            f"forward pass of {size}: {self.ms:.3f} ms, {self.parameters:,} parameters, {self.flops / 1e6:,.1f} MFLOP"
        )

    def _cells(self) -> list[list[str]]:
        rows = ([row.layer, f"{row.parameters:,}", *map(cell, (row.flops, row.ms, row.share))] for row in self.rows)
        return [["layer", "parameters", "flops", "ms", "share"], *rows]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)


def profile(model: nn.Module, x: Tensor, *, rounds: int = 7) -> Profile:
    """Measure every layer of a model in a forward pass, on the processor, in evaluation mode and without gradients.

    Attention layers are one row each, and so is every module without children. FLOPs are those of
    ``torch.utils.flop_counter`` with nearsight's formulas, so that they add up to ``count_flops``.

    Args:
        x: the input, (B, C, H, W).
        rounds: forward passes to take the median of.

    Example:
        >>> found = profile(create_model("sasa_nano"), torch.randn(1, 3, 32, 32), rounds=1)
        >>> found.parameters == sum(parameter.numel() for parameter in create_model("sasa_nano").parameters())
        True
    """
    with torch.no_grad(), evaluating(model):
        flops, traffic = _count(model, x)
        whole, times = _times(model, x, rounds)
    gflops, gbs = matrix_rate(), copy_rate()
    parameters = _parameters(model)
    floors = {name: max(flops[name] / gflops / 1e6, traffic[name] / gbs / 1e6) for name in times}
    kinds = {name: kind for name, kind in _kinds(model, times).items() if parameters[name] or floors.get(name)}
    total = sum(times.values())
    rows = []
    for name, kind in kinds.items():
        ms, floor = times.get(name, 0.0), floors.get(name, 0.0)
        cost = (parameters[name], flops.get(name, 0), traffic.get(name, 0))
        title = name or type(model).__name__
        rows.append(LayerCost(title, kind, *cost, ms, ms / total, floor, ms / floor if floor else None))
    if rest := sum(ms for name, ms in times.items() if name not in kinds):
        rows.append(LayerCost(REST, "", 0, 0, 0, rest, rest / total, 0.0, None))
    return Profile(rows, tuple(x.shape), whole, gflops, gbs, setting())


# ------------------------------------------------------------------------------------------------------------ measured


def _containers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold layers, and are not inside of one."""
    inside = {module for layer in layers_of(model).values() for module in layer.modules()}
    return {name: module for name, module in model.named_modules() if module not in inside}


def _attribute(model: nn.Module, x: Tensor, meter: Callable[[], float]) -> dict[str, float]:
    """Run once, and charge what a running total goes up by to the layer or container that is innermost at the time."""
    used: dict[str, float] = {}
    stack: list[str] = []
    last = 0.0

    def charge() -> None:
        nonlocal last
        now = meter()
        if stack:
            used[stack[-1]] = used.get(stack[-1], 0) + now - last
        last = meter()

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            charge()
            stack.append(name)
            used.setdefault(name, 0)

        return hook

    def leave(*_: Any) -> None:
        charge()
        stack.pop()

    modules = {**layers_of(model), **_containers_of(model)}
    handles: list[Any] = [module.register_forward_pre_hook(enter(name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(leave) for module in modules.values()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return used


def _times(model: nn.Module, x: Tensor, rounds: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of a pass left alone, and of every layer and container, in the order in which they begin.

    The two kinds of passes take turns, so that a busy moment of the machine hits both.
    """
    _attribute(model, x, perf_counter)  # warms up
    passes, whole = [], []
    for _ in range(rounds):
        start = perf_counter()
        model(x)
        whole.append(perf_counter() - start)
        passes.append(_attribute(model, x, perf_counter))
    return 1e3 * median(whole), {name: 1e3 * median(one[name] for one in passes) for name in passes[0]}


def _count(model: nn.Module, x: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs and bytes of every layer and container."""
    with FlopCounterMode(display=False) as counter:
        flops = _attribute(model, x, counter.get_total_flops)
    with _Traffic() as traffic:
        moved = _attribute(model, x, lambda: traffic.bytes)
    layers = layers_of(model)
    borders = _borders(layers, model, x)
    # Within a layer a better one could keep everything close by; a container's operations are on their own.
    bytes_ = {name: (borders[name] if count else 0) if name in layers else int(count) for name, count in moved.items()}
    return {name: int(count) for name, count in flops.items()}, bytes_


def _borders(layers: Mapping[str, nn.Module], model: nn.Module, x: Tensor) -> dict[str, int]:
    """Bytes of what goes in and out of every layer, its parameters and buffers included, over all of its runs."""
    found = dict.fromkeys(layers, 0)

    def hook(name: str):
        def add(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[name] += _bytes((args, kwargs, output, list(layer.parameters()), list(layer.buffers())))

        return add

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write; views do neither."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf.untyped_storage().data_ptr() not in given for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if is_mutable(func) or any(made):
            self.bytes += _bytes((args, kwargs, out))
        return out


def _bytes(values: Any) -> int:
    """Of all tensors in a structure; what is spread over a map without being copied counts once."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


def _parameters(model: nn.Module) -> dict[str, int]:
    """Of every layer and container; shared ones count where they come first."""
    seen: set[Tensor] = set()
    counts = {}
    layers = layers_of(model)
    for name, module in {**_containers_of(model), **layers}.items():
        own = [one for one in module.parameters(recurse=name in layers) if one not in seen]
        seen.update(own)
        counts[name] = sum(one.numel() for one in own)
    return counts


def _kinds(model: nn.Module, times: Mapping[str, float]) -> dict[str, str]:
    """What stands in a row, first what ran, in order, then what did not."""
    kinds = {name: type(layer).__name__ for name, layer in layers_of(model).items()}
    kinds |= {name: f"{type(module).__name__}.forward" for name, module in _containers_of(model).items()}
    return {name: kinds[name] for name in (*times, *(name for name in kinds if name not in times))}


# --------------------------------------------------------------------------------------------------------------- shown


def profile_table(found: Profile) -> Table:
    """For a terminal."""
    from rich.table import Table

    size = " x ".join(map(str, found.input_size))
    floor = f"floor: {found.gflops:.0f} GFLOP/s (matrix product) or {found.gbs:.1f} GB/s (copy)"
    title = f"forward pass of {size} on {found.setting['threads']} thread(s): {found.ms:.2f} ms"
    shown = Table(title=title, caption=floor, box=None, pad_edge=False)
    shown.add_column("layer", overflow="fold")
    for name in ("parameters", "MFLOP", "MB", "ms", "share", "floor ms", "x floor"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        far = "" if row.times_floor is None else f"{row.times_floor:.1f}"
        counts = (f"{row.parameters:,}", f"{row.flops / 1e6:,.1f}", f"{row.bytes / 1e6:,.2f}")
        shown.add_row(_title(row), *counts, f"{row.ms:.3f}", f"{row.share:.1%}", f"{row.floor_ms:.3f}", far)
    moved, ms, floor_ms = (sum(getattr(row, name) for row in found.rows) for name in ("bytes", "ms", "floor_ms"))
    counts = (f"{found.parameters:,}", f"{found.flops / 1e6:,.1f}", f"{moved / 1e6:,.2f}")
    shown.add_section()
    shown.add_row("sum", *counts, f"{ms:.3f}", "", f"{floor_ms:.3f}", f"{ms / floor_ms:.1f}")
    return shown


def _title(row: LayerCost) -> str:
    return f"{row.layer} ({row.kind})" if row.kind.endswith(".forward") else row.layer


@in_style
def draw_profile(found: Profile, title: str = "") -> Figure:
    """Time and floor of the rows that take longest, in the order of their running."""
    longest = sorted(found.rows, key=lambda row: -row.ms)[:DRAWN]
    rows = [row for row in found.rows if row in longest]  # as they run
    figure = new_figure(7.2, 1.4 + 0.2 * len(rows))
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [row.ms for row in rows], 0.65, color=BLUE, label="time")
    axes.barh(
        places,
        [row.floor_ms for row in rows],
        0.3,
        color=ORANGE,
        hatch="////",
        edgecolor="white",
        linewidth=0,
        label="floor",
    )
    for place, row in enumerate(rows):
        axes.annotate(f" {row.share:.0%}", (row.ms, place), va="center", fontsize=7, color=INK)
    axes.set_yticks(places, [f"{row.layer} ({row.kind})" if row.kind else row.layer for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_axisbelow(True)
    axes.set_xlabel("milliseconds; in per cent the share of the whole")
    axes.set_title(title, loc="left")
    axes.grid(axis="x", alpha=0.2, color=INK)
    axes.legend(loc="lower right")
    return figure
