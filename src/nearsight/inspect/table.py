# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers as CSV: what is drawn can be had as numbers too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np


def to_csv(rows: Sequence[Any]) -> str:
    """Dataclasses of one kind, their fields as columns; None is empty, sizes are written 14x14.

    Example:
        >>> print(to_csv([Axis(3, border="wrap")]), end="")
        kernel_size,stride,dilation,border,causal
        3,1,1,wrap,False
    """
    names = [field.name for field in fields(rows[0])]
    return write_csv(names, ([_cell(getattr(row, name)) for name in names] for row in rows))


def write_csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """Lines under a header; a float32 is written with the six digits that it holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{one:.6g}" if type(one) is np.float32 else one for one in line] for line in lines)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value
