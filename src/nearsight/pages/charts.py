# SPDX-License-Identifier: Apache-2.0
"""Charts whose numbers can be had as well: what is drawn and what stands in the CSV come from one object.

Series differ in colour (six of Okabe and Ito's, which people with any colour vision can tell apart on light and on dark),
in marker and in dashes, so that no chart needs its colours to be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import to_path, write_bytes, write_text
from .brief import Brief
from .csv_json import write_csv
from .style import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, in_style, new_figure, to_png, to_svg_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, PINK, RED, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # seven to six colours, so that no pair comes twice within 42 series
DASHES = ("-", "--", "-.", ":")
BAND = 0.18  # opacity of a band
PANEL_SIZE = (3.6, 2.7)


@dataclass(frozen=True, repr=False)
class Series(Brief):
    """Points of one contender.

    Args:
        label: its name in the legend.
        x, y: as many as there are points.
        sd: standard deviation of every y: a band along a line, a bar at a single point; None for none.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    sd: Sequence[float] | None = None


@dataclass(frozen=True, repr=False)
class Chart(Brief):
    """Panels side by side, with one name for each axis.

    Args:
        x, y: what the axes show, with its unit.
        panels: title -> the series in it, "" for a panel that its y names well enough. A series of one point is drawn as
            a marker, a longer one as a line.
    """

    x: str
    y: str
    panels: Mapping[str, Sequence[Series]]

    def to_csv(self) -> str:
        """Every point that is drawn: panel, series, x, y and the standard deviation of y, which may be empty."""
        return write_csv(["panel", "series", self.x, self.y, "standard deviation"], self._points())

    def _points(self) -> Iterator[list[Any]]:
        for title, series in self.panels.items():
            for one in series:
                spread = [""] * len(one.x) if one.sd is None else one.sd
                yield from ([title, one.label, *point] for point in zip(one.x, one.y, spread, strict=True))


def charts_to_csv(charts: Sequence[Chart]) -> str:
    """The points of several charts over one x, in one table whose first column says what y is."""
    points = ([chart.y, *point] for chart in charts for point in chart._points())
    return write_csv(["y is", "panel", "series", charts[0].x, "y", "standard deviation"], points)


@in_style
def draw_charts(charts: Sequence[Chart], columns: int = 3, legend_below: bool = False) -> Figure:
    """All panels of one or more charts, ``columns`` to a row, each with its legend.

    Args:
        legend_below: put each panel's legend under it: many names would hide what is drawn.

    Example:
        >>> chart = Chart("epoch", "loss", {"": [Series("training", [1, 2, 3], [2.0, 1.0, 0.5])]})
        >>> figure = draw_charts([chart])
        >>> chart.to_csv().splitlines()[1]
        ',training,1,2.0,'
    """
    panels = [(chart, title, series) for chart in charts for title, series in chart.panels.items()]
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    lines = max(len(series) for _, _, series in panels) if legend_below else 0
    figure = new_figure(PANEL_SIZE[0] * columns, (PANEL_SIZE[1] + 0.18 * lines) * rows)
    for place, (chart, title, series) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for number, one in enumerate(series):
            _draw_series(axes, one, number)
        _dress(axes, chart, title)
        if legend_below:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.22), borderaxespad=0, fontsize=8)
        else:
            axes.legend()
    return figure


def write_plot(
    path: str | PathLike[str], figure: Figure, numbers: str, formats: Sequence[str] = ("svg", "png")
) -> None:
    """A picture in every format, and beside it the numbers that it shows: ``path`` with .csv, .svg, .png."""
    path = to_path(path)
    write_text(path.with_name(f"{path.name}.csv"), numbers)
    for name, draw in (("svg", to_svg_file), ("png", to_png)):
        if name in formats:
            write_bytes(path.with_name(f"{path.name}.{name}"), draw(figure))


def _draw_series(axes: Axes, series: Series, number: int) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    dashes = DASHES[number % len(DASHES)]
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    sd = None if series.sd is None else np.asarray(series.sd, float)
    if len(x) == 1:
        axes.errorbar(x, y, sd, fmt=marker, color=colour, label=series.label, capsize=3, markersize=6)
        return
    axes.plot(x, y, dashes, color=colour, label=series.label, linewidth=1.8)
    if sd is not None:
        axes.fill_between(x, y - sd, y + sd, color=colour, alpha=BAND, linewidth=0)


def _dress(axes: Axes, chart: Chart, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=chart.x, ylabel=chart.y if title else "")
    axes.set_title(title or chart.y, loc="left")
    axes.grid(alpha=0.2, color=INK)
    if chart.x in ("epoch", "layer"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
