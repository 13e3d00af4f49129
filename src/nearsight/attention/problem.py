# SPDX-License-Identifier: Apache-2.0
"""The frozen description of one attention problem: what a backend is asked about before it is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import DtypeError, ShapeError
from ..private import transforms_are_active, unwatched, within_forward_mode
from ..window import MAX_RANK, Axis, Window


@dataclass(frozen=True)
class Problem:
    """Sizes, geometry and demands of one call, checked and free of tensors."""

    axes: tuple[Axis, ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    batch: int
    num_heads: int  # of key and value
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str
    bias: bool = False
    relative: bool = False
    needs_grad: bool = False
    forward_ad: bool = False  # within a forward-mode derivative
    transformed: bool = False  # inside torch.func's grad, vmap or jvp
    compiling: bool = False  # inside torch.compile or torch.export, which trace the call
    exporting: bool = False  # inside torch.export or torch.jit.trace: what is written down runs on other sizes, alone
    groups: int = 1  # query heads for each of those of key and value
    lse: bool = False  # whether the log-sum-exp of the logits is asked for

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def table_size(self) -> tuple[int, ...]:
        return tuple(axis.table_size for axis in self.axes)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.batch == 0 or 0 in self.out_size

    @property
    def covers(self) -> bool:
        """Whether every query sees the whole map."""
        return all(axis.covers(n) for axis, n in zip(self.axes, self.in_size, strict=True))

    @property
    def compute_dtype(self) -> torch.dtype:
        """Logits, softmax and sums are held in float32 or wider."""
        return torch.promote_types(self.dtype, torch.float32)


class Call(NamedTuple):
    """The numbers of one call; :class:`Problem` is all else about it."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    relative: Sequence[Tensor] | None
    scale: float

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [self.query, self.key, self.value, *([] if self.bias is None else [self.bias]), *(self.relative or ())]

    @staticmethod
    def of(tensors: Sequence[Tensor], scale: float, problem: Problem) -> Call:
        """The call of such a problem whose :attr:`tensors` they are."""
        query, key, value, *tables = tensors
        bias = tables.pop(0) if problem.bias else None
        return Call(query, key, value, bias, tables if problem.relative else None, scale)


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    lse: bool = False,
) -> Problem:
    """Check every argument of an attention call once, and describe the problem.

    In a ``torch.jit.trace`` the sizes are numbers, those of the example. Only a window that was made for a map, as that of
    global attention, is of tensors there, which the trace follows.

    Raises:
        ShapeError: ranks, sizes or tables that do not fit together.
        DtypeError: arguments of the wrong type, dtype or device.
    """
    exporting = is_exporting()
    with unwatched():
        return _describe(query, key, value, window, bias, relative, lse, exporting)


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    lse: bool,
    exporting: bool,
) -> Problem:
    _check_tensors(query, key, value, window)
    rank = query.ndim - 3
    axes = window.axes(rank)
    in_size, out_size = tuple(key.shape[2:-1]), tuple(query.shape[2:-1])
    _check_sizes(query, key, value, window)
    table_size = tuple(axis.table_size for axis in axes)
    _check_bias(bias, query, table_size)
    _check_relative(relative, query, table_size)
    tensors = [query, key, value, *([] if bias is None else [bias]), *(relative or [])]
    return Problem(
        axes=axes,
        in_size=in_size,
        out_size=out_size,
        batch=query.shape[0],
        num_heads=key.shape[1],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        dtype=query.dtype,
        device=query.device.type,
        bias=bias is not None,
        relative=relative is not None,
        needs_grad=torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors),
        forward_ad=_in_forward_ad(tensors),
        transformed=not torch.compiler.is_compiling() and transforms_are_active(),
        compiling=torch.compiler.is_compiling(),
        exporting=exporting,
        groups=query.shape[1] // key.shape[1] if key.shape[1] else 1,
        lse=lse,
    )


