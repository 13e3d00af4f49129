# SPDX-License-Identifier: Apache-2.0
"""Pictures made of cells: what was confused with what, memory blocks on a picture, maps of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .csv_json import write_csv
from .names import short
from .palette import BLOCK, BLUE, FULL, NEGATIVE, ORANGE, POSITIVE, QUERY, WEIGHT
from .style import INK, ON_BLUE, ON_ORANGE, in_style, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IN_A_ROW = 8  # pictures


class BlockMap(Protocol):
    """What is drawn of an attention layer; :class:`nearsight.inspect.maps.AttentionMap` is one."""

    @property
    def layer(self) -> str:
        """The module's name."""
        ...

    def memory_block(self, pixel: tuple[int, int], image_index: int = 0) -> np.ndarray:
        """Weights (heads, H, W) that the query covering ``pixel`` gave to each cell."""
        ...


@in_style
def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """True classes down, predicted ones across; right answers blue, wrong ones orange."""
    n = len(classes)
    figure = new_figure(0.7 + max(3.6, min(0.42 * n, 8.0)), max(3.6, min(0.42 * n, 8.0)))
    axes = figure.add_subplot()
    share = counts / counts.sum(1, keepdims=True).clip(1)
    axes.imshow(_shades(share), interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true class")
    axes.spines[:].set_visible(False)
    if n > 20:  # names and numbers would be too small to read
        return figure
    names = [short(name) for name in classes]
    axes.set_xticks(range(n), names, rotation=0 if max(map(len, names)) < 3 else 60)
    axes.set_yticks(range(n), names)
    axes.tick_params(length=0)
    for true, predicted in np.argwhere(counts):
        strong = ON_BLUE if true == predicted else ON_ORANGE
        colour = strong if share[true, predicted] > 0.3 else INK
        axes.text(predicted, true, str(counts[true, predicted]), ha="center", va="center", color=colour, fontsize=8)
    return figure


@in_style
def memory_blocks(image: np.ndarray, maps: Sequence[BlockMap], pixel: tuple[int, int], index: int = 0) -> Figure:
    """An image with the query marked, and for every layer how its heads, on average, weighted the cells it looked at.

    Args:
        image: (H, W) or (H, W, 3), 0 to 1.
        maps: one per layer.
        pixel: row and column of the query.
        index: of the image in the batch that the maps were made from.
    """
    columns = min(1 + len(maps), IN_A_ROW)
    rows = -(-(1 + len(maps)) // columns)
    figure = new_figure(1.45 * columns, 1.85 * rows)
    _panel(figure.add_subplot(rows, columns, 1), image, pixel, "the query")
    for place, layer in enumerate(maps, start=2):
        weights = layer.memory_block(pixel, index).mean(0)
        _panel(figure.add_subplot(rows, columns, place), image, pixel, layer.layer, weights)
    return figure


@in_style
def grid(pictures: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Maps of numbers, each on a scale of its own: above zero blue, below orange.

    Args:
        pictures: rows of (H, W).
        rows, columns: what stands beside and above them.
    """
    wide, high = max(map(len, pictures)), len(pictures)
    figure = new_figure(0.6 + 1.1 * wide, 0.3 + 1.1 * high)
    for row, (label, maps) in enumerate(zip(rows, pictures, strict=True)):
        for column, values in enumerate(maps):
            axes = figure.add_subplot(high, wide, row * wide + column + 1)
            axes.imshow(_signed(values), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(columns[column] if row == 0 else "", fontsize=7)
            axes.set_ylabel(label if column == 0 else "", fontsize=7)
    return figure


@in_style
def heads(image: np.ndarray, maps: Sequence[BlockMap], pixel: tuple[int, int], index: int = 0) -> Figure:
    """What each head of each layer looked at: layers down, heads across. Arguments as in :func:`memory_blocks`."""
    blocks = [layer.memory_block(pixel, index) for layer in maps]
    columns = max(len(block) for block in blocks)
    figure = new_figure(1.45 * columns, 1.5 * len(maps))
    for row, (layer, block) in enumerate(zip(maps, blocks, strict=True)):
        for head, weights in enumerate(block):
            axes = figure.add_subplot(len(maps), columns, row * columns + head + 1)
            _panel(axes, image, pixel, f"head {head + 1}" if row == 0 else "", weights)
            if head == 0:
                axes.set_ylabel(layer.layer, fontsize=7)
    return figure


def blocks_to_csv(maps: Sequence[BlockMap], pixel: tuple[int, int], index: int = 0) -> str:
    """The weights that :func:`memory_blocks` and :func:`heads` draw, above zero; rows and columns of the map, from 0."""
    lines = []
    for layer in maps:
        block = layer.memory_block(pixel, index)
        lines += [
            (layer.layer, head + 1, row, column, block[head, row, column]) for head, row, column in np.argwhere(block)
        ]
    return write_csv(("layer", "head", "row", "column", "weight"), lines)


def _panel(
    axes: Axes, image: np.ndarray, pixel: tuple[int, int], title: str, weights: np.ndarray | None = None
) -> None:
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    if weights is not None:
        overlay = np.empty((*weights.shape, 4))
        overlay[...] = _rgb(WEIGHT)
        overlay[..., 3] = 0.9 * weights / full_colour(weights)
        axes.imshow(overlay, extent=extent, interpolation="nearest")
        _outline(axes, weights, (height, width))
    _mark(axes, pixel)
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=7)


def full_colour(weights: np.ndarray) -> float:
    """The weight that has its full colour: the largest, and no less than ``FULL`` times that of cells alike."""
    return max(float(weights.max()), FULL / max(np.count_nonzero(weights), 1), 1e-12)


def _mark(axes: Axes, pixel: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    row, column = pixel
    for colour, line in (("white", 3.0), (QUERY, 1.5)):  # a white seam shows the mark on any picture
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=line))


def _outline(axes: Axes, weights: np.ndarray, size: tuple[int, int]) -> None:
    """The memory block's own frame: the smallest rectangle around the cells that have any weight."""
    from matplotlib.patches import Rectangle

    rows, columns = np.nonzero(weights)
    if not len(rows):
        return
    cell = (size[0] / weights.shape[0], size[1] / weights.shape[1])
    corner = (columns.min() * cell[1], rows.min() * cell[0])
    span = ((np.ptp(columns) + 1) * cell[1], (np.ptp(rows) + 1) * cell[0])
    axes.add_patch(Rectangle(corner, *span, fill=False, edgecolor=BLOCK, linewidth=1.2, linestyle=(0, (3, 2))))


def _shades(share: np.ndarray) -> np.ndarray:
    """Colour says right or wrong, its strength how often; the square root lets rare mistakes be seen."""
    shades = np.empty((*share.shape, 4))
    shades[...] = _rgb(ORANGE)
    np.einsum("iic->ic", shades)[...] = _rgb(BLUE)
    shades[..., 3] = np.sqrt(share)
    return shades


def _signed(values: np.ndarray) -> np.ndarray:
    """Blue above zero, orange below, as strong as the number is large."""
    shades = np.where((values < 0)[..., None], _rgb(NEGATIVE), _rgb(POSITIVE))
    shades[..., 3] = np.abs(values) / max(np.abs(values).max(), 1e-12)
    return shades


def _rgb(colour: str) -> Any:
    from matplotlib.colors import to_rgba

    return to_rgba(colour)
