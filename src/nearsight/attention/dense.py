# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own scaled_dot_product_attention, where every query sees the whole map: global attention.

Position terms become its additive mask. Its fused kernels have neither forward-mode nor double backward: the one is refused,
the other taken from ``blocked``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .any_order import of_any_order
from .problem import Call, Problem, laid_apart
from .softmax import let_see

name = "dense"
takes_groups = False


def unavailable() -> str | None:
    return None


def second_best(problem: Problem) -> str | None:
    return None


def why_not(problem: Problem) -> str | None:
    if problem.exporting:
        return "whether the block covers the map depends on its size, which an exported program leaves open"
    if not problem.covers:
        return "the block does not cover the map, and a dense score matrix would hold every pair of cells"
    if problem.forward_ad:
        return "the fused scaled_dot_product_attention has no forward-mode derivative"
    if problem.lse:
        return "scaled_dot_product_attention keeps the log-sum-exp to itself"
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    return of_any_order(lambda call: _attend(call, problem), call, problem)


def _attend(call: Call, problem: Problem) -> tuple[Tensor, None]:
    mask, alone = position_logits(call, problem)
    # The mask must have the dtype of the rest, and logits are never held in half precision.
    dtype = problem.dtype if mask is None else problem.compute_dtype
    flat = [laid_apart(tensor.flatten(2, -2).to(dtype)) for tensor in call[:3]]
    out = F.scaled_dot_product_attention(*flat, attn_mask=mask, scale=call.scale)
    if alone is not None:
        out = out.masked_fill(alone, 0)
    return out.unflatten(2, problem.out_size).to(problem.dtype), None


def position_logits(call: Call, problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """Bias and q.r for every pair of cells, (1 or B, N, queries, keys), or None without position terms; and which queries
    see no key for their bias, (1, N, queries, 1), as in :func:`let_see`, or None without one."""
    query, _, _, bias, relative, scale = call
    entries = [_entries(problem, axis, query.device) for axis in range(problem.rank)]
    logits = alone = None
    if bias is not None:
        logits = _bias_logits(bias.to(problem.compute_dtype), entries)
        flat, alone = let_see(logits.flatten(2, 1 + problem.rank).flatten(3))
        logits = flat.view(logits.shape)
    for axis, table in enumerate(relative or ()):
        term = scale * _relative_logits(query.to(problem.compute_dtype), table.to(problem.compute_dtype), entries, axis)
        logits = term if logits is None else logits + term
    if logits is None:
        return None, None
    pairs = (*problem.out_size, *problem.in_size)
    return logits.expand(-1, -1, *pairs).flatten(2, 1 + problem.rank).flatten(3), alone


def _entries(problem: Problem, axis: int, device: torch.device) -> Tensor:
    """The table entry of every (query, key) pair along one axis."""
    geometry, cells = problem.axes[axis], problem.in_size[axis]
    query = torch.arange(problem.out_size[axis], device=device)[:, None] * geometry.stride
    key = torch.arange(cells, device=device)
    return geometry.entry(key, query, geometry.first_step(query, cells))


def _bias_logits(bias: Tensor, entries: list[Tensor]) -> Tensor:
    for axis, index in enumerate(entries, start=1):
        bias = bias.index_select(axis, index.flatten()).unflatten(axis, index.shape).movedim(axis + 1, -1)
    return bias[None]


def _relative_logits(query: Tensor, table: Tensor, entries: list[Tensor], axis: int) -> Tensor:
    """q.r of one axis: (B, N, *out, *keys) with one key along every other axis."""
    rank = len(entries)
    scores = query @ table.mT[(slice(None), *[None] * (rank - 1))]  # B, N, *out, entries of the table
    shape = [1] * rank
    shape[axis] = entries[axis].shape[0]
    index = entries[axis].view(*shape, -1).expand(*scores.shape[:-1], -1)
    keys = [1] * rank
    keys[axis] = entries[axis].shape[1]
    return scores.gather(-1, index).unflatten(-1, keys)
