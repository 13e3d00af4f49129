# SPDX-License-Identifier: Apache-2.0
"""Draws the one window in eight of its forms: for three queries, the cells that each sees.

.venv/bin/python examples/windows.py docs/images/windows.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import nearsight as ns
from nearsight.files import write_bytes
from nearsight.pages.style import BLUE, GREEN, INK, ORANGE, in_style, new_figure, to_svg_file

SIDE = 12  # cells of the map per axis
QUERIES = {(5, 5): BLUE, (6, 4): ORANGE, (0, 10): GREEN}
WINDOWS = {
    "sliding (SASA, NAT)": "ns.Window(5)",
    "slid inwards (NATTEN)": 'ns.Window(5, border="shift")',
    "around a torus": 'ns.Window(5, border="wrap")',
    "a panorama": 'ns.Window(5, border=("mask", "wrap"))',
    "shared (HaloNet)": "ns.Window(6, shared_by=4)",
    "blocks (Swin)": "ns.Window(4, shared_by=4)",
    "dilated (DiNAT)": "ns.Window(3, dilation=3)",
    "causal rows": "ns.Window(5, causal=(True, False))",
}


def seen(window: ns.Window, query: tuple[int, int]) -> np.ndarray:
    """Which cells of the map the query sees, (SIDE, SIDE) of bool."""
    rows, columns = (
        [int(cell) for cell in axis.neighbours(SIDE)[place, :, 0] if cell >= 0]
        for axis, place in zip(window.axes(2), query, strict=True)
    )
    found = np.zeros((SIDE, SIDE), dtype=bool)
    found[np.ix_(rows, columns)] = True
    return found


@in_style
def draw() -> Figure:
    figure = new_figure(9.6, 5.6)
    for axes, (title, code) in zip(figure.subplots(2, 4).flat, WINDOWS.items(), strict=True):
        window = eval(code, {"ns": ns})
        for (y, x), colour in QUERIES.items():
            for row, column in np.argwhere(seen(window, (y, x))):
                axes.add_patch(Rectangle((column, row), 1, 1, color=colour, alpha=0.35, linewidth=0))
            axes.plot(x + 0.5, y + 0.5, "o", color=colour, markersize=6)
        axes.set(xlim=(0, SIDE), ylim=(SIDE, 0), aspect="equal")
        axes.set_xticks(range(SIDE + 1), labels=[])
        axes.set_yticks(range(SIDE + 1), labels=[])
        axes.tick_params(length=0)
        axes.grid(color=INK, alpha=0.2, linewidth=0.5)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{title}\n{code.removeprefix('ns.')}", fontsize=8)
    return figure


def main(output: str) -> None:
    write_bytes(Path(output), to_svg_file(draw()))


if __name__ == "__main__":
    main(sys.argv[1])
