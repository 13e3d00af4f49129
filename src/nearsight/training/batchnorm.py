# SPDX-License-Identifier: Apache-2.0
"""Batch norm over the images of all processes, where PyTorch's own is for graphics cards only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedBatchNorm(nn.SyncBatchNorm):
    """As ``nn.SyncBatchNorm``, on every device: in training the mean and variance are those of the whole step.

        mean = sum over processes of x / n,   var = sum over processes of (x - mean)^2 / n

    Gradients flow through both, so that a step of several processes is that of one over all their images.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        count = input.numel() // input.shape[1] * dist.get_world_size()
        mean = _over_all(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        var = _over_all(centred.square().sum(axes)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var * count / (count - 1), share)
        out = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)


class _SumOverAll(torch.autograd.Function):
    """The sum over all processes. Each of them uses it, so that its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(grad)


def _over_all(part: Tensor) -> Tensor:
    return _SumOverAll.apply(part)  # pyright: ignore[reportReturnType]


def _summed(part: Tensor) -> Tensor:
    whole = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole)
    return whole


@contextmanager
def synced_batch_norms(model: nn.Module) -> Iterator[None]:
    """Meanwhile, the plain batch norms of a network share their statistics; weights and names stay what they are."""
    plain = [(module, type(module)) for module in model.modules() if type(module) in PLAIN]
    try:
        for module, _ in plain:
            module.__class__ = SyncedBatchNorm
        yield
    finally:
        for module, kind in plain:
            module.__class__ = kind
