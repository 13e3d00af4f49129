# SPDX-License-Identifier: Apache-2.0
"""The pages that are in French: every paragraph of them is, and their links to the others lead to the English site.

French is written in catalogues of gettext, docs/_locale/fr/LC_MESSAGES: a page is in French where it has one. Only prose is
in them, so that the code of both languages is one. `make french` brings the catalogues up to the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unicodedata import combining, normalize

from babel.messages.pofile import read_po
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.nodes import extract_messages, traverse_parent

logger = logging.getLogger(__name__)
CATALOGUES = Path("_locale", "fr", "LC_MESSAGES")
# What has no language: code, formulas, where a link leads, and markup.
NO_PROSE = re.compile(r"``.+?``|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|https?://\S+|\{\w+\}")
WORD = re.compile(r"[^\W\d_]{2,}")
# Names, and words that are the same in French.
NAMES = """arXiv Cordonnier DiNAT FLOPs HaloNet Julian Hatzky NAT NATTEN nearsight ONNX Python PyTorch Ramachandran SASA
ResNet Swin timm Vaswani Convolution Convolutions Installation"""
SAME = frozenset(NAMES.split())
# French sets a space that does not break before these, and within its quotation marks.
UNSPACED = re.compile(r"(?<![\u202f\u00a0])([;:!?](?=[\s*)_]|$)|»)|«(?![\u202f\u00a0])")
GLOSSARY = "learn/glossary"
PROMPTS = {"Answer": "Réponse"}


def pages(docs: Path) -> list[str]:
    """The names of the pages that are in French."""
    folder = docs / CATALOGUES
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.po")]
    return sorted(name for name in names if (docs / f"{name}.md").exists())  # one holds the theme's words


def needs_french(text: str) -> bool:
    """Whether a paragraph has a word that is not a name. A formula that stands by itself comes without its dollars."""
    prose = NO_PROSE.sub(" ", text)
    return not re.search(r"\\[A-Za-z]", prose) and any(word not in SAME for word in WORD.findall(prose))


def faults(english: str, french: str) -> list[str]:
    """What is wrong with the French of a paragraph."""
    if not needs_french(english):
        return []
    if not french.strip():
        return ["has no French"]
    if french == english:
        return ["is English in the French page"]
    if found := UNSPACED.search(NO_PROSE.sub("x", french)):
        return [f"lacks a narrow or non-breaking space at {found[0]!r}"]
    return []


class French(SphinxTransform):
    """Looks through the paragraphs of a page before they are translated, and keeps what is wrong with them."""

    default_priority = 15  # before Sphinx's Locale, which puts the French in their place

    def apply(self, **_: Any) -> None:
        name = self.env.current_document.docname
        with (Path(self.env.srcdir) / CATALOGUES / f"{name}.po").open("rb") as file:
            texts = {message.id: str(message.string) for message in read_po(file) if not message.fuzzy}
        kept = self.env.metadata[name].setdefault("french", [])
        for node, text in extract_messages(self.document):
            # What stands in place of a picture is part of its paragraph, and what heads the file is no text.
            if not isinstance(node, nodes.image) and not any(traverse_parent(node, nodes.field_list)):
                kept += [f"{name}: {text[:70]!r} {fault}" for fault in faults(text, texts.get(text, ""))]


def after_reading(app: Any, document: nodes.document) -> None:
    """Links to pages that are not in French lead to the English ones; what unfolds says so in French."""
    name = app.env.current_document.docname
    up = "../" * (name.count("/") + 1)
    for link in list(document.findall(addnodes.pending_xref)):
        if link.get("refdomain") == "doc" and link["reftarget"] not in app.env.found_docs:
            place = f"#{link['reftargetid']}" if link.get("reftargetid") else ""
            target = f"{up}{link['reftarget']}.html{place}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=target, classes=["english"]))
    if name == GLOSSARY:
        for words in document.findall(nodes.definition_list):
            words[:] = sorted(words, key=_in_french_order)
    for cell in document.findall(nodes.container):
        for prompt in ("prompt_show", "prompt_hide"):
            if prompt in cell:
                cell[prompt] = PROMPTS.get(cell[prompt], cell[prompt])


def _in_french_order(word: nodes.Node) -> str:
    """A dictionary's: accents do not count."""
    return "".join(letter for letter in normalize("NFD", word.astext().lower()) if not combining(letter))


def report(app: Any, error: Exception | None) -> None:
    """Every time and not only when a page was read: what was built once stays wrong until its French is there."""
    if error is None:
        for name in sorted(app.env.found_docs):
            for fault in app.env.metadata[name].get("french", []):
                logger.warning(fault)


def setup(app: Any) -> dict[str, bool]:
    app.add_transform(French)
    app.connect("doctree-read", after_reading)
    app.connect("build-finished", report)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
