# SPDX-License-Identifier: Apache-2.0
"""SASA's surgery on one layer: fresh local self-attention with the borders of the convolution that was there."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..layers import LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from ..positions import Factory
from .geometry import align, is_same, padding_of

_ATTENTION = {1: LocalSelfAttention1d, 2: LocalSelfAttention2d, 3: LocalSelfAttention3d}


class AlignedAttention(nn.Module):
    """Attention whose queries are the middles of a convolution's blocks, where that has not the padding of 'same'.

    Keys and values are those of the whole map, but for cells in front of it, fewer than the stride, that have to go for
    the strides to meet.

    Args:
        attention: a layer with the convolution's stride.
    """

    def __init__(self, attention: nn.Module, convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.attention = attention
        around = padding_of(convolution)
        columns = (convolution.kernel_size, convolution.stride, convolution.dilation, around)
        self.geometry = tuple(zip(*columns, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[-len(self.geometry) :]
        aligned = [align(cells, *axis, cut=True) for cells, axis in zip(sizes, self.geometry, strict=True)]
        padding = [(axis.before, axis.after) for axis in reversed(aligned)]
        y = self.attention(F.pad(x, list(chain(*padding))))
        return y[(..., *[slice(axis.first, axis.first + axis.count) for axis in aligned])].contiguous()


def attention_like(
    convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, *, kernel_size: int, num_heads: int, position: str | Factory
) -> tuple[nn.Module, str]:
    """Attention that takes and gives what the convolution did, and what is worth saying about it.

    Stride, dilation and bias (as that of the projections) are the convolution's, and circular padding becomes a torus.

    Raises:
        OptionError: a number of heads below 1, or what the layer itself refuses.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise OptionError(f"num_heads must be an int of at least 1; received {num_heads!r}")
    options: dict[str, Any] = {
        "stride": convolution.stride,
        "dilation": convolution.dilation,
        "position": position,
        "border": "wrap" if convolution.padding_mode == "circular" else "mask",
        "qkv_bias": convolution.bias is not None,
        "device": convolution.weight.device,
        "dtype": convolution.weight.dtype,
    }
    attention, heads = _with_heads(convolution, num_heads, kernel_size, options)
    notes = (
        [] if heads == num_heads else [f"{heads} heads, as {num_heads} do not fit {convolution.out_channels} channels"]
    )
    if convolution.groups > 1:
        notes.append(f"{convolution.groups} groups became dense projections")
    if is_same(padding_of(convolution), convolution.kernel_size, convolution.dilation):
        return attention, "; ".join(notes)
    notes.append("keeps the convolution's outputs, its padding being no 'same'")
    return AlignedAttention(attention, convolution), "; ".join(notes)


def _with_heads(convolution: Any, num_heads: int, kernel_size: int, options: dict[str, Any]) -> tuple[nn.Module, int]:
    """The layer with the number of heads nearest to ``num_heads`` that divides the width and suits the encoding."""
    width = convolution.out_channels
    divisors = [heads for heads in range(1, width + 1) if width % heads == 0]
    make = _ATTENTION[len(convolution.kernel_size)]
    refusal: ShapeError | None = None
    for heads in sorted(divisors, key=lambda heads: (abs(heads - num_heads), heads)):
        try:
            with convolution.weight.device:  # nothing is to lie on the default device, which may hold no numbers
                return make(convolution.in_channels, width, kernel_size, num_heads=heads, **options), heads
        except ShapeError as error:
            refusal = error
    assert refusal is not None
    raise refusal
