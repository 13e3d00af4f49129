# SPDX-License-Identifier: Apache-2.0
"""The paper's equation, written out: the meaning of every other backend, in any dtype, slow on purpose.

    y[p] = sum_{c in N(p)} softmax_c( scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p] ) v[c]

(Ramachandran et al. 2019, arXiv:1906.05909, eq. 3; the bias table is that of Swin and NAT.) Every query's window is
gathered into a tensor of its own, so memory grows with the number of cells in the window. It serves all queries or, to look
at large maps, some of them.

Axis letters: b batch, n heads, d head_dim; p q r output cells; i j k places in the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from .problem import Call, Problem
from .softmax import NOTHING, log_sum_exp, softmax

name = "reference"
takes_groups = False


def unavailable() -> str | None:
    return None


def second_best(problem: Problem) -> str | None:
    return None


def why_not(problem: Problem) -> str | None:
    if problem.exporting:
        return "the reference looks up every window's cells, which an exported program that leaves its size open cannot"
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    query, _, value, *_ = call
    scores = attention_scores(call, problem)
    values = windows(value.to(problem.compute_dtype), blocks(problem, query.device))
    out, places = " ".join("pqr"[: problem.rank]), " ".join("ijk"[: problem.rank])
    y = einsum(softmax(scores, problem.rank), values, f"b n {out} {places}, b n {out} {places} d -> b n {out} d")
    return y.to(query.dtype), log_sum_exp(scores, problem.rank) if problem.lse else None


def attention_scores(call: Call, problem: Problem, queries: Tensor | None = None) -> Tensor:
    """The logits of every query's window, (B, N, *out, *kernel_size), -inf where a cell takes no part.

    With ``queries`` (Q, rank), the index of each along every axis of the output, of those alone: (B, N, Q, *kernel_size).
    """
    query, key, _, bias, relative, scale = call
    query, key = query.to(problem.compute_dtype), key.to(problem.compute_dtype)
    block = blocks(problem, query.device, queries)
    if queries is not None:
        query = query[(slice(None), slice(None), *queries.T)]
    out, places = " ".join("pqr"[: query.ndim - 3]), " ".join("ijk"[: problem.rank])
    logits = scale * einsum(query, windows(key, block), f"b n {out} d, b n {out} {places} d -> b n {out} {places}")
    for axis, table in enumerate(relative or ()):
        logits = logits + scale * relative_logits(query, table.to(query.dtype), block, axis)
    if bias is not None:
        logits = logits + bias_logits(bias.to(query.dtype), block)
    return logits.masked_fill(~_everywhere([cell != -1 for cell in block.cells]), NOTHING)


class Blocks(NamedTuple):
    """The memory blocks of all queries, or of some: (*out, *kernel_size) or (Q, *kernel_size) each, or ones that it is
    broadcast along."""

    in_size: tuple[int, ...]
    cells: list[Tensor]  # per axis the cell in each place, as :meth:`Axis.neighbours` has it
    entries: list[Tensor]  # per axis the place's index into a position table


def blocks(problem: Problem, device: torch.device, queries: Tensor | None = None) -> Blocks:
    rank, tables = problem.rank, []
    for axis, (rule, n) in enumerate(zip(problem.axes, problem.in_size, strict=True)):
        some = torch.arange(problem.out_size[axis], device=device) if queries is None else queries[:, axis]
        table = rule.neighbours(n, some)  # queries of the axis, its places, 2
        along = [-1] if queries is not None else [len(some) if other == axis else 1 for other in range(rank)]
        places = [rule.kernel_size if other == axis else 1 for other in range(rank)]
        tables.append(table.view(*along, *places, 2))
    return Blocks(problem.in_size, [table[..., 0] for table in tables], [table[..., 1] for table in tables])


def windows(tensor: Tensor, block: Blocks) -> Tensor:
    """The cells of every memory block: (B, N, *in, D) -> (B, N, *out, *kernel_size, D), zero outside the map."""
    flat = _row_major([cell.clamp(min=0) for cell in block.cells], block.in_size)
    gathered = tensor.flatten(2, -2).index_select(2, flat.flatten()).unflatten(2, flat.shape)
    return gathered.masked_fill(~_everywhere([cell >= 0 for cell in block.cells])[..., None], 0)


def bias_logits(bias: Tensor, block: Blocks) -> Tensor:
    """The table's entry for every place: (N, *table_size) -> (N, *out, *kernel_size)."""
    flat = _row_major(block.entries, bias.shape[1:])
    return bias.flatten(1).index_select(1, flat.flatten()).unflatten(1, flat.shape)


def relative_logits(query: Tensor, table: Tensor, block: Blocks, axis: int) -> Tensor:
    """q.r of one axis, (B, N, *out, *places) with one place along every other axis."""
    entries = block.entries[axis]
    vectors = table.index_select(1, entries.flatten()).unflatten(1, entries.shape)  # N, (*out, *places), D
    places = [None] * (entries.ndim - query.ndim + 3)
    return (query[(..., *places, slice(None))] * vectors).sum(-1)


def _row_major(indices: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    flat = torch.zeros((), dtype=torch.long, device=indices[0].device)
    for index, n in zip(indices, size, strict=True):
        flat = flat * n + index
    return flat


def _everywhere(per_axis: Sequence[Tensor]) -> Tensor:
    """Where it is so along all axes."""
    found = per_axis[0]
    for one in per_axis[1:]:
        found = found & one
    return found
