# SPDX-License-Identifier: Apache-2.0
"""transformers' DiNAT, right and without natten.

    nearsight.compat.transformers.install()
    from transformers import DinatForImageClassification

From version 4.54 on ``DinatModel`` brings its heads into a wrong order of axes: 4.54 to 4.57 fail on every map, 5.x gives
natten (B, W, H, heads, channels) for (B, heads, H, W, channels). Every version asks for natten, which has these calls no
more. Here the attention is one call of our operation, in place of all that.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ..attention import attention_weights, local_attention
from ..errors import PackageError
from ..private import unflatten
from ..window import Window
from .natten.functional import na2d_av

__all__ = ["install", "uninstall"]

DINAT = "transformers.models.dinat.modeling_dinat"
_replaced: dict[str, Callable] = {}


def install() -> None:
    """From here on transformers' ``DinatModel``, ``DinatForImageClassification`` and ``DinatBackbone`` compute DiNAT.

    Models that are there already as well as those to come: names and shapes of weights stay. A second call changes nothing.

    Raises:
        PackageError: transformers is not installed, or has no such model.

    Example:
        >>> from nearsight.compat import transformers
        >>> transformers.install()
        >>> transformers.uninstall()
    """
    module = _module()
    if not _replaced:
        _replaced.update(forward=module.NeighborhoodAttention.forward, requires_backends=module.requires_backends)
        module.NeighborhoodAttention.forward = attend
        module.requires_backends = _natten_is_not_needed  # pyright: ignore[reportAttributeAccessIssue]


def uninstall() -> None:
    """Undo :func:`install`."""
    if _replaced:
        module: Any = _module()
        module.NeighborhoodAttention.forward = _replaced["forward"]
        module.requires_backends = _replaced["requires_backends"]
        _replaced.clear()


def attend(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """Neighbourhood attention with its projections of query, key and value: (B, H, W, C) -> the same, and the weights (B, N,
    H, W, k * k) where they are asked for.

        y_i = sum_j softmax_j(q_i . k_j / sqrt(D) + bias_{j - i}) v_j,   j in the window that is shifted into the map
    """
    query, key, value = (_heads(project(hidden_states), self) for project in (self.query, self.key, self.value))
    window = Window(self.kernel_size, dilation=self.dilation, border="shift")
    drops = self.training and self.dropout.p > 0
    if not output_attentions and not drops:
        return (_cells(local_attention(query, key, value, window, bias=self.rpb)),)
    weights = self.dropout(attention_weights(query, key, window, bias=self.rpb).flatten(-2))
    out = _cells(na2d_av(weights, value, self.kernel_size, dilation=self.dilation))
    return (out, weights) if output_attentions else (out,)


def _heads(x: Tensor, layer: nn.Module) -> Tensor:
    """(B, H, W, C) -> (B, heads, H, W, D)."""
    return unflatten(x, -1, (layer.num_attention_heads, -1)).permute(0, 3, 1, 2, 4)


def _cells(x: Tensor) -> Tensor:
    """And back."""
    return x.permute(0, 2, 3, 1, 4).flatten(-2)


def _natten_is_not_needed(model: Any, backends: Any) -> None:
    """In place of the question whether natten is installed."""


def _module() -> ModuleType:
    try:
        return import_module(DINAT)
    except ImportError as error:
        raise PackageError("DiNAT of transformers needs transformers: pip install transformers") from error
