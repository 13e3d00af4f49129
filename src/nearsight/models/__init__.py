# SPDX-License-Identifier: Apache-2.0
"""Networks of attention, registered with timm: ``timm.create_model`` knows them once nearsight is imported."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import timm
from torch import nn

from ..errors import OptionError
from . import halonet, nat, sasa
from .flops import count_flops

__all__ = ["count_flops", "create_model", "list_models"]

_FAMILIES = (halonet, nat, sasa)


def list_models() -> list[str]:
    """The names of nearsight's own networks.

    Example:
        >>> "sasa_nano" in list_models()
        True
    """
    return sorted(name for family in _FAMILIES for name in family.__all__ if timm.is_model(name))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """A network by name: one of :func:`list_models`, or any that timm knows.

    Args:
        name: of the network, or ``"hf-hub:repository"`` or ``"local-dir:folder"`` of one that timm saved.
        kwargs: passed to ``timm.create_model``: ``num_classes``, ``in_chans``, ``features_only``, ``checkpoint_path`` …,
            and what the network itself takes.

    Raises:
        OptionError: no such network; the message names the nearest.

    Example:
        >>> create_model("sasa_nano", num_classes=10, in_chans=1)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    is_saved = name.startswith(("hf-hub:", "local-dir:"))
    if not is_saved and not timm.is_model(timm.models.split_model_name_tag(name)[0]):
        near = get_close_matches(name, [*list_models(), *timm.list_models()], n=3)
        advice = (
            f"did you mean {', '.join(near)}?" if near else "`nearsight models` lists ours, timm.list_models() theirs"
        )
        raise OptionError(f"there is no model {name!r}; {advice}")
    return timm.create_model(name, **kwargs)
