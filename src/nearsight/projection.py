# SPDX-License-Identifier: Apache-2.0
"""The projections around the operation, of cells and of patches: ``nn.Conv1d/2d/3d`` in all but how they are computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad

from .private import has_forward_hooks, transforms_are_active

MANY = 16  # cells for each output channel: measured at 261, 33, 4 and 0.5, of which the first two gain

OVERRIDES = {"forward", "_conv_forward"}  # some libraries replace them on the instance

_convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Pointwise:
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


class Pointwise1d(_Pointwise, nn.Conv1d):
    """``nn.Conv1d`` with a kernel of 1; see :func:`project`."""


class Pointwise2d(_Pointwise, nn.Conv2d):
    """``nn.Conv2d`` with a kernel of 1; see :func:`project`."""


class Pointwise3d(_Pointwise, nn.Conv3d):
    """``nn.Conv3d`` with a kernel of 1; see :func:`project`."""


POINTWISE = {1: Pointwise1d, 2: Pointwise2d, 3: Pointwise3d}


class PatchProjection2d(nn.Conv2d):
    """``nn.Conv2d`` of patches that do not overlap; an odd map is filled up with zeros at its end.

    Where the channels of a cell lie side by side, a row of a patch does so too, and in training the convolution is a matrix
    product of them: forward and backward take 0.71 of the time for 128 maps of 192 channels and 8 x 8 cells (AVX2).

    Shapes: (B, C, H, W) -> (B, E, ceil(H / patch_size), ceil(W / patch_size)).

    Example:
        >>> PatchProjection2d(8, 16, 2)(torch.randn(2, 8, 5, 6)).shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, patch_size: int) -> None:
        super().__init__(in_channels, out_channels, patch_size, patch_size, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        size = self.stride[0]
        missing = (0, -input.shape[3] % size, 0, -input.shape[2] % size)
        x = F.pad(input, missing) if any(missing) else input
        if not (_is_ours(x, self.weight) and x.movedim(1, -1).is_contiguous()):
            return super().forward(x)
        patches = rearrange(x, "b c (h m) (w n) -> b h w (m n c)", m=size, n=size)
        return F.linear(patches, rearrange(self.weight, "e c m n -> e (m n c)")).movedim(-1, 1)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1 x 1 convolution: (B, C, *map), (E, C, 1...), (E,) -> (B, E, *map).

    Where the channels of a cell lie side by side and cells are many, the gradient of the weight is a plain matrix product:
    a layer's forward and backward is 3 % faster at 64 channels and 56 x 56 cells. Where they are few it is slower, by 7 % at
    512 channels and 7 x 7 cells, and oneDNN's convolution serves.

    Example:
        >>> project(torch.randn(2, 8, 5, 6), torch.randn(3, 8, 1, 1)).shape
        torch.Size([2, 3, 5, 6])
    """
    if _is_ours(x, weight):
        return _Project.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _convolve[x.ndim - 2](x, weight, bias)


def is_repeatable(projection: nn.Module, x: Tensor) -> bool:
    """Whether what a module made of x is :func:`project` of it, its weight and its bias, and nothing else."""
    if type(projection) not in POINTWISE.values() or OVERRIDES & vars(projection).keys():
        return False
    return not has_forward_hooks(projection) and _is_ours(x, projection.get_parameter("weight"))


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    # Of the device "meta" there is no autocast to ask about.
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return records_plainly(x, weight)


def records_plainly(*tensors: Tensor) -> bool:
    """Whether autograd records what becomes of these tensors, and nothing else watches.

    Compilers, tracers, torch.func and forward-mode derivatives see through PyTorch's own operators only.
    """
    # A subclass may have operators of its own, and the stand-ins of torch.fx cannot be asked anything.
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return has_gradient and not _is_watched(tensors)


def _is_watched(tensors: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _by_product(x: Tensor, weight: Tensor) -> bool:
    return x.numel() >= MANY * x.shape[1] * weight.shape[0] and x.movedim(1, -1).is_contiguous()


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight, bias)
        return _convolve[x.ndim - 2](x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if not _by_product(x, weight):
            return _convolution_backward(grad, x, weight, bias, ctx.needs_input_grad)
        rows = grad.movedim(1, -1).flatten(0, -2)
        return (
            _convolve[x.ndim - 2](grad, weight.transpose(0, 1)) if for_x else None,
            (rows.t() @ x.movedim(1, -1).flatten(0, -2)).view_as(weight) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]):
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None if bias is None else bias.shape,
        stride=ones,
        padding=zeros,
        dilation=ones,
        transposed=False,
        output_padding=zeros,
        groups=1,
        output_mask=wanted,
    )
