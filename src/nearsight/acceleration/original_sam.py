# SPDX-License-Identifier: Apache-2.0
"""Segment Anything's image encoder in the form of its authors' package, ``segment_anything``."""

from __future__ import annotations

from segment_anything.modeling.image_encoder import Attention, Block
from torch import Tensor

from ..layers.whole import one_node
from .plain import is_measured
from .segment_anything import attend_everywhere, attend_in_windows, why_not_in_place, why_not_relative


class OriginalAttention(Attention):
    """Attention over the map that it is given, which a block may have cut into windows."""

    does = "no table of all pairs of cells"
    why_not = staticmethod(why_not_relative)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        if not is_measured(x):
            return super().forward(x)
        tables = (self.rel_pos_h, self.rel_pos_w)
        return self.proj(attend_everywhere(self.qkv(x), tables, self.num_heads, self.scale))


class OriginalBlock(Block):
    """A block of windows, in which nothing is cut, padded and put together again."""

    does = "windows in place, neither cut out nor padded"

    @staticmethod
    def why_not(module: Block) -> str | None:
        return why_not_in_place(module, (Attention, OriginalAttention))

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        if not is_measured(x):
            return super().forward(x)
        x = x + attend_in_windows(self.norm1(x), self.attn, self.attn.num_heads, self.window_size)
        return x + self.mlp(self.norm2(x))
