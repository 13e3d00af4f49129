# SPDX-License-Identifier: Apache-2.0
"""The one operation: check once, ask the backends in order, call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import BackendError, DtypeError, OptionError, ShapeError
from ..precision import without_autocast
from ..window import Window
from . import blocked, dense, flex, native, natten, reference
from .problem import Problem, describe
from .softmax import softmax

__all__ = [
    "attention_scores",
    "attention_weights",
    "backends",
    "global_attention",
    "local_attention",
    "merge_attentions",
]

# In order of preference. A backend is a module with a `name`, `unavailable()` (why it cannot run on this machine at all),
# `why_not(problem)` (why it cannot take a problem) and `attend(...)`, which returns the result and, where the problem asks
# for it, the log-sum-exp. It may have `second_best(problem)`: why a later one is the better choice; that keeps it from
# being chosen, not from being named. `attend` gets as many query heads as keys, unless the backend says `takes_groups`.
BACKENDS: tuple[ModuleType, ...] = (native, natten, flex, dense, blocked, reference)

GATHERED = 2**22  # numbers of the keys: 16 MB in float32; of chosen queries so many are gathered at a time


@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mix the values of each query's memory block by a softmax of content plus position.

        y[p] = sum_{c in N(p)} softmax_c( scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p] ) v[c]

    Source: Ramachandran et al. 2019 (SASA, arXiv:1906.05909), eq. 3; the bias table is that of Swin and NAT.

    Differs from the paper: ``scale=None`` means ``head_dim ** -0.5`` where the paper has no factor (``scale=1.0``); cells
    off the image are masked, on which the paper is silent; and ``relative`` holds a full-width vector per axis, of which
    SASA's half-row and half-column vectors are the case with the other half zero.

    Shapes:
        query       (B, N, *out, D), one entry per output cell, out = window.output_size(in)
        key         (B, N, *in, D), or fewer heads: see below
        value       (B, N, *in, E); E may differ from D
        bias        (N, *table_size): an entry per relative offset, k per axis, or 2k-1 where blocks shift or are shared
        relative    one tensor per axis, each (N, entries, D)
        returns     (B, N, *out, E), dtype and device of query; with ``return_lse`` also the log-sum-exp (B, N, *out)

        One, two or three map axes. Any strides: a permuted view of (B, C, H, W) or of (B, H, W, N, D) goes in without a
        copy made by the caller. Every tensor is differentiable.

    Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): key and value may have M heads where M divides N; each
    serves N / M neighbouring query heads. They are not copied, and their gradients are sums over the group. Bias and
    relative tables stay those of the N query heads.

    A query that sees no key, as where its bias is -inf everywhere, gets zeros, a log-sum-exp of -inf, and gradients of zero.

    Units: the window is in cells of the input map.

    Args:
        window: the memory block.
        scale: factor of q.k and of q.r, not of the bias; 0.0 is a value.
        return_lse: return also log(sum of exp(logits)) of every query, in float32 or wider and differentiable: what
            :func:`merge_attentions` needs.
        backend: one of ``backends()``; None takes the first that can.

    Raises:
        ShapeError: sizes that do not fit together; the message names the rule and the shapes received.
        DtypeError: a tensor that is not floating point, or tensors of different dtypes or devices.
        OptionError: an unknown backend, a scale that is not finite.
        BackendError: the named backend cannot run this problem; the message says why and which can.

    Example:
        >>> q = k = v = torch.randn(2, 8, 32, 32, 16)
        >>> local_attention(q, k, v, Window(7)).shape
        torch.Size([2, 8, 32, 32, 16])
    """
    problem = describe(query, key, value, window, bias, relative, lse=return_lse)
    scale = _scale(scale, problem)
    run = _choose(problem, backend)
    if problem.empty:
        out, lse = _nothing(query, key, value, bias, relative)
    else:
        with without_autocast(problem.device):
            out, lse = _attend(run, query, key, value, problem, bias, relative, scale)
    if not return_lse:
        return out
    assert lse is not None, f"backend {run.name!r} returned no log-sum-exp"
    return out, lse


