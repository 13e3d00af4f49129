# SPDX-License-Identifier: Apache-2.0
"""``nearsight convert``: from a network by name, or a trained one, to a folder with the converted one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, load_state_dict, split_model_name_tag
from torch import nn

from ..conversion import ConversionReport, convert
from ..errors import DataError, NearsightError, OptionError, TrainingError
from ..files import make_folder, write_text
from ..finite import why_not_finite
from ..models import create_model, input_size, parse_spec
from ..pages.csv_json import to_json
from .trained_on import TRAINED_FILE, read_trained, write_trained
from .view import View
from .weights import WEIGHTS_FILE, Blueprint, check_sums, load_model, save_model

REPORT_FILE = "report.json"


def convert_to_folder(
    model: str, output: Path, *, pretrained: bool = False, checkpoint: Path | None = None, **options: Any
) -> ConversionReport:
    """Convert a network and leave ``model.safetensors``, which ``nearsight eval`` reads, and ``report.json`` in a folder.

    Args:
        model: a name that :func:`nearsight.create_model` knows, or a folder or file that ``nearsight`` left.
        pretrained: with the weights that timm offers for the name.
        checkpoint: with weights from a file, whose classifier tells the number of classes. Executes no code from it.
        options: of :func:`nearsight.convert`.

    Raises:
        TrainingError: the folder holds a model already, or cannot be written to.
        DataError: weights that cannot be had, read, or fitted to the network, or are not finite.
        OptionError: what :func:`nearsight.convert` refuses; a network without any layer to convert.
    """
    if (output / WEIGHTS_FILE).exists():
        raise TrainingError(f"{output} holds a model already: name another --output")
    network, blueprint, trained = _open(model, pretrained, checkpoint)
    view = blueprint.view
    report = convert(network, input_size=(view.channels, view.size, view.size), **options)
    if not report.converted:
        raise OptionError(f"{model}: {report.summary()[0]}")
    kept = blueprint.kept(network)
    with torch.no_grad():
        reason = why_not_finite(network(torch.randn(1, view.channels, view.size, view.size)), network)
    if reason is not None:
        raise DataError(f"{model} cannot be converted: {reason}; nothing was written")
    make_folder(output)
    save_model(output / WEIGHTS_FILE, network, replace(kept, converted=report.options))
    (output / TRAINED_FILE).unlink(missing_ok=True)  # another network's
    if trained is not None:
        write_trained(output, trained)
    facts = {"model": blueprint.model, "random_weights": has_random_weights(model, pretrained, checkpoint)}
    write_text(output / REPORT_FILE, to_json({**facts, **report.to_dict()}) + "\n")
    return report


def has_random_weights(model: str, pretrained: bool = False, checkpoint: Path | None = None) -> bool:
    """Whether the weights that :func:`convert_to_folder` converts were never trained."""
    return _is_name(model) and not (pretrained or checkpoint or parse_spec(model)[1].get("pretrained"))


def _is_name(model: str) -> bool:
    """Whether it names a network, and neither a folder nor a file."""
    return timm.is_model(split_model_name_tag(parse_spec(model)[0])[0]) or not Path(model).exists()


def _open(model: str, pretrained: bool, checkpoint: Path | None) -> tuple[nn.Module, Blueprint, np.ndarray | None]:
    """The network, its blueprint, and the pictures that it was trained on where they are noted."""
    if _is_name(model):
        return *_by_name(model, pretrained, checkpoint), None
    if pretrained or checkpoint is not None:
        raise OptionError(f"{model} has its weights already: leave out --pretrained and --checkpoint")
    network, blueprint = load_model(Path(model))
    if blueprint.converted is not None:
        raise OptionError(f"{model} is converted already ({blueprint.converted['init']})")
    return network, blueprint, read_trained(Path(model))


def _by_name(model: str, pretrained: bool, checkpoint: Path | None) -> tuple[nn.Module, Blueprint]:
    if pretrained and checkpoint is not None:
        raise OptionError("--pretrained and --checkpoint both name weights: leave one out")
    if own := sorted({"num_classes", "in_chans"} & set(parse_spec(model)[1])):
        raise OptionError(f"{own[0]} of {model} follows from its weights; leave it out of the name")
    weights = {} if checkpoint is None else _read(checkpoint)
    classes, channels = _borders(model, weights)
    kwargs = {"num_classes": classes, "in_chans": channels}
    try:
        network = create_model(model, pretrained=pretrained, **{k: v for k, v in kwargs.items() if v is not None})
    except NearsightError:
        raise
    except Exception as error:  # no network, no such weights: timm and huggingface_hub raise many kinds
        if not pretrained:
            raise
        raise DataError(f"cannot get pretrained weights of {model}: {_first_line(error)}") from error
    if weights:
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise DataError(f"{checkpoint} does not fit {model}: {' '.join(str(error).split())[:200]}") from error
    config = getattr(network, "pretrained_cfg", {})
    subset = infer_imagenet_subset(network) if pretrained else None
    names = ImageNetInfo(subset).label_descriptions() if subset else [f"class {i}" for i in range(_outputs(network))]
    channels = channels or config.get("input_size", (3,))[0]
    mean, std = (_per_channel(config.get(key), channels) for key in ("mean", "std"))
    data = config.get("tag") if pretrained else None if checkpoint is None else checkpoint.name
    return network.eval(), Blueprint(
        model, tuple(names), View(channels, input_size(model), mean, std), data or "nothing"
    )


def _read(checkpoint: Path) -> dict[str, Any]:
    if not checkpoint.is_file():
        raise DataError(f"there is no {checkpoint}")
    try:
        if is_zipfile(checkpoint):
            check_sums(checkpoint)
        return load_state_dict(str(checkpoint), weights_only=True)
    except Exception as error:  # as many kinds as there are formats; each means the same to the user
        raise DataError(f"cannot read {checkpoint}: it is damaged, of another kind, or would run code") from error


def _borders(model: str, weights: dict[str, Any]) -> tuple[int | None, int | None]:
    """Classes and channels of the picture as the weights have them; None where they do not say."""
    config = get_pretrained_cfg(parse_spec(model)[0])
    found = []
    for layer, axis in ((getattr(config, "classifier", None), 0), (getattr(config, "first_conv", None), 1)):
        first = layer[0] if isinstance(layer, (tuple, list)) else layer
        weight = weights.get(f"{first}.weight")
        found.append(None if weight is None else weight.shape[axis])
    return found[0], found[1]


def _outputs(network: nn.Module) -> int:
    classes = getattr(network, "num_classes", None)
    if not isinstance(classes, int) or classes < 1:
        raise OptionError(f"{type(network).__name__} names no classes: only classifiers can be kept in a folder")
    return classes


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(values or (0.5,) * channels)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
