# SPDX-License-Identifier: Apache-2.0
"""A run's folder as timm has one: ``timm.create_model("local-dir:runs/digits", pretrained=True)``."""

from __future__ import annotations

from os import PathLike

from timm.models import split_model_name_tag
from torch import nn

from ..files import to_path, write_text
from ..models import parse_spec
from ..pages.csv_json import to_json
from .weights import Blueprint

TIMM_FILE = "config.json"  # in a run's folder; timm and huggingface_hub look for this name
KEPT = ("first_conv", "classifier", "pool_size", "fixed_input_size")  # of what timm notes of a network


def write_timm_config(folder: str | PathLike[str], network: nn.Module, blueprint: Blueprint) -> None:
    """Leave beside the weights what timm rebuilds the network from, and what it shows it pictures by.

    A network that was converted has layers that timm would not make, so there is nothing that it could be told.

    Args:
        network: with its weights, as ``blueprint`` builds it.

    Raises:
        TrainingError: the folder cannot be written to.
    """
    assert blueprint.converted is None
    name, options = parse_spec(blueprint.model)
    noted = getattr(network, "pretrained_cfg", None) or {}
    arguments = {**options, "in_chans": blueprint.view.channels}
    if blueprint.img_size is not None:
        arguments.setdefault("img_size", blueprint.img_size)
    values = {
        "architecture": split_model_name_tag(name)[0],
        "num_classes": len(blueprint.classes),
        "num_features": getattr(network, "num_features", None),
        "label_names": blueprint.classes,
        "model_args": arguments,
        "pretrained_cfg": {
            **blueprint.view.data_config(),
            **{key: noted[key] for key in KEPT if noted.get(key) is not None},
            "num_classes": len(blueprint.classes),
        },
    }
    write_text(to_path(folder) / TIMM_FILE, to_json(values) + "\n")
