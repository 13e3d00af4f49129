# SPDX-License-Identifier: Apache-2.0
"""FlexAttention: the graphics card's default. PyTorch compiles a kernel out of the window's mask and the position terms.

The map is taken as a row of cells, where it lies. Which pairs a window holds is a comparison of three numbers per axis,
taken from the geometry of :mod:`nearsight.window`; which blocks of pairs are held is listed from the windows' own cells, in
time and memory that grow with the map and not with its square, and kept for each size. Position terms are added to the
scores, bias by its table and q.r from a product per axis, so that both have their gradients. The borders "zeros" and "wrap"
lay the cells off the map beside it: a margin of zeros, or of the cells that follow around the torus.

A kernel serves every batch and size of a problem. Within ``torch.compile`` the same lines are traced, and the lists are an
operator of their own: what is compiled for open sizes asks it for them when it runs.

On the CPU PyTorch has the forward alone, written out over every pair, and there it runs only when it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..window import BORDERS, Axis, smaller
from .any_order import of_any_order
from .problem import Call, Problem, laid_apart

name = "flex"
takes_groups = True

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 128  # queries and cells of a block, of which the kernel skips those without a pair
LEAST_CHANNELS = 16  # of a matrix product on a graphics card
PAIRS_AT_ONCE = 1 << 22  # of a query and a cell, while the blocks that hold one are listed


def unavailable() -> str | None:
    return None


def why_not(problem: Problem) -> str | None:
    if problem.device not in ("cuda", "cpu"):
        return f"FlexAttention has a backward on CUDA devices only; the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"FlexAttention takes float32, bfloat16 and float16; the tensors are {problem.dtype}"
    if problem.device == "cpu" and problem.needs_grad:
        return "FlexAttention has no backward on the CPU"
    if problem.forward_ad or problem.transformed:
        return "FlexAttention is not for torch.func and has no forward-mode derivative"
    if problem.head_dim < 1 or problem.value_dim < 1:
        return "FlexAttention takes vectors of at least one channel"
    if problem.exporting:
        return "an exported program is of PyTorch's own operators, and FlexAttention is a program of its own"
    if problem.compiling and problem.device == "cpu":
        return "PyTorch's compiler for the CPU fails on FlexAttention where sizes are left open"
    return None


def second_best(problem: Problem) -> str | None:
    if problem.device == "cpu":
        return "on the CPU FlexAttention writes out every pair of a query and a cell"
    if problem.covers and not (problem.bias or problem.relative):
        return "where nothing is masked or added, scaled_dot_product_attention does the same with less"
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    return of_any_order(lambda call: _attend(call, problem), call, problem)


def _attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    query, key, value, bias, relative, scale = call
    if not problem.needs_grad:
        query, key, value = (one.detach() for one in (query, key, value))
    key, value = (_with_margin(tensor, problem) for tensor in (key, value))
    plan = (_traced_plan if problem.compiling else _plan)(problem.axes, problem.in_size, query.device)
    asked = Asked(problem.table_size, scale, problem.groups > 1, problem.lse)
    run = _program if problem.compiling or problem.device == "cpu" else _compiled(_kind(problem), asked)
    query, key, value = (tensor.flatten(2, -2) for tensor in (query, key, value))
    out, lse = run(query, key, value, bias, list(relative or ()), plan, asked)
    return out.unflatten(2, problem.out_size), None if lse is None else lse.unflatten(2, problem.out_size)


def _kind(problem: Problem) -> tuple[Any, ...]:
    """What a kernel is compiled for: all of a problem but the sizes of batch and map."""
    channels = problem.num_heads, problem.groups, problem.head_dim, problem.value_dim
    tables = problem.bias, problem.relative, problem.needs_grad
    return problem.axes, problem.dtype, problem.device, *channels, *tables


# --------------------------------------------------------------------------------------------------------------- geometry


class Line(NamedTuple):
    """One axis: the cell at ``place`` is in the window of a query if ``first <= place < end``.

    As a part of a :class:`Plan` it is that of the flattened map: a number per query, a number per cell.
    """

    first: Tensor  # (queries,)
    end: Tensor  # (queries,)
    entry: Tensor  # (queries,) the table's entry for the cell at ``first``; those of the next cells follow
    place: Tensor  # (cells,)


class Blocks(NamedTuple):
    """Blocks of one side that see blocks of the other, as BlockMask has them: how many (blocks,), which (blocks, others)."""

    count: Tensor
    which: Tensor


class Plan(NamedTuple):
    """All that follows from the geometry and the size."""

    lines: tuple[Line, ...]
    cells: Blocks  # of each block of queries, the blocks of cells
    queries: Blocks  # of each block of cells, the blocks of queries


@lru_cache(maxsize=128)
def _plan(axes: tuple[Axis, ...], in_size: tuple[int, ...], device: torch.device) -> Plan:
    lines = [_line(axis, n, device) for axis, n in zip(axes, in_size, strict=True)]
    out_size, cells = _sizes(axes, in_size)
    flat = tuple(
        Line(*(_flat(one, axis, size) for one, size in zip(line, (*[out_size] * 3, cells), strict=True)))
        for axis, line in enumerate(lines)
    )
    held = _held(axes, in_size, device)
    blocks = [-(-prod(size) // BLOCK) for size in (out_size, cells)]
    return Plan(flat, _listed(held, *blocks), _listed(held.flip(1), *reversed(blocks)))


def _sizes(axes: Sequence[Axis], in_size: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Queries and cells, margin and all, per axis."""
    pairs = list(zip(axes, in_size, strict=True))
    return [axis.output_size(n) for axis, n in pairs], [n + sum(_margin(axis)) for axis, n in pairs]


