# SPDX-License-Identifier: Apache-2.0
"""The projections around the operation, of cells and of patches: ``nn.Conv1d/2d/3d`` in all but how they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import OptionError, ShapeError
from ..private import has_forward_hooks, is_called_plainly, transforms_are_active, unflatten
from .whole import one_node

MANY = 16  # cells for each output channel: measured at 261, 33, 4 and 0.5, of which the first two gain

OVERRIDES = {"forward", "_conv_forward"}  # some libraries replace them on the instance

_convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Pointwise:
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


class Pointwise1d(_Pointwise, nn.Conv1d):
    """``nn.Conv1d`` with a kernel of 1; see :func:`project`."""


class Pointwise2d(_Pointwise, nn.Conv2d):
    """``nn.Conv2d`` with a kernel of 1; see :func:`project`."""


class Pointwise3d(_Pointwise, nn.Conv3d):
    """``nn.Conv3d`` with a kernel of 1; see :func:`project`."""


POINTWISE = {1: Pointwise1d, 2: Pointwise2d, 3: Pointwise3d}


class PatchProjection2d(nn.Conv2d):
    """``nn.Conv2d`` of patches that begin every ``stride`` cells; where one ends past the map, zeros fill it up.

    With no stride they do not overlap. A stride of 1 and a dilation give the patches around all cells, for dense prediction.

    Where the channels of a cell lie side by side, a row of a patch does so too, and in training the convolution is a matrix
    product of them: forward and backward take 0.71 of the time for 128 maps of 192 channels and 8 x 8 cells (AVX2).

    Shapes: (B, C, H, W) -> (B, E, ceil(H / stride), ceil(W / stride)); stride None means patch_size.

    Example:
        >>> PatchProjection2d(8, 16, 2)(torch.randn(2, 8, 5, 6)).shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(
        self, in_channels: int, out_channels: int, patch_size: int, *, stride: int | None = None, dilation: int = 1
    ) -> None:
        stride = patch_size if stride is None else stride
        super().__init__(in_channels, out_channels, patch_size, stride, dilation=dilation, bias=False)

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        size, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        behind = dilation * (size - 1) + 1 - stride  # cells of a patch that reach past where the next one begins
        missing = (0, -input.shape[3] % stride + behind, 0, -input.shape[2] % stride + behind)
        x = F.pad(input, missing) if torch.jit.is_tracing() or any(missing) else input  # a trace serves odd maps too
        apart = (stride, dilation) == (size, 1)
        if not (apart and _is_ours(x, self.weight) and x.movedim(1, -1).is_contiguous()):
            return super().forward(x)
        patches = rearrange(x, "b c (h m) (w n) -> b h w (m n c)", m=size, n=size)
        return F.linear(patches, rearrange(self.weight, "e c m n -> e (m n c)")).movedim(-1, 1)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1 x 1 convolution: (B, C, *map), (E, C, 1...), (E,) -> (B, E, *map).

    Where the channels of a cell lie side by side and cells are many, the gradient of the weight is a plain matrix product:
    a layer's forward and backward is 3 % faster at 64 channels and 56 x 56 cells. Where they are few it is slower, by 7 % at
    512 channels and 7 x 7 cells, and oneDNN's convolution serves.

    Example:
        >>> project(torch.randn(2, 8, 5, 6), torch.randn(3, 8, 1, 1)).shape
        torch.Size([2, 3, 5, 6])
    """
    if _is_ours(x, weight):
        return _Project.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _convolve[x.ndim - 2](x, weight, bias)


def is_repeatable(projection: nn.Module, x: Tensor) -> bool:
    """Whether what a module made of x is :func:`project` of it, its weight and its bias, and nothing else."""
    if type(projection) not in POINTWISE.values() or OVERRIDES & vars(projection).keys():
        return False
    # A parameter, or what functional_call has put in its place.
    return not has_forward_hooks(projection) and _is_ours(x, projection.weight)  # pyright: ignore[reportArgumentType]


def is_pointwise(projection: nn.Module, x: Tensor) -> bool:
    """Whether to call a module is no more than to :func:`project` x by its weight and its bias, and nobody would notice."""
    if type(projection) not in POINTWISE.values() or OVERRIDES & vars(projection).keys():
        return False
    weight: Any = projection.weight
    if not is_called_plainly(projection) or not all(type(one) in (Tensor, nn.Parameter) for one in (x, weight)):
        return False
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return not _is_watched((x, weight))


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    # Of the device "meta" there is no autocast to ask about.
    if x.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    return records_plainly(x, weight)


def records_plainly(*tensors: Tensor) -> bool:
    """Whether autograd records what becomes of these tensors, and nothing else watches.

    Compilers, tracers, torch.func and forward-mode derivatives see through PyTorch's own operators only.
    """
    # A subclass may have operators of its own, and the stand-ins of torch.fx cannot be asked anything.
    if not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return has_gradient and not _is_watched(tensors)


def _is_watched(tensors: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_are_active():
        return True
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _by_product(x: Tensor, weight: Tensor) -> bool:
    return x.numel() >= MANY * x.shape[1] * weight.shape[0] and x.movedim(1, -1).is_contiguous()


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight, bias)
        return _convolve[x.ndim - 2](x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if not _by_product(x, weight):
            return _convolution_backward(grad, x, weight, bias, ctx.needs_input_grad)
        rows = grad.movedim(1, -1).flatten(0, -2)
        return (
            _convolve[x.ndim - 2](grad, weight.transpose(0, 1)) if for_x else None,
            (rows.t() @ x.movedim(1, -1).flatten(0, -2)).view_as(weight) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]):
    ones, zeros = [1] * (x.ndim - 2), [0] * (x.ndim - 2)
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None if bias is None else bias.shape,
        stride=ones,
        padding=zeros,
        dilation=ones,
        transposed=False,
        output_padding=zeros,
        groups=1,
        output_mask=wanted,
    )


# ---------------------------------------------------------------------------------------------------- query, key, value


class Projecting(nn.Module):
    """What all layers share: projections to query, key and value, each called as the module that it is.

    One convolution, ``qkv``, makes all three; where there may be fewer queries than keys, ``q`` makes the query and ``kv``
    the others. So whatever hangs on these modules, or stands in their place, takes part: adapters, hooks, parametrisations.
    """

    rank: int
    in_channels: int
    num_heads: int
    qkv: nn.Module
    q: nn.Module
    kv: nn.Module

    @property
    def _widths(self) -> list[int]:
        """Channels of what is projected: query, key and value."""
        raise NotImplementedError

    def _hold_projections(self, *, apart: bool, bias: bool) -> None:
        width, *others = self._widths
        for name, channels in {"q": width, "kv": sum(others)}.items() if apart else [("qkv", width + sum(others))]:
            setattr(self, name, POINTWISE[self.rank](self.in_channels, channels, 1, bias=bias))
        self.register_load_state_dict_pre_hook(_load_projections)

    def _projections(self) -> list[nn.Module]:
        return [self.qkv] if "qkv" in self._modules else [self.q, self.kv]

    @torch.no_grad()
    def _draw_projections(self, gain: float = 1.0) -> None:
        """Weights that keep the input's standard deviation, times ``gain`` in queries and keys; biases of zero.

        They are drawn as one tensor: a seed gives the same numbers, however many modules hold them.
        """
        weights: list[Tensor] = [projection.get_parameter("weight") for projection in self._projections()]
        drawn = nn.init.normal_(torch.cat(weights), std=self.in_channels**-0.5)
        drawn[: sum(self._widths[:-1])] *= gain
        for weight, part in zip(weights, drawn.split([len(weight) for weight in weights]), strict=True):
            weight.copy_(part)
        for projection in self._projections():
            if projection.bias is not None:
                nn.init.zeros_(projection.get_parameter("bias"))

    def _project(self, x: Tensor, strides: Sequence[int], weights: Sequence[Any] = ()) -> list[Tensor]:
        """Query, key and value in one tensor, or the query, of the cells that stay, by itself.

        With ``weights``, weight and bias of each projection, these are used and the modules are not called.
        """
        inputs = [x] if "qkv" in self._modules else [x[(..., *[slice(None, None, stride) for stride in strides])], x]
        if weights:
            return [project(*triple) for triple in zip(inputs, weights[::2], weights[1::2], strict=True)]
        return [projection(cells) for projection, cells in zip(self._projections(), inputs, strict=True)]

    def _split(self, projected: Sequence[Tensor]) -> list[Tensor]:
        """The heads, (B, N, *map, D), of query, key and value."""
        *first, joined = projected
        parts = (*first, *split_parts(joined, self._widths[len(first) :]))
        return [split_heads(part, self.num_heads) for part in parts]


def _load_projections(layer: Projecting, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Take apart, or put together, projections that a file holds the other way, as those of older versions do.

    A hook of ``load_state_dict``, which checks the shapes of what it then finds.
    """
    width = layer._widths[0]
    for name in ("weight", "bias"):
        whole, query, others = (f"{prefix}{part}.{name}" for part in ("qkv", "q", "kv"))
        if any(getattr(projection, name, None) is None for projection in layer._projections()):
            continue
        if not hasattr(layer, "qkv"):
            if whole in state and state[whole].ndim and query not in state and others not in state:
                joined = state.pop(whole)
                state[query], state[others] = joined[:width].clone(), joined[width:].clone()
        elif whole not in state and query in state and others in state:
            parts = state[query], state[others]
            if parts[0].shape == (width, *parts[1].shape[1:]):
                state[whole] = torch.cat(parts)
                del state[query], state[others]


