# SPDX-License-Identifier: Apache-2.0
"""The native kernel as a backend: what it takes, where another is faster, and how it is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from ...private import below_autograd, constant_to_compilers
from ...window import BORDERS
from ..problem import Call, Problem
from . import operators, projected
from .library import AUTO, DTYPES, ISAS, OK, SCALARS, c_problem, find, instruction_set, loaded, text

name = "native"
takes_groups = False

_WANTED: ContextVar[bool] = ContextVar("attention as operators of nearsight", default=False)
_isa = AUTO  # leaves the choice to the environment variable NEARSIGHT_ISA, and without it to the processor


@constant_to_compilers
def unavailable() -> str | None:
    library = find()
    if isinstance(library, str):
        return library
    if below_autograd is None:
        return f"PyTorch {torch.__version__} has no torch._C._AutoDispatchBelowAutograd, which the kernel is called through"
    instruction_set()
    return None


def why_not(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"the native kernel is for the CPU; the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"the native kernel takes float32 and bfloat16; the tensors are {problem.dtype}"
    if problem.forward_ad:
        return "the native kernel has no forward-mode derivative"
    if any(isinstance(axis.kernel_size, Tensor) for axis in problem.axes):
        return "a trace leaves the size of the map open, on which the block depends here"
    if problem.head_dim < 1 or problem.value_dim < 1:
        return "the native kernel takes vectors of at least one channel"
    # A compiler knows sizes by their symbols only; then the kernel itself has to refuse, when it runs.
    return None if problem.compiling else _refusal(problem, _isa)


def second_best(problem: Problem) -> str | None:
    if problem.exporting and _WANTED.get():
        return None
    if problem.exporting:
        return "an exported program of PyTorch's own operators runs without nearsight"
    # Measured on AVX-512: 0.6 of dense's time for head_dim 8 and with tables, up to twice its time otherwise.
    if problem.covers and problem.head_dim >= 16 and not (problem.bias or problem.relative):
        return "where the block covers the map, plain matrix products are faster"
    return None


def attend(call: Call, problem: Problem) -> tuple[Tensor, Tensor]:
    query, key, value, bias, relative, scale = call
    geometry = (*_geometry(problem), scale, _isa)
    bias = None if bias is None else bias.to(SCALARS)
    relative = [table.to(SCALARS) for table in relative or ()]
    if problem.compiling or problem.exporting:
        return operators.attend(query, key, value, bias, relative, *geometry)
    # What the operator would do, sooner, and for torch.func's derivatives too.
    return operators.attend_above_autograd(query, key, value, bias, relative, *geometry)


def project_and_attend(
    x: Tensor,
    weight: Tensor,
    offset: Tensor | None,
    tables: tuple[Tensor | None, Sequence[Tensor] | None],
    num_heads: int,
    qk_channels: int,
    scale: float,
    problem: Problem,
    frugal: bool,
) -> Tensor | None:
    """What ``attend`` makes of the projected x, (B, C, *map), by one operator for both; None where two are faster."""
    if not projected.serves(problem, x.shape[1], frugal):
        return None
    bias, relative = tables
    bias = None if bias is None else bias.to(SCALARS)
    relative = [table.to(SCALARS) for table in relative or ()]
    layer = (x, weight, offset, bias, relative, num_heads, qk_channels)
    return projected.project_and_attend_above_autograd(*layer, False, *_geometry(problem), scale, _isa)[0]


@lru_cache(maxsize=1024)
def _refusal(problem: Problem, isa: int) -> str | None:
    value_dim = problem.value_dim + (problem.needs_grad and problem.lse)  # see _with_lse
    sizes = (problem.batch, problem.num_heads, problem.head_dim, value_dim, problem.in_size)
    library = loaded()
    error = library.nearsight_check(
        c_problem(problem.dtype, *sizes, *_geometry(problem), 1.0, isa, num_threads=1),
        problem.needs_grad,
    )
    return None if error == OK else f"{text(error, library)}; received {_received(problem)}"


def _received(problem: Problem) -> str:
    kernel_size = tuple(axis.kernel_size for axis in problem.axes)
    gradients = " and its gradients" if problem.needs_grad else ""
    channels = f"{problem.head_dim} and {problem.value_dim} channels"
    return f"a map {problem.in_size} of {channels} under a kernel_size of {kernel_size}{gradients}"


def _geometry(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """The windows as the library and the operators take them: kernel_size, stride and so on, each of all axes."""
    axes = problem.axes
    return (
        tuple(axis.kernel_size for axis in axes),
        tuple(axis.stride for axis in axes),
        tuple(axis.dilation for axis in axes),
        tuple(int(axis.causal) for axis in axes),
        tuple(axis.shared_by for axis in axes),
        tuple(BORDERS.index(axis.border) for axis in axes),
    )


@contextmanager
def as_operators() -> Iterator[None]:
    """What ``torch.export`` writes meanwhile keeps ``nearsight::attend``, in place of PyTorch's own operators."""
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


@contextmanager
def use_variant(variant: str) -> Iterator[None]:
    """Run what is attended inside with one of :func:`variants`, its gradients too wherever they are taken."""
    global _isa
    before, _isa = _isa, ISAS.index(variant)
    try:
        yield
    finally:
        _isa = before
