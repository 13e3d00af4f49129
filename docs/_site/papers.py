# SPDX-License-Identifier: Apache-2.0
"""The page of papers, from the docstrings of the public names: what each is made after, and where it differs."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

from docstrings import LONE

PAGE = "results/papers"
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def listed(api: str) -> list[str]:
    """The public names of the page of the API, in its order."""
    return [name for block in re.findall(r"autosummary::\n.*\n\n((?:   .+\n)+)", api) for name in block.split()]


def told(name: str) -> list[str]:
    """The paragraphs of a name's docstring that begin with its source or say what differs, lists included."""
    room, _, own = f"nearsight.{name}".rpartition(".")
    text = inspect.cleandoc(getattr(import_module(room), own).__doc__ or "")
    found: list[str] = []
    for part in re.split(r"\n\s*\n", text):
        if part.startswith(("Source:", "Differs from")) or (
            found and found[-1].endswith(":") and part.startswith("- ")
        ):
            found.append(part)
    return found


def section(name: str, paragraphs: list[str]) -> str:
    """One of the page, in reStructuredText."""
    lines = [name, "-" * len(name), "", f":py:obj:`nearsight.{name}`", ""]
    for paragraph in paragraphs:
        text = LONE.sub(lambda lone: lone[1] or "\\" + lone[2], paragraph)
        lines += [ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text), ""]
    return "\n".join(lines)


def write(app: Any, docname: str, source: list[str]) -> None:
    """Below the head of the page."""
    if docname == PAGE:
        names = listed((Path(app.srcdir) / "reference" / "api.rst").read_text(encoding="utf-8"))
        sections = [section(name, paragraphs) for name in names if (paragraphs := told(name))]
        source[0] += "\n" + "\n".join(sections)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", write)
    app.connect("env-before-read-docs", _again)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _again(app: Any, env: Any, docnames: list[str]) -> None:
    """Docstrings are not among what Sphinx looks at: the page is always read."""
    if PAGE in env.found_docs and PAGE not in docnames:
        docnames.append(PAGE)
