# SPDX-License-Identifier: Apache-2.0
"""Pictures for the reports: SVG that takes the page's own text colour, so that one picture serves light and dark.

Colours are Okabe and Ito's, which people with any colour vision can tell apart; lines differ in their dashes too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol

import numpy as np

from .csv_json import write_csv
from .html import without_styles
from .names import readable, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, RED, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"
GREY = "#999999"
INK = "#0b0c0d"  # stands for the page's text colour until the picture becomes SVG
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the page's font
    "svg.hashsalt": "nearsight",  # the same picture gives the same file
    "text.parse_math": False,  # a class may be called $5_to_$10
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
}

Params = ParamSpec("Params")


def _in_style(draw: Callable[Params, Figure]) -> Callable[Params, Figure]:
    @wraps(draw)
    def styled(*args: Params.args, **kwargs: Params.kwargs) -> Figure:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


class BlockMap(Protocol):
    """What is drawn of an attention layer; :class:`nearsight.inspect.maps.AttentionMap` is one."""

    @property
    def layer(self) -> str:
        """The module's name."""
        ...

    def memory_block(self, pixel: tuple[int, int], image_index: int = 0) -> np.ndarray:
        """Weights (heads, H, W) that the query covering ``pixel`` gave to each cell."""
        ...


@_in_style
def confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """True classes down, predicted ones across; right answers blue, wrong ones orange."""
    n = len(classes)
    figure = _figure(0.7 + max(3.6, min(0.42 * n, 8.0)), max(3.6, min(0.42 * n, 8.0)))
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
        strong = "white" if true == predicted else "#111111"  # on a deep blue, on a deep orange
        colour = strong if share[true, predicted] > 0.3 else INK
        axes.text(predicted, true, str(counts[true, predicted]), ha="center", va="center", color=colour, fontsize=8)
    return figure


@_in_style
def memory_blocks(image: np.ndarray, maps: Sequence[BlockMap], pixel: tuple[int, int], index: int = 0) -> Figure:
    """An image with the query marked, and for every layer how its heads, on average, weighted the cells it looked at.

    Args:
        image: (H, W) or (H, W, 3), 0 to 1.
        maps: one per layer.
        pixel: row and column of the query.
        index: of the image in the batch that the maps were made from.
    """
    columns = 1 + len(maps)
    figure = _figure(1.45 * columns, 1.85)
    _panel(figure.add_subplot(1, columns, 1), image, pixel, "the query")
    for place, layer in enumerate(maps, start=2):
        weights = layer.memory_block(pixel, index).mean(0)
        _panel(figure.add_subplot(1, columns, place), image, pixel, layer.layer, weights)
    return figure


@_in_style
def grid(pictures: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Maps of numbers, each on a scale of its own: above zero blue, below orange.

    Args:
        pictures: rows of (H, W).
        rows, columns: what stands beside and above them.
    """
    wide, high = max(map(len, pictures)), len(pictures)
    figure = _figure(0.6 + 1.1 * wide, 0.3 + 1.1 * high)
    for row, (label, maps) in enumerate(zip(rows, pictures, strict=True)):
        for column, values in enumerate(maps):
            axes = figure.add_subplot(high, wide, row * wide + column + 1)
            axes.imshow(_signed(values), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(columns[column] if row == 0 else "", fontsize=7)
            axes.set_ylabel(label if column == 0 else "", fontsize=7)
    return figure


@_in_style
def heads(image: np.ndarray, maps: Sequence[BlockMap], pixel: tuple[int, int], index: int = 0) -> Figure:
    """What each head of each layer looked at: layers down, heads across. Arguments as in :func:`memory_blocks`."""
    blocks = [layer.memory_block(pixel, index) for layer in maps]
    columns = max(len(block) for block in blocks)
    figure = _figure(1.45 * columns, 1.5 * len(maps))
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


def to_svg(figure: Figure, alt: str) -> str:
    """An ``<svg>`` element for a page: as wide as its place, in the page's colour, with a text for those who cannot see."""
    from html import escape

    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(STYLE), without_glyph_warnings():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2).replace(INK, "currentColor")
    label = escape(readable(alt), quote=True)
    return without_styles(svg).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Matplotlib's font has not the letters of every script; an SVG takes the reader's fonts, a PNG shows boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Glyph|Matplotlib currently does not support)")
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panel(
    axes: Axes, image: np.ndarray, pixel: tuple[int, int], title: str, weights: np.ndarray | None = None
) -> None:
    height, width = image.shape[:2]
    extent = (0, width, height, 0)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    if weights is not None:
        overlay = np.empty((*weights.shape, 4))
        overlay[...] = _rgb(ORANGE)
        overlay[..., 3] = 0.9 * weights / max(weights.max(), 1e-12)
        axes.imshow(overlay, extent=extent, interpolation="nearest")
        _outline(axes, weights, (height, width))
    _mark(axes, pixel)
    axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=7)


def _mark(axes: Axes, pixel: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    row, column = pixel
    for colour, line in (("white", 3.0), (BLUE, 1.5)):  # a white seam shows the mark on any picture
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
    axes.add_patch(Rectangle(corner, *span, fill=False, edgecolor=SKY, linewidth=1.2, linestyle=(0, (3, 2))))


def _shades(share: np.ndarray) -> np.ndarray:
    """Colour says right or wrong, its strength how often; the square root lets rare mistakes be seen."""
    shades = np.empty((*share.shape, 4))
    shades[...] = _rgb(ORANGE)
    np.einsum("iic->ic", shades)[...] = _rgb(BLUE)
    shades[..., 3] = np.sqrt(share)
    return shades


def _signed(values: np.ndarray) -> np.ndarray:
    """Blue above zero, orange below, as strong as the number is large."""
    shades = np.where((values < 0)[..., None], _rgb(ORANGE), _rgb(BLUE))
    shades[..., 3] = np.abs(values) / max(np.abs(values).max(), 1e-12)
    return shades


def _rgb(colour: str) -> Any:
    from matplotlib.colors import to_rgba

    return to_rgba(colour)
