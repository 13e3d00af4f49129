# SPDX-License-Identifier: Apache-2.0
"""Layers: projections, a position encoding and the operation, with the borders of ``nn.Conv1d/2d/3d``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..window import Window
from .self_attention import (
    GlobalSelfAttention1d,
    GlobalSelfAttention2d,
    GlobalSelfAttention3d,
    HaloSelfAttention2d,
    LocalSelfAttention1d,
    LocalSelfAttention2d,
    LocalSelfAttention3d,
    SelfAttention,
)
from .stem import AttentionStem2d

__all__ = [
    "AttentionLayer",
    "AttentionStem2d",
    "GlobalSelfAttention1d",
    "GlobalSelfAttention2d",
    "GlobalSelfAttention3d",
    "HaloSelfAttention2d",
    "LocalSelfAttention1d",
    "LocalSelfAttention2d",
    "LocalSelfAttention3d",
    "SelfAttention",
]


@runtime_checkable
class AttentionLayer(Protocol):
    """What a layer offers so that one can look at it; :func:`nearsight.attention_maps` finds layers by these names.

    A layer may also say ``channels_last = True``, for inputs of (B, *map, C) in place of (B, C, *map), and have
    ``tables_on(size)``: its position tables, ``(bias, relative)`` as in :func:`local_attention`.
    """

    rank: int
    num_heads: int

    def window_on(self, size: Sequence[int]) -> Window:
        """The memory block on a map of ``size`` cells."""
        ...

    def attention_weights(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The weights on input x, (B, N, *out, *kernel_size), or of chosen queries alone, (B, N, Q, *kernel_size).

        ``queries`` is (Q, rank): the index of each query along every axis of the output.
        """
        ...
