# SPDX-License-Identifier: Apache-2.0
"""Numbers as CSV and JSON: what is drawn or printed can be read by programs too, and never holds NaN or infinity."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from .names import readable


def to_csv(rows: Sequence[Any]) -> str:
    """Dataclasses of one kind, their fields as columns; None is empty, sizes are written 14x14.

    Example:
        >>> print(to_csv([Axis(3, border="wrap")]), end="")
        kernel_size,stride,dilation,border,causal,shared_by
        3,1,1,wrap,False,1
    """
    names = [field.name for field in fields(rows[0])]
    return write_csv(names, ([_cell(getattr(row, name)) for name in names] for row in rows))


RUN_BY_SPREADSHEETS = ("=", "+", "-", "@")  # a text that begins so is taken for a formula


def write_csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Lines under a header; a float32 is written with the six digits that it holds, a number that is not finite is empty.

    A text that a spreadsheet would run as a formula, be it the name of a class, has an apostrophe before it; tabs and line
    breaks in it are written out.
    """
    return csv_lines([header, *lines])


def csv_lines(lines: Iterable[Sequence[Any]]) -> str:
    """Lines as :func:`write_csv` writes them, for a table that grows."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_written(one) for one in line] for line in lines)
    return text.getvalue()


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON that every parser takes: it has no word for NaN and infinity, so that these become null.

    With an indent a row is a line: a list of plain values, and in a list a record of them.

    Example:
        >>> to_json({"loss": float("nan"), "sizes": (1, 2)}, indent=None)
        '{"loss": null, "sizes": [1, 2]}'
    """
    value = finite(value)
    return json.dumps(value, allow_nan=False) if indent is None else _text(value, " " * indent)


def _text(value: Any, step: str, margin: str = "\n", in_list: bool = False) -> str:
    """JSON whose inner parts stand ``step`` further to the right than their ``margin``."""
    inner = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    is_row = isinstance(value, (list, tuple)) or in_list
    if not inner or (is_row and not any(isinstance(one, (Mapping, list, tuple)) for one in inner)):
        return json.dumps(value, allow_nan=False)
    deeper = margin + step
    parts = [_text(one, step, deeper, isinstance(value, (list, tuple))) for one in inner]
    if isinstance(value, Mapping):
        names = [next(iter(json.loads(json.dumps({name: 0})))) for name in value]  # as JSON has keys: of text
        parts = [f"{json.dumps(name)}: {part}" for name, part in zip(names, parts, strict=True)]
        return f"{{{deeper}{f',{deeper}'.join(parts)}{margin}}}"
    return f"[{deeper}{f',{deeper}'.join(parts)}{margin}]"


def finite(value: Any) -> Any:
    """The same dicts and lists with None in the place of every float that is not finite; other values as they are."""
    if isinstance(value, (float, np.floating)):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _written(value: Any) -> Any:
    value = finite(value)
    if isinstance(value, str):
        value = readable(value)
        return f"'{value}" if value.startswith(RUN_BY_SPREADSHEETS) else value
    return f"{value:.6g}" if type(value) is np.float32 else value
