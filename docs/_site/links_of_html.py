# SPDX-License-Identifier: Apache-2.0
"""Looks through the pages that were written: every link and every anchor is there, and nothing comes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sphinx.util import logging

logger = logging.getLogger(__name__)
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("video", "src")}


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.places: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.places.add(value or "")
            elif (tag, name) == ("a", "href"):
                self.links.add(value or "")
            elif (tag, name) in LOADED and ("rel", "canonical") not in attrs:
                self.loaded.add(value or "")


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with the links of the pages in a folder."""
    pages = {file.resolve(): Page(file) for file in sorted(folder.rglob("*.html"))}
    for file, page in pages.items():
        name = file.relative_to(folder.resolve())
        for target in sorted(page.loaded | page.links):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if target in page.loaded and parts.scheme != "data":
                    yield f"{name}: loads {target}, which is not of this site"
                continue
            # 404.html is shown in place of pages at any depth, and so its links begin at the site's root.
            start = folder.resolve() if parts.path.startswith("/") else file.parent
            reached = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else file
            reached = reached / "index.html" if reached.is_dir() else reached
            if not reached.exists():
                yield f"{name}: {target}: no such file"
            elif parts.fragment and reached in pages and unquote(parts.fragment) not in pages[reached].places:
                yield f"{name}: {target}: no such place"


def check(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        for fault in faults(Path(app.outdir)):
            logger.warning(fault)


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", check, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
