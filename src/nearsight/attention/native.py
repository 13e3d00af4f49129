# SPDX-License-Identifier: Apache-2.0
"""Binds the kernel in csrc/: local attention on the CPU, forward and backward, by SIMD. The only file that knows ctypes.

The library speaks the plain C of csrc/nearsight.h, so one build serves every Python and every PyTorch. Two operators,
``nearsight::attend`` and ``nearsight::attend_backward``, carry it through autograd, torch.compile, torch.export and vmap.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..window import Axis
from .problem import Problem

name = "native"

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
BORDERS = ("mask", "zeros", "wrap", "shift")
ISAS = ("auto", "baseline", "avx2", "avx512", "neon")
AUTO = ISAS.index("auto")


# ------------------------------------------------------------------------------------------------- a backend's protocol


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    library = _library()
    if isinstance(library, str):
        return library
    instruction_set()
    return None


def why_not(problem: Problem) -> str | None:
    if problem.device != "cpu":
        return f"the native kernel is for the CPU; the tensors are on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"the native kernel takes float32 and bfloat16; the tensors are {problem.dtype}"
    if problem.forward_ad:
        return "the native kernel has no forward-mode derivative"
    if problem.head_dim < 1 or problem.value_dim < 1:
        return "the native kernel takes vectors of at least one channel"
    # A compiler knows sizes by their symbols only; then the kernel itself has to refuse, when it runs.
    return None if torch.compiler.is_compiling() else _refusal(problem)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    problem: Problem,
    bias: Tensor | None,
    relative: Sequence[Tensor] | None,
    scale: float,
) -> Tensor:
    out, _ = torch.ops.nearsight.attend.default(
        query,
        key,
        value,
        None if bias is None else bias.float(),
        [table.float() for table in relative or ()],
        [axis.kernel_size for axis in problem.axes],
        [axis.stride for axis in problem.axes],
        [axis.dilation for axis in problem.axes],
        [axis.causal for axis in problem.axes],
        problem.axes[0].border,
        scale,
        _isa,
    )
    return out


# ----------------------------------------------------------------------------------------------------- instruction sets

_isa = AUTO  # leaves the choice to the environment variable NEARSIGHT_ISA, and without it to the processor


def variants() -> tuple[str, ...]:
    """The instruction sets that this build has and this processor can run."""
    available = _loaded().nearsight_available_isas()
    return tuple(isa for number, isa in enumerate(ISAS) if available >> number & 1)


@contextmanager
def use_variant(variant: str) -> Iterator[None]:
    """Run what is attended inside with one of :func:`variants`, its gradients too wherever they are taken."""
    global _isa
    before, _isa = _isa, ISAS.index(variant)
    try:
        yield
    finally:
        _isa = before


def instruction_set() -> str:
    """The instruction set in use: the widest, or the one that the environment variable NEARSIGHT_ISA names.

    Raises:
        BackendError: there is no library, or NEARSIGHT_ISA is none of the names that can run here.
    """
    library = _loaded()
    isa = library.nearsight_default_isa()
    if isa < 0:
        raise BackendError(
            f"NEARSIGHT_ISA must be auto, {' or '.join(variants())} on this machine, or not be set: {_text(-isa, library)}"
        )
    return ISAS[isa]


# ----------------------------------------------------------------------------------------- csrc/nearsight.h, line by line

ABI_VERSION = 1
OK, ERROR_VERSION = 0, 1


class CProblem(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("abi_version", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("border", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("causal", ctypes.c_int32 * 3),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("size", ctypes.c_int64 * 3),
        ("kernel", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
        ("dilation", ctypes.c_int64 * 3),
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
    "nearsight_check": (ctypes.c_int, (_pointer(CProblem),)),
    "nearsight_abi_version": (ctypes.c_int, ()),
    "nearsight_error_string": (ctypes.c_char_p, (ctypes.c_int,)),
    "nearsight_available_isas": (ctypes.c_int, ()),
    "nearsight_default_isa": (ctypes.c_int, ()),
    "nearsight_isa_name": (ctypes.c_char_p, (ctypes.c_int,)),
    "nearsight_has_openmp": (ctypes.c_int, ()),
}


def load(path: Path) -> ctypes.CDLL:
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
    if version != ABI_VERSION or library.nearsight_check(_SMALLEST) == ERROR_VERSION:
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
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    # In an editable installation the package has two folders: that of the sources and that of what was built.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    path = next((path for folder in folders if (path := folder / f"libnearsight{SUFFIX}").exists()), None)
    if path is None:
        return (
            "no C++17 compiler was found when nearsight was installed, so there is no native kernel and 'blocked' serves; "
            "with a compiler, install nearsight again"
        )
    try:
        return load(path)
    except BackendError as error:
        return str(error)


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise BackendError(library)
    return library


def _text(error: int, library: ctypes.CDLL) -> str:
    return library.nearsight_error_string(error).decode()


@lru_cache(maxsize=1024)
def _c_problem(
    dtype: torch.dtype,
    border: str,
    isa: int,
    num_threads: int,
    causal: tuple[bool, ...],
    batch: int,
    heads: int,
    head_dim: int,
    value_dim: int,
    size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    scale: float,
) -> CProblem:
    problem = CProblem(ctypes.sizeof(CProblem), ABI_VERSION, len(size), DTYPES[dtype], BORDERS.index(border), isa)
    problem.num_threads = num_threads
    problem.batch, problem.heads, problem.head_dim, problem.value_dim = batch, heads, head_dim, value_dim
    problem.scale = scale
    for axis in range(len(size)):
        problem.causal[axis] = causal[axis]
        problem.size[axis], problem.kernel[axis] = size[axis], kernel_size[axis]
        problem.stride[axis], problem.dilation[axis] = stride[axis], dilation[axis]
    return problem


_SMALLEST = _c_problem(torch.float32, "mask", AUTO, 1, (False,), 1, 1, 1, 1, (1,), (1,), (1,), (1,), 1.0)


@lru_cache(maxsize=1024)
def _refusal(problem: Problem) -> str | None:
    described = _c_problem(
        problem.dtype,
        problem.axes[0].border,
        AUTO,
        1,
        tuple(axis.causal for axis in problem.axes),
        problem.batch,
        problem.num_heads,
        problem.head_dim,
        problem.value_dim,
        problem.in_size,
        tuple(axis.kernel_size for axis in problem.axes),
        tuple(axis.stride for axis in problem.axes),
        tuple(axis.dilation for axis in problem.axes),
        1.0,
    )
    library = _loaded()
    error = library.nearsight_check(described)
    return None if error == OK else _text(error, library)


def _c_tensor(tensor: Tensor) -> CTensor:
    return CTensor(tensor.data_ptr(), tensor.stride())


def _c_inputs(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, relative: Sequence[Tensor]) -> CInputs:
    """Tables have to be contiguous; the caller keeps them alive."""
    return CInputs(
        _c_tensor(query),
        _c_tensor(key),
        _c_tensor(value),
        None if bias is None else bias.data_ptr(),
        tuple(table.data_ptr() for table in relative),
    )


def _check(error: int, library: ctypes.CDLL) -> None:
    if error != OK:
        raise BackendError(f"the native kernel cannot run this: {_text(error, library)}; backend='blocked' can")


# ------------------------------------------------------------------------------------------------------- two operators

_GEOMETRY = "SymInt[] kernel_size, int[] stride, int[] dilation, bool[] causal, str border, float scale, int isa"
_OPERATORS = torch.library.Library("nearsight", "FRAGMENT")
_OPERATORS.define(
    f"attend(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] relative, {_GEOMETRY}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# `wanted` says which gradients to return, in the order query, key, value, bias, relative (all axes or none).
_OPERATORS.define(
    "attend_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] relative, Tensor out, "
    f"Tensor lse, bool[] wanted, {_GEOMETRY}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(query, key, value, bias, relative, kernel_size, stride, dilation, causal, border, scale, isa):
    library = _loaded()
    out, lse = _outputs(query, key, value)
    bias = None if bias is None else bias.contiguous()
    relative = [table.contiguous() for table in relative]
    problem = _describe(query, key, value, kernel_size, stride, dilation, causal, border, scale, isa)
    inputs = _c_inputs(query, key, value, bias, relative)
    _check(library.nearsight_forward(problem, inputs, _c_tensor(out), lse.data_ptr()), library)
    return out, lse


def _backward(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    library = _loaded()
    bias = None if bias is None else bias.contiguous()
    relative = [table.contiguous() for table in relative]
    gradients = _gradients(query, key, value, bias, relative, wanted)
    places = iter(gradients)
    maps = [_pointer(CTensor)(_c_tensor(next(places))) if want else None for want in wanted[:3]]
    tables = CGradients(*maps, next(places).data_ptr() if wanted[3] else None)
    tables.relative = tuple(place.data_ptr() for place in places)
    problem = _describe(query, key, value, *geometry)
    inputs = _c_inputs(query, key, value, bias, relative)
    error = library.nearsight_backward(problem, inputs, _c_tensor(out), lse.data_ptr(), _c_tensor(grad), tables)
    _check(error, library)
    return gradients


def _describe(query, key, value, kernel_size, stride, dilation, causal, border, scale, isa) -> CProblem:
    batch, heads, *size, head_dim = key.shape
    return _c_problem(
        query.dtype,
        border,
        isa,
        torch.get_num_threads(),
        tuple(causal),
        batch,
        heads,
        head_dim,
        value.shape[-1],
        tuple(size),
        tuple(kernel_size),
        tuple(stride),
        tuple(dilation),
        scale,
    )


def _outputs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Fresh memory for out and lse. out has its axes in the query's order, so that heads last stays heads last."""
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    channels = value.shape[-1]
    if channels == query.shape[-1]:
        return torch.empty_like(query), lse
    order = sorted(range(query.ndim), key=query.stride, reverse=True)
    sizes = [*query.shape[:-1], channels]
    out = query.new_empty([sizes[axis] for axis in order])
    return out.permute([order.index(axis) for axis in range(query.ndim)]), lse