@overload
def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Local attention with a memory block as large as the image: every query sees every cell.

        y[p] = sum_c softmax_c( scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p] ) v[c]

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1, with the position terms of :func:`local_attention`.

    Shapes:
        query, key  (B, N, *map, D)
        value       (B, N, *map, E)
        bias        (N, *(2n-1)): entry ``offset + n - 1`` per axis
        relative    one tensor per axis, each (N, 2n-1, D)
        returns     (B, N, *map, E); with ``return_lse`` also the log-sum-exp (B, N, *map)

    Without position terms it is permutation-equivariant. Fewer heads of key and value, ``return_lse`` and what is raised
    are as in :func:`local_attention`.

    Example:
        >>> q = k = v = torch.randn(2, 8, 14, 14, 16)
        >>> global_attention(q, k, v).shape
        torch.Size([2, 8, 14, 14, 16])
    """
    size = key.shape[2:-1] if isinstance(key, Tensor) else ()
    window = Window.everywhere(size) if 1 <= len(size) <= 3 else Window(1)
    options: dict[str, Any] = {"bias": bias, "relative": relative, "scale": scale, "backend": backend}
    return local_attention(query, key, value, window, return_lse=return_lse, **options)


def attention_scores(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The logits of :func:`local_attention` before their softmax, (B, N, *out, *kernel_size).

        score[p, c] = scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p]

    In float32 or wider, differentiable, and -inf at places of the block that take no part. For looking and for rules of
    one's own, not for speed: it holds a number for every pair. Raises what :func:`local_attention` raises.

    Example:
        >>> q = k = torch.randn(1, 2, 9, 9, 16)
        >>> attention_scores(q, k, Window(3))[0, 0, 0, 0, 0]  # above the first row there is nothing
        tensor([-inf, -inf, -inf])
    """
    problem = describe(query, key, key, window, bias, relative)
    key = key.repeat_interleave(problem.groups, 1)
    with without_autocast(problem.device):
        return reference.attention_scores(query, key, problem, bias, relative, _scale(scale, problem))


