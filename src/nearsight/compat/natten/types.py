# SPDX-License-Identifier: Apache-2.0
"""``natten.types``: the names that clients annotate their arguments with."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import Tensor

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType

CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType

Dimension1DTypeOrDed = int | Dimension1DType
Dimension2DTypeOrDed = int | Dimension2DType
Dimension3DTypeOrDed = int | Dimension3DType
DimensionTypeOrDed = int | DimensionType

CausalArg1DTypeOrDed = bool | CausalArg1DType
CausalArg2DTypeOrDed = bool | CausalArg2DType
CausalArg3DTypeOrDed = bool | CausalArg3DType
CausalArgTypeOrDed = bool | CausalArgType


# What a client may give as tile shapes; without effect here.
QKTileShapeType = tuple[DimensionType, DimensionType]
FnaTileShapeType = FnaForwardConfigType = QKTileShapeType
FnaBackwardConfigType = tuple[DimensionType, DimensionType, DimensionType, bool]
FmhaForwardConfigType = tuple[int, int]
ListOrNestedTensor = list | Tensor


class KernelSchedule(Enum):
    """How a Hopper kernel is scheduled; without effect here."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


def _configurations() -> dict[str, Any]:
    """NATTEN's names for them, one for every kernel and direction: ``CutlassFnaForwardConfigType`` and its kin."""
    found: dict[str, Any] = {
        "FlexFnaForwardConfigType": QKTileShapeType,
        "FlexFmhaForwardConfigType": FmhaForwardConfigType,
    }
    for kernel in ("Cutlass", "CutlassBlackwell", "CutlassHopper"):
        for operation, shape in (("Fna", QKTileShapeType), ("Fmha", FmhaForwardConfigType)):
            forward = tuple[shape, KernelSchedule] if kernel == "CutlassHopper" else shape
            found |= {f"{kernel}{operation}ForwardConfigType": forward, f"{kernel}{operation}BackwardConfigType": shape}
    return found


ABSENT = _configurations()


def create_dim_from_int(na_dim: int, value: int) -> tuple[int, ...]:
    """The value for every axis."""
    return (value,) * na_dim


def create_causal_arg_from_bool(na_dim: int, value: bool) -> tuple[bool, ...]:
    """The value for every axis."""
    return (value,) * na_dim


__all__ = [
    "CausalArg1DType",
    "CausalArg1DTypeOrDed",
    "CausalArg2DType",
    "CausalArg2DTypeOrDed",
    "CausalArg3DType",
    "CausalArg3DTypeOrDed",
    "CausalArgType",
    "CausalArgTypeOrDed",
    "Dimension1DType",
    "Dimension1DTypeOrDed",
    "Dimension2DType",
    "Dimension2DTypeOrDed",
    "Dimension3DType",
    "Dimension3DTypeOrDed",
    "DimensionType",
    "DimensionTypeOrDed",
    "FmhaForwardConfigType",
    "FnaBackwardConfigType",
    "FnaForwardConfigType",
    "FnaTileShapeType",
    "KernelSchedule",
    "ListOrNestedTensor",
    "NoneType",
    "QKTileShapeType",
    "create_causal_arg_from_bool",
    "create_dim_from_int",
]
