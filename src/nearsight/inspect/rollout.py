# SPDX-License-Identifier: Apache-2.0
"""Attention rollout: through all layers together, where in the image does what a query holds come from?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from .maps import AttentionMap

FEW = 4  # rows that see less than this part of the map go from cell to cell
GATHERED = 2**22  # weights at a time


def attention_rollout(
    maps: Sequence[AttentionMap],
    pixels: Sequence[Sequence[int]],
    *,
    image_index: int = 0,
    size: Sequence[int] | None = None,
) -> np.ndarray:
    """From which places of the image each layer's queries gather, through all layers before: (layers, pixels, *size).

        R_l = (A_l / 2 + S_l / 2) T_l R_{l-1},   R_0 = 1

    A_l holds the weights of layer l, averaged over its heads, queries down and cells across: as sparse as the memory blocks
    are. S_l takes each query to its own cell, for the shortcut around the attention. T_l takes the cells of layer l's input
    to those of the output before it, or to the image: each cell is the mean of what it covers, area by area, which is
    what an average pool does and a model of what a strided convolution or a maximum does.

    Source: Abnar and Zuidema 2020 (arXiv:2005.00928), eq. 1, with its half for the shortcut; S and T are what windows,
    strides and pools make necessary. Layers count as one chain, in the order in which they ran. Everything between them
    that mixes cells, such as a 3 x 3 convolution, is left out, and so is how large the values are: a rollout says where
    attention routes, not what the answer depends on.

    Every result sums to one, less what went to padding that votes (border ``"zeros"``).

    Args:
        maps: of :func:`attention_maps`, of all queries.
        pixels: row and column of each; the query of a layer that covers it is the start.
        image_index: of the image in the batch.
        size: cells per axis of the result; None is one per pixel of the image.

    Raises:
        OptionError: no maps, or maps of chosen queries.
        ShapeError: a pixel that is not in the image.

    Example:
        >>> maps = attention_maps(create_model("sasa_nano"), torch.randn(1, 3, 32, 32))
        >>> attention_rollout(maps, [(16, 16), (3, 30)]).shape
        (4, 2, 32, 32)
    """
    if not maps or any(layer.queries is not None for layer in maps):
        raise OptionError(
            "a rollout needs the maps of all queries of at least one layer: attention_maps without queries="
        )
    image = tuple(size or maps[0].image_size)
    chains: list[Rows] = []  # one per layer to start from
    # From the last layer down; each joins with its own queries, so that every layer is gone through once.
    for place in reversed(range(len(maps))):
        layer, target = _Layer(maps[place], image_index), maps[place - 1].out_size if place else image
        chains = [_starts(maps[place], pixels), *chains]
        chains = [_resampled(layer.attended(rows), target) for rows in chains]
    return torch.stack([rows.whole() for rows in chains]).numpy()


class Rows(NamedTuple):
    """Rows of a matrix over the cells of a map, each with the part of the map outside of which it is zero.

    values  (rows, *sides)
    first   (rows, axes), the cell in the corner of each part
    size    cells of the map
    """

    values: Tensor
    first: Tensor
    size: tuple[int, ...]

    def along(self, axis: int) -> Tensor:
        """The cells of every row's part along an axis: (rows, side)."""
        return self.first[:, axis, None] + torch.arange(self.values.shape[axis + 1], device="cpu")

    def whole(self) -> Tensor:
        """(rows, *size)."""
        if self.values.shape[1:] == self.size:
            return self.values
        index, count = _flat([self.along(axis) for axis in range(len(self.size))], self.size), len(self.values)
        full = self.values.new_zeros(count, prod(self.size))
        return full.scatter_(1, index.reshape(count, -1), self.values.reshape(count, -1)).view(count, *self.size)


