# SPDX-License-Identifier: Apache-2.0
"""The library that csrc/ becomes: found, loaded, and spoken to in the C of csrc/nearsight.h.

The only file that knows ctypes. The interface is plain C, so one build serves every Python and every PyTorch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...built import built, why_not_built
from ...errors import BackendError

DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of query, key, value, the output and their gradients
SCALARS = torch.float32  # of tables and the log-sum-exp, and of their gradients
ISAS = ("auto", "baseline", "avx2", "avx512", "neon", "avx512_bf16")
AUTO = ISAS.index("auto")


# ----------------------------------------------------------------------------------------- csrc/nearsight.h, line by line

ABI_VERSION = 5
OK, ERROR_VERSION = 0, 1


class CProblem(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("abi_version", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("element_size", ctypes.c_int32),
        ("scalar_size", ctypes.c_int32),
        ("border", ctypes.c_int32 * 3),
        ("causal", ctypes.c_int32 * 3),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("size", ctypes.c_int64 * 3),
        ("kernel", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
        ("dilation", ctypes.c_int64 * 3),
        ("shared_by", ctypes.c_int64 * 3),
        ("scale", ctypes.c_double),
    )


class CTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 6))


class CInputs(ctypes.Structure):
    _fields_ = (
        ("query", CTensor),
        ("key", CTensor),
        ("value", CTensor),
        ("bias", ctypes.c_void_p),
        ("relative", ctypes.c_void_p * 3),
    )


class CProjection(ctypes.Structure):
    _fields_ = (
        ("input", CTensor),
        ("channels", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class CGradients(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.POINTER(CTensor)),
        ("key", ctypes.POINTER(CTensor)),
        ("value", ctypes.POINTER(CTensor)),
        ("bias", ctypes.c_void_p),
        ("relative", ctypes.c_void_p * 3),
    )


_pointer = ctypes.POINTER
PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {  # what it returns, what it takes
    "nearsight_forward": (
        ctypes.c_int,
        (_pointer(CProblem), _pointer(CInputs), _pointer(CTensor), ctypes.c_void_p),
    ),
    "nearsight_forward_projected": (
        ctypes.c_int,
        (_pointer(CProblem), _pointer(CProjection), _pointer(CInputs), _pointer(CTensor), ctypes.c_void_p),
    ),
    "nearsight_backward": (
        ctypes.c_int,
        (
            _pointer(CProblem),
            _pointer(CInputs),
            _pointer(CTensor),
            ctypes.c_void_p,
            _pointer(CTensor),
            _pointer(CGradients),
        ),
    ),
    "nearsight_check": (ctypes.c_int, (_pointer(CProblem), ctypes.c_int32)),
    "nearsight_abi_version": (ctypes.c_int, ()),
    "nearsight_error_string": (ctypes.c_char_p, (ctypes.c_int,)),
    "nearsight_available_isas": (ctypes.c_int, ()),
    "nearsight_default_isa": (ctypes.c_int, ()),
    "nearsight_isa_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "nearsight_has_openmp": (ctypes.c_int, ()),
}


# ------------------------------------------------------------------------------------------------- finding and loading


def load(path: str | PathLike[str]) -> ctypes.CDLL:
    """Load a library and make sure that it is the one of this file.

    Raises:
        BackendError: it cannot be loaded, or was built from another version of csrc/nearsight.h.
    """
    _share_openmp()
    try:
        library = ctypes.CDLL(str(path))
        for function, (result, arguments) in PROTOTYPES.items():
            getattr(library, function).restype = result
            getattr(library, function).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error
    version = library.nearsight_abi_version()
    if version != ABI_VERSION or library.nearsight_check(_SMALLEST, False) == ERROR_VERSION:
        raise BackendError(
            f"{path} has another interface, version {version} where this nearsight needs {ABI_VERSION}: "
            "it is left over from another installation; install nearsight again"
        )
    return library


def _share_openmp() -> None:
    """Make PyTorch's own OpenMP runtime visible to libraries loaded later: a second one would fight for the cores."""
    folder = Path(torch.__file__).parent
    own = [*folder.glob("lib/lib*omp*"), *folder.parent.glob("torch.libs/libgomp*")]
    for runtime in (*map(str, own), "libgomp.so.1"):
        try:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue  # without any, a library that needs one cannot be loaded and says so


