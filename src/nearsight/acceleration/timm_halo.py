# SPDX-License-Identifier: Apache-2.0
"""timm's halo attention: HaloNet (Vaswani et al. 2021, arXiv:2103.12731) as its networks have it.

    logit[p, c] = scale * q[p].k[c] + q[p].r[c - p]

in blocks with halos, where cells past the map take part with keys and values of zero. An option scales both terms. A table
counts keys from the corner of the halo and queries from that of the block, so that our entry e is theirs at e + halo, and
the last ones are out of every query's reach. Where queries are strided, they are counted as if they were neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from torch import Tensor

from ..attention import local_attention
from ..attention.problem import is_exporting
from ..layers.projection import merge_heads, split_heads
from ..layers.whole import one_node
from ..window import Window
from .plain import is_inference, is_measured, why_not_passed_by

ENOUGH = (
    8  # images, below which a map of one block is inferred faster by the makers' forward: 0.83 to 0.98 of its speed
)
FEW = 4  # blocks, whose strided queries are compared with every cell rather than with copies of the cells of each block


class HaloAttention(HaloAttn):
    """Halo attention without copies of the keys and values of every block."""

    does = "blocks with halos in place, in place of copies of their keys and values"

    @staticmethod
    def why_not(module: HaloAttn) -> str | None:
        return why_not_passed_by(module, "pos_embed")

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        blocks = (height // self.block_size) * (width // self.block_size)
        strided = self.block_stride > 1
        fits = not (height % self.block_size or width % self.block_size)
        one = blocks == 1 and not strided and not is_exporting()
        if not is_measured(x) or not fits or (strided and blocks > FEW):
            return super().forward(x)
        if one and len(x) < ENOUGH and is_inference(self, x):
            return super().forward(x)
        query, joined = split_heads(self.q(x), self.num_heads), self.kv(x)
        if strided or one:
            out = self._attend_to_all(query, joined)
        else:
            out = self._attend_in_place(query, split_heads(joined, self.num_heads))
        return self.pool(merge_heads(out, x))

    def _attend_in_place(self, query: Tensor, joined: Tensor) -> Tensor:
        """By our operation: (B, N, H, W, D), (B, N, H, W, D + E) -> (B, N, H, W, E)."""
        key, value = joined.split([self.dim_head_qk, self.dim_head_v], -1)
        relative = [self._table(table) for table in (self.pos_embed.height_rel, self.pos_embed.width_rel)]
        window = Window(self.win_size, border="zeros", shared_by=self.block_size)
        return local_attention(query, key, value, window, relative=relative, scale=self.scale)

    def _table(self, table: Tensor) -> Tensor:
        """As our operation takes it: (entries, D) -> (N, entries, D)."""
        table = F.pad(table[self.halo_size :], (0, 0, 0, self.halo_size))
        if not self.scale_pos_embed:
            table = table / self.scale
        return table.expand(self.num_heads, -1, -1)

    def _attend_to_all(self, query: Tensor, joined: Tensor) -> Tensor:
        """With a logit for every query and every cell of the map and its halo: (B, N, P, Q, D), (B, N*(D+E), H, W) ->
        (B, N, P, Q, E).

        Where blocks are few that is less work than copies of what each of them sees.
        """
        halo = (self.halo_size,) * 4
        cells = F.pad(joined, halo).unflatten(1, (self.num_heads, -1)).flatten(0, 1)
        key, value = cells.flatten(2).split([self.dim_head_qk, self.dim_head_v], 1)
        batch, _, *size, _ = query.shape
        rows = self._logits_of_axis(query, self.pos_embed.height_rel, cells.shape[2])[..., None]
        columns = self._logits_of_axis(query.transpose(2, 3), self.pos_embed.width_rel, cells.shape[3])
        position = (rows + columns.transpose(2, 3)[..., None, :]).flatten(0, 1).flatten(1, 2).flatten(2)
        if self.scale_pos_embed:
            position = position * self.scale
        logits = torch.baddbmm(position, query.flatten(0, 1).flatten(1, 2), key, alpha=self.scale)
        out = logits.softmax(-1) @ value.mT
        return out.unflatten(0, (batch, -1)).unflatten(2, size)

    def _logits_of_axis(self, query: Tensor, table: Tensor, cells: int) -> Tensor:
        """q.r of every query and every cell of one axis, -inf where it is outside of the query's window.

        Shapes: query (B, N, P, Q, D), along the axis P; table (entries, D) -> (B, N, P, Q, cells).
        """
        place = torch.arange(query.shape[2], device=query.device)
        block, within = place // self.block_size_ds, place % self.block_size_ds
        step = (
            torch.arange(cells, device=query.device) - block[:, None] * self.block_size
        )  # within the block and its halo
        seen = (step >= 0) & (step < self.win_size)
        entry = (step - within[:, None] + self.win_size - 1).clamp(0, 2 * self.win_size - 2)
        logits = torch.einsum("bnpqd, pcd -> bnpqc", query, table[entry])
        return logits.masked_fill(~seen[:, None], float("-inf"))
