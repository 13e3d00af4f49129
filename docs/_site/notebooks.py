# SPDX-License-Identifier: Apache-2.0
"""Pages with cells open as a notebook and as a script: both lie beside the page, in its language."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jupytext
from babel.messages.pofile import read_po
from docutils import nodes
from french import CATALOGUES
from sphinx.util import logging

logger = logging.getLogger(__name__)
FORMATS = {".ipynb": "ipynb", ".py": "py:percent"}
LABELS = {
    "en": ("Open this page:", "as a notebook", "as a script"),
    "fr": ("Ouvrir cette page :", "en carnet", "en script"),
}
# A paragraph begins a line, or follows what makes a heading, an item or a quotation, and ends one.
BEGINS, ENDS = r"^((?:#+|[-*>]|\d+\.|\*\*\d+\.\*\*)?[ ]*)", r"[ ]*$"


def is_notebook(page: Path) -> bool:
    return page.suffix == ".md" and page.read_text(encoding="utf-8").startswith("---\njupytext:")


def in_french(prose: str, french: Mapping[str, str]) -> tuple[str, set[str]]:
    """The Markdown of a cell with the catalogue's French in it, and which paragraphs were found."""
    found = set()
    for english in sorted(french, key=len, reverse=True):
        pattern = BEGINS + r"\s+".join(map(re.escape, english.split())) + ENDS
        changed, times = re.subn(
            pattern, lambda begun, text=french[english]: begun[1] + text, prose, flags=re.MULTILINE
        )
        if times:
            prose = changed
            found.add(english)
    return prose, found


def read(app: Any, docname: str) -> Any:
    """The page as a notebook, in the language of the site that is built."""
    notebook = jupytext.read(Path(app.env.doc2path(docname)))
    if app.config.language == "fr":
        with (Path(app.srcdir) / CATALOGUES / f"{docname}.po").open("rb") as file:
            french = {
                str(message.id): str(message.string) for message in read_po(file) if message.id and message.string
            }
        missing = set(french)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source, found = in_french(cell.source, french)
                missing -= found
            elif alt := cell.metadata.get("mystnb", {}).get("image", {}).get("alt"):
                text = " ".join(alt.split())
                cell.metadata["mystnb"]["image"]["alt"] = french.get(text, alt)
                missing.discard(text)
        for english in sorted(missing):
            logger.warning(f"{docname}: {english[:70]!r} stays English in the notebook")
    return notebook


def link(app: Any, document: nodes.document) -> None:
    """Below the title of a page that is a notebook."""
    docname = app.env.current_document.docname
    title = document.next_node(nodes.title)
    if title is None or not is_notebook(Path(app.env.doc2path(docname))):
        return
    intro, *labels = LABELS[app.config.language or "en"]
    line = nodes.paragraph("", intro + " ", classes=["downloads"])
    for label, ending in zip(labels, FORMATS, strict=True):
        uri = docname.rpartition("/")[2] + ending
        line += [nodes.reference("", label, refuri=uri, classes=["download"]), nodes.Text(" ")]
    title.parent.insert(title.parent.index(title) + 1, line)


def write(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    for docname in sorted(app.env.found_docs):
        if is_notebook(Path(app.env.doc2path(docname))):
            notebook = read(app, docname)
            for ending, form in FORMATS.items():
                file = Path(app.outdir) / f"{docname}{ending}"
                file.write_text(jupytext.writes(notebook, fmt=form), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-read", link)
    app.connect("build-finished", write, priority=300)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
