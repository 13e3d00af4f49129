# SPDX-License-Identifier: Apache-2.0
"""Pure PyTorch: dense matrix products over blocks of queries and the cells around them.

Neighbouring queries see almost the same cells, so the map is cut into blocks of b queries per axis. All windows of a block
lie within a *span* of S = (b-1)*stride + k cells; one matrix product scores the block against its span, and the pairs that
no window holds are masked away. Memory grows with (S/b)**rank per query where gathering every window takes k**rank.

Dilation is taken apart first: the queries of one dilation phase see cells of that phase only, so a phase is a smaller map
with undilated windows. Every operator used has forward- and reverse-mode derivatives of any order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import gcd, isqrt, lcm, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..private import unflatten
from ..window import Axis, larger, smaller
from .problem import Call, Problem, is_exporting
from .softmax import NOTHING, let_see

name = "blocked"
takes_groups = False

# Queries of a block along each axis in compiled code, by rank; otherwise `_block_size` weighs.
BLOCK = {1: 32, 2: 7, 3: 4}
# Images and heads are taken in slices whose scores stay near the cache: measured, see bench/unfold.py.
SLICE_SCORES = 1 << 20


def unavailable() -> str | None:
    return None


def second_best(problem: Problem) -> str | None:
    return None


def why_not(problem: Problem) -> str | None:
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    query, key, value, bias, _, scale = call
    dtype = problem.compute_dtype
    if problem.exporting:  # as a trace follows them
        problem = replace(problem, in_size=key.shape[2:-1], out_size=query.shape[2:-1])
    block = BLOCK[problem.rank] if problem.compiling or problem.exporting else _block_size(problem)
    cut = cut_any_size if problem.exporting else _cut
    by_symbols = problem.compiling and not problem.exporting  # a program that is exported would keep what is asked here
    windows = map(_constant, problem.axes, problem.in_size) if by_symbols else problem.axes
    arange = partial(torch.arange, device=query.device)
    axes = [cut(axis, n, arange, block) for axis, n in zip(windows, problem.in_size, strict=True)]
    relative = [table.to(dtype) for table in call.relative or ()]
    places = _combine(axes, problem)
    terms = None if bias is None else let_see(_block_bias(bias.to(dtype), axes), places.hidden)
    if problem.exporting:  # whole: how many slices there are would depend on sizes that are open
        q, k, v = (tensor.to(dtype).flatten(2, -2) for tensor in (query, key, value))
        out, *lse = _attend_blocks(q, k, v, axes, places, terms, relative, scale, problem.lse)
        return out.to(query.dtype), lse[0] if lse else None

    images, heads = _slice_sizes(problem, axes)
    parts = -(-problem.num_heads // heads)
    biases = [None] * parts if terms is None else list(zip(*(term.split(heads) for term in terms), strict=True))
    tables = [()] * parts if not relative else list(zip(*(table.split(heads) for table in relative), strict=True))

    def attend_images(*tensors: Tensor) -> list[Tensor]:
        # Rows of head_dim numbers are gathered below: let them be rows in memory.
        rows = (tensor.to(dtype).contiguous().flatten(2, -2).split(heads, 1) for tensor in tensors)
        slices = zip(*rows, biases, tables, strict=True)
        found = [_attend_blocks(q, k, v, axes, places, b, r, scale, problem.lse) for q, k, v, b, r in slices]
        return [torch.cat(part, 1) for part in zip(*found, strict=True)]

    # split, not slices: its backward writes every gradient once.
    tensors = zip(query.split(images), key.split(images), value.split(images), strict=True)
    found = [attend_images(*part) for part in tensors]
    out, *lse = (torch.cat(part) for part in zip(*found, strict=True))
    return out.to(query.dtype), lse[0] if lse else None


def _constant(axis: Axis, cells: Any) -> Axis:
    """The axis in numbers for a compiler, which knows the fields of a window that it was given as an argument by symbols.

    The block as large as the map stays as open as the map.
    """
    numbers = {name: operator.index(getattr(axis, name)) for name in ("stride", "dilation", "shared_by")}
    kernel_size = axis.kernel_size
    return replace(
        axis, **numbers, kernel_size=kernel_size if kernel_size == 2 * cells - 1 else operator.index(kernel_size)
    )


def _slice_sizes(problem: Problem, axes: list[AxisBlocks]) -> tuple[int, int]:
    """Images and heads to take at once; compiled code fuses instead and takes all."""
    if problem.compiling:
        return problem.batch, problem.num_heads
    at_once = max(1, SLICE_SCORES // prod(axis.visible.numel() for axis in axes))
    return max(1, at_once // problem.num_heads), min(at_once, problem.num_heads)


@lru_cache(maxsize=256)
def _block_size(problem: Problem) -> int:
    """Queries of a block per axis: large blocks mask more pairs away, small ones gather more cells.

    The weights fit the times of 65 problems on one machine: a pair costs head_dim multiply-adds and the passes of a
    softmax, a gathered cell a few reads and writes of head_dim numbers.
    """
    depth = problem.head_dim
    phases = [min(_groups(axis), queries) for axis, queries in zip(problem.axes, problem.out_size, strict=True)]
    longest = [-(-queries // parts) for queries, parts in zip(problem.out_size, phases, strict=True)]

    def cost(block: int) -> int:
        pairs, cells = 1, 1
        for axis, parts, most, n in zip(problem.axes, phases, longest, problem.in_size, strict=True):
            blocks = -(-most // block)
            size = _whole_groups(axis, -(-most // blocks))
            span = _span(axis, size)
            cells *= parts * blocks * (min(span, n) if axis.masks else span)
            pairs *= size
        return cells * (pairs * (depth + 25) + 50 * depth)

    return min(sorted(set().union(*map(_even_sizes, longest))), key=cost)


def _even_sizes(queries: int) -> set[int]:
    """The sizes of even blocks that so many queries can be cut into: about 2 sqrt(queries), where most numbers give no other
    blocks than a smaller one."""
    root = isqrt(queries)
    return {*range(1, root + 1), *(-(-queries // blocks) for blocks in range(1, root + 2))}


class AxisBlocks(NamedTuple):
    """One axis cut into G blocks of b queries, each with its span of S cells."""

    queries: Tensor  # (G, b) the query in each place; places past the end repeat the last one
    out: Tensor  # (queries,) where each query is found in the flattened blocks
    cells: Tensor  # (G, S) the cell in each place of the span
    zero: Tensor  # (G, S) places outside the map that vote as zeros
    visible: Tensor  # (G, b, S) whether the query's window holds the cell
    entries: Tensor  # (G, b, S) the pair's index into a position table


class Places(NamedTuple):
    """All axes together, as indices into flattened maps."""

    queries: Tensor  # (*G, product of b)
    cells: Tensor  # (*G, product of S)
    out: Tensor  # (product of out,) where each query is found in the flattened blocks
    zero: Tensor | None  # (*G, product of S, 1) places outside the map that vote as zeros
    hidden: Tensor  # (*G, product of b, product of S) pairs that no window holds


def _combine(axes: list[AxisBlocks], problem: Problem) -> Places:
    rank = len(axes)
    groups, blocks = [cut.queries.shape[0] for cut in axes], [cut.queries.shape[1] for cut in axes]
    visible, inside = (torch.ones((), dtype=torch.bool, device=axes[0].out.device) for _ in range(2))
    for axis, cut in enumerate(axes):
        visible = visible & _align(cut.visible, rank, axis)
        inside = inside & ~_align(cut.zero, rank, axis)
    queries = _flat_index([_align(cut.queries, rank, axis) for axis, cut in enumerate(axes)], problem.out_size)
    cells = _flat_index([_align(cut.cells, rank, axis) for axis, cut in enumerate(axes)], problem.in_size)
    grid = [_align(cut.out // block, rank, axis) for axis, (cut, block) in enumerate(zip(axes, blocks, strict=True))]
    place = [_align(cut.out % block, rank, axis) for axis, (cut, block) in enumerate(zip(axes, blocks, strict=True))]
    return Places(
        queries=queries.flatten(rank),
        cells=cells.flatten(rank),
        out=_flat_index([*grid, *place], [*groups, *blocks]).flatten(),
        zero=~inside.flatten(rank)[..., None] if any(axis.border == "zeros" for axis in problem.axes) else None,
        hidden=~visible.flatten(rank, 2 * rank - 1).flatten(rank + 1),
    )


def _settled(index: Tensor) -> Tensor:
    """The same indices, read from memory where code is compiled: with all formulas put into one another, PyTorch's inductor
    goes on simplifying those of a sliding, dilated window without end."""
    return _written_out(index) if torch.compiler.is_compiling() and not is_exporting() else index


@torch.library.custom_op("nearsight::written_out", mutates_args=())
def _written_out(index: Tensor) -> Tensor:
    return index.clone()


@_written_out.register_fake
def _(index: Tensor) -> Tensor:
    return torch.empty_like(index)


def _flat_index(indices: list[Tensor], size: Sequence[Any]) -> Tensor:
    """The row-major index of a place from its index along every axis."""
    flat = torch.zeros_like(indices[0])
    for index, n in zip(indices, size, strict=True):
        flat = flat * n + index
    return flat


def _cut(axis: Axis, cells: Any, arange: Callable[[Any], Any], block: int) -> AxisBlocks:
    """Cut the queries of every dilation phase into blocks."""
    queries = axis.output_size(cells)
    groups = smaller(_groups(axis), queries)
    longest = (queries + groups - 1) // groups
    blocks = (longest + block - 1) // block
    # No larger than it need be: what pads the last block is wasted.
    block = _whole_groups(axis, (longest + blocks - 1) // blocks)
    span = _span(axis, block)
    if axis.masks:
        # No cell outside takes part, so the span need not reach there.
        span = smaller(span, axis.steps(0, cells))
    return _lay_out(axis, cells, arange, groups, blocks, block, span)


def cut_any_size(axis: Axis, cells: Any, arange: Callable[[Any], Any], block: int) -> AxisBlocks:
    """The same for a size that is left open: the number of blocks depends on it and nothing else, however small the map.

    Every other size is a number then, so that PyTorch has one short formula to reason about.

    Args:
        cells: a number, or what computes like one; then what ``arange`` makes of it is a tensor, or computes like one.
    """
    groups, (block, span) = _groups(axis), block_and_span(axis, block)
    blocks = (axis.output_size(cells) + groups * block - 1) // (groups * block)
    return _lay_out(axis, cells, arange, groups, blocks, block, span, whole=True)


def all_blocks_alike(axis: Axis) -> bool:
    """Whether, where the size is left open, a place of the span has the same entry for the n-th query of every block."""
    if axis.causal:
        return axis.shared_by == 1
    return axis.border != "shift" and (axis.shared_by == 1 or _begins_with_a_group(axis))


def block_and_span(axis: Axis, block: int) -> tuple[int, int]:
    """Queries of a block of at least so many, and the cells of its span, where the size is left open."""
    block = _whole_groups(axis, block)
    return block, _span(axis, block)


def _groups(axis: Axis) -> int:
    """Query p lies on phase p * stride % dilation, which repeats every so many queries."""
    return axis.dilation // gcd(axis.stride, axis.dilation)


def _apart(axis: Axis) -> int:
    """Neighbouring queries of a phase are so many of its steps apart."""
    return axis.stride // gcd(axis.stride, axis.dilation)


def _whole_groups(axis: Axis, block: Any) -> Any:
    """So many queries or a few more, so that no block ends between queries that share a window."""
    if axis.shared_by == 1:
        return block
    several = lcm(axis.shared_by, _apart(axis)) // _apart(axis)
    return (block + several - 1) // several * several


def _span(axis: Axis, block: Any) -> Any:
    """Steps that the windows of a block reach.

    From the first query to the last there are ``(block - 1) * _apart(axis)`` steps, and to the last window as many as there
    are in whole groups: those rounded down where the block begins with a group, as it does but on phases whose first query
    lies within one.
    """
    between, g = (block - 1) * _apart(axis), axis.shared_by
    return (between if _begins_with_a_group(axis) else between + g - 1) // g * g + axis.kernel_size


def _begins_with_a_group(axis: Axis) -> bool:
    """Whether the first query of every phase lies at the start of a group."""
    return (_groups(axis) - 1) * axis.stride < axis.dilation


def _lay_out(
    axis: Axis,
    cells: Any,
    arange: Callable[[Any], Any],
    groups: Any,
    blocks: Any,
    block: Any,
    span: Any,
    whole: bool = False,
) -> AxisBlocks:
    """The tables of an axis; ``whole`` spans were not cut to the map."""
    queries = axis.output_size(cells)
    group = arange(groups)[:, None, None]
    nth = arange(blocks * block).view(1, blocks, block)
    query = group + groups * nth
    step = query * axis.stride // axis.dilation
    phase = (query * axis.stride % axis.dilation)[..., :1]
    steps = axis.steps(phase, cells)
    first = _settled(axis.first_step(step, steps))
    start = first[..., :1]
    if axis.masks and not (whole and all_blocks_alike(axis)):
        start = larger(smaller(start, steps - span), 0 * start)
    place = start + arange(span)
    offset = place[..., None, :] - first[..., None]
    visible = (offset >= 0) & (offset < axis.kernel_size)
    inside = (place >= 0) & (place < steps)
    if axis.masks:
        visible = visible & inside[..., None, :]
    if axis.causal and axis.shared_by > 1:
        visible = visible & axis.may_see(place[..., None, :], step[..., None])
    entries = axis.entry(place[..., None, :], step[..., None], first[..., None]).clamp(0, axis.table_size - 1)
    cell = phase + place * axis.dilation
    padding = query >= queries
    return AxisBlocks(
        queries=query.clamp(max=queries - 1).flatten(0, 1),
        out=_out(arange(queries), groups, blocks * block),
        # By a tensor: there is no ONNX for a remainder by a size that is left open.
        cells=(cell % (0 * cell + cells) if axis.border == "wrap" else cell.clamp(0, cells - 1)).flatten(0, 1),
        zero=(~inside if axis.border == "zeros" else inside & ~inside).flatten(0, 1),
        # Padding sees everything: what it computes is thrown away, but a softmax over nothing would be NaN.
        visible=(visible | padding[..., None]).flatten(0, 1),
        entries=entries.flatten(0, 1),
    )


def _out(query: Tensor, groups: Any, places: Any) -> Tensor:
    """Where query p is found in the flattened blocks: the groups stand one after another."""
    return query % groups * places + query // groups


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: list[AxisBlocks],
    places: Places,
    bias: tuple[Tensor, Tensor] | None,
    relative: Sequence[Tensor],
    scale: float,
    with_lse: bool,
) -> list[Tensor]:
    # A hidden pair gets weight 0, but 0 * inf is NaN and would reach queries that do not see the cell. A value that is not
    # finite is therefore carried by its key, whose score is masked where it is not seen, and taken out of the value.
    key = key + (value.detach() * 0).sum(-1, keepdim=True)
    value = torch.where(value.isfinite(), value, 0)
    query = _gather(query * scale, places.queries)
    key, value = (_gather(tensor, places.cells) for tensor in (key, value))
    if places.zero is not None:
        key, value = (tensor.masked_fill(places.zero, 0) for tensor in (key, value))
    logits = query @ key.transpose(-1, -2)  # B, N, *blocks, queries of the block, cells of the span
    for axis, table in enumerate(relative):
        logits = logits + _relative_logits(query, table, axes, axis)
    if bias is not None:
        logits = logits + bias[0]
    logits = logits.masked_fill(places.hidden, NOTHING)
    found = [logits.softmax(-1) @ value]
    if with_lse:
        found.append(logits.logsumexp(-1, keepdim=True))
    if bias is not None:  # queries that it lets see no key at all
        found = [one.masked_fill(bias[1], nothing) for one, nothing in zip(found, (0, NOTHING), strict=False)]
    size = [cut.out.shape[0] for cut in axes]
    out, *lse = (unflatten(tensor.flatten(2, -2).index_select(2, places.out), 2, size) for tensor in found)
    return [out, *(one.squeeze(-1) for one in lse)]


def _gather(tensor: Tensor, index: Tensor) -> Tensor:
    """(B, N, cells, D) -> (B, N, *index, D)."""
    return unflatten(tensor.index_select(2, index.flatten()), 2, index.shape)


def _relative_logits(query: Tensor, table: Tensor, axes: list[AxisBlocks], axis: int) -> Tensor:
    """q.r of one axis for every pair of a block and its span."""
    rank = len(axes)
    scores = query @ table.transpose(-1, -2)[(slice(None), *[None] * rank)]  # B, N, *G, queries, entries of the table
    groups = [cut.entries.shape[0] for cut in axes]
    queries = [cut.entries.shape[1] for cut in axes]
    spans = [cut.entries.shape[2] for cut in axes]
    index = _align(axes[axis].entries, rank, axis).flatten(-rank)  # *G, *b, cells of this axis
    index = index.expand(*groups, *queries, -1).flatten(rank, -2)
    logits = scores.gather(-1, index.expand(*scores.shape[:-1], -1))
    others = [1] * rank
    others[axis] = spans[axis]
    return unflatten(logits, -1, others).expand(*scores.shape[:-1], *spans).flatten(-rank)


def _block_bias(bias: Tensor, axes: list[AxisBlocks]) -> Tensor:
    """The table's entry for every pair: (N, *table_size) -> (N, *G, queries, cells)."""
    rank = len(axes)
    for axis, cut in enumerate(axes, start=1):
        bias = unflatten(bias.index_select(axis, cut.entries.flatten()), axis, cut.entries.shape)
        bias = bias.movedim((axis + 1, axis + 2), (bias.ndim - 2, bias.ndim - 1))
    # N, *G, then (b, S) for every axis: bring the b together.
    order = [*range(1 + rank), *range(1 + rank, 1 + 3 * rank, 2), *range(2 + rank, 1 + 3 * rank, 2)]
    return bias.permute(order).flatten(1 + rank, 2 * rank).flatten(2 + rank)


def _align(table: Tensor, rank: int, axis: int) -> Tensor:
    """Lay a (G, x, ...) table of one axis out as (*G, *x, ...), with ones along the other axes."""
    shape = [1] * (table.ndim * rank)
    shape[axis::rank] = table.shape
    return table.view(shape)
