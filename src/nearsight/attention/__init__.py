# SPDX-License-Identifier: Apache-2.0
"""The one operation: check once, ask the backends in order, call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendError, DtypeError, OptionError
from ..window import Window
from . import blocked, dense, native, reference
from .problem import Problem, describe

__all__ = ["attention_weights", "backends", "global_attention", "local_attention"]

# In order of preference. A backend is a module with a `name`, `unavailable()` (why it cannot run on this machine at all),
# `why_not(problem)` (why it cannot take a problem) and `attend(...)`. It may have `slower_on(problem)`: why a later one is
# faster there, as measured; that keeps it from being chosen, not from being named.
BACKENDS: tuple[ModuleType, ...] = (native, dense, blocked, reference)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Mix the values of each query's memory block by a softmax of content plus position.

        y[p] = sum_{c in N(p)} softmax_c( scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p] ) v[c]

    Source: Ramachandran et al. 2019 (SASA, arXiv:1906.05909), eq. 3; the bias table is that of Swin and NAT.

    Differs from the paper: ``scale=None`` means ``head_dim ** -0.5`` where the paper has no factor (``scale=1.0``); cells
    off the image are masked, on which the paper is silent; and ``relative`` holds a full-width vector per axis, of which
    SASA's half-row and half-column vectors are the case with the other half zero.

    Shapes:
        query       (B, N, *out, D), one entry per output cell, out = window.output_size(in)
        key         (B, N, *in, D)
        value       (B, N, *in, E); E may differ from D
        bias        (N, *kernel_size), or (N, *(2k-1)) with border "shift": one entry per relative offset
        relative    one tensor per axis, each (N, k, D), or (N, 2k-1, D) with border "shift"
        returns     (B, N, *out, E), dtype and device of query

        One, two or three map axes. Any strides: a permuted view of (B, C, H, W) or of (B, H, W, N, D) goes in without a
        copy made by the caller. Every tensor is differentiable.

    Units: the window is in cells of the input map.

    Args:
        window: the memory block.
        scale: factor of q.k and of q.r, not of the bias; 0.0 is a value.
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
    problem = describe(query, key, value, window, bias, relative)
    scale = _scale(scale, problem)
    run = _choose(problem, backend)
    if problem.empty:
        return _nothing(query, key, value, bias, relative)
    with _full_precision(problem):
        return run.attend(query, key, value, problem, bias, relative, scale)


def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Local attention with a memory block as large as the image: every query sees every cell.

        y[p] = sum_c softmax_c( scale * (q[p].k[c] + sum_axis q[p].r_axis[c - p]) + bias[c - p] ) v[c]

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1, with the position terms of :func:`local_attention`.

    Shapes:
        query, key  (B, N, *map, D)
        value       (B, N, *map, E)
        bias        (N, *(2n-1)): entry ``offset + n - 1`` per axis
        relative    one tensor per axis, each (N, 2n-1, D)
        returns     (B, N, *map, E)

    Without position terms it is permutation-equivariant. Raises what :func:`local_attention` raises.

    Example:
        >>> q = k = v = torch.randn(2, 8, 14, 14, 16)
        >>> global_attention(q, k, v).shape
        torch.Size([2, 8, 14, 14, 16])
    """
    size = key.shape[2:-1] if isinstance(key, Tensor) else ()
    window = Window.everywhere(size) if 1 <= len(size) <= 3 else Window(1)
    return local_attention(query, key, value, window, bias=bias, relative=relative, scale=scale, backend=backend)


def attention_weights(
    query: Tensor,
    key: Tensor,
    window: Window,
    *,
    bias: Tensor | None = None,
    relative: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The softmax weights of :func:`local_attention`, (B, N, *out, *kernel_size): for looking, not for speed.

    Places of the block that take no part have weight zero, so the weights of every query sum to one.
    Raises what :func:`local_attention` raises.

    Example:
        >>> q = k = torch.randn(1, 2, 9, 9, 16)
        >>> attention_weights(q, k, Window(3)).shape
        torch.Size([1, 2, 9, 9, 3, 3])
    """
    problem = describe(query, key, key, window, bias, relative)
    with _full_precision(problem):
        return reference.attention_weights(query, key, problem, bias, relative, _scale(scale, problem))


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


def _slower(backend: ModuleType, problem: Problem) -> str | None:
    return backend.slower_on(problem) if hasattr(backend, "slower_on") else None


def _choose(problem: Problem, name: str | None) -> ModuleType:
    if name is None:
        return next(
            backend for backend in BACKENDS if _why_not(backend, problem) is None and not _slower(backend, problem)
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


def _nothing(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, relative: Sequence[Tensor] | None
) -> Tensor:
    """An empty result that is a function of every input, so that each gets its gradient of zeros."""
    inputs = [query, key, value, *([] if bias is None else [bias]), *(relative or ())]
    zero = sum(tensor.sum() * 0 for tensor in inputs)
    return query.new_zeros(*query.shape[:-1], value.shape[-1]) + torch.as_tensor(zero).to(query.dtype)


def _scale(scale: float | None, problem: Problem) -> float:
    if scale is None:
        return max(problem.head_dim, 1) ** -0.5
    if isinstance(scale, Tensor) or not isinstance(scale, (int, float)):
        raise DtypeError(f"scale must be a number or None for head_dim ** -0.5; received {type(scale).__name__}")
    if not math.isfinite(scale):
        raise OptionError(f"scale must be finite; received {scale}")
    return float(scale)


def _full_precision(problem: Problem):
    """Autocast must not narrow the logits again: the operation keeps them in float32 or wider on its own."""
    if torch.amp.is_autocast_available(problem.device):
        return torch.autocast(problem.device, enabled=False)
    return nullcontext()