def attention_weights(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    queries: Tensor | None = None,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The softmax weights of :func:`local_attention`, (B, N, *out, *kernel_size): for looking, not for speed.

    Places of the block that take no part have weight zero, so the weights of every query sum to one; those of a query that
    sees no key are all zero.

    Args:
        queries: (Q, rank), the index of each along every axis of the output: of those alone, (B, N, Q, *kernel_size), in
            memory that does not grow with the map. None is all of them.

    Raises what :func:`local_attention` raises, and ShapeError for a query that is not there.

    Example:
        >>> q = k = torch.randn(1, 2, 9, 9, 16)
        >>> attention_weights(q, k, Window(3)).shape
        torch.Size([1, 2, 9, 9, 3, 3])
        >>> attention_weights(q, k, Window(3), queries=torch.tensor([[0, 0], [4, 7]])).shape
        torch.Size([1, 2, 2, 3, 3])
    """
    if queries is None:
        scores = attention_scores(query, key, window, bias=bias, relative=relative, scale=scale)
        return softmax(scores, query.ndim - 3)
    problem = describe(query, key, key, window, bias, relative)
    _check_queries(queries, problem)
    key, scale = key.repeat_interleave(problem.groups, 1), _scale(scale, problem)
    per_query = query.shape[0] * query.shape[1] * query.shape[-1] * math.prod(axis.kernel_size for axis in problem.axes)
    with without_autocast(problem.device):
        parts = [
            softmax(reference.attention_scores(query, key, problem, bias, relative, scale, some), problem.rank)
            for some in queries.to(query.device).split(max(1, GATHERED // max(per_query, 1)))
        ]
    return torch.cat(parts, 2)


def _check_queries(queries: Tensor, problem: Problem) -> None:
    if queries.ndim != 2 or queries.shape[1] != problem.rank:
        raise ShapeError(
            f"queries must be (Q, {problem.rank}), an index per axis of the map; received {tuple(queries.shape)}"
        )
    limit = torch.tensor(problem.out_size, device=queries.device)
    if ((queries < 0) | (queries >= limit)).any():
        raise ShapeError(f"queries must lie in an output of {problem.out_size}; received {queries.tolist()}")


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention over several sets of keys, from the attention over each of them and its log-sum-exp.

        lse = log sum_i exp(lse_i),   y = sum_i exp(lse_i - lse) y_i

    This is how registers, sinks, a global summary or a second window join a local attention in one softmax. The sets have
    to be disjoint for that: a key in two of them votes twice.

    Source: Milakov and Gimelshein 2018 (arXiv:1805.02867), section 3.1, the associative step of the online softmax.

    Shapes: outputs (..., E) each, log-sum-exps (...) each -> the merged output (..., E) in the outputs' dtype, and its
    log-sum-exp (...) in float32 or wider. Both are differentiable by everything. A query without any key in a set has
    log-sum-exp -inf there, whatever its output; one without any at all gets zeros and -inf.

    Raises:
        ShapeError: not one log-sum-exp per output, or shapes that differ.

    Example:
        >>> q = k = v = torch.randn(2, 8, 32, 32, 16)
        >>> near = local_attention(q, k, v, Window(7), return_lse=True)
        >>> keys, values = torch.randn(2, 8, 4, 16)  # 4 learned registers that every query sees
        >>> scores = torch.einsum("bnhwd, nrd -> bnhwr", q, keys) * 16**-0.5
        >>> registers = torch.einsum("bnhwr, nrd -> bnhwd", scores.softmax(-1), values), scores.logsumexp(-1)
        >>> sink = torch.zeros_like(q), torch.zeros(8, 1, 1).expand(2, 8, 32, 32)  # a learned logit, and nothing behind it
        >>> y, lse = merge_attentions(*zip(near, registers, sink))
        >>> y.shape, lse.shape
        (torch.Size([2, 8, 32, 32, 16]), torch.Size([2, 8, 32, 32]))
    """
    outputs, lses = list(outputs), list(lses)
    fits = len(outputs) == len(lses) > 0 and all(
        out.shape == outputs[0].shape and lse.shape == outputs[0].shape[:-1]
        for out, lse in zip(outputs, lses, strict=True)
    )
    if not fits:
        raise ShapeError(
            "merge_attentions takes one log-sum-exp (...) for each output (..., channels), all of one shape; "
            f"received outputs {[tuple(out.shape) for out in outputs]}, log-sum-exps {[tuple(lse.shape) for lse in lses]}"
        )
    dtype = torch.promote_types(outputs[0].dtype, torch.float32)
    each = torch.stack([lse.to(dtype) for lse in lses])
    absent = each == float("-inf")
    alone = absent.all(0)  # a softmax over nothing would be NaN
    seen = each.masked_fill(alone, 0)
    # What stands at a query without keys may be NaN, which a weight of zero would not stop.
    parts = [
        weight[..., None] * out.masked_fill(gone[..., None], 0)
        for weight, out, gone in zip(seen.softmax(0), outputs, absent, strict=True)
    ]
    out = torch.stack(parts).sum(0).to(outputs[0].dtype)
    return out, seen.logsumexp(0).masked_fill(alone, float("-inf"))


def backends(problem: Problem | None = None) -> dict[str, str | None]:
    """Every backend with None, or the reason why it cannot run: on this machine, or the given problem.

    Example:
        >>> backends()["reference"] is None
        True
    """
    return {backend.name: _why_not(backend, problem) for backend in BACKENDS}


def _why_not(backend: ModuleType, problem: Problem | None) -> str | None:
    reason = backend.unavailable()
    return backend.why_not(problem) if reason is None and problem is not None else reason


def _second_best(backend: ModuleType, problem: Problem) -> str | None:
    return backend.second_best(problem) if hasattr(backend, "second_best") else None


def _choose(problem: Problem, name: str | None) -> ModuleType:
    if name is None:
        return next(
            backend for backend in BACKENDS if _why_not(backend, problem) is None and not _second_best(backend, problem)
        )
    for backend in BACKENDS:
        if backend.name == name:
            reason = _why_not(backend, problem)
            if reason is None:
                return backend
            able = [other for other, why in backends(problem).items() if why is None]
            raise BackendError(f"backend {name!r} cannot run this: {reason}. These can: {', '.join(able)}")
    names = ", ".join(backend.name for backend in BACKENDS)
    raise OptionError(f"backend must be one of {names}, or None to choose; received {name!r}")


def _attend(
    run: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    groups = problem.groups
    if groups == 1 or getattr(run, "takes_groups", False):
        return run.attend(query, key, value, problem, bias, relative, scale)
    # The first query head of every key, then the second of every key, ...: keys and values stay where they are.
    one_each = replace(problem, groups=1)
    found = []
    for nth in range(groups):
        some = slice(nth, None, groups)
        tables = (None if bias is None else bias[some], None if relative is None else [t[some] for t in relative])
        found.append(run.attend(query[:, some], key, value, one_each, *tables, scale))
    outs, lses = zip(*found, strict=True)
    return torch.stack(outs, 2).flatten(1, 2), torch.stack(lses, 2).flatten(1, 2) if problem.lse else None


def _nothing(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, relative: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """An empty result that is a function of every input, so that each gets its gradient of zeros."""
    inputs = [query, key, value, *([] if bias is None else [bias]), *(relative or ())]
    zero = torch.as_tensor(sum(tensor.sum() * 0 for tensor in inputs))
    out = query.new_zeros(*query.shape[:-1], value.shape[-1]) + zero.to(query.dtype)
    return out, out.sum(-1).to(torch.promote_types(query.dtype, torch.float32))


def _scale(scale: float | None, problem: Problem) -> float:
    if scale is None:
        return max(problem.head_dim, 1) ** -0.5
    if isinstance(scale, Tensor) or not isinstance(scale, (int, float)):
        raise DtypeError(f"scale must be a number or None for head_dim ** -0.5; received {type(scale).__name__}")
    if not math.isfinite(scale):
        raise OptionError(f"scale must be finite; received {scale}")
    return float(scale)
