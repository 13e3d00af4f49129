# SPDX-License-Identifier: Apache-2.0
"""``natten.modules``: the layers, with the arguments and the parameters of all their versions."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter, Signature, signature
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.init import trunc_normal_

from ...attention.problem import laid_out
from ...attention.softmax import softmax
from ...errors import OptionError, ShapeError
from ...precision import wide_of, without_autocast
from .arguments import only_reading, refuse_unknown
from .context import NattenContext
from .functional import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk, neighborhood_attention_generic
from .windows import natten_values, scale_of, window_of, with_depth

__all__ = [
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodAttentionGeneric",
]

# The order of the first arguments, which NATTEN 0.14.5 changed.
FIRST = ("embed_dim", "num_heads", "kernel_size")
OLD = "up to 0.14.4"
ORDERS = {"since NATTEN 0.14.5": FIRST, OLD: ("embed_dim", "kernel_size", "num_heads")}
SPLIT = {1: (na1d_qk, na1d_av), 2: (na2d_qk, na2d_av), 3: (na3d_qk, na3d_av)}


class NeighborhoodAttentionGeneric(nn.Module):
    """Project to query, key and value, attend to the neighbourhood, project again.

        q, k, v = W x;   y[p] = W' sum_{c in N(p)} softmax_c( scale * q[p].k[c] + rpb[c - p] ) v[c]      in each head

    Source: Hassani et al. 2023 (NAT, arXiv:2204.07143); Hassani and Shi 2022 (DiNAT, arXiv:2209.15001).

    Shapes: (B, *map, embed_dim) -> the same. As in NATTEN up to 0.14.6, a map smaller than ``kernel_size * dilation`` is
    padded to that with cells of zeros at its end, which vote, and the result is cut back.

    Parameters: 4 * embed_dim * (embed_dim + 1), without ``qkv_bias`` 3 * embed_dim fewer, and with ``rel_pos_bias``
    num_heads * product of (2 * kernel_size - 1) more.

    state_dict: NATTEN's: ``qkv.weight``, ``qkv.bias``, ``rpb``, ``proj.weight``, ``proj.bias``.

    It attends in one call, except with attention dropout in training and after ``use_fused_na(False)``: then the weights
    are held between two calls.

    Args:
        na_dim: map axes, 1 to 3.
        embed_dim: channels; ``dim`` up to 0.17.5.
        num_heads: heads split the channels.
        kernel_size, stride, dilation, is_causal: see :func:`nearsight.compat.natten.functional.na2d`.
        kernel_size_d, dilation_d: those of the first of three axes, as in 0.15 and 0.16.
        rel_pos_bias: a bias per head and offset; ``bias`` in 0.14 to 0.16. None means the default, see
            :func:`nearsight.compat.natten.install`.
        qkv_bias: add a bias to the first projection.
        qk_scale: factor of q.k; None means head_dim ** -0.5.
        attn_drop, proj_drop: rates of dropout on the weights and on the result.
        use_experimental_ops: not used.

    Raises:
        OptionError: what has no default is missing, two names with different values, or unnamed arguments after
            ``kernel_size``, which are others in every version.
        ShapeError: heads that do not divide the channels, an input of another shape.
    """

    def __init__(
        self,
        na_dim: int,
        *positional: Any,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: Any = None,
        dim: int | None = None,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
        rel_pos_bias: bool | None = None,
        bias: bool | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown(f"NeighborhoodAttention{na_dim}D", unknown, list(ARGUMENTS.parameters))
        named = {"embed_dim": _one_of("embed_dim", embed_dim, "dim", dim), "num_heads": num_heads}
        named = _by_position(na_dim, positional, named | {"kernel_size": kernel_size})
        embed_dim, num_heads, kernel_size = named["embed_dim"], named["num_heads"], named["kernel_size"]
        rel_pos_bias = _one_of("rel_pos_bias", rel_pos_bias, "bias", bias, NattenContext.rel_pos_bias)
        missing = [name for name, value in named.items() if value is None]
        if missing or embed_dim is None or num_heads is None:
            raise OptionError(f"NeighborhoodAttention{na_dim}D needs {' and '.join(missing)}")
        if embed_dim % num_heads:
            raise ShapeError(f"num_heads must divide embed_dim; received num_heads={num_heads}, embed_dim={embed_dim}")
        kernel_size = with_depth(kernel_size, kernel_size_d)
        window = window_of(na_dim, kernel_size, stride, with_depth(dilation, dilation_d), is_causal)
        self.na_dim = na_dim
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = scale_of(qk_scale, self.head_dim)
        self.kernel_size, self.stride, self.dilation, self.is_causal = natten_values(window.axes(na_dim))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.rpb = (
            nn.Parameter(torch.zeros(num_heads, *(2 * k - 1 for k in self.kernel_size))) if rel_pos_bias else None
        )
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        laid_out("the input", x)
        if x.ndim != self.na_dim + 2 or x.shape[-1] != self.embed_dim:
            raise ShapeError(
                f"NeighborhoodAttention{self.na_dim}D takes (batch, *map, {self.embed_dim}) with {self.na_dim} map axes; "
                f"received {tuple(x.shape)}"
            )
        size = x.shape[1:-1]
        x = self._padded(x)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        holds_weights = not NattenContext.is_fused_na_enabled or (self.training and self.attn_drop.p > 0)
        out = (self._in_two_calls if holds_weights else self._in_one_call)(query, key, value)
        out = out.flatten(-2)[(slice(None), *map(slice, size))]
        return self.proj_drop(self.proj(out))

    def _padded(self, x: Tensor) -> Tensor:
        windows = [k * d for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        missing = [max(0, window - cells) for window, cells in zip(windows, x.shape[1:-1], strict=True)]
        if not any(missing):
            return x
        return pad(x, [0, 0, *(amount for cells in reversed(missing) for amount in (0, cells))])

    def _in_one_call(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = neighborhood_attention_generic(
            query,
            key,
            value,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
            scale=self.scale,
            rpb=self.rpb,
        )
        assert isinstance(out, Tensor)
        return out

    def _in_two_calls(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if max(self.stride) > 1:
            raise OptionError(
                "a stride needs fused attention without dropout of the weights: NATTEN has no split call for it"
            )
        qk, av = SPLIT[self.na_dim]
        geometry = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        wide = wide_of(query)
        with without_autocast(query.device.type):
            q, k, v = (tensor.to(wide).movedim(-2, 1) for tensor in (query, key, value))
            rpb = None if self.rpb is None else self.rpb.to(wide)
            weights = softmax(qk(q * self.scale, k, **geometry, rpb=rpb))
            return av(self.attn_drop(weights), v, **geometry).movedim(1, -2).to(value.dtype)

    def extra_repr(self) -> str:
        names = ("head_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal")
        return ", ".join([*(f"{name}={getattr(self, name)}" for name in names), f"rel_pos_bias={self.rpb is not None}"])


def _arguments() -> Signature:
    """What a layer of one rank takes: all that they have in common but the rank, its first arguments by position too."""
    taken = signature(NeighborhoodAttentionGeneric).parameters
    named = [one for one in taken.values() if one.kind is Parameter.KEYWORD_ONLY]
    unnamed = [one.replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for one in named[: len(FIRST)]]
    return Signature([*unnamed, *named[len(FIRST) :]])


ARGUMENTS = _arguments()


class NeighborhoodAttention1D(NeighborhoodAttentionGeneric):
    """Neighbourhood attention over a sequence, (B, L, C): :class:`NeighborhoodAttentionGeneric`.

    Example:
        >>> NeighborhoodAttention1D(dim=32, num_heads=4, kernel_size=7)(torch.randn(2, 20, 32)).shape
        torch.Size([2, 20, 32])
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(1, *args, **options)


