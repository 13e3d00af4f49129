# SPDX-License-Identifier: Apache-2.0
"""Two operators, ``nearsight::attend`` and ``nearsight::attend_backward``.

They carry the library through autograd, torch.compile, torch.export and vmap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DtypeError, OptionError, ShapeError
from ...private import below_autograd
from ...window import BORDERS, Window
from ..any_order import second_derivatives
from ..problem import Call, describe
from .library import (
    DTYPES,
    ISAS,
    SCALARS,
    CProblem,
    c_gradients,
    c_inputs,
    c_problem,
    c_tensor,
    check,
    loaded,
    num_threads,
)

# Whole numbers all: torch.jit.trace takes no list of bools or strings. `border` holds indices into BORDERS.
_WINDOW = "SymInt[] kernel_size, int[] stride, int[] dilation, int[] causal, int[] shared_by, int[] border"
_GEOMETRY = f"{_WINDOW}, float scale, int isa"
_OPERATORS = torch.library.Library("nearsight", "FRAGMENT")
# csrc/pytorch/attend.cpp registers this one too, for processes without Python: where it was first, it stays.
_FROM_CPP = {"attend"} if hasattr(torch.ops.nearsight, "attend") else set()
if not _FROM_CPP:
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
attend = torch.ops.nearsight.attend.default
attend_backward = torch.ops.nearsight.attend_backward.default


def _forward(query, key, value, bias, relative, *geometry):
    library, problem = loaded(), _checked(query, key, value, bias, relative, *geometry)
    bias, relative = _contiguous(bias, relative)
    out, lse = _outputs(query, key, value)
    inputs = c_inputs(query, key, value, bias, relative)
    check(library.nearsight_forward(problem, inputs, c_tensor(out), lse.data_ptr()), library)
    return out, lse


def _backward(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    library, problem = loaded(), _checked(query, key, value, bias, relative, *geometry)
    _check_results(grad, query, value, bias, relative, out, lse, wanted)
    bias, relative = _contiguous(bias, relative)
    lse = lse.contiguous()
    gradients = _gradients(query, key, value, bias, relative, wanted)
    *maps, for_bias, for_relative = _sorted(gradients, query, wanted)
    places = c_gradients(maps, for_bias, for_relative)
    inputs = c_inputs(query, key, value, bias, relative)
    check(library.nearsight_backward(problem, inputs, c_tensor(out), lse.data_ptr(), c_tensor(grad), places), library)
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
    return c_problem(query.dtype, *sizes, *geometry, scale, isa, num_threads())


@lru_cache(maxsize=1024)
def _check_kinds(kinds, with_bias, kernel_size, stride, dilation, causal, shared_by, border, scale, isa) -> None:
    """Once for every problem; of tensors only the shapes and dtypes count."""
    query, key, value, *tables = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in kinds)
    bias, relative = (tables[0], tables[1:]) if with_bias else (None, tables)
    window = _window(kernel_size, stride, dilation, causal, shared_by, border)
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


def _window(kernel_size, stride, dilation, causal, shared_by, border) -> Window:
    return Window(
        tuple(kernel_size),
        stride=tuple(stride),
        dilation=tuple(dilation),
        border=tuple(_named("border", one, BORDERS) for one in border),
        causal=tuple(_named("causal", one, (False, True)) for one in causal),
        shared_by=tuple(shared_by),
    )


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
        return _below_autograd(attend, query, key, value, bias, relative, *geometry)

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
        tensors = (grad, grad_lse, query, key, value, bias, relative, out, lse)
        found = _gradients_above_autograd(*tensors, wanted, ctx.geometry)
        *maps, for_relative = _sorted(found, query, wanted)
        return (*maps, None, *(for_relative or [None] * len(relative)))


def _gradients_of(grad, grad_lse, query, key, value, bias, relative, out, lse, wanted, geometry) -> list[Tensor]:
    """As the operator returns them, of the log-sum-exp's gradient too."""
    tensors = (grad, query, key, value, bias, relative, out, lse)
    if grad_lse is None:
        return _below_autograd(attend_backward, *tensors, wanted, *geometry)
    found = _below_autograd(attend_backward, *_with_lse(grad_lse, *tensors), wanted, *geometry)
    for_query, for_key, for_value, for_bias, for_relative = _sorted(found, query, wanted)
    for_value = None if for_value is None else for_value[..., :-1]
    maps = [None if one is None else one.to(query.dtype) for one in (for_query, for_key, for_value)]
    return [one for one in (*maps, for_bias, *for_relative) if one is not None]


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
    def forward(grad, grad_lse, wanted, geometry, query, key, value, bias, out, lse, *relative):
        return tuple(_gradients_of(grad, grad_lse, query, key, value, bias, relative, out, lse, wanted, geometry))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, grad_lse, ctx.wanted, ctx.geometry, query, key, value, bias, _, _, *relative = inputs
        ctx.save_for_backward(grad, grad_lse, query, key, value, bias, *relative)

    @staticmethod
    def backward(ctx, *seconds):
        grad, grad_lse, query, key, value, bias, *relative = ctx.saved_tensors
        *shape, scale, _ = ctx.geometry
        problem = describe(query, key, value, _window(*shape), bias, relative or None, lse=grad_lse is not None)
        call = Call(query, key, value, bias, relative or None, scale)
        wanted = [*ctx.wanted[: 3 + problem.bias], *[ctx.wanted[4]] * len(relative)]
        *some, for_relative = _sorted(seconds, query, ctx.wanted)
        seconds = [one for one in (*some, *for_relative) if one is not None]
        found = second_derivatives(call.tensors, scale, problem, (grad, grad_lse), wanted, seconds)
        for_grad, for_lse, *maps = found[:5]
        for_bias = found[5] if problem.bias else None
        return for_grad, for_lse, None, None, *maps, for_bias, None, None, *found[5 + problem.bias :]


