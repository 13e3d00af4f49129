# SPDX-License-Identifier: Apache-2.0
"""From the image to the first map of a ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..layers import AttentionStem2d
from ..layers.projection import records_plainly


def build_stem(name: str, in_chans: int, channels: int, stride: int) -> nn.Module:
    """``"conv"``, ``"attention"`` or ``"patch"``: from the image to a map with one cell per ``stride`` pixels.

    Raises:
        OptionError: an unknown name, or a stride that the stem does not have.
    """
    if name == "attention" and stride > 1:
        return AttentionStem2d(in_chans, channels, kernel_size=stride)
    if name == "patch":
        conv, pool = nn.Conv2d(in_chans, channels, stride, stride, bias=False), nn.Identity()
    elif name == "conv" and stride < 4:
        # Small images keep their resolution in the convolution.
        conv, pool = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False), MaxPool2d(stride, ceil_mode=True)
    elif name == "conv" and stride == 4:
        conv, pool = nn.Conv2d(in_chans, channels, 7, 2, padding=3, bias=False), MaxPool2d(3, 2, padding=1)
    else:
        raise OptionError(
            f"stem must be 'attention' (stem_stride from 2), 'conv' (stem_stride up to 4) or 'patch'; "
            f"received {name!r} with stem_stride={stride}"
        )
    # A ReLU and a maximum may change places, and the ReLU has less to do on the smaller map.
    return nn.Sequential(conv, nn.BatchNorm2d(channels), pool, nn.ReLU(inplace=True))


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps for its backward where the maxima were, and not the map that they were found in.

    That map is the largest of the whole network, and PyTorch's own backward reads no more of it than its shape.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not records_plainly(input) or input.device.type != "cpu":
            return super().forward(input)  # pyright: ignore[reportReturnType]
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return _MaxPool.apply(input, geometry)  # pyright: ignore[reportReturnType]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, geometry):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, places = torch.ops.aten.max_pool2d_with_indices(x, *geometry)
        ctx.save_for_backward(places)
        ctx.geometry, ctx.shape, ctx.strides = geometry, x.shape, x.stride()
        return y

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        unread = grad.new_empty_strided(ctx.shape, ctx.strides)  # costs nothing: no page of it is ever touched
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, unread, *ctx.geometry, places), None
