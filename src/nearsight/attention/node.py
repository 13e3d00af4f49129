# SPDX-License-Identifier: Apache-2.0
"""Attention as one node of an exported graph, ``nearsight::LocalAttention``, which docs/howto/deploy.md specifies.

It is a backend that only an export to ONNX asks for: inside :func:`as_nodes` whatever can be a node becomes one, which
stays or is written out by plain_graph.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .problem import Call, Problem

name = "node"
takes_groups = True
DOMAIN, OPERATOR, VERSION = "nearsight", "LocalAttention", 1
DTYPES = (torch.float32, torch.bfloat16)

_WANTED: ContextVar[bool] = ContextVar("attention as nodes", default=False)


@contextmanager
def as_nodes() -> Iterator[None]:
    """What is exported meanwhile holds one node for each attention, in place of what it is made of."""
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


def unavailable() -> str | None:
    return None if _WANTED.get() else "it only writes graphs, for `nearsight export --format onnx`"


def why_not(problem: Problem) -> str | None:
    if not problem.exporting:
        return "it computes nothing"
    if not all(isinstance(axis.kernel_size, int) for axis in problem.axes):
        return "the node's window is of numbers, and this one is as large as a map whose size is left open"
    if problem.dtype not in DTYPES:
        return f"the node is for float32 and bfloat16, not {problem.dtype}"
    return "the node has no log-sum-exp" if problem.lse else None


def second_best(problem: Problem) -> str | None:
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    out_channels = call.query.shape[1] * problem.value_dim
    tables = [call.bias, *(call.relative or [])]
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}",
        [
            *map(_planar, (call.query, call.key, call.value)),
            *(None if table is None else table.float() for table in tables),
        ],
        _attributes(call, problem),
        dtype=call.query.dtype,
        shape=(problem.batch, out_channels, *problem.out_size),
        version=VERSION,
    )
    return out.unflatten(1, (call.query.shape[1], -1)).movedim(2, -1), None


def _planar(tensor: Tensor) -> Tensor:
    """(B, N, *map, D) -> (B, N*D, *map), as a 1x1 convolution leaves it."""
    return tensor.movedim(-1, 2).flatten(1, 2)


def _attributes(call: Call, problem: Problem) -> dict[str, Any]:
    axes = problem.axes
    return {
        "num_heads": call.query.shape[1],
        "num_kv_heads": call.key.shape[1],
        "rank": problem.rank,
        "kernel_size": [int(axis.kernel_size) for axis in axes],
        "stride": [axis.stride for axis in axes],
        "dilation": [axis.dilation for axis in axes],
        "causal": [int(axis.causal) for axis in axes],
        "shared_by": [axis.shared_by for axis in axes],
        "border": " ".join(axis.border for axis in axes),
        "scale": float(call.scale),
    }
