# SPDX-License-Identifier: Apache-2.0
"""Local, global and halo self-attention: one layer, with the borders of ``nn.Conv1d/2d/3d``, under different windows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention_weights, check_scale, local_attention, project_and_attend
from ..attention.backend import check_backend
from ..errors import OptionError, ShapeError
from ..positions import Position, PositionLike, Tables, no_weight_decay_in, position_encoding
from ..private import known_shape
from ..recompute import keep_in_place_of
from ..window import Window, plain
from .convolution_words import refusing_words_of_convolutions
from .projection import POINTWISE, Projecting, check_channels, is_pointwise, is_repeatable, made_on, merge_heads
from .whole import one_node


class SelfAttention(Projecting):
    """What all layers share: project to query, key and value, attend, perhaps project again.

    Use :class:`LocalSelfAttention2d` and its siblings.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None,
        *,
        window: Window | None,
        num_heads: int,
        qk_channels: int | None,
        position: PositionLike,
        map_size: int | tuple[int, ...],
        scale: float | None,
        qkv_bias: bool,
        out_proj: bool,
        recompute_qkv: bool,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        apart: bool = False,
    ) -> None:
        super().__init__()
        in_channels, num_heads = plain((in_channels, num_heads))
        out_channels = in_channels if out_channels is None else plain(out_channels)
        qk_channels = out_channels if qk_channels is None else plain(qk_channels)
        check_channels(num_heads, in_channels=in_channels, out_channels=out_channels, qk_channels=qk_channels)
        check_backend(backend)
        map_size = _per_axis("map_size", map_size, self.rank)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.qk_channels = qk_channels
        self.num_heads = num_heads
        self.head_dim = qk_channels // num_heads
        self.window = window
        self.scale = check_scale(scale)
        self.backend = backend
        self.recompute_qkv = recompute_qkv
        strides = [] if window is None else [axis.stride for axis in window.axes(self.rank)]
        with made_on(device):
            self._hold_projections(apart=apart or any(stride > 1 for stride in strides), bias=qkv_bias)
            self.position = position_encoding(
                position,
                channels=in_channels,
                num_heads=num_heads,
                head_dim=self.head_dim,
                window=Window.everywhere(map_size) if window is None else window,
                map_size=map_size,
            )
            self.proj = POINTWISE[self.rank](out_channels, out_channels, 1) if out_proj else nn.Identity()
            self.reset_parameters()
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Start with queries, keys and values of the input's variance, so that logits have variance one.

        A position encoding may ask for less of queries and keys: see ``content_gain`` of :class:`Position`.
        """
        self._draw_projections(gain=self.position.content_gain)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        batched = self._batched(x)
        window = self.window_on(batched.shape[2:])
        embedded = self.position.embed(batched)
        out = self._at_once(embedded, window)
        if out is None:
            out = merge_heads(self._in_two_steps(embedded, window), like=batched)
        y = self.proj(out)
        return y if x.ndim == batched.ndim else y.squeeze(0)

    def _at_once(self, x: Tensor, window: Window) -> Tensor | None:
        """Projected and attended by one operator; None where there is none, or the projection is more than its weight."""
        as_here = type(self)._heads is SelfAttention._heads and type(self)._split is Projecting._split
        turns = type(self.position).rotate is not Position.rotate
        if torch.compiler.is_compiling() or turns or not as_here or "qkv" not in self._modules:
            return None
        if not is_pointwise(self.qkv, x):
            return None
        bias, relative = self.tables_on(x.shape[2:])
        return project_and_attend(
            x,
            self.qkv.weight,  # pyright: ignore[reportArgumentType]
            self.qkv.bias,  # pyright: ignore[reportArgumentType]
            window,
            bias=bias,
            relative=relative,
            num_heads=self.num_heads,
            qk_channels=self.qk_channels,
            scale=self.scale,
            backend=self.backend,
            frugal=self.recompute_qkv,
        )

    def _in_two_steps(self, x: Tensor, window: Window) -> Tensor:
        made = query, key, value = self._heads(x, window)
        tables = self._tables(window, key)
        with self._made_again(x, made, window) if self.recompute_qkv else nullcontext():
            return local_attention(query, key, value, window, **tables, scale=self.scale, backend=self.backend)

    def attention_weights(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The weights that :meth:`forward` mixes the values with: (B, N, *out, *kernel_size).

        With ``queries`` (Q, rank), the index of each along every axis of the output, those alone: (B, N, Q, *kernel_size).
        """
        batched = self._batched(x)
        window = self.window_on(batched.shape[2:])
        query, key, _ = self._heads(self.position.embed(batched), window)
        tables = self._tables(window, key)
        return attention_weights(query, key, window, queries=queries, **tables, scale=self.scale)

    def tables_on(self, size: Sequence[int]) -> Tables:
        """The position tables on a map of ``size`` cells, ``(bias, relative)``; None for what there is not."""
        return self.position.tables(self.window_on(size), size)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that weight decay is not to shrink: those of the position encoding."""
        return no_weight_decay_in(self)

    def window_on(self, size: Sequence[int]) -> Window:
        """The memory block on a map of ``size`` cells: the layer's own, or for global attention the whole map."""
        return Window.everywhere(size) if self.window is None else self.window

    @property
    def _widths(self) -> list[int]:
        return [self.qk_channels, self.qk_channels, self.out_channels]

    def _batched(self, x: Tensor) -> Tensor:
        if x.ndim not in (self.rank + 1, self.rank + 2) or known_shape(x)[-self.rank - 1] != self.in_channels:
            axes = ", ".join("DHW"[-self.rank :]) if self.rank > 1 else "L"
            raise ShapeError(
                f"{type(self).__name__} takes (B, {self.in_channels}, {axes}) or ({self.in_channels}, {axes}); "
                f"received {tuple(x.shape)}"
            )
        return x if x.ndim == self.rank + 2 else x.unsqueeze(0)

    def _heads(self, x: Tensor, window: Window, weights: Sequence[Any] = ()) -> tuple[Tensor, Tensor, Tensor]:
        strides = [axis.stride for axis in window.axes(self.rank)]
        query, key, value = self._split(self._project(x, strides, weights))
        query, key = self.position.rotate(query, key, window)
        return query, key, value

    def _made_again(self, x: Tensor, made: Sequence[Tensor], window: Window) -> AbstractContextManager:
        """Where autograd would keep query, key and value, it keeps what they are made of, if they are made plainly."""
        projections = self._projections()
        if torch.compiler.is_compiling() or not all(is_repeatable(projection, x) for projection in projections):
            return nullcontext()
        weights: list[Any] = [one for projection in projections for one in (projection.weight, projection.bias)]
        turns = type(self.position).rotate is not Position.rotate
        turning = [*self.position.parameters(), *self.position.buffers()] if turns else []

        def make(x, *weights):
            return self._heads(x, window, weights[: 2 * len(projections)])

        return keep_in_place_of(made, make, [x, *weights, *turning])

    def _tables(self, window: Window, key: Tensor) -> dict:
        bias, relative = self.tables_on(key.shape[2:-1])
        return {"bias": bias, "relative": relative}

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}", f"num_heads={self.num_heads}"]
        parts += [f"qk_channels={self.qk_channels}"] if self.qk_channels != self.out_channels else []
        if self.window is not None:
            options = {field.name: (getattr(self.window, field.name), field.default) for field in fields(self.window)}
            parts.insert(1, f"kernel_size={options.pop('kernel_size')[0]}")
            parts += [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        parts += [f"scale={self.scale}"] if self.scale is not None else []
        parts += [f"backend={self.backend!r}"] if self.backend is not None else []
        return ", ".join(parts)


@refusing_words_of_convolutions
class _Local(SelfAttention):
    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, ...] = 7,
        *,
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        border: str | tuple[str, ...] = "mask",
        causal: bool | tuple[bool, ...] = False,
        shared_by: int | tuple[int, ...] = 1,
        num_heads: int = 8,
        qk_channels: int | None = None,
        position: PositionLike = "relative",
        map_size: int | tuple[int, ...] = 32,
        scale: float | None = None,
        qkv_bias: bool = False,
        out_proj: bool = False,
        recompute_qkv: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        window = Window(
            kernel_size, stride=stride, dilation=dilation, border=border, causal=causal, shared_by=shared_by
        )
        window.axes(self.rank)
        super().__init__(
            in_channels,
            out_channels,
            window=window,
            num_heads=num_heads,
            qk_channels=qk_channels,
            position=position,
            map_size=map_size,
            scale=scale,
            qkv_bias=qkv_bias,
            out_proj=out_proj,
            recompute_qkv=recompute_qkv,
            backend=backend,
            device=device,
            dtype=dtype,
        )


