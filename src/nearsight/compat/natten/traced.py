# SPDX-License-Identifier: Apache-2.0
"""What ``torch.jit.trace``, and with it fvcore's counter, sees of a call: one node by the name that NATTEN 0.17 gave it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ...private import untraced

FUSED = {rank: f"FusedNeighborhoodAttention{rank}D" for rank in (1, 2, 3)}
QK = {rank: f"NeighborhoodAttention{rank}DQKAutogradFunction" for rank in (1, 2, 3)}
AV = {rank: f"NeighborhoodAttention{rank}DAVAutogradFunction" for rank in (1, 2, 3)}


def as_one_node(name: str, cells: int, call: Callable, *tensors: Tensor | None) -> Any:
    """``call(*tensors)``, in a trace as a node ``name`` that holds the cells of a window, which no shape tells."""
    return NODES[name].apply(call, cells, *tensors) if torch.jit.is_tracing() else call(*tensors)


class _Node(Function):
    @staticmethod
    def forward(ctx: Any, call: Callable, cells: int, *tensors: Tensor | None) -> Any:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        with untraced():
            found = call(*tensors)
        # The tracer must have seen a result come into being; that step is not in the graph, for the node takes its place.
        return tuple(one.clone() for one in found) if isinstance(found, tuple) else found.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            saved = zip(ctx.saved_tensors, wanted, strict=True)
            inputs = [None if tensor is None else tensor.detach().requires_grad_(want) for tensor, want in saved]
            outputs = ctx.call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sources = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, sources, grads))
        return (None, None, *(next(found) if want else None for want in wanted))


NODES: dict[str, type[Function]] = {
    name: type(name, (_Node,), {}) for names in (FUSED, QK, AV) for name in names.values()
}
