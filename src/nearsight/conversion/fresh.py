# SPDX-License-Identifier: Apache-2.0
"""SASA's surgery on one layer: fresh local self-attention with the borders of the convolution that was there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..layers import LocalSelfAttention1d, LocalSelfAttention2d, LocalSelfAttention3d
from ..positions import Factory
from .geometry import Around, align, flat, is_same, padding_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_ATTENTION = {1: LocalSelfAttention1d, 2: LocalSelfAttention2d, 3: LocalSelfAttention3d}


class AlignedAttention(nn.Module):
    """Attention whose queries are the middles of a convolution's blocks, where that has not the padding of 'same'.

    Keys and values are those of the whole map, but for cells in front of it, fewer than the stride, that have to go for
    the strides to meet. Along a causal axis queries are the last cells of the blocks. Zeros are added only where a query is
    off the map; what another padding mode puts around the map is there for all.

    Args:
        attention: a layer with the convolution's stride.
        causal: the axes along which it is causal.

    Raises:
        ShapeError: a map that is smaller than the convolution's kernel, as the convolution would.
    """

    def __init__(self, attention: nn.Module, convolution: Convolution, causal: Sequence[bool]) -> None:
        super().__init__()
        self.attention = attention
        self.padding_mode, around = convolution.padding_mode, padding_of(convolution)
        self.around = around if self.padding_mode != "zeros" else ()
        rest = around if self.padding_mode == "zeros" else ((0, 0),) * len(around)
        columns = (convolution.kernel_size, convolution.stride, convolution.dilation, rest)
        self.geometry = tuple(zip(*columns, strict=True))
        self.causal = tuple(causal)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, flat(self.around), self.padding_mode) if self.around else x
        sizes = x.shape[-len(self.geometry) :]
        axes = zip(sizes, self.geometry, self.causal, strict=True)
        aligned = [align(cells, *axis, cut=True, causal=causal) for cells, axis, causal in axes]
        if any(axis.count < 1 for axis in aligned):
            kernel = [dilation * (side - 1) + 1 for side, _, dilation, _ in self.geometry]
            raise ShapeError(f"a padded map must be as large as the kernel, {kernel}; received a map of {tuple(sizes)}")
        y = self.attention(F.pad(x, flat([(axis.before, axis.after) for axis in aligned])))
        return y[(..., *[slice(axis.first, axis.first + axis.count) for axis in aligned])].contiguous()


def attention_like(
    convolution: Convolution,
    before: Around | None = None,
    *,
    kernel_size: int | Sequence[int],
    num_heads: int,
    position: str | Factory,
) -> tuple[nn.Module, str]:
    """Attention that takes and gives what the convolution did, and what is worth saying about it.

    Stride, dilation and bias (as that of the projections) are the convolution's, circular padding becomes a torus, and an
    axis along which the kernel has one place keeps one. Causal it is along an axis where the convolution is: where its map
    is padded in front alone, or by so much on both sides that what sees the future can be cut off.

    Args:
        before: cells that were added around the map before it comes to the convolution, where that is known.
        kernel_size: one for all axes along which the convolution sees more than a cell, or one per axis.

    Raises:
        OptionError: a number of heads below 1, or what the layer itself refuses.
    """
    if not isinstance(num_heads, int) or num_heads < 1:
        raise OptionError(f"num_heads must be an int of at least 1; received {num_heads!r}")
    around = padding_of(convolution)
    causal = _causal_axes(convolution, before)
    same = is_same(around, convolution.kernel_size, convolution.dilation) and not any(causal)
    options: dict[str, Any] = {
        "stride": convolution.stride,
        "dilation": convolution.dilation,
        "position": position,
        "border": "wrap" if convolution.padding_mode == "circular" and same else "mask",
        "causal": causal if any(causal) else False,
        "qkv_bias": convolution.bias is not None,
        "device": convolution.weight.device,
        "dtype": convolution.weight.dtype,
    }
    attention, heads = _with_heads(convolution, num_heads, _block(convolution, kernel_size), options)
    notes = [*_notes_on_width(convolution, num_heads, heads), *_notes_on_edges(convolution, before, causal, same)]
    return attention if same else AlignedAttention(attention, convolution, causal), "; ".join(notes)


def _block(convolution: Convolution, kernel_size: int | Sequence[int]) -> int | tuple[int, ...]:
    if not isinstance(kernel_size, int):
        return tuple(kernel_size)
    sides = tuple(1 if side == 1 else kernel_size for side in convolution.kernel_size)
    return kernel_size if set(sides) == {kernel_size} else sides


def _causal_axes(convolution: Convolution, before: Around | None) -> tuple[bool, ...]:
    """The axes along which no output sees what lies behind its cell, as far as padding tells.

    A block that ends at the cells of its own stride is causal: all that is added lies in front. Zeros on both sides may be
    as many only if the outputs that they make at the end are cut off, or see nothing but what was before.
    """
    rank, zeros = len(convolution.kernel_size), convolution.padding_mode == "zeros"
    columns = (
        convolution.kernel_size,
        convolution.stride,
        convolution.dilation,
        padding_of(convolution),
        before or ((0, 0),) * rank,
    )
    causal = []
    for kernel, stride, dilation, (front, behind), (added, added_behind) in zip(*columns, strict=True):
        span = dilation * (kernel - 1)
        in_front = added + front > span - stride and added_behind + behind == 0 and added > 0
        causal.append(kernel > 1 and (in_front or (zeros and front == behind == span)))
    return tuple(causal)


def _notes_on_width(convolution: Convolution, wanted: int, heads: int) -> Iterator[str]:
    if heads != wanted:
        yield f"{heads} heads, as {wanted} do not fit {convolution.out_channels} channels"
    if convolution.groups > 1:
        yield f"{convolution.groups} groups became dense projections"
    if not convolution.weight.requires_grad:
        yield "its weight was frozen; the fresh ones are to be trained"


def _notes_on_edges(
    convolution: Convolution, before: Around | None, causal: Sequence[bool], same: bool
) -> Iterator[str]:
    if convolution.padding_mode in ("reflect", "replicate") and same and any(map(sum, padding_of(convolution))):
        yield f"{convolution.padding_mode} padding became a masked border"
    if any(causal):
        yield f"causal along {_axes(causal)}, as the convolution's padding is"
    if not same:
        yield "keeps the convolution's outputs, its padding being no 'same'"
    sides = list(zip(convolution.kernel_size, convolution.dilation, padding_of(convolution), causal, strict=True))
    bare = [k > 1 and not sum(around) and not is_causal for k, _, around, is_causal in sides]
    if any(bare) and before is None and convolution.stride != convolution.kernel_size:
        yield (
            f"unpadded along {_axes(bare)}: if the network pads in front alone to be causal, it now sees what lies ahead"
        )
    beyond = [max(around) > (k // 2) * d and not is_causal for k, d, around, is_causal in sides]
    if any(beyond):
        yield f"padded beyond 'same' along {_axes(beyond)}: what is added there is seen as cells"


def _axes(chosen: Sequence[bool]) -> str:
    axes = [str(axis) for axis, is_chosen in enumerate(chosen) if is_chosen]
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(axes)}"


def _with_heads(
    convolution: Any, num_heads: int, kernel_size: int | tuple[int, ...], options: dict[str, Any]
) -> tuple[nn.Module, int]:
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
