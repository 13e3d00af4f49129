# SPDX-License-Identifier: Apache-2.0
"""What torch.fx sees of a layer: one node."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.fx import Proxy


def one_node(forward: Callable) -> Callable:
    """A layer's forward that ``torch.fx.symbolic_trace``, and what builds on it, takes whole, as it takes ``nn.Conv2d``.

    How attention is computed hangs on the size of the map, which a graph does not know; in it stands a call of the layer,
    with its parameters. Where the layer itself is what is traced, the graph holds it under the name ``_whole``.

    Example:
        >>> import torch, nearsight as ns
        >>> graph = torch.fx.symbolic_trace(torch.nn.Sequential(ns.LocalSelfAttention2d(8), torch.nn.ReLU()))
        >>> [node.op for node in graph.graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """

    @wraps(forward)
    def call(layer: Any, x: Any) -> Any:
        if not isinstance(x, Proxy):
            return forward(layer, x)
        return x.tracer.create_proxy("call_module", _path(layer, x.tracer), (x,), {})

    return call


def _path(layer: Any, tracer: Any) -> str:
    if tracer.root is not layer:
        return tracer.path_of_module(layer)
    object.__setattr__(layer, "_whole", layer)  # an attribute and no submodule, which would hold itself
    return "_whole"
