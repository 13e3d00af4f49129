# SPDX-License-Identifier: Apache-2.0
"""Which axes of a tensor are those of the image, and how many of its cells lie between two of theirs.

What a map's size says of its stride is a guess: without padding, or where sizes are odd, it is the wrong one. So axes are
followed through every function that a network calls, and a stride is the product of those on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..layers import AttentionLayer, AttentionStem2d
from ..private import tree_leaves


class Part(NamedTuple):
    """A factor of a tensor's axis: of tokens there is one for the rows, and one for the columns."""

    size: int
    axis: int | None = None  # of the image; None for what is none, or is not known
    stride: Fraction = Fraction(1)  # cells of the image for each of these


Axes = tuple[tuple[Part, ...], ...]  # one tuple of parts per axis of a tensor


class Grid(NamedTuple):
    """Where the cells of a map lie in the image."""

    dims: tuple[int, ...]  # of the tensor, for each axis of the image
    strides: tuple[float, ...]


class Following(TorchFunctionMode):
    """Follows the axes of an image, (B, C, *map), through all that is called within.

    Args:
        image: the network's input.
        model: its attention layers say their stride themselves.

    Example:
        >>> x = torch.randn(1, 3, 29, 29)
        >>> with Following(x) as follow:
        ...     y = nn.functional.max_pool2d(x, 3, 2)
        >>> follow.grid(y).strides
        (2.0, 2.0)
    """

    def __init__(self, image: Tensor, model: Any = None) -> None:
        super().__init__()
        self.rank = image.ndim - 2
        self.known = WeakTensorKeyDictionary()
        self.known[image] = tuple((Part(n, axis - 2 if axis > 1 else None),) for axis, n in enumerate(image.shape))
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self.layers = [module for module in modules if isinstance(module, AttentionLayer)]

    def __enter__(self):
        self.handles = [layer.register_forward_hook(self._after_layer, with_kwargs=True) for layer in self.layers]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        sources = [self.known[one] for one in tensors if one in self.known]  # before: some functions write in place
        out = func(*args, **kwargs)
        if sources:
            rule = RULES.get(getattr(func, "__name__", ""), _alike)
            for one in tree_leaves(out):
                if isinstance(one, Tensor) and one.ndim:
                    self.known[one] = _checked(rule(sources, one, args, kwargs), one)
        return out

    def grid(self, x: Any) -> Grid | None:
        """Where a tensor has the axes of the image, and their strides; None if that is not known of all of them."""
        if not isinstance(x, Tensor) or x not in self.known:
            return None
        found = {}
        for dim, parts in enumerate(self.known[x]):
            if len(parts) == 1 and parts[0].axis is not None:
                found[parts[0].axis] = (dim, float(parts[0].stride))
        if sorted(found) != list(range(self.rank)):
            return None
        dims, strides = zip(*(found[axis] for axis in range(self.rank)), strict=True)
        return Grid(dims, strides)

    def _after_layer(self, layer: Any, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        """An attention layer moves its cells apart by the stride of its window, however it is computed."""
        x = args[0] if args else kwargs.get("x")
        if not isinstance(x, Tensor) or x not in self.known or not isinstance(y, Tensor) or y.ndim != x.ndim:
            return
        first = x.ndim - layer.rank - bool(getattr(layer, "channels_last", False))
        strides = stride_of(layer, x.shape[first : first + layer.rank])
        self.known[y] = _strided(self.known[x], y, first, strides)


def stride_of(layer: AttentionLayer, size: Sequence[int]) -> tuple[int, ...]:
    """Cells of an attention layer's input for one of its output, per axis."""
    if isinstance(layer, AttentionStem2d):  # which pools over its blocks
        return (layer.kernel_size,) * layer.rank
    return tuple(axis.stride for axis in layer.window_on(size).axes(layer.rank))


# ---------------------------------------------------------------------------------------------------------- functions

Rule = Callable[[list[Axes], Tensor, tuple, dict[str, Any]], Axes]


def _alike(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
    """What is not known to do more: an axis goes on where its size does, unless inputs say different things of it."""
    return tuple(_joined(sources, y, dim) for dim in range(-y.ndim, 0))


def _joined(sources: list[Axes], y: Tensor, dim: int) -> tuple[Part, ...]:
    n = y.shape[dim]
    given = {axes[dim] for axes in sources if len(axes) >= -dim}
    if n == 1:  # a mean, or a maximum: one cell as large as the map
        given = {_whole(parts) for parts in given}
    said = {parts for parts in given if _size(parts) == n and any(part.axis is not None for part in parts)}
    return said.pop() if len(said) == 1 else (Part(n),)


def _whole(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return (Part(1, parts[0].axis, parts[0].stride * parts[0].size),) if len(parts) == 1 else parts


def _strided(axes: Axes, y: Tensor, first: int, strides: Sequence[Any]) -> Axes:
    """The last axes, from ``first`` on, with their cells so much further apart."""
    steps = dict(enumerate(strides, start=first))
    return tuple(
        (Part(n, parts[0].axis, parts[0].stride * Fraction(steps.get(dim, 1))),) if len(parts) == 1 else (Part(n),)
        for dim, (n, parts) in enumerate(zip(y.shape, axes, strict=True))
    )


def _by(stride: Callable[[tuple, dict[str, Any], int], Any]) -> Rule:
    """A rule for what strides over the last axes, as many as ``stride`` says."""

    def rule(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
        x = args[0] if args else kwargs["input"]
        steps = stride(args, kwargs, x.ndim)
        return _strided(sources[0], y, y.ndim - len(steps), steps)

    return rule


def _convolution(rank: int, transposed: bool = False) -> Rule:
    def stride(args, kwargs, ndim):
        steps = _per_axis(_argument(args, kwargs, 3, "stride", 1), rank)
        return [Fraction(1, step) if transposed else step for step in steps]

    return _by(stride)


def _pool(rank: int, kernel: int = 1) -> Rule:
    def stride(args, kwargs, ndim):
        given = _argument(args, kwargs, kernel + 1, "stride", None)
        sides = _argument(args, kwargs, kernel, "kernel_size", 1)
        return _per_axis(sides if given is None or (not isinstance(given, int) and not len(given)) else given, rank)

    return _by(stride)


def _adaptive(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
    """Cells of one size where the new map divides the old one; else they are of several."""
    pairs = zip(sources[0], y.shape, strict=True)
    return tuple(
        parts
        if _size(parts) == n
        else (Part(n, parts[0].axis, parts[0].stride * (parts[0].size // n)),)
        if len(parts) == 1 and _size(parts) % n == 0
        else (Part(n),)
        for parts, n in pairs
    )


def _resampled(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
    """Interpolation: cells are so far apart as the factor says, or else the sizes; with ``align_corners`` the middles do."""
    corners = bool(_argument(args, kwargs, 4, "align_corners", False))
    factor = None if kwargs.get("recompute_scale_factor") else _argument(args, kwargs, 2, "scale_factor", None)
    factors = None if factor is None else _per_axis(factor, y.ndim - 2)
    axes = list(sources[0][:2])
    for axis, (parts, n) in enumerate(zip(sources[0][2:], y.shape[2:], strict=True)):
        if len(parts) != 1:
            return _unknown(y)
        if corners:
            step = Fraction(max(parts[0].size - 1, 1), max(n - 1, 1))
        else:
            step = (
                Fraction(parts[0].size, n) if factors is None else 1 / Fraction(factors[axis]).limit_denominator(1000)
            )
        axes.append((Part(n, parts[0].axis, parts[0].stride * step),))
    return tuple(axes)


def _shuffled(up: bool) -> Rule:
    def stride(args, kwargs, ndim):
        factor = args[1] if len(args) > 1 else kwargs["upscale_factor" if up else "downscale_factor"]
        return [Fraction(1, factor) if up else factor] * 2

    return _by(stride)


def _resized(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
    """Cells are added or cut off: those that are there stay as far apart."""
    return _strided(sources[0], y, y.ndim, [])


def _indexed(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
    given = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(one is None or one is Ellipsis or isinstance(one, (int, slice)) for one in given):
        return _unknown(y)
    taken = sum(one is not None and one is not Ellipsis for one in given)
    rest = [slice(None)] * (len(sources[0]) - taken)
    if Ellipsis in given:
        place = given.index(Ellipsis)
        given = (*given[:place], *rest, *given[place + 1 :])
    else:
        given = (*given, *rest)
    axes, old = [], iter(sources[0])
    for one in given:
        if one is None:
            axes.append((Part(1),))
            continue
        parts = next(old)
        if isinstance(one, slice):
            axes.append(parts if one == slice(None) else _sliced(parts, one.step or 1))
    sizes = zip(axes, y.shape, strict=True)
    return tuple((parts[0]._replace(size=n),) if len(parts) == 1 else parts for parts, n in sizes)


def _sliced(parts: tuple[Part, ...], step: int) -> tuple[Part, ...]:
    if len(parts) != 1:
        return (Part(0),)
    return (parts[0]._replace(stride=parts[0].stride * step),)


def _permuted(order: Callable[..., Tensor]) -> Rule:
    """Ask PyTorch itself where axes go, by a tensor whose sizes are their numbers."""

    def rule(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
        numbers = torch.empty(*range(1, len(sources[0]) + 1), device="meta")
        moved = order(numbers, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})
        return tuple(sources[0][n - 1] for n in moved.shape)

    return rule


def _regrouped(sources: list[Axes], y: Tensor, args: tuple, kwargs: dict[str, Any]) -> Axes:
    """A view of other sizes: parts go where they fit as a whole, as rows and columns into tokens and back."""
    parts: Iterator[Part] = iter([part for axis in sources[0] for part in axis if part.size != 1])
    axes: list[tuple[Part, ...]] = []
    for n in y.shape:
        group: list[Part] = []
        while prod(part.size for part in group) < n and (part := next(parts, None)) is not None:
            group.append(part)
        if prod(part.size for part in group) != n:
            return _unknown(y) if not axes else (*axes, *((Part(size),) for size in y.shape[len(axes) :]))
        axes.append(tuple(group) or (Part(1),))
    return tuple(axes)


def _unknown(y: Tensor) -> Axes:
    return tuple((Part(n),) for n in y.shape)


def _checked(axes: Axes, y: Tensor) -> Axes:
    """What does not fit is not known."""
    fits = len(axes) == y.ndim and all(_size(parts) == n for parts, n in zip(axes, y.shape, strict=True))
    return axes if fits else _unknown(y)


def _size(parts: tuple[Part, ...]) -> int:
    return prod(part.size for part in parts)


def _argument(args: tuple, kwargs: dict[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _per_axis(value: Any, rank: int) -> list[Any]:
    values = [value] if isinstance(value, (int, float)) else list(value)
    return values * rank if len(values) == 1 else values


RULES: dict[str, Rule] = {
    **{f"conv{rank}d": _convolution(rank) for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _convolution(rank, transposed=True) for rank in (1, 2, 3)},
    **{f"{kind}_pool{rank}d": _pool(rank) for kind in ("max", "avg") for rank in (1, 2, 3)},
    **{f"max_pool{rank}d_with_indices": _pool(rank) for rank in (1, 2, 3)},
    **{f"lp_pool{rank}d": _pool(rank, kernel=2) for rank in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{rank}d": _adaptive for kind in ("max", "avg") for rank in (1, 2, 3)},
    **{f"adaptive_max_pool{rank}d_with_indices": _adaptive for rank in (1, 2, 3)},
    **dict.fromkeys(("interpolate", "upsample", "upsample_nearest", "upsample_bilinear"), _resampled),
    **dict.fromkeys(("pad", "constant_pad_nd", "narrow"), _resized),
    "pixel_shuffle": _shuffled(up=True),
    "pixel_unshuffle": _shuffled(up=False),
    "__getitem__": _indexed,
    **{
        name: _permuted(getattr(Tensor, name))
        for name in ("permute", "transpose", "movedim", "swapaxes", "swapdims", "t")
    },
    "moveaxis": _permuted(Tensor.movedim),
    **dict.fromkeys(
        ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as"), _regrouped
    ),
}