class LocalSelfAttention1d(_Local):
    """Local self-attention over a sequence, (B, C, L); see :class:`LocalSelfAttention2d`.

    With ``causal=True`` an output sees its own cell and the ``kernel_size - 1`` before it.

    Example:
        >>> LocalSelfAttention1d(16, 32, 9, causal=True)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 32, 50])
    """

    rank = 1


class LocalSelfAttention2d(_Local):
    """The attention layer that takes the place of ``nn.Conv2d``: every output looks at the memory block around it.

        q, k, v = W x;   y[p] = sum_{c in N(p)} softmax_c( scale * q[p] . (k[c] + r[c - p]) ) v[c]   in each head

    Source: Ramachandran et al. 2019 (SASA, arXiv:1906.05909), section 3. Differs from the paper: ``scale=None`` divides the
    logits by sqrt(head_dim), 1.0 is the paper's; cells off the image are masked, on which the paper is silent; ``stride``
    subsamples the queries, where SASA attends at full resolution and then pools (as our SASA models do). As in the paper's
    parameter counts the projections are dense, without bias, and there is no output projection.

    Shapes: (B, in_channels, H, W) or (in_channels, H, W) -> the same with out_channels and ``ceil(n / stride)`` cells per
    axis; contiguous or channels_last, and the output follows the input.

    Parameters: in * (2 * qk + out), + 2 * qk + out with ``qkv_bias``, + out * (out + 1) with ``out_proj``, + those of the
    position encoding (relative: k * qk). Their number does not depend on k otherwise.

    state_dict: ``qkv.weight`` (2 * qk + out, in, 1, 1) with the query's rows first, then key and value; ``qkv.bias``; with
    a stride, where queries are fewer, ``q.weight`` (qk, in, 1, 1) and ``kv.weight`` (qk + out, in, 1, 1), ``q.bias`` and
    ``kv.bias``; ``position.*`` (see :mod:`nearsight.positions`); ``proj.weight``, ``proj.bias``. Either way of holding the
    projections is loaded into the other.
    ``.eval()`` changes nothing.

    Args:
        in_channels, out_channels: borders of the layer; out_channels None means in_channels.
        kernel_size, stride, dilation, border, causal, shared_by: the memory block, see :class:`Window`.
        num_heads: heads split the width: each has qk_channels // num_heads channels of queries and keys, head_dim, and
            out_channels // num_heads of values.
        qk_channels: channels of queries and keys; None means out_channels, as the paper. Fewer of them leave room for more
            values, which are all that a layer passes on.
        position: a name from ``nearsight.positions.POSITIONS``, a module from there, or what makes one; see
            :func:`nearsight.positions.register`.
        map_size: cells per axis that ``position="learned"`` is made for; it is resampled on other maps.
        scale: factor of the logits' products; None means head_dim ** -0.5.
        qkv_bias: add a bias to the projections.
        out_proj: project once more at the end.
        recompute_qkv: let the backward project the input once more, where it is kept in any case, in place of keeping
            queries, keys and values: less memory in training for a little more time. The result is the same but for
            rounding, where projection and attention are then one operator, and elsewhere to the bit.
            Only where the native kernel runs outside autocast and torch.compile, which decides itself what it keeps, and
            the projections are as they were made: what has hooks or computed weights, or another module in its place, is
            kept. Under gradient checkpointing it changes nothing: the checkpoint makes all of the layer again.
        backend: see :func:`local_attention`.
        device, dtype: of the parameters, as in ``nn.Conv2d``.

    Raises:
        ShapeError: out_channels or qk_channels that heads do not divide, an input of other channels or rank.
        OptionError: an unknown name, a size below 1.

    Example:
        >>> LocalSelfAttention2d(64, 128, 7, stride=2)(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 128, 16, 16])
    """

    rank = 2


