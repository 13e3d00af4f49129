# SPDX-License-Identifier: Apache-2.0
"""What nearsight has to compute, by plain loops in float64, straight from "Semantics" in docs/design.md.

This file never imports nearsight: it shares neither its geometry nor its tensors, so that one misunderstanding cannot sit
on both sides of a comparison.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """One axis of the map and the window along it. The border "global" stands for global_attention: all cells."""

    cells: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    border: str = "mask"
    causal: bool = False
    shared_by: int = 1

    @property
    def queries(self) -> int:
        return len(range(0, self.cells, self.stride))

    @property
    def table_size(self) -> int:
        if self.border == "global":
            return 2 * self.cells - 1
        return 2 * self.kernel_size - 1 if self.border == "shift" or self.shared_by > 1 else self.kernel_size


def places(axis: Axis, query: int) -> list[tuple[int, int, int]]:
    """The (place in the window, cell, table entry) of all that takes part along one axis.

    Cell n, one past the end, is the cell outside that votes with zeros.
    """
    if axis.shared_by > 1:
        return shared_places(axis, query)
    n, k, stride, d, border, causal, _ = axis
    centre = query * stride
    if border == "global":
        return [(cell, cell, cell - centre + n - 1) for cell in range(n)]
    if border == "shift" and not causal:
        phase, i = centre % d, centre // d
        m = len(range(phase, n, d))
        start = min(max(i - k // 2, 0), m - min(k, m))
        return [(t - start, phase + t * d, t - i + k - 1) for t in range(start, start + min(k, m))]
    found = []
    for j in range(k):
        cell = centre + (j - (k - 1 if causal else k // 2)) * d
        if border == "wrap":
            found.append((j, cell % n, j))
        elif 0 <= cell < n:
            found.append((j, cell, j))
        elif border == "zeros":
            found.append((j, n, j))
    return found


def shared_places(axis: Axis, query: int) -> list[tuple[int, int, int]]:
    """The same where ``shared_by`` neighbours on a dilation phase share the window of the one in their middle."""
    n, k, stride, d, border, causal, g = axis
    phase, i = query * stride % d, query * stride // d
    m = len(range(phase, n, d))
    group = range(i // g * g, i // g * g + g)
    if causal:
        last = max(t for t in group if t < m)
        window = [last - k + 1 + j for j in range(k)]
    else:
        window = [group[g // 2] - k // 2 + j for j in range(k)]
    if border == "shift" and not causal:
        while window[-1] >= m and window[0] > 0:
            window = [t - 1 for t in window]
        while window[0] < 0:
            window = [t + 1 for t in window]
    found = []
    for j, t in enumerate(window):
        if causal and t > i:
            continue
        if 0 <= t < m:
            found.append((j, phase + t * d, t - i + k - 1))
        elif border == "wrap":
            found.append((j, (phase + t * d) % n, t - i + k - 1))
        elif border == "zeros":
            found.append((j, n, t - i + k - 1))
    return found


def block(axes: list[Axis], query: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
    """The same over all axes: a list of (places, cells, entries), each a tuple with one index per axis."""
    per_axis = [places(axis, p) for axis, p in zip(axes, query, strict=True)]
    return [tuple(zip(*combination, strict=True)) for combination in product(*per_axis)]


def weights_of(axes, query, key, bias, relative, scale, b, n, p):
    """The block of one query, its logits and their softmax. ``key`` is padded: see :func:`with_zero_cell`."""
    seen = block(axes, p)
    logits = np.empty(len(seen))
    for c, (_, cell, entry) in enumerate(seen):
        logits[c] = scale * (query[(b, n, *p)] @ key[(b, n, *cell)])
        for table, e in zip(relative, entry, strict=bool(relative)):
            logits[c] += scale * (query[(b, n, *p)] @ table[n, e])
        if bias is not None:
            logits[c] += bias[(n, *entry)]
    exponentials = np.exp(logits - logits.max())
    return seen, logits, exponentials / exponentials.sum()


def with_zero_cell(tensor: np.ndarray) -> np.ndarray:
    """(B, N, *in, D) with one more cell of zeros at the end of every map axis."""
    return np.pad(tensor, [(0, 0), (0, 0), *[(0, 1)] * (tensor.ndim - 3), (0, 0)])


def default(scale: float | None, query: np.ndarray) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def attention(query, key, value, axes, bias=None, relative=(), scale=None):
    """The result (B, N, *out, E), the weights (B, N, *out, *kernel_size) and the largest |logit|."""
    scale, key, value = default(scale, query), with_zero_cell(key), with_zero_cell(value)
    out = np.zeros((*query.shape[:-1], value.shape[-1]))
    weights = np.zeros((*query.shape[:-1], *(axis.kernel_size for axis in axes)))
    largest = 0.0
    for b, n, *p in np.ndindex(query.shape[:-1]):
        seen, logits, softmax = weights_of(axes, query, key, bias, relative, scale, b, n, p)
        largest = max(largest, np.abs(logits).max())
        for (place, cell, _), weight in zip(seen, softmax, strict=True):
            out[(b, n, *p)] += weight * value[(b, n, *cell)]
            weights[(b, n, *p, *place)] = weight
    return out, weights, largest


def log_sum_exp(query, key, axes, bias=None, relative=(), scale=None):
    """log of the sum of every query's exp(logits), (B, N, *out)."""
    scale, key = default(scale, query), with_zero_cell(key)
    lse = np.zeros(query.shape[:-1])
    for b, n, *p in np.ndindex(lse.shape):
        _, logits, _ = weights_of(axes, query, key, bias, relative, scale, b, n, p)
        lse[(b, n, *p)] = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return lse


