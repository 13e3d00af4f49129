# SPDX-License-Identifier: Apache-2.0
"""What stands around the attention of a ResNet, for less time and memory than PyTorch's own modules take on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..projection import infers_plainly, is_plain, records_plainly

# Cells of the output for each weight of one of its channels: measured from 0.8 to 784. From 12 up a block's end takes 0.6 to
# 0.97 of the time; at 6 and below it is slower, because the weights are read and written for too small a map.
MANY = 8

# oneDNN's convolution with what comes after it, as torch.compile calls it.
_convolve = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


class ConvNorm(nn.Sequential):
    """``nn.Sequential`` of a convolution, its batch norm, and what comes after; see :func:`conv_norm`.

    Shapes: (B, C, H, W) -> what the last module puts out.

    Example:
        >>> ConvNorm(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())(torch.randn(2, 8, 5, 6)).shape
        torch.Size([2, 16, 5, 6])
    """

    def forward(self, input: Tensor) -> Tensor:
        if len(self) < 2:  # a slice
            return super().forward(input)
        conv, norm, *after = self
        act = after.pop(0) if after and isinstance(after[0], nn.ReLU) else None
        y = conv_norm(input, conv, norm, act)
        for module in after:
            y = module(y)
        return y


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module | None = None) -> Tensor:
    """A convolution, its batch norm and a ReLU, in one pass over the map in inference on a CPU.

        relu(gamma (W * x - mean) / sqrt(var + eps) + beta) = relu(W' * x + b'),    W' = gamma W / sqrt(var + eps)

    W' and b' are made anew in every call, so that they are never out of date. The modules are called one by one for
    gradients, on other devices, for other types, under compilers and tracers, where one of them has a hook or is of another
    class, and on maps so small that making W' costs more than it saves.

    Args:
        x: (B, C, H, W).
        act: a ReLU, or None or ``nn.Identity`` for nothing.
    """
    is_nothing = act is None or is_plain(act, nn.Identity)
    folded = _folded(x, conv, norm) if is_nothing or is_plain(act, nn.ReLU) else None
    if folded is None:
        y = norm(conv(x))
        return y if act is None else act(y)
    return _convolve(x, *folded, "none" if is_nothing else "relu", [], "")  # pyright: ignore[reportOptionalCall]


def conv_norm_add_relu(x: Tensor, conv_and_norm: ConvNorm, shortcut: Tensor) -> Tensor:
    """The end of a residual block, relu(norm(conv(x)) + shortcut), as :func:`conv_norm` does it."""
    is_pair = is_plain(conv_and_norm, ConvNorm) and len(conv_and_norm) == 2
    folded = _folded(x, *conv_and_norm) if is_pair and infers_plainly(shortcut) else None
    if folded is None:
        y = conv_and_norm(x)
        y += shortcut
        return F.relu(y, inplace=True)
    return _convolve.binary(x, shortcut, *folded, "add", 1.0, "relu", [], "")  # pyright: ignore[reportOptionalMemberAccess]


def _folded(x: Tensor, conv: nn.Module, norm: nn.Module) -> tuple | None:
    """Weight, bias and geometry of the convolution that does the batch norm's work too; None if the modules have to."""
    if _convolve is None or not (is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d)):
        return None
    if norm.training or conv.bias is not None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    mean, var, gamma, beta = norm.running_mean, norm.running_var, norm.weight, norm.bias
    if mean is None or var is None or gamma is None or not _is_worth_it(x, conv, mean, var, gamma, beta):
        return None
    factor = gamma * torch.rsqrt(var + norm.eps)
    weight, bias = conv.weight * factor[:, None, None, None], beta - mean * factor
    return weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups


def _is_worth_it(x: Tensor, conv: nn.Conv2d, *others: Tensor) -> bool:
    tensors = (x, conv.weight, *others)
    if not (infers_plainly(*tensors) and torch.backends.mkldnn.enabled):
        return False
    if not all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors):
        return False
    cells = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1]) if x.ndim == 4 else 0
    return cells >= MANY * conv.weight[0].numel()


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
