# SPDX-License-Identifier: Apache-2.0
"""Pages of HTML: one file that needs nothing else, and in which nothing runs but what the package wrote.

What is filled in comes from outside: names of classes and layers, models, data. It is escaped. Should a place be missed, the
page's Content-Security-Policy keeps a browser from running it and from fetching anything: it allows the style and the script
that the package itself brings along, by their SHA-256, and pictures inside the page. Style attributes are not among that, so
no template and no drawing has any.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..extras import need
from .palette import as_css

TEMPLATES = Path(__file__).parent / "templates"
PALETTE = "palette.css"  # is made from palette.py


def render(template: str, **values: Any) -> str:
    """Fill in one of the pages in ``templates/``; a value that it wants and does not get is an error.

    The template puts the page's policy where ``policy`` stands, and ``file("page.css")`` in the place of a style or a
    script, which hold no values.
    """
    need(("jinja2",), "a page", "explore")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, meta
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    source = (TEMPLATES / template).read_text()
    others = [name for name in meta.find_referenced_templates(environment.parse(source)) if name]
    sources = [source, *((TEMPLATES / name).read_text() for name in others)]
    files = {name: _text(name) for name in re.findall(r'file\("(.*?)"\)', "".join(sources))}
    allowed = Markup(policy(files))
    return environment.get_template(template).render(policy=allowed, file=lambda name: Markup(files[name]), **values)


def frame(page: str, title: str) -> str:
    """A page inside a notebook: its scripts run, and reach nothing of the notebook.

    Example:
        >>> frame("<p>a</p>", "a page")[:36]
        '<iframe srcdoc="&lt;p&gt;a&lt;/p&gt;'
    """
    return (
        f'<iframe srcdoc="{escape(page)}" title="{escape(title)}" sandbox="allow-scripts allow-downloads" '
        'style="width: 100%; height: 860px; border: 0"></iframe>'
    )


def policy(files: Mapping[str, str]) -> str:
    """The Content-Security-Policy that allows these styles and scripts and no others.

    Args:
        files: their texts by their names, which end in .css or .js.

    Example:
        >>> policy({"run.js": "run()"}).split("; ")[-1]
        "script-src 'sha256-AvyuiL0SD1mVY3NNxR+V2uo+lhk6RMFrytWmRt6CrJQ='"
    """
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind, ending in (("style", ".css"), ("script", ".js")):
        texts = [text for name, text in files.items() if name.endswith(ending)]
        rules += [f"{kind}-src {' '.join(map(_source, texts))}"] if texts else []
    return "; ".join(rules)


def _text(name: str) -> str:
    """A style or script as it stands in a page: what would end its element there is an error."""
    text = as_css() if name == PALETTE else (TEMPLATES / name).read_text()
    assert "</" not in text, f"{name} holds what ends a style or script in a page"
    return text


def without_styles(svg: str) -> str:
    """An SVG of matplotlib whose style attributes have become attributes of their own, which the policy leaves alone."""
    svg = re.sub(r"<defs>\s*<style[^>]*>[^<]*</style>\s*</defs>", "", svg, count=1)
    svg = re.sub(r"<[a-zA-Z][^<>]*>", lambda tag: re.sub(r' style="([^"]*)"', _attributes, tag[0]), svg)
    # What that style element said of all there is: matplotlib's own default.
    return svg.replace("<svg", '<svg stroke-linejoin="round" stroke-linecap="butt"', 1)


def _attributes(style: re.Match[str]) -> str:
    declarations = (declaration.partition(":") for declaration in style[1].split(";") if declaration.strip())
    values = {name.strip(): value.strip() for name, _, value in declarations}
    # Short for several, and no attribute: matplotlib before 3.10 has it.
    short = re.fullmatch(r"(?:(italic|oblique) )?(?:(bold|\d+) )?([\d.]+px) (.+)", values.pop("font", ""))
    if short:
        names = ("font-style", "font-weight", "font-size", "font-family")
        values |= {name: value for name, value in zip(names, short.groups(), strict=True) if value}
    return "".join(f' {name}="{value}"' for name, value in values.items())


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
