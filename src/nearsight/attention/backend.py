# SPDX-License-Identifier: Apache-2.0
"""What a backend is, which there are, and which of them serves a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import BackendError, OptionError
from . import blocked, dense, flex, native, natten, node, reference
from .problem import Call, Problem


class Backend(Protocol):
    """One way to compute the operation: a module with these names. To add one, write it and enter it in the list below."""

    name: str
    takes_groups: bool  # whether it is given more query heads than keys

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all."""
        ...

    def why_not(self, problem: Problem, /) -> str | None:
        """Why it cannot take a problem."""
        ...

    def second_best(self, problem: Problem, /) -> str | None:
        """Why a later one is the better choice, such as a measured speed: it is not chosen, but can be named."""
        ...

    def attend(self, call: Call, problem: Problem, /) -> tuple[Tensor, Tensor | None]:
        """The result (B, N, *out, E) and, where the problem asks for it, the log-sum-exp (B, N, *out)."""
        ...


BACKENDS: tuple[Backend, ...] = (native, natten, flex, dense, blocked, reference)  # in order of preference


def backends(problem: Problem | None = None) -> dict[str, str | None]:
    """Every backend with None, or the reason why it cannot run: on this machine, or the given problem.

    Example:
        >>> backends()["reference"] is None
        True
    """
    return {backend.name: _why_not(backend, problem) for backend in BACKENDS}


def _why_not(backend: Backend, problem: Problem | None) -> str | None:
    reason = backend.unavailable()
    return backend.why_not(problem) if reason is None and problem is not None else reason


def choose(problem: Problem, name: str | None) -> Backend:
    """The backend of that name, or the first that can and is not second best.

    Raises:
        OptionError: there is none of that name.
        BackendError: it cannot take the problem; the message says why and which can.
    """
    if _why_not(node, problem) is None:  # a graph is written, whoever would compute the operation here
        return node
    if name is None:
        able = (backend for backend in BACKENDS if _why_not(backend, problem) is None)
        return next(backend for backend in able if backend.second_best(problem) is None)
    for backend in BACKENDS:
        if backend.name == name:
            reason = _why_not(backend, problem)
            if reason is None:
                return backend
            able = [other for other, why in backends(problem).items() if why is None]
            raise BackendError(f"backend {name!r} cannot run this: {reason}. These can: {', '.join(able)}")
    raise _no_such(name)


def check_backend(name: str | None) -> None:
    """See that there is a backend of that name, whatever it can run.

    Raises:
        OptionError: there is none.
    """
    if name is not None and name not in {backend.name for backend in BACKENDS}:
        raise _no_such(name)


def _no_such(name: object) -> OptionError:
    names = ", ".join(backend.name for backend in BACKENDS)
    return OptionError(f"backend must be one of {names}, or None to choose; received {name!r}")


def attend(backend: Backend, call: Call, problem: Problem) -> tuple[Tensor, Tensor | None]:
    """What the backend makes of a call, of each key's query heads one at a time if it takes no groups."""
    groups = problem.groups
    if groups == 1 or backend.takes_groups:
        return backend.attend(call, problem)
    # The first query head of every key, then the second of every key, ...: keys and values stay where they are.
    one_each = replace(problem, groups=1)
    found = [backend.attend(_heads(call, slice(nth, None, groups)), one_each) for nth in range(groups)]
    outs, lses = zip(*found, strict=True)
    return torch.stack(outs, 2).flatten(1, 2), torch.stack(lses, 2).flatten(1, 2) if problem.lse else None


def _heads(call: Call, some: slice) -> Call:
    """The same call for some heads of the query."""
    bias = None if call.bias is None else call.bias[some]
    relative = None if call.relative is None else [table[some] for table in call.relative]
    return call._replace(query=call.query[:, some], bias=bias, relative=relative)
