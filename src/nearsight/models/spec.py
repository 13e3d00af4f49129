# SPDX-License-Identifier: Apache-2.0
"""How a network is written where only text fits."""

from __future__ import annotations

import re
from typing import Any

import timm

from ..errors import OptionError
from ..files import read_yaml

ELSEWHERE = ("hf-hub:", "local-dir:")  # what a name begins with that is not a registered one
GIVEN = "python:"  # and that of a network or data that were there as objects: it stands for what no name makes again


def given_name(thing: object) -> str:
    """What stands where only text fits for an object of Python's: the name of its class.

    Example:
        >>> given_name(nn.Sequential())
        'python:Sequential'
    """
    return GIVEN + type(thing).__name__


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME,option=value,option=value``, the way in which a network is written where only text fits.

    A name is found whatever its capitals, hyphens and underscores are, where that leaves no choice.

    Values are YAML: numbers, ``true``, ``none`` (the word; ``null`` is Python's None), lists as ``[3, 5, 7]``.

    Raises:
        OptionError: what follows the name is not a list of options.

    Example:
        >>> parse_spec("sasa_micro,kernel_size=[3, 5, 7],position=none")
        ('sasa_micro', {'kernel_size': [3, 5, 7], 'position': 'none'})
    """
    name, separator, options = spec.partition(",")
    name = _as_registered(name.strip())
    if not separator:
        return name, {}
    try:
        values = read_yaml("{" + re.sub(r"(\w+)\s*=", r"\1: ", options) + "}")
        complete = all(
            isinstance(option, str) and re.search(rf"\b{re.escape(option)}\s*=", options) for option in values
        )
    except ValueError:
        complete = False
    if not complete:
        raise OptionError(f"a model is written NAME,option=value,option=value; received {spec!r}")
    twice = [option for option in values if len(re.findall(rf"\b{re.escape(option)}\s*=", options)) > 1]
    if twice:  # YAML takes the last one without a word
        raise OptionError(f"a model has each option once; received {twice[0]} twice in {spec!r}")
    return name, values


def _as_registered(name: str) -> str:
    """A name as timm has it, where it is one but for capitals, hyphens, blanks and underscores: SASA-ResNet-50."""
    base, dot, tag = name.partition(".")
    if timm.is_model(base) or name.startswith(ELSEWHERE):
        return name
    alike = [known for known in timm.list_models() if _plain(known) == _plain(base)]
    return f"{alike[0]}{dot}{tag}" if len(alike) == 1 else name


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).lower()
