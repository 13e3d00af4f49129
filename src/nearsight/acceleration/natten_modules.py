# SPDX-License-Identifier: Apache-2.0
"""NATTEN's modules, of its versions 0.14 to 0.21: NAT (arXiv:2204.07143), DiNAT (2209.15001) and GNA (2504.16922).

    y[p] = W_o sum_{c in N(p)} softmax_c( scale * q[p].k[c] + rpb[head, c - p] ) v[c]

in a window that is shifted inside the map. It is our operation; NATTEN's ``stride``, by which neighbouring queries share a
window, is our ``shared_by``. A map smaller than the window is the makers' own, who pad it or refuse it.
"""

from __future__ import annotations

from typing import Any

import natten  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from ..attention import local_attention
from ..layers.whole import one_node
from ..window import Window
from .plain import is_measured, why_not_passed_by

DOES = "our kernel; on CPUs NATTEN 0.21 holds a weight for every pair of cells"


def why_not(module: Any) -> str | None:
    """Why a module stays as it is, of any rank."""
    if module.dilation is None:
        return "its dilation follows the map"
    return why_not_passed_by(module, "attn_drop") if hasattr(module, "attn_drop") else None


class Neighborhood1D(natten.NeighborhoodAttention1D):
    """Neighbourhood attention over a sequence, (B, L, C) -> the same."""

    does = DOES
    why_not = staticmethod(why_not)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        out = _attended(self, x, 1)
        return super().forward(x) if out is None else out


class Neighborhood2D(natten.NeighborhoodAttention2D):
    """Neighbourhood attention over an image, (B, H, W, C) -> the same."""

    does = DOES
    why_not = staticmethod(why_not)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        out = _attended(self, x, 2)
        return super().forward(x) if out is None else out


THREE_AXES: Any = getattr(natten, "NeighborhoodAttention3D", nn.Module)  # which NATTEN has since 0.15


class Neighborhood3D(THREE_AXES):
    """Neighbourhood attention over a volume or a video, (B, D, H, W, C) -> the same."""

    does = DOES
    why_not = staticmethod(why_not)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        out = _attended(self, x, 3)
        return super().forward(x) if out is None else out


def _attended(module: Any, x: Tensor, rank: int) -> Tensor | None:
    """(B, *map, C) -> (B, *map, C); None for what was not measured, drops weights, or has a map smaller than its window."""
    drops = module.training and getattr(module, "attn_drop", None) is not None and module.attn_drop.p > 0
    if not is_measured(x) or x.ndim != rank + 2 or drops:
        return None
    window = _window(module)
    if any(
        cells < axis.kernel_size * axis.dilation for cells, axis in zip(x.shape[1:], window.axes(rank), strict=False)
    ):
        return None
    query, key, value = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).movedim((-3, -2), (0, 2)).unbind()
    out = local_attention(query, key, value, window, bias=getattr(module, "rpb", None), scale=module.scale)
    return module.proj_drop(module.proj(out.movedim(1, -2).flatten(-2)))


def _window(module: Any) -> Window:
    """Of a module of any version: 0.15 has the first of three axes by itself."""
    kernel_size, dilation = module.kernel_size, module.dilation
    if hasattr(module, "kernel_size_d"):
        kernel_size, dilation = (module.kernel_size_d, *2 * (kernel_size,)), (module.dilation_d, *2 * (dilation,))
    causal, stride = getattr(module, "is_causal", False), getattr(module, "stride", 1)
    return Window(kernel_size, dilation=dilation, border="shift", causal=causal, shared_by=stride)
