# SPDX-License-Identifier: Apache-2.0
"""Says in one sentence that a backend's derivative has none itself, where PyTorch would name an operator of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError


def first_order(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors; to differentiate a derivative by them raises ``BackendError`` with the remedy."""
    return tuple(_FirstOrder.apply(tensor, backend) if tensor.requires_grad else tensor for tensor in tensors)


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, backend: str) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # Gradients are on in a backward only for someone who may differentiate again.
        return (_Last.apply(grad, ctx.backend) if torch.is_grad_enabled() else grad), None


class _Last(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, backend: str) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.backend = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise BackendError(
            f"the backend {ctx.backend!r} has no second derivative; with backend='blocked' there are derivatives of every "
            "order"
        )
