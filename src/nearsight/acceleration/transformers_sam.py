# SPDX-License-Identifier: Apache-2.0
"""Segment Anything's image encoder in transformers, with PyTorch's scaled_dot_product_attention and without."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer, SamVisionSdpaAttention

from ..private import has_forward_hooks
from .plain import is_measured
from .segment_anything import attend_everywhere, attend_in_windows, why_not_in_place, why_not_relative


class SamVisionOurs(SamVisionAttention):
    """Attention over the map that it is given, which a layer may have cut into windows; no weights are returned.

    Who asks a model for ``output_attentions`` has hooks put on it, and where there are any the makers' forward runs.
    """

    does = "no table of all pairs of cells, and no weights returned"
    why_not = staticmethod(why_not_relative)

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None) -> tuple[Tensor, Tensor | None]:
        watched = output_attentions or has_forward_hooks(self)
        if watched or not is_measured(hidden_states) or (self.training and self.dropout):
            return super().forward(hidden_states, output_attentions)
        return _attend(self, hidden_states), None


class SamVisionSdpaOurs(SamVisionSdpaAttention):
    """Attention over the map that it is given, which a layer may have cut into windows."""

    does = "no table of all pairs of cells, in place of an attention mask"
    why_not = staticmethod(why_not_relative)

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> Any:
        if output_attentions or not is_measured(hidden_states):
            return super().forward(hidden_states, output_attentions)
        return _attend(self, hidden_states), None


class SamVisionLayerOurs(SamVisionLayer):
    """A layer of windows, in which nothing is cut, padded and put together again."""

    does = "windows in place, neither cut out nor padded"

    @staticmethod
    def why_not(module: SamVisionLayer) -> str | None:
        kinds = (SamVisionAttention, SamVisionSdpaAttention, SamVisionOurs, SamVisionSdpaOurs)
        return why_not_in_place(module, kinds)

    def forward(self, hidden_states: Tensor) -> Any:
        attention = self.attn
        chance = self.training and attention.dropout and not isinstance(attention, SamVisionSdpaAttention)
        if chance or has_forward_hooks(attention) or not is_measured(hidden_states):
            return super().forward(hidden_states)
        x = self.layer_norm1(hidden_states)
        x = hidden_states + attend_in_windows(x, attention, attention.num_attention_heads, self.window_size)
        return x + self.mlp(self.layer_norm2(x))


def _attend(attention: SamVisionAttention, x: Tensor) -> Tensor:
    tables = (attention.rel_pos_h, attention.rel_pos_w)
    return attention.proj(attend_everywhere(attention.qkv(x), tables, attention.num_attention_heads, attention.scale))
