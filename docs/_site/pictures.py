# SPDX-License-Identifier: Apache-2.0
"""Pictures of docs/images that a script draws from the code alone are drawn anew by the build.

What is committed is for those who read the pages where the code is kept; tests/test_plots.py holds it to the same scripts.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def drawn(name: str, docs: Path) -> bytes:
    """The picture of that name, by the script of that name."""
    from nearsight.pages.style import to_svg_file

    sys.path.insert(0, str(docs.parent / "examples"))
    try:
        script = importlib.import_module(name)
    finally:
        sys.path.pop(0)
    numbers = docs / "images" / f"{name}.csv"
    return to_svg_file(script.draw(*([script.read(numbers.read_text())] if numbers.exists() else [])))


def draw(app: Any, error: Exception | None) -> None:
    """In place of those that were copied."""
    if error is not None or app.builder.format != "html":
        return
    docs = Path(app.srcdir)
    for picture, copy in app.builder.images.items():
        file = docs / picture
        if file.parent == docs / "images" and file.suffix == ".svg":
            (Path(app.outdir) / app.builder.imagedir / copy).write_bytes(drawn(file.stem, docs))


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", draw, priority=300)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
