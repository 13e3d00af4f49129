# SPDX-License-Identifier: Apache-2.0
"""What a file may hold of the text that a network is written as.

What is typed may say everything that ``timm.create_model`` takes. A file may come from anywhere, and what it says is done on
the machine of whoever opens it, so a file may name a registered network and the network's own options, in plain values.
Pretrained weights, addresses, paths, caches and hubs are refused there, and left out when a network is saved: the weights
are in the file already.
"""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, model_entrypoint, split_model_name_tag
from torch import nn

from ..errors import OptionError
from ..files import read_yaml
from ..models import ELSEWHERE, GIVEN, parse_spec

# Where weights come from, and what is arranged around a network rather than in it: by the signatures that take them.
_AROUND = (inspect.signature(timm.create_model).parameters.keys() - {"model_name", "kwargs"}) | (
    inspect.signature(build_model_with_cfg).parameters.keys() - {"kwargs"}
)
# Of a pretrained_cfg, what says where weights are. The rest of its fields are options of networks as well.
_WHERE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"} & {
    field.name for field in fields(PretrainedCfg)
}
_SET_BY_WHAT_BUILDS = ("num_classes", "in_chans", "drop_path_rate")
_WORD = r"([A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*)?"  # a position of one's own may have dots in its name


def check_saved_spec(spec: Any) -> str:
    """A network as a file names it, if a file may.

    Raises:
        OptionError: it is not registered, or an option is not the network's own or no plain value.

    Example:
        >>> check_saved_spec("sasa_micro,kernel_size=[3, 5, 7],position=none")
        'sasa_micro,kernel_size=[3, 5, 7],position=none'
    """
    if not isinstance(spec, str):
        raise OptionError(f"a model is written NAME,option=value,option=value; received {spec!r:.200}")
    if re.fullmatch(rf"{GIVEN}\w+", spec):  # stands for what its user has, and makes nothing
        return spec
    name, options = parse_spec(spec)
    rule = "a file may name a registered network and plain options of its own, and nothing that is fetched or read elsewhere"
    base = split_model_name_tag(name)[0]
    if not re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) or not timm.is_model(base):
        raise OptionError(f"{rule}; received the name {name!r:.200}")
    own = own_options(base)
    for option, value in options.items():
        if option not in own or not is_plain(value):
            raise OptionError(f"{rule}; received {option}={value!r:.100} for {base}")
    return spec


def saved_spec(spec: str, network: nn.Module | None = None) -> str:
    """``spec`` as a file may hold it: without what says where weights come from.

    Args:
        network: what was built from it. A network from a hub or a folder is written as the registered one that it is.

    Raises:
        OptionError: what is left cannot be held by a file; see :func:`check_saved_spec`.

    Example:
        >>> saved_spec("resnet18,pretrained=true,drop_rate=0.1")
        'resnet18,drop_rate=0.1'
    """
    name, options = parse_spec(spec)
    if name.startswith(ELSEWHERE) and network is not None:
        config = getattr(network, "pretrained_cfg", None) or {}
        built = {*_SET_BY_WHAT_BUILDS, *(["img_size"] if config.get("fixed_input_size") else [])}
        saved = getattr(network, "_model_args", None)  # what was saved beside the weights, for timm to rebuild it
        if saved is None:
            raise OptionError(f"this timm does not tell what {name} was built with, so no file can: a newer one does")
        name = config.get("architecture") or name
        options = {**{option: value for option, value in saved.items() if option not in built}, **options}
    elif not options.keys() & _AROUND:
        return check_saved_spec(spec)
    kept = [f"{option}={_write(value)}" for option, value in options.items() if option not in _AROUND]
    return check_saved_spec(",".join([name, *kept]))


def without_option(spec: str, option: str) -> str:
    """``spec`` without one of its options.

    Example:
        >>> without_option("sasa_nano,img_size=48,position=bias", "img_size")
        'sasa_nano,position=bias'
    """
    name, options = parse_spec(spec)
    return ",".join([name, *(f"{other}={_write(value)}" for other, value in options.items() if other != option)])


def own_options(name: str) -> set[str]:
    """What a registered network takes: by the signatures in the file that it is registered in.

    That of its class does not tell on its own: many take ``**kwargs`` and hand them to a dataclass or a base class, and a
    network of one's own may be made by a registered one of another file.
    """
    functions = [model_entrypoint(name)]
    for function in functions:  # which grows
        functions += [
            other
            for other in function.__globals__.values()
            if isinstance(other, FunctionType)
            and all(other.__globals__ is not seen.__globals__ for seen in functions)
            and timm.is_model(other.__name__)
            and model_entrypoint(other.__name__) is other
        ]
    found = {option for function in functions for option in inspect.signature(function).parameters}
    kinds = [thing for function in functions for thing in function.__globals__.values() if isinstance(thing, type)]
    for kind in kinds:
        if issubclass(kind, nn.Module):
            for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
                found |= inspect.signature(base.__init__).parameters.keys()
    named = {field.name for kind in kinds if is_dataclass(kind) for field in fields(kind)}
    parts = [name.removesuffix("cfg") for name in named if name.endswith("_cfg")]  # as MaxxVit's transformer_cfg
    found |= named | {part + name for part in parts for name in named}
    return found - _AROUND - _WHERE - {"self", "args", "kwargs"}


def is_plain(value: Any) -> bool:
    """Numbers and words, and lists and tables of them; no paths and no addresses, however deep."""
    if isinstance(value, dict):
        return all(is_plain(key) and key not in _AROUND | _WHERE and is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, str):
        return re.fullmatch(_WORD, value) is not None
    return value is None or isinstance(value, (bool, int, float))


def _write(value: Any) -> str:
    """A value as :func:`parse_spec` reads it."""
    if isinstance(value, str) and re.fullmatch(_WORD, value) and value and read_yaml(value) == value:
        return value
    return json.dumps(value)
