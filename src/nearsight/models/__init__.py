# SPDX-License-Identifier: Apache-2.0
"""Networks of attention, registered with timm: ``timm.create_model`` knows them once nearsight is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import timm
from timm.models import get_pretrained_cfg, load_checkpoint, model_entrypoint, register_notrace_module
from torch import Tensor, nn

from ..errors import OptionError
from ..layers import AttentionStem2d, GlobalSelfAttention2d, HaloSelfAttention2d, LocalSelfAttention2d
from ..layers.projection import PatchProjection2d
from . import blocks, first_weights, halonet, nat, published, sasa, twins
from .backbone import Backbone
from .checkpoints import fitting, reading
from .own import register
from .resized import resize_positions
from .shipped import MADE_BY, TAGS, shipped
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
    "resize_positions",
    "shipped",
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
        OptionError: no such network, and the message names the nearest; an option in ``name`` that it does not take; a tag
            that it has not; ``pretrained`` where there are no weights.
        DataError: weights that cannot be fetched or read, that would run code, or that are another network's.

    Example:
        >>> create_model("sasa_nano", num_classes=10, in_chans=1)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> create_model("sasa_nano,kernel_size=3,position=none", num_classes=10)(torch.randn(2, 3, 28, 28)).shape
        torch.Size([2, 10])
        >>> create_model("sasa_nano", pretrained=True).pretrained_cfg["label_names"][7]
        '7'
    """
    name, options = parse_spec(name)
    if name.startswith(GIVEN):
        raise OptionError(
            f"the network {name.removeprefix(GIVEN)} was given from Python, and no name or file makes it again: make it, "
            "and take nearsight.load(RUN, model=network), or nearsight.train(model=network, data=...)"
        )
    is_saved = name.startswith(ELSEWHERE)
    base, tag = timm.models.split_model_name_tag(name)
    if not is_saved and not timm.is_model(base):
        known = {*list_models(), *timm.list_models()}  # timm lists ours too
        near = get_close_matches(name.lower().replace("-", "_"), sorted(known), n=3)
        advice = (
            f"did you mean {', '.join(near)}?" if near else "`nearsight models` lists ours, timm.list_models() theirs"
        )
        raise OptionError(f"there is no model {name!r}; {advice}")
    if not is_saved and tag and name not in timm.list_models(f"{base}.*", include_tags=True):
        tags = [one.partition(".")[2] for one in timm.list_models(f"{base}.*", include_tags=True)]
        raise OptionError(f"{base} has no tag {tag!r}; it has {', '.join(sorted(tags)) or 'none'}")
    twice = sorted(options.keys() & kwargs.keys())
    if twice:
        raise OptionError(f"{', '.join(twice)} of model {name!r} is set by what creates it; leave it out of the name")
    asked = options | kwargs
    file, pretrained = asked.pop("checkpoint_path", None), bool(asked.get("pretrained"))
    if pretrained:
        _refuse_weightless(name, asked)
    try:
        with reading(name) if pretrained or is_saved else nullcontext():
            model = _create(name, asked) if is_saved else timm.create_model(name, **asked)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in options:
            raise OptionError(f"model {name!r} has no option {unknown[1]!r}; received {options}") from error
        raise
    if file:
        with reading(f"{name} in {file}"):
            load_checkpoint(model, str(file), filter_fn=_of_file if isinstance(model, Backbone) else None)
    if not is_saved and not pretrained and not file:
        first_weights.note(model)
    return model


def _of_file(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """What a file holds, by our names, once all of it fits."""
    return fitting(published.renamed(state) if isinstance(model, nat.Nat) else state, model, adapted=False)


def _create(name: str, asked: Mapping[str, Any]) -> nn.Module:
    """One from a folder or a repository, which timm wrote or transformers."""
    architecture, arguments = published.resolve(name, asked.get("cache_dir")) or (name, {})
    return timm.create_model(architecture, **{**arguments, **asked})


def _refuse_weightless(name: str, asked: Mapping[str, Any]) -> None:
    """Refuse pretrained weights of a network of ours that has none, and say how to come by some.

    Raises:
        OptionError: there are none, and nothing in ``asked`` says where others are.
    """
    base, tag = timm.models.split_model_name_tag(name)
    if (
        base not in [*list_models(), *list_twins()]
        or asked.get("pretrained_cfg")
        or asked.get("pretrained_cfg_overlay")
    ):
        return
    config = get_pretrained_cfg(f"{base}.{TAGS[base]}" if base in TAGS and not tag else name)
    if config is None or not config.has_weights:
        command, folder = MADE_BY.get(base, (f"nearsight train --model {base} --data DATA", f"runs/{base}-DATA"))
        raise OptionError(
            f"{name} comes without weights: leave out pretrained, or make some with `{command}`, which leaves them in "
            f'{folder}, for nearsight.load("{folder}")'
        )


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
