# SPDX-License-Identifier: Apache-2.0
"""Stand-alone self-attention for vision: the exact operation, its layers, and networks made of them."""

from . import compat as compat
from .attention import (
    attention_scores,
    attention_weights,
    backends,
    global_attention,
    local_attention,
    merge_attentions,
)
from .conversion import convert
from .inspect import (
    attention_maps,
    attention_rollout,
    attention_statistics,
    equivariance_by_layer,
    equivariance_error,
    explore,
)
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
    "attention_rollout",
    "attention_scores",
    "attention_statistics",
    "attention_weights",
    "backends",
    "convert",
    "create_model",
    "equivariance_by_layer",
    "equivariance_error",
    "explore",
    "global_attention",
    "list_models",
    "local_attention",
    "merge_attentions",
]
