# SPDX-License-Identifier: Apache-2.0
"""Docstrings are written to be read as they stand; here they become what Sphinx reads."""

from __future__ import annotations

import re
from typing import Any

# `(B, N, *out, D)`: a star that opens no emphasis, or a bar. What stands between backquotes is code.
LONE = re.compile(r"(``.+?``|`[^`]+`|(?<!\w)\*\w[\w ]*\*(?!\w))|([*|])")


# `layer    the module's name`: a field of a class, in a column of such.
FIELD = re.compile(r"([a-z_]+(?:, [a-z_]+)*) {2,}(\S.*)")


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show what is indented as it stands, make sections of columns, and escape lone stars and bars, in place."""
    found: list[str] = []
    formula = False
    for line in _with_fields(lines):
        indented = line.startswith(" ")
        if indented and not formula and found and not found[-1].strip() and _ends_prose(found):
            formula = True
            found += ["::", ""]
        formula = formula and (indented or not line.strip())
        code = formula or line.lstrip().startswith((">>>", "..."))
        found.append(line if code else LONE.sub(lambda lone: lone[1] or "\\" + lone[2], line))
    lines[:] = found


def _with_fields(lines: list[str]) -> list[str]:
    """Columns of fields, as a section that napoleon knows."""
    found: list[str] = []
    within = False
    for line in lines:
        field = FIELD.fullmatch(line)
        if field and not within and (not found or found[-1].strip()):
            field = None  # prose with two spaces in it
        if field and not within:
            found.append("Attributes:")
        within = bool(field) or (within and line.startswith(" "))
        found.append(f"    {field[1]}: {field[2]}" if field else f"    {line.rstrip()}" if within else line)
    return found


def _ends_prose(lines: list[str]) -> bool:
    """Whether the last line with text is one of prose, flush left: what is indented after it is a formula or a table."""
    last = next((line for line in reversed(lines) if line.strip()), " ")
    return not last.startswith((" ", "- ", "* "))


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon's
    return {"parallel_read_safe": True, "parallel_write_safe": True}
