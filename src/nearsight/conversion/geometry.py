# SPDX-License-Identifier: Apache-2.0
"""Where the blocks of a convolution lie, in the terms of a window. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

Around = tuple[tuple[int, int], ...]  # cells before and after each axis


class Aligned(NamedTuple):
    """How a window with a convolution's stride finds the middles of its blocks along one axis, or another place of them.

    The middle of a block of k places is place k // 2, as it is for a window; the last one is that of a causal window.
    """

    before: int  # cells to add in front of the map, below zero to cut some off
    after: int  # and behind it
    first: int  # the window's query that is the convolution's first output
    count: int  # the convolution's outputs


def align(
    cells: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    around: tuple[int, int],
    *,
    cut: bool = False,
    causal: bool = False,
) -> Aligned:
    """Shift the map by less than a stride, so that every ``stride``-th cell is the middle of a block.

    Args:
        around: the convolution's padding.
        cut: shift by cutting cells off, not by adding some.
        causal: find the last place of a block, not its middle.
    """
    place = kernel_size - 1 if causal else kernel_size // 2
    middle = place * dilation - around[0]  # of the first block; below zero where it is off the map
    before = -middle if middle < 0 else -(middle % stride) if cut else -middle % stride
    first = (middle + before) // stride
    count = (cells + sum(around) - dilation * (kernel_size - 1) - 1) // stride + 1
    after = max(0, (first + count - 1) * stride + 1 - cells - before)
    return Aligned(before, after, first, count)


def padding_of(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Around:
    """Cells that a convolution adds before and after each axis."""
    if convolution.padding == "same":
        totals = [d * (k - 1) for k, d in zip(convolution.kernel_size, convolution.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    if convolution.padding == "valid":
        return ((0, 0),) * len(convolution.kernel_size)
    return tuple((int(cells), int(cells)) for cells in convolution.padding)


def is_same(around: Around, kernel_size: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether query p of a window, at cell p * stride, is the middle of the convolution's block p."""
    return list(around) == [(k // 2 * d, (k - 1 - k // 2) * d) for k, d in zip(kernel_size, dilation, strict=True)]


def flat(around: Sequence[tuple[int, int]]) -> list[int]:
    """Cells before and after each axis as ``F.pad`` takes them: the last axis first."""
    return [cells for axis in reversed(around) for cells in axis]
