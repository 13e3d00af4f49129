# SPDX-License-Identifier: Apache-2.0
"""How far a module is from commuting with a transformation of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError

Transform = Callable[[Tensor], Tensor]


def equivariance_error(
    module: Callable[[Tensor], Any],
    x: Tensor,
    transform: Transform,
    *,
    out_transform: Transform | None = None,
    margin: int = 0,
) -> float:
    """How far f(T x) is from T f(x), relative to the size of f(x).

        error = max | f(T x) - T f(x) | / max | f(x) |

    Args:
        module: f; a module in training mode is asked as it is, so call ``.eval()`` first.
        x: an input, (B, C, *map).
        transform: T, for example ``lambda x: x.roll((2, 3), (-2, -1))``, a translation of the torus.
        out_transform: T on the output where that differs, as after a stride; None takes ``transform``.
        margin: cells along every edge of the output that are left out, for what only holds in the interior.

    Raises:
        ShapeError: the two sides differ in shape, or the margin leaves nothing.

    Example:
        >>> layer = LocalSelfAttention2d(16, border="wrap")
        >>> x = torch.randn(1, 16, 9, 11)
        >>> equivariance_error(layer, x, lambda x: x.roll((2, 3), (-2, -1))) < 1e-4
        True
    """
    with torch.no_grad():
        moved_first = module(transform(x))
        plain = module(x)
        moved_last = (out_transform or transform)(plain)
    if moved_first.shape != moved_last.shape:
        raise ShapeError(
            f"f(T x) and T f(x) must have one shape; received {tuple(moved_first.shape)} and {tuple(moved_last.shape)}: "
            "give out_transform, which is T on the output"
        )
    difference = _interior(moved_first - moved_last, margin)
    if difference.numel() == 0:
        raise ShapeError(f"a margin of {margin} leaves nothing of an output of {tuple(plain.shape)}")
    return (difference.abs().max() / plain.abs().max()).item()


def _interior(x: Tensor, margin: int) -> Tensor:
    for axis in range(2, x.ndim):
        x = x.narrow(axis, margin, max(0, x.shape[axis] - 2 * margin))
    return x
