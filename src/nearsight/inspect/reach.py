# SPDX-License-Identifier: Apache-2.0
"""What a layer sees of its input, and which cells are far enough from the edge not to notice it."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, inf, lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers import AttentionLayer
from ..window import Axis, Window


class Reach(NamedTuple):
    """What a layer sees of its input, per axis, around the cell that an output sits at."""

    low: tuple[float, ...]  # so many cells before it
    high: tuple[float, ...]  # and behind it
    is_cut: tuple[bool, ...]  # whether the edge of the map cuts off what hangs over it
    period: tuple[int, ...]  # shifts by multiples of it take outputs to outputs

    def cut(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """``low`` and ``high`` where the edge cuts; elsewhere no cell is near an edge."""
        low, high = (
            tuple(cells if is_cut else 0.0 for cells, is_cut in zip(side, self.is_cut, strict=True))
            for side in (self.low, self.high)
        )
        return low, high


_KERNELS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.LPPool1d, nn.LPPool2d),
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ADAPTIVE = tuple(getattr(nn, f"Adaptive{kind}Pool{rank}d") for kind in ("Avg", "Max") for rank in (1, 2, 3))


def reach_of(
    module: nn.Module, size: Sequence[int], out_size: Sequence[int], stride: Sequence[float] | None = None
) -> Reach:
    """Of attention by its window, of convolutions, pools, paddings and upsampling by their kernel; all else is taken to work
    cell by cell, or where it changes the map, to see all of it.

    Args:
        stride: cells of the input for one of the output, where the module's class does not say it.
    """
    rank = len(size)
    if isinstance(module, AttentionLayer):
        return _window_reach(module.window_on(size), size)
    if isinstance(module, _KERNELS):
        return _kernel_reach(module, size, out_size)
    if isinstance(module, _TRANSPOSED):
        return _transposed_reach(module, rank)
    if isinstance(module, nn.Upsample) and stride is not None:
        reach = 1.0 if module.mode != "nearest" else 1 - min(1.0, *stride)
        return Reach((reach,) * rank, (reach if module.mode != "nearest" else 0.0,) * rank, (True,) * rank, (1,) * rank)
    if isinstance(module, _ADAPTIVE) and stride is not None and all(step.is_integer() for step in stride):
        high = tuple(step - 1 for step in stride)
        return Reach((0.0,) * rank, high, (True,) * rank, tuple(map(int, stride)))
    if type(module).__module__ == nn.ZeroPad2d.__module__ and len(getattr(module, "padding", ())) == 2 * rank:
        before = tuple(float(cells) for cells in module.padding[::2][::-1])  # pyright: ignore
        is_cut = (not isinstance(module, (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)),) * rank
        return Reach(before, tuple(-cells for cells in before), is_cut, (1,) * rank)
    cells = 0.0 if tuple(size) == tuple(out_size) else inf
    return Reach((cells,) * rank, (cells,) * rank, (cells > 0,) * rank, (1,) * rank)


def _window_reach(window: Window, size: Sequence[int]) -> Reach:
    axes, rank = window.axes(len(size)), len(size)
    if window.covers(size):  # no block is cut: from everywhere the whole map is seen
        return Reach((inf,) * rank, (inf,) * rank, (False,) * rank, tuple(axis.stride for axis in axes))
    low, high, is_cut, period = zip(*map(_axis_reach, axes), strict=True)
    return Reach(low, high, is_cut, period)


def _axis_reach(axis: Axis) -> tuple[float, float, bool, int]:
    """The four of :class:`Reach` along one axis."""
    g = axis.shared_by
    middle = g - 1 if axis.causal else g // 2  # of the queries that share a window it is laid around this one
    last = g - (gcd(g, axis.stride) if axis.dilation == 1 else 1)  # and this is the last of them that there is
    behind = 0 if axis.causal else axis.kernel_size - 1 - axis.left + middle
    period = lcm(axis.stride, g * axis.dilation) if g > 1 else axis.stride
    low, high = ((axis.left - middle + last) * axis.dilation, behind * axis.dilation)
    return float(low), float(high), axis.border != "wrap", period


def _kernel_reach(module: nn.Module, size: Sequence[int], out_size: Sequence[int]) -> Reach:
    rank = len(size)
    kernel, stride = _per_axis(module.kernel_size, rank), _per_axis(module.stride, rank)
    span = [d * (k - 1) for k, d in zip(kernel, _per_axis(getattr(module, "dilation", 1), rank), strict=True)]
    given: Any = getattr(module, "padding", 0)
    padding = {"same": [n // 2 for n in span], "valid": [0] * rank}.get(str(given)) or _per_axis(given, rank)
    low, high = [], []
    for n, p, over, pad, step in zip(size, out_size, span, padding, stride, strict=True):
        declared = p <= -(-(n + 2 * pad - over - 1) // step) + 1
        low.append(float(pad if declared else over))  # what pads by itself may do so on either side
        high.append(float(over - pad if declared else over))
    is_cut = getattr(module, "padding_mode", "zeros") != "circular"
    return Reach(tuple(low), tuple(high), (is_cut,) * rank, tuple(stride))


def _transposed_reach(module: Any, rank: int) -> Reach:
    """Output p, at p / stride of the input's cells, is made of those at (p + padding - j * dilation) / stride, j < k."""
    columns = (_per_axis(getattr(module, name), rank) for name in ("kernel_size", "stride", "padding", "dilation"))
    low, high = [], []
    for k, s, pad, d in zip(*columns, strict=True):
        low.append(max(0.0, (d * (k - 1) - pad) / s))
        high.append(max(0.0, pad / s))
    return Reach(tuple(low), tuple(high), (True,) * rank, (1,) * rank)


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def inside_of(
    size: Sequence[int],
    out_size: Sequence[int],
    low: Sequence[float],
    high: Sequence[float],
    stride: Sequence[float],
) -> Tensor:
    """(1, 1, *out) of bool: the outputs, one for every ``stride`` cells, for which nothing hangs over the edge."""
    inside = everywhere(out_size)
    for axis, (n, p, before, behind, step) in enumerate(zip(size, out_size, low, high, stride, strict=True)):
        cells = torch.arange(p, device="cpu") * step
        along = (cells >= before) & (cells + behind <= n - 1)
        inside = inside & along.view(-1, *(1,) * (len(out_size) - 1 - axis))
    return inside


def everywhere(out_size: Sequence[int]) -> Tensor:
    return torch.ones((1, 1, *out_size), dtype=torch.bool, device="cpu")


def closes(size: Sequence[int], out_size: Sequence[int], stride: Sequence[float], period: Sequence[int]) -> bool:
    """Whether the output is a torus if the input is: what leaves at one edge comes back whole at the other."""
    evenly = all(p * step == n for n, p, step in zip(size, out_size, stride, strict=True))
    return evenly and all(n % cells == 0 for n, cells in zip(size, period, strict=True))
