# SPDX-License-Identifier: Apache-2.0
"""torchvision's Swin transformers, of both versions, whose attention cuts the map into windows itself."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from ..layers.whole import one_node
from . import swin
from .plain import is_inference, why_not_passed_by

APART = -100.0  # what torchvision adds to the logits of cells that only the shift brought into one window


class ShiftedAttention(ShiftedWindowAttention):
    """Attention in windows, of which every second layer's are shifted."""

    does = swin.DOES

    @staticmethod
    def why_not(module: ShiftedWindowAttention) -> str | None:
        return why_not_passed_by(module, "qkv proj", nn.Linear)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x) if is_inference(self, x) else super().forward(x)


class ShiftedAttentionV2(ShiftedWindowAttentionV2):
    """Attention by cosines in windows, of which every second layer's are shifted."""

    does = swin.DOES

    @staticmethod
    def why_not(module: ShiftedWindowAttentionV2) -> str | None:
        return why_not_passed_by(module, "qkv proj", nn.Linear)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x) if is_inference(self, x) else super().forward(x)


def _forward(module: ShiftedWindowAttention, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, C)."""
    window, height, width = module.window_size, *x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % window[1], 0, -height % window[0]))
    size = x.shape[1:3]
    shift = [step if cells > side else 0 for step, cells, side in zip(module.shift_size, size, window, strict=True)]
    x = _cut(x.roll([-step for step in shift], (1, 2)), window).flatten(1, 2)
    bias, logit_scale = module.qkv.bias, None
    if isinstance(module, ShiftedWindowAttentionV2):
        logit_scale = module.logit_scale.clamp(max=math.log(100)).exp()
        if bias is not None:  # the second version has none for keys, and clears what there is
            third = len(bias) // 3
            bias = torch.cat([bias[:third], bias.new_zeros(third), bias[2 * third :]])
    qkv = F.linear(x, module.qkv.weight, bias)
    mask = _mask(size, window, shift).to(x) if any(shift) else None
    out = swin.attend(qkv, module.get_relative_position_bias(), mask, module.num_heads, logit_scale)
    out = module.proj(out).unflatten(1, window).unflatten(0, (-1, size[0] // window[0], size[1] // window[1]))
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out.roll(shift, (1, 2))[:, :height, :width]


def _cut(x: Tensor, window: list[int]) -> Tensor:
    """(B, H, W, C) -> (B*M, *window, C)."""
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))
    return x.transpose(2, 3).flatten(0, 2)


def _mask(size: torch.Size, window: list[int], shift: list[int]) -> Tensor:
    """What is added to the logits of every window's pairs of cells, (M, N, N): those beyond a shift come from elsewhere."""
    rows, columns = (
        (torch.arange(cells) >= cells - step).long() if step else torch.zeros(cells, dtype=torch.long)
        for cells, step in zip(size, shift, strict=True)
    )
    regions = _cut((2 * rows[:, None] + columns)[None, ..., None], window).flatten(1)
    return (regions[:, :, None] != regions[:, None]) * APART
