# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints of NAT and DiNAT as transformers names and shapes them, for :class:`nearsight.models.nat.Nat`.

A checkpoint's own ``config.json`` says what it is: networks for 384 pixels have other dilations in weights of the same
shapes, so that nothing else would tell them apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg, is_model, resolve_pretrained_cfg
from torch import Tensor, nn

from ..errors import DataError
from ..files import read_text
from .checkpoints import fitting

CONFIG_FILE, PICTURES_FILE = "config.json", "preprocessor_config.json"
KINDS = ("nat", "dinat")  # the model_type of transformers
# A config's embed_dim and number of blocks, and the size that the papers call so.
SIZES = {(64, 18): "mini", (64, 30): "tiny", (96, 30): "small", (128, 30): "base", (192, 30): "large"}
# What our network has no option for, and what the published ones have.
FIXED = {"patch_size": 4, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_channels": 3}
# transformers' names, without "dinat." before them, in ours.
NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.", "levels."),
    (r"^(levels\.\d+)\.layers\.", r"\1.blocks."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by our names: query, key and value fused in this order, a layer scale parted in two. Ours pass as they are.

    Example:
        >>> sorted(renamed({"dinat.layernorm.bias": torch.zeros(4), "norm.weight": torch.ones(4)}))
        ['norm.bias', 'norm.weight']
    """
    found = {_ours(name): one for name, one in state.items()}
    for name in [name for name in found if name.endswith(".layer_scale_parameters")]:
        start, both = name.removesuffix("layer_scale_parameters"), found.pop(name)
        found[f"{start}gamma1"], found[f"{start}gamma2"] = both.unbind(0)
    for name in [name for name in found if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if not all(part in found for part in parts):
            raise DataError(f"the weights hold {name} without its key or its value: the file is not whole")
        found[name.replace(".query.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return found


def _ours(name: str) -> str:
    name = re.sub(r"^(di)?nat\.", "", name)
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def from_published(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's filter of a state that is to be loaded; see :func:`nearsight.models.checkpoints.fitting`."""
    return fitting(renamed(state), model)


def arguments_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What :class:`~nearsight.models.nat.Nat` is made with to be what transformers' ``config.json`` describes.

    Args:
        where: the config lies, for the message.

    Raises:
        DataError: it lacks something, holds something else than plain numbers, or asks for what Nat has not.

    Example:
        >>> size = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "mlp_ratio": 2.0, "kernel_size": 3}
        >>> arguments_of({"model_type": "dinat", **size, "dilations": [[2], [1]]}, "config.json")["dilations"]
        [[2], [1]]
    """
    for name, wanted in FIXED.items():
        if config.get(name, wanted) != wanted:
            raise DataError(f"{where} has {name}={config[name]!r:.50}; nearsight's network has {wanted!r} alone")
    depths, heads = _read(config, "depths", _counts, where), _read(config, "num_heads", _counts, where)
    plain = [[1] * depth for depth in depths]
    dilations = config.get("dilations") if config["model_type"] == "dinat" else None
    if config["model_type"] == "dinat" and (
        not isinstance(dilations, list)
        or not all(map(_counts, dilations))
        or [len(level) for level in dilations] != depths
    ):
        raise DataError(
            f"{where} needs dilations, a list for each level with one for each block; received {dilations!r:.200}"
        )
    scale = config.get("layer_scale_init_value", 0.0)
    if not _number(scale):
        raise DataError(f"{where} needs a number for layer_scale_init_value; received {scale!r:.50}")
    return {
        "depths": depths,
        "num_heads": heads,
        "embed_dim": _read(config, "embed_dim", _count, where),
        "mlp_ratio": _read(config, "mlp_ratio", _number, where),
        "kernel_size": _read(config, "kernel_size", _count, where),
        "dilations": plain if dilations is None else dilations,
        "layer_scale": scale if scale > 0 else None,
    }


def _read(config: Mapping[str, Any], name: str, is_right: Callable[[Any], bool], where: str) -> Any:
    value = config.get(name)
    if not is_right(value):
        raise DataError(f"{where} does not say {name} as transformers writes it; received {value!r:.100}")
    return value


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_count, value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def refuse_other(variant: str, made_with: Mapping[str, Any], where: Mapping[str, Any], cache_dir: Any = None) -> None:
    """Refuse weights whose own ``config.json`` describes another network than the one that is made.

    Args:
        made_with: the arguments of :class:`~nearsight.models.nat.Nat`.
        where: ``pretrained_cfg`` and ``pretrained_cfg_overlay``, as timm is given them.

    Raises:
        DataError: what differs, and how to take the file's.
    """
    found = resolve_pretrained_cfg(variant, **where)
    if found.file and found.source != "hf-hub":
        folder = Path(found.file)
        config, place = _read_config(folder if folder.is_dir() else folder.parent)
    elif found.hf_hub_id:
        config, place = _fetch_config(found.hf_hub_id, CONFIG_FILE, cache_dir)
    else:
        return
    if config.get("model_type") not in KINDS:
        return
    other = [
        f"{name}={value}".replace(" ", "")
        for name, value in arguments_of(config, place).items()
        if _plain(value, name) != _plain(made_with.get(name), name)
    ]
    if other:
        raise DataError(
            f"{place} says {', '.join(other)}, and {variant} is made with other values: give these as options of the "
            "network to take the file's"
        )


def _plain(value: Any, name: str) -> Any:
    if name == "layer_scale":  # its number is that of the start
        return value is not None
    return [_plain(one, name) for one in value] if isinstance(value, Sequence) else value


def resolve(name: str, cache_dir: Any = None) -> tuple[str, dict[str, Any]] | None:
    """What transformers wrote of a NAT or DiNAT, for ``timm.create_model``, which reads its own alone.

    Args:
        name: ``"local-dir:FOLDER"`` or ``"hf-hub:REPOSITORY"``.

    Returns:
        a registered network's name, and all arguments that make it what the folder holds; None for all other folders.

    Raises:
        DataError: its config cannot be one of such a network.
    """
    source, _, place = name.partition(":")
    config, where = _of_either(source, place, CONFIG_FILE, cache_dir)
    if config.get("model_type") not in KINDS:
        return None
    arguments = arguments_of(config, where)
    labels = config.get("id2label") or {}
    classifies = any("ForImageClassification" in str(one) for one in config.get("architectures") or ())
    num_classes = len(labels) or config.get("num_labels", 2) if classifies else 0  # transformers leaves 2 unwritten
    size = SIZES.get((arguments["embed_dim"], sum(arguments["depths"])))
    architecture = f"{config['model_type']}_{size}"
    architecture = architecture if is_model(architecture) else f"{config['model_type']}_mini"  # all else is said
    known = get_pretrained_cfg(architecture)
    assert known is not None
    try:
        seen = seen_as(_of_either(source, place, PICTURES_FILE, cache_dir)[0])
    except LocalEntryNotFoundError:  # not in the cache, and no network
        seen = {}
    pretrained_cfg = {
        **{key: value for key, value in known.to_dict(remove_source=True).items() if key not in ("tag", "label_names")},
        **seen,
        "num_classes": num_classes,
        "source": source,
        "file" if source == "local-dir" else "hf_hub_id": place,
    }
    if labels:
        pretrained_cfg["label_names"] = tuple(str(labels.get(str(index), index)) for index in range(len(labels)))
    return architecture, {"pretrained_cfg": pretrained_cfg, **arguments}


def seen_as(pictures: Mapping[str, Any]) -> dict[str, Any]:
    """How a network sees pictures by a ``preprocessor_config.json``, in timm's words, as far as that says it plainly.

    Example:
        >>> seen_as({"size": 384, "resample": 3})
        {'input_size': (3, 384, 384), 'crop_pct': 1.0, 'crop_mode': 'squash', 'interpolation': 'bicubic'}
    """
    found: dict[str, Any] = {}
    size = pictures.get("size")
    side = size.get("height") if isinstance(size, Mapping) and size.get("height") == size.get("width") else size
    if _count(side):
        found |= {"input_size": (3, side, side), "crop_pct": 1.0, "crop_mode": "squash"}
    if pictures.get("resample") in (2, 3):
        found["interpolation"] = {2: "bilinear", 3: "bicubic"}[pictures["resample"]]
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        values = pictures.get(theirs)
        if isinstance(values, list) and len(values) == 3 and all(map(_number, values)):
            found[ours] = tuple(values)
    return found


def _of_either(source: str, place: str, file: str, cache_dir: Any) -> tuple[dict[str, Any], str]:
    return _read_config(Path(place), file) if source == "local-dir" else _fetch_config(place, file, cache_dir)


def _read_config(folder: Path, file: str = CONFIG_FILE) -> tuple[dict[str, Any], str]:
    path = folder / file
    return (_parsed(path), str(path)) if path.is_file() else ({}, str(path))


def _fetch_config(repository: str, file: str, cache_dir: Any) -> tuple[dict[str, Any], str]:
    repository, _, revision = repository.partition("@")
    try:
        path = hf_hub_download(repository, file, revision=revision or None, cache_dir=cache_dir)
    except LocalEntryNotFoundError:  # which is one of the next kind, but means that there is no network
        raise
    except EntryNotFoundError:
        return {}, file
    return _parsed(Path(path)), f"{repository}/{file}"


def _parsed(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold a table; received {values!r:.100}")
    return values
