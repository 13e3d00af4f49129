# SPDX-License-Identifier: Apache-2.0
"""Draws where the heads of converted layers moved, from the heads.csv that examples/convert_fashion_mnist.py leaves.

.venv/bin/python examples/convert_heads.py docs/images/convert_heads.csv docs/images/convert_heads.svg
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nearsight.files import write_bytes
from nearsight.pages.csv_json import write_csv
from nearsight.pages.style import BLUE, INK, ORANGE, SKY, in_style, new_figure, to_svg_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (BLUE, ORANGE, SKY)
LONGER = 4  # in the picture, where a move of a tenth of a cell is to be seen


class Head(NamedTuple):
    """Of a converted layer: where it looks, in cells from the query, and how far its gate lets content in, 0 to 1."""

    seed: int
    layer: str
    head: int  # from 1, row by row over the kernel that it came from
    row: float
    column: float
    gate: float


KINDS = {"seed": int, "layer": str, "head": int, "row": float, "column": float, "gate": float}


def read(text: str) -> list[Head]:
    rows = csv.DictReader(text.splitlines())
    return [Head(**{name: kind(row[name]) for name, kind in KINDS.items()}) for row in rows]


def to_csv(heads: Sequence[Head]) -> str:
    return write_csv(Head._fields, [(*head[:3], *(round(value, 5) for value in head[3:])) for head in heads])


def home(head: int, count: int) -> tuple[int, int]:
    """The cell at which one of ``count`` heads began."""
    side = math.isqrt(count)
    row, column = divmod(head - 1, side)
    return row - side // 2, column - side // 2


@in_style
def draw(heads: Sequence[Head]) -> Figure:
    """One panel per layer: from where each head began a line the way it moved, its dot as large as its gate is open."""
    layers = list(dict.fromkeys(head.layer for head in heads))
    count = max(head.head for head in heads)
    figure = new_figure(2.6 * len(layers), 2.8)
    for panel, layer in zip(figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True):
        for head in (head for head in heads if head.layer == layer):
            y, x = home(head.head, count)
            row, column = y + LONGER * (head.row - y), x + LONGER * (head.column - x)
            colour = SEEDS[head.seed % len(SEEDS)]
            panel.plot([x, column], [y, row], color=colour, linewidth=1)
            panel.scatter([column], [row], s=8 + 120 * head.gate, color=colour, alpha=0.7, linewidths=0)
        panel.set(
            title=layer, xticks=range(-2, 3), yticks=range(-2, 3), xlim=(-2.3, 2.3), ylim=(2.3, -2.3), aspect="equal"
        )
        panel.grid(color=INK, alpha=0.2)
    return figure


def main(numbers: str, output: str) -> None:
    write_bytes(Path(output), to_svg_file(draw(read(Path(numbers).read_text()))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
