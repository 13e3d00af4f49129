# SPDX-License-Identifier: Apache-2.0
"""Binds the kernel in csrc/: local attention on the CPU, forward and backward, by SIMD. The only file that knows ctypes.

The library speaks the plain C of csrc/nearsight.h, so one build serves every Python and every PyTorch. Two operators,
``nearsight::attend`` and ``nearsight::attend_backward``, carry it through autograd, torch.compile, torch.export and vmap.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError, DtypeError, OptionError, ShapeError
from ..private import below_autograd, constant_to_compilers
from ..window import BORDERS, Window
from .problem import Call, Problem, describe

name = "native"
takes_groups = False

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # of query, key, value, the output and their gradients
SCALARS = torch.float32  # of tables and the log-sum-exp, and of their gradients
ISAS = ("auto", "baseline", "avx2", "avx512", "neon")
AUTO = ISAS.index("auto")


# ------------------------------------------------------------------------------------------------- a backend's protocol


@constant_to_compilers
def unavailable() -> str | None:
    library = _library()
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
    if problem.head_dim < 1 or problem.value_dim < 1:
        return "the native kernel takes vectors of at least one channel"
    # A compiler knows sizes by their symbols only; then the kernel itself has to refuse, when it runs.
    return None if problem.compiling else _refusal(problem, _isa)


def second_best(problem: Problem) -> str | None:
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
    if torch.compiler.is_compiling():
        return _attend(query, key, value, bias, relative, *geometry)
    # What the operator would do, sooner, and for torch.func's derivatives too.
    return _attend_above_autograd(query, key, value, bias, relative, *geometry)


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
        *others, last = ("auto", *variants())
        raise BackendError(
            f"NEARSIGHT_ISA must be {', '.join(others)} or {last} on this machine; "
            f"received {os.environ.get('NEARSIGHT_ISA')!r}"
        )
    return ISAS[isa]


# ----------------------------------------------------------------------------------------- csrc/nearsight.h, line by line

ABI_VERSION = 4
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
    "nearsight_check": (ctypes.c_int, (_pointer(CProblem), ctypes.c_int32)),
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
def _library() -> ctypes.CDLL | str:
    """The library, or the reason why there is none."""
    # In an editable installation the package has two folders: that of the sources and that of what was built.
    folders = [Path(folder) for folder in sys.modules[str(__package__)].__path__]
    path = next((path for folder in folders if (path := folder / f"libnearsight{SUFFIX}").exists()), None)
    if path is None:
        return (
            f"there is no native kernel, and 'blocked' serves: {_why_not_built()}. Mend that and install nearsight again, "
            "past pip's cache: pip install --no-cache-dir --force-reinstall --no-deps nearsight, or . in a checkout"
        )
    try:
        return load(path)
    except BackendError as error:
        return str(error)


def _why_not_built() -> str:
    """What csrc/build_backend.py kept of a build that failed: its first line is the reason, the log follows."""
    try:
        installed = metadata.distribution("nearsight")
        kept = installed.read_text("no-kernel.txt")
    except metadata.PackageNotFoundError:
        return "nearsight was not installed, it runs from a folder of sources"
    if not kept:
        return "its library was not among the installed files, and no failed build is on record"
    files = (file for file in installed.files or () if file.name == "no-kernel.txt")
    log = next((f" (the log: {installed.locate_file(file)})" for file in files), "")
    return f"when nearsight was installed, {kept.splitlines()[0]}{log}"


# The threads of the OpenMP runtime, which PyTorch may have used, do not survive a fork, and waiting for them would hang. The
# library sees the forks that happen after it was loaded, which may be in the child.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _num_threads() -> int:
    return 1 if _forked else torch.get_num_threads()


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


_SMALLEST = _c_problem(torch.float32, 1, 1, 1, 1, *[(1,)] * 4, (0,), (1,), (0,), 1.0, AUTO, 1)


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


@lru_cache(maxsize=1024)
def _refusal(problem: Problem, isa: int) -> str | None:
    value_dim = problem.value_dim + (problem.needs_grad and problem.lse)  # see _with_lse
    sizes = (problem.batch, problem.num_heads, problem.head_dim, value_dim, problem.in_size)
    library = _loaded()
    error = library.nearsight_check(
        _c_problem(problem.dtype, *sizes, *_geometry(problem), 1.0, isa, num_threads=1),
        problem.needs_grad,
    )
    return None if error == OK else f"{_text(error, library)}; received {_received(problem)}"


def _received(problem: Problem) -> str:
    kernel_size = tuple(axis.kernel_size for axis in problem.axes)
    gradients = " and its gradients" if problem.needs_grad else ""
    channels = f"{problem.head_dim} and {problem.value_dim} channels"
    return f"a map {problem.in_size} of {channels} under a kernel_size of {kernel_size}{gradients}"


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

# Whole numbers all: torch.jit.trace takes no list of bools or strings. `border` holds indices into BORDERS.
_WINDOW = "SymInt[] kernel_size, int[] stride, int[] dilation, int[] causal, int[] shared_by, int[] border"
_GEOMETRY = f"{_WINDOW}, float scale, int isa"
_OPERATORS = torch.library.Library("nearsight", "FRAGMENT")
_OPERATORS.define(
    f"attend(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] relative, {_GEOMETRY}) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
# `wanted`: which gradients to return, of query, key, value, bias and relative (all axes or none), in this order.
_OPERATORS.define(
    "attend_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] relative, Tensor out, "
    f"Tensor lse, bool[] wanted, {_GEOMETRY}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_attend = torch.ops.nearsight.attend.default
_attend_backward = torch.ops.nearsight.attend_backward.default


def _forward(query, key, value, bias, relative, *geometry):
    library, problem = _loaded(), _checked(query, key, value, bias, relative, *geometry)
    bias, relative = _contiguous(bias, relative)
    out, lse = _outputs(query, key, value)
    inputs = _c_inputs(query, key, value, bias, relative)
    _check(library.nearsight_forward(problem, inputs, _c_tensor(out), lse.data_ptr()), library)
    return out, lse


def _backward(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    library, problem = _loaded(), _checked(query, key, value, bias, relative, *geometry)
    _check_results(grad, query, value, bias, relative, out, lse, wanted)
    bias, relative = _contiguous(bias, relative)
    lse = lse.contiguous()
    gradients = _gradients(query, key, value, bias, relative, wanted)
    *maps, for_bias, for_relative = _sorted(gradients, query, wanted)
    places = CGradients(
        *(None if place is None else _pointer(CTensor)(_c_tensor(place)) for place in maps),
        None if for_bias is None else for_bias.data_ptr(),
        tuple(place.data_ptr() for place in for_relative),
    )
    inputs = _c_inputs(query, key, value, bias, relative)
    _check(
        library.nearsight_backward(problem, inputs, _c_tensor(out), lse.data_ptr(), _c_tensor(grad), places), library
    )
    return gradients


def _contiguous(bias: Tensor | None, relative: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    return None if bias is None else bias.contiguous(), [table.contiguous() for table in relative]


# Anyone can call the operators, and C reads where it is told to: so they check what they are given, whoever gave it.


def _checked(query, key, value, bias, relative, *arguments) -> CProblem:
    """The problem in C, of tensors that fit together.

    Raises:
        ShapeError, DtypeError, OptionError: as ``local_attention``; here tables are float32, and heads are not grouped.
    """
    tensors = (query, key, value, *([] if bias is None else [bias]), *relative)
    kinds = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
    *geometry, scale, isa = arguments
    geometry = [tuple(one) for one in geometry]
    _check_kinds(kinds, bias is not None, *geometry, scale, isa)
    batch, heads, *size, head_dim = key.shape
    sizes = (batch, heads, head_dim, value.shape[-1], tuple(size))
    return _c_problem(query.dtype, *sizes, *geometry, scale, isa, _num_threads())


@lru_cache(maxsize=1024)
def _check_kinds(kinds, with_bias, kernel_size, stride, dilation, causal, shared_by, border, scale, isa) -> None:
    """Once for every problem; of tensors only the shapes and dtypes count."""
    query, key, value, *tables = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds)
    bias, relative = (tables[0], tables[1:]) if with_bias else (None, tables)
    window = Window(
        kernel_size,
        stride=stride,
        dilation=dilation,
        border=tuple(_named("border", one, BORDERS) for one in border),
        causal=tuple(_named("causal", one, (False, True)) for one in causal),
        shared_by=shared_by,
    )
    problem = describe(query, key, value, window, bias, relative or None)
    if problem.groups > 1:
        raise ShapeError(
            f"nearsight::attend takes as many heads of key as of query; received {key.shape[1]} and {query.shape[1]}"
        )
    if query.dtype not in DTYPES:
        raise DtypeError(f"nearsight::attend takes float32 and bfloat16; received {query.dtype}")
    _check_scalars(*tables)
    if not math.isfinite(scale):
        raise OptionError(f"scale must be finite; received {scale}")
    _named("isa", isa, ISAS)


def _named(name: str, index: int, values: tuple) -> Any:
    """What an index of an operator stands for."""
    if not 0 <= index < len(values):
        listed = ", ".join(map(str, values))
        raise OptionError(f"{name} must be 0 to {len(values) - 1}, one of {listed}; received {index}")
    return values[index]


def _check_scalars(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != SCALARS:
            raise DtypeError(f"tables and the log-sum-exp must be {SCALARS} for the kernel; received {tensor.dtype}")


def _check_results(grad, query, value, bias, relative, out, lse, wanted) -> None:
    """Of what a backward takes besides what the forward did."""
    shape = (*query.shape[:-1], value.shape[-1])
    for name, tensor in (("grad", grad), ("out", out)):
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} must be (batch, heads, *out, value_dim) = {shape}; received {tuple(tensor.shape)}"
            )
        if tensor.dtype != query.dtype:
            raise DtypeError(f"{name} must have the dtype of query, {query.dtype}; received {tensor.dtype}")
    if lse.shape != query.shape[:-1]:
        raise ShapeError(f"lse must be (batch, heads, *out) = {tuple(query.shape[:-1])}; received {tuple(lse.shape)}")
    _check_scalars(lse)
    if len(wanted) != 5 or (wanted[3] and bias is None) or (wanted[4] and not relative):
        raise OptionError(
            "wanted must be five flags, of query, key, value, bias and relative, of which the last two need their tables; "
            f"received {wanted}"
        )


def _outputs(query, key, value, *_) -> tuple[Tensor, Tensor]:
    """Memory for out and lse. The axes of out lie in the order of the query's: what comes heads last goes heads last."""
    lse = torch.empty(query.shape[:-1], dtype=SCALARS, device=query.device)
    if value.shape[-1] == query.shape[-1]:
        return torch.empty_like(query), lse
    order = _memory_order(query)
    sizes = [*query.shape[:-1], value.shape[-1]]
    out = query.new_empty([sizes[axis] for axis in order])
    return out.permute([order.index(axis) for axis in range(query.ndim)]), lse


