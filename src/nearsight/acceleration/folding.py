# SPDX-License-Identifier: Apache-2.0
"""Batch norms that follow a convolution become part of its weights, for inference.

    gamma * (W x + b - mean) / sqrt(var + eps) + beta  =  W' x + b'

Which norm follows which convolution is read from the graph that torch.fx makes of the model; where it cannot follow a model,
nothing is folded. The folding itself is PyTorch's ``fuse_conv_bn_eval``.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..private import has_hooks
from .plain import why_not_plain

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


class _Tracer(torch.fx.Tracer):
    """Looks into modules that hold batch norms, and takes all others whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, NORMS) or not any(isinstance(one, NORMS) for one in m.modules()):
            return True
        return super().is_leaf_module(m, module_qualified_name)


def fold_batch_norms(model: nn.Module) -> tuple[list[str], list[Callable[[], None]], str | None]:
    """Fold what can be, in place.

    Returns:
        The names of the norms that are gone, what undoes it, and why torch.fx could not follow the model, or None.
    """
    given = inspect.signature(model.forward).parameters.values()
    known = {one.name: one.default for one in given if one.default is not inspect.Parameter.empty}
    try:
        graph = _Tracer().trace(model, known)
    except Exception as error:  # of the model's own code, when what it computes with is a stand-in
        return [], [], (str(error) or type(error).__name__).splitlines()[0]
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    names, undo = [], []
    for convolution, norm in list(_pairs(graph, modules)):
        rest = nn.Sequential(*modules[norm].children())  # the activation of timm's norms, or nothing
        fused: nn.Module = fuse_conv_bn_eval(modules[convolution], modules[norm])
        for name, new in ((convolution, fused), (norm, rest.eval())):
            undo.append(_replace(model, name, new))
        names.append(norm)
    return names, undo, None


def _pairs(graph: torch.fx.Graph, modules: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """The names of every convolution whose output goes to a norm and nowhere else, and of that norm."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    places = Counter(map(id, modules.values()))

    def is_ours(node: torch.fx.Node, kinds: tuple[type, ...]) -> bool:
        if node.op != "call_module" or type(modules[str(node.target)]) not in kinds:
            return False
        module = modules[str(node.target)]
        plain = why_not_plain(module) is None and not has_hooks(module)
        return plain and calls[str(node.target)] == 1 == places[id(module)]

    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if not is_ours(node, NORMS) or not isinstance(before, torch.fx.Node) or len(before.users) > 1:
            continue
        norm = modules[str(node.target)]
        if is_ours(before, CONVOLUTIONS) and norm.running_mean is not None:
            yield str(before.target), str(node.target)


def _replace(model: nn.Module, name: str, new: nn.Module) -> Callable[[], None]:
    """Put a module into the place of that name, and return what puts the old one back."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    old = getattr(parent, leaf)
    setattr(parent, leaf, new)
    return lambda: setattr(parent, leaf, old)
