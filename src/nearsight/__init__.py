# SPDX-License-Identifier: Apache-2.0
"""Stand-alone self-attention for vision: the exact operation, its layers, and networks made of them."""

from .attention import attention_weights, backends, global_attention, local_attention
from .inspect import attention_maps, equivariance_error
from .layers import (
    AttentionStem2d,
    GlobalSelfAttention1d,
    GlobalSelfAttention2d,
    GlobalSelfAttention3d,
    HaloSelfAttention2d,
    LocalSelfAttention1d,
    LocalSelfAttention2d,
    LocalSelfAttention3d,
)
from .models import create_model, list_models
from .window import Window

__all__ = [
    "AttentionStem2d",
    "GlobalSelfAttention1d",
    "GlobalSelfAttention2d",
    "GlobalSelfAttention3d",
    "HaloSelfAttention2d",
    "LocalSelfAttention1d",
    "LocalSelfAttention2d",
    "LocalSelfAttention3d",
    "Window",
    "attention_maps",
    "attention_weights",
    "backends",
    "create_model",
    "equivariance_error",
    "global_attention",
    "list_models",
    "local_attention",
]
