# SPDX-License-Identifier: Apache-2.0
"""FlexAttention: the graphics card's default. PyTorch compiles a kernel out of the window's mask and the position terms.

The map is laid out as a row of cells. Which pairs a window holds is a comparison of three numbers per axis, taken from the
geometry of :mod:`nearsight.window`; which blocks of pairs are empty is worked out once per problem and kept. Position terms
are added to the scores, bias by its table and q.r from a product per axis, so that both have their gradients. The borders
"zeros" and "wrap" lay the cells off the map beside it: a margin of zeros, or of the cells that follow around the torus.

On the CPU PyTorch has its forward alone, written out over every pair, and there it runs only when it is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..window import Axis, smaller
from .any_order import of_any_order
from .problem import Call, Problem, laid_apart

name = "flex"
takes_groups = True

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 128  # queries and cells of a block, of which the kernel skips those without a pair
LEAST_CHANNELS = 16  # of a matrix product on a graphics card


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
    if problem.compiling:
        return "FlexAttention's block masks are kept from call to call, which code inside torch.compile cannot do"
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
    plan = _plan(problem.axes, problem.in_size, query.device)
    run = _flex if problem.device == "cpu" else _compiled(replace(problem, batch=1), query.device)
    if not problem.needs_grad:
        query, key, value = (one.detach() for one in (query, key, value))
    # A masked pair has weight 0, but 0 * inf is NaN: what is not finite is carried by its key, whose score is masked.
    key = key + (value.detach() * 0).sum(-1, keepdim=True)
    value = torch.where(value.isfinite(), value, 0)
    key, value = (_with_margin(tensor, problem) for tensor in (key, value))
    query, key, value = (_row(tensor) for tensor in (query, key, value))
    terms = _terms(query, problem, bias, relative, scale)
    score = _score(plan, *terms)
    out, lse = run(query, key, value, score, plan.blocks, scale, problem.groups > 1, problem.lse)
    out = out[..., : problem.value_dim].unflatten(2, problem.out_size)
    return out, None if lse is None else lse.unflatten(2, problem.out_size)


# ------------------------------------------------------------------------------------------------------------- geometry


class Line(NamedTuple):
    """One axis: the cell at ``place`` is in the window of a query if ``first <= place < end``."""

    first: Tensor  # (queries,)
    end: Tensor  # (queries,)
    entry: Tensor  # (queries,) the table's entry for the cell at ``first``; those of the next cells follow
    place: Tensor  # (cells,)


class Plan(NamedTuple):
    """All that follows from the geometry. Lines are those of the flattened map: a number per query, a number per cell."""

    lines: tuple[Line, ...]
    table_size: tuple[int, ...]
    blocks: Any  # PyTorch's BlockMask


@lru_cache(maxsize=128)
def _plan(axes: tuple[Axis, ...], in_size: tuple[int, ...], device: torch.device) -> Plan:
    from torch.nn.attention.flex_attention import BlockMask

    lines = [_line(axis, n, device) for axis, n in zip(axes, in_size, strict=True)]
    out_size, cells = [line.first.numel() for line in lines], [line.place.numel() for line in lines]
    flat = tuple(
        Line(*(_flat(one, axis, size) for one, size in zip(line, (*[out_size] * 3, cells), strict=True)))
        for axis, line in enumerate(lines)
    )
    held = _held_blocks([(line.first[:, None] <= line.place) & (line.place < line.end[:, None]) for line in lines])
    blocks = BlockMask.from_kv_blocks(
        held.sum(-1, dtype=torch.int32)[None, None],
        held.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask(flat),
        seq_lengths=(prod(out_size), prod(cells)),
    )
    return Plan(flat, tuple(axis.table_size for axis in axes), blocks)


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


def _held_blocks(holds: list[Tensor]) -> Tensor:
    """Whether any of a block's queries sees any of a block's cells: (blocks of queries, blocks of cells)."""
    out_size, letters = [one.shape[0] for one in holds], "xyz"[: len(holds)]
    queries = torch.arange(prod(out_size), device=holds[0].device)
    found = []
    for block in queries.split(BLOCK):
        index = torch.unravel_index(block, out_size)
        seen = [one[i].float() for one, i in zip(holds, index, strict=True)]
        cells = torch.einsum(f"{','.join(f'q{letter}' for letter in letters)}->{letters}", *seen).flatten()
        found.append(F.pad(cells, (0, -cells.numel() % BLOCK)).view(-1, BLOCK).amax(-1) > 0)
    return torch.stack(found)


def _mask(lines: tuple[Line, ...]) -> Callable[..., Tensor]:
    def mask(batch: Tensor, head: Tensor, query: Tensor, cell: Tensor) -> Tensor:
        held = query >= 0
        for line in lines:
            held = held & (line.first[query] <= line.place[cell]) & (line.place[cell] < line.end[query])
        return held

    return mask


# --------------------------------------------------------------------------------------------------------- scores, maps


def _terms(
    query: Tensor, problem: Problem, bias: Tensor | None, relative: Sequence[Tensor] | None, scale: float
) -> tuple[Tensor | None, list[Tensor]]:
    """The bias (N, entries of all axes), and q.r for every entry of each axis (B, N, queries, entries)."""
    dtype = problem.compute_dtype
    query = query[..., : problem.head_dim].to(dtype)
    flat = None if bias is None else bias.to(dtype).flatten(1)
    return flat, [scale * (query @ table.to(dtype).mT) for table in relative or ()]


def _score(plan: Plan, bias: Tensor | None, relative: list[Tensor]) -> Callable[..., Tensor] | None:
    if bias is None and not relative:
        return None
    lines, table_size = plan.lines, plan.table_size

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


def _row(tensor: Tensor) -> Tensor:
    """(B, N, *map, D) -> (B, N, cells, D) with channels side by side, and as many as the kernel needs."""
    tensor = tensor.flatten(2, -2)
    if tensor.device.type == "cuda" and tensor.shape[-1] < LEAST_CHANNELS:
        return F.pad(tensor, (0, LEAST_CHANNELS - tensor.shape[-1]))
    return laid_apart(tensor) if tensor.stride(-1) == 1 else tensor.contiguous()


# --------------------------------------------------------------------------------------------------------------- running


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Callable[..., Tensor] | None,
    blocks: Any,
    scale: float,
    grouped: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention import flex_attention as flex

    options = {"score_mod": score, "block_mask": blocks, "scale": scale, "enable_gqa": grouped}
    if not with_lse:
        return flex.flex_attention(query, key, value, **options), None
    out, auxiliary = flex.flex_attention(query, key, value, **options, return_aux=flex.AuxRequest(lse=True))
    return out, auxiliary.lse


@lru_cache(maxsize=128)
def _compiled(problem: Problem, device: torch.device) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A kernel for one problem, whatever its batch. torch.compile counts compilations per code object, and gives up after
    a few: so each has its own."""
    return torch.compile(FunctionType(_flex.__code__.replace(), globals(), _flex.__name__))
