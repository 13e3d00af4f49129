# SPDX-License-Identifier: Apache-2.0
"""How all drawings look, and the files that they become.

Colours and what they mean are palette.py's. A page's SVG takes the page's own text
colour, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from ..extras import need
from .html import without_styles
from .names import readable
from .palette import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ON_BLUE", "ON_ORANGE", "ORANGE", "PINK", "RED", "SKY", "STYLE"]
__all__ += ["in_style", "new_figure", "to_png", "to_svg", "to_svg_file"]

ON_BLUE, ON_ORANGE = "white", "#111111"  # text on them where they are deep
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


def in_style(draw: Callable[Params, Figure]) -> Callable[Params, Figure]:
    @wraps(draw)
    def styled(*args: Params.args, **kwargs: Params.kwargs) -> Figure:
        need(("matplotlib",), "a picture", "explore")
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def new_figure(width: float, height: float) -> Figure:
    """One that is drawn without a window, and that a notebook shows."""
    from .figure import NotebookFigure

    return NotebookFigure(figsize=(width, height), layout="constrained")


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


def to_png(figure: Figure) -> bytes:
    """A picture for slides and readers that take no SVG: 200 dots per inch, on white."""
    return _saved(figure, "png", dpi=200)


def to_svg_file(figure: Figure) -> bytes:
    """An SVG that stands alone, on white; a page takes :func:`to_svg`."""
    return _saved(figure, "svg")


def _saved(figure: Figure, format: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    nothing = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    with rc_context(STYLE), without_glyph_warnings():
        figure.savefig(buffer, format=format, facecolor="white", metadata=nothing, **options)
    return buffer.getvalue()


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Matplotlib's font has not the letters of every script; an SVG takes the reader's fonts, a PNG shows boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Glyph|Matplotlib currently does not support)")
        yield