def _flat(along: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """From places along every axis, (rows, n) each, to those on the flat map: (rows, n, m, ...)."""
    index, rank = torch.zeros((), dtype=torch.long, device="cpu"), len(along)
    for axis, (places, cells) in enumerate(zip(along, size, strict=True)):
        shape = [len(places), *[1] * rank]
        shape[axis + 1] = -1
        index = index * cells + places.view(shape)
    return index


def _starts(layer: AttentionMap, pixels: Sequence[Sequence[int]]) -> Rows:
    """One row per pixel with a one at its query."""
    first = torch.tensor([layer.query(pixel) for pixel in pixels], device="cpu").view(-1, len(layer.out_size))
    return Rows(
        torch.ones(len(pixels), *[1] * len(layer.out_size), device="cpu", dtype=torch.float32), first, layer.out_size
    )


class _Layer:
    """A / 2 + S / 2 of one layer, applied to rows."""

    def __init__(self, layer: AttentionMap, image_index: int) -> None:
        self.layer, self.size, self.rank = layer, layer.map_size, len(layer.map_size)
        self.weights = layer.weights[image_index].float().mean(0).flatten(0, self.rank - 1)  # queries, *places
        self.cells = [torch.from_numpy(table).long() for table in layer.cells]  # per axis queries, places
        self.strides = [axis.stride for axis in layer.window.axes(self.rank)]
        self.own = [s * torch.arange(n, device="cpu") for s, n in zip(self.strides, layer.out_size, strict=True)]

    def attended(self, rows: Rows) -> Rows:
        """Through a matrix of the whole map, or where rows see little of it, from the cells that they see."""
        first, sides = self._seen(rows)
        if FEW * prod(sides) > prod(self.size):
            return self._by_matrix(rows)
        places = prod(rows.values.shape[1:]) * prod(self.weights.shape[1:])
        step = max(1, GATHERED // places)
        parts = [
            self._by_cells(
                Rows(rows.values[n : n + step], rows.first[n : n + step], rows.size), first[n : n + step], sides
            )
            for n in range(0, len(first), step)
        ]
        return Rows(torch.cat(parts), first, self.size)

    def _seen(self, rows: Rows) -> tuple[Tensor, list[int]]:
        """The part of the map that each row sees: its corner, and sides that are the same for all."""
        corners, sides = [], []
        for axis, (table, own, cells) in enumerate(zip(self.cells, self.own, self.size, strict=True)):
            seen = torch.cat([table, own[:, None]], 1)
            low = seen.where(seen >= 0, cells).amin(1)[rows.along(axis)].amin(1)
            high = seen.amax(1)[rows.along(axis)].amax(1)
            sides.append(int((high - low).max()) + 1)
            corners.append(low.clamp(max=cells - sides[-1]))
        return torch.stack(corners, 1), sides

    def _by_cells(self, rows: Rows, first: Tensor, sides: Sequence[int]) -> Tensor:
        count, queries = len(rows.values), [rows.along(axis) for axis in range(self.rank)]
        flat = _flat(queries, rows.size)  # rows, *queries
        shares = rows.values[(..., *[None] * self.rank)] * self.weights[flat]  # rows, *queries, *places
        target, outside = (
            torch.zeros((), dtype=torch.long, device="cpu"),
            torch.zeros((), dtype=torch.bool, device="cpu"),
        )
        own = target
        for axis, (table, mine, side) in enumerate(zip(self.cells, self.own, sides, strict=True)):
            seen, corner = table[queries[axis]], first[:, axis]  # rows, queries, places
            shape = [count, *[1] * (2 * self.rank)]
            shape[axis + 1], shape[self.rank + axis + 1] = seen.shape[1:]
            target = target * side + (seen - corner[:, None, None]).view(shape)
            outside = outside | (seen < 0).view(shape)
            shape = [count, *[1] * self.rank]
            shape[axis + 1] = -1
            own = own * side + (mine[queries[axis]] - corner[:, None]).view(shape)
        cells = prod(sides)  # one more takes what lies outside
        found = shares.new_zeros(count, cells + 1)
        found.scatter_add_(1, target.masked_fill(outside, cells).reshape(count, -1), shares.reshape(count, -1))
        found.scatter_add_(1, own.reshape(count, -1), rows.values.reshape(count, -1))
        return found[:, :cells].view(count, *sides) / 2

    def _by_matrix(self, rows: Rows) -> Rows:
        whole = rows.whole()
        attended = (self._matrix @ whole.flatten(1).T).T.reshape(len(whole), *self.size)
        own = torch.zeros_like(attended)
        own[(slice(None), *[slice(None, None, stride) for stride in self.strides])] = whole
        return Rows((attended + own) / 2, torch.zeros(len(whole), self.rank, dtype=torch.long, device="cpu"), self.size)

    @cached_property
    def _matrix(self) -> Tensor:
        """The weights as a sparse matrix, cells down and queries across."""
        queries = len(self.weights)
        key, weights = self.layer.key_cells().reshape(queries, -1), self.weights.reshape(queries, -1)
        inside = key >= 0
        query = torch.arange(queries, device="cpu")[:, None].expand_as(key)
        indices, size = torch.stack([key[inside], query[inside]]), (prod(self.size), queries)
        return torch.sparse_coo_tensor(indices, weights[inside], size, device=weights.device, check_invariants=True)


def _resampled(rows: Rows, size: Sequence[int]) -> Rows:
    """rows T, on a map of ``size`` cells."""
    values, first = rows.values, rows.first.clone()
    for axis, (cells, wanted) in enumerate(zip(rows.size, size, strict=True)):
        times, rest = divmod(wanted, cells)
        if not rest:
            values = values.repeat_interleave(times, axis + 1) / times if times > 1 else values
            first[:, axis] *= times
            continue
        shares = _shares(cells, wanted)[rows.along(axis)]  # rows, side, wanted
        values = torch.einsum("r...s,rst->r...t", values.movedim(axis + 1, -1), shares).movedim(-1, axis + 1)
        first[:, axis] = 0
    return Rows(values, first, tuple(size))


def _shares(cells: int, others: int) -> Tensor:
    """Two divisions of one length: which share of each of ``cells`` every one of ``others`` covers, (cells, others)."""
    edges, marks = (torch.arange(n + 1, dtype=torch.float32, device="cpu") / n for n in (cells, others))
    start, end = torch.maximum(edges[:-1, None], marks[:-1]), torch.minimum(edges[1:, None], marks[1:])
    return cells * (end - start).clamp(min=0)
