# SPDX-License-Identifier: Apache-2.0
"""NATTEN's operation in two calls, with the weights in the caller's hands: logits = qk(q, k), out = av(weights, v).

    qk(q, k)[p, j] = q[p] . k[n_j(p)]        av(a, v)[p] = sum_j a[p, j] v[n_j(p)]        n_j(p): the j-th cell that p sees

Both are bilinear, and with their transpose, scatter(a, x)[c] = sum_{p, j: n_j(p) = c} a[p, j] x[p], they are closed under
differentiation: every derivative of the three is made of the three. So a call keeps its inputs and nothing else, and there
are derivatives of every order, forwards and backwards. On a small map windows are copied or all pairs held, else blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from ...window import Axis
from .windows import (
    Blocks,
    align,
    cut,
    flat_index,
    gather_queries,
    gather_spans,
    gather_windows,
    gathers,
    neighbours,
    pairs_fit,
    places,
    slices,
    without_autocast,
)

Axes = tuple[Axis, ...]
Parts = Iterator[tuple[Sequence[Blocks], Tensor]]


def qk(query: Tensor, key: Tensor, axes: Axes, rpb: Tensor | None = None) -> Tensor:
    """The logits, (B, N, *map, product of kernel_size); -inf in places that hold no cell.

    ``rpb`` (N, *(2k-1)) is added, at the entry ``key - query + k - 1`` of every axis. There is no scale.
    """
    logits = QK.apply(query, key, axes)
    if rpb is not None:
        logits = logits + _biases(rpb.to(logits.dtype), axes, query.shape[2:-1])
    outside = _outside(axes, query)
    return logits if outside is None else logits.masked_fill(outside, float("-inf"))


def av(weights: Tensor, value: Tensor, axes: Axes) -> Tensor:
    """The weighted sums of the values, (B, N, *map, E). Weights of places that hold no cell are not looked at."""
    return AV.apply(weights.to(value.dtype), value, axes)


def _biases(table: Tensor, axes: Axes, size: Sequence[int]) -> Tensor:
    """The table's entry for every place: (N, *(2k-1)) -> (N, *map, product of k)."""
    for number, (axis, cells) in enumerate(zip(axes, size, strict=True), start=1):
        _, entries = places(axis, cells, table.device)
        table = table.index_select(number, entries.flatten()).unflatten(number, entries.shape).movedim(number + 1, -1)
    return table.flatten(1 + len(axes))


def _outside(axes: Axes, tensor: Tensor) -> Tensor | None:
    """Which places hold no cell, (*map, product of k), or None where every window is complete."""
    rank, size = len(axes), tensor.shape[2:-1]
    if not any(axis.causal or axis.kernel_size * axis.dilation > cells for axis, cells in zip(axes, size, strict=True)):
        return None
    outside = torch.zeros((), dtype=torch.bool, device=tensor.device)
    for number, (axis, cells) in enumerate(zip(axes, size, strict=True)):
        outside = outside | align(places(axis, cells, tensor.device)[0], rank, number)
    return outside.flatten(rank)


# ------------------------------------------------------------------------------------------------------------ autograd


class _Bilinear(Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        *factors, ctx.axes = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)


def _tangent(function: type[_Bilinear], ctx: Any, tangents: Sequence[Tensor | None]) -> Tensor:
    first, second = ctx.saved_tensors
    moved_first, moved_second, _ = tangents
    if moved_first is None:
        return function.apply(first, moved_second, ctx.axes)
    moved = function.apply(moved_first, second, ctx.axes)
    return moved if moved_second is None else moved + function.apply(first, moved_second, ctx.axes)


