# SPDX-License-Identifier: Apache-2.0
"""The weights of a few queries, without those of all the others: for looking at large maps.

The equation is that of :mod:`.reference`; only the gathering differs. Held to it by a test over every kind of window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ShapeError
from .softmax import softmax

GATHERED = 2**22  # numbers: how many of the keys' are gathered at a time, 16 MB in float32


class Neighbours(Protocol):
    """A memory block along one axis: :class:`nearsight.window.Axis`, or another rule for which cells a query sees."""

    @property
    def kernel_size(self) -> int: ...

    def neighbours(self, cells: int, queries: Tensor | None = None) -> Tensor:
        """For queries, or all, the (cell, table entry) of each place; cell -1 takes no part, -2 votes as a zero."""
        ...


def weights_of(
    queries: Tensor,
    query: Tensor,
    key: Tensor,
    axes: Sequence[Neighbours],
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The softmax weights of chosen queries over the places of their memory blocks: (B, N, Q, *kernel_size).

    Args:
        queries: (Q, axes), the index of each query along every axis of the output.
        query, key: (B, N, *out, D) and (B, N, *in, D), with as many heads or a divisor of them.
        axes: the memory block, one rule per axis of the map.
        bias, relative, scale: as in :func:`nearsight.local_attention`.

    Raises:
        ShapeError: a query that is not there.
    """
    rank = len(axes)
    if queries.ndim != 2 or queries.shape[1] != rank:
        raise ShapeError(f"queries must be (Q, {rank}), an index per axis of the map; received {tuple(queries.shape)}")
    limit = torch.tensor(query.shape[2:-1], device=queries.device)
    if ((queries < 0) | (queries >= limit)).any():
        raise ShapeError(f"queries must lie in an output of {tuple(query.shape[2:-1])}; received {queries.tolist()}")
    block = [axis.kernel_size for axis in axes]
    per_query = query.shape[0] * query.shape[1] * query.shape[-1] * torch.Size(block).numel()
    factor = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # a key may serve a group of query heads
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # it would narrow the logits
        chunks = [
            _weights(some, query.to(wide), key.to(wide), axes, bias, relative, factor)
            for some in queries.to(key.device).split(max(1, GATHERED // max(per_query, 1)))
        ]
        return torch.cat(chunks, 2) if chunks else query.new_zeros(*query.shape[:2], 0, *block, dtype=wide)


def _weights(
    queries: Tensor,
    query: Tensor,
    key: Tensor,
    axes: Sequence[Neighbours],
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    scale: float,
) -> Tensor:
    rank, size = len(axes), key.shape[2:-1]
    chosen = [axis.neighbours(n, some) for axis, n, some in zip(axes, size, queries.T, strict=True)]  # Q, places, 2
    cells = [_spread(table[..., 0], axis, rank) for axis, table in enumerate(chosen)]
    flat = torch.zeros((), dtype=torch.long, device=key.device)
    inside = takes_part = torch.ones((), dtype=torch.bool, device=key.device)
    for cell, count in zip(cells, size, strict=True):
        flat = flat * count + cell.clamp(min=0)
        inside, takes_part = inside & (cell >= 0), takes_part & (cell != -1)
    keys = key.flatten(2, -2)[:, :, flat].masked_fill(~inside[..., None], 0)  # B, N, Q, *places, D
    q = query[(slice(None), slice(None), *queries.T)]  # B, N, Q, D
    logits = scale * torch.einsum("bnqd,bnq...d->bnq...", q, keys)
    for axis, table in enumerate(relative or ()):
        vectors = table.to(q.dtype)[:, chosen[axis][..., 1]]
        logits = logits + scale * _spread(torch.einsum("bnqd,nqkd->bnqk", q, vectors), axis, rank)
    if bias is not None:
        entries = [_spread(table[..., 1], axis, rank) for axis, table in enumerate(chosen)]
        logits = logits + bias.to(q.dtype)[(slice(None), *entries)]
    logits = logits.masked_fill(~takes_part, float("-inf"))
    return softmax(logits, rank)


def _spread(table: Tensor, axis: int, rank: int) -> Tensor:
    """(..., places) -> (..., *places) with one place along every other axis."""
    shape = [1] * rank
    shape[axis] = table.shape[-1]
    return table.unflatten(-1, shape)
