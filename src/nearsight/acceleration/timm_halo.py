# SPDX-License-Identifier: Apache-2.0
"""timm's halo attention: HaloNet (Vaswani et al. 2021, arXiv:2103.12731) as its networks have it.

    logit[p, c] = scale * q[p].k[c] + q[p].r[c - p]

in blocks with halos, where cells past the map take part with keys and values of zero. An option scales both terms. A table
counts keys from the corner of the halo and queries from that of the block, so that our entry e is theirs at e + halo, and
the last ones are out of every query's reach.
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor

from ..attention import local_attention
from ..layers.projection import merge_heads, split_heads
from ..layers.whole import one_node
from ..window import Window
from .plain import is_measured, why_not_passed_by


class HaloAttention(HaloAttn):
    """Halo attention without copies of the keys and values of every block."""

    does = "blocks with halos in place, in place of copies of their keys and values"

    @staticmethod
    def why_not(module: HaloAttn) -> str | None:
        if module.block_stride > 1:
            return "its strided queries count offsets as if they were neighbours, which no window does"
        return why_not_passed_by(module, "pos_embed")

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if not is_measured(x) or height % self.block_size or width % self.block_size:
            return super().forward(x)
        query = split_heads(self.q(x), self.num_heads)
        key, value = split_heads(self.kv(x), self.num_heads).split([self.dim_head_qk, self.dim_head_v], -1)
        relative = [self._table(table) for table in (self.pos_embed.height_rel, self.pos_embed.width_rel)]
        window = Window(self.win_size, border="zeros", shared_by=self.block_size)
        out = local_attention(query, key, value, window, relative=relative, scale=self.scale)
        return self.pool(merge_heads(out, x))

    def _table(self, table: Tensor) -> Tensor:
        """As our operation takes it: (entries, D) -> (N, entries, D)."""
        table = F.pad(table[self.halo_size :], (0, 0, 0, self.halo_size))
        if not self.scale_pos_embed:
            table = table / self.scale
        return table.expand(self.num_heads, -1, -1)
