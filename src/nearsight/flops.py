# SPDX-License-Identifier: Apache-2.0
"""FLOPs of our operation for ``torch.utils.flop_counter``, and of whole networks.

Two per multiply-add, as PyTorch and the SASA paper count (timm and the papers of HaloNet and NAT count multiply-adds).
``FlopCounterMode`` sees the native operator as one call, which the formulas here count by its equation; the other backends
are matrix products to it, counted as they are run, masked pairs included.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from .attention import native  # defines the operators  # noqa: F401
from .private import FLASH_ON_CPU, FLASH_ON_CPU_BACKWARD, without_computing
from .window import BORDERS

Shape = Sequence[int]


@register_flop_formula(torch.ops.nearsight.attend)
def attend_flops(
    query: Shape,
    key: Shape,
    value: Shape,
    bias: Any,
    relative: Sequence[Any],
    kernel_size: Shape,
    stride: Shape,
    dilation: Shape,
    causal: Sequence[int],
    shared_by: Sequence[int],
    border: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """q.k, q.r and weights.v for every query and every place of its window, also where that lies outside the map.

    This is how Ramachandran et al. 2019 count (6 k^2 w a pixel with width w): q.r once per place. Computed per axis and
    then summed, as we do, it takes fewer. Keys of zero, where q.r alone decides, count as any.
    """
    logits, mix = _per_pair(query, value, relative)
    return 2 * _pairs(query, key, kernel_size, border) * (logits + mix)


@register_flop_formula(torch.ops.nearsight.attend_backward)
def attend_backward_flops(
    grad: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    bias: Any,
    relative: Sequence[Any],
    out: Shape,
    lse: Shape,
    wanted: Sequence[bool],
    kernel_size: Shape,
    stride: Shape,
    dilation: Shape,
    causal: Sequence[int],
    shared_by: Sequence[int],
    border: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """The logits again, two products for the gradients of each of their terms, and two for those of weights and value."""
    logits, mix = _per_pair(query, value, relative)
    return 2 * _pairs(query, key, kernel_size, border) * (3 * logits + 2 * mix)


@register_flop_formula(torch.ops.nearsight.project_and_attend)
def project_and_attend_flops(
    input: Shape,
    weight: Shape,
    offset: Any,
    bias: Any,
    relative: Sequence[Any],
    num_heads: int,
    qk_channels: int,
    keep: bool,
    *geometry: Any,
    **__: Any,
) -> int:
    """Those of the projection, and of :func:`attend_flops` of what it makes."""
    query, value = _heads_of(input, weight, num_heads, qk_channels)
    return _projection(input, weight) + attend_flops(query, query, value, bias, relative, *geometry)


@register_flop_formula(torch.ops.nearsight.project_and_attend_backward)
def project_and_attend_backward_flops(
    grad: Shape,
    input: Shape,
    weight: Shape,
    offset: Any,
    bias: Any,
    relative: Sequence[Any],
    num_heads: int,
    qk_channels: int,
    out: Shape,
    lse: Shape,
    wanted: Sequence[bool],
    *geometry: Any,
    **__: Any,
) -> int:
    """The projection and its gradients, and the backward of attention, whose logits are made again too."""
    query, value = _heads_of(input, weight, num_heads, qk_channels)
    attended = attend_backward_flops(grad, query, query, value, bias, relative, out, lse, wanted, *geometry)
    return (1 + sum(wanted[:2])) * _projection(input, weight) + attended


def _projection(input: Shape, weight: Shape) -> int:
    return 2 * input[0] * prod(input[2:]) * weight[0] * weight[1]


def _heads_of(input: Shape, weight: Shape, num_heads: int, qk_channels: int) -> tuple[Shape, Shape]:
    """The shapes of query, or key, and of value."""
    channels = (qk_channels, weight[0] - 2 * qk_channels)
    query, value = ((input[0], num_heads, *input[2:], one // num_heads) for one in channels)
    return query, value


if FLASH_ON_CPU is not None and FLASH_ON_CPU not in flop_registry:  # PyTorch counts it on GPUs only

    @register_flop_formula(FLASH_ON_CPU)
    def dense_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
        """Global attention of the 'dense' backend, and of timm's transformers."""
        return sdpa_flop_count(query, key, value)

    @register_flop_formula(FLASH_ON_CPU_BACKWARD)
    def dense_backward_flops(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
        """The same backwards."""
        return sdpa_backward_flop_count(grad, query, key, value)


def _per_pair(query: Shape, value: Shape, relative: Sequence[Any]) -> tuple[int, int]:
    return query[-1] * (2 if len(relative) else 1), value[-1]


def _pairs(query: Shape, key: Shape, kernel_size: Shape, border: Sequence[int]) -> int:
    """Queries times places. A window that covers the map, as in global attention, has as many places as the map."""
    places = [
        min(k, n) if BORDERS[rule] == "shift" or k >= 2 * n - 1 else k
        for k, n, rule in zip(kernel_size, key[2:-1], border, strict=True)
    ]
    return prod(query[:-1]) * prod(places)


def count_flops(model: nn.Module, input_size: Sequence[int]) -> int:
    """FLOPs of one forward pass of an input of (C, H, W), without running it.

    Needs the native backend for the equation's own number; without it, what 'blocked' computes is counted.

    Example:
        >>> from nearsight import create_model
        >>> count_flops(create_model("resnet18").eval(), (3, 224, 224)) // 10**6
        3628
    """
    like = next(model.parameters(), torch.empty(0))
    with without_computing(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *input_size, dtype=like.dtype, device=like.device))
    return counter.get_total_flops()