def _line(axis: Axis, cells: int, device: torch.device) -> Line:
    before, after = _margin(axis)
    cell = torch.arange(-before, cells + after, device=device)
    query = torch.arange(axis.output_size(cells), device=device) * axis.stride
    step, phase = query // axis.dilation, query % axis.dilation
    first = axis.first_step(step, axis.steps(phase, cells))
    end = smaller(first + axis.kernel_size, step + 1) if axis.causal else first + axis.kernel_size
    apart = cells + 4 * axis.kernel_size  # so far that no window reaches from one dilation phase into the next
    return Line(
        first=phase * apart + first,
        end=phase * apart + end,
        entry=axis.entry(first, step, first) + 0 * first,
        place=cell % axis.dilation * apart + cell // axis.dilation,
    )


def _margin(axis: Axis) -> tuple[int, int]:
    """How many cells off the map, before and after it, have a part in the softmax."""
    if axis.masks:
        return 0, 0
    after = 0 if axis.causal else axis.kernel_size - 1 - axis.left + axis.shared_by // 2
    return axis.left * axis.dilation, after * axis.dilation


def _flat(numbers: Tensor, axis: int, size: Sequence[int]) -> Tensor:
    """The numbers of one axis, for every place of a flattened map."""
    shape = [1] * len(size)
    shape[axis] = -1
    return numbers.int().view(shape).expand(*size).flatten()


# -------------------------------------------------------------------------------------------------- blocks that hold a pair


