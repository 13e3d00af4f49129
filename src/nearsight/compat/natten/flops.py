# SPDX-License-Identifier: Apache-2.0
"""``natten.flops``: multiply-adds of a call, by hand and for fvcore's counter.

Counted is what NATTEN's documentation says: the two products, for every query and every cell of its window, without
softmax, scale and bias. fvcore reports multiply-adds; the three functions that count by hand report two for each, unless
``return_macs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import nn

from ...errors import BackendError
from .traced import AV, FUSED, QK

__all__ = [
    "add_natten_handle",
    "av_1d_flop",
    "av_2d_flop",
    "av_3d_flop",
    "av_flop",
    "fna_flop_count",
    "fna_generic_flops",
    "get_flops",
    "na_av_flop_count",
    "na_qk_flop_count",
    "qk_1d_rpb_flop",
    "qk_2d_rpb_flop",
    "qk_3d_rpb_flop",
    "qk_rpb_flop",
]

Shape = Sequence[int]


def na_qk_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of the logits of queries of shape ``q_shape``, in either layout.

    Example:
        >>> na_qk_flop_count((1, 4, 8, 8, 16), (1, 4, 8, 8, 16), (3, 3), (1, 1), (False, False), is_heads_last=False)
        73728
    """
    return (1 if return_macs else 2) * prod(q_shape) * prod(kernel_size)


def na_av_flop_count(
    a_shape: Shape,
    v_shape: Shape,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of the weighted sums of values of shape ``v_shape``, in either layout."""
    return (1 if return_macs else 2) * prod(v_shape) * prod(kernel_size)


def fna_flop_count(
    q_shape: Shape,
    k_shape: Shape,
    v_shape: Shape,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Operations of both: a fused call."""
    heads = -2 if is_heads_last else 1
    values = prod(v_shape) // v_shape[heads] * q_shape[heads]  # fewer heads of values serve all heads of queries
    return (1 if return_macs else 2) * (prod(q_shape) + values) * prod(kernel_size)


# ------------------------------------------------------------------------------------------------- handles of fvcore
# They get the values that go into and come out of a node of a trace.


def _shape(value: Any) -> Shape:
    return value.type().sizes()


def fna_generic_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of a fused call: the node's query, and its outcome once for each cell of the window."""
    node = next(use.user for use in inputs[0].uses() if use.user.kind() == "prim::PythonOp")
    return (prod(_shape(inputs[0])) + prod(_shape(outputs[0]))) * node.scalar_args()[1]


def _qk_flop(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of the logits, additional keys included."""
    return prod(_shape(inputs[0])) * _shape(outputs[0])[-1]


def _av_flop(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of the weighted sums, additional values included."""
    return prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


qk_1d_rpb_flop = qk_2d_rpb_flop = qk_3d_rpb_flop = _qk_flop
av_1d_flop = av_2d_flop = av_3d_flop = _av_flop
qk_rpb_flop, av_flop = _qk_flop, _av_flop  # up to 0.14.6


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teach an ``fvcore.nn.FlopCountAnalysis`` to count neighbourhood attention, and return it."""
    kinds = ((FUSED, fna_generic_flops), (QK, _qk_flop), (AV, _av_flop))
    handles = {f"prim::PythonOp.{name}": handle for names, handle in kinds for name in names.values()}
    return flop_ctr.set_op_handle(**handles)


def get_flops(model: nn.Module, input: Any, disable_warnings: bool = False) -> float:
    """Multiply-adds of a model, by fvcore.

    Raises:
        BackendError: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise BackendError(
            "natten.flops.get_flops needs fvcore: pip install fvcore. Without it, torch.utils.flop_counter.FlopCounterMode "
            "counts nearsight's native kernel too"
        ) from error
    counter = add_natten_handle(FlopCountAnalysis(model, input))
    return (counter.unsupported_ops_warnings(False) if disable_warnings else counter).total()
