# SPDX-License-Identifier: Apache-2.0
"""The paper's equation, written out: the meaning of every other backend, in any dtype, slow on purpose.

    y[p] = sum_{c in N(p)} softmax_c( scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p] ) v[c]

(Ramachandran et al. 2019, arXiv:1906.05909, eq. 3; the bias table is that of Swin and NAT.) Every query's window is
gathered into a tensor of its own, so memory grows with the number of cells in the window.

Axis letters: b batch, n heads, d head_dim; p q r output cells; i j k places in the window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from torch import Tensor

from .problem import Problem
from .softmax import NOTHING, log_sum_exp, softmax

name = "reference"


def unavailable() -> str | None:
    return None


def why_not(problem: Problem) -> str | None:
    if problem.exporting:
        return "the reference looks up every window's cells, which an exported program that leaves its size open cannot"
    return None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    out, cells = _letters(problem)
    scores = attention_scores(query, key, problem, bias, relative, scale)
    values = windows(value.to(problem.compute_dtype), problem)
    y = einsum(softmax(scores, problem.rank), values, f"b n {out} {cells}, b n {out} {cells} d -> b n {out} d")
    return y.to(query.dtype), log_sum_exp(scores, problem.rank) if problem.lse else None


def attention_scores(
    query: Tensor,
    key: Tensor,
    problem: Problem,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    scale: float,
) -> Tensor:
    """The logits of every query's window: (B, N, *out, *kernel_size), -inf where a cell takes no part."""
    out, cells = _letters(problem)
    query, key = query.to(problem.compute_dtype), key.to(problem.compute_dtype)
    logits = scale * einsum(query, windows(key, problem), f"b n {out} d, b n {out} {cells} d -> b n {out} {cells}")
    for axis, table in enumerate(relative or ()):
        logits = logits + scale * relative_logits(query, table.to(query.dtype), problem, axis)
    if bias is not None:
        logits = logits + bias_logits(bias.to(query.dtype), problem)
    return logits.masked_fill(~takes_part(problem, query.device), NOTHING)


def windows(tensor: Tensor, problem: Problem) -> Tensor:
    """Every query's memory block: (B, N, *in, D) -> (B, N, *out, *kernel_size, D), zero outside the map."""
    cells = [_places(problem, axis, tensor.device)[0] for axis in range(problem.rank)]
    gathered = _gather(tensor, [index.clamp(min=0) for index in cells], first_axis=2)
    inside = _combine([index >= 0 for index in cells])
    return gathered.masked_fill(~inside[..., None], 0)


def takes_part(problem: Problem, device: torch.device) -> Tensor:
    """Which places of every window are in the softmax: (*out, *kernel_size)."""
    return _combine([_places(problem, axis, device)[0] != -1 for axis in range(problem.rank)])


def bias_logits(bias: Tensor, problem: Problem) -> Tensor:
    """The table's entry for every place: (N, *table_size) -> (N, *out, *kernel_size)."""
    entries = [_places(problem, axis, bias.device)[1] for axis in range(problem.rank)]
    return _gather(bias[..., None], entries, first_axis=1)[..., 0]


def relative_logits(query: Tensor, table: Tensor, problem: Problem, axis: int) -> Tensor:
    """q.r of one axis, (B, N, *out, *places) with one place along every other axis."""
    out, _ = _letters(problem)
    entries = _places(problem, axis, query.device)[1]
    vectors = table[:, entries]  # N, queries of the axis, places, D
    letter = out.split()[axis]
    logits = einsum(query, vectors, f"b n {out} d, n {letter} place d -> b n {out} place")
    places = [1] * problem.rank
    places[axis] = entries.shape[1]
    return logits.unflatten(-1, places)


def _letters(problem: Problem) -> tuple[str, str]:
    return " ".join("pqr"[: problem.rank]), " ".join("ijk"[: problem.rank])


def _places(problem: Problem, axis: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The cell and the table entry of every place of every query along one axis, each (queries, kernel_size)."""
    geometry = problem.axes[axis]
    queries = torch.arange(problem.out_size[axis], device=device)
    cells, entries = geometry.neighbours(problem.in_size[axis], queries).unbind(-1)
    return cells, entries


def _gather(tensor: Tensor, indices: list[Tensor], first_axis: int) -> Tensor:
    """Replace every map axis by (queries, places), queries first: (..., *in, D) -> (..., *out, *places, D)."""
    for axis, index in enumerate(indices, start=first_axis):
        tensor = tensor.index_select(axis, index.flatten()).unflatten(axis, index.shape).movedim(axis + 1, -2)
    return tensor


def _combine(per_axis: list[Tensor]) -> Tensor:
    """The outer "and" of one (queries, places) table per axis: (*out, *places)."""
    rank = len(per_axis)
    combined = torch.ones((), dtype=torch.bool, device=per_axis[0].device)
    for axis, table in enumerate(per_axis):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = table.shape
        combined = combined & table.view(shape)
    return combined
