# SPDX-License-Identifier: Apache-2.0
"""Networks of one's own, by a name that everything takes: commands, recipes, files, timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from ..errors import OptionError

_registered: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, factory: Callable[..., nn.Module]) -> None:
    """Make a network known by a name, to nearsight and to timm; :func:`nearsight.create_model` then makes it.

    Args:
        name: a word.
        factory: ``factory(*, num_classes, in_chans, **options)``, with options in plain values; a class of modules is one.

    Raises:
        OptionError: no word, the name of another network, or a factory that does not take these two.

    Example:
        >>> class Tiny(nn.Sequential):
        ...     def __init__(self, num_classes=10, in_chans=3, width=8):
        ...         super().__init__(nn.Conv2d(in_chans, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ...                          nn.Linear(width, num_classes))
        >>> register("tiny", Tiny)
        >>> create_model("tiny,width=16", num_classes=4)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 4])
    """
    if not (name.isidentifier() and name.isascii()):
        raise OptionError(f"the name of a network is a word of letters, digits and underscores; received {name!r}")
    if timm.is_model(name):
        if _registered.get(name) is factory:
            return
        raise OptionError(f"there is a network {name!r} already: take another name")
    signature = inspect.signature(factory)
    try:
        signature.bind_partial(num_classes=10, in_chans=3)
    except TypeError as error:
        raise OptionError(
            f"what makes {name} must take num_classes and in_chans by name; it takes {signature}"
        ) from error

    def create(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise OptionError(f"{name} comes without weights: leave out pretrained")
        network = factory(**options)
        noted = {
            "architecture": name,
            **(getattr(network, "pretrained_cfg", None) or {}),
            **(pretrained_cfg_overlay or {}),
        }
        network.pretrained_cfg = noted  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        return network

    create.__name__ = create.__qualname__ = name
    create.__wrapped__ = factory  # pyright: ignore[reportFunctionMemberAccess] # whose options are the network's
    register_model(create)
    _registered[name] = factory
