# SPDX-License-Identifier: Apache-2.0
"""NATTEN's windows as nearsight's, and those of its split calls in tensors, cut into blocks of queries.

Neighbouring queries see almost the same cells, so a block of b queries per axis meets a *span* of cells in one dense
product, and from the b x span scores each query takes its own window. Queries of one dilation phase see cells of that phase
only; a phase is a smaller map with undilated windows, and no block crosses from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import OptionError
from ...window import Axis, Window

# A slice of blocks is as large as its scores may be: what a call needs besides its result stays near the cache.
SLICE_SCORES = 1 << 20
# So many numbers at most are gathered, a window for every query: that takes fewer steps than blocks do, and on a small map
# the steps are what takes time. Measured for one axis of 300 cells.
GATHERED = 1 << 18


def without_autocast(tensor: Tensor) -> Any:
    """Products of the operation are not narrowed: it has the dtype of its inputs, as a kernel has."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def window_of(rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> Window:
    """NATTEN's window: it slides inwards, and ``stride`` neighbouring queries share it.

    Source: the ``stride`` of generalized neighborhood attention, NATTEN 0.20. None is the default of each but the size.

    Raises:
        ShapeError: another number of values than of axes.
        OptionError: a size below 1, or a stride that would leave cells unseen between two windows.
    """
    causal = False if is_causal is None else is_causal
    stride, dilation = (1 if steps is None else steps for steps in (stride, dilation))
    named = Window(
        kernel_size, stride=stride, dilation=dilation, border="shift", causal=causal
    )  # its errors say stride
    if any(axis.stride > axis.kernel_size for axis in named.axes(rank)):
        raise OptionError(f"stride must be at most kernel_size; received stride={stride}, kernel_size={kernel_size}")
    return Window(kernel_size, dilation=dilation, border="shift", causal=causal, shared_by=stride)


def with_depth(value: Any, depth: int | None) -> Any:
    """A size or a dilation of three axes, of which the first had an argument of its own in 0.15 and 0.16."""
    return value if depth is None else (depth, *(1 if value is None else value,) * 2)


def scale_of(scale: Any, head_dim: int) -> Any:
    """NATTEN's scale: None, False and zero all mean ``head_dim ** -0.5``, in every version, of calls and of modules."""
    return scale or max(head_dim, 1) ** -0.5


def natten_values(axes: Sequence[Axis]) -> tuple[tuple, tuple, tuple, tuple]:
    """kernel_size, stride, dilation and is_causal, each with a value per axis."""
    columns = zip(*((axis.kernel_size, axis.shared_by, axis.dilation, axis.causal) for axis in axes), strict=True)
    kernel_size, stride, dilation, is_causal = columns
    return kernel_size, stride, dilation, is_causal


def cells_of(axes: Sequence[Axis]) -> int:
    """How many cells a window holds."""
    return prod([axis.kernel_size for axis in axes])  # a list, which torch.compile can follow


