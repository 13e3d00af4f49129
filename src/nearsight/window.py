# SPDX-License-Identifier: Apache-2.0
"""The memory block: which cells of the input a query may see.

Integers only. The arithmetic of :class:`Axis` is written with operators alone, so that plain ints, the symbolic ints of
``torch.compile`` and integer tensors all go through the same lines: there is one geometry, and every backend uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .errors import DtypeError, OptionError, ShapeError
from .private import unwatched

BORDERS = ("mask", "zeros", "shift", "wrap")
MAX_RANK = 3

T = TypeVar("T")


def plain(value: T) -> T:
    """NumPy's numbers and arrays as Python's numbers and lists, also within tuples and lists; all else as it is.

    NumPy's behave like Python's in most places and not in all: schemas of operators, files and ``repr`` tell them apart.

    Example:
        >>> import numpy as np
        >>> plain((np.int64(3), 4)), plain(np.array([3, 5])), plain("mask")
        ((3, 4), [3, 5], 'mask')
    """
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()  # pyright: ignore[reportReturnType]
    return type(value)(map(plain, value)) if type(value) in (tuple, list) else value  # pyright: ignore


def larger(a: Any, b: Any) -> Any:
    """The maximum, for ints, symbolic ints and integer tensors alike."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else (a + b + abs(a - b)) // 2


def smaller(a: Any, b: Any) -> Any:
    """The minimum, for ints, symbolic ints and integer tensors alike."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else (a + b - abs(a - b)) // 2


@dataclass(frozen=True)
class Axis:
    """A window along one axis: the formulas of the module's geometry.

    A query at cell ``c = p * stride`` lies on the dilation phase ``c % dilation``, the grid of every ``dilation``-th cell.
    The *steps* of that grid are counted from its first cell: step ``t`` of phase ``f`` is the cell ``f + t * dilation``. The
    query sees ``kernel_size`` consecutive steps, from :meth:`first_step` on: those around its :meth:`leader`.
    """

    kernel_size: int
    stride: int = 1
    dilation: int = 1
    border: str = "mask"
    causal: bool = False
    shared_by: int = 1

    @property
    def left(self) -> int:
        """How many steps before the leader the window begins; an even window has one more to the left."""
        return self.kernel_size - 1 if self.causal else self.kernel_size // 2

    @property
    def masks(self) -> bool:
        """Whether what lies outside the map takes no part."""
        return self.border in ("mask", "shift")

    @property
    def by_offset(self) -> bool:
        """Whether a place of the window lies at another offset for another query, so that tables go by offsets."""
        return self.border == "shift" or self.shared_by > 1

    @property
    def table_size(self) -> int:
        """Entries of a position table: one per offset that can occur."""
        return 2 * self.kernel_size - 1 if self.by_offset else self.kernel_size

    @property
    def zero(self) -> int:
        """The entry of a position table for the query's own cell."""
        return self.kernel_size - 1 if self.by_offset else self.left

    @property
    def offsets(self) -> range:
        """Key cell minus query cell, for every entry of a position table."""
        return range(-self.zero * self.dilation, (self.table_size - self.zero) * self.dilation, self.dilation)

    def output_size(self, cells: Any) -> Any:
        return (cells + self.stride - 1) // self.stride

    def steps(self, phase: Any, cells: Any) -> Any:
        """How many cells lie on a dilation phase."""
        return (cells - phase + self.dilation - 1) // self.dilation

    def leader(self, query_step: Any, steps: Any) -> Any:
        """The step that the window of a query is laid around: its own, or the middle one of the ``shared_by`` that share it.

        On a causal axis it is the last of them that there is.
        """
        if self.shared_by == 1:
            return query_step
        first = query_step // self.shared_by * self.shared_by
        if self.causal:
            return smaller(first + self.shared_by - 1, steps - 1)
        return first + self.shared_by // 2

    def first_step(self, query_step: Any, steps: Any) -> Any:
        """Where the window of a query begins on its phase of ``steps`` cells; below zero if it hangs over the edge."""
        first = self.leader(query_step, steps) - self.left
        if self.border == "shift" and not self.causal:
            return larger(smaller(first, steps - self.kernel_size), 0 * first)
        return first

    def may_see(self, step: Any, query_step: Any) -> Any:
        """Whether a step of the window may take part: on a causal axis none behind the query does, whatever the border."""
        return step <= query_step if self.causal else True

    def entry(self, step: Any, query_step: Any, first_step: Any) -> Any:
        """The index into a position table for the cell at ``step``."""
        if self.by_offset:
            return step - query_step + self.kernel_size - 1
        return step - first_step

    def covers(self, cells: int) -> bool:
        """Whether every query takes every cell into account exactly once and nothing else votes."""
        if not self.masks or self.causal or not (self.dilation == 1 or cells <= 1):
            return False
        return self.first_step(0, cells) + self.kernel_size >= cells and self.first_step(cells - 1, cells) <= 0

    def neighbours(self, cells: int, queries: Tensor | None = None) -> Tensor:
        """The ``(cell, entry)`` of each of the ``kernel_size`` places of every query, (queries, kernel_size, 2).

        ``cell`` is -1 where the place lies outside and takes no part, -2 where it lies outside and votes as a zero.
        ``queries`` are the indices of those that are asked for, on the device where the answer is wanted; None is all.
        """
        if queries is None:
            queries = torch.arange(self.output_size(cells), device="cpu")
        query = queries[:, None] * self.stride
        step, phase = query // self.dilation, query % self.dilation
        steps = self.steps(phase, cells)
        first = self.first_step(step, steps)
        place = first + torch.arange(self.kernel_size, device=queries.device)
        # An entry past the table's end can only belong to a place that takes no part.
        entry = self.entry(place, step, first).clamp(0, self.table_size - 1)
        cell = phase + place * self.dilation
        if self.border == "wrap":
            cell = cell % cells
        else:
            cell = torch.where((place >= 0) & (place < steps), cell, -2 if self.border == "zeros" else -1)
        if self.causal:
            cell = torch.where(self.may_see(place, step), cell, -1)
        return torch.stack((cell, entry), -1)