def gradients(grad, query, key, value, axes, bias=None, relative=(), scale=None, grad_lse=None):
    """The derivatives of ``(grad * out).sum()``: [dquery, dkey, dvalue, dbias if given, *drelative].

    With ``grad_lse`` those of ``(grad * out).sum() + (grad_lse * lse).sum()``.
    """
    scale, key, value = default(scale, query), with_zero_cell(key), with_zero_cell(value)
    dquery, dkey, dvalue = np.zeros_like(query), np.zeros_like(key), np.zeros_like(value)
    dbias = None if bias is None else np.zeros_like(bias)
    drelative = [np.zeros_like(table) for table in relative]
    for b, n, *p in np.ndindex(query.shape[:-1]):
        here = (b, n, *p)
        seen, _, softmax = weights_of(axes, query, key, bias, relative, scale, b, n, p)
        dweights = np.array([grad[here] @ value[(b, n, *cell)] for _, cell, _ in seen])
        dlogits = softmax * (dweights - softmax @ dweights)
        if grad_lse is not None:
            dlogits += softmax * grad_lse[here]
        for (_, cell, entry), weight, dlogit in zip(seen, softmax, dlogits, strict=True):
            dquery[here] += scale * dlogit * key[(b, n, *cell)]
            dkey[(b, n, *cell)] += scale * dlogit * query[here]
            dvalue[(b, n, *cell)] += weight * grad[here]
            for table, dtable, e in zip(relative, drelative, entry, strict=bool(relative)):
                dquery[here] += scale * dlogit * table[n, e]
                dtable[n, e] += scale * dlogit * query[here]
            if dbias is not None:
                dbias[(n, *entry)] += dlogit
    inside = (slice(None), slice(None), *(slice(axis.cells) for axis in axes))
    return [dquery, dkey[inside], dvalue[inside], *([] if dbias is None else [dbias]), *drelative]


def queries_that_see(axes: list[Axis], cell: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Which queries have a cell in their block."""
    queries = np.ndindex(*(axis.queries for axis in axes))
    return {p for p in queries if any(seen == cell for _, seen, _ in block(axes, p))}