def laid_apart(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where two of its elements share a place in memory, as ``unfold`` and ``expand`` make them.

    Some of PyTorch's fused kernels make their results after the strides of what they are given.
    """
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.contiguous()
            reach += (size - 1) * stride
    return tensor


def laid_out(name: str, tensor: object) -> None:
    """Refuse a tensor without a size or strides of its own, or that lies in several processes.

    Raises:
        DtypeError: a nested, sparse or distributed one.
    """
    if not isinstance(tensor, Tensor):
        return
    if tensor.is_nested:
        kind, remedy = "nested", "attend to each of its parts, tensor.unbind(), alone"
    elif tensor.layout != torch.strided:
        kind, remedy = "sparse", "convert it with .to_dense()"
    elif hasattr(tensor, "placements"):  # a DTensor's; its module is a second's import
        kind, remedy = (
            "distributed",
            "where it is sharded by batch or heads, attend to the part here, tensor.to_local()",
        )
    else:
        return
    raise DtypeError(f"{name} must be an ordinary, strided tensor; received a {kind} one: {remedy}")


def is_exporting() -> bool:
    """Whether what is called is written down, to run without nearsight: by ``torch.export`` or ``torch.jit.trace``."""
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else torch.jit.is_tracing()


def _in_forward_ad(tensors: list[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False
    return within_forward_mode() or any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _check_tensors(query: Any, key: Any, value: Any, window: Any) -> None:
    if not isinstance(window, Window):
        raise DtypeError(
            f"window must be a nearsight.Window; received {type(window).__name__}: write Window({window!r})"
        )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor; received {type(tensor).__name__}")
        laid_out(name, tensor)
        if not tensor.is_floating_point():
            raise DtypeError(
                f"{name} must have a floating point dtype; received {tensor.dtype}: convert it with .float()"
            )
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise DtypeError(
                f"query, key and value must share dtype and device; query is {query.dtype} on {query.device}, "
                f"{name} is {tensor.dtype} on {tensor.device}: convert one with .to()"
            )
        if not 1 <= tensor.ndim - 3 <= MAX_RANK:
            raise ShapeError(
                f"{name} must be (batch, heads, *map, head_dim) with 1 to {MAX_RANK} map axes; "
                f"received {tuple(tensor.shape)}"
            )


def _check_sizes(query: Tensor, key: Tensor, value: Tensor, window: Window) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim:
        raise ShapeError(f"query, key and value must have the same number of axes; received {shapes}")
    heads, groups = query.shape[1], key.shape[1]
    if not query.shape[0] == key.shape[0] == value.shape[0] or groups != value.shape[1] or heads % max(groups, 1):
        raise ShapeError(
            "query, key and value must share batch and heads, or key and value have fewer heads, "
            f"a divisor of the query's; received {shapes}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ShapeError(f"query and key must share head_dim; received {shapes}")
    if key.shape[2:-1] != value.shape[2:-1]:
        raise ShapeError(f"key and value must share the map; received {shapes}")
    out_size = window.output_size(key.shape[2:-1])
    if tuple(query.shape[2:-1]) != out_size:
        raise ShapeError(
            f"query must hold one entry per output cell: a map {tuple(key.shape[2:-1])} under {window} gives {out_size}; "
            f"received {tuple(query.shape[2:-1])}: take every stride-th query"
        )


def _check_bias(bias: Any, query: Tensor, table_size: tuple[int, ...]) -> None:
    if bias is None:
        return
    _check_table("bias", bias, query)
    if tuple(bias.shape) != (query.shape[1], *table_size):
        raise ShapeError(
            f"bias must be (heads, *entries per axis) = {(query.shape[1], *table_size)}; received {tuple(bias.shape)}"
        )


def _check_relative(relative: Any, query: Tensor, table_size: tuple[int, ...]) -> None:
    if relative is None:
        return
    if isinstance(relative, Tensor) or len(relative) != len(table_size):
        received = tuple(relative.shape) if isinstance(relative, Tensor) else f"{len(relative)} tensors"
        raise ShapeError(f"relative must be one tensor per axis, {len(table_size)} in all; received {received}")
    for axis, (table, entries) in enumerate(zip(relative, table_size, strict=True)):
        _check_table(f"relative[{axis}]", table, query)
        wanted = (query.shape[1], entries, query.shape[-1])
        if tuple(table.shape) != wanted:
            raise ShapeError(
                f"relative[{axis}] must be (heads, entries, head_dim) = {wanted}; received {tuple(table.shape)}"
            )


def _check_table(name: str, table: Any, query: Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        received = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise DtypeError(f"{name} must be a floating point tensor; received {received}")
    laid_out(name, table)
    if table.device != query.device:
        raise DtypeError(f"{name} must be on the device of query, {query.device}; received {table.device}")
