# SPDX-License-Identifier: Apache-2.0
"""How time and memory of attention grow with the image: by the number of cells when local, by its square when global.

With h x w cells, a window of k x k and N heads of D channels, q.k and weights.v take

    local: 4 N D (h w) k^2 FLOPs,   global: 4 N D (h w)^2,

and so many weights, N (h w) k^2 and N (h w)^2, are kept by code that makes them before it uses them. Global attention takes
more from h w = k^2 on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import exp, log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attention import global_attention, local_attention
from ..errors import OptionError
from ..flops import attend_flops
from ..layers import AttentionLayer
from ..pages.brief import Rows, short_table
from ..pages.style import BLUE, INK, ORANGE, in_style, new_figure
from ..window import BORDERS, Window
from .memory import in_fresh_process, peak_memory
from .timing import matrix_rate, race, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

LOCAL, GLOBAL, TEXTBOOK = "local", "global", "global, weights kept"
HEAD_DIM = 32
KEPT = 2**30  # bytes of weights; a textbook that would keep more is left out
SECONDS = 3.0  # for one measured point
ANY = 64  # cells per axis of a map on which a window that covers it is no local attention


@dataclass(frozen=True)
class GrowthCase:
    """Maps of one image, and the window of local attention."""

    size: int
    kernel_size: int = 7
    head_dim: int = HEAD_DIM
    num_heads: int = 4

    def maps(self) -> list[Tensor]:
        """query, key and value, heads last, as a channels_last projection leaves them."""
        memory = (1, self.size, self.size, self.num_heads, self.head_dim)
        return [torch.randn(memory).movedim(-2, 1) for _ in range(3)]

    def window(self, attention: str) -> Window:
        return Window(self.kernel_size) if attention == LOCAL else Window.everywhere((self.size, self.size))

    def flops(self, attention: str) -> int:
        """As ``count_flops`` counts them: places outside the map included."""
        shape = (1, self.num_heads, self.size, self.size, self.head_dim)
        axes = self.window(attention).axes(2)
        kernel, border = [axis.kernel_size for axis in axes], [BORDERS.index(axis.border) for axis in axes]
        return attend_flops(shape, shape, shape, None, (), kernel, (1, 1), (1, 1), (0, 0), (1, 1), border)

    def weights(self, attention: str) -> int:
        """Bytes of all weights in float32."""
        return self.flops(attention) // self.head_dim  # 4 D FLOPs for every weight of 4 bytes

    @property
    def output_bytes(self) -> int:
        """Of the result in float32."""
        return 4 * self.num_heads * self.head_dim * self.size**2

    def attend(self, attention: str) -> Callable[[], Tensor]:
        """Attention of these maps, one call after the other on the same."""
        query, key, value = self.maps()
        if attention == LOCAL:
            return lambda: local_attention(query, key, value, self.window(LOCAL))
        if attention == GLOBAL:
            return lambda: global_attention(query, key, value)
        return lambda: textbook(query, key, value)


def textbook(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Global attention as it is written down: all weights first, then their use."""
    q, k, v = (tensor.flatten(2, 3) for tensor in (query, key, value))
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1)
    return (weights @ v).view(query.shape)


@dataclass(frozen=True)
class Point:
    """One attention on a map of size x size cells.

    flops            of q.k and weights.v, two per multiply-add
    predicted_ms     FLOPs at the rate of a large matrix product
    measured_ms      median wall-clock time without gradients; None where it was left out
    predicted_bytes  of all weights in float32
    measured_bytes   by how much one call raises the peak of a fresh process, its output included; None where it was left
                     out or is too little to be seen
    """

    attention: str
    size: int
    cells: int
    flops: int
    predicted_ms: float
    measured_ms: float | None
    predicted_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True, repr=False)
class Growth:
    """The points, and what they were measured with; see :class:`nearsight.bench.profile.Profile`."""

    points: list[Point]
    kernel_size: int
    head_dim: int
    num_heads: int
    gflops: float
    setting: dict[str, Any]

    def __repr__(self) -> str:
        return short_table(Rows(self.points).cells(), verdict(self))

    def of(self, attention: str) -> list[Point]:
        return [point for point in self.points if point.attention == attention]

    def overtaken(self, field: str, by: str = GLOBAL) -> float | None:
        """The size from which on global attention takes more than local attention, between the sizes tried.

        None if it takes less at the largest, 0.0 if it takes more at all of them.

        Args:
            field: of :class:`Point`.
            by: the attention that is global.
        """
        pairs = [(one, other) for one in self.of(LOCAL) for other in self.of(by) if one.size == other.size]
        values = [(one.size, getattr(one, field), getattr(other, field)) for one, other in pairs]
        return crossing([(size, small, large) for size, small, large in values if small and large])


