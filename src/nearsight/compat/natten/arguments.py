# SPDX-License-Identifier: Apache-2.0
"""What NATTEN's clients write between the brackets: names, and orders that versions do not share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, TypeVar

from ...errors import OptionError

F = TypeVar("F", bound=Callable)


class ArgumentError(OptionError, TypeError):
    """A name that no version of NATTEN has. Also a TypeError, as Python's own: clients catch that to try older names."""


def names_its_arguments(function: F, name: str = "", like: Callable | None = None) -> F:
    """The function under a name of its own, which names an argument that it does not have, and the nearest that it has.

    ``help`` shows the arguments of ``like``, but for those that are there to be refused.
    """
    function.__name__ = function.__qualname__ = name or function.__name__
    parameters = signature(like or function).parameters.values()
    shown = [one for one in parameters if one.kind is not Parameter.VAR_POSITIONAL]
    names = [one.name for one in shown]

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        refuse_unknown(call.__name__, options, names)
        return function(*args, **options)

    call.__dict__["__signature__"] = Signature(shown)
    return call  # pyright: ignore[reportReturnType]


def refuse_unknown(name: str, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """Nothing, where all ``options`` are among the ``names`` of the arguments.

    Raises:
        ArgumentError: one is not; the message names the nearest.
    """
    for option in options:
        if option not in names:
            near = get_close_matches(option, names, n=1)
            advice = f": did you mean {near[0]!r}?" if near else f"; it has {', '.join(names)}"
            raise ArgumentError(f"{name} has no argument {option!r}{advice}")


def only_reading(what: str, readings: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one meaning of unnamed arguments whose order changed: of versions, those under which they make sense.

    Raises:
        OptionError: they make sense under several, and do not mean the same.
    """
    first, *others = readings.values()
    if all(other == first for other in others):
        return first
    meanings = " and ".join(
        f"{', '.join(f'{name}={value}' for name, value in reading.items())} {version}"
        for version, reading in readings.items()
    )
    raise OptionError(f"{what} means {meanings}: say which by names")
