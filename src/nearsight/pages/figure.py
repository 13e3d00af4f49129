# SPDX-License-Identifier: Apache-2.0
"""Figures that a notebook shows by themselves, with Matplotlib's own switch for that on or off."""

from __future__ import annotations

from matplotlib.figure import Figure

from .style import to_png


class NotebookFigure(Figure):
    """Matplotlib's, drawn without pyplot, that says how it looks as PNG."""

    def _repr_png_(self) -> bytes:
        return to_png(self)