class LocalSelfAttention3d(_Local):
    """Local self-attention over a volume or a video, (B, C, D, H, W); see :class:`LocalSelfAttention2d`.

    Example:
        >>> LocalSelfAttention3d(16, kernel_size=3, num_heads=2)(torch.randn(1, 16, 4, 8, 8)).shape
        torch.Size([1, 16, 4, 8, 8])
    """

    rank = 3


@refusing_words_of_convolutions
class _Global(SelfAttention):
    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        num_heads: int = 8,
        qk_channels: int | None = None,
        position: PositionLike = "relative",
        map_size: int | tuple[int, ...] = 32,
        scale: float | None = None,
        qkv_bias: bool = False,
        out_proj: bool = False,
        recompute_qkv: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            window=None,
            num_heads=num_heads,
            qk_channels=qk_channels,
            position=position,
            map_size=map_size,
            scale=scale,
            qkv_bias=qkv_bias,
            out_proj=out_proj,
            recompute_qkv=recompute_qkv,
            backend=backend,
            device=device,
            dtype=dtype,
        )


class GlobalSelfAttention1d(_Global):
    """Global self-attention over a sequence, (B, C, L); see :class:`GlobalSelfAttention2d`.

    Example:
        >>> GlobalSelfAttention1d(16, map_size=50)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 16, 50])
    """

    rank = 1


