# SPDX-License-Identifier: Apache-2.0
"""The site in French: a paragraph without French is found out, catalogues follow the pages, pages lead to each other."""

from __future__ import annotations

import re
import sys
from io import StringIO
from pathlib import Path

import pytest
from babel.messages.pofile import read_po

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_site"))

import french  # noqa: E402
import update_french  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.locale import translators  # noqa: E402
from sphinx.util.docutils import docutils_namespace  # noqa: E402

INDEX = """\
# Cells

A cell is a place of the map. See [the plan](plan.md#words) and [windows](learn/windows.md).

```python
comment = "stays"
```

![A drawing](drawing.svg)

NATTEN: `na2d`, $k^2$

```{toctree}
:hidden:
plan
learn/windows
```
"""
FRENCH = {
    "Cells": "Cellules",
    "A cell is a place of the map. See [the plan](plan.md#words) and [windows](learn/windows.md).": (
        "Une cellule est un endroit de la carte. Voir [le plan](plan.md#words) et [les fenêtres](learn/windows.md)."
    ),
    "![A drawing](drawing.svg)": "![Un dessin](drawing.svg)",
}


@pytest.fixture
def docs(tmp_path):
    """Three pages, of which two are to be in French."""
    docs = tmp_path / "docs"
    (docs / "learn").mkdir(parents=True)
    (docs / "index.md").write_text(INDEX)
    (docs / "plan.md").write_text("# Plan\n\n## Words\n\nNone.\n")
    (docs / "learn" / "windows.md").write_text("# Windows\n\nA window slides.\n")
    (docs / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (docs / "conf.py").write_text("")
    update(docs)
    translate(docs, "index", FRENCH)
    translate(docs, "learn/windows", {"Windows": "Fenêtres", "A window slides.": "Une fenêtre glisse."})
    return docs


def update(docs: Path) -> list[str]:
    return update_french.update(docs, ["myst_nb"])


def read(docs: Path, page: str):
    with (docs / french.CATALOGUES / f"{page}.po").open("rb") as file:
        return read_po(file, locale="fr")


def translate(docs: Path, page: str, texts: dict[str, str]) -> None:
    catalogue = read(docs, page)
    for text, translation in texts.items():
        catalogue[text].string = translation
    update_french.write(docs / french.CATALOGUES / f"{page}.po", catalogue)


def build(docs: Path, out: Path, language: str = "fr") -> str:
    """The warnings of a build."""
    warnings = StringIO()
    overrides = {
        "extensions": ["myst_nb", "languages", *(["french"] if language == "fr" else [])],
        "nb_execution_mode": "off",
        "language": language,
        "include_patterns": [f"{page}.md" for page in french.pages(docs)] if language == "fr" else ["**"],
        "exclude_patterns": ["_*"],
        "locale_dirs": ["_locale"],
        "gettext_compact": False,
        "suppress_warnings": ["toc.not_readable"],
        "myst_heading_anchors": 4,
        "myst_enable_extensions": ["dollarmath"],
        "html_theme": "furo",
        "templates_path": [str(DOCS / "_templates")],
        "html_sidebars": {"**": ["sidebar/language.html"]},
    }
    with docutils_namespace():
        Sphinx(docs, None, out, out / "read", "html", overrides, status=None, warning=warnings).build()
    translators.clear()  # which Sphinx keeps from one build of a process to the next
    return warnings.getvalue()


def test_pages_are_in_french_and_lead_to_each_other(docs, tmp_path):
    site = tmp_path / "site"
    assert build(docs, site / "fr") == ""
    page = (site / "fr" / "index.html").read_text()
    assert '<html class="no-js" lang="fr"' in page
    assert "Une cellule est un endroit de la carte." in page
    assert "A cell is" not in page
    assert (
        '<a class="english reference external" href="../plan.html#words"><span class="xref myst">le plan</span></a>'
        in page
    )
    assert 'href="learn/windows.html"' in page
    assert 'alt="Un dessin"' in page
    assert '<a href="../index.html" lang="en" hreflang="en">English</a>' in page
    assert not (site / "fr" / "plan.html").exists()

    assert build(docs, site, "en") == ""
    for name, other in (("index", "fr/index"), ("learn/windows", "../fr/learn/windows"), ("plan", "fr/index")):
        page = (site / f"{name}.html").read_text()
        assert '<html class="no-js" lang="en"' in page
        assert f'<a href="{other}.html" lang="fr" hreflang="fr">Français</a>' in page


def test_a_paragraph_without_french_fails_every_build(docs, tmp_path):
    translate(docs, "learn/windows", {"Windows": "Windows", "A window slides.": ""})
    for _ in range(2):  # the second reads nothing anew
        warnings = build(docs, tmp_path / "fr")
        assert "learn/windows: 'A window slides.' has no French" in warnings
        assert "learn/windows: 'Windows' is English in the French page" in warnings
    assert warnings.count("WARNING") == 2


def test_catalogues_follow_the_pages(docs, tmp_path):
    assert update(docs) == []
    file = docs / french.CATALOGUES / "index.po"
    before = file.read_text()
    assert "stays" not in before  # code is nowhere but in the page
    assert "na2d" not in before
    page = docs / "index.md"
    text = page.read_text().replace("a place of the map", "one place of the map")
    page.write_text(text.replace("![A drawing](drawing.svg)", "Something else."))
    assert [text[:16] for text in update(docs)] == ["index: A cell is", "index: Something"]
    catalogue = {message.id: message for message in read(docs, "index")}
    changed = next(message for text, message in catalogue.items() if "one place" in text)
    assert changed.fuzzy
    assert changed.string.startswith("Une cellule")
    assert "Un dessin" not in file.read_text()
    assert "has no French" in build(docs, tmp_path / "fr")  # what is fuzzy is not taken
    update(docs)
    again = file.read_text()
    update(docs)
    assert file.read_text() == again


@pytest.mark.parametrize(
    ("english", "translation", "fault"),
    [
        ("`ns.Window(7)`, $k^2$", "", None),
        ("[NATTEN](natten.md)", "", None),
        (r"y = \operatorname{softmax}(x)", "", None),
        ("What?", "Quoi\u202f?", None),
        ("What?", "", "has no French"),
        ("What?", "What?", "is English"),
        ("What?", "Quoi ?", "space"),
        ("What?", "Quoi?", "space"),
        ("**So:** `x: y`", "**Donc\u00a0:** `x: y`", None),
        ("**So:** `x: y`", "**Donc :** `x: y`", "space"),
        ("a [link](x.md); b", "un [lien](x.md)\u202f; b", None),
        ("the \u201cword\u201d", "le \u00ab mot \u00bb", "space"),
        ("the \u201cword\u201d", "le \u00ab\u00a0mot\u00a0\u00bb", None),
    ],
)
def test_what_is_french(english, translation, fault):
    found = french.faults(english, translation)
    assert (found == []) if fault is None else fault in found[0]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)


