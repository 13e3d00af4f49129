# SPDX-License-Identifier: Apache-2.0
"""``natten.utils``: what of it clients import."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...errors import OptionError, ShapeError
from .types import create_causal_arg_from_bool, create_dim_from_int
from .windows import natten_values, window_of

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_args_against_input",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_size_arg",
    "check_stride_arg",
    "create_causal_arg_from_bool",
    "create_dim_from_int",
    "get_device_cc",
    "get_num_na_weights",
    "is_cpu",
    "is_cuda",
    "is_rocm",
    "make_attn_tensor_from_input",
]


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


def _checked(na_dim: int, kernel_size: Any = 1, stride: Any = 1, dilation: Any = 1, is_causal: Any = False) -> tuple:
    return natten_values(window_of(na_dim, kernel_size, stride, dilation, is_causal).axes(na_dim))


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """One size per axis."""
    return _checked(na_dim, kernel_size=kernel_size)[0]


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """One stride per axis; None is 1."""
    return _checked(na_dim, kernel_size=1 if stride is None else stride, stride=stride)[1]


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """One dilation per axis; None is 1."""
    return _checked(na_dim, dilation=dilation)[2]


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """One value per axis; None is False."""
    return _checked(na_dim, is_causal=is_causal)[3]


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """One size of the map per axis."""
    return check_kernel_size_arg(na_dim, input_size)


def check_args_against_input(
    input_tensor: Tensor, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> None:
    """Nothing, where NATTEN would take the window on the map of ``input_tensor``, which is heads last.

    Raises:
        ShapeError: the map is smaller than the window. The calls here take it; NATTEN does not.
    """
    rank = input_tensor.ndim - 3
    size = tuple(input_tensor.shape[1 : 1 + rank])
    window = window_of(rank, kernel_size, stride, dilation, is_causal)
    if any(axis.kernel_size * axis.dilation > cells for axis, cells in zip(window.axes(rank), size, strict=True)):
        raise ShapeError(
            f"kernel_size * dilation must be at most the size of the map, {size}; received {kernel_size=}, {dilation=}"
        )


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """How many cells a window holds."""
    return prod(kernel_size)


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Memory for as many weights for every query, whose numbers are not set."""
    return torch.empty(
        (*input_tensor.shape[:-1], attention_dim),
        dtype=input_tensor.dtype,
        device=input_tensor.device,
        requires_grad=input_tensor.requires_grad,
    )


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """How many additional keys (B, N, any, D) there are beside an input (B, N, *map, D).

    Raises:
        ShapeError: they do not fit together.
    """
    return 0 if additional_keys is None else _additional(input_tensor, additional_keys, input_tensor.shape[-1])


def check_additional_values(
    attn_tensor: Tensor, additional_values: Tensor | None, value: Tensor, expected_attn_weights: int
) -> int:
    """How many additional values (B, N, any, E) there are, for which ``attn_tensor`` holds weights after the window's.

    Raises:
        ShapeError: they do not fit together.
    """
    found = 0 if additional_values is None else _additional(attn_tensor, additional_values, value.shape[-1])
    if attn_tensor.shape[-1] != expected_attn_weights + found:
        raise ShapeError(
            f"there must be {expected_attn_weights + found} weights per query; received {attn_tensor.shape[-1]}"
        )
    return found


def _additional(tensor: Tensor, additional: Tensor, width: int) -> int:
    batch, heads = tensor.shape[:2]
    if additional.ndim != 4 or (*additional.shape[:2], additional.shape[-1]) != (batch, heads, width):
        raise ShapeError(
            f"additional keys and values must be (batch, heads, any, channels), here {(batch, heads, 'any', width)}; "
            f"received {tuple(additional.shape)}"
        )
    return additional.shape[2]


def is_cpu(device: torch.device) -> bool:
    """Whether it is the processor."""
    return device.type == "cpu"


def is_cuda(device: torch.device) -> bool:
    """Whether it is a card of NVIDIA's."""
    return device.type == "cuda" and torch.version.cuda is not None


def is_rocm(device: torch.device) -> bool:
    """Whether it is a card of AMD's."""
    return device.type == "cuda" and torch.version.hip is not None


def get_device_cc(device: Any = None) -> int:
    """The compute capability of a card, 90 for 9.0; 0 where there is none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return 0
    if isinstance(device, torch.device) and device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
