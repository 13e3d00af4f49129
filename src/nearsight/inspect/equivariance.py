# SPDX-License-Identifier: Apache-2.0
"""How far a module is from commuting with a transformation of its input, and which layer of a network is to blame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, nan, prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..layers import AttentionLayer
from ..modes import as_written, evaluating
from ..pages.brief import Rows
from ..pages.palette import BORDER, ENCODING, STRIDE, UNDIVIDED
from ..pages.style import INK, in_style, new_figure
from ..private import tree_map
from .grid import Following
from .layer_list import layers_of
from .reach import Reach, closes, inside_of, reach_of
from .transforms import Transform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-5  # float32: an error below it is not the layer's
PARTS = {
    "border": (BORDER, ""),
    "stride": (STRIDE, "////"),
    "encoding": (ENCODING, "...."),
    "undivided": (UNDIVIDED, ""),
}

# -------------------------------------------------------------------------------------------------------- whole modules


def equivariance_error(
    module: Callable[[Tensor], Any],
    x: Tensor,
    transform: Callable[[Tensor], Tensor],
    *,
    out_transform: Callable[[Tensor], Tensor] | None = None,
    margin: int = 0,
) -> float:
    """How far f(T x) is from T f(x), relative to the size of f(x).

        error = max | f(T x) - T f(x) | / max | f(x) |

    Args:
        module: f; a module in training mode is asked as it is, so call ``.eval()`` first. It returns one tensor.
        x: an input, (B, C, *map); where the transform says how many axes it moves, also one input (C, *map).
        transform: T: a :class:`Transform` of ``nearsight.inspect`` (``Translation``, ``Rotation90``, ``Reflection``,
            ``Scaling``, ``Permutation``), or any function, for example ``lambda x: x.roll((2, 3), (-2, -1))``.
        out_transform: T on the output where that differs, as after a stride. None takes ``transform``; a :class:`Transform`
            then follows the strides of the functions that lead from x to the output, which are observed and not guessed from
            sizes, and an output without a map, such as (B, classes), has to stay as it is.
        margin: cells along every edge of the output that are left out, for what only holds in the interior.

    Raises:
        ShapeError: the two sides differ in shape, the margin leaves nothing, the transform has another number of axes than
            the map, the output is no tensor, or how its cells lie in the input cannot be told.

    Example:
        >>> layer = LocalSelfAttention2d(16, stride=2, border="wrap")
        >>> x = torch.randn(1, 16, 8, 12)
        >>> equivariance_error(layer, x, Translation(2, 4)) < 1e-4 < equivariance_error(layer, x, Translation(1, 0.5))
        True
    """
    if isinstance(transform, Transform):
        x = transform.batched(x)
    with torch.no_grad(), as_written(module):
        with Following(x, module) as follow:
            plain = _one_tensor(module(x))
        moved_first = _one_tensor(module(transform(x)))
        moved_last = (out_transform or _on_output(transform, x, plain, follow))(plain)
    if moved_first.shape != moved_last.shape:
        raise ShapeError(
            f"f(T x) and T f(x) must have one shape; received {tuple(moved_first.shape)} and {tuple(moved_last.shape)}: "
            "give out_transform, which is T on the output"
        )
    difference = _interior(moved_first - moved_last, margin)
    if difference.numel() == 0:
        raise ShapeError(f"a margin of {margin} leaves nothing of an output of {tuple(plain.shape)}")
    return _relative(difference, plain)


def _one_tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ShapeError(
            f"the module must return one tensor; received {type(output).__name__}: choose one of its parts, as by "
            "lambda x: module(x)[0]"
        )
    return output


def _on_output(
    transform: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, follow: Following
) -> Callable[[Tensor], Tensor]:
    if not isinstance(transform, Transform):
        return transform
    if y.ndim == 2:  # a vector per image has no map to be moved
        return _same
    grid = follow.grid(y)
    if grid is None or grid.dims != tuple(range(2, x.ndim)):
        raise ShapeError(
            f"how the cells of an output of {tuple(y.shape)} lie in an input of {tuple(x.shape)} cannot be told from what "
            "the module calls: give out_transform, which is T on the output"
        )
    after = transform.after(grid.strides)
    if after is None:
        raise ShapeError(f"{transform} of {tuple(x.shape[2:])} cells has no meaning on {tuple(y.shape[2:])} cells")
    return after


def _same(x: Tensor) -> Tensor:
    return x


def _relative(difference: Tensor, of: Tensor) -> float:
    return (difference.abs().max() / of.abs().max().clamp(min=torch.finfo(of.dtype).tiny)).item()


def _interior(x: Tensor, margin: int) -> Tensor:
    for axis in range(2, x.ndim):
        x = x.narrow(axis, margin, max(0, x.shape[axis] - 2 * margin))
    return x


# ------------------------------------------------------------------------------------------------------ layer by layer


@dataclass(frozen=True)
class LayerError:
    """How far a network is from equivariance after one of its layers. None is what cannot be told.

    layer      the module's name; of a module that runs several times, with the number of the run
    kind       its class
    map_size   cells of its output; () for a vector
    mixes      whether it looks beyond a cell or thins out the map; other layers cannot break a translation
    error      of the network from the image to this output, as :func:`equivariance_error`
    interior   the same, over the cells that saw no edge of any map on the way
    own        of this layer alone, given its input in the network, and that input transformed
    border     part of ``own``: what vanishes in the interior
    stride     part of ``own``: what vanishes from the interior with the nearest shift that the layer's grid can follow
    encoding   part of ``own``: what is left

    own = border + stride + encoding.
    """

    layer: str
    kind: str
    map_size: tuple[int, ...]
    mixes: bool
    error: float | None
    interior: float | None = None
    own: float | None = None
    border: float | None = None
    stride: float | None = None
    encoding: float | None = None


class ErrorTable(Rows[LayerError]):
    """The layers of a network in the order of their running: a list that shows itself as a table, the causes first."""

    def columns(self) -> dict[str, Callable[[LayerError], Any]]:
        causes = ("own", "border", "stride", "encoding", "error", "interior", "kind", "map_size", "mixes")
        return {name: attrgetter(name) for name in ("layer", *causes)}


def equivariance_by_layer(model: nn.Module, images: Tensor, transform: Transform) -> ErrorTable:
    """Which layers of a network break a symmetry, and how much of it is the border, the stride or the encoding.

    The network sees x and T x. For every layer (attention layers whole, else modules without children) the outputs are
    compared; then the layer alone is given T of its own input. With E(T) the error over all cells and I(T) that over the
    interior, both relative to the largest output,

        own = E(T);   border = E(T) - I(T);   encoding = min(I(T), I(T'));   stride = I(T) - encoding

    where T' is the translation nearest to T by multiples of the layer's stride (of the block, for attention in blocks).
    Strides are those of the functions that the network calls, which are observed; sizes say nothing of them. A cell is
    interior if no memory block, kernel or pool that leads to it hangs over an edge, neither there nor where T
    takes it from; on a torus every cell is. Global attention cuts no block, so that what breaks it is its encoding; after
    a layer with borders it leaves no interior. Shifts become fractions of a cell behind a stride: what a map cannot hold of
    them counts as stride.

    Rotations and reflections have parts too where nothing is strided; scalings and permutations have no interior.
    What a network computes outside of layers (shortcuts, reshaping) shows in ``error``, and not in ``own``.

    Args:
        model: run twice in evaluation mode, and left as it was.
        images: (B, C, H, W), or one image (C, H, W).
        transform: for example ``Translation(1, 1)``; use sizes that the network's strides divide.

    Raises:
        OptionError: a transform that is a plain function: its meaning on smaller maps is not known.
        ShapeError: an image that is not (C, H, W), a transform of another number of axes.

    Example:
        >>> model = nn.Sequential(LocalSelfAttention2d(16, border="wrap"), LocalSelfAttention2d(16))
        >>> torus, masked = equivariance_by_layer(model, torch.randn(16, 20, 20), Translation(1, 1))
        >>> torus.error < 1e-4, masked.border > 1e-2, masked.encoding < 1e-4
        (True, True, True)
    """
    if not isinstance(transform, Transform):
        raise OptionError(f"transform must be a Transform of nearsight.inspect; received {transform!r}")
    if images.ndim not in (3, 4):
        raise ShapeError(f"images must be (B, C, H, W) or one (C, H, W); received {tuple(images.shape)}")
    if transform.axes not in (None, 2):
        raise ShapeError(
            f"{transform} moves maps of {transform.axes} {'axis' if transform.axes == 1 else 'axes'}, and not images"
        )
    batch = images if images.ndim == 4 else images[None]
    size = tuple(batch.shape[2:])
    with torch.no_grad(), evaluating(model), as_written(model):
        plain, moved = _record(model, batch), _record(model, transform(batch))
        path = _Path(size)  # goes along with the rows
        rows = [_row(one, other, size, transform, path) for one, other in zip(plain, moved, strict=True)]
    return ErrorTable(row for row in rows if row is not None)


class _Map(NamedTuple):
    """Where the channels of a map are, and how many pixels lie between its cells."""

    channels_last: bool
    stride: tuple[float, ...]

    def first(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1) if self.channels_last else x

    def back(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1) if self.channels_last else x

    def size(self, x: Tensor) -> tuple[int, ...]:
        return tuple(self.first(x).shape[2:])


class _Call(NamedTuple):
    """One run of a layer, with what is known of its input and its output as maps."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    x_map: _Map | None
    y_map: _Map | None

    def again(self, x: Tensor) -> Any:
        """Run it on another input."""
        return self.module(x, *self.args[1:], **self.kwargs)


class _Path:
    """Which cells have seen an edge by now. Branches are counted as if they came one after the other: never too few."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = size
        self.low = self.high = (0.0,) * len(size)  # in pixels
        self.touched = (False,) * len(size)
        self.torus = True

    def extend(
        self,
        in_size: Sequence[int],
        out_size: Sequence[int],
        pixels: Sequence[float],
        stride: Sequence[float],
        reach: Reach,
    ) -> None:
        """Another layer, whose input's cells are so many pixels apart, and whose output's so many of those cells."""
        self.torus = self.torus and closes(in_size, out_size, stride, reach.period)
        edges = zip(self.touched, reach.is_cut, reach.low, reach.high, strict=True)
        self.touched = tuple(before or (is_cut and max(low, high) > 0) for before, is_cut, low, high in edges)
        low, high = reach.low, reach.high
        if any(self.touched) and 1 in (
            prod(in_size),
            prod(out_size),
        ):  # squeeze-and-excitation: it comes back to all cells
            self.touched = (True,) * len(self.size)
            low = high = (inf,) * len(self.size)
        self.low, self.high = self._sum(self.low, low, pixels), self._sum(self.high, high, pixels)

    def inside(self, out_size: Sequence[int], stride: Sequence[float]) -> Tensor:
        return inside_of(self.size, out_size, self.low, self.high, stride)

    def _sum(self, total: Sequence[float], cells: Sequence[float], pixels: Sequence[float]) -> tuple[float, ...]:
        """Along an axis on which no edge has been seen there is nothing to add up."""
        steps = zip(self.touched, total, cells, pixels, strict=True)
        return tuple(a + b * c if touched else a for touched, a, b, c in steps)


def _record(model: nn.Module, batch: Tensor) -> list[_Call]:
    """Every run of every layer, in order. Tensors are copied: what follows may write into them."""
    calls: list[_Call] = []
    seen: dict[str, int] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[:] = [*_copy((args, kwargs)), args[0] if args else None]

    def after(name: str):
        def record(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = seen.get(name, 0) + 1
            title = name or type(module).__name__
            run = title if seen[name] == 1 else f"{title} ({seen[name]})"
            copied, kwargs, x = inputs
            maps = _map_of(x, follow), _map_of(output, follow)
            calls.append(_Call(run, module, copied, kwargs, _copy(output), *maps))

        return record

    inputs: list[Any] = []  # of the layer that is running; there are no layers within layers
    handles = []
    with Following(batch, model) as follow:
        for name, layer in layers_of(model).items():
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after(name)))
        try:
            model(batch)
        finally:
            for handle in handles:
                handle.remove()
    return calls


def _map_of(value: Any, follow: Following) -> _Map | None:
    """None for what is no map of the image, such as a list of tokens, or is not known to be one."""
    grid = follow.grid(value)
    if grid is None or not value.is_floating_point() or value.ndim != len(grid.dims) + 2:
        return None
    rank = len(grid.dims)
    for channels_last in (False, True):
        if grid.dims == tuple(range(2 - channels_last, 2 - channels_last + rank)):
            return _Map(channels_last, grid.strides)
    return None


def _copy(values: Any) -> Any:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, values)


def _row(one: _Call, other: _Call, size: tuple[int, ...], transform: Transform, path: _Path) -> LayerError | None:
    """None for an output that is neither a map nor a vector per image."""
    x_map, y_map = one.x_map, one.y_map
    if isinstance(one.output, Tensor) and one.output.ndim == 2:
        return _vector_row(one, other, x_map, transform)
    if y_map is None:
        return None
    y, moved, out_size = y_map.first(one.output), y_map.first(other.output), y_map.size(one.output)
    in_size, pixels = (size, (1.0,) * len(size)) if x_map is None else (x_map.size(one.args[0]), x_map.stride)
    stride = tuple(b / a for a, b in zip(pixels, y_map.stride, strict=True))
    reach = Reach((inf,) * 2, (inf,) * 2, (True,) * 2, (1, 1))
    if x_map is not None:
        reach = reach_of(one.module, in_size, out_size, stride)
    path.extend(in_size, out_size, pixels, stride, reach)
    after = transform.after(y_map.stride)
    error, interior = _errors(moved, y, after, path.inside(out_size, y_map.stride), path.torus)
    mixes = isinstance(one.module, AttentionLayer) or max(*reach.low, *reach.high) > 0 or max(reach.period) > 1
    before = transform.after(pixels)
    parts = {} if x_map is None or before is None else _own(one, y, x_map, y_map, reach, before, stride)
    return LayerError(one.name, type(one.module).__name__, out_size, mixes, error, interior, **parts)


def _vector_row(one: _Call, other: _Call, x_map: _Map | None, transform: Transform) -> LayerError:
    """Vectors have no map to be moved: how far they are from staying as they were."""
    own = None
    if x_map is not None:
        x = x_map.first(one.args[0])
        before = transform.after(x_map.stride)
        again = None if before is None else one.again(x_map.back(before(x)))
        if again is not None and again.shape == one.output.shape:
            own = _relative(again - one.output, one.output)
    error = _relative(other.output - one.output, one.output)
    return LayerError(one.name, type(one.module).__name__, (), x_map is not None, error, own=own)


def _own(
    call: _Call,
    y: Tensor,
    x_map: _Map,
    y_map: _Map,
    reach: Reach,
    transform: Transform,
    stride: Sequence[float],
) -> dict[str, float | None]:
    """The last four fields of :class:`LayerError`."""
    x, size, out_size = x_map.first(call.args[0]), x_map.size(call.args[0]), tuple(y.shape[2:])
    inside = inside_of(size, out_size, *reach.cut(), stride)

    def errors(transform: Transform) -> tuple[float | None, float | None]:
        moved = y_map.first(call.again(x_map.back(transform(x))))
        return _errors(moved, y, transform.after(stride), inside, closes(size, out_size, stride, reach.period))

    own, interior = errors(transform)
    if own is None or interior is None:
        return {"own": own}
    parts: dict[str, float | None] = {"own": own, "border": own - interior}
    nearest = transform.on_grid(reach.period, size)
    left = interior if nearest is transform else None if nearest is None else errors(nearest)[1]
    if left is not None:
        parts["encoding"] = min(interior, left)
        parts["stride"] = interior - min(interior, left)
    return parts


def _errors(
    moved_first: Tensor, y: Tensor, transform: Transform | None, inside: Tensor, torus: bool
) -> tuple[float | None, float | None]:
    """Over all cells and over the interior; None where there is nothing to compare."""
    if transform is None:
        return None, None
    moved_last = transform(y)
    if moved_first.shape != moved_last.shape:
        return None, None
    difference = moved_first - moved_last
    error = _relative(difference, y)
    if not transform.is_rigid:
        return error, None
    kept = transform.keeps(inside, torus)  # interior where it came from, and interior where it is now
    kept = kept & (inside if kept.shape == inside.shape else inside.mT)
    return error, _relative(difference.where(kept.to(y.device), 0), y) if kept.any() else None


# ---------------------------------------------------------------------------------------------------------------- drawn


def decisive(rows: Sequence[LayerError]) -> list[LayerError]:
    """The rows to look at: layers that mix cells, others with an encoding in them, and the end of the network."""
    return [row for row in rows if row.mixes or (row.encoding or 0) > ROUNDING or row is rows[-1]]


@in_style
def draw_equivariance(rows: Sequence[LayerError], title: str = "") -> Figure:
    """Each layer's own error as a bar, by cause, and as a mark what the network is off by from the image to there.

    Args:
        rows: of :func:`equivariance_by_layer`; those of :func:`decisive` are drawn.
    """
    rows = decisive(rows)
    figure = new_figure(7.2, 1.8 + 0.2 * len(rows))
    axes = figure.add_subplot()
    places = range(len(rows))
    left = [0.0] * len(rows)
    for name, (colour, hatch) in PARTS.items():
        widths = [_part(row, name) for row in rows]
        if max(widths) > ROUNDING:
            label = f"the layer alone: {name}"
            axes.barh(
                places, widths, 0.65, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label
            )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for name, style, label in (("error", "o", "from the image to here"), ("interior", "x", "the same, interior")):
        values = [nan if getattr(row, name) is None else getattr(row, name) for row in rows]
        axes.plot(values, places, style, color=INK, markersize=4, label=label)
    axes.set_yticks(places, [row.layer for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("max |f(Tx) - Tf(x)| / max |f(x)|")
    axes.set_title(title, loc="left")
    axes.grid(axis="x", alpha=0.2, color=INK)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _part(row: LayerError, name: str) -> float:
    if name == "undivided":
        return (row.own or 0) - sum(getattr(row, part) or 0 for part in ("border", "stride", "encoding"))
    return getattr(row, name) or 0
