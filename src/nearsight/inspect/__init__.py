# SPDX-License-Identifier: Apache-2.0
"""Looking at what a network does: where it attends, and which symmetries it keeps."""

from .equivariance import ErrorTable, LayerError, draw_equivariance, equivariance_by_layer, equivariance_error
from .explore import Exploration, explore
from .maps import AttentionMap, AttentionMaps, attention_layers, attention_maps
from .rollout import attention_rollout
from .statistics import LayerStatistics, StatisticsTable, attention_statistics
from .transforms import Permutation, Reflection, Rotation90, Scaling, Transform, Translation

__all__ = [
    "AttentionMap",
    "AttentionMaps",
    "ErrorTable",
    "Exploration",
    "LayerError",
    "LayerStatistics",
    "Permutation",
    "Reflection",
    "Rotation90",
    "Scaling",
    "StatisticsTable",
    "Transform",
    "Translation",
    "attention_layers",
    "attention_maps",
    "attention_rollout",
    "attention_statistics",
    "draw_equivariance",
    "equivariance_by_layer",
    "equivariance_error",
    "explore",
]
