# SPDX-License-Identifier: Apache-2.0
"""The one operation: check once, ask the backends in order, call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import DtypeError, OptionError, ShapeError
from ..precision import without_autocast
from ..private import unwatched
from ..window import Window, plain
from . import native, reference
from .backend import attend, backends, choose
from .problem import Call, Problem, describe, laid_out
from .softmax import softmax

__all__ = [
    "attention_scores",
    "attention_weights",
    "backends",
    "global_attention",
    "local_attention",
    "merge_attentions",
]

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
    call = Call(query, key, value, bias, relative, _scale(scale, problem))
    with unwatched():
        run = choose(problem, backend)
    if problem.empty:
        out, lse = _nothing(call)
    else:
        with without_autocast(problem.device):
            out, lse = attend(run, call, problem)
    if not return_lse:
        return out
    assert lse is not None, f"backend {run.name!r} returned no log-sum-exp"
    return out, lse


def project_and_attend(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    window: Window,
    *,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    num_heads: int,
    qk_channels: int,
    scale: float | None,
    backend: str | None,
    frugal: bool,
) -> Tensor | None:
    """:func:`local_attention` of what one pointwise convolution makes of x, query, key and value, by one operator for both.

    None where there is none, or where two steps are faster: then project, and call :func:`local_attention`.

    Shapes:
        x       (B, C, *map)
        weight  (2 * qk_channels + out, C, 1...), head by head in each part; offset one number for each of its rows
        returns (B, out, *map), in the memory format of x

    Args:
        frugal: project again in the backward, also where that takes longer than to keep query, key and value.
    """
    without_numbers = x.new_empty(()).expand(len(x), len(weight), *x.shape[2:])
    problem = describe(*native.heads_of(without_numbers, num_heads, qk_channels), window, bias, relative)
    tensors = [x, weight, offset, bias, *(relative or ())]
    needs_grad = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)
    problem = replace(problem, needs_grad=needs_grad)
    if problem.empty or choose(problem, backend) is not native:
        return None
    layer = (x, weight, offset, (bias, relative), num_heads, qk_channels)
    return native.project_and_attend(*layer, _scale(scale, problem), problem, frugal)


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
    laid_out("key", key)
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
        return reference.attention_scores(Call(query, key, key, bias, relative, _scale(scale, problem)), problem)


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
    key = key.repeat_interleave(problem.groups, 1)
    call = Call(query, key, key, bias, relative, _scale(scale, problem))
    per_query = query.shape[0] * query.shape[1] * query.shape[-1] * math.prod(axis.kernel_size for axis in problem.axes)
    with without_autocast(problem.device):
        parts = [
            softmax(reference.attention_scores(call, problem, some), problem.rank)
            for some in queries.to(query.device, torch.int64).split(max(1, GATHERED // max(per_query, 1)))
        ]
    return torch.cat(parts, 2)


def _check_queries(queries: Tensor, problem: Problem) -> None:
    if not isinstance(queries, Tensor):
        raise DtypeError(f"queries must be a tensor of indices, or None for all; received {type(queries).__name__}")
    if queries.ndim != 2 or queries.shape[1] != problem.rank:
        raise ShapeError(
            f"queries must be (Q, {problem.rank}), an index per axis of the map; received {tuple(queries.shape)}"
        )
    if queries.dtype == torch.bool or queries.is_floating_point() or queries.is_complex():
        raise DtypeError(f"queries must be whole numbers, such as torch.int64; received {queries.dtype}")
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
        DtypeError: a nested or sparse tensor.

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
    for tensor in (*outputs, *lses):
        laid_out("each output and log-sum-exp", tensor)
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


def _nothing(call: Call) -> tuple[Tensor, Tensor]:
    """An empty result that is a function of every input, so that each gets its gradient of zeros."""
    zero = torch.as_tensor(sum(tensor.sum() * 0 for tensor in call.tensors))
    out = call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1]) + zero.to(call.query.dtype)
    return out, out.sum(-1).to(torch.promote_types(call.query.dtype, torch.float32))


def _scale(scale: float | None, problem: Problem) -> float:
    scale = check_scale(scale)
    return max(problem.head_dim, 1) ** -0.5 if scale is None else scale


def check_scale(scale: Any) -> float | None:
    """A finite number, or None, which a call makes head_dim ** -0.5."""
    if scale is None:
        return None
    scale = plain(scale)
    if isinstance(scale, Tensor) or not isinstance(scale, (int, float)):
        raise DtypeError(f"scale must be a number or None for head_dim ** -0.5; received {type(scale).__name__}")
    if not math.isfinite(scale):
        raise OptionError(f"scale must be finite; received {scale}")
    return float(scale)