def seen_by(axis: Axis, step: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last step that the query at ``step`` sees, on its dilation phase of ``steps`` cells."""
    first = axis.first_step(step, steps).clamp(min=0)
    return first, step if axis.causal else torch.minimum(first + axis.kernel_size, steps) - 1


def places(axis: Axis, cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of a query's places hold no cell, and every place's index into a table of 2 * kernel_size - 1 biases.

    Both are (cells, kernel_size). The cells of a window stand first, in order; what is missing is missing at the end.
    """
    cell = torch.arange(cells, device=device)[:, None]
    step = cell // axis.dilation
    first, last = seen_by(axis, step, (cells - cell % axis.dilation + axis.dilation - 1) // axis.dilation)
    seen = first + torch.arange(axis.kernel_size, device=device)
    entries = (seen - step + axis.kernel_size - 1).clamp(0, 2 * axis.kernel_size - 2)
    return seen > last, entries


def gathers(axes: Sequence[Axis], tensor: Tensor) -> bool:
    """Whether the windows of a tensor (B, N, *map, D) are small enough to be copied."""
    return tensor.numel() * cells_of(axes) <= GATHERED


def pairs_fit(tensor: Tensor) -> bool:
    """Whether a weight for every pair of cells of a map (B, N, *map, D) is little enough to be held."""
    return tensor.shape[:2].numel() * tensor.shape[2:-1].numel() ** 2 <= GATHERED << 2


def gather_windows(tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """(B, N, *map, D) -> (B, N, cells of the map, product of k, D); some cell of the window in places that hold none."""
    index = neighbours(axes, tensor)
    return tensor.flatten(2, -2).index_select(2, index.flatten()).unflatten(2, index.shape)


def neighbours(axes: tuple[Axis, ...], tensor: Tensor) -> Tensor:
    """Where the cells of every query's window are in the flattened map: (cells of the map, product of k)."""
    # Kept, but for a compiler's tensors, that hold no numbers.
    made = _neighbours if type(tensor) is Tensor else _neighbours.__wrapped__
    return made(axes, tuple(tensor.shape[2:-1]), tensor.device)


@lru_cache(maxsize=64)
def _neighbours(axes: tuple[Axis, ...], size: tuple[int, ...], device: torch.device) -> Tensor:
    tables = []
    with torch.inference_mode(False):  # what is kept may be used outside of it too
        for axis, cells in zip(axes, size, strict=True):
            cell = torch.arange(cells, device=device)[:, None]
            phase = cell % axis.dilation
            first, last = seen_by(axis, cell // axis.dilation, (cells - phase + axis.dilation - 1) // axis.dilation)
            seen = torch.minimum(first + torch.arange(axis.kernel_size, device=device), last)
            tables.append(phase + seen * axis.dilation)
        return flat_index(tables, size).flatten(0, -2)


class Blocks(NamedTuple):
    """One axis cut into G blocks of b queries, each with its span of S cells."""

    queries: Tensor  # (G, b) the cell of the query in each place; places past the end repeat the last one
    padding: Tensor  # (G, b) places past the end
    cells: Tensor  # (G, S) the cell in each place of the span
    place: Tensor  # (G, b, S) the place of a cell in the query's window; kernel_size where it is in none
    column: Tensor  # (G, b, kernel_size) where a place of the window is found in the span

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.place.shape[0], self.place.shape[1], self.place.shape[2]

    def without_padding(self) -> Blocks:
        """The same, in which places past the end see nothing: where results are added up, the last query counts once."""
        return self._replace(place=self.place.masked_fill(self.padding[..., None], self.column.shape[-1]))


def cut(axis: Axis, cells: int, device: torch.device) -> Blocks:
    """Cut the queries of every dilation phase into blocks."""
    k, dilation = axis.kernel_size, axis.dilation
    longest = -(-cells // dilation)
    block = min(max(4, k // 2), longest)
    blocks = -(-longest // block)
    span = min(block - 1 + k, longest)
    phase = torch.arange(min(dilation, cells), device=device)[:, None, None]
    steps = (cells - phase + dilation - 1) // dilation
    nth = torch.arange(blocks * block, device=device).view(1, blocks, block)
    step = torch.minimum(nth, steps - 1)
    padding = nth >= steps
    first, last = seen_by(axis, step, steps)
    start = torch.minimum(first[..., :1], steps - span).clamp(min=0)
    seen = (start + torch.arange(span, device=device))[..., None, :]
    inside = (seen >= first[..., None]) & (seen <= last[..., None])
    place = torch.where(inside, seen - first[..., None], k)
    column = (first - start)[..., None] + torch.arange(k, device=device)
    cell = phase + seen[..., 0, :] * dilation
    tables = (phase + step * dilation, padding, cell.clamp(max=cells - 1), place, column.clamp(max=span - 1))
    return Blocks(*(table.flatten(0, 1) for table in tables))


def slices(axes: Sequence[Blocks], rows: int) -> Iterator[list[Blocks]]:
    """All axes, a few blocks of the first axis at a time. ``rows`` counts the maps that are worked on at once."""
    first, *others = axes
    per_block = max(1, rows * prod(first.sizes[1:]) * prod([prod(axis.sizes) for axis in others]))
    at_once = max(1, SLICE_SCORES // per_block)
    for part in zip(*(table.split(at_once) for table in first), strict=True):
        yield [Blocks(*part), *others]


def gather_queries(tensor: Tensor, axes: Sequence[Blocks]) -> Tensor:
    """(B, N, *map, D) -> (B, N, *G, product of b, D)."""
    return _gather(tensor, [axis.queries for axis in axes])


def gather_spans(tensor: Tensor, axes: Sequence[Blocks]) -> Tensor:
    """(B, N, *map, D) -> (B, N, *G, product of S, D)."""
    return _gather(tensor, [axis.cells for axis in axes])


def _gather(tensor: Tensor, tables: Sequence[Tensor]) -> Tensor:
    index = flat_index(tables, tensor.shape[2:-1])
    return tensor.flatten(2, -2).index_select(2, index.flatten()).unflatten(2, index.shape)


def flat_index(tables: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Where the cells of every block are in the flattened map: (G, x) of every axis -> (*G, product of x)."""
    rank = len(tables)
    return _row_major([align(table, rank, axis) for axis, table in enumerate(tables)], size).flatten(rank)


def _row_major(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    flat = indices[0]
    for index, size in zip(indices[1:], sizes[1:], strict=True):
        flat = flat * size + index
    return flat


def align(table: Tensor, rank: int, axis: int) -> Tensor:
    """Lay a (G, x, ...) table of one axis out as (*G, *x, ...), with ones along the other axes."""
    shape = [1] * (table.ndim * rank)
    shape[axis::rank] = table.shape
    return table.view(shape)