def numbers(text: str) -> set[str]:
    """Those of the prose, each in the English way."""
    prose = re.sub(r"^```.*?^```$|`[^`]*`|\]\([^)]*\)|https?://\S+", "", text, flags=re.MULTILINE | re.DOTALL)
    return {number.replace(",", ".") for number in re.findall(r"\d+(?:[.,]\d+)?", prose)}


def readme_faults(english: str, translation: str) -> list[str]:
    """What README.fr.md has that README.md has not."""
    found = [f"no block of README.md: {block}" for block in blocks(translation) if block not in blocks(english)]
    found += [f"README.md has no {number}" for number in sorted(numbers(translation) - numbers(english))]
    for paragraph in re.split(r"\n{2,}", re.sub(r"^```.*?^```$", "", translation, flags=re.MULTILINE | re.DOTALL)):
        found += french.faults("A paragraph.", paragraph) if paragraph.strip() else []
    return found


def test_the_french_readme_shows_the_code_and_the_numbers_of_the_english_one():
    english, translation = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.fr.md"))
    assert len(blocks(translation)) == 2
    assert "(README.fr.md)" in english
    assert "(README.md)" in translation
    assert readme_faults(english, translation) == []
    assert "README.md has no 1.46" in readme_faults(english, translation.replace("1,26 fois", "1,46 fois"))
    assert "no block" in readme_faults(english, translation.replace("stride=2", "stride=4"))[0]
    assert "space" in readme_faults(english, translation.replace("\u00a0:", " :"))[0]


def test_the_glossary_has_the_words_of_the_design():
    """Each word of the design's table, by the name that it has there."""
    table = (DOCS / "design.md").read_text().partition("## The words")[2].partition("\n\nLetters")[0]
    cells = re.findall(r"^\| (?!word|-)(.*?) \|", table, re.MULTILINE)
    glossary = (DOCS / "learn" / "glossary.md").read_text().lower()
    for word in [word for cell in cells for word in cell.replace("`", "").split(", ")]:
        assert word.lower() in glossary, word
    assert len(cells) > 10


def test_what_one_begins_and_learns_with_is_in_french():
    pages = [file for pattern in update_french.PAGES for file in DOCS.glob(pattern)]
    assert {page.relative_to(DOCS).with_suffix("").as_posix() for page in pages} - set(french.pages(DOCS)) == set()
    assert len(pages) > 10