class QK(_Bilinear):
    """q[p] . k[n_j(p)]: (B, N, *map, D) twice -> (B, N, *map, K)."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, axes: Axes) -> Tensor:
        outside = _outside(axes, query)
        if gathers(axes, key):
            with without_autocast(query):
                products = (gather_windows(key, axes) @ query.flatten(2, -2)[..., None]).squeeze(-1)
            products = products.unflatten(2, query.shape[2:-1])
            return products if outside is None else products.masked_fill_(outside, 0)

        def parts() -> Parts:
            for part in slices(_cut(axes, query), query.shape[0] * query.shape[1]):
                with without_autocast(query):
                    scores = gather_queries(query, part) @ gather_spans(key, part).mT
                yield part, _take_windows(scores, part)

        products = _assembled(parts(), query.shape[2:-1])
        return products if outside is None else products.masked_fill_(outside, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key = ctx.saved_tensors
        wants_query, wants_key, _ = ctx.needs_input_grad
        return (
            AV.apply(grad, key, ctx.axes) if wants_query else None,
            Scatter.apply(grad, query, ctx.axes) if wants_key else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(QK, ctx, tangents)


class AV(_Bilinear):
    """sum_j a[p, j] v[n_j(p)]: (B, N, *map, K), (B, N, *map, E) -> (B, N, *map, E)."""

    @staticmethod
    def forward(weights: Tensor, value: Tensor, axes: Axes) -> Tensor:
        if gathers(axes, value):
            with without_autocast(value):
                sums = _present(weights, axes, value)[..., None, :] @ gather_windows(value, axes)
            return sums.squeeze(-2).unflatten(2, value.shape[2:-1])

        def parts() -> Parts:
            for part in slices(_cut(axes, value), value.shape[0] * value.shape[1]):
                with without_autocast(value):
                    sums = _spread_windows(weights, axes, part) @ gather_spans(value, part)
                yield part, sums.flatten(2, -2)

        return _assembled(parts(), value.shape[2:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        weights, value = ctx.saved_tensors
        wants_weights, wants_value, _ = ctx.needs_input_grad
        return (
            QK.apply(grad, value, ctx.axes) if wants_weights else None,
            Scatter.apply(weights, grad, ctx.axes) if wants_value else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(AV, ctx, tangents)


class Scatter(_Bilinear):
    """sum_{p, j: n_j(p) = c} a[p, j] x[p]: (B, N, *map, K), (B, N, *map, D) -> (B, N, *map, D)."""

    @staticmethod
    def forward(weights: Tensor, x: Tensor, axes: Axes) -> Tensor:
        size = x.shape[2:-1]
        dtype = torch.promote_types(x.dtype, torch.float32)  # many blocks add to a cell
        if pairs_fit(x):
            every = weights.new_zeros((*x.shape[:2], size.numel(), size.numel()), dtype=dtype)
            index = neighbours(axes, x).expand(*x.shape[:2], -1, -1)
            every.scatter_add_(-1, index, _present(weights, axes, x).to(dtype))
            with without_autocast(x):
                return (every.mT @ x.flatten(2, -2).to(dtype)).unflatten(2, size).to(x.dtype)
        out = None
        blocks = [block.without_padding() for block in _cut(axes, x)]
        for part in slices(blocks, x.shape[0] * x.shape[1]):
            with without_autocast(x):
                sums = (_spread_windows(weights, axes, part).mT @ gather_queries(x, part)).flatten(2, -2).to(dtype)
            out = sums.new_zeros((*sums.shape[:2], size.numel(), sums.shape[-1])) if out is None else out
            out.index_add_(2, flat_index([axis.cells for axis in part], size).flatten(), sums)
        assert out is not None
        return out.unflatten(2, size).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        weights, x = ctx.saved_tensors
        wants_weights, wants_x, _ = ctx.needs_input_grad
        return (
            QK.apply(x, grad, ctx.axes) if wants_weights else None,
            AV.apply(weights, grad, ctx.axes) if wants_x else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _tangent(Scatter, ctx, tangents)


def _present(weights: Tensor, axes: Axes, tensor: Tensor) -> Tensor:
    """The weights (B, N, cells of the map, product of k), zero in places that hold no cell."""
    outside = _outside(axes, tensor)
    return (weights if outside is None else weights.masked_fill(outside, 0)).flatten(2, -2)


def _cut(axes: Axes, tensor: Tensor) -> list[Blocks]:
    return [cut(axis, cells, tensor.device) for axis, cells in zip(axes, tensor.shape[2:-1], strict=True)]


def _assembled(parts: Parts, size: torch.Size) -> Tensor:
    """The results of some queries at a time, (B, N, product of G and b, D), in one tensor (B, N, *map, D)."""
    first = next(parts)
    _, results = first
    out = results.new_empty((*results.shape[:2], size.numel(), results.shape[-1]))
    for blocks, some in chain([first], parts):
        out[:, :, flat_index([axis.queries for axis in blocks], size).flatten()] = some
    return out.unflatten(2, size)


def _take_windows(scores: Tensor, axes: Sequence[Blocks]) -> Tensor:
    """Of the scores against the whole span those of every query's window; anything in places that hold no cell.

    (B, N, *G, product of b, product of S) -> (B, N, product of G and b, product of k)
    """
    rank = len(axes)
    _, queries, spans = zip(*(axis.sizes for axis in axes), strict=True)
    scores = scores.unflatten(-1, spans).unflatten(2 + rank, queries)
    for axis, blocks in enumerate(axes):
        scores = _take_along(scores, blocks.column, axis)
    return scores.flatten(2 + 2 * rank).flatten(2, 1 + 2 * rank)


def _spread_windows(weights: Tensor, axes: Axes, blocks: Sequence[Blocks]) -> Tensor:
    """The weights of every query's window over the whole span; zero for cells that are not in it.

    (B, N, *map, product of k) -> (B, N, *G, product of b, product of S)
    """
    rank = len(axes)
    spread = gather_queries(weights, blocks).unflatten(-1, [axis.kernel_size for axis in axes])
    spread = spread.unflatten(2 + rank, [block.sizes[1] for block in blocks])
    for axis, block in enumerate(blocks):
        along = [0, 0] * (rank - 1 - axis)
        spread = _take_along(pad(spread, [*along, 0, 1]), block.place, axis)
    return spread.flatten(2 + 2 * rank).flatten(2 + rank, 1 + 2 * rank)


def _take_along(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """From the x entries of one axis those at ``index`` (G, b, y): (B, N, *G, *b, *x) -> (B, N, *G, *b, *y)."""
    rank = (tensor.ndim - 2) // 3
    shape = [*tensor.shape]
    shape[2 + 2 * rank + axis] = index.shape[-1]
    return tensor.gather(2 + 2 * rank + axis, align(index, rank, axis).expand(shape))
