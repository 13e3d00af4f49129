# SPDX-License-Identifier: Apache-2.0
"""The softmax over the keys that a query sees, and its denominator, where it may see none.

    softmax_c(logit) = exp(logit[c] - lse),   lse = log sum_c exp(logit[c])

A query whose logits are all -inf, through its bias say, sees no key: its weights are zero, its log-sum-exp is -inf and all
its gradients are zero, as in PyTorch's scaled_dot_product_attention from 2.5 on. So it joins others in a merge as nothing.
"""

from __future__ import annotations

from torch import Tensor

NOTHING = float("-inf")


def softmax(logits: Tensor, axes: int = 1) -> Tensor:
    """The weights over so many last axes together."""
    flat = logits.flatten(-axes)
    alone = _sees_none(flat)
    return flat.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0).view(logits.shape)


def log_sum_exp(logits: Tensor, axes: int = 1) -> Tensor:
    """log(sum of exp(logits)) over so many last axes together."""
    flat = logits.flatten(-axes)
    alone = _sees_none(flat)
    return flat.masked_fill(alone, 0).logsumexp(-1).masked_fill(alone[..., 0], NOTHING)


def let_see(logits: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The logits in which a query that sees none sees all alike, and which those are: their results are for the caller to
    take away. For a part of the logits that is much smaller than all of them, such as a bias that all images share.
    """
    alone = _sees_none(logits if hidden is None else logits.detach().masked_fill(hidden, NOTHING))
    return logits.masked_fill(alone, 0), alone


def _sees_none(logits: Tensor) -> Tensor:
    """The queries that see no key, (..., 1)."""
    return (logits.detach() == NOTHING).all(-1, keepdim=True)