class GlobalSelfAttention2d(_Global):
    """Self-attention in which every cell sees the whole image.

        q, k, v = W x;   y[p] = sum_c softmax_c( scale * q[p] . (k[c] + r[c - p]) ) v[c]   in each head

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1, with the relative embeddings of Ramachandran et al. 2019
    (arXiv:1906.05909). The cost grows with the square of the number of cells.

    ``map_size`` is the largest map per axis that learnt relative tables serve: they hold ``2 * map_size - 1`` entries, and
    smaller maps use their middle. Everything else is as in :class:`LocalSelfAttention2d`.

    Raises:
        ShapeError: also for a map larger than ``map_size`` where the position encoding is a table.

    Example:
        >>> GlobalSelfAttention2d(64, map_size=14)(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
    """

    rank = 2


class GlobalSelfAttention3d(_Global):
    """Global self-attention over a volume or a video, (B, C, D, H, W); see :class:`GlobalSelfAttention2d`.

    Example:
        >>> GlobalSelfAttention3d(16, num_heads=2, map_size=(4, 6, 6))(torch.randn(1, 16, 4, 6, 6)).shape
        torch.Size([1, 16, 4, 6, 6])
    """

    rank = 3


@refusing_words_of_convolutions
class HaloSelfAttention2d(SelfAttention):
    """Blocked local attention: the queries of a block share one memory block, the block and a halo around it.

    It is local attention under ``Window(block_size + 2 * halo_size, shared_by=block_size)`` with
    ``position="relative_shared"``:

        q, k, v = W x;   y[p] = sum_{c in M(p)} softmax_c( scale * q[p] . (k[c] + row[c_y - p_y] + column[c_x - p_x]) ) v[c]

    in each head, where M(p) are the ``block_size + 2 * halo_size`` cells per axis around the block in which p lies.

    Source: Vaswani et al. 2021 (HaloNet, arXiv:2103.12731), section 3. As its parameter counts demand, ``value_ratio``
    widens the values alone, the heads share the row and column vectors, whose width is the full head's, and there is no
    output projection. Tables hold ``2 * (block_size + 2 * halo_size) - 1`` entries, of which 2 * halo_size are out of
    every query's reach. Differs from the paper: ``scale=None`` divides both products by sqrt(head_dim); cells off the image
    are masked, where ``border="zeros"`` has them vote with a zero key and a zero value, as the paper's zero padding does;
    the last blocks of a map that is no multiple of ``block_size`` are smaller.

    Equivariant to shifts by multiples of block_size only.

    Shapes: (B, in_channels, H, W) or (in_channels, H, W) -> the same with out_channels and ``ceil(n / stride)`` cells per
    axis; contiguous or channels_last, and the output follows the input.

    Parameters: in * (2 * width + out) + 2 * (2 * (block_size + 2 * halo_size) - 1) * width / num_heads, with
    width = out / value_ratio.

    state_dict: ``q.weight`` (width, in, 1, 1), ``kv.weight`` (width + out, in, 1, 1) with the key's rows first; ``q.bias``,
    ``kv.bias``; ``position.vectors.0`` (rows) and ``position.vectors.1`` (columns), each (entries, width / num_heads). Files
    in which one ``qkv`` holds both, or with ``rows`` and ``columns`` of the layer itself, are loaded too.

    Args:
        in_channels, out_channels: borders of the layer; out_channels None means in_channels * value_ratio.
        block_size, halo_size: in cells, every ``dilation``-th of which counts.
        dilation: see :class:`Window`.
        stride: the output keeps every ``stride``-th query.
        value_ratio: channels of the values, and so of the output, for one channel of queries and keys.
        border: see :class:`Window`.
        num_heads, scale, qkv_bias, backend, device, dtype: as in :class:`LocalSelfAttention2d`.

    Raises:
        ShapeError: widths that heads or ``value_ratio`` do not divide, an input of other channels or rank.
        OptionError: an unknown border, a size below 1, a halo below 0.

    Example:
        >>> HaloSelfAttention2d(64, value_ratio=2.5, stride=2)(torch.randn(2, 64, 30, 40)).shape
        torch.Size([2, 160, 15, 20])
    """

    rank = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        value_ratio: float = 1.0,
        border: str | tuple[str, str] = "mask",
        num_heads: int = 8,
        scale: float | None = None,
        qkv_bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        block_size, halo_size, stride = plain((block_size, halo_size, stride))
        out_channels = round(in_channels * value_ratio) if out_channels is None else out_channels
        width = round(out_channels / value_ratio)
        if round(width * value_ratio) != out_channels:
            raise ShapeError(f"value_ratio={value_ratio} must divide out_channels={out_channels} into whole channels")
        for name, value, least in (("block_size", block_size, 1), ("halo_size", halo_size, 0), ("stride", stride, 1)):
            if not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be an int of at least {least}; received {value!r}")
        super().__init__(
            in_channels,
            out_channels,
            window=Window(
                block_size + 2 * halo_size, stride=stride, dilation=dilation, border=border, shared_by=block_size
            ),
            num_heads=num_heads,
            qk_channels=width,
            position="relative_shared",
            map_size=1,
            scale=scale,
            qkv_bias=qkv_bias,
            out_proj=False,
            recompute_qkv=False,
            backend=backend,
            device=device,
            dtype=dtype,
            apart=True,
        )
        self.block_size, self.halo_size = block_size, halo_size
        self.register_load_state_dict_pre_hook(_load_tables)


def _load_tables(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """In files of older versions the tables were the layer's own."""
    for old, new in (("rows", "position.vectors.0"), ("columns", "position.vectors.1")):
        if prefix + old in state:
            state.setdefault(prefix + new, state.pop(prefix + old))


def _per_axis(name: str, value: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    value = plain(value)
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank or min(values) < 1:
        raise ShapeError(f"{name} must be at least 1 and one number or {rank} of them; received {value!r}")
    return values
