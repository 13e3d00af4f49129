# SPDX-License-Identifier: Apache-2.0
"""Packages that a part of nearsight alone needs: asked for where that part is used, by the extra that brings them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from .errors import PackageError

PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn"}  # what pip calls a module that has another name
# What a run uses in its course, from the first picture to the report.
TRAINING = ("lightning", "torchmetrics", "sklearn", "scipy", "matplotlib", "jinja2", "rich")


def need(modules: Sequence[str], what: str, extra: str) -> None:
    """See that modules are there before work begins that could not be ended without them.

    Args:
        modules: by the names under which they are imported; none is imported here.
        what: that needs them, as the first words of the message.
        extra: of pyproject.toml, which brings them.

    Raises:
        PackageError: some are not installed; the message names them and the extra.

    Example:
        >>> need(["json"], "the page", "explore")
    """
    missing = [PACKAGE_OF.get(name, name) for name in modules if find_spec(name) is None]
    if missing:
        raise PackageError(f"{what} needs {', '.join(missing)}: pip install 'nearsight[{extra}]'")
