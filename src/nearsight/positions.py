# SPDX-License-Identifier: Apache-2.0
"""Position encodings: what tells attention where a cell is.

An encoding may act in three places, and every class here fills in one of them:

    embed(x)                           what is added to the layer's input            absolute encodings
    rotate(query, key, window)         how query and key turn with their position    rotary encodings
    tables(window, size)               bias and relative tables of the operation     relative encodings

What an encoding computes of places, it computes in float32 or wider whatever the dtype of its layer (in half precision
cells would share a place), and anew at every call: there is no buffer that loading a state could leave uninitialised.

:func:`register` gives an encoding of one's own a name, for layers, networks, command lines and files.

``equivariant`` says whether attention with the encoding commutes with translations: exactly so on a torus
(``border="wrap"``), and elsewhere as far as no window touches the border.

Symbols: N heads, D head_dim, C = N*D channels, k window, delta = key cell - query cell, one number per axis.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .errors import DtypeError, OptionError, ShapeError
from .precision import wide_of, without_autocast
from .private import unflatten
from .window import Axis, Window

Tables = tuple[Tensor | None, Sequence[Tensor] | None]


class Position(nn.Module):
    """No encoding: attention sees a set of cells, and global attention is permutation-equivariant.

    The base of all encodings: every hook does nothing. A subclass that takes the arguments below, or has no ``__init__`` of
    its own, can be given to a layer or a network as it is. Parameters: 0.

    Attributes:
        equivariant: see above.
        content_gain: standard deviation of a layer's queries and keys at its start, where that of its input is 1. Below 1
            it is the encoding that decides at first where to look.

    Args:
        channels: of the layer's input.
        num_heads, head_dim: of the layer's queries and keys.
        window: the widest that the layer will use; for global attention it covers a map of ``map_size`` from everywhere.
        map_size: cells per axis; as many numbers as the layer has axes.

    Example:
        >>> class Table(Position):
        ...     def __init__(self, *, num_heads, window, map_size, **_):
        ...         super().__init__()
        ...         self.table = nn.Parameter(torch.zeros(num_heads, *window.table_size(len(map_size))))
        ...
        ...     def tables(self, window, size):
        ...         return self.table, None
        >>> from nearsight import LocalSelfAttention2d
        >>> LocalSelfAttention2d(16, kernel_size=3, position=Table)(torch.randn(1, 16, 5, 6)).shape
        torch.Size([1, 16, 5, 6])
    """

    equivariant = True
    content_gain = 1.0

    def __init__(
        self,
        *,
        channels: int | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        window: Window | None = None,
        map_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()

    def extra_repr(self) -> str:
        """Its own parameters and their shapes, and whether it keeps attention equivariant to translation."""
        shapes = [f"{name}={tuple(own.shape)}" for name, own in self.named_parameters(recurse=False)]
        return ", ".join([*shapes, *(() if self.equivariant else ("absolute",))])

    def embed(self, x: Tensor) -> Tensor:
        """Act on the layer's input, (B, C_in, *map)."""
        return x

    def rotate(self, query: Tensor, key: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Act on query (B, N, *out, D) and key (B, N, *in, D)."""
        return query, key

    def tables(self, window: Window, size: Sequence[int]) -> Tables:
        """``bias`` and ``relative`` for a window on a map of ``size`` cells; None for what there is not."""
        return None, None

    def places(self) -> dict[str, tuple[int, ...]]:
        """The parameters that are tables, and which of their dimensions count entries, one dimension for each axis of the
        map that a table has: what :func:`nearsight.resize_positions` resizes for images of another size."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that weight decay is not to shrink: all of them. Places are no features."""
        return {name for name, _ in self.named_parameters()}


class SinusoidalPosition(Position):
    """Fixed absolute waves, added to the input.

        x[c] + p,  p = [sin(c_a * w_i), cos(c_a * w_i)] for every axis a,  w_i = 10000 ** (-i / (C / (2 * axes)))

    Source: Vaswani et al. 2017 (arXiv:1706.03762) section 3.5, an equal share of the channels per axis as in ViT code.
    Not equivariant. Parameters: 0.

    Raises:
        ShapeError: the input's channels are no multiple of 2 * axes.
    """

    equivariant = False

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        _divide("sinusoidal encoding", "in_channels", channels, 2 * rank)
        self.rank = rank
        self.waves = channels // (2 * rank)  # per axis

    def embed(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        frequencies = _frequencies(self.waves, 10000.0, **wide)
        y = x.to(wide["dtype"])
        for axis in range(self.rank):
            cells = torch.arange(x.shape[2 + axis], **wide)
            angles = frequencies[:, None] * cells  # waves, cells
            y = _add_to_share(y, torch.cat([angles.sin(), angles.cos()]), axis, self.rank)
        return y.to(x.dtype)


class LearnedPosition(Position):
    """A learnt absolute embedding, added to the input.

        x[c] + P[c],  P of shape (C, *map_size)

    Source: Dosovitskiy et al. 2021 (arXiv:2010.11929). On a map of another size P is resampled linearly, as ViTs do when
    the resolution changes. Not equivariant. Parameters: C * prod(map_size).
    """

    equivariant = False

    def __init__(self, channels: int, map_size: Sequence[int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(channels, *map_size))
        nn.init.trunc_normal_(self.embedding, std=0.02)

    def places(self) -> dict[str, tuple[int, ...]]:
        return {"embedding": tuple(range(1, self.embedding.ndim))}

    def embed(self, x: Tensor) -> Tensor:
        embedding = self.embedding[None]
        if torch.jit.is_tracing() or embedding.shape[2:] != x.shape[2:]:  # a trace serves maps of other sizes
            mode = ("linear", "bilinear", "trilinear")[x.ndim - 3]
            embedding = F.interpolate(embedding, size=x.shape[2:], mode=mode, align_corners=False)
        return x + embedding.to(x.dtype)


class RelativePosition(Position):
    """SASA's relative embeddings: a learnt vector per row offset and one per column offset, met by the query.

        logit += scale * q . concat(r_row[delta_y], r_col[delta_x])

    Source: Ramachandran et al. 2019 (arXiv:1906.05909), eq. 3. The halves are taken inside every head, and every head has
    vectors of its own: that reading gives the paper's parameter counts. With one axis the vector has the full head_dim,
    with three every axis has a third. Equivariant. Parameters: k * C, or (2n-1) * C in global attention over n cells per
    axis.

    The vectors start with a standard deviation of 2: heads that look in distinct directions from the first step train
    faster than heads that all start by averaging their window.

    state_dict: ``vectors.0`` (rows), ``vectors.1`` (columns), each (N, k, D / axes).
    """

    def __init__(self, num_heads: int, head_dim: int, table_size: Sequence[int]) -> None:
        super().__init__()
        rank = len(table_size)
        if head_dim < rank:
            raise ShapeError(
                f"relative encoding gives every axis a share of head_dim; received head_dim={head_dim} for {rank} axes: "
                "use fewer heads"
            )
        cuts = [head_dim * axis // rank for axis in range(rank + 1)]
        self.shares = tuple(pairwise(cuts))
        self.head_dim = head_dim
        self.vectors = nn.ParameterList(
            nn.Parameter(2 * torch.randn(num_heads, entries, end - start))
            for entries, (start, end) in zip(table_size, self.shares, strict=True)
        )

    def places(self) -> dict[str, tuple[int, ...]]:
        return {f"vectors.{axis}": (1,) for axis in range(len(self.vectors))}

    def tables(self, window: Window, size: Sequence[int]) -> Tables:
        axes = window.axes(len(size))
        return None, [
            F.pad(_fit(vectors, 1, axis), (start, self.head_dim - end))
            for vectors, axis, (start, end) in zip(self.vectors, axes, self.shares, strict=True)
        ]


class SharedRelativePosition(Position):
    """HaloNet's relative embeddings: a learnt vector per row offset and one per column offset, the same for all heads.

        logit += scale * q . (r_row[delta_y] + r_col[delta_x])

    Source: Vaswani et al. 2021 (arXiv:2103.12731), whose parameter counts say that the vectors have the full head_dim and
    that the heads share them. Equivariant. Parameters: head_dim times the entries of all axes, 2k-1 each where queries share
    a window, as in HaloNet.

    state_dict: ``vectors.0`` (rows), ``vectors.1`` (columns), each (entries, D).
    """

    def __init__(self, num_heads: int, head_dim: int, table_size: Sequence[int]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.vectors = nn.ParameterList(nn.Parameter(torch.randn(entries, head_dim)) for entries in table_size)

    def places(self) -> dict[str, tuple[int, ...]]:
        return {f"vectors.{axis}": (0,) for axis in range(len(self.vectors))}

    def tables(self, window: Window, size: Sequence[int]) -> Tables:
        axes = window.axes(len(size))
        tables = (_fit(vectors, 0, axis) for vectors, axis in zip(self.vectors, axes, strict=True))
        return None, [table.expand(self.num_heads, -1, -1) for table in tables]


class BiasPosition(Position):
    """A learnt number per head and relative offset.

        logit += B[head, delta]

    Source: Liu et al. 2021 (Swin, arXiv:2103.14030), eq. 4; Hassani et al. 2023 (NAT, arXiv:2204.07143). A centred window
    needs k entries per axis; Swin's and NAT's 2k-1 are those of ``border="shift"``. Equivariant.
    Parameters: N * k**axes, or N * (2k-1)**axes with "shift", N * (2n-1)**axes in global attention.

    state_dict: ``table`` (N, *table_size).
    """

    def __init__(self, num_heads: int, table_size: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, *table_size))
        nn.init.trunc_normal_(self.table, std=0.02)

    def places(self) -> dict[str, tuple[int, ...]]:
        return {"table": tuple(range(1, self.table.ndim))}

    def tables(self, window: Window, size: Sequence[int]) -> Tables:
        table = self.table
        for dim, axis in enumerate(window.axes(len(size)), start=1):
            table = _fit(table, dim, axis)
        return table, None


class ContinuousBias(Position):
    """Swin v2's log-spaced continuous bias: a small network of the offset.

        logit += 16 * sigmoid(MLP(g)),  g = sign(delta) * log2(1 + 8 |delta| / reach) / log2(8) per axis

    Source: Liu et al. 2022 (arXiv:2111.09883), section 3.3; MLP axes -> 512 -> N, ReLU, no second bias. ``reach`` is the
    largest offset of the window it was made for. Differs from the paper: the dot product stays as it is, where Swin v2 also
    swaps in a cosine. Works on maps of any size. Equivariant. Parameters: 512 * (axes + 1) + 512 * N.
    """

    def __init__(self, num_heads: int, offsets: Sequence[Sequence[int]], hidden: int = 512) -> None:
        super().__init__()
        self.reach = tuple(max(1, max(map(abs, axis))) for axis in offsets)
        self.mlp = nn.Sequential(
            nn.Linear(len(self.reach), hidden), nn.ReLU(), nn.Linear(hidden, num_heads, bias=False)
        )

    def tables(self, window: Window, size: Sequence[int]) -> Tables:
        like = next(
            self.mlp.parameters(), torch.empty(0, device="cpu")
        )  # quantised modules have none, and are on the CPU
        spread = [
            delta.sign() * (1 + 8 * delta.abs() / reach).log2() / 3
            for delta, reach in zip(_offsets(window, size, like), self.reach, strict=True)
        ]
        features = torch.stack(torch.meshgrid(*spread, indexing="ij"), -1)
        with without_autocast(like.device.type):
            return 16 * _called_wide(self.mlp, features).sigmoid().movedim(len(size), 0), None


class QuadraticPosition(Position):
    """A hill around a learnt centre per head: the encoding with which attention can express any convolution.

        logit += -alpha * || delta - centre ||**2

    Source: Cordonnier, Loukas, Jaggi 2020 (arXiv:1911.03584), theorem 1: with alpha -> infinity a head reads the single
    cell at its centre, and k*k heads make a k x k convolution. Centres start at random within a cell or two of the query,
    alpha at 1, and queries and keys small, so that hills decide at first. Equivariant.
    Parameters: (axes + 1) * N, 3 N on a map of two axes.

    state_dict: ``centre`` (N, axes) in cells, ``alpha`` (N,) in 1 / cells**2.
    """

    content_gain = 0.3

    def __init__(self, num_heads: int, rank: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.randn(num_heads, rank))
        self.alpha = nn.Parameter(torch.ones(num_heads))

    def tables(self, window: Window, size: Sequence[int]) -> Tables:
        delta = torch.stack(torch.meshgrid(*_offsets(window, size, self.centre), indexing="ij"), -1)
        heads = (slice(None), *[None] * len(size))
        with without_autocast(delta.device.type):
            distance = (delta - self.centre[heads]).square().sum(-1)
            return -self.alpha[heads] * distance, None


class RotaryPosition(Position):
    """Axial rotary encoding: pairs of query and key channels turn with the cell's position.

        (q_2i, q_2i+1) turned by c_a * w_i,  w_i = 100 ** (-i / (D / (2 * axes))), an equal share of the pairs per axis

    Source: Heo et al. 2024 (arXiv:2403.13298), "RoPE-axial", pairs interleaved as in their code. The logit depends on
    delta alone, so it is equivariant. On a torus only whole turns around it are waves at all: with ``border="wrap"`` every
    frequency is rounded to the nearest multiple of 2 pi / n. Parameters: 0.

    Raises:
        ShapeError: head_dim is no multiple of 2 * axes.
    """

    def __init__(self, head_dim: int, rank: int) -> None:
        super().__init__()
        _divide("rotary encoding", "head_dim", head_dim, 2 * rank)
        self.rank = rank
        self.share = head_dim // (2 * rank)  # pairs per axis

    def rotate(self, query: Tensor, key: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return _rotate(query, key, self.frequencies(query), window)

    def frequencies(self, like: Tensor) -> Tensor:
        """In radians per cell, (1, axes, head_dim / 2): every axis turns its own share of the pairs."""
        waves = _frequencies(self.share, 100.0, **_wide(like))
        return torch.block_diag(*[waves] * self.rank)[None]


class MixedRotaryPosition(Position):
    """Rotary encoding with learnt directions: every pair turns with a mixture of the axes.

        (q_2i, q_2i+1) turned by sum_a c_a * w_i,a,  w learnt per head

    Source: Heo et al. 2024 (arXiv:2403.13298), "RoPE-mixed"; initial directions are random, lengths 10 ** (-2i / D) for
    pair i. Equivariant; "wrap" rounds as in :class:`RotaryPosition` (gradients pass straight through).
    Parameters: axes * N * D / 2, which is C on a map of two axes.

    state_dict: ``frequencies`` (N, axes, D / 2), in radians per cell.

    Raises:
        ShapeError: head_dim is odd.
    """

    def __init__(self, num_heads: int, head_dim: int, rank: int) -> None:
        super().__init__()
        _divide("mixed rotary encoding", "head_dim", head_dim, 2)
        direction = F.normalize(torch.randn(num_heads, rank, head_dim // 2), dim=1)
        lengths = _frequencies(head_dim // 2, 10.0, **_wide(direction))
        self.frequencies = nn.Parameter((direction * lengths).to(direction.dtype))

    def rotate(self, query: Tensor, key: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        return _rotate(query, key, self.frequencies, window)


Factory = Callable[..., Position]
PositionLike = str | Position | Factory

_FACTORIES: dict[str, Factory] = {
    "none": Position,
    "sinusoidal": lambda *, channels, map_size, **_: SinusoidalPosition(channels, len(map_size)),
    "learned": lambda *, channels, map_size, **_: LearnedPosition(channels, map_size),
    "relative": lambda *, num_heads, head_dim, window, map_size, **_: RelativePosition(
        num_heads, head_dim, window.table_size(len(map_size))
    ),
    "relative_shared": lambda *, num_heads, head_dim, window, map_size, **_: SharedRelativePosition(
        num_heads, head_dim, window.table_size(len(map_size))
    ),
    "bias": lambda *, num_heads, window, map_size, **_: BiasPosition(num_heads, window.table_size(len(map_size))),
    "cpb": lambda *, num_heads, window, map_size, **_: ContinuousBias(num_heads, window.offsets(len(map_size))),
    "quadratic": lambda *, num_heads, map_size, **_: QuadraticPosition(num_heads, len(map_size)),
    "rope": lambda *, head_dim, map_size, **_: RotaryPosition(head_dim, len(map_size)),
    "mixed_rope": lambda *, num_heads, head_dim, map_size, **_: MixedRotaryPosition(num_heads, head_dim, len(map_size)),
}
_OWN = tuple(_FACTORIES)

POSITIONS: Mapping[str, Factory] = MappingProxyType(_FACTORIES)
"""Every name that ``position=`` knows, with what makes the encoding: nearsight's own, then those registered."""


UNNAMED_POSITION = (
    "a file can hold a position by its name alone: give yours one with nearsight.positions.register(name, factory) before "
    "the network is built"
)


def register(name: str, factory: Factory) -> None:
    """Give an encoding of your own a name, by which layers, networks, the command line and saved files know it.

    A file keeps the name alone: what loads it has to register the encoding first, as what trained it did.

    Args:
        name: letters, digits, ``_``, ``-`` and ``.``, beginning with a letter.
        factory: called for each layer with ``channels``, ``num_heads``, ``head_dim``, ``window`` and ``map_size``, all by
            name (see :class:`Position`); makes a new :class:`Position` every time. A class that takes these is a factory.

    Raises:
        OptionError: a name that is not of this form, nearsight's own, or another factory's already.
        DtypeError: what is no factory.

    Example:
        >>> register("hill", lambda *, num_heads, map_size, **_: QuadraticPosition(num_heads, len(map_size)))
        >>> from nearsight import create_model
        >>> create_model("sasa_nano,position=hill", num_classes=10)(torch.randn(1, 3, 28, 28)).shape
        torch.Size([1, 10])
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", name):
        raise OptionError(
            f"the name of a position must be made of letters, digits, _, - and ., a letter first; received {name!r}"
        )
    if not callable(factory) or isinstance(factory, nn.Module):
        raise DtypeError(
            f"a position's factory must be a class or a function that makes an encoding for each layer; received "
            f"{_kind(factory)}"
        )
    if name in _OWN:
        raise OptionError(f"position {name!r} is one of nearsight's own: register yours under another name")
    if _FACTORIES.get(name, factory) is not factory:
        raise OptionError(f"position {name!r} is registered already, for another factory: take another name")
    _FACTORIES[name] = factory


def name_of(position: PositionLike) -> str | None:
    """The name by which a file can refer to a position; None for one that is not registered."""
    if isinstance(position, str):
        return position
    return next((name for name, factory in _FACTORIES.items() if factory is position), None)


def position_encoding(
    position: PositionLike, *, channels: int, num_heads: int, head_dim: int, window: Window, map_size: Sequence[int]
) -> Position:
    """The encoding for a layer: by its name, from a factory, or a module of :mod:`nearsight.positions` as it is.

    Args:
        channels, num_heads, head_dim, window, map_size: of the layer, see :class:`Position`.

    Raises:
        OptionError: an unknown name; a factory that does not take these arguments.
        DtypeError: neither a name nor a factory nor an encoding; a factory that makes something else.
    """
    if isinstance(position, Position):
        return position
    if isinstance(position, nn.Module) or not (isinstance(position, str) or callable(position)):
        raise DtypeError(
            f"position must be a name, a factory or a module of nearsight.positions; received {_kind(position)}"
        )
    if isinstance(position, str) and position not in POSITIONS:
        near = get_close_matches(position, POSITIONS, n=1)
        raise OptionError(
            f"position must be one of {', '.join(POSITIONS)}; received {position!r}"
            + (f" (did you mean {near[0]}?)" if near else "")
            + f"; one of your own is made known by nearsight.positions.register({position!r}, factory) beforehand"
        )
    factory = POSITIONS[position] if isinstance(position, str) else position
    arguments = {
        "channels": channels,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "window": window,
        "map_size": tuple(map_size),
    }
    _check_takes(factory, arguments)
    made = factory(**arguments)
    if not isinstance(made, Position):
        raise DtypeError(f"a position's factory must make a nearsight.positions.Position; {factory} made {_kind(made)}")
    return made


def no_weight_decay_in(module: nn.Module) -> set[str]:
    """The names of the parameters that the parts of a module, encodings and layers, ask not to be decayed.

    Example:
        >>> from nearsight import LocalSelfAttention2d
        >>> sorted(no_weight_decay_in(nn.Sequential(nn.Linear(4, 4), LocalSelfAttention2d(16))))
        ['1.position.vectors.0', '1.position.vectors.1']
    """
    parts = [(path, part) for path, part in module.named_modules() if path and hasattr(part, "no_weight_decay")]
    return {f"{path}.{name}" for path, part in parts for name in part.no_weight_decay()}  # pyright: ignore


def refuse_instance(position: PositionLike | None) -> None:
    """What has several layers makes an encoding for each: one module would be shared, tables and all.

    Raises:
        OptionError: a module in place of a name or a factory.
    """
    if isinstance(position, nn.Module):
        raise OptionError(
            "the position of a network must be a name or a factory, which makes an encoding for each layer; received an "
            f"instance of {type(position).__name__}, which all layers would share: give the class, or a function that "
            "makes it"
        )


def refuse_shared(layers: Iterable[nn.Module]) -> None:
    """Hold the layers of a network against each other.

    Raises:
        OptionError: two of them have one encoding, because a factory made the same twice.
    """
    encodings = [layer.position for layer in layers if isinstance(getattr(layer, "position", None), Position)]
    if len(set(map(id, encodings))) < len(encodings):
        raise OptionError("a position's factory must make a new encoding at every call; it gave one to two layers")


def _check_takes(factory: Factory, arguments: Mapping[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise OptionError(
            f"a position's factory is called with {', '.join(arguments)}, all by name; {factory} does not take them: {error}"
        ) from error
    except ValueError:
        pass  # what is built in shows no signature


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _frequencies(count: int, base: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    return base ** (-torch.arange(count, dtype=dtype, device=device) / count)


def _wide(like: Tensor) -> dict[str, Any]:
    """Where and how places are computed: in float32 or wider, beside what they are for."""
    return {"dtype": wide_of(like), "device": like.device}


def _called_wide(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module, its hooks included, on x with its parameters in the dtype of x where theirs is narrower."""
    wide = {
        name: parameter.to(x.dtype)
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.dtype != x.dtype
    }
    return functional_call(module, wide, (x,)) if wide else module(x)


def _add_to_share(x: Tensor, waves: Tensor, axis: int, rank: int) -> Tensor:
    """Add (channels, cells) waves along one axis to that axis' share of the channels."""
    share = waves.shape[0]
    shape = [1] * rank
    shape[axis] = waves.shape[1]
    return x + F.pad(waves.view(share, *shape), (*[0] * (2 * rank), axis * share, (rank - 1 - axis) * share))


def _fit(table: Tensor, dim: int, axis: Axis) -> Tensor:
    """The middle of a table made for a map at least as large: offset 0 stays in the centre."""
    spare = table.shape[dim] - axis.table_size
    if isinstance(spare, Tensor):  # a trace finds the middle on maps of other sizes too, and fails on larger ones
        return table.narrow(dim, spare // 2, axis.table_size)  # pyright: ignore[reportArgumentType]
    if spare == 0:
        return table
    if spare < 0 or spare % 2:
        raise ShapeError(
            f"the position tables have {table.shape[dim]} entries along an axis that needs {axis.table_size}: "
            "build the layer with a map_size of at least the largest map, or with position='cpb', 'quadratic' or 'rope', "
            "which fit any size"
        )
    return table.narrow(dim, spare // 2, axis.table_size)


def _offsets(window: Window, size: Sequence[int], like: Tensor) -> list[Tensor]:
    return [
        (torch.arange(axis.table_size, **_wide(like)) - axis.zero) * axis.dilation for axis in window.axes(len(size))
    ]


def _rotate(query: Tensor, key: Tensor, frequencies: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Turn query and key by (heads or 1, axes, pairs) frequencies, in float32 or wider."""
    axes, size = window.axes(query.ndim - 3), key.shape[2:-1]
    frequencies = frequencies.to(_wide(frequencies)["dtype"])
    around = [axis.border == "wrap" for axis in axes]
    if any(around):
        whole = _whole_turns(frequencies, size)
        parts = [(whole if turns else frequencies)[:, axis] for axis, turns in enumerate(around)]
        frequencies = torch.stack(parts, 1)
    return _turn(query, frequencies, [axis.stride for axis in axes]), _turn(key, frequencies, [1] * len(axes))


def _whole_turns(frequencies: Tensor, size: Sequence[int]) -> Tensor:
    """Round to multiples of 2 pi / n per axis, in value but not in gradient."""
    unit = torch.stack([2 * math.pi / frequencies.new_full((1,), cells) for cells in size])
    whole = (frequencies / unit).round() * unit
    return frequencies + (whole - frequencies).detach()


def _turn(x: Tensor, frequencies: Tensor, strides: Sequence[int]) -> Tensor:
    """Rotate neighbouring channel pairs of (B, N, *map, D) by the sum of position times frequency."""
    rank = x.ndim - 3
    angles = torch.zeros((), dtype=frequencies.dtype, device=x.device)
    for axis in range(rank):
        shape = [1] * rank
        shape[axis] = x.shape[2 + axis]
        cells = strides[axis] * torch.arange(x.shape[2 + axis], dtype=frequencies.dtype, device=x.device)
        turn = frequencies[:, axis]
        angles = angles + cells.view(*shape, 1) * turn.view(turn.shape[0], *[1] * rank, -1)
    even, odd = unflatten(x, -1, (-1, 2)).to(angles.dtype).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def _divide(what: str, name: str, value: int, divisor: int) -> None:
    if value % divisor:
        raise ShapeError(f"{what} needs {name} to be a multiple of {divisor}; received {name}={value}")