@lru_cache(maxsize=1)
def find() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    path = built(str(__package__), "libnearsight")
    if path is None:
        return f"there is no native kernel, and 'blocked' serves: {why_not_built()}"
    try:
        return load(path)
    except BackendError as error:
        return str(error)


# The threads of the OpenMP runtime, which PyTorch may have used, do not survive a fork, and waiting for them would hang. The
# library sees the forks that happen after it was loaded, which may be in the child.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)


def num_threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def loaded() -> ctypes.CDLL:
    library = find()
    if isinstance(library, str):
        raise BackendError(library)
    return library


def text(error: int, library: ctypes.CDLL) -> str:
    return library.nearsight_error_string(error).decode()


@lru_cache(maxsize=1024)
def c_problem(
    dtype: torch.dtype,
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    causal: tuple[int, ...],
    shared_by: tuple[int, ...],
    border: tuple[int, ...],
    scale: float,
    isa: int,
    num_threads: int,
) -> CProblem:
    """Kept from call to call; the kernel only reads it."""
    rank = len(size)
    problem = CProblem(ctypes.sizeof(CProblem), ABI_VERSION, rank, DTYPES[dtype], isa, num_threads)
    problem.scale = scale
    problem.element_size, problem.scalar_size = dtype.itemsize, SCALARS.itemsize
    problem.batch, problem.heads, problem.head_dim, problem.value_dim = batch, heads, head_dim, value_dim
    problem.size[:rank], problem.kernel[:rank] = size, kernel_size
    problem.stride[:rank], problem.dilation[:rank], problem.causal[:rank] = stride, dilation, causal
    problem.shared_by[:rank], problem.border[:rank] = shared_by, border
    return problem


_SMALLEST = c_problem(torch.float32, 1, 1, 1, 1, *[(1,)] * 4, (0,), (1,), (0,), 1.0, AUTO, 1)


def c_tensor(tensor: Tensor) -> CTensor:
    return CTensor(tensor.data_ptr(), tensor.stride())


def c_inputs(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, relative: Sequence[Tensor]) -> CInputs:
    """Tables have to be contiguous; the caller keeps them alive."""
    return CInputs(
        c_tensor(query),
        c_tensor(key),
        c_tensor(value),
        None if bias is None else bias.data_ptr(),
        tuple(table.data_ptr() for table in relative),
    )


def c_gradients(maps: Sequence[Tensor | None], bias: Tensor | None, relative: Sequence[Tensor]) -> CGradients:
    """Where the gradients go of query, key and value, of bias and of relative; None is not wanted."""
    return CGradients(
        *(None if place is None else ctypes.pointer(c_tensor(place)) for place in maps),
        None if bias is None else bias.data_ptr(),
        tuple(place.data_ptr() for place in relative),
    )


def check(error: int, library: ctypes.CDLL) -> None:
    if error != OK:
        raise BackendError(f"the native kernel cannot run this: {text(error, library)}; backend='blocked' can")


# ----------------------------------------------------------------------------------------------------- instruction sets


def variants() -> tuple[str, ...]:
    """The instruction sets that this build has and this processor can run."""
    available = loaded().nearsight_available_isas()
    return tuple(isa for number, isa in enumerate(ISAS) if available >> number & 1)


def instruction_set() -> str:
    """The instruction set in use: what pays on this processor, or the one that the environment variable NEARSIGHT_ISA names.

    Raises:
        BackendError: there is no library, or NEARSIGHT_ISA is none of the names that can run here.
    """
    library = loaded()
    isa = library.nearsight_default_isa()
    if isa < 0:
        *others, last = ("auto", *variants())
        raise BackendError(
            f"NEARSIGHT_ISA must be {', '.join(others)} or {last} on this machine; "
            f"received {os.environ.get('NEARSIGHT_ISA')!r}"
        )
    return ISAS[isa]