def _gradients(query, key, value, bias, relative, wanted) -> list[Tensor]:
    inputs = [tensor for tensor, want in zip((query, key, value, bias), wanted, strict=False) if want]
    inputs += relative if wanted[4] else []
    return [torch.empty_like(tensor) for tensor in inputs]


def _fake_backward(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    bias = None if bias is None else bias.contiguous()
    return _gradients(query, key, value, bias, [table.contiguous() for table in relative], wanted)


def _save(ctx, inputs, output) -> None:
    query, key, value, bias, relative, *ctx.geometry = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(query, key, value, out, lse, *([] if bias is None else [bias]), *relative)


def _differentiate(ctx, grad: Tensor | None, _: None):
    nothing = (None,) * len(ctx.geometry)
    query, key, value, out, lse, *tables = ctx.saved_tensors
    bias = tables.pop(0) if ctx.has_bias else None
    relative_wanted = [bool(need) for need in _needs(ctx.needs_input_grad[4])]
    if grad is None:
        return (None, None, None, None, [None] * len(tables), *nothing)
    wanted = [*ctx.needs_input_grad[:4], any(relative_wanted)]
    found = torch.ops.nearsight.attend_backward.default(
        grad, query, key, value, bias, tables, out, lse, wanted, *ctx.geometry
    )
    places = iter(found)
    first = [next(places) if want else None for want in wanted[:4]]
    relative = [next(places) for _ in tables] if wanted[4] else [None] * len(tables)
    return (*first, relative, *nothing)


def _needs(need: Any) -> Sequence[bool]:
    return need if isinstance(need, (list, tuple)) else (need,)


def _refuse(ctx, *_: Any):
    raise BackendError("the native kernel has no second derivative; backend='blocked' has derivatives of every order")


def _over_heads(operator, head_axes, out_axes):
    """The vmap rule of an operator: a mapped axis joins the heads, which never meet. None in head_axes: no tensor."""

    def rule(info, in_dims, *args):
        def join(arg, dim, axis):
            if arg is None or axis is None:
                return arg
            if isinstance(arg, (list, tuple)):
                return [join(one, one_dim, axis) for one, one_dim in zip(arg, dim, strict=True)]
            if dim is None:
                arg = arg.unsqueeze(axis).expand(*arg.shape[:axis], info.batch_size, *arg.shape[axis:])
            else:
                arg = arg.movedim(dim, axis)
            return arg.flatten(axis, axis + 1)

        joined = [join(*triple) for triple in zip(args, in_dims, head_axes, strict=True)]
        results = operator(*joined)
        axes = out_axes(*args)
        parted = [one.unflatten(axis, (info.batch_size, -1)) for one, axis in zip(results, axes, strict=True)]
        return (tuple(parted), tuple(axes)) if isinstance(results, tuple) else (parted, list(axes))

    return rule


_no_geometry = (None,) * 7
_OPERATORS.impl("attend", _forward, "CPU")
_OPERATORS.impl("attend_backward", _backward, "CPU")
torch.library.register_fake("nearsight::attend", _outputs, lib=_OPERATORS)
torch.library.register_fake("nearsight::attend_backward", _fake_backward, lib=_OPERATORS)
torch.library.register_autograd("nearsight::attend", _differentiate, setup_context=_save, lib=_OPERATORS)
torch.library.register_autograd("nearsight::attend_backward", _refuse, lib=_OPERATORS)