PER_AXIS = tuple(field.name for field in fields(Axis))  # a constant, which torch.compile can follow


@dataclass(frozen=True)
class Window:
    """The memory block: the cells of the input that a query may see.

    Along an axis of n cells with kernel k, dilation d and stride s, query p sits at cell c = p*s and sees the cells at the
    offsets ``o_j = (j - k//2) * d``, ``j = 0 .. k-1``; an even k reaches one further to the left. With ``causal`` the block
    ends at the query: ``o_j = (j - (k-1)) * d``.

    With ``shared_by=g`` the queries of g neighbouring cells share one window. Where a query's cell is step ``t`` of its
    dilation phase, the window is that of the step ``t // g * g + g // 2``, the middle one of its group; on a causal axis
    that of the group's last, of which a query sees what is not behind it. So g = 1 slides (SASA, NAT); k = block + 2 halo
    with g = block is HaloNet's (Vaswani et al. 2021, arXiv:2103.12731), g = k Swin's blocks (Liu et al. 2021,
    arXiv:2103.14030), and ``border="shift"`` with g is NATTEN's ``stride`` (its version 0.20).

    Args:
        kernel_size: cells per axis; may be larger than the map.
        stride: the output keeps every ``stride``-th query, as in ``nn.Conv2d``.
        dilation: distance in cells between neighbouring cells of the block.
        border: what happens where the block hangs over the edge.
            ``"mask"``: cells outside take no part in the softmax.
            ``"zeros"``: they take part with a zero key and a zero value, position terms included; this is what
            ``F.unfold`` with zero padding does.
            ``"shift"``: the block slides inwards so that every query sees exactly k cells per axis (NATTEN's rule), or all
            of them on a smaller map.
            ``"wrap"``: indices modulo n, a torus.
            One rule per axis, as ``("mask", "wrap")``, makes panoramas and globes.
        causal: hide what lies behind the query, for all axes or one value per axis. With ``"shift"`` a causal axis is not
            slid but masked.
        shared_by: how many neighbouring cells' queries share a window; at most ``kernel_size``.

    Every value is one for all axes or a tuple with one per axis.

    Raises:
        OptionError: a size below 1, an unknown border, a window shared by more cells than it holds.
        ShapeError: tuples of different lengths, or more than three axes.

    Example:
        >>> Window(7, stride=2).output_size((56, 29))
        (28, 15)
        >>> Window(14, shared_by=8).offsets(2) == Window(14, border="shift").offsets(2)  # HaloNet: blocks of 8, halos of 3
        True
    """

    kernel_size: int | tuple[int, ...]
    _: KW_ONLY
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    border: str | tuple[str, ...] = "mask"
    causal: bool | tuple[bool, ...] = False
    shared_by: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation", "shared_by"):
            object.__setattr__(self, name, _positive_ints(name, getattr(self, name)))
        object.__setattr__(self, "causal", _bools(self.causal))
        object.__setattr__(self, "border", _borders(self.border))
        if any(axis.shared_by > axis.kernel_size for axis in self.axes(self.rank or 1)):
            raise OptionError(
                "shared_by must be at most kernel_size, or some cells would be seen by none; "
                f"received shared_by={self.shared_by}, kernel_size={self.kernel_size}"
            )

    @classmethod
    def everywhere(cls, in_size: Sequence[int]) -> Window:
        """The block as large as the image, from every query: global attention, with tables of ``2n-1`` entries."""
        kernel_size = tuple(larger(2 * cells - 1, 1) for cells in in_size)
        with unwatched():
            return cls(kernel_size)

    @property
    def rank(self) -> int | None:
        """The number of axes, or None while every value is one for all of them."""
        values = {name: getattr(self, name) for name in PER_AXIS}
        ranks = {name: len(value) for name, value in values.items() if isinstance(value, tuple)}
        if len(set(ranks.values())) > 1:
            raise ShapeError(f"a window needs one value for all axes or the same number of them; received {ranks}")
        rank = next(iter(ranks.values()), None)
        if rank is not None and not 1 <= rank <= MAX_RANK:
            raise ShapeError(f"a window has 1 to {MAX_RANK} axes; received {rank}")
        return rank

    def axes(self, rank: int) -> tuple[Axis, ...]:
        """The window along each of ``rank`` axes.

        Raises:
            ShapeError: the window was made for another number of axes.
        """
        if self.rank not in (None, rank):
            raise ShapeError(f"{self} has {self.rank} axes but the map has {rank}: give one value per axis of the map")
        columns = [getattr(self, name) for name in PER_AXIS]
        spread = [value if isinstance(value, tuple) else (value,) * rank for value in columns]
        return tuple(Axis(*values) for values in zip(*spread, strict=True))

    def output_size(self, in_size: Sequence[int]) -> tuple[int, ...]:
        """Queries per axis on a map of ``in_size`` cells: ``ceil(n / stride)``."""
        return tuple(axis.output_size(n) for axis, n in zip(self.axes(len(in_size)), in_size, strict=True))

    def table_size(self, rank: int) -> tuple[int, ...]:
        """Entries of a position table per axis: k, or 2k-1 where the block shifts or is shared."""
        return tuple(axis.table_size for axis in self.axes(rank))

    def offsets(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Per axis, the distance in cells from query to key for every entry of a position table."""
        return tuple(tuple(axis.offsets) for axis in self.axes(rank))

    def covers(self, in_size: Sequence[int]) -> bool:
        """Whether every query sees the whole map, each cell once: local attention is then global attention."""
        return all(axis.covers(n) for axis, n in zip(self.axes(len(in_size)), in_size, strict=True))


def _positive_ints(name: str, value: Any) -> int | tuple[int, ...]:
    value = plain(value)
    values = value if isinstance(value, (tuple, list)) else (value,)
    for one in values:
        if isinstance(one, (bool, float, str)) or not hasattr(one, "__index__"):
            raise DtypeError(f"{name} must be an int or one int per axis; received {value!r}")
        if one < 1:
            raise OptionError(f"{name} must be at least 1; received {value!r}")
    return tuple(values) if isinstance(value, (tuple, list)) else value


def _bools(value: Any) -> bool | tuple[bool, ...]:
    value = plain(value)
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(one, bool) for one in values):
        raise DtypeError(f"causal must be a bool or one bool per axis; received {value!r}")
    return tuple(values) if isinstance(value, (tuple, list)) else value


def _borders(value: Any) -> str | tuple[str, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for one in values:
        if not isinstance(one, str) or one not in BORDERS:
            raise OptionError(
                f"border must be one of {', '.join(BORDERS)}, for all axes or one per axis; received {value!r}"
            )
    return values if isinstance(value, (tuple, list)) else value
