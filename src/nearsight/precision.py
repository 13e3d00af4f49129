# SPDX-License-Identifier: Apache-2.0
"""Logits, their softmax and the places behind them are computed in float32 or wider, whatever a network computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide_of(*tensors: Tensor) -> torch.dtype:
    """float32, or what holds these tensors if that is wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def without_autocast(device: str) -> AbstractContextManager:
    """On this kind of device, autocast narrows nothing within."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def has_short_range(x: Tensor) -> bool:
    """Whether what is computed of x overflows long before float32 does, as in float16, also by autocast."""
    device = x.device.type
    by_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if by_autocast else x.dtype
    return torch.finfo(dtype).max < torch.finfo(torch.float32).max / 2