def made_on(device: torch.device | str | None) -> AbstractContextManager:
    """Within, tensors are made there; None leaves it to PyTorch's default device, as in PyTorch's own modules."""
    return nullcontext() if device is None else torch.device(device)


def check_channels(num_heads: int, in_channels: int, **split: int) -> None:
    """Every number at least 1, and those of ``split`` shared out evenly among the heads."""
    for name, value in {"in_channels": in_channels, **split, "num_heads": num_heads}.items():
        if not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be an int of at least 1; received {value!r}")
    for name, channels in split.items():
        if channels % num_heads:
            fitting = max(heads for heads in range(1, num_heads) if all(n % heads == 0 for n in split.values()))
            raise ShapeError(f"num_heads={num_heads} must divide {name}={channels}; num_heads={fitting} does")


def split_parts(joined: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """The parts of a fused projection, of ``widths`` channels.

    ``joined.split(widths, 1)``, but its gradient is not copied together where it lies in memory as a whole already, as the
    native kernel leaves it: up to a tenth of a layer's time.
    """
    if not records_plainly(joined):
        return joined.split(widths, 1)
    return _Parts.apply(joined, widths)  # pyright: ignore[reportReturnType]


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, joined, widths):
        return joined.split(widths, 1)

    @staticmethod
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = None if torch.is_grad_enabled() else _whole(grads)  # a gradient of gradients needs the copy's history
        return torch.cat(grads, 1) if whole is None else whole, None


def _whole(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which these are the parts along axis 1, if there is one in memory."""
    first, channels = parts[0], 0
    for part in parts:
        same_memory = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        in_place = part.storage_offset() == first.storage_offset() + channels * first.stride(1)
        same_map = (len(part), *part.shape[2:]) == (len(first), *first.shape[2:]) and part.stride() == first.stride()
        if not (same_memory and in_place and same_map):
            return None
        channels += part.shape[1]
    return first.as_strided((len(first), channels, *first.shape[2:]), first.stride())


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N*D, *map) -> (B, N, *map, D), a view."""
    return unflatten(x, 1, (num_heads, -1)).movedim(
        2, x.ndim
    )  # counted from the front, as ONNX's old exporter needs it


def merge_heads(x: Tensor, like: Tensor) -> Tensor:
    """(B, N, *map, D) -> (B, N*D, *map), in the memory format of ``like``."""
    if not like.is_contiguous() and like.movedim(1, -1).is_contiguous():
        return x.movedim(1, x.ndim - 2).flatten(-2).contiguous().movedim(-1, 1)
    return x.movedim(x.ndim - 1, 2).flatten(1, 2).contiguous()
