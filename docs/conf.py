# SPDX-License-Identifier: Apache-2.0
"""The documentation site: `make docs` builds it into build/docs/html, asks nothing of a network, and takes no warning.

With `-t french` it is the pages that are in French: those that have a catalogue in docs/_locale.
"""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_site"))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the notebooks: two at a time, one core each

project = "nearsight"
author = "The nearsight authors"
copyright = author
highlight_language = "none"
version = release = version_of("nearsight")
root_doc = "index"
exclude_patterns = ["_*", "images", "**/*.py", "gallery/examples/*.ipynb", "results/measured"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinxarg.ext",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "notfound.extension",
    "docstrings",
    "pages_outside",
    "parsers",
    "mathjax_of_pip",
    "languages",
    "explorers",
    "papers",
    "pictures",
    "rooms",
    "notebooks",
    "llms",
    "links_of_html",
]

# Pages are plain Markdown, which is read where the code is kept as well; those of the course are notebooks.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE.parent / "build" / "docs" / "cells")
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # of a cell, on a machine that does other things as well
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries say of the machine; an error stops the build all the same

autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_use_ivar = True
templates_path = ["_templates"]

# Examples run once, and again where they changed. Its page of times would load from elsewhere.
sphinx_gallery_conf = {
    "examples_dirs": ["../examples"],
    "gallery_dirs": ["gallery/examples"],
    "ignore_pattern": r"(^|/)(?!plot_)[^/]*\.py$",
    "backreferences_dir": "gallery/examples/using",
    "doc_module": ("nearsight",),
    "reference_url": {"nearsight": None},
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "show_signature": False,
    "write_computation_times": False,
}

gettext_compact = False
gettext_uuid = False
locale_dirs = ["_locale"]

html_theme = "furo"
html_title = f"nearsight {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
notfound_urls_prefix = ""
copybutton_exclude = ".linenos, .gp, .go"
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}

if tags.has("french"):  # noqa: F821, which Sphinx gives to this file
    from french import pages

    language = "fr"
    copyright = "Les auteurs de nearsight"
    include_patterns = [f"{page}.md" for page in pages(HERE)]
    extensions.remove("notfound.extension")
    extensions.remove("llms")
    extensions[extensions.index("links_of_html")] = "french"  # links are checked when both languages are there
    suppress_warnings = ["toc.not_readable"]  # the menu leads to pages that are in French
    nb_code_prompt_show, nb_code_prompt_hide = "Afficher le code", "Masquer le code"