def geometry_of(model: nn.Module) -> dict[str, int]:
    """Arguments for :func:`growth`: those of a model's first layer of local attention; nothing if there is none.

    Example:
        >>> geometry_of(create_model("sasa_nano"))
        {'kernel_size': 5, 'num_heads': 4, 'head_dim': 4}
    """
    for layer in model.modules():
        if isinstance(layer, AttentionLayer) and layer.rank == 2:
            window = layer.window_on((ANY, ANY))
            if isinstance(window, Window) and not window.covers((ANY, ANY)):
                kernel_size = window.axes(2)[0].kernel_size
                head_dim = getattr(layer, "head_dim", HEAD_DIM)
                return {"kernel_size": kernel_size, "num_heads": layer.num_heads, "head_dim": head_dim}
    return {}


def crossing(points: Sequence[tuple[float, float, float]]) -> float | None:
    """Where the second of two curves passes the first for good, on straight lines between logarithms.

    Example:
        >>> crossing([(2, 8.0, 2.0), (4, 16.0, 8.0), (8, 32.0, 32.0), (16, 64.0, 128.0)])
        8.0
    """
    gaps = [(log(size), log(other / one)) for size, one, other in points]
    if not gaps or gaps[-1][1] < 0:
        return None
    for (before, below), (after, above) in reversed(list(pairwise(gaps))):
        if below < 0:
            return round(exp(before + (after - before) * -below / (above - below)), 9)
    return 0.0


