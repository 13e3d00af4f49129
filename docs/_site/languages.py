# SPDX-License-Identifier: Apache-2.0
"""A link on every page to the same one in the other language: English at the root, French in fr/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import french

BOTH = {"search"}  # made by Sphinx in either


def link(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """What the template of the sidebar shows."""
    if app.config.language == "fr":
        context["other_language"] = {"name": "English", "code": "en", "page": f"../{pagename}.html"}
        return
    translated = pagename in BOTH or pagename in french.pages(Path(app.srcdir))
    page = f"fr/{pagename if translated else 'index'}.html"
    context["other_language"] = {"name": "Français", "code": "fr", "page": page}


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
