# SPDX-License-Identifier: Apache-2.0
"""Weights for images of another size: the position tables that count the cells of a map, resized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError
from ..positions import Position


def resize_positions(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights of a network as one that is made for images of another size takes them: its position tables resized.

    What hangs on the size of the image are the tables of global attention, which have ``2 * n - 1`` entries for n cells of
    an axis, and learned absolute positions, one for each cell. They are interpolated bicubically along the axes of the map,
    as Swin's are when its windows change (Liu et al. 2021, arXiv:2103.14030):

        table'[i] = sum_j w(x - j) table[j],   x = (i + 1/2) * entries / entries' - 1/2

    with Keys' cubic w, a = -3/4, and the outermost entries repeated. An offset thus comes to mean the same part of the
    image, not the same number of cells. Tables that fit already, and all else, are handed on as they are. A window's tables
    hang on ``kernel_size`` alone, are right for images of any size, and are never resized; but from those of a map of few
    cells they cannot be told where the network's attention is global, and the weights' was not.

    It has the arguments and the result of timm's ``checkpoint_filter_fn``, and can be given wherever timm takes one.

    Args:
        state_dict: of the network at its old size; it is not changed.
        model: the same network, made for the new size.

    Raises:
        ShapeError: a table that differs in more than the cells of the map, or that of a window of another ``kernel_size``.

    Example:
        >>> from nearsight import create_model
        >>> small, large = (create_model(f"sasa_nano,kernel_size=global,img_size={size}") for size in (32, 48))
        >>> large.load_state_dict(resize_positions(small.state_dict(), large))
        <All keys matched successfully>
    """
    found = dict(state_dict)
    for name, (table, dims, counts) in _tables(model).items():
        held, wanted = found.get(name), table.shape
        if held is None or held.shape == wanted:
            continue
        other = held.ndim != len(wanted) or any(
            theirs != ours for dim, (theirs, ours) in enumerate(zip(held.shape, wanted, strict=True)) if dim not in dims
        )
        if other or counts != "map":
            reason = "it has other heads or channels" if other else "its window has another kernel_size"
            raise ShapeError(
                f"{name} is {tuple(held.shape)} there and {tuple(wanted)} here: {reason}, and only what counts the cells of "
                "a map is resized; make the network with the options that it was trained with, img_size apart"
            )
        found[name] = resampled(held, dims, [wanted[dim] for dim in dims])
    return found


def tables_of_maps(model: nn.Module) -> set[str]:
    """The names of the parameters that :func:`resize_positions` fits to images of another size."""
    return {name for name, (_, _, counts) in _tables(model).items() if counts == "map"}


def resampled(table: Tensor, dims: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A table with other sizes along some dimensions, interpolated bicubically, in float32 or wider.

    Example:
        >>> resampled(torch.ones(2, 3, 5), [1, 2], [5, 9]).shape
        torch.Size([2, 5, 9])
    """
    found = table.to(torch.promote_types(table.dtype, torch.float32))
    for dim, size in zip(dims, sizes, strict=True):
        lines = found.movedim(dim, -1)
        # PyTorch has a bicubic one of two axes alone; along an axis of one cell it changes nothing.
        moved = F.interpolate(lines.reshape(1, -1, lines.shape[-1], 1), (size, 1), mode="bicubic", align_corners=False)
        found = moved.reshape(*lines.shape[:-1], size).movedim(-1, dim)
    return found.to(table.dtype).contiguous()


def _tables(model: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...], str]]:
    """By name: every position table of a model, which of its dimensions count, and whether cells of a map or of a window."""
    found = {}
    for path, layer in model.named_modules():
        position = getattr(layer, "position", None)
        if not isinstance(position, Position):
            continue
        of_map = getattr(layer, "window", None) is None or not position.equivariant
        for name, dims in position.places().items():
            full = ".".join(filter(None, (path, "position", name)))
            found[full] = (position.get_parameter(name), dims, "map" if of_map else "window")
    return found
