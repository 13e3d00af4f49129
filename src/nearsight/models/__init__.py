# SPDX-License-Identifier: Apache-2.0
"""Networks of attention, registered with timm: ``timm.create_model`` knows them once nearsight is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import timm
from timm.models import get_pretrained_cfg, model_entrypoint, register_notrace_module
from torch import nn

from ..errors import OptionError
from ..layers import AttentionStem2d, GlobalSelfAttention2d, HaloSelfAttention2d, LocalSelfAttention2d
from ..layers.projection import PatchProjection2d
from . import blocks, first_weights, halonet, nat, sasa, twins
from .own import register
from .spec import ELSEWHERE, GIVEN, given_name, parse_spec

__all__ = [
    "ELSEWHERE",
    "GIVEN",
    "create_model",
    "given_name",
    "input_size",
    "list_models",
    "list_twins",
    "made_for_size",
    "parse_spec",
    "pretrained_value",
    "refuse_ignored",
    "register",
]

_FAMILIES = (halonet, nat, sasa)

# timm's graphs of torch.fx take these whole: what they do hangs on the size of the map, which a graph does not know.
for _layer in (
    AttentionStem2d,
    GlobalSelfAttention2d,
    HaloSelfAttention2d,
    LocalSelfAttention2d,
    PatchProjection2d,
    blocks.RelativeOnlySelfAttention2d,
    nat.NeighbourhoodAttention,
):
    register_notrace_module(_layer)


def list_models(filter: str = "") -> list[str]:
    """The names of nearsight's own networks of attention.

    Args:
        filter: a pattern with wildcards, as that of ``timm.list_models``; "" is all.

    Example:
        >>> list_models("*nano")
        ['sasa_nano']
    """
    return _matching(filter, (name for family in _FAMILIES for name in family.__all__))


def list_twins(filter: str = "") -> list[str]:
    """The names of the networks that ours are compared with.

    Example:
        >>> list_twins()
        ['conv_micro', 'conv_nano', 'vit_micro']
    """
    return _matching(filter, twins.__all__)


def _matching(filter: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if timm.is_model(name) and fnmatchcase(name, filter or "*"))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """A network by name: one of :func:`list_models`, or any that timm knows.

    Args:
        name: of the network, or ``"hf-hub:repository"`` or ``"local-dir:folder"`` of one that timm saved; options may
            follow it, as :func:`parse_spec` reads them.
        kwargs: passed to ``timm.create_model``: ``num_classes``, ``in_chans``, ``features_only``, ``checkpoint_path`` …,
            and what the network itself takes.

    Raises:
        OptionError: no such network, and the message names the nearest; or an option in ``name`` that it does not take.

    Example:
        >>> create_model("sasa_nano", num_classes=10, in_chans=1)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> create_model("sasa_nano,kernel_size=3,position=none", num_classes=10)(torch.randn(2, 3, 28, 28)).shape
        torch.Size([2, 10])
    """
    name, options = parse_spec(name)
    if name.startswith(GIVEN):
        raise OptionError(
            f"the network {name.removeprefix(GIVEN)} was given from Python, and no name or file makes it again: make it, "
            "and take nearsight.load(RUN, model=network), or nearsight.train(model=network, data=...)"
        )
    is_saved = name.startswith(ELSEWHERE)
    if not is_saved and not timm.is_model(timm.models.split_model_name_tag(name)[0]):
        near = get_close_matches(name.lower().replace("-", "_"), [*list_models(), *timm.list_models()], n=3)
        advice = (
            f"did you mean {', '.join(near)}?" if near else "`nearsight models` lists ours, timm.list_models() theirs"
        )
        raise OptionError(f"there is no model {name!r}; {advice}")
    twice = sorted(options.keys() & kwargs.keys())
    if twice:
        raise OptionError(f"{', '.join(twice)} of model {name!r} is set by what creates it; leave it out of the name")
    try:
        model = timm.create_model(name, **options, **kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in options:
            raise OptionError(f"model {name!r} has no option {unknown[1]!r}; received {options}") from error
        raise
    if not is_saved and not any((options | kwargs).get(weights) for weights in ("pretrained", "checkpoint_path")):
        first_weights.note(model)
    return model


def input_size(spec: str) -> int:
    """The side of the pictures that a network is made for: its option ``img_size``, else what its family says.

    Example:
        >>> input_size("sasa_nano"), input_size("resnet18"), input_size("vit_tiny_patch16_224,img_size=96")
        (32, 224, 96)
    """
    asked = parse_spec(spec)[1].get("img_size")
    if asked is not None:
        return asked[-1] if isinstance(asked, (list, tuple)) else asked
    return (pretrained_value(spec, "input_size") or (3, 224, 224))[-1]


def made_for_size(spec: str) -> bool:
    """Whether a network is built for pictures of one size, which its option ``img_size`` then says.

    It can take no other, as timm's transformers, or keeps tables for it, as ours of global attention and learned positions.

    Example:
        >>> made_for_size("vit_tiny_patch16_224"), made_for_size("sasa_nano"), made_for_size("resnet18")
        (True, True, False)
    """
    name = timm.models.split_model_name_tag(parse_spec(spec)[0])[0]
    ours = timm.is_model(name) and model_entrypoint(name).__module__ in (sasa.__name__, twins.__name__)
    return ours or bool(pretrained_value(spec, "fixed_input_size"))


def pretrained_value(spec: str, name: str) -> Any:
    """What timm knows of a network before it is built; None for one without such an entry."""
    return getattr(get_pretrained_cfg(parse_spec(spec)[0]), name, None)


def refuse_ignored(spec: str) -> None:
    """Refuse an option in a network's name that would be taken without a word and change nothing.

    Raises:
        OptionError: an option of attention for a network without any; one that is null, which timm drops.
    """
    name, options = parse_spec(spec)
    null = [option for option, value in options.items() if value is None]
    if null:
        raise OptionError(f"option {null[0]} of model {name!r} is null, which leaves the default: leave it out")
    attends = name.partition(".")[0] not in twins.CONVOLUTIONAL and options.get("attention_stages", True) != []
    in_blocks = options.get("block_kwargs")
    useless = options.keys() & sasa.OF_ATTENTION
    useless |= (in_blocks if isinstance(in_blocks, dict) else {}).keys() & sasa.OF_ATTENTION_IN_BLOCKS
    if not attends and useless:
        raise OptionError(f"model {name!r} has no attention, and so no {min(useless)}: leave it out; received {spec!r}")
