# SPDX-License-Identifier: Apache-2.0
"""``natten.functional``: the fused calls of NATTEN 0.17 and later, and the split ones of 0.15 to 0.17.

The window is NATTEN's: shifted inside the map so that every query sees ``kernel_size`` cells per axis, on the query's
dilation phase; a causal axis is masked instead. Differs from NATTEN on a map smaller than the window, which it refuses: a
query sees the cells there are, as everywhere in nearsight. Whatever chooses a kernel (``backend``, tile shapes, schedules)
is taken and not used: :func:`nearsight.local_attention` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...attention import local_attention
from ...attention import merge_attentions as merge
from ...attention.problem import describe, laid_out
from ...errors import OptionError, ShapeError
from ...window import Window
from . import split
from .arguments import names_its_arguments
from .older import also_as_in_0_15, older_names
from .traced import AV, FUSED, QK, as_one_node
from .windows import cells_of, scale_of, window_of, with_depth, without_autocast

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]
__all__ += ["na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]

Sizes = int | Sequence[int]
Causal = bool | Sequence[bool] | None


def _check_rank(name: str, tensor: Any, rank: int, layout: str) -> None:
    laid_out(name, tensor)
    if not isinstance(tensor, Tensor) or tensor.ndim != rank + 3:
        received = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ShapeError(f"{name} must be a tensor {layout} with {rank} map axes; received {received}")


# --------------------------------------------------------------------------------------------------------- fused calls


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sizes,
    *positional: Any,
    stride: Sizes | None = 1,
    dilation: Sizes | None = 1,
    is_causal: Causal = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    rpb: Tensor | None = None,
    backend: str | None = None,
    q_tile_shape: Any = None,
    kv_tile_shape: Any = None,
    backward_q_tile_shape: Any = None,
    backward_kv_tile_shape: Any = None,
    backward_kv_splits: Any = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    try_fuse_additional_kv: bool = False,
    xformers_kwargs: dict | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Neighbourhood attention over one, two or three axes, heads last.

        y[p] = sum_{c in N(p)} softmax_c( scale * q[p].k[c] + rpb[c - p] ) v[c]

    Source: Hassani et al. 2023 (NAT, arXiv:2204.07143); Hassani and Shi 2022 (DiNAT, arXiv:2209.15001); for ``stride``
    Hassani et al. 2025 (generalized neighborhood attention, arXiv:2504.16922).

    Shapes:
        query               (B, *map, N, D)
        key                 (B, *map, M, D), with M dividing N: each serves N / M neighbouring query heads
        value               (B, *map, M, E)
        additional_keys     (B, any, M, D), seen by every query besides its window
        additional_values   (B, any, M, E)
        rpb                 (N, *(2 * kernel_size - 1)): entry ``key - query + kernel_size - 1`` per axis
        returns             (B, *map, N, E), contiguous; with ``return_lse`` also the log-sum-exp (B, *map, N), likewise

    Args:
        kernel_size: cells per axis.
        stride: neighbouring queries that share the window of the one in their middle (of two, the right one; on a causal
            axis the last). The output keeps its size. 1 slides, ``kernel_size`` is Swin's blocks.
        dilation: distance in cells between neighbouring cells of the window.
        is_causal: hide what lies behind the query, for all axes or one value per axis.
        scale: factor of q.k, not of ``rpb``; None means ``D ** -0.5``, and so do zero and False, as in every NATTEN.
        rpb: the relative positional bias of NATTEN up to 0.17.5.
        return_lse: also return the log of the sum of the exponentials, additional keys included.
        attention_kwargs, backend, q_tile_shape, kv_tile_shape, backward_q_tile_shape, backward_kv_tile_shape,
        backward_kv_splits, backward_use_pt_reduction, run_persistent_kernel, kernel_schedule, torch_compile,
        try_fuse_additional_kv, xformers_kwargs: not used.

    Every value for an axis is one for all or a tuple; None is 1, of ``is_causal`` False. The fifth argument has to be named:
    it was the dilation up to 0.17.5 and is the stride from 0.20 on.

    Raises:
        ShapeError: shapes that do not fit together.
        DtypeError: a nested or sparse tensor; not floating point, or not of one dtype and device.
        OptionError: an argument of another name, an unnamed fifth one, ``stride`` above ``kernel_size``, ``rpb`` together
            with ``stride``.

    Example:
        >>> q = k = v = torch.randn(2, 14, 14, 4, 16)
        >>> neighborhood_attention_generic(q, k, v, 7, dilation=2).shape
        torch.Size([2, 14, 14, 4, 16])
    """
    if positional:
        raise OptionError(
            "name the arguments after kernel_size: the fifth was the dilation up to NATTEN 0.17.5 and is the stride from "
            f"0.20 on; received {positional}"
        )
    laid_out("query", query)
    rank = query.ndim - 3
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_rank(name, tensor, rank, "(batch, *map, heads, head_dim)")
    window = window_of(rank, kernel_size, stride, dilation, is_causal)
    axes = window.axes(rank)
    laid_out("rpb", rpb)
    if rpb is not None and any(axis.shared_by > 1 for axis in axes):
        raise OptionError("rpb and stride never met in one NATTEN: rpb is up to 0.17.5, stride from 0.20 on")
    for name, tensor in (("additional_keys", additional_keys), ("additional_values", additional_values)):
        laid_out(name, tensor)
    if (additional_keys is None) != (additional_values is None):
        raise ShapeError("additional_keys and additional_values go together; received one of them")

    def call(query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, *additional: Tensor) -> Any:
        return _attend(query, key, value, window, rpb, scale, additional, return_lse)

    additional = () if additional_keys is None else (additional_keys, additional_values)
    cells = cells_of(axes) + (0 if additional_keys is None else additional_keys.shape[1])
    return as_one_node(FUSED[rank], cells, call, query, key, value, rpb, *additional)