def _memory_order(tensor: Tensor) -> list[int]:
    """The axes from the largest stride to the smallest."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)


def _gradients(query, key, value, bias, relative, wanted) -> list[Tensor]:
    """Memory for the gradients that are wanted.

    Maps mostly are the parts of one fused projection, and their gradients will be joined to its gradient. So where they can
    be, theirs come as one tensor, (B, 2*N*D + N*E, *map), that lies in memory as the projection does.
    """
    maps = (query, key, value)
    joined = _joined(*maps) if all(wanted[:3]) else None
    if joined is not None:
        found = [joined]
    else:
        found = [torch.empty_like(tensor) for tensor, want in zip(maps, wanted[:3], strict=True) if want]
    tables = [*([bias] if wanted[3] else []), *(relative if wanted[4] else [])]
    return [*found, *(torch.empty_like(table) for table in tables)]


def _joined(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """Memory for what all three are parts of; None for maps of several sizes, or where a head's channels are not channels
    of a map: right after the heads from the largest stride to the smallest.
    """
    batch, heads, *size, head_dim = query.shape
    order = _memory_order(query)
    after = order.index(1) + 1
    if query.shape != key.shape or key.shape[:-1] != value.shape[:-1] or order[after : after + 1] != [query.ndim - 1]:
        return None
    del order[after]
    sizes = [batch, heads * (2 * head_dim + value.shape[-1]), *size]
    memory = query.new_empty([sizes[axis] for axis in order])
    return memory.permute([order.index(axis) for axis in range(len(order))])


def _sorted(gradients: Sequence[Tensor], query: Tensor, wanted: Sequence[bool]):
    """The gradients of query, key, value and bias, each None if not wanted, and those of relative in a list."""
    if all(wanted[:3]) and gradients[0].ndim < query.ndim:
        parts = _parts(gradients[0], query.shape[1] * query.shape[-1])
        gradients = [*(part.unflatten(1, (query.shape[1], -1)).movedim(2, -1) for part in parts), *gradients[1:]]
    places = iter(gradients)
    return *(next(places) if want else None for want in wanted[:4]), list(places)


def _parts(joined: Tensor, width: int) -> tuple[Tensor, ...]:
    """Of query and key, ``width`` channels each, and of value, the rest."""
    return joined.split([width, width, joined.shape[1] - 2 * width], 1)


def _fake_backward(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    return _gradients(query, key, value, *_contiguous(bias, relative), wanted)


# ------------------------------------------------------------------------------------------------------------ autograd
# torch.library.register_autograd would do it in fewer lines, but 0.1 ms slower per call, as long as a small map takes, and
# not for torch.func.


class _Attend(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, bias, geometry, *relative):
        return _below_autograd(_attend, query, key, value, bias, relative, *geometry)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, bias, ctx.geometry, *relative = inputs
        out, lse = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias, out, lse, *relative)

    @staticmethod
    def backward(ctx, grad, grad_lse):
        if grad is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        needs, needs_relative = ctx.needs_input_grad[:4], ctx.needs_input_grad[5:]
        wanted = (*needs, any(needs_relative))
        query, key, value, bias, out, lse, *relative = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        tensors = (grad, query, key, value, bias, relative, out, lse)
        if grad_lse is not None:
            tensors = _with_lse(grad_lse, *tensors)
        found = _attend_backward_above_autograd(*tensors, wanted, *ctx.geometry)
        *maps, for_value, for_bias, for_relative = _sorted(found, query, wanted)
        if grad_lse is not None:
            maps = [None if one is None else one.to(query.dtype) for one in maps]
            for_value = None if for_value is None else for_value[..., :-1].to(query.dtype)
        return (*maps, for_value, for_bias, None, *(for_relative or [None] * len(relative)))


def _with_lse(grad_lse, grad, query, key, value, bias, relative, out, lse):
    """What the kernel's backward takes, with the gradient of the log-sum-exp in one more channel of value and out.

    The gradient of a logit is w * (grad . v - grad . out + grad_lse). A channel that holds 0 in the value, 1 in the gradient
    and -grad_lse in the output adds just that. It needs float32: half precision would round grad_lse.
    """
    one = torch.ones_like(grad_lse)[..., None]
    grad, query, key, value, out = (tensor.float() for tensor in (grad, query, key, value, out))
    wider = [torch.cat([grad, one], -1), query, key, F.pad(value, (0, 1)), bias, relative]
    return [*wider, torch.cat([out, -grad_lse[..., None]], -1), lse]


class _AttendBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(grad, wanted, geometry, query, key, value, bias, out, lse, *relative):
        tensors = (grad, query, key, value, bias, relative, out, lse)
        return tuple(_below_autograd(_attend_backward, *tensors, wanted, *geometry))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise BackendError(
            "the native kernel has no second derivative; with backend='blocked' there are derivatives of every order"
        )


def _attend_above_autograd(query, key, value, bias, relative, *geometry):
    if torch.is_grad_enabled():
        return _Attend.apply(query, key, value, bias, geometry, *relative)
    return _below_autograd(_attend, query, key, value, bias, relative, *geometry)


def _attend_backward_above_autograd(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    if torch.is_grad_enabled():  # someone may differentiate again, and has to be told
        return list(_AttendBackward.apply(grad, wanted, geometry, query, key, value, bias, out, lse, *relative))
    tensors = (grad, query, key, value, bias, relative, out, lse)
    return _below_autograd(_attend_backward, *tensors, wanted, *geometry)


def _below_autograd(operator, *args):
    with below_autograd():  # pyright: ignore[reportOptionalCall]
        return operator(*args)


# ---------------------------------------------------------------------------------------------------------------- vmap
# A mapped axis joins the heads: no head ever meets another.


def _attend_mapped(info, in_dims, query, key, value, bias, relative, *geometry):
    maps = [_join(*pair, 1, info.batch_size) for pair in zip((query, key, value), in_dims[:3], strict=True)]
    tables = _join_tables(bias, relative, in_dims[3:5], info.batch_size)
    out, lse = _attend(*maps, *tables, *geometry)
    return tuple(tensor.unflatten(1, (info.batch_size, -1)) for tensor in (out, lse)), (1, 1)


def _attend_backward_mapped(info, in_dims, grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    dims = (*in_dims[:4], *in_dims[6:8])
    maps = [_join(*pair, 1, info.batch_size) for pair in zip((grad, query, key, value, out, lse), dims, strict=True)]
    tables = _join_tables(bias, relative, in_dims[4:6], info.batch_size)
    gradients = _attend_backward(*maps[:4], *tables, *maps[4:], wanted, *geometry)
    of_maps = len(gradients) - wanted[3] - len(relative) * wanted[4]
    heads = [1 if place < of_maps else 0 for place in range(len(gradients))]
    found = [g.unflatten(axis, (info.batch_size, -1)) for g, axis in zip(gradients, heads, strict=True)]
    if all(wanted[:3]) and gradients[0].ndim < maps[0].ndim:
        # The channels of all mapped elements' queries came first, then keys, then values: now each element's own.
        parts = _parts(gradients[0], maps[1].shape[1] * maps[1].shape[-1])
        found[0] = torch.cat([part.unflatten(1, (info.batch_size, -1)) for part in parts], 2)
    return found, heads


def _join(tensor: Tensor, mapped: int | None, heads: int, count: int) -> Tensor:
    if mapped is None:
        tensor = tensor.unsqueeze(heads).expand(*tensor.shape[:heads], count, *tensor.shape[heads:])
    else:
        tensor = tensor.movedim(mapped, heads)
    return tensor.flatten(heads, heads + 1)


def _join_tables(bias: Tensor | None, relative: Sequence[Tensor], in_dims, count: int):
    bias = None if bias is None else _join(bias, in_dims[0], 0, count)
    return bias, [_join(table, dim, 0, count) for table, dim in zip(relative, in_dims[1] or (), strict=True)]


for _operator, _on_cpu, _autograd, _fake, _mapped in (
    ("attend", _forward, _attend_above_autograd, _outputs, _attend_mapped),
    ("attend_backward", _backward, _attend_backward_above_autograd, _fake_backward, _attend_backward_mapped),
):
    _OPERATORS.impl(_operator, _on_cpu, "CPU")
    _OPERATORS.impl(_operator, _autograd, "Autograd")
    torch.library.register_fake(f"nearsight::{_operator}", _fake, lib=_OPERATORS)
    torch.library.register_vmap(f"nearsight::{_operator}", _mapped, lib=_OPERATORS)
