# SPDX-License-Identifier: Apache-2.0
"""timm's Swin transformers, of both versions."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor

from . import swin
from .plain import is_inference, why_not_passed_by


class SwinAttention(swin_transformer.WindowAttention):
    """Attention in windows that a block has cut out."""

    does = swin.DOES

    @staticmethod
    def why_not(module: swin_transformer.WindowAttention) -> str | None:
        if module.fused_attn:
            return "it calls PyTorch's fused attention already"
        return why_not_passed_by(module, "softmax attn_drop")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not is_inference(self, x):
            return super().forward(x, mask)
        out = swin.attend(self.qkv(x), self._get_rel_pos_bias(), mask, self.num_heads)
        return self.proj_drop(self.proj(out))


class SwinV2Attention(swin_transformer_v2.WindowAttention):
    """Attention by cosines in windows that a block has cut out."""

    does = swin.DOES

    @staticmethod
    def why_not(module: swin_transformer_v2.WindowAttention) -> str | None:
        return why_not_passed_by(module, "softmax attn_drop")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not is_inference(self, x):
            return super().forward(x, mask)
        qkv = self.qkv(x)
        if self.q_bias is not None:
            biases: Any = [self.q_bias, self.k_bias, self.v_bias]
            qkv = qkv + torch.cat(biases)
        logit_scale = torch.clamp(self.logit_scale, max=math.log(100)).exp()
        out = swin.attend(qkv, self._bias(), mask, self.num_heads, logit_scale)
        return self.proj_drop(self.proj(out))

    def _bias(self) -> Tensor:
        """The continuous bias of every pair of cells of a window, (1, heads, N, N)."""
        index: Any = self.relative_position_index
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, 2)
        bias = table[index.flatten()].unflatten(0, index.shape)
        return 16 * bias.sigmoid().permute(2, 0, 1)[None]