def _attend(query, key, value, window: Window, rpb, scale, additional, return_lse: bool) -> Any:
    scale = scale_of(scale, query.shape[-1])
    heads_first = query.movedim(-2, 1), key.movedim(-2, 1), value.movedim(-2, 1)
    wants_lse: Any = return_lse or bool(additional)
    found = local_attention(*heads_first, window, bias=rpb, scale=scale, return_lse=wants_lse)
    if isinstance(found, Tensor):
        return found.movedim(1, -2).contiguous()
    out, lse = found[0].movedim(1, -2), found[1].movedim(1, -1)
    if additional:
        rank = query.ndim - 3
        others = attention(query.flatten(1, rank), *additional, scale=scale, return_lse=True)
        outs, lses = zip((out, lse), (tensor.unflatten(1, query.shape[1 : 1 + rank]) for tensor in others), strict=True)
        out, lse = merge(outs, lses)
    # Clients go on with `view`. What the kernel wrote heads last, as it does for maps that lie so, is not copied.
    return (out.contiguous(), lse.contiguous()) if return_lse else out.contiguous()


def _fused(rank: int) -> Callable:
    def na(query: Tensor, key: Tensor, value: Tensor, kernel_size: Sizes, *positional: Any, **options: Any) -> Any:
        _check_rank("query", query, rank, "(batch, *map, heads, head_dim)")
        return generic(query, key, value, kernel_size, *positional, **options)

    meaning, _, _ = (generic.__doc__ or "").partition("    Example:")
    size = ", ".join("8" * rank)
    example = f"""    Example:
        >>> q = k = v = torch.randn(2, {size}, 4, 16)
        >>> na{rank}d(q, k, v, kernel_size=3).shape
        torch.Size([2, {size}, 4, 16])
    """
    na.__doc__ = meaning.replace("one, two or three axes", f"{rank} of the axes of a map", 1) + example
    return names_its_arguments(na, f"na{rank}d", like=generic)


generic = neighborhood_attention_generic
na1d, na2d, na3d = map(_fused, (1, 2, 3))
neighborhood_attention_generic = names_its_arguments(generic, generic.__name__)


