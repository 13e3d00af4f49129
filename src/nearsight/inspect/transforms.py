# SPDX-License-Identifier: Apache-2.0
"""Transformations of maps that know what they do to a map of another size.

They act on (B, C, *map) and are exact: nothing is interpolated that need not be. Shifts that are not whole cells, and
changes of scale, take the map for one period of a band-limited function on the torus, whose values between the cells the
discrete Fourier transform gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import ceil, floor, inf, prod

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError


class Transform:
    """T: a function of maps (B, C, *map) that knows what it does to an output of another size.

    Any function will do for :func:`equivariance_error`; these here need no ``out_transform``.
    """

    is_rigid = True  # neighbours stay neighbours, so that the interior of a map stays its interior
    axes: int | None = None  # of the maps that it moves; None for any

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def batched(self, x: Tensor) -> Tensor:
        """x as (B, C, *map), where it may be one (C, *map).

        Raises:
            ShapeError: the map has another number of axes than this moves.
        """
        if self.axes is not None and x.ndim == self.axes + 1:
            return x[None]
        if x.ndim < 3 or self.axes not in (None, x.ndim - 2):
            axes = (
                "of one axis or more" if self.axes is None else f"of {self.axes} {'axis' if self.axes == 1 else 'axes'}"
            )
            raise ShapeError(f"{self} moves maps {axes}, (B, C, *map) or one (C, *map); received {tuple(x.shape)}")
        return x

    def after(self, stride: Sequence[float]) -> Transform | None:
        """T on an output with one cell for every ``stride`` cells of the input; None if it has no meaning there."""
        return self

    def on_grid(self, period: Sequence[int], size: Sequence[int]) -> Transform | None:
        """The nearest such transformation that takes every ``period``-th cell of a map to another such cell."""
        return self if max(period) == 1 else None

    def keeps(self, inside: Tensor, torus: bool) -> Tensor:
        """Where a set of cells, (1, 1, *map) of bool, is found afterwards.

        ``torus`` says that cells which leave at one edge and come back at the other are still the ones they were.
        """
        return self(inside.float()) > 0.5


class Translation(Transform):
    """Shift the map on the torus by so many cells per axis: to positive rows, columns, …

    Whole cells are rolled, exactly. A shift between cells multiplies the spectrum by exp(-2 pi i f shift): exact for
    band-limited maps; of a component at the Nyquist frequency, whose phase the cells do not show, the cosine is left.

    Raises:
        OptionError: no shift, or more than three.

    Example:
        >>> Translation(1, 2)(torch.eye(4)[None, None]).argmax(-1).tolist()
        [[[1, 2, 3, 0]]]
    """

    def __init__(self, *shift: float) -> None:
        if not 1 <= len(shift) <= 3:
            raise OptionError(f"a translation needs one shift per axis of the map, 1 to 3; received {shift}")
        self.shift = tuple(float(cells) for cells in shift)
        self.axes = len(shift)

    def __call__(self, x: Tensor) -> Tensor:
        for dim, cells in zip(range(-len(self.shift), 0), self.shift, strict=True):
            x = _roll(x, cells, dim)
        return x

    def after(self, stride: Sequence[float]) -> Transform:
        return Translation(*(cells / s for cells, s in zip(self.shift, stride, strict=True)))

    def on_grid(self, period: Sequence[int], size: Sequence[int]) -> Transform | None:
        whole = [_multiple(cells, p) for cells, p in zip(self.shift, period, strict=True)]
        if any(self.shift) and all(cells % n == 0 for cells, n in zip(whole, size, strict=True)):
            return None  # once around: nothing has moved
        return self if whole == list(self.shift) else Translation(*whole)

    def keeps(self, inside: Tensor, torus: bool) -> Tensor:
        kept = torch.ones_like(inside)
        for whole in product(*({floor(cells), ceil(cells)} for cells in self.shift)):  # a cell between has two sources
            moved = inside
            for dim, cells in zip(range(-len(whole), 0), whole, strict=True):
                moved = moved.roll(cells, dim)
                if not torus:
                    n = moved.shape[dim]
                    came_around = (0, min(cells, n)) if cells > 0 else (max(n + cells, 0), min(-cells, n))
                    moved = moved.clone()
                    moved.narrow(dim, *came_around).fill_(False)
            kept = kept & moved
        return kept

    def __repr__(self) -> str:
        return f"Translation({', '.join(f'{cells:g}' for cells in self.shift)})"


class Rotation90(Transform):
    """Turn the map by 90 degrees counter-clockwise, ``turns`` times.

    Of a strided output every ``stride``-th cell is left, from the first one on; the turned grid has the same cells where
    the stride divides n - 1.
    """

    axes = 2

    def __init__(self, turns: int = 1) -> None:
        self.turns = turns

    def __call__(self, x: Tensor) -> Tensor:
        return x.rot90(self.turns, (-2, -1))

    def __repr__(self) -> str:
        return f"Rotation90({self.turns})"


class Reflection(Transform):
    """Mirror the map along an axis: -1 exchanges left and right, -2 top and bottom."""

    def __init__(self, axis: int = -1) -> None:
        if axis not in (-1, -2, -3):
            raise OptionError(f"a reflection's axis counts from the last: -1, -2 or -3; received {axis!r}")
        self.axis = axis

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(self.axis)

    def __repr__(self) -> str:
        return f"Reflection({self.axis})"


class Scaling(Transform):
    """Resample the map to ``factor`` times as many cells per axis, rounded; the first cell stays where it is.

    By the Fourier transform, on the torus: enlarging is exact for band-limited maps and can be undone, reducing drops the
    frequencies that the smaller map cannot hold.

    Raises:
        OptionError: a factor that is not positive.

    Example:
        >>> x = torch.randn(1, 1, 6, 9)
        >>> torch.allclose(Scaling(1 / 3)(Scaling(3)(x)), x, atol=1e-5)
        True
    """

    is_rigid = False

    def __init__(self, factor: float) -> None:
        if not 0 < factor < inf:
            raise OptionError(f"the factor of a scaling must be positive; received {factor!r}")
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        for dim in range(2, x.ndim):
            x = _resample(x, max(1, round(x.shape[dim] * self.factor)), dim)
        return x

    def __repr__(self) -> str:
        return f"Scaling({self.factor:g})"


class Permutation(Transform):
    """Shuffle the cells of the map, all channels and images alike. Global attention without position does not notice.

    It has a meaning only on outputs of the input's own size.
    """

    is_rigid = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, x: Tensor) -> Tensor:
        order = torch.randperm(prod(x.shape[2:]), generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return x.flatten(2)[..., order.to(x.device)].view(x.shape)

    def after(self, stride: Sequence[float]) -> Transform | None:
        return self if all(s == 1 for s in stride) else None

    def __repr__(self) -> str:
        return f"Permutation({self.seed})"


def _roll(x: Tensor, cells: float, dim: int) -> Tensor:
    if cells.is_integer():
        return x.roll(int(cells), dim)
    n, wide = x.shape[dim], torch.promote_types(x.dtype, torch.float32)
    turn = torch.exp(-2j * torch.pi * cells * torch.fft.rfftfreq(n, dtype=wide, device=x.device))
    spectrum = torch.fft.rfft(x.to(wide), dim=dim).movedim(dim, -1) * turn
    return torch.fft.irfft(spectrum, n).movedim(-1, dim).to(x.dtype)


def _resample(x: Tensor, cells: int, dim: int) -> Tensor:
    n, wide = x.shape[dim], torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft(x.to(wide), dim=dim).movedim(dim, -1)[..., : cells // 2 + 1].clone()
    least = min(n, cells)
    if n != cells and least % 2 == 0:  # the Nyquist frequency of the coarser grid is two frequencies on the finer one
        spectrum[..., least // 2] *= 0.5 if cells > n else 2
    return (torch.fft.irfft(spectrum, cells) * (cells / n)).movedim(-1, dim).to(x.dtype)


def _multiple(cells: float, period: int) -> float:
    """The multiple of ``period`` nearest to a shift, but not zero unless the shift is."""
    if cells == 0:
        return 0.0
    times = max(1, round(abs(cells) / period))
    return float(times * period) if cells > 0 else float(-times * period)
