# SPDX-License-Identifier: Apache-2.0
"""Outputs that are not finite: a largest class can be picked from them, but it means nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .private import tree_leaves


def why_not_finite(output: Any, model: nn.Module) -> str | None:
    """How much of a model's output is NaN or infinite, and whether its weights are to blame; None if all is finite.

    Args:
        output: what the model returned: a tensor whose first axis is the images, or any structure of such tensors.

    Example:
        >>> why_not_finite(torch.tensor([[0.0, 1.0], [0.0, torch.inf]]), nn.Identity())
        'the output of the network is not finite for 1 of 2 images, though its weights are'
    """
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    rows = [(~tensor.isfinite()).reshape(max(1, len(tensor)), -1).any(1) for tensor in tensors if tensor.ndim]
    worst = max(rows, key=lambda bad: int(bad.sum()), default=None)
    if worst is None or not worst.any():
        return None
    state = {name: one for name, one in model.state_dict().items() if one.is_floating_point()}
    broken = [name for name, one in state.items() if not one.isfinite().all()]
    if broken:
        blame = f": {len(broken)} of its {len(state)} tensors hold NaN or infinity, the first is {broken[0]}"
    else:
        blame = ", though its weights are"
    return f"the output of the network is not finite for {int(worst.sum())} of {len(worst)} images{blame}"
