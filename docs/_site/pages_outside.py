# SPDX-License-Identifier: Apache-2.0
"""Pages that lie above docs/, where a repository keeps them, are pages of the site too.

A page of docs/ that is nothing but a link to such a file is shown as that file. Links to it, and those in it, are bent.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

# Files of the repository, and the pages of the site that show them.
OUTSIDE = {
    "CONTRIBUTING.md": "inside/contributing.md",
    "CHANGELOG.md": "inside/changelog.md",
    "examples": "gallery/examples/index.rst",  # which sphinx-gallery makes
}
LINK = re.compile(r"(\]\(|^\[[^\]]+\]:\s*)([\w./-]+)(#[\w-]*)?(?=[)\s])", re.MULTILINE)


def show(app: Any, docname: str, source: list[str]) -> None:
    """The text of a page as Sphinx is to read it."""
    docs = Path(app.srcdir)
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    place = page.parent
    for file, shown_as in OUTSIDE.items():
        if docname == shown_as.removesuffix(".md"):
            page = docs.parent / file
            app.env.note_dependency(str(page))
            source[0], place = page.read_text(encoding="utf-8"), page.parent
    source[0] = LINK.sub(lambda link: link[1] + _bent(link[2], docs, place, docname) + (link[3] or ""), source[0])


def _bent(target: str, docs: Path, place: Path, docname: str) -> str:
    """A link of a file in ``place``, as one of the page of that name."""
    file = Path(os.path.normpath(place / target))
    if not file.exists():
        return target  # for Sphinx to complain of
    inside = OUTSIDE.get(str(file.relative_to(docs.parent))) if file.is_relative_to(docs.parent) else None
    if inside is not None:
        file = docs / inside
    if file.is_dir():
        file = next((file / name for name in ("index.md", "README.md", "__init__.py") if (file / name).exists()), file)
    bent = os.path.relpath(file, (docs / docname).parent)
    return bent if file.suffix != ".md" or file.is_relative_to(docs) else f"path:{bent}"  # no page: the file itself


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", show)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