def _held(axes: Sequence[Axis], in_size: Sequence[int], device: torch.device) -> Tensor:
    """Every block of queries with every block of cells of which it sees one: (pairs, 2), in order."""
    out_size, size = _sizes(axes, in_size)
    seen = [_seen(axis, n, device) for axis, n in zip(axes, in_size, strict=True)]
    at_once = max(
        1, PAIRS_AT_ONCE // prod(one.shape[1] * (one.shape[0] if axis else 1) for axis, one in enumerate(seen))
    )
    blocks = -(-prod(size) // BLOCK)
    found = []
    for some in torch.arange(out_size[0], device=device).split(at_once):
        query, cell, inside = some[:, None], seen[0][some], seen[0][some] >= 0
        for queries, cells, one in zip(out_size[1:], size[1:], seen[1:], strict=True):
            query = (query[:, None] * queries + torch.arange(queries, device=device)[:, None]).flatten(0, 1)
            cell = (cell[:, None, :, None] * cells + one[:, None]).flatten(2).flatten(0, 1)
            inside = (inside[:, None, :, None] & (one >= 0)[:, None]).flatten(2).flatten(0, 1)
        found.append((query // BLOCK * blocks + cell // BLOCK)[inside].unique())
    both = torch.cat(found).unique()
    return torch.stack((both // blocks, both % blocks), 1)


def _seen(axis: Axis, cells: int, device: torch.device) -> Tensor:
    """The cells that each query sees along an axis, counted from the margin's first: (queries, places); -1 is none."""
    before, _ = _margin(axis)
    query = torch.arange(axis.output_size(cells), device=device)[:, None] * axis.stride
    step, phase = query // axis.dilation, query % axis.dilation
    steps = axis.steps(phase, cells)
    first, places = axis.first_step(step, steps), axis.kernel_size
    end = first + places
    if axis.masks:
        first, end, places = first.clamp(min=0), smaller(end, steps), min(places, cells)
    place = first + torch.arange(places, device=device)
    visible = (place < end) & (place <= step if axis.causal else place == place)
    return torch.where(visible, phase + place * axis.dilation + before, -1)


def _listed(held: Tensor, blocks: int, others: int) -> Blocks:
    """The lists of the first of each pair: the second ones in order. PyTorch wants a place for every block there is."""
    mine, theirs = held[torch.argsort(held[:, 0], stable=True)].unbind(1)
    count = torch.bincount(mine, minlength=blocks)
    nth = torch.arange(len(mine), device=held.device) - (count.cumsum(0) - count)[mine]
    which = torch.zeros(blocks, others, dtype=torch.int32, device=held.device)
    which[mine, nth] = theirs.int()
    return Blocks(count.int(), which)


# ------------------------------------------------------------------------------------------------------------- when compiled


def _traced_plan(axes: tuple[Axis, ...], in_size: tuple[Any, ...], device: torch.device) -> Plan:
    """The plan as an operator, which a compiled program asks for the sizes that it meets."""
    numbers = [[int(getattr(axis, name)) for axis in axes] for name in ("stride", "dilation", "causal", "shared_by")]
    borders = [BORDERS.index(axis.border) for axis in axes]
    tensors = _plan_of([axis.kernel_size for axis in axes], *numbers, borders, list(in_size), device)
    lines = tuple(Line(*tensors[4 * axis : 4 * axis + 4]) for axis in range(len(axes)))
    return Plan(lines, Blocks(*tensors[-4:-2]), Blocks(*tensors[-2:]))


@torch.library.custom_op("nearsight::flex_plan", mutates_args=())
def _plan_of(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[int],
    shared_by: Sequence[int],
    border: Sequence[int],
    in_size: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    plan = _plan(_axes(kernel_size, stride, dilation, causal, shared_by, border), tuple(in_size), device)
    # Copies: a compiled program may write its next result over what it has read.
    return [one.clone() for one in (*sum(plan.lines, ()), *plan.cells, *plan.queries)]


@_plan_of.register_fake
def _(*geometry_and_device: Any) -> list[Tensor]:
    *geometry, in_size, device = geometry_and_device
    axes = _axes(*geometry)
    out_size, cells = _sizes(axes, in_size)
    blocks = [(prod(size) + BLOCK - 1) // BLOCK for size in (out_size, cells)]
    shapes = [*[[prod(out_size)]] * 3, [prod(cells)]] * len(axes)
    shapes += [blocks[:1], blocks, blocks[1:], blocks[::-1]]
    return [torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes]


def _axes(*geometry: Sequence[int]) -> tuple[Axis, ...]:
    return tuple(
        Axis(kernel_size, stride, dilation, BORDERS[border], bool(causal), shared_by)
        for kernel_size, stride, dilation, causal, shared_by, border in zip(*geometry, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- scores, margin


def _mask(lines: Sequence[Line]) -> Callable[..., Tensor]:
    def mask(batch: Tensor, head: Tensor, query: Tensor, cell: Tensor) -> Tensor:
        held = query >= 0
        for line in lines:
            held = held & (line.first[query] <= line.place[cell]) & (line.place[cell] < line.end[query])
        return held

    return mask


def _score(
    lines: Sequence[Line], table_size: Sequence[int], bias: Tensor | None, relative: Sequence[Tensor]
) -> Callable[..., Tensor] | None:
    """Adds the bias (N, entries of all axes), and q.r for every entry of each axis (B, N, queries, entries)."""
    if bias is None and not relative:
        return None

    def score(logit: Tensor, batch: Tensor, head: Tensor, query: Tensor, cell: Tensor) -> Tensor:
        # Pairs that no window holds have no entry; they are masked, but have to read one.
        entries = [
            (line.place[cell] - line.first[query] + line.entry[query]).clamp(0, size - 1)
            for line, size in zip(lines, table_size, strict=True)
        ]
        if bias is not None:
            flat = entries[0]
            for entry, size in zip(entries[1:], table_size[1:], strict=True):
                flat = flat * size + entry
            logit = logit + bias[head, flat]
        for table, entry in zip(relative, entries, strict=False):
            logit = logit + table[batch, head, query, entry]
        return logit

    return score


def _with_margin(tensor: Tensor, problem: Problem) -> Tensor:
    """Lay the cells off the map that have a part in the softmax beside it."""
    for dim, (axis, cells) in enumerate(zip(problem.axes, problem.in_size, strict=True), start=2):
        before, after = _margin(axis)
        if axis.border == "wrap":
            tensor = tensor.index_select(dim, torch.arange(-before, cells + after, device=tensor.device) % cells)
        elif before or after:
            tensor = F.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (before, after))
    return tensor


# ----------------------------------------------------------------------------------------------------------------- running


class Asked(NamedTuple):
    """What a program is compiled for beside the shapes of its tensors."""

    table_size: tuple[int, ...]
    scale: float
    grouped: bool
    lse: bool


def _program(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    relative: Sequence[Tensor],
    plan: Plan,
    asked: Asked,
) -> tuple[Tensor, Tensor | None]:
    """The operation on rows, (B, N, queries or cells, D)."""
    from torch.nn.attention import flex_attention as flex

    # A masked pair has weight 0, but 0 * inf is NaN: what is not finite is carried by its key, whose score is masked.
    key = key + (value.detach() * 0).sum(-1, keepdim=True)
    value_dim, value = value.shape[-1], torch.where(value.isfinite(), value, 0)
    wide = torch.promote_types(query.dtype, torch.float32)
    products = [asked.scale * (query.to(wide) @ table.to(wide).mT) for table in relative]
    flat = None if bias is None else bias.to(wide).flatten(1)
    if query.device.type == "cpu" and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # PyTorch's compiler for CPUs reads them from memory alone.
        products = [torch.ops.nearsight.written_out(one) for one in products]
        flat = None if flat is None else torch.ops.nearsight.written_out(flat)
    mask = flex.BlockMask(
        (query.shape[2], key.shape[2]),
        kv_num_blocks=plan.cells.count[None, None],
        kv_indices=plan.cells.which[None, None],
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=plan.queries.count[None, None],
        q_indices=plan.queries.which[None, None],
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_mask(plan.lines),
    )
    options: dict[str, Any] = {
        "score_mod": _score(plan.lines, asked.table_size, flat, products),
        "block_mask": mask,
        "scale": asked.scale,
        "enable_gqa": asked.grouped,
    }
    query, key, value = (_row(tensor) for tensor in (query, key, value))
    if not asked.lse:
        return flex.flex_attention(query, key, value, **options)[..., :value_dim], None
    out, auxiliary = flex.flex_attention(query, key, value, **options, return_aux=flex.AuxRequest(lse=True))
    return out[..., :value_dim], auxiliary.lse


def _row(tensor: Tensor) -> Tensor:
    """The same with channels side by side, and as many as the kernel needs. Heads stay where they lie, last or first."""
    if tensor.device.type == "cuda" and tensor.shape[-1] < LEAST_CHANNELS:
        return F.pad(tensor, (0, LEAST_CHANNELS - tensor.shape[-1]))
    if torch.compiler.is_compiling():
        return tensor
    return laid_apart(tensor) if tensor.stride(-1) == 1 else tensor.contiguous()


@lru_cache(maxsize=128)
def _compiled(kind: tuple[Any, ...], asked: Asked) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A kernel for one kind of problem, whatever its batch and map. torch.compile counts compilations per code object, and
    gives up after a few: so each has its own."""
    return torch.compile(FunctionType(_program.__code__.replace(), globals(), _program.__name__))
