# SPDX-License-Identifier: Apache-2.0
"""Attention in which groups of queries share a window: NATTEN's ``stride``, between sliding windows and Swin's blocks.

    y[p] = sum_{c in N(g(p))} softmax_c( scale * q[p].k[c] ) v[c]        g(p): the leader of the query's group

Blocks of whole groups meet the cells that they see in dense matrix products, without waste where ``stride`` is the window's
size. Scores are computed again in the backward, so that none is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .windows import (
    SLICE_SCORES,
    Blocks,
    Neighborhood,
    align,
    cut,
    gather_queries,
    gather_spans,
    ungather,
    without_autocast,
)


def attend(
    query: Tensor, key: Tensor, value: Tensor, axes: Sequence[Neighborhood], scale: float
) -> tuple[Tensor, Tensor]:
    """The mixed values (B, N, *map, E), and the log-sum-exp of the logits (B, N, *map) in float32 or wider."""
    size = query.shape[2:-1]
    blocks = [cut(axis, cells, query.device) for axis, cells in zip(axes, size, strict=True)]
    at_once = max(1, SLICE_SCORES // prod([prod(block.sizes) for block in blocks]))
    images, heads = max(1, at_once // query.shape[1]), min(at_once, query.shape[1])
    slices = [
        [_recomputed(q, k, v, blocks, scale) for q, k, v in zip(*(one.split(heads, 1) for one in some), strict=True)]
        for some in zip(*(tensor.split(images) for tensor in (query, key, value)), strict=True)
    ]
    out, lse = (torch.cat([torch.cat([part[i] for part in row], 1) for row in slices]) for i in (0, 1))
    return ungather(out, axes, blocks, size), ungather(lse[..., None], axes, blocks, size)[..., 0]


def _recomputed(query, key, value, blocks, scale) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        tensors = (query, key, value)
        return checkpoint(_attend_blocks, *tensors, blocks, scale, use_reentrant=False, preserve_rng_state=False)
    return _attend_blocks(query, key, value, blocks, scale)


def _attend_blocks(query, key, value, blocks: Sequence[Blocks], scale: float) -> tuple[Tensor, Tensor]:
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        query, key, value = (tensor.to(wide) for tensor in (query, key, value))
        # A hidden pair has weight 0, but 0 * inf is NaN: a value that is not finite is carried by its key, which is masked.
        key = key + (value.detach() * 0).sum(-1, keepdim=True)
        value = torch.where(value.isfinite(), value, 0)
        logits = scale * (gather_queries(query, blocks) @ gather_spans(key, blocks).mT)
        logits = logits.masked_fill(_hidden(blocks), float("-inf"))
        out = logits.softmax(-1) @ gather_spans(value, blocks)
    return out.to(dtype).flatten(2, -2), logits.logsumexp(-1).flatten(2)


def _hidden(blocks: Sequence[Blocks]) -> Tensor:
    """The pairs of a block and its span that no window holds: (*G, product of b, product of S)."""
    rank = len(blocks)
    visible = torch.ones((), dtype=torch.bool, device=blocks[0].cells.device)
    for axis, block in enumerate(blocks):
        visible = visible & align(block.place < block.column.shape[-1], rank, axis)
    return ~visible.flatten(2 * rank).flatten(rank, 2 * rank - 1)
