# SPDX-License-Identifier: Apache-2.0
"""timm's bottleneck attention over the whole map: Srinivas et al. 2021 (arXiv:2101.11605).

    logit[p, c] = scale * q[p].k[c] + q[p].r[c - p]

An option scales both terms. In training it gains nothing, and the makers' forward runs.
"""

from __future__ import annotations

from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor

from ..attention import global_attention
from ..layers.projection import merge_heads, split_heads
from ..layers.whole import one_node
from .plain import is_inference, why_not_passed_by


class BottleneckAttention(BottleneckAttn):
    """Attention over the whole map that its tables were made for."""

    does = "no table of all pairs of cells, in inference"

    @staticmethod
    def why_not(module: BottleneckAttn) -> str | None:
        return why_not_passed_by(module, "pos_embed")

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        position = self.pos_embed
        if not is_inference(self, x) or tuple(x.shape[2:]) != (position.height, position.width):
            return super().forward(x)
        parts = self.qkv(x).split([self.dim_out_qk, self.dim_out_qk, self.dim_out_v], 1)
        query, key, value = (split_heads(part, self.num_heads) for part in parts)
        factor = 1.0 if self.scale_pos_embed else 1 / self.scale
        tables = (position.height_rel, position.width_rel)
        relative = [(table * factor).expand(self.num_heads, -1, -1) for table in tables]
        return self.pool(merge_heads(global_attention(query, key, value, relative=relative, scale=self.scale), x))
