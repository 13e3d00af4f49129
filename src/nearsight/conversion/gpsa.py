# SPDX-License-Identifier: Apache-2.0
"""A convolution written as gated positional self-attention: the same function, and from there free to become another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..attention import attention_weights, local_attention
from ..errors import OptionError, ShapeError
from ..layers.projection import split_heads
from ..precision import has_short_range, wide_of, without_autocast
from ..window import Window
from .geometry import Aligned, Around, align, flat, is_same, padding_of

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_convolve: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class GatedPositionalSelfAttention(nn.Module):
    """Self-attention that starts as the convolution it is made from, and can learn to look elsewhere.

        y[p] = b + sum_h W_h sum_{c in N(p)} a_h[p, c] x[c]
        a_h[p, c] = (1 - g_h) * hat_h[c - p] + g_h * softmax_c( q_h[p] . k_h[c] / sqrt(D) )

    There is one head h for every place of the kernel, and W_h is the kernel's matrix at that place, so ``weight`` and
    ``bias`` are the convolution's own. Three small parameters say how far a head has left its place, and all start at
    zero, where the layer *is* the convolution, bit for bit: ``shift`` moves the head's centre, ``spread`` widens it, and
    ``gate`` lets content in. Weight decay draws back to the convolution.

        hat_h[d] ~ product over axes of max(0, 1 - |d_a - centre_a| / (1 + spread_h)),  centre = home + shift

    Source: Cordonnier, Loukas, Jaggi 2020 (arXiv:1911.03584), theorem 1: k * k heads express a k x k convolution;
    d'Ascoli et al. 2021 (ConViT, arXiv:2103.10697): the gate between position and content; d'Ascoli and others 2021
    (arXiv:2106.05795): trained convolutions recast so.

    Differs from the papers:

    - A hat in place of softmax(-alpha * |d - centre|**2). The softmax reads a single cell only for alpha -> infinity, and
      where it is good enough to stand for a convolution its gradient has shrunk by e**-alpha: the heads could never leave.
      A hat of width one reads exactly one cell, and its slope is that of bilinear sampling, as in deformable convolution.
      At a whole cell, where the hat has a corner, the gradient of ``shift`` is the sum of the slopes on both sides.
    - A linear gate in [0, 1] in place of a sigmoid, which is never zero. ConViT starts at sigmoid(1) = 0.73 of position.
    - What leaves its range (a gate outside [0, 1], a spread below 0, a centre outside the block) counts as the nearest
      value inside, and the gradient passes as if it were inside, so that nothing is stuck at the edge.
    - Cells off the map vote with zeros, as they do in the convolution: ``border="zeros"``. With another padding mode they
      vote with what it puts there, and so do those of the margin: circular padding stays a torus.

    What attends by position alone is linear in x and the same everywhere, so all heads together are one convolution with
    the kernel sum_h (1 - g_h) W_h hat_h, and that is how it is computed: heads that have moved cost the same. Content is
    computed by :func:`local_attention`, and only if some gate is open or a gradient of the gates is asked for. So without
    gradients (``torch.no_grad``, ``torch.inference_mode``) the layer costs what the convolution did until training has
    opened a gate. Inside ``torch.compile`` and ``torch.func.vmap`` nothing is left out.

    Shapes: those of the convolution, batched or not, for any stride, padding, dilation, groups and padding mode.

    Parameters: the convolution's, + (axes + 2) * N, + 2 * in_channels * N * D, with N = prod(kernel_size) heads and D the
    smallest multiple of 4 with N * D >= in_channels. ``content=False``: the convolution's, + (axes + 1) * N.

    state_dict: ``weight``, ``bias`` as in the convolution; ``shift`` (N, axes) in steps of the dilation, ``spread`` (N,),
    ``gate`` (N,); ``query.weight``, ``key.weight`` (N * D, in_channels, 1, ...); ``_extra_state``, the margin, as no shape
    shows: the state of another one is refused, as its heads see other cells. Heads are in the order of the kernel's places,
    row by row. ``.eval()`` changes nothing.

    Args:
        convolution: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, whose parameters the layer takes over. New ones are as
            frozen as its weight.
        margin: how many places beyond the kernel, on every side, the heads may reach.
        content: False leaves out q.k, and with it the gate: heads that move and widen, at a convolution's cost.
        locality: see the property.

    Raises:
        OptionError: not a convolution, a margin below 0, a locality outside (0, 1]; the state of another margin.
        ShapeError: an input of other channels or rank.

    Example:
        >>> convolution = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        >>> layer, x = GatedPositionalSelfAttention(convolution), torch.randn(2, 16, 15, 20)
        >>> torch.equal(layer(x), convolution(x))
        True
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    query: nn.Module
    key: nn.Module

    def __init__(
        self,
        convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        *,
        margin: int = 0,
        content: bool = True,
        locality: float = 1.0,
    ) -> None:
        super().__init__()
        if not isinstance(convolution, tuple(CONVOLUTIONS.values())):
            raise OptionError(f"convolution must be an nn.Conv1d, 2d or 3d; received {type(convolution).__name__}")
        if not isinstance(margin, int) or margin < 0:
            raise OptionError(f"margin must be an int of at least 0; received {margin!r}")
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(convolution, name))
        self.padding_mode = convolution.padding_mode
        self.margin, self.content = margin, content
        self.weight, self.bias = convolution.weight, convolution.bias
        self.rank, self.num_heads = len(self.kernel_size), prod(self.kernel_size)
        self._around = padding_of(convolution)
        # Zeros that are the same on both sides need no copy of the input; all other padding does.
        self._copies = self.padding_mode != "zeros" or any(before != after for before, after in self._around)
        like: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.shift = nn.Parameter(torch.zeros(self.num_heads, self.rank, **like))
        self.spread = nn.Parameter(torch.zeros(self.num_heads, **like))
        if content:
            self.gate = nn.Parameter(torch.zeros(self.num_heads, **like))
            head_dim = 4 * -(-self.in_channels // (4 * self.num_heads))
            for name in ("query", "key"):
                project = CONVOLUTIONS[self.rank](self.in_channels, self.num_heads * head_dim, 1, bias=False, **like)
                nn.init.normal_(project.weight, std=self.in_channels**-0.5)
                setattr(self, name, project)
        for name, parameter in self.named_parameters():
            if name not in ("weight", "bias"):
                parameter.requires_grad_(self.weight.requires_grad)
        self.locality = locality
        self.register_load_state_dict_pre_hook(_check_margin)

    def get_extra_state(self) -> Tensor:
        """The margin."""
        return torch.tensor(self.margin, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: what is not of this margin was refused before."""

    @property
    def locality(self) -> Tensor:
        """How hard each head looks, (N,): 1 at a single cell, or between two where it has moved; 1 / w at a hat that
        reaches as far as w places away.

        Setting it, to one number or one per head, narrows or widens the hats. Below 1 the layer is no longer the
        convolution: at a half, in the plane, a head leaves a quarter of its weight on its own cell.
        """
        return 1 / (1 + self.spread.detach().clamp(min=0))

    @locality.setter
    def locality(self, value: float | Tensor) -> None:
        wanted = torch.as_tensor(value, device=self.spread.device, dtype=self.spread.dtype)
        if not wanted.is_meta and not bool(((wanted > 0) & (wanted <= 1)).all()):
            raise OptionError(f"locality must be above 0 and at most 1, which is a single cell; received {value}")
        with torch.no_grad():
            self.spread.copy_((1 / wanted - 1).expand(self.num_heads))

    @property
    def centres(self) -> Tensor:
        """Where each head looks, (N, axes), in cells from the middle of the convolution's kernel."""
        return self._centres().detach() * torch.tensor(self.dilation, device=self.shift.device)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        if self._is_convolution():
            return self._convolve(self._padded(x, margin=0), self.weight, margin=0)
        x = self._padded(x, self.margin)
        y = self._convolve(x, self._kernel(), self.margin)
        return y + self._content(x) if self._sees_content() else y

    def attention_weights(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The weights that :meth:`forward` mixes the input with: (B, N, *out, *kernel_size) of :meth:`window_on`.

        With ``queries`` (Q, axes), the index of each along every axis of the output, those alone: (B, N, Q, *kernel_size).
        Where the convolution, for want of padding, has fewer outputs than the window, the last have no weights: zeros.

        Raises:
            ShapeError: an input of other channels or rank, a query that is not there.
        """
        self._check(x)
        x = x if x.ndim == self.rank + 2 else x[None]
        out = self.window_on(x.shape[2:]).output_size(x.shape[2:])
        chosen = _everywhere(out) if queries is None else queries.cpu()
        if chosen.shape[1:] != (self.rank,) or not ((chosen >= 0) & (chosen < torch.tensor(out, device="cpu"))).all():
            raise ShapeError(f"queries must be (Q, {self.rank}) and lie in an output of {out}; received {queries}")
        padded = self._padded(x, self.margin)
        aligned = self._aligned(padded.shape[2:])
        first, count = (torch.tensor(column, device="cpu") for column in list(zip(*aligned, strict=True))[2:])
        weights = self._hats()[:, None].expand(len(x), -1, len(chosen), *self._block())
        if self.content:
            query, key, _ = self._query_key(padded)
            content = attention_weights(query, key, self._window(), queries=chosen.minimum(count - 1) + first)
            weights = weights + self._gates().view(-1, 1, *[1] * self.rank) * (content - weights)
        weights = weights * (chosen < count).all(1).to(weights).view(-1, *[1] * self.rank)
        weights = weights if self._is_same() else self._centred(weights)
        return weights.unflatten(2, out) if queries is None else weights

    def window_on(self, size: Sequence[int]) -> Window:
        """The memory block of a query on a map of ``size`` cells.

        With the padding of 'same' it is the layer's own block. With other padding that is not centred on the window's
        query, and this is the smallest centred one that holds it, with dilation 1.
        """
        border = "wrap" if self.padding_mode == "circular" else "zeros"
        if self._is_same():
            return Window(self._block(), stride=self.stride, dilation=self.dilation, border=border)
        sides = [2 * max(-first, last) + 1 for first, last in self._reach()]
        return Window(tuple(sides), stride=self.stride, border=border)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        defaults = {"dilation": (1,) * self.rank, "groups": 1, "padding_mode": "zeros", "margin": 0, "content": True}
        parts += [f"padding={self.padding!r}"]
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        parts += ["bias=False"] if self.bias is None else []
        return ", ".join(parts)

    # ------------------------------------------------------------------------------------------------ by position

    def _convolve(self, x: Tensor, weight: Tensor, margin: int) -> Tensor:
        zeros = self._zeros(margin)
        return _convolve[self.rank](x, weight, self.bias, self.stride, zeros, self.dilation, self.groups)

    def _kernel(self) -> Tensor:
        """sum_h (1 - g_h) W_h hat_h: what all heads do by position, as one kernel of the block's size."""
        hats = self._hats().flatten(1)
        if self.content:
            hats = (1 - self._gates())[:, None] * hats
        with without_autocast(hats.device.type):
            kernel = self.weight.flatten(2).to(hats.dtype) @ hats
        return kernel.unflatten(2, self._block()).to(self.weight.dtype)

    def _hats(self) -> Tensor:
        """Each head's weights by position, (N, *block); they sum to one."""
        width = 1 + _within(self.spread, 0.0, float("inf"))
        centres = self._centres()
        hats = centres.new_ones(self.num_heads, *[1] * self.rank)
        for axis, places in enumerate(self._places()):
            distance = (places - centres[:, axis, None]).abs() / width[:, None]
            # Not clamp(min=0): at distance one, where the convolution stands, there has to be a slope.
            hat = torch.where(distance <= 1, 1 - distance, 0)
            shape = [1] * self.rank
            shape[axis] = len(places)
            hats = hats * (hat / hat.sum(1, keepdim=True)).view(-1, *shape)
        return hats

    def _centres(self) -> Tensor:
        """Home plus shift, kept inside the block: (N, axes), in steps of the dilation."""
        home = torch.stack(torch.meshgrid(*self._places(margin=0), indexing="ij"), -1).flatten(0, -2)
        ends = [(places[0], places[-1]) for places in self._places()]
        low, high = (torch.stack(column) for column in zip(*ends, strict=True))
        return _within(home + self.shift, low, high)

    def _places(self, margin: int | None = None) -> list[Tensor]:
        """The places of the block along each axis, in steps of the dilation from the middle of the kernel.

        In float32 or wider, as all that is computed of them: in half precision places would fall together.
        """
        margin = self.margin if margin is None else margin
        like: dict[str, Any] = {
            "device": self.shift.device,
            "dtype": torch.promote_types(self.shift.dtype, torch.float32),
        }
        return [torch.arange(-(k // 2) - margin, k - k // 2 + margin, **like) for k in self.kernel_size]

    # ------------------------------------------------------------------------------------------------- by content

    def _gates(self) -> Tensor:
        return _within(self.gate, 0.0, 1.0)

    def _content(self, x: Tensor) -> Tensor:
        """sum_h g_h W_h sum_c softmax_c(q_h . k_h) x[c]."""
        batched = x if x.ndim == self.rank + 2 else x[None]
        query, key, aligned = self._query_key(batched)
        # Every head mixes the whole input: one map, seen N times.
        value = aligned.to(query.dtype).movedim(1, -1)[:, None].expand(-1, self.num_heads, *[-1] * (self.rank + 1))
        mixed = local_attention(query, key, value, self._window()).movedim(-1, 1)  # B, C, N, *out
        places = [slice(align.first, align.first + align.count) for align in self._aligned(batched.shape[2:])]
        mixed = mixed[(..., *places)].flatten(1, 2)
        wide = wide_of(self.weight)  # also in the gradient of the gates, which is a sum over the whole weight
        weight = (self.weight.flatten(2).to(wide) * self._gates().to(wide)).flatten(1).to(self.weight.dtype)
        y = _convolve[self.rank](mixed.to(self.weight.dtype), weight[(..., *[None] * self.rank)], groups=self.groups)
        return y if x.ndim == batched.ndim else y[0]

    def _query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads' queries and keys, and the map that they are on: x, with zeros before it such that every
        ``stride``-th cell is the middle of a block of the convolution."""
        padding = [(align.before, align.after) for align in self._aligned(x.shape[2:])]
        aligned = F.pad(x, flat(padding)) if any(chain(*padding)) else x
        middles = aligned[(..., *[slice(None, None, stride) for stride in self.stride])]
        query, key = _projected(self.query, middles), _projected(self.key, aligned)
        return split_heads(query, self.num_heads), split_heads(key, self.num_heads), aligned

    def _window(self) -> Window:
        return Window(self._block(), stride=self.stride, dilation=self.dilation, border="zeros")

    def _aligned(self, size: Sequence[int]) -> list[Aligned]:
        around = [(zeros, zeros) for zeros in self._zeros(self.margin)]
        geometry = zip(size, self._block(), self.stride, self.dilation, around, strict=True)
        return [align(*axis) for axis in geometry]

    # ---------------------------------------------------------------------------------------- what is to be computed

    def _is_convolution(self) -> bool:
        """Whether every head is at home, looks at one cell, and sees no content."""
        parameters = [self.shift, self.spread, *([self.gate] if self.content else [])]
        if _wants_gradient(*parameters) or (self.content and _any_positive(self.gate)):
            return False
        return not _any_positive(self.spread) and not _any_positive(self.shift) and not _any_positive(self.shift, -1)

    def _sees_content(self) -> bool:
        return self.content and (_wants_gradient(self.gate) or _any_positive(self.gate))

    # --------------------------------------------------------------------------------------------------- geometry

    def _check(self, x: Tensor) -> None:
        if x.ndim not in (self.rank + 1, self.rank + 2) or x.shape[-self.rank - 1] != self.in_channels:
            axes = ", ".join("DHW"[-self.rank :]) if self.rank > 1 else "L"
            raise ShapeError(
                f"{type(self).__name__} takes (B, {self.in_channels}, {axes}) or ({self.in_channels}, {axes}); "
                f"received {tuple(x.shape)}"
            )

    def _padded(self, x: Tensor, margin: int) -> Tensor:
        """x with all that a block may see around it, the margin included, unless :meth:`_zeros` says it."""
        if not self._copies:
            return x
        reach = zip(self._around, self.dilation, strict=True)
        around = tuple((before + margin * step, after + margin * step) for (before, after), step in reach)
        if self.padding_mode == "zeros":
            return F.pad(x, flat(around))
        if margin and not self._fits(x, around):
            F.pad(x, flat(self._around), self.padding_mode)  # raises where the convolution does
            return _continued(x, around, self.padding_mode)
        return F.pad(x, flat(around), self.padding_mode)

    def _fits(self, x: Tensor, around: Around) -> bool:
        """Whether PyTorch pads so far: a torus once around, a mirror without the cell at the edge."""
        most = {"circular": 0, "reflect": 1}.get(self.padding_mode)
        sizes = x.shape[-self.rank :]
        return most is None or all(max(axis) <= cells - most for cells, axis in zip(sizes, around, strict=True))

    def _zeros(self, margin: int) -> list[int]:
        """The zeros on each side of an axis that were not copied in."""
        sides = zip(self._around, self.dilation, strict=True)
        return [0 if self._copies else before + margin * step for (before, _), step in sides]

    def _block(self) -> tuple[int, ...]:
        return tuple(k + 2 * self.margin for k in self.kernel_size)

    def _is_same(self) -> bool:
        return is_same(self._around, self.kernel_size, self.dilation)

    def _reach(self) -> list[tuple[int, int]]:
        """Per axis the first and the last cell of the block, from the cell p * stride of query p."""
        reach = []
        for (before, _), k, d in zip(self._around, self.kernel_size, self.dilation, strict=True):
            first = -before - self.margin * d
            reach.append((first, first + (k - 1 + 2 * self.margin) * d))
        return reach

    def _centred(self, weights: Tensor) -> Tensor:
        """Put weights over the layer's block, (B, N, Q, *block), into the centred one of :meth:`window_on`."""
        sides = [2 * max(-first, last) + 1 for first, last in self._reach()]
        whole = weights.new_zeros(*weights.shape[:3], *sides)
        steps = zip(self._reach(), sides, self.dilation, strict=True)
        whole[(..., *[slice(side // 2 + first, side // 2 + last + 1, d) for (first, last), side, d in steps])] = weights
        return whole


def _check_margin(layer: GatedPositionalSelfAttention, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """States of older versions do not say their margin: they are believed to be of this one."""
    if f"{prefix}shift" not in state:
        return
    found = int(state.setdefault(f"{prefix}_extra_state", layer.get_extra_state()))
    if found != layer.margin:
        raise OptionError(
            f"the state of {prefix.removesuffix('.') or 'the layer'} was trained with margin={found}, where heads see other "
            f"cells than with margin={layer.margin}: convert with that margin before it is loaded"
        )


def _projected(project: nn.Module, x: Tensor) -> Tensor:
    """The module of x; in float32 where a sum over channels could leave the range in which the convolution stays."""
    if not has_short_range(x):
        return project(x)
    wide = wide_of(x)
    held = chain(project.named_parameters(), project.named_buffers())
    state = {name: tensor.to(wide) for name, tensor in held if tensor.is_floating_point()}
    with without_autocast(x.device.type):
        return functional_call(project, state, (x.to(wide),))


def _continued(x: Tensor, around: Around, mode: str) -> Tensor:
    """``F.pad``, circular or reflected, as far as one likes: round and round, or back and forth."""
    for axis, (before, after) in enumerate(around, start=x.ndim - len(around)):
        cells = x.shape[axis]
        place = torch.arange(-before, cells + after, device=x.device)
        if mode == "circular":
            place = place % cells
        else:
            period = max(2 * (cells - 1), 1)
            place = place % period
            place = place.minimum(period - place)
        x = x.index_select(axis, place)
    return x


def _everywhere(size: Sequence[int]) -> Tensor:
    """The index of every cell of a map, (cells, axes)."""
    return torch.stack(torch.meshgrid(*[torch.arange(n, device="cpu") for n in size], indexing="ij"), -1).flatten(0, -2)


def _within(x: Tensor, low: Any, high: Any) -> Tensor:
    """x, or the nearest value between low and high; the gradient is that of x either way."""
    return x.detach().clamp(low, high) + (x - x.detach())


def _wants_gradient(*parameters: Tensor) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)


def _any_positive(parameter: Tensor, sign: int = 1) -> bool:
    """Whether any value, times ``sign``, is above zero or not a number; yes where values cannot be read."""
    if torch.compiler.is_compiling():
        return True
    try:
        values = parameter.tolist()  # no operator: a tensor that is only traced or counted has its values still
    except RuntimeError:  # mapped by vmap, or without values
        return True
    flat = chain(*values) if parameter.ndim == 2 else values
    return any(not sign * value <= 0 for value in flat)
