# SPDX-License-Identifier: Apache-2.0
"""Pure PyTorch: dense matrix products over blocks of queries and the cells around them.

Neighbouring queries see almost the same cells, so the map is cut into blocks of b queries per axis. All windows of a block
lie within a *span* of S = (b-1)*stride + k cells; one matrix product scores the block against its span, and the pairs that
no window holds are masked away. Memory grows with (S/b)**rank per query where gathering every window takes k**rank.

Dilation is taken apart first: the queries of one dilation phase see cells of that phase only, so a phase is a smaller map
with undilated windows. Every operator used has forward- and reverse-mode derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..window import Axis, larger, smaller
from .problem import Problem

name = "blocked"

# Queries of a block along each axis, by rank: measured, see bench/. A larger block multiplies larger matrices but masks
# more of them away.
BLOCK = {1: 32, 2: 8, 3: 4}
# The batch is taken in slices whose scores stay near the cache.
CHUNK_SCORES = 1 << 22


def unavailable() -> str | None:
    return None


def why_not(problem: Problem) -> str | None:
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    scale: float,
) -> Tensor:
    if problem.batch == 0 or prod(problem.out_size) == 0:
        # Nothing to attend to, but the result stays a function of its inputs.
        return query[..., :1].expand(*query.shape[:-1], problem.value_dim) * 1
    dtype = problem.compute_dtype
    axes = [
        _cut(axis, n, query.device, BLOCK[problem.rank]) for axis, n in zip(problem.axes, problem.in_size, strict=True)
    ]
    bias = None if bias is None else _block_bias(bias.to(dtype), axes)
    relative = [table.to(dtype) for table in relative or ()]
    hidden = ~_combine([axis.visible for axis in axes])
    outs = [
        _attend_blocks(q.to(dtype), k.to(dtype), v.to(dtype), axes, hidden, bias, relative, scale)
        for q, k, v in zip(*_slices(query, key, value, problem, axes), strict=True)
    ]
    return torch.cat(outs).to(query.dtype)


class AxisBlocks(NamedTuple):
    """One axis cut into G blocks of b queries, each with its span of S cells."""

    queries: Tensor  # (G, b) the query in each place; places past the end repeat the last one
    position: Tensor  # (queries,) where each query is found in the flattened blocks
    cells: Tensor  # (G, S) the cell in each place of the span
    zero: Tensor | None  # (G, S) places outside the map that vote as zeros
    visible: Tensor  # (G, b, S) whether the query's window holds the cell
    entries: Tensor  # (G, b, S) the pair's index into a position table


def _cut(axis: Axis, cells: Any, device: torch.device, block: int) -> AxisBlocks:
    """Cut the queries of every dilation phase into blocks."""
    queries = axis.output_size(cells)
    # Query p lies on phase p * stride % dilation, which repeats every `groups` queries; on one phase, neighbouring queries
    # of a group are `stride` steps apart.
    groups = smaller(axis.dilation // gcd(axis.stride, axis.dilation), queries)
    stride = axis.stride // gcd(axis.stride, axis.dilation)
    longest = (queries + groups - 1) // groups
    block = smaller(block, longest)
    blocks = (longest + block - 1) // block
    group = torch.arange(groups, device=device)[:, None, None]
    nth = torch.arange(blocks * block, device=device).view(1, blocks, block)
    query = group + groups * nth
    step = query * axis.stride // axis.dilation
    phase = (query * axis.stride % axis.dilation)[..., :1]
    steps = axis.steps(phase, cells)
    first = axis.first_step(step, steps)
    span = (block - 1) * stride + axis.kernel_size
    start = first[..., :1]
    if axis.border in ("mask", "shift"):
        # No cell outside takes part, so the span need not reach there.
        span = smaller(span, axis.steps(0, cells))
        start = larger(smaller(start, steps - span), 0 * start)
    place = start + torch.arange(span, device=device)
    offset = place[..., None, :] - first[..., None]
    visible = (offset >= 0) & (offset < axis.kernel_size)
    inside = (place >= 0) & (place < steps)
    if axis.border in ("mask", "shift"):
        visible = visible & inside[..., None, :]
    entries = axis.entry(place[..., None, :], step[..., None], first[..., None]).clamp(0, axis.table_size - 1)
    cell = phase + place * axis.dilation
    padding = query >= queries
    return AxisBlocks(
        queries=query.clamp(max=queries - 1).flatten(0, 1),
        position=_position(torch.arange(queries, device=device), groups, blocks * block),
        cells=(cell % cells if axis.border == "wrap" else cell.clamp(0, cells - 1)).flatten(0, 1),
        zero=~inside.flatten(0, 1) if axis.border == "zeros" else None,
        # Padding sees everything: what it computes is thrown away, but a softmax over nothing would be NaN.
        visible=(visible | padding[..., None]).flatten(0, 1),
        entries=entries.flatten(0, 1),
    )


def _position(query: Tensor, groups: Any, places: Any) -> Tensor:
    """Where query p is found in the flattened blocks: the groups stand one after another."""
    return query % groups * places + query // groups


def _slices(
    query: Tensor, key: Tensor, value: Tensor, problem: Problem, axes: list[AxisBlocks]
) -> list[Sequence[Tensor]]:
    """The batch in slices whose scores stay near the cache; compiled code fuses instead and keeps it whole."""
    if torch.compiler.is_compiling():
        return [[query], [key], [value]]
    scores = problem.num_heads * prod(axis.visible.numel() for axis in axes)
    step = max(1, CHUNK_SCORES // scores)
    return [tensor.split(step) for tensor in (query, key, value)]


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: list[AxisBlocks],
    hidden: Tensor,
    bias: Tensor | None,
    relative: Sequence[Tensor],
    scale: float,
) -> Tensor:
    # A hidden pair gets weight 0, but 0 * inf is NaN and would reach queries that do not see the cell. A value that is not
    # finite is therefore carried by its key, whose score is masked where it is not seen, and taken out of the value.
    key = key + (value.detach() * 0).sum(-1, keepdim=True)
    value = torch.where(value.isfinite(), value, 0)
    query = _blocks(query * scale, [axis.queries for axis in axes])
    key, value = (_spans(tensor, axes) for tensor in (key, value))
    logits = query @ key.mT  # B, N, *blocks, queries of the block, cells of the span
    for axis, table in enumerate(relative):
        logits = logits + _relative_logits(query, table, axes, axis)
    if bias is not None:
        logits = logits + bias
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    return _unblocks(weights @ value, axes)


def _blocks(tensor: Tensor, indices: list[Tensor]) -> Tensor:
    """Cut every axis by a (G, b) index: (B, N, *map, D) -> (B, N, *G, product of b, D)."""
    for axis, index in enumerate(indices, start=2):
        tensor = tensor.index_select(axis, index.flatten()).unflatten(axis, index.shape).movedim(axis + 1, -2)
    return tensor.flatten(2 + len(indices), -2)


def _spans(tensor: Tensor, axes: list[AxisBlocks]) -> Tensor:
    spans = _blocks(tensor, [axis.cells for axis in axes])
    zeros = [axis.zero for axis in axes if axis.zero is not None]
    if not zeros:
        return spans
    inside = _combine([~zero[:, None] for zero in zeros])[..., 0, :]
    return spans.masked_fill(~inside[..., None], 0)


def _unblocks(blocks: Tensor, axes: list[AxisBlocks]) -> Tensor:
    """The inverse of cutting the queries: (B, N, *G, product of b, D) -> (B, N, *out, D)."""
    rank = len(axes)
    tensor = blocks.unflatten(-2, [axis.queries.shape[1] for axis in axes])
    for axis, cut in enumerate(axes, start=2):
        tensor = tensor.movedim(rank + 2, axis + 1).flatten(axis, axis + 1).index_select(axis, cut.position)
    return tensor


def _relative_logits(query: Tensor, table: Tensor, axes: list[AxisBlocks], axis: int) -> Tensor:
    """q.r of one axis for every pair of a block and its span."""
    rank = len(axes)
    scores = query @ table.mT[(slice(None), *[None] * rank)]  # B, N, *G, queries, entries of the table
    groups = [cut.entries.shape[0] for cut in axes]
    queries = [cut.entries.shape[1] for cut in axes]
    spans = [cut.entries.shape[2] for cut in axes]
    index = _align(axes[axis].entries, rank, axis).flatten(-rank)  # *G, *b, cells of this axis
    index = index.expand(*groups, *queries, -1).flatten(rank, -2)
    logits = scores.gather(-1, index.expand(*scores.shape[:-1], -1))
    others = [1] * rank
    others[axis] = spans[axis]
    return logits.unflatten(-1, others).expand(*scores.shape[:-1], *spans).flatten(-rank)


def _block_bias(bias: Tensor, axes: list[AxisBlocks]) -> Tensor:
    """The table's entry for every pair: (N, *table_size) -> (N, *G, queries, cells)."""
    rank = len(axes)
    for axis, cut in enumerate(axes, start=1):
        bias = bias.index_select(axis, cut.entries.flatten()).unflatten(axis, cut.entries.shape)
        bias = bias.movedim((axis + 1, axis + 2), (-2, -1))
    # N, *G, then (b, S) for every axis: bring the b together.
    order = [*range(1 + rank), *range(1 + rank, 1 + 3 * rank, 2), *range(2 + rank, 1 + 3 * rank, 2)]
    return bias.permute(order).flatten(1 + rank, 2 * rank).flatten(2 + rank)


def _combine(per_axis: list[Tensor]) -> Tensor:
    """The outer "and" of one (G, b, S) table per axis: (*G, queries, cells)."""
    rank = len(per_axis)
    combined = torch.ones((), dtype=torch.bool, device=per_axis[0].device)
    for axis, table in enumerate(per_axis):
        combined = combined & _align(table, rank, axis)
    return combined.flatten(rank, 2 * rank - 1).flatten(rank + 1)


def _align(table: Tensor, rank: int, axis: int) -> Tensor:
    """Lay a (G, b, S) table of one axis out as (*G, *b, *S), with ones along the other axes."""
    shape = [1] * (3 * rank)
    shape[axis], shape[rank + axis], shape[2 * rank + axis] = table.shape
    return table.view(shape)
