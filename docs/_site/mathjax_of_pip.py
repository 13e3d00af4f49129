# SPDX-License-Identifier: Apache-2.0
"""Takes MathJax from the package that pip installed, so that neither the tree nor a network has to hold it."""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path
from typing import Any

PACKAGE, SCRIPT = "django-static-mathjax", "mathjax/es5/tex-svg.js"


def copy(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    found = next(file for file in files(PACKAGE) or () if str(file).endswith(SCRIPT))
    shutil.copyfile(Path(str(found.locate())), Path(app.outdir) / "_static" / "tex-svg.js")


def setup(app: Any) -> dict[str, bool]:
    app.config.mathjax_path = "tex-svg.js"
    app.connect("build-finished", copy, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
