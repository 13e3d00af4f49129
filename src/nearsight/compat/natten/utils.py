# SPDX-License-Identifier: Apache-2.0
"""``natten.utils``: what of it clients import."""

from __future__ import annotations

from typing import Any

from ...errors import OptionError
from .windows import natten_values, window_of

__all__ = ["check_all_args"]


def check_all_args(na_dim: int, *args: Any) -> tuple[tuple, ...]:
    """Spread the window's arguments over the axes, each to a tuple.

    ``args`` are kernel_size, dilation and is_causal as in 0.17, or kernel_size, stride, dilation and is_causal as from 0.20.

    Example:
        >>> check_all_args(2, 7, (1, 2), False)
        ((7, 7), (1, 2), (False, False))
    """
    if len(args) not in (3, 4):
        raise OptionError(
            f"check_all_args takes kernel_size, dilation and is_causal, with stride before dilation or not; received {args}"
        )
    with_stride = args if len(args) == 4 else (args[0], 1, *args[1:])
    kernel_size, stride, dilation, is_causal = natten_values(window_of(na_dim, *with_stride).axes(na_dim))
    return (kernel_size, stride, dilation, is_causal) if len(args) == 4 else (kernel_size, dilation, is_causal)
