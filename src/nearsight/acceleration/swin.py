# SPDX-License-Identifier: Apache-2.0
"""Attention in Swin's windows, in whoever's words: Liu et al. 2021 (arXiv:2103.14030) and 2022 (arXiv:2111.09883).

    logit[p, c] = scale * q[p].k[c] + bias[c - p] + mask[p, c]

With 49 or 64 cells a window is a small dense problem, for which PyTorch's fused attention was measured to be faster than our
kernel, and faster than logits and weights that are written out, most of all where shifted windows add a mask. In training it
gains nothing, and the makers' forward runs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

DOES = "PyTorch's fused attention in inference, in place of logits and weights that are written out"


def attend(qkv: Tensor, bias: Tensor, mask: Tensor | None, num_heads: int, logit_scale: Tensor | None = None) -> Tensor:
    """Attention in windows of N cells, (B*M, N, 3*C) -> (B*M, N, C).

    Args:
        bias: (1, heads, N, N).
        mask: (M, N, N), of the M windows of a map; None where all cells of a window see each other.
        logit_scale: (heads, 1, 1), of the second version's cosines between query and key; None for the first's products.
    """
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    scale = None
    if logit_scale is not None:
        query, key, scale = F.normalize(query, dim=-1) * logit_scale, F.normalize(key, dim=-1), 1.0
    if mask is not None:
        bias = (bias + mask[:, None]).expand(len(qkv) // len(mask), -1, -1, -1, -1).flatten(0, 1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)
    return out.transpose(1, 2).flatten(2)