@names_its_arguments
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *positional: Any,
    is_causal: bool | None = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,
    seqlens_KV: Tensor | None = None,
    cumulative_seqlen_Q: Tensor | None = None,
    cumulative_seqlen_KV: Tensor | None = None,
    max_seqlen_Q: int | None = None,
    max_seqlen_KV: int | None = None,
    backend: str | None = None,
    q_tile_size: int | None = None,
    kv_tile_size: int | None = None,
    backward_q_tile_size: int | None = None,
    backward_kv_tile_size: int | None = None,
    backward_kv_splits: int | None = None,
    backward_use_pt_reduction: bool = False,
    run_persistent_kernel: bool = True,
    kernel_schedule: Any = None,
    torch_compile: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to every key, heads last: NATTEN's ``attention`` without variable lengths.

    Shapes: query (B, L, N, D), key (B, S, M, D), value (B, S, M, E) with M dividing N -> (B, L, N, E), and with
    ``return_lse`` the log-sum-exp (B, L, N), both contiguous. ``is_causal`` hides key s from query l where s > l. It holds
    the L x S weights. ``scale`` is as in :func:`na1d`; arguments that choose a kernel are not used. The fourth has to be
    named: it was the scale up to 0.21.1.

    Raises:
        ShapeError: shapes that do not fit together.
        DtypeError: a nested or sparse tensor.
        OptionError: an argument of another name, an unnamed fourth one, or lengths that vary: ``seqlens_Q`` and its kin.

    Example:
        >>> q = k = v = torch.randn(2, 10, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 10, 4, 16])
    """
    if positional:
        raise OptionError(
            "name the arguments after value: the fourth was the scale up to NATTEN 0.21.1 and is is_causal from 0.21.5 on; "
            f"received {positional}"
        )
    if any(given is not None for given in (seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV)) or (
        max_seqlen_Q or max_seqlen_KV
    ):
        raise OptionError("lengths that vary are not here: call attention for each sequence")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_rank(name, tensor, 1, "(batch, length, heads, head_dim)")
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    shared, rest = divmod(query.shape[2], key.shape[2])
    if rest or key.shape[:3] != value.shape[:3] or (query.shape[0], query.shape[-1]) != (key.shape[0], key.shape[-1]):
        raise ShapeError(
            "key and value must share batch, length and heads, query and key batch and head_dim, and the heads of key must "
            f"divide those of query; received {shapes}"
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    factor = scale_of(scale, query.shape[-1])
    with without_autocast(query):
        q, k, v = (tensor.to(wide).transpose(1, 2) for tensor in (query, key, value))
        logits = factor * q.unflatten(1, (-1, shared)) @ k.unsqueeze(2).mT
        if is_causal:
            behind = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(behind, float("-inf"))
        out = (logits.softmax(-1) @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2).to(query.dtype).contiguous()
    return (out, logits.logsumexp(-1).flatten(1, 2).transpose(1, 2).contiguous()) if return_lse else out


@names_its_arguments
def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`nearsight.merge_attentions`, whose gradients need no fix. The two switches are not used.

    Example:
        >>> out, lse = torch.randn(2, 10, 4, 16), torch.zeros(2, 10, 4)
        >>> merge_attentions([out, out], [lse, lse])[0].shape
        torch.Size([2, 10, 4, 16])
    """
    return merge(outputs, lse_tensors)


# --------------------------------------------------------------------------------------------------------- split calls


def _check_map(name: str, tensor: Any, rank: int, last: str) -> None:
    """Of a split call: heads first."""
    _check_rank(name, tensor, rank, f"(batch, heads, *map, {last})")
    if 0 in tensor.shape[2:-1]:
        raise ShapeError(f"the map must have at least one cell; {name} is {tuple(tensor.shape)}")


