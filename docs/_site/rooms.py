# SPDX-License-Identifier: Apache-2.0
"""Draws what imports what: the directive ``{rooms}``. Rooms and imports are those that tests/test_architecture.py reads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

CELL, NAMES = 12, 130  # pixels: a cell, and the room for names


def arrows(tests: Path) -> tuple[list[str], set[tuple[str, str]]]:
    """The rooms from the top down, and who imports whom."""
    sys.path.insert(0, str(tests))
    try:
        import test_architecture as house
    finally:
        sys.path.pop(0)
    rooms = [room for group in house.ROOMS for room in group]
    found = set()
    for file in house.SOURCE.rglob("*.py"):
        here = house.room_of(house.module_of(file, house.SOURCE))
        there = {house.room_of(module) for module in house.imports_of(file, house.SOURCE)}
        found |= {(here, room) for room in there if room not in (None, here)}
    return rooms, found


def drawn(rooms: list[str], found: set[tuple[str, str]]) -> Iterator[str]:
    """A square with a room per row and per column, and a mark where the row's imports the column's."""
    side = CELL * len(rooms)
    place = {room: CELL * number for number, room in enumerate(rooms)}
    wide, high = NAMES + side + 1, NAMES + side + 1
    yield f'<div class="rooms"><svg viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="img" '
    yield f'aria-label="{len(found)} imports between {len(rooms)} rooms, all below the diagonal or beside it">'
    for room, at in place.items():
        y = NAMES + at
        yield f'<text x="{NAMES - 6}" y="{y + CELL - 2}" text-anchor="end">{escape(room)}</text>'
        yield f'<text transform="translate({y + CELL - 2} {NAMES - 6}) rotate(-90)">{escape(room)}</text>'
        yield f'<path d="M{NAMES} {y}h{side}M{y} {NAMES}v{side}"/>'
        yield f'<rect class="self" x="{y}" y="{y}" width="{CELL}" height="{CELL}"/>'
    for who, whom in sorted(found):
        x, y = NAMES + place[whom] + 2, NAMES + place[who] + 2
        yield f'<rect x="{x}" y="{y}" width="{CELL - 4}" height="{CELL - 4}"><title>{who} imports {whom}</title></rect>'
    yield "</svg></div>"


class Rooms(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        root = Path(self.env.srcdir).parent
        for file in (*(root / "src").rglob("*.py"), root / "tests" / "test_architecture.py"):
            self.env.note_dependency(str(file))
        return [nodes.raw("", "".join(drawn(*arrows(root / "tests"))), format="html")]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("rooms", Rooms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
