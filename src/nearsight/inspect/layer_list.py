# SPDX-License-Identifier: Apache-2.0
"""A network as a list of layers."""

from __future__ import annotations

from torch import nn

from ..layers import AttentionLayer
from ..private import uncompiled


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of every layer: attention layers whole, all else down to the modules that hold no others.

    A module that is used in several places is listed once, under its first name.

    Example:
        >>> list(layers_of(nn.Sequential(LocalSelfAttention2d(8), nn.Sequential(nn.ReLU()))))
        ['0', '1.0']
    """
    layers: dict[nn.Module, str] = {}

    def visit(name: str, module: nn.Module) -> None:
        module = uncompiled(module)
        children = {} if isinstance(module, AttentionLayer) else dict(module.named_children())
        if not children:
            layers.setdefault(module, name)
        for child, inner in children.items():
            visit(f"{name}.{child}" if name else child, inner)

    visit("", model)
    return {name: module for module, name in layers.items()}
