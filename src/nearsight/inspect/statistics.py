# SPDX-License-Identifier: Apache-2.0
"""What a layer's attention is like, in three numbers: how far it looks, how widely it spreads, how its heads differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..pages.brief import Brief, Rows
from .maps import AttentionMap


@dataclass(frozen=True, repr=False)
class LayerStatistics(Brief):
    """Means over the queries and images of a layer.

    layer      the module's name in the model
    distance   (heads,) how far the keys are from the query, weighted, in pixels of the image
    entropy    (heads,) of the weights, in bits: 0 for one cell, log2(K) for K cells alike
    uniform    the entropy if every query weighted all the cells of its block alike, in bits
    diversity  how much the heads differ, 0 (all alike) to 1 (no two look at the same cell)
    """

    layer: str
    distance: np.ndarray
    entropy: np.ndarray
    uniform: float
    diversity: float


class StatisticsTable(Rows[LayerStatistics]):
    """The statistics of a network's layers: a list that shows itself as a table of means over the heads."""

    def columns(self) -> dict[str, Callable[[LayerStatistics], Any]]:
        return {
            "layer": lambda row: row.layer,
            "heads": lambda row: len(row.distance),
            "distance, px": lambda row: float(row.distance.mean()),
            "entropy, bits": lambda row: float(row.entropy.mean()),
            "at most": lambda row: row.uniform,
            "diversity": lambda row: row.diversity,
        }


def attention_statistics(maps: Sequence[AttentionMap]) -> StatisticsTable:
    """Mean attention distance, entropy and head diversity of every layer.

        distance   sum_c w[p, c] |c - p| / sum_c w[p, c],  over the cells c on the map
        entropy    H(w) = -sum_c w[p, c] log2 w[p, c]
        diversity  ( H(mean over heads of w) - mean over heads of H(w) ) / log2(heads)

    each a mean over the queries p and the images. Sources: the distance is that of Dosovitskiy et al. 2021
    (arXiv:2010.11929), figure 7, between centres of cells; on a torus the shortest way. The diversity is the generalised
    Jensen-Shannon divergence of Lin 1991 (doi:10.1109/18.61115) with equal shares, over its largest value; a layer of
    one head has 0.

    Args:
        maps: of :func:`attention_maps`; of chosen queries too, whose means these then are.

    Example:
        >>> maps = attention_maps(create_model("sasa_nano"), torch.randn(1, 3, 32, 32))
        >>> attention_statistics(maps)[0].distance.shape
        (4,)
    """
    return StatisticsTable(_of_layer(layer) for layer in maps)


def _of_layer(layer: AttentionMap) -> LayerStatistics:
    rank = len(layer.map_size)
    weights = layer.weights.float().flatten(-rank)  # B, N, queries, places
    weights = weights.flatten(2, -2)
    distances = layer.distances().flatten(-rank).flatten(0, -2)
    inside = weights * ~distances.isnan()
    distance = (inside * distances.nan_to_num()).sum(-1) / inside.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    entropy = _entropy(weights)
    shared = _entropy(weights.mean(1)) - entropy.mean(1)
    most = math.log2(layer.num_heads) if layer.num_heads > 1 else 1.0
    return LayerStatistics(
        layer.layer,
        distance=distance.mean((0, 2)).numpy(),
        entropy=entropy.mean((0, 2)).numpy(),
        uniform=layer.takes_part().flatten(-rank).sum(-1).clamp(min=1).float().log2().mean().item(),
        diversity=max(0.0, shared.mean().item() / most),
    )


def _entropy(weights: Tensor) -> Tensor:
    """In bits, over the last axis."""
    return torch.special.entr(weights).sum(-1) / math.log(2)
