# SPDX-License-Identifier: Apache-2.0
"""NATTEN's CUDA kernels, where that package is installed with its library: the border "shift" without position terms.

NATTEN (https://github.com/SHI-Labs/NATTEN, 0.20 and later) calls windows that slide inwards neighbourhood attention; its
stride of a window is another thing than ours, which leaves out queries. Maps go in heads last, (B, *map, N, D).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from .any_order import of_any_order
from .problem import Call, Problem

name = "natten"
takes_groups = False

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATIONS = {1: "na1d", 2: "na2d", 3: "na3d"}
CHANNELS = 8  # head_dim is a multiple of it


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    if find_spec("natten") is None:
        return "NATTEN is not installed; it is for NVIDIA's cards, see https://natten.org"
    try:
        natten = _natten()
    except Exception as error:  # another maker's package may fail as it likes; the others serve
        return f"NATTEN cannot be imported: {error}"
    if not getattr(natten, "HAS_LIBNATTEN", False):
        return "NATTEN is installed without its library of CUDA kernels, libnatten"
    missing = [operation for operation in OPERATIONS.values() if not hasattr(natten, operation)]
    return f"this NATTEN has no {', '.join(missing)}; version 0.20 or later does" if missing else None


def why_not(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"NATTEN's kernels are for CUDA devices; the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"NATTEN takes float32, bfloat16 and float16; the tensors are {problem.dtype}"
    if problem.bias or problem.relative:
        return "NATTEN has no position terms"
    if problem.lse:
        return "NATTEN's log-sum-exp has no gradient"
    if any(axis.border != "shift" for axis in problem.axes):
        return "NATTEN's windows slide inwards: border='shift'"
    if any(axis.shared_by != 1 for axis in problem.axes):
        return "windows that queries share, NATTEN's stride, have not been held against its kernels: shared_by=1"
    if any(axis.stride != 1 for axis in problem.axes):
        return "NATTEN computes every query: stride=1"
    if any(
        a.kernel_size < 2 or a.kernel_size * a.dilation > n for a, n in zip(problem.axes, problem.in_size, strict=True)
    ):
        return "NATTEN's windows have two cells or more per axis and fit into the map"
    if problem.head_dim != problem.value_dim or problem.head_dim % CHANNELS or not problem.head_dim:
        return f"NATTEN takes query, key and value of one head_dim, a multiple of {CHANNELS}"
    if problem.forward_ad or problem.transformed:
        return "NATTEN is not for torch.func and has no forward-mode derivative"
    if problem.compiling:
        return "NATTEN chooses its kernels at run time, outside of torch.compile"
    return None


def second_best(problem: Problem) -> str | None:
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    return of_any_order(lambda call: _attend(call, problem), call, problem)


def _attend(call: Call, problem: Problem) -> tuple[Tensor, None]:
    query, key, value, *_ = call
    operation = getattr(_natten(), OPERATIONS[problem.rank])
    columns = ((axis.kernel_size, axis.dilation, axis.causal) for axis in problem.axes)
    kernel_size, dilation, causal = zip(*columns, strict=True)
    maps = (tensor.movedim(1, -2).contiguous() for tensor in (query, key, value))
    out = operation(*maps, kernel_size=kernel_size, dilation=dilation, is_causal=causal, scale=call.scale)
    return out.movedim(-2, 1), None


@lru_cache(maxsize=1)
def _natten() -> ModuleType:
    """Kept: what is installed in its place later (nearsight.compat) sends its calls here."""
    import natten  # pyright: ignore[reportMissingImports]

    return natten
