# SPDX-License-Identifier: Apache-2.0
"""Brings the French catalogues up to the English pages: `make french`. What has no French yet is listed and left empty.

A paragraph that changed keeps its French, marked "fuzzy", which the site does not take: look at it, and remove the mark.
"""

from __future__ import annotations

import re
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po
from french import CATALOGUES, needs_french
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

PAGES = ("index.md", "start/*.md", "learn/*.md")
# What stands in place of a picture that a cell draws, which is not there before the cell has run.
DRAWN = re.compile(r'^:mystnb: \{image: \{alt: "(.+)"\}\}$', re.MULTILINE)
HEADERS = [("Language", "fr"), ("MIME-Version", "1.0"), ("Content-Type", "text/plain; charset=utf-8")]


def texts(docs: Path, extensions: list[str], **settings: Any) -> dict[str, list[str]]:
    """The paragraphs of each page that is to be in French, in order."""
    pages = [file.relative_to(docs).as_posix() for file in docs.rglob("*.md")]
    others = [page for page in pages if not any(fnmatch(page, pattern) for pattern in PAGES)]
    overrides = {
        "extensions": extensions,
        "exclude_patterns": ["_*", "**/*.rst", "**/*.py", *others],
        "nb_execution_mode": "off",
        "suppress_warnings": ["toc.excluded", "myst"],
        "gettext_compact": False,
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder, docutils_namespace():
        out = Path(folder, "texts")
        app = Sphinx(docs, None, out, Path(folder, "read"), "gettext", overrides, status=None, warning=None)
        app.build()
        found = {}
        for file in sorted(out.rglob("*.pot")):
            if (docs / file.relative_to(out).with_suffix(".md")).exists():
                with file.open("rb") as opened:
                    messages = [str(message.id) for message in read_po(opened) if message.id]
                page = file.relative_to(out).with_suffix("")
                drawn = DRAWN.findall((docs / page).with_suffix(".md").read_text(encoding="utf-8"))
                found[page.as_posix()] = _paragraphs(messages) + drawn
        return found


def _paragraphs(messages: list[str]) -> list[str]:
    """Without those that come twice: what stands in place of a picture is part of its paragraph."""
    pictures = {"".join(text.split()) for message in messages for text in re.findall(r"!\[(.*?)\]", message, re.DOTALL)}
    return [message for message in messages if "".join(message.split()) not in pictures and needs_french(message)]


def updated(old: Catalog, messages: list[str]) -> Catalog:
    """A catalogue of exactly these paragraphs, with the French that there is."""
    template = Catalog(charset="utf-8")
    for message in messages:
        template.add(message)
    old.update(template, update_creation_date=False)
    old.obsolete.clear()
    return old


def write(file: Path, catalogue: Catalog) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        opened.write(
            "".join(['msgid ""\nmsgstr ""\n', *(f'"{name}: {value}\\n"\n' for name, value in HEADERS), "\n"]).encode()
        )
        write_po(opened, catalogue, width=110, no_location=True, omit_header=True)


def update(docs: Path, extensions: list[str], **settings: Any) -> list[str]:
    """Write the catalogues, and list what has no French."""
    lacking = []
    for page, messages in texts(docs, extensions, **settings).items():
        file = docs / CATALOGUES / f"{page}.po"
        old = Catalog(locale="fr", charset="utf-8")
        if file.exists():
            with file.open("rb") as opened:
                old = read_po(opened, locale="fr")
        catalogue = updated(old, messages)
        write(file, catalogue)
        lacking += [
            f"{page}: {message.id}" for message in catalogue if message.id and (message.fuzzy or not message.string)
        ]
    return lacking


if __name__ == "__main__":
    docs = Path(__file__).parents[1]
    found = update(docs, ["myst_nb", "sphinx_design"], myst_enable_extensions=["colon_fence", "deflist", "dollarmath"])
    print("\n".join(found) or "All of it is in French.")
    sys.exit(bool(found))
