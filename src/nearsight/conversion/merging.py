# SPDX-License-Identifier: Apache-2.0
"""Blocks that merge their convolutions, as RepVGG's do for inference: they would read a converted layer's kernel alone."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter, signature
from typing import Any

from torch import nn

from ..errors import OptionError

MERGES = ("fuse", "reparameterize", "switch_to_deploy")  # what timm's reparameterize_model calls


def refuse_to_merge(model: nn.Module, converted: Iterable[str]) -> None:
    """Let every block around a converted layer refuse to merge what it holds, where it has a method for that."""
    paths = {name.rsplit(".", depth)[0] for name in converted for depth in range(1, name.count(".") + 1)}
    for path in paths:
        block = model.get_submodule(path)
        for method in filter(lambda name: _merges(getattr(block, name, None)), MERGES):
            setattr(block, method, _refuse)


def _merges(method: Any) -> bool:
    """Whether it is a method that needs no argument: what mixes features is called so too."""
    if not callable(method) or isinstance(method, nn.Module):
        return False
    return all(one.default is not Parameter.empty for one in signature(method).parameters.values())


def _refuse(*_: Any, **__: Any) -> None:
    raise OptionError(
        "a block that holds converted layers cannot merge its convolutions, which would throw the attention away: merge "
        "first, as by timm.utils.reparameterize_model(model), and convert last"
    )