def growth(
    sizes: Sequence[int] | None = None,
    *,
    kernel_size: int = 7,
    head_dim: int = HEAD_DIM,
    num_heads: int = 4,
    rounds: int = 5,
) -> Growth:
    """Measure local attention, global attention, and global attention that keeps its weights, on maps of several sizes.

    Maps are square and of one image, without position tables; the memory of every point is that of a process of its own.

    Args:
        sizes: cells per axis. None takes the smallest map that a block does not cover from everywhere, and powers of two
            up to 64.

    Raises:
        OptionError: a value below one.

    Example:
        >>> found = growth([4, 8], kernel_size=3, rounds=1)
        >>> [point.flops // point.cells for point in found.of("local")]
        [4608, 4608]
    """
    for name, value in (("kernel_size", kernel_size), ("head_dim", head_dim), ("num_heads", num_heads)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1; received {value}")
    if sizes is None:
        least = (kernel_size + 1) // 2 + 1
        sizes = [least, *(n for n in (4, 8, 16, 32, 64) if n > least)]
    if not sizes or min(sizes) < 1:
        raise OptionError(f"sizes must be one or more, each at least 1; received {list(sizes)}")
    cases = [GrowthCase(size, kernel_size, head_dim, num_heads) for size in sorted(set(sizes))]
    tasks = [(case, attention) for case in cases for attention in (LOCAL, GLOBAL, TEXTBOOK)]
    small = [task for task in tasks if task[1] != TEXTBOOK or task[0].weights(TEXTBOOK) <= KEPT]
    extra = dict(zip(small, _extra_memory(small), strict=True))
    times = {}
    for case in cases:
        calls = {attention: case.attend(attention) for one, attention in small if one == case}
        with torch.no_grad():
            times |= {(case, name): found.median for name, found in race(calls, rounds, SECONDS).items()}
    gflops = matrix_rate()
    points = [_point(*task, gflops, times.get(task), extra.get(task)) for task in tasks]
    return Growth(points, kernel_size, head_dim, num_heads, gflops, setting())


def _point(case: GrowthCase, attention: str, gflops: float, ms: float | None, extra: int | None) -> Point:
    flops, weights = case.flops(attention), case.weights(attention)
    return Point(attention, case.size, case.size**2, flops, flops / gflops / 1e6, ms, weights, extra)


# ------------------------------------------------------------------------------------------------------------- memory


def _extra_memory(tasks: Sequence[tuple[GrowthCase, str]]) -> list[int | None]:
    """Bytes that a call of each adds to the peak of a fresh process; None below those of its output, which it must make."""
    if sys.platform == "win32":  # has no forks, in which they are measured
        return [None for _ in tasks]
    told = [(asdict(case), attention, torch.get_num_threads()) for case, attention in tasks]
    found = zip(tasks, in_fresh_process(_extra_memory_in_forks, told), strict=True)
    return [extra if extra >= case.output_bytes else None for (case, _), extra in found]


def _extra_memory_in_forks(tasks: Sequence[tuple[dict[str, int], str, int]]) -> list[int]:
    """For every (case, attention, threads); to be run in a process that has done nothing else.

    Each is measured in a fork, so that none finds the memory of another, and PyTorch is loaded once.
    """
    found = []
    for task in tasks:
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, str(_extra_memory_here(*task)).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            found.append(int(answer.read()))
        os.wait()
    return found


def _extra_memory_here(case: dict[str, int], attention: str, threads: int) -> float:
    torch.set_num_threads(threads)
    with torch.no_grad():
        small = min(case["size"], case["kernel_size"])
        GrowthCase(**{**case, "size": small}).attend(attention)()  # sets up what is set up once
        call = GrowthCase(**case).attend(attention)
        before = peak_memory()
        call()
        return peak_memory() - before


# --------------------------------------------------------------------------------------------------------------- shown


def growth_table(found: Growth) -> Table:
    """For a terminal."""
    from rich.table import Table

    what = f"k = {found.kernel_size}, {found.num_heads} heads x {found.head_dim}, {found.setting['threads']} thread(s)"
    shown = Table(
        title=f"attention on one image of n x n cells, {what}", caption=verdict(found), box=None, pad_edge=False
    )
    shown.add_column("attention")
    for name in ("n", "MFLOP", "ms predicted", "measured", "MB predicted", "measured"):
        shown.add_column(name, justify="right")
    for point in found.points:
        ms = "" if point.measured_ms is None else f"{point.measured_ms:,.3f}"
        extra = "" if point.measured_bytes is None else f"{point.measured_bytes / 1e6:,.1f}"
        predicted = f"{point.predicted_ms:,.3f}", f"{point.predicted_bytes / 1e6:,.1f}"
        flops = f"{point.flops / 1e6:,.1f}"
        shown.add_row(point.attention, str(point.size), flops, predicted[0], ms, predicted[1], extra)
    return shown


def verdict(found: Growth) -> str:
    """From which size on global attention takes longer than local attention, in words."""
    seen = f"{_from(found, GLOBAL)}; where its weights are kept {_from(found, TEXTBOOK)}"
    return f"global attention takes longer than local: predicted from n = k = {found.kernel_size} on; measured {seen}"


def _from(found: Growth, attention: str) -> str:
    size = found.overtaken("measured_ms", attention)
    if size is None:
        return "at none of these sizes"
    return "at all of these sizes" if size == 0 else f"from n = {size:.1f} on"


@in_style
def draw_growth(found: Growth) -> Figure:
    """Time and memory over the size of the map, both axes logarithmic: lines are predicted, marks are measured."""
    figure = new_figure(7.2, 3.6)
    what = (("ms", "milliseconds", 1), ("bytes", "megabytes", 1e-6))
    for place, (field, unit, factor) in enumerate(what, start=1):
        axes = figure.add_subplot(1, 2, place)
        for attention, colour, dashes, formula in (
            (LOCAL, BLUE, "-", "(h·w)·k²"),
            (GLOBAL, ORANGE, "--", "(h·w)²"),
        ):
            line = [(point.size, factor * getattr(point, f"predicted_{field}")) for point in found.of(attention)]
            label = f"{formula}, predicted" if place == 1 else None
            axes.plot(*zip(*line, strict=True), dashes, color=colour, linewidth=1.5, label=label)
        for attention, colour, marker in ((LOCAL, BLUE, "o"), (GLOBAL, ORANGE, "s"), (TEXTBOOK, INK, "x")):
            seen = [(point.size, getattr(point, f"measured_{field}")) for point in found.of(attention)]
            marks = [(size, factor * value) for size, value in seen if value is not None]
            if marks:
                label = f"{attention}, measured" if place == 1 else None
                axes.plot(*zip(*marks, strict=True), marker, color=colour, markersize=5, label=label)
        if field == "ms":
            axes.axvline(found.kernel_size, color=INK, linewidth=0.8, linestyle=":", label="h = w = k")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([point.size for point in found.of(LOCAL)], [str(point.size) for point in found.of(LOCAL)])
        axes.set_xlabel("cells per axis")
        axes.set_title("time" if field == "ms" else "memory beside the inputs", loc="left")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.2, color=INK)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure
