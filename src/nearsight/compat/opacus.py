# SPDX-License-Identifier: Apache-2.0
"""Gradients of single pictures for Opacus, of position tables too.

Opacus finds them by hooks on modules that hold parameters themselves, and a module without a rule of Opacus's own is taken
whole: computed once more for each picture. A position encoding has parameters and is never called, or, as the network of
``"cpb"``, called with offsets, which would be taken for pictures. So once Opacus is there, a layer counts its encoding's
parameters among its own, for those who ask ``parameters(recurse=False)``, as Opacus does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import nn

from ..layers import SelfAttention


def take_layers_whole() -> None:
    """Have tools that look for modules with parameters of their own take an attention layer as one."""
    SelfAttention.parameters = own_parameters  # pyright: ignore[reportAttributeAccessIssue]


def own_parameters(layer: SelfAttention, recurse: bool = True) -> Iterator[nn.Parameter]:
    """``layer.parameters(recurse)``, where the position's are the layer's own: it alone uses them."""
    own = nn.Module.parameters(layer, recurse)
    return own if recurse else chain(own, layer.position.parameters())