def _qk(rank: int) -> Callable:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_keys: Tensor | None = None,
        is_causal: Causal = False,
        rpb: Tensor | None = None,
        *,
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
    ) -> Tensor:
        window = window_of(rank, with_depth(kernel_size, kernel_size_d), 1, with_depth(dilation, dilation_d), is_causal)
        _check_map("query", query, rank, "head_dim")
        if not isinstance(key, Tensor) or key.shape != query.shape:
            received = tuple(key.shape) if isinstance(key, Tensor) else type(key).__name__
            raise ShapeError(f"key must have the shape of query, {tuple(query.shape)}; received {received}")
        describe(query, key, key, window, rpb, None)
        axes = window.axes(rank)

        def call(query: Tensor, key: Tensor, rpb: Tensor | None, additional_keys: Tensor | None) -> Tensor:
            logits = split.qk(query, key, axes, rpb)
            if additional_keys is None:
                return logits
            with without_autocast(query):
                others = query.flatten(2, -2) @ additional_keys.to(query.dtype).mT
            return torch.cat([logits, others.unflatten(2, query.shape[2:-1])], -1)

        return as_one_node(QK[rank], cells_of(axes), call, query, key, rpb, additional_keys)

    qk.__doc__ = f"""The logits of neighbourhood attention over {rank} map axes, before scale and softmax, heads first.

        logits[p, j] = q[p].k[n_j(p)] + rpb[n_j(p) - p]        n_j(p): the j-th cell that p sees, in row-major order

    Shapes: query and key (B, N, *map, D), additional_keys (B, N, any, D), rpb (N, *(2 * kernel_size - 1)) ->
    (B, N, *map, K + any), K = the product of kernel_size; the additional keys stand last. Places that hold no cell, on a
    causal axis or a map smaller than the window, stand after those that do, with the logit -inf.

    A call keeps its inputs for the backward, and has derivatives of every order. There is no scale in it.

    Raises:
        ShapeError: shapes that do not fit together.
    """
    return names_its_arguments(qk, f"na{rank}d_qk")


def _av(rank: int) -> Callable:
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_values: Tensor | None = None,
        is_causal: Causal = False,
        *,
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
    ) -> Tensor:
        window = window_of(rank, with_depth(kernel_size, kernel_size_d), 1, with_depth(dilation, dilation_d), is_causal)
        _check_map("attn", attn, rank, "weights")
        _check_map("value", value, rank, "head_dim")
        axes = window.axes(rank)
        cells = cells_of(axes)
        others = 0 if additional_values is None else additional_values.shape[-2]
        if attn.shape != (*value.shape[:-1], cells + others):
            raise ShapeError(
                f"attn must hold a weight per place, {(*value.shape[:-1], cells + others)} for value {tuple(value.shape)}, "
                f"kernel_size {kernel_size} and {others} additional values; received {tuple(attn.shape)}"
            )

        def call(attn: Tensor, value: Tensor, additional_values: Tensor | None) -> Tensor:
            out = split.av(attn[..., :cells], value, axes)
            if additional_values is None:
                return out
            with without_autocast(value):
                weights = attn[..., cells:].to(value.dtype).flatten(2, -2)
                return out + (weights @ additional_values.to(value.dtype)).unflatten(2, value.shape[2:-1])

        return as_one_node(AV[rank], cells, call, attn, value, additional_values)

    av.__doc__ = f"""The values that each query sees, weighted, over {rank} map axes, heads first.

        y[p] = sum_j attn[p, j] v[n_j(p)]

    ``attn`` need not come from a softmax. It is converted to the dtype of ``value``.

    Shapes: attn (B, N, *map, K + any) as :func:`na{rank}d_qk` returns, value (B, N, *map, E), additional_values
    (B, N, any, E) -> (B, N, *map, E). Weights of places that hold no cell are not looked at.

    A call keeps its inputs for the backward, and has derivatives of every order.

    Raises:
        ShapeError: shapes that do not fit together.
    """
    return names_its_arguments(av, f"na{rank}d_av")


na1d_qk, na2d_qk, na3d_qk = _qk(1), _qk(2), also_as_in_0_15(_qk(3), "additional_keys")
na1d_av, na2d_av, na3d_av = _av(1), _av(2), also_as_in_0_15(_av(3), "additional_values")


# --------------------------------------------------------------------------------------------------------- older names

OLDER: dict[str, Any] = {
    **older_names(1, na1d, na1d_qk, na1d_av),
    **older_names(2, na2d, na2d_qk, na2d_av),
    **older_names(3, na3d, na3d_qk, na3d_av),
}
__all__ += OLDER  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in OLDER:
        return OLDER[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
