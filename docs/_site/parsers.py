# SPDX-License-Identifier: Apache-2.0
"""The page of the command line, from the parser of each command of ``nearsight``, which is made without running it."""

from __future__ import annotations

import argparse
import textwrap
from importlib import import_module
from typing import Any
from unittest.mock import patch

from nearsight.cli import COMMANDS

PAGE = "reference/commands"
SECTION = """
{title}
{line}

.. argparse::
   :module: parsers
   :func: {command}
   :prog: {title}
   :nodefaultconst:
"""


class _Made(Exception):
    """A parser, on its way out of the command that made it."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """What a command made to read its arguments."""
    module = import_module(f"nearsight.commands.{command}")

    def caught(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Made(parser)

    with patch.object(module, "parse", caught):
        try:
            module.run([])
        except _Made as made:
            return _as_restructured_text(made.args[0])
    raise AssertionError(f"nearsight {command} reads no arguments")


def _as_restructured_text(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Its texts are written for a terminal: the examples are shown as they stand, and no star is markup."""
    if parser.epilog:
        parser.epilog = "::\n\n" + textwrap.indent(parser.epilog.strip("\n"), "    ")
    for action in parser._actions:
        if isinstance(action.help, str):
            action.help = action.help.replace("*", r"\*")
    return parser


def __getattr__(name: str) -> argparse.ArgumentParser:
    if name in COMMANDS:
        return parser_of(name)
    raise AttributeError(name)


def write(app: Any, docname: str, source: list[str]) -> None:
    """A section for each command, below the head of the page."""
    if docname == PAGE:
        for command in COMMANDS:
            title = f"nearsight {command}"
            source[0] += SECTION.format(command=command, title=title, line="-" * len(title))


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
