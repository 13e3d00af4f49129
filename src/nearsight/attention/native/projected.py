# SPDX-License-Identifier: Apache-2.0
"""Two operators more, ``nearsight::project_and_attend`` and its backward: a layer's projection and its attention at once.

The kernel makes query, key and value row by row, where it would have packed them, and drops them. The backward makes them
again, for some images at a time. What a network keeps is the input, the output and the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import DtypeError, OptionError, ShapeError
from ...precision import without_autocast
from ..problem import Problem
from . import operators
from .library import SCALARS, CInputs, CProblem, CProjection, CTensor, c_tensor, check, loaded
from .operators import _GEOMETRY as GEOMETRY

_OPERATORS = torch.library.Library("nearsight", "FRAGMENT")
_LAYER = "Tensor input, Tensor weight, Tensor? offset, Tensor? bias, Tensor[] relative, int num_heads, int qk_channels"
# The log-sum-exp is empty where none is to be kept.
_OPERATORS.define(
    f"project_and_attend({_LAYER}, bool keep, {GEOMETRY}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
# `wanted`: which gradients to return, of input, weight, offset, bias and relative (all axes or none), in this order.
_OPERATORS.define(
    f"project_and_attend_backward(Tensor grad, {_LAYER}, Tensor out, Tensor lse, bool[] wanted, {GEOMETRY}) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
project_and_attend = torch.ops.nearsight.project_and_attend.default
project_and_attend_backward = torch.ops.nearsight.project_and_attend_backward.default

MANY = 2**23  # numbers, 32 MB: glibc asks the system for more than that each time, which clears every page
SLICE = 2**20  # numbers of query, key and value that a backward holds at a time: 4 MB
SIDE_BY_SIDE = 4  # images: rows of so many share the kernel's vectors where maps are narrow

_convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def serves(problem: Problem, in_channels: int, frugal: bool) -> bool:
    """Whether to make query, key and value row by row, and not by one product over the whole map and through memory.

    Measured forward, time of the product and attention over that of one operator, batch 16 or 8, 8 heads, channels-last, one
    thread of an Intel Xeon (Emerald Rapids): 1.9 at 64 channels and 56 x 56 cells, 1.2 to 1.6 at 128 and 28 x 28, 1.3 at
    256 and 28 x 28, 1.0 at 512 and 28 x 28 and at 256 and 14 x 14, 0.8 at 512 and 7 x 7: with few cells the weights,
    not the map, are what has to come from afar. In bfloat16, where oneDNN multiplies faster than the kernel, 0.3 to 1.4.
    With the backward, which projects again: 1.3 at 64 and 56 x 56, 0.93 at 128 and 28 x 28. It gains where the system is
    asked for the memory of query, key and value in every step, or where memory is to be saved: ``frugal``.
    """
    cells = prod(problem.in_size)
    if problem.dtype != torch.float32 or cells < in_channels:
        return False
    made = problem.batch * problem.num_heads * cells * (2 * problem.head_dim + problem.value_dim)
    return not problem.needs_grad or frugal or made >= MANY


# ------------------------------------------------------------------------------------------------------------- in C


def _forward(input, weight, offset, bias, relative, num_heads, qk_channels, keep, *geometry):
    library, problem = loaded(), _checked(input, weight, offset, bias, relative, num_heads, qk_channels, *geometry)
    bias, relative = operators._contiguous(bias, relative)
    out, lse = _outputs(input, weight, offset, bias, relative, num_heads, qk_channels, keep)
    weight, offset = weight.contiguous(), None if offset is None else offset.contiguous()
    projection = CProjection(
        c_tensor(_split(input, 1)), input.shape[1], weight.data_ptr(), None if offset is None else offset.data_ptr()
    )
    tables = CInputs(
        CTensor(),
        CTensor(),
        CTensor(),
        None if bias is None else bias.data_ptr(),
        tuple(table.data_ptr() for table in relative),
    )
    place = lse.data_ptr() if keep else None
    check(
        library.nearsight_forward_projected(problem, projection, tables, c_tensor(_split(out, num_heads)), place),
        library,
    )
    return out, lse


def _backward(grad, *arguments):
    with without_autocast("cpu"):  # it may be another than the forward's, and would narrow the projection
        return _backward_as_given(grad, *arguments)


def _backward_as_given(
    grad, input, weight, offset, bias, relative, num_heads, qk_channels, out, lse, wanted, *geometry
):
    _checked(input, weight, offset, bias, relative, num_heads, qk_channels, *geometry)
    _check_results(grad, input, weight, offset, bias, relative, num_heads, qk_channels, out, lse, wanted)
    found = _gradients(grad, input, weight, offset, bias, relative, num_heads, qk_channels, out, lse, wanted)
    places = iter(found)
    for_input, for_weight, for_offset, for_bias = (next(places) if want else None for want in wanted[:4])
    tables = [*([] if for_bias is None else [for_bias]), *places]
    for place in (for_weight, for_offset, *tables):
        if place is not None:
            place.zero_()
    maps_wanted = any(wanted[:3])
    for some in _slices(input, weight):
        x, here = input[some], (*[maps_wanted] * 3, *wanted[3:])
        query, key, value = heads_of(_convolve[x.ndim - 2](x, weight, offset), num_heads, qk_channels)
        tensors = (
            _split(grad[some], num_heads),
            query,
            key,
            value,
            bias,
            relative,
            _split(out[some], num_heads),
            lse[some],
        )
        gradients = operators._backward(*tensors, here, *geometry)
        *maps, of_bias, of_relative = operators._sorted(gradients, query, here)
        parts: list[Tensor] = [*([] if of_bias is None else [of_bias]), *of_relative]  # pyright: ignore
        for place, part in zip(tables, parts, strict=True):
            place.add_(part)
        if maps_wanted:
            joined = gradients[0] if gradients[0].ndim < query.ndim else torch.cat([*map(_merged, maps)], 1)
            _project_back(joined, x, weight, None if for_input is None else for_input[some], for_weight, for_offset)
    return found


def _slices(input: Tensor, weight: Tensor) -> Iterator[slice]:
    """Images of which query, key and value are made at a time."""
    images = SLICE // (len(weight) * prod(input.shape[2:]))
    images = max(1, images // SIDE_BY_SIDE * SIDE_BY_SIDE or images)
    return (slice(first, first + images) for first in range(0, len(input), images))


def _project_back(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    for_input: Tensor | None,
    for_weight: Tensor | None,
    for_offset: Tensor | None,
) -> None:
    """What the gradient of some images' projection means for them, for the weight and for the bias, to which it is added."""
    rows = weight.flatten(1)
    if grad.movedim(1, -1).is_contiguous() and x.movedim(1, -1).is_contiguous():
        cells, inputs = grad.movedim(1, -1).flatten(0, -2), x.movedim(1, -1).flatten(0, -2)
        if for_input is not None:
            torch.mm(cells, rows, out=for_input.movedim(1, -1).view_as(inputs))
        if for_weight is not None:
            for_weight.view_as(rows).addmm_(cells.t(), inputs)
        if for_offset is not None:
            for_offset += cells.sum(0)
        return
    cells, inputs = grad.flatten(2), x.flatten(2)
    if for_input is not None:
        for_input.copy_(torch.matmul(rows.t(), cells).view(x.shape))
    if for_weight is not None:
        for_weight.view_as(rows).add_(torch.bmm(cells, inputs.transpose(1, 2)).sum(0))
    if for_offset is not None:
        for_offset += cells.sum((0, 2))