def attend_above_autograd(query, key, value, bias, relative, *geometry):
    if torch.is_grad_enabled():
        return _Attend.apply(query, key, value, bias, geometry, *relative)
    return _below_autograd(attend, query, key, value, bias, relative, *geometry)


def _attend_backward_above_autograd(grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    return _gradients_above_autograd(grad, None, query, key, value, bias, relative, out, lse, wanted, geometry)


def _gradients_above_autograd(grad, grad_lse, query, key, value, bias, relative, out, lse, wanted, geometry):
    if torch.is_grad_enabled():  # someone may differentiate again
        maps = (query, key, value, bias, out, lse)
        return list(_AttendBackward.apply(grad, grad_lse, wanted, geometry, *maps, *relative))
    return _gradients_of(grad, grad_lse, query, key, value, bias, relative, out, lse, wanted, geometry)


def _below_autograd(operator, *args):
    with below_autograd():  # pyright: ignore[reportOptionalCall]
        return operator(*args)


# ---------------------------------------------------------------------------------------------------------------- vmap
# A mapped axis joins the heads: no head ever meets another.


def _attend_mapped(info, in_dims, query, key, value, bias, relative, *geometry):
    maps = [_join(*pair, 1, info.batch_size) for pair in zip((query, key, value), in_dims[:3], strict=True)]
    tables = _join_tables(bias, relative, in_dims[3:5], info.batch_size)
    out, lse = attend(*maps, *tables, *geometry)
    return tuple(tensor.unflatten(1, (info.batch_size, -1)) for tensor in (out, lse)), (1, 1)


def _attend_backward_mapped(info, in_dims, grad, query, key, value, bias, relative, out, lse, wanted, *geometry):
    dims = (*in_dims[:4], *in_dims[6:8])
    maps = [_join(*pair, 1, info.batch_size) for pair in zip((grad, query, key, value, out, lse), dims, strict=True)]
    tables = _join_tables(bias, relative, in_dims[4:6], info.batch_size)
    gradients = attend_backward(*maps[:4], *tables, *maps[4:], wanted, *geometry)
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
    ("attend", _forward, attend_above_autograd, _outputs, _attend_mapped),
    ("attend_backward", _backward, _attend_backward_above_autograd, _fake_backward, _attend_backward_mapped),
):
    if _operator not in _FROM_CPP:
        _OPERATORS.impl(_operator, _on_cpu, "CPU")
    _OPERATORS.impl(_operator, _autograd, "Autograd")
    torch.library.register_fake(f"nearsight::{_operator}", _fake, lib=_OPERATORS)
    torch.library.register_vmap(f"nearsight::{_operator}", _mapped, lib=_OPERATORS)
