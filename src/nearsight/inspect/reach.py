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


def reach_of(module: nn.Module, size: Sequence[int], out_size: Sequence[int]) -> Reach:
    """Of attention by its window, of convolutions and pools by their kernel; all else is taken to work cell by cell."""
    if isinstance(module, AttentionLayer):
        return _window_reach(module.window_on(size), size)
    if isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)):
        return _kernel_reach(module, size, out_size)
    cells = 0.0 if tuple(size) == tuple(out_size) else inf
    rank = len(size)
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


def _kernel_reach(
    module: nn.Conv2d | nn.AvgPool2d | nn.MaxPool2d, size: Sequence[int], out_size: Sequence[int]
) -> Reach:
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    dilation: Any = getattr(module, "dilation", 1)
    span = [d * (k - 1) for k, d in zip(kernel, _pair(dilation), strict=True)]
    padding = {"same": [n // 2 for n in span], "valid": [0, 0]}.get(str(module.padding)) or _pair(module.padding)
    low, high = [], []
    for n, p, over, pad, step in zip(size, out_size, span, padding, stride, strict=True):
        declared = p <= -(-(n + 2 * pad - over - 1) // step) + 1
        low.append(float(pad if declared else over))  # what pads by itself may do so on either side
        high.append(float(over - pad if declared else over))
    is_cut = getattr(module, "padding_mode", "zeros") != "circular"
    return Reach(tuple(low), tuple(high), (is_cut,) * len(size), stride)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def inside_of(size: Sequence[int], out_size: Sequence[int], low: Sequence[float], high: Sequence[float]) -> Tensor:
    """(1, 1, *out) of bool: the outputs for which nothing hangs over the edge."""
    inside = everywhere(out_size)
    for axis, (n, p, before, behind) in enumerate(zip(size, out_size, low, high, strict=True)):
        cells = torch.arange(p, device="cpu") * strides_of([n], [p])[0]
        along = (cells >= before) & (cells + behind <= n - 1)
        inside = inside & along.view(-1, *(1,) * (len(out_size) - 1 - axis))
    return inside


def everywhere(out_size: Sequence[int]) -> Tensor:
    return torch.ones((1, 1, *out_size), dtype=torch.bool, device="cpu")


def closes(size: Sequence[int], out_size: Sequence[int], period: Sequence[int]) -> bool:
    """Whether the output is a torus if the input is: what leaves at one edge comes back whole at the other."""
    evenly = all(p * s == n for n, p, s in zip(size, out_size, strides_of(size, out_size), strict=True))
    return evenly and all(n % cells == 0 for n, cells in zip(size, period, strict=True))


def strides_of(size: Sequence[int], out_size: Sequence[int]) -> tuple[float, ...]:
    """Cells of the input per cell of the output: a whole number, or one over it; maps need not divide evenly."""
    pairs = zip(size, out_size, strict=True)
    return tuple(float(max(1, round(n / p))) if p <= n else 1 / round(p / n) for n, p in pairs)