def _split(x: Tensor, num_heads: int) -> Tensor:
    """(B, N*D, *map) -> (B, N, *map, D), a view."""
    return x.unflatten(1, (num_heads, -1)).movedim(2, -1)


def _merged(x) -> Tensor:
    return x.movedim(-1, 2).flatten(1, 2)


def heads_of(joined: Tensor, num_heads: int, qk_channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (B, N, *map, D) each, of what makes all three."""
    parts = joined.split([qk_channels, qk_channels, joined.shape[1] - 2 * qk_channels], 1)
    query, key, value = (_split(part, num_heads) for part in parts)
    return query, key, value


# --------------------------------------------------------------------------------- what anyone may call, checks what it gets


def _checked(input, weight, offset, bias, relative, num_heads, qk_channels, *geometry) -> CProblem:
    """The problem in C, of tensors that fit together.

    Raises:
        ShapeError, DtypeError, OptionError: as ``nearsight::attend``; the tensors are float32, and every stride is 1.
    """
    tensors = (input, weight, *(one for one in (offset, bias) if one is not None), *relative)
    for tensor in tensors:
        if tensor.dtype != SCALARS:
            raise DtypeError(f"nearsight::project_and_attend takes {SCALARS}; received {tensor.dtype}")
    return operators._checked(*_stand_ins(input, weight, offset, num_heads, qk_channels), bias, relative, *geometry)


def _stand_ins(input, weight, offset, num_heads, qk_channels) -> list[Tensor]:
    """Query, key and value without numbers."""
    rank, width = input.ndim - 2, len(weight) - 2 * qk_channels
    if not 1 <= rank <= 3 or tuple(weight.shape[1:]) != (input.shape[1], *[1] * rank):
        raise ShapeError(
            "weight must be (2 * qk_channels + out_channels, in_channels, 1...) for an input (batch, in_channels, *map); "
            f"received {tuple(weight.shape)} and {tuple(input.shape)}"
        )
    if num_heads < 1 or qk_channels < 1 or width < 1 or qk_channels % num_heads or width % num_heads:
        raise ShapeError(
            f"num_heads must divide qk_channels and the rest of the weight's {len(weight)} rows; received {num_heads} heads "
            f"and qk_channels {qk_channels}"
        )
    if offset is not None and offset.shape != weight.shape[:1]:
        raise ShapeError(f"offset must be one number for each row of weight; received {tuple(offset.shape)}")
    if 0 in input.shape[1:]:
        raise ShapeError(f"input must hold cells; received {tuple(input.shape)}")
    shape = (len(input), num_heads, *input.shape[2:])
    one = input.new_empty(())
    return [one.expand(*shape, channels // num_heads) for channels in (qk_channels, qk_channels, width)]


def _check_results(grad, input, weight, offset, bias, relative, num_heads, qk_channels, out, lse, wanted) -> None:
    width = len(weight) - 2 * qk_channels
    for name, tensor, shape in (
        ("grad", grad, (len(input), width, *input.shape[2:])),
        ("out", out, (len(input), width, *input.shape[2:])),
        ("lse", lse, (len(input), num_heads, *input.shape[2:])),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != SCALARS:
            raise ShapeError(f"{name} must be {shape} in {SCALARS}; received {tuple(tensor.shape)} in {tensor.dtype}")
    if len(wanted) != 5 or any(
        want and one is None for want, one in zip(wanted[2:], (offset, bias, relative or None), strict=True)
    ):
        raise OptionError(
            "wanted must be five flags, of input, weight, offset, bias and relative, of which the last three need theirs; "
            f"received {wanted}"
        )


def _outputs(input, weight, offset, bias, relative, num_heads, qk_channels, keep, *_) -> tuple[Tensor, Tensor]:
    """Memory for out, in the memory format of the input, and for the log-sum-exp."""
    width, size = len(weight) - 2 * qk_channels, input.shape[2:]
    if not input.is_contiguous() and input.movedim(1, -1).is_contiguous():
        out = input.new_empty((len(input), *size, width)).movedim(-1, 1)
    else:
        out = input.new_empty((len(input), width, *size))
    return out, input.new_empty((len(input), num_heads, *size) if keep else (0,))


def _gradients(
    grad, input, weight, offset, bias, relative, num_heads, qk_channels, out, lse, wanted, *_
) -> list[Tensor]:
    """Memory for the gradients that are wanted."""
    tensors = (input, weight, offset, bias)
    maps = [torch.empty_like(one) for one, want in zip(tensors, wanted[:4], strict=True) if want]
    return [*maps, *(torch.empty_like(table) for table in relative if wanted[4])]


# ------------------------------------------------------------------------------------------------------------ autograd


class _ProjectAndAttend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, offset, bias, options, *relative):  # pyright: ignore[reportIncompatibleMethodOverride]
        num_heads, qk_channels, geometry = ctx.options = options
        tensors = (input, weight, offset, bias, relative)
        out, lse = operators._below_autograd(project_and_attend, *tensors, num_heads, qk_channels, True, *geometry)
        ctx.save_for_backward(input, weight, offset, bias, out, lse, *relative)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight, offset, bias, out, lse, *relative = ctx.saved_tensors
        needs, needs_relative = ctx.needs_input_grad[:4], any(ctx.needs_input_grad[5:])
        tensors, wanted = (input, weight, offset, bias, relative), (*needs, needs_relative)
        if torch.is_grad_enabled():  # someone may differentiate again
            found = _in_two_steps(grad, tensors, wanted, ctx.options)
        else:
            num_heads, qk_channels, geometry = ctx.options
            layer = (*tensors, num_heads, qk_channels)
            found = operators._below_autograd(project_and_attend_backward, grad, *layer, out, lse, wanted, *geometry)
        places = iter(found)
        maps = [next(places) if want else None for want in needs]
        return (*maps, None, *(places if needs_relative else [None] * len(relative)))


def _in_two_steps(grad, tensors, wanted, options) -> tuple[Tensor, ...]:
    """The gradients of the projection and of ``nearsight::attend``, which can be differentiated."""
    input, weight, offset, bias, relative = tensors
    num_heads, qk_channels, geometry = options
    with without_autocast("cpu"):
        made = heads_of(_convolve[input.ndim - 2](input, weight, offset), num_heads, qk_channels)
        out = _merged(operators.attend_above_autograd(*made, bias, relative, *geometry)[0])
    inputs = [one for one, want in zip(tensors[:4], wanted[:4], strict=True) if want]
    return torch.autograd.grad(out, [*inputs, *(relative if wanted[4] else ())], grad, create_graph=True)


def project_and_attend_above_autograd(input, weight, offset, bias, relative, num_heads, qk_channels, keep, *geometry):
    tensors = (input, weight, offset, bias, *relative)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors):
        return _ProjectAndAttend.apply(input, weight, offset, bias, (num_heads, qk_channels, geometry), *relative)
    layer = (input, weight, offset, bias, relative, num_heads, qk_channels)
    return operators._below_autograd(project_and_attend, *layer, keep, *geometry)


_OPERATORS.impl("project_and_attend", _forward, "CPU")
_OPERATORS.impl("project_and_attend", project_and_attend_above_autograd, "Autograd")
_OPERATORS.impl("project_and_attend_backward", _backward, "CPU")
torch.library.register_fake("nearsight::project_and_attend", _outputs, lib=_OPERATORS)
torch.library.register_fake("nearsight::project_and_attend_backward", _gradients, lib=_OPERATORS)