class NeighborhoodAttention2D(NeighborhoodAttentionGeneric):
    """Neighbourhood attention over an image, (B, H, W, C): :class:`NeighborhoodAttentionGeneric`.

    Example:
        >>> NeighborhoodAttention2D(embed_dim=32, num_heads=4, kernel_size=7, dilation=2)(torch.randn(2, 20, 20, 32)).shape
        torch.Size([2, 20, 20, 32])
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(2, *args, **options)


class NeighborhoodAttention3D(NeighborhoodAttentionGeneric):
    """Neighbourhood attention over a volume or a video, (B, D, H, W, C): :class:`NeighborhoodAttentionGeneric`.

    Example:
        >>> NeighborhoodAttention3D(32, 4, (2, 5, 5), is_causal=(True, False, False))(torch.randn(1, 6, 8, 8, 32)).shape
        torch.Size([1, 6, 8, 8, 32])
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(3, *args, **options)


NeighborhoodAttention = NeighborhoodAttention2D  # up to 0.14.4

for _layer in (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D):
    _layer.__init__.__dict__["__signature__"] = ARGUMENTS.replace(
        parameters=[Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *ARGUMENTS.parameters.values()]
    )


def _one_of(name: str, value: Any, older: str, older_value: Any, default: Any = None) -> Any:
    """One argument with two names."""
    given = {name: value, older: older_value}
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise OptionError(f"{name} and {older} are two names of one argument; received {given}")
    return values.pop() if values else default


def _by_position(na_dim: int, unnamed: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """The first arguments by their names.

    Raises:
        OptionError: more are unnamed, or make sense in both orders.
    """
    if len(unnamed) > len(FIRST):
        raise OptionError(
            "name the arguments after kernel_size: their order is another in every version of NATTEN; "
            f"received {tuple(unnamed)[len(FIRST) :]}"
        )
    readings = {
        version: named | dict(zip(order, unnamed, strict=False))
        for version, order in ORDERS.items()
        if all(named[name] is None for name in order[: len(unnamed)])
    }
    if not readings:
        raise OptionError(
            f"NeighborhoodAttention{na_dim}D{tuple(unnamed)} gets an argument twice: by place and by name"
        )
    sensible = {version: reading for version, reading in readings.items() if _makes_sense(version, **reading)}
    return dict(only_reading(f"NeighborhoodAttention{na_dim}D{tuple(unnamed)}", sensible or readings))


def _makes_sense(version: str, embed_dim: Any, num_heads: Any, kernel_size: Any) -> bool:
    """Whether that version of NATTEN would take them; what is missing is another error."""
    if version == OLD and kernel_size is not None and not (isinstance(kernel_size, Integral) and kernel_size % 2):
        return False  # it took one odd size for all axes
    if embed_dim is None or num_heads is None:
        return True
    return isinstance(num_heads, Integral) and int(num_heads) > 0 and embed_dim % num_heads == 0
