# SPDX-License-Identifier: Apache-2.0
"""timm's form of Segment Anything's image encoder, ``samvit_*``."""

from __future__ import annotations

from timm.models.vision_transformer_sam import Attention, Block
from torch import Tensor, nn

from ..layers.whole import one_node
from .plain import is_measured, why_not_passed_by
from .segment_anything import attend_everywhere, attend_in_windows, why_not_in_place, why_not_relative


class SamAttention(Attention):
    """Attention over the map that it is given, which a block may have cut into windows."""

    does = "no table of all pairs of cells, in place of an attention mask"

    @staticmethod
    def why_not(module: Attention) -> str | None:
        return why_not_relative(module) or why_not_passed_by(module, "attn_drop")

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        if not is_measured(x) or (self.training and self.attn_drop.p):
            return super().forward(x)
        norms = (self.q_norm, self.k_norm)
        out = attend_everywhere(self.qkv(x), (self.rel_pos_h, self.rel_pos_w), self.num_heads, self.scale, norms)
        return self.proj_drop(self.proj(out))


class SamBlock(Block):
    """A block of windows, in which nothing is cut, padded and put together again."""

    does = "windows in place, neither cut out nor padded"

    @staticmethod
    def why_not(module: Block) -> str | None:
        attention = module.attn
        if (reason := why_not_in_place(module, (Attention, SamAttention))) is not None:
            return reason
        if not all(type(norm) is nn.Identity for norm in (attention.q_norm, attention.k_norm)):
            return "its keys are normalised, so that those past the map are no zeros"
        return why_not_passed_by(attention, "attn_drop")

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        attention = self.attn
        if not is_measured(x) or (self.training and self._has_chance()):
            return super().forward(x)
        out = attend_in_windows(self.norm1(x), attention, attention.num_heads, self.window_size)
        x = x + self.drop_path1(self.ls1(attention.proj_drop(out)))
        x = x.flatten(1, 2)  # as in timm, whose MLP is faster so
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x.unflatten(1, out.shape[1:3])

    def _has_chance(self) -> bool:
        """Whether training drops weights of attention, or windows by themselves: those are drawn one by one."""
        return bool(self.attn.attn_drop.p or getattr(self.drop_path1, "drop_prob", 0))
