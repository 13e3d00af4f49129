# SPDX-License-Identifier: Apache-2.0
"""Attention rollout: through all layers together, where in the image does what a query holds come from?"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from .maps import AttentionMap


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
    rows = maps[-1].weights.new_zeros(0, *maps[-1].out_size)
    # From the last layer down; each joins with its own queries, so that every layer is gone through once.
    for place in reversed(range(len(maps))):
        rows = torch.cat([_starts(maps[place], pixels), rows])
        rows = _attended(maps[place], rows, image_index)
        rows = _resampled(rows, maps[place - 1].out_size if place else image)
    return rows.unflatten(0, (len(maps), len(pixels))).numpy()


def _starts(layer: AttentionMap, pixels: Sequence[Sequence[int]]) -> Tensor:
    """One row per pixel with a one at its query: (pixels, *out)."""
    starts = torch.zeros(len(pixels), *layer.out_size, dtype=torch.float32, device="cpu")
    for row, pixel in zip(starts, pixels, strict=True):
        row[layer.query(pixel)] = 1
    return starts


def _attended(layer: AttentionMap, rows: Tensor, image_index: int) -> Tensor:
    """rows (A / 2 + S / 2): (n, *out) -> (n, *map_size)."""
    count, queries, cells = len(rows), prod(layer.out_size), prod(layer.map_size)
    key = layer.key_cells().reshape(queries, -1)
    weights = layer.weights[image_index].float().mean(0).reshape(queries, -1)
    inside = key >= 0
    query = torch.arange(queries, device="cpu")[:, None].expand_as(key)
    indices = torch.stack([key[inside], query[inside]])
    size, like = (cells, queries), weights.device
    matrix = torch.sparse_coo_tensor(indices, weights[inside], size, device=like, check_invariants=True)
    attended = (matrix @ rows.reshape(count, -1).T).T.reshape(count, *layer.map_size)
    own = torch.zeros_like(attended)
    own[(slice(None), *[slice(None, None, axis.stride) for axis in layer.window.axes(rows.ndim - 1)])] = rows
    return (attended + own) / 2


def _resampled(rows: Tensor, size: Sequence[int]) -> Tensor:
    """rows T: (n, *cells) -> (n, *size)."""
    for axis, wanted in enumerate(size, start=1):
        rows = (rows.movedim(axis, -1) @ _shares(rows.shape[axis], wanted)).movedim(-1, axis)
    return rows


def _shares(cells: int, others: int) -> Tensor:
    """Two divisions of one length: which share of each of ``cells`` every one of ``others`` covers, (cells, others)."""
    edges, marks = (torch.arange(n + 1, dtype=torch.float32, device="cpu") / n for n in (cells, others))
    start, end = torch.maximum(edges[:-1, None], marks[:-1]), torch.minimum(edges[1:, None], marks[1:])
    return cells * (end - start).clamp(min=0)
