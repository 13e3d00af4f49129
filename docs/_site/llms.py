# SPDX-License-Identifier: Apache-2.0
"""Writes llms.txt, for programs that read: what the site is, and each page with the first sentence of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes

HEAD = """\
# nearsight

> Stand-alone self-attention for vision in PyTorch: exact local attention in one to three dimensions, with a fast kernel for
> CPUs, layers that take the place of convolutions, networks, training, conversion and pages that show where a network looks.

Each page is HTML; its Markdown lies at the same place under docs/ in the repository.

## Pages

"""


def write(app: Any, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    lines = []
    for name in sorted(app.env.found_docs):
        title = app.env.titles[name].astext()
        if name == app.config.root_doc or name.startswith("reference/api/"):
            continue
        paragraphs = app.env.get_doctree(name).findall(nodes.paragraph)
        paragraph = next((found for found in paragraphs if "downloads" not in found["classes"]), None)
        text = " ".join(paragraph.astext().split()) if paragraph is not None else ""
        lines.append(f"- [{title}]({app.builder.get_target_uri(name)}): {text.split('. ')[0].rstrip('.:')}.\n")
    (Path(app.outdir) / "llms.txt").write_text(HEAD + "".join(lines), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", write, priority=200)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
