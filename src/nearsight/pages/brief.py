# SPDX-License-Identifier: Apache-2.0
"""How results show themselves: in a few lines at a prompt, whatever they hold, and as a table in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any, Generic, TypeVar, overload

from .names import readable

LONGEST = 60  # characters of a text
SHOWN = 6  # of a collection's entries
ROWS = 8  # of a table at a prompt: under its heading, with a line for those that are left out
WIDEST = 960  # characters of a record, and of a table: a line that is longer is cut

Row = TypeVar("Row")


def brief(value: Any) -> str:
    """A value in a few words: of tensors the dtype and shape, of modules the size, of what is long its beginning and length.

    Example:
        >>> brief(np.zeros((2, 3))), brief(tuple(range(100)))
        ('float64 (2, 3)', '(0, 1, 2, 3, 4, 5, ... 100 in all)')
    """
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.ndim:
        if value.ndim == 1 and 0 < len(value) <= SHOWN:
            return f"[{', '.join(brief(one) for one in value.tolist())}]"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if hasattr(value, "named_parameters"):
        return f"{type(value).__name__} of {sum(one.numel() for one in value.parameters()):,} parameters"
    if isinstance(value, str):
        return repr(value) if len(value) <= LONGEST else f"{value[:LONGEST]!r}... {len(value):,} characters"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return _several("{", [f"{brief(name)}: {brief(one)}" for name, one in _first(value.items())], "}", len(value))
    if type(value) in (list, tuple, set, frozenset):
        left, right = {list: "[]", tuple: "()"}.get(type(value), "{}")
        return _several(left, [brief(one) for one in _first(value)], right, len(value))
    if is_dataclass(value):
        return repr(value)
    return _cut(repr(value), 2 * LONGEST)


def brief_fields(record: Any) -> str:
    """The ``repr`` of a dataclass or named tuple, each of its values brief."""
    names = record._fields if hasattr(record, "_fields") else [field.name for field in fields(record) if field.repr]
    values = ", ".join(f"{name}={brief(getattr(record, name))}" for name in names)
    return _cut(f"{type(record).__name__}({values})", WIDEST)


class Brief:
    """What a dataclass inherits, made with ``repr=False``, that may hold more than a screen shows."""

    def __repr__(self) -> str:
        return brief_fields(self)


class Rows(list[Row], Generic[Row]):
    """Records of one kind: a list that shows itself as a table, ten lines of it at a prompt and all of it in a notebook.

    Example:
        >>> Rows([Interval(0.5, 0.4, 0.6)])
        1 row
        value  low  high
          0.5  0.4   0.6
    """

    def columns(self) -> Mapping[str, Callable[[Row], Any]]:
        """Headings, and what stands under them; the fields of the records unless a kind of table says otherwise."""
        first: Any = self[0]
        names = first._fields if hasattr(first, "_fields") else [field.name for field in fields(first)]
        return {name: lambda row, name=name: getattr(row, name) for name in names}

    def heading(self) -> str:
        """What stands above the table."""
        return f"{len(self)} row{'s' * (len(self) != 1)}"

    @overload
    def __getitem__(self, place: slice) -> Rows[Row]: ...
    @overload
    def __getitem__(self, place: Any) -> Row: ...
    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return self._part(found) if isinstance(place, slice) else found

    def _part(self, rows: list[Row]) -> Rows[Row]:
        return type(self)(rows)

    def cells(self) -> list[list[str]]:
        """The table, its heading first."""
        columns = self.columns() if self else {}
        return [list(columns), *([cell(value(row)) for value in columns.values()] for row in self)]

    def __repr__(self) -> str:
        return short_table(self.cells(), self.heading())

    def _repr_html_(self) -> str:
        return html_table(self.cells(), self.heading())


def short_table(cells: Sequence[Sequence[str]], heading: str) -> str:
    """A table of ten lines at most for a prompt: of many rows the first and the last."""
    lines = text_table(cells)
    left_out = len(lines) - 1 - ROWS
    if left_out > 0:
        first = 1 + ROWS // 2
        lines[first : first + left_out + 1] = [f"... {left_out + 1} more ..."]
    return "\n".join(_cut(line, WIDEST // (ROWS + 2)) for line in [heading, *lines] if line)


def text_table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its heading; what is a number in every row stands to the right."""
    columns = list(zip(*cells, strict=True))
    lines = [""] * len(cells)
    for column in columns:
        width = max(map(len, column))
        to_the_right = len(column) > 1 and all(map(_is_number, column[1:]))
        lines = [
            f"{line}  {one.rjust(width) if to_the_right else one.ljust(width)}"
            for line, one in zip(lines, column, strict=True)
        ]
    return [line[2:].rstrip() for line in lines]


def html_table(cells: Sequence[Sequence[str]], heading: str) -> str:
    """A table for a notebook, whose own style it takes."""
    head, *body = (f"<tr>{''.join(f'<td>{escape(one)}</td>' for one in row)}</tr>" for row in cells)
    return (
        f"<table><caption>{escape(heading)}</caption><thead>{head.replace('td>', 'th>')}</thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _several(left: str, entries: Sequence[str], right: str, count: int) -> str:
    rest = f", ... {count:,} in all" if count > len(entries) else ""
    return f"{left}{', '.join(entries)}{rest}{',' if left == '(' and count == 1 else ''}{right}"


def _first(entries: Any) -> list[Any]:
    return [one for one, _ in zip(entries, range(SHOWN), strict=False)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, tuple) and value else brief(value)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True
