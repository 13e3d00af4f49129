# SPDX-License-Identifier: Apache-2.0
"""What the commands take, read and refused alike: each mistake is one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError, OptionError
from ..extras import need

OF_THE_DATA = "the data's own"
IMPORT = "--import"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see {self.prog} --help")


def parser_of(command: str, description: str, epilog: str | None = None) -> _Parser:
    parser = _Parser(
        prog=f"nearsight {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _tell_of_import(parser)
    return parser


def without_imports(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command without ``--import MODULE``, and these modules: any command takes it, any number of times.

    Raises:
        OptionError: no word follows the last one.
    """
    words, modules = [], []
    rest = iter(arguments)
    for word in rest:
        if word == IMPORT:
            word = f"{IMPORT}={next(rest, '')}"
        if not word.startswith(f"{IMPORT}="):
            words.append(word)
            continue
        modules.append(word.removeprefix(f"{IMPORT}="))
        if not modules[-1]:
            raise OptionError(f"{IMPORT} needs a module: a dotted name, or a .py file")
    return words, modules


def _tell_of_import(parser: Any) -> None:
    """In the help; :func:`without_imports` reads it."""
    help = "run code of your own first, a dotted name or a .py file: it registers networks and positions"
    parser.add_argument(IMPORT, type=str, metavar="MODULE", default=argparse.SUPPRESS, help=help)


def parse(parser: Any, arguments: list[str], **kwargs: Any) -> Any:
    # argparse's own keeps to itself that the help could not be written.
    parser._print_message = lambda message, file=None: print(message, end="", file=file or sys.stderr)
    try:
        return parser.parse_args(arguments, **kwargs)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        unknown = next((word for word in arguments if word.startswith("--") and word.split("=")[0] not in flags), "")
        raise OptionError(f"{error}{near(unknown, flags)}; see {parser.prog} --help") from error


def with_config(parser: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What was typed, and for the rest what the file says that ``--config`` names."""
    if "config" not in given:
        return given

    from ..training.recipe import read_settings

    path = Path(given.pop("config"))
    if not path.exists():
        raise OptionError(f"--config: File does not exist: {path}")
    try:
        noted = parser.parse_object(read_settings(path, given), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return {**noted, **given}


def recipe_parser(command: str, description: str, epilog: str) -> Any:
    """One whose values may come from a file as well; :func:`add_recipe` adds the settings of a recipe."""
    need(("jsonargparse",), f"`nearsight {command}`", "train")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"nearsight {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        print_config=None,  # every run leaves its config.yaml
    )
    parser.add_argument("--config", type=str, help="YAML file of a recipe; flags win")
    _tell_of_import(parser)
    return parser


def add_recipe(parser: Any, hidden: Sequence[str] = ()) -> None:
    """A flag for every setting of a recipe, from the dataclass; those that are hidden may only stand in a file."""
    from dataclasses import fields

    from jsonargparse import ActionYesNo

    from ..training.recipe import Recipe

    for field in fields(Recipe):
        kind, help = field.metadata["kind"], field.metadata["help"]
        common = field.metadata["common"] if field.default is None else field.default
        if field.name != "data_root":
            help += f" (default: {OF_THE_DATA if common is None else common})"
        form = {"action": ActionYesNo(no_prefix="no-")} if kind is bool else {"type": kind}
        help = argparse.SUPPRESS if field.name in hidden else help
        parser.add_argument(flag(field.name), default=field.default, help=help, **form)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def near(word: str, known: Any) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
