# SPDX-License-Identifier: Apache-2.0
"""Attention of Segment Anything's image encoder, in whoever's words: Kirillov et al. 2023 (arXiv:2304.02643).

    logit[p, c] = scale * q[p].k[c] + q[p].rows[p_y - c_y] + q[p].columns[p_x - c_x]

over the whole map, or over windows that share no cell. It is our operation with tables turned round, as ours count from the
query to the key, and divided by the scale, which ours are multiplied with.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import global_attention, local_attention
from ..window import Window
from .plain import why_not_passed_by, why_not_plain


def why_not_relative(attention: Any) -> str | None:
    """Why attention stays as it is, of any of the makers."""
    return None if attention.use_rel_pos else "without relative positions PyTorch's own attention does the same"


def why_not_in_place(block: Any, kinds: tuple[type, ...]) -> str | None:
    """Why a block goes on cutting its map into windows; ``kinds`` are what its attention may be."""
    attention = block.attn
    if not block.window_size:
        return "its attention is over the whole map: nothing is cut"
    if type(attention) not in kinds or not attention.use_rel_pos:
        return "its attention is another"
    passed_by = why_not_passed_by(block, "attn") or why_not_passed_by(attention, "qkv proj", nn.Linear)
    return passed_by or why_not_plain(attention)


def attend_everywhere(
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    num_heads: int,
    scale: float,
    norms: tuple[nn.Module, nn.Module] | None = None,
) -> Tensor:
    """Attention over the whole map, (B, H, W, 3*N*D) -> (B, H, W, N*D); ``norms`` are those of query and key."""
    query, key, value = _split(qkv, num_heads)
    if norms is not None:
        query, key = norms[0](query), norms[1](key)
    sides = qkv.shape[1:3]
    relative = [_table(table, side, num_heads, scale) for table, side in zip(tables, sides, strict=True)]
    return _join(global_attention(query, key, value, relative=relative, scale=scale))


def attend_in_windows(x: Tensor, attention: Any, num_heads: int, side: int) -> Tensor:
    """Projections and attention in windows of ``side`` times ``side`` cells, (B, H, W, C) -> (B, H, W, C).

    The last windows reach past the map. The cells there are zeros before they are projected, so that their keys and values
    are the projection's biases b. These are left out here, for all cells: the logits of a query then differ by q.b, all of
    them, which the softmax does not see, and its output by b, as weights sum to one. Keys and values past the map are then
    zeros, the window's border of that name, and nothing is copied to make windows of.
    """
    qkv, proj = attention.qkv, attention.proj
    of_query, of_out = qkv.bias, proj.bias
    if qkv.bias is not None:
        width = len(qkv.bias) // 3
        of_query = F.pad(qkv.bias[:width], (0, 2 * width))
        of_out = F.linear(qkv.bias[2 * width :], proj.weight, proj.bias)
    query, key, value = _split(F.linear(x, qkv.weight, of_query), num_heads)
    tables = (attention.rel_pos_h, attention.rel_pos_w)
    relative = [_table(table, side, num_heads, attention.scale) for table in tables]
    window = Window(side, border="zeros", shared_by=side)
    out = local_attention(query, key, value, window, relative=relative, scale=attention.scale)
    return F.linear(_join(out), proj.weight, of_out)


def _split(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """(B, H, W, 3*N*D) -> three of (B, N, H, W, D), views."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)


def _join(out: Tensor) -> Tensor:
    """(B, N, H, W, D) -> (B, H, W, N*D)."""
    return out.permute(0, 2, 3, 1, 4).flatten(3)


def _table(table: Tensor, side: int, num_heads: int, scale: float) -> Tensor:
    """A table of one axis for ``side`` cells, made longer or shorter along a line where it is for others, as our operation
    takes it: (entries, D) -> (N, 2 * side - 1, D)."""
    entries = 2 * side - 1
    if len(table) != entries:
        table = F.interpolate(table.T[None], size=entries, mode="linear")[0].T
    return (table.flip(0) / scale).expand(num_heads, -1, -1)
