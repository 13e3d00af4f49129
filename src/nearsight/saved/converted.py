# SPDX-License-Identifier: Apache-2.0
"""``nearsight convert``: from a network by name, or a trained one, to a folder with the converted one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import Tensor, nn

from ..conversion import ConversionReport, convert
from ..errors import DataError, NearsightError, OptionError, TrainingError
from ..files import make_folder, to_path, write_text
from ..finite import why_not_finite
from ..models import create_model, input_size, made_for_size, parse_spec
from ..pages.brief import Brief
from ..pages.csv_json import to_json
from ..telling import telling
from .foreign import read_weights
from .trained_on import TRAINED_FILE, read_trained, write_trained
from .view import View
from .weights import WEIGHTS_FILE, Blueprint, load_model, save_model

REPORT_FILE = "report.json"


@dataclass(frozen=True, repr=False)
class Known(Brief):
    """What a file of weights does not say of a network, and its user knows. None leaves it to what timm says of the name.

    Attributes:
        classes: the names of its outputs, in their order.
        size: pixels per side of the pictures that it was trained on.
        mean, std: that these were normalised with, a number per channel, of colours between 0 and 1.

    Raises:
        OptionError: a size below 1, a deviation that is not above 0, a class twice.
    """

    classes: Sequence[str] | None = None
    size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise OptionError(f"--size must be at least 1; received {self.size}")
        twice = [name for place, name in enumerate(self.classes or ()) if name in (self.classes or ())[:place]]
        if twice:
            raise OptionError(f"each class has a name of its own; received {twice[0]!r} twice")
        for name, values, least in (("--mean", self.mean, -math.inf), ("--std", self.std, 0)):
            wrong = [one for one in values or () if not (math.isfinite(one) and one > least)]
            if wrong:
                raise OptionError(f"{name} must be finite{' and above 0' * (least == 0)}; received {wrong[0]:g}")

    @property
    def is_empty(self) -> bool:
        return self == Known()


def convert_to_folder(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    pretrained: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    known: Known | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert a network and leave ``model.safetensors``, which ``nearsight eval`` reads, and ``report.json`` in a folder.

    Args:
        model: a name that :func:`nearsight.create_model` knows, or a folder or file that ``nearsight`` left.
        pretrained: with the weights that timm offers for the name.
        checkpoint: with weights from a file, whose classifier tells the number of classes; see
            :func:`nearsight.saved.foreign.read_weights`. Executes no code from it.
        known: its classes, and how it sees pictures.
        options: of :func:`nearsight.convert`.

    Raises:
        TrainingError: the folder holds a model already, or cannot be written to.
        DataError: weights that cannot be had, read, or fitted to the network, or are not finite.
        OptionError: what :func:`nearsight.convert` refuses; a network without any layer to convert; what is known does not
            fit the network.
    """
    model, output = str(model), to_path(output)
    if (output / WEIGHTS_FILE).exists():
        raise TrainingError(f"{output} holds a model already: name another --output")
    network, blueprint, trained = _open(model, pretrained, checkpoint, known or Known())
    view = blueprint.view
    with telling(f"converting {model}"):
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
    facts = {
        "model": blueprint.model,
        "weights": blueprint.data,
        "random_weights": has_random_weights(model, pretrained, checkpoint),
    }
    write_text(output / REPORT_FILE, to_json({**facts, **report.to_dict()}) + "\n")
    return report


def has_random_weights(model: str, pretrained: bool = False, checkpoint: str | PathLike[str] | None = None) -> bool:
    """Whether the weights that :func:`convert_to_folder` converts were never trained."""
    return _is_name(model) and not (pretrained or checkpoint or parse_spec(model)[1].get("pretrained"))


def _is_name(model: str) -> bool:
    """Whether it names a network, and neither a folder nor a file."""
    return timm.is_model(split_model_name_tag(parse_spec(model)[0])[0]) or not to_path(model).exists()


def _open(
    model: str, pretrained: bool, checkpoint: str | PathLike[str] | None, known: Known
) -> tuple[nn.Module, Blueprint, np.ndarray | None]:
    """The network, its blueprint, and the pictures that it was trained on where they are noted."""
    if _is_name(model):
        return *_by_name(model, pretrained, checkpoint, known), None
    if pretrained or checkpoint is not None or not known.is_empty:
        raise OptionError(
            f"{model} has its weights already, and says how it sees pictures: leave out --pretrained, --checkpoint, "
            "--classes, --size, --mean and --std"
        )
    network, blueprint = load_model(model)
    if blueprint.converted is not None:
        raise OptionError(f"{model} is converted already ({blueprint.converted['init']})")
    return network, blueprint, read_trained(model)


def _by_name(
    model: str, pretrained: bool, checkpoint: str | PathLike[str] | None, known: Known
) -> tuple[nn.Module, Blueprint]:
    if pretrained and checkpoint is not None:
        raise OptionError("--pretrained and --checkpoint both name weights: leave one out")
    if own := sorted({"num_classes", "in_chans"} & set(parse_spec(model)[1])):
        raise OptionError(f"{own[0]} of {model} follows from its weights; leave it out of the name")
    weights, where = ({}, "") if checkpoint is None else read_weights(checkpoint, model, _names(model))
    classes, channels = _borders(model, weights)
    if classes is None and known.classes is not None and not pretrained:
        classes = len(known.classes)
    asked = {"num_classes": classes, "in_chans": channels}
    asked["img_size"] = known.size if made_for_size(model) and "img_size" not in parse_spec(model)[1] else None
    network = _created(model, pretrained, {name: one for name, one in asked.items() if one is not None})
    if weights:
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise DataError(f"{checkpoint} does not fit {model}: {' '.join(str(error).split())[:200]}") from error
    data = getattr(network, "pretrained_cfg", {}).get("tag") if pretrained else None
    if checkpoint is not None:
        data = Path(checkpoint).name + (f" ({where})" if where else "")
    view = _view(network, channels, known.size or input_size(model), known)
    img_size = view.size if "img_size" in asked and asked["img_size"] is not None else None
    return network.eval(), Blueprint(
        model, _class_names(network, pretrained, known), view, data or "nothing", img_size=img_size
    )


def _created(model: str, pretrained: bool, asked: dict[str, Any]) -> nn.Module:
    try:
        return create_model(model, pretrained=pretrained, **asked)
    except NearsightError:
        raise
    except Exception as error:  # no network, no such weights: timm and huggingface_hub raise many kinds
        if not pretrained:
            raise
        raise DataError(f"cannot get pretrained weights of {model}: {_first_line(error)}") from error


def _names(model: str) -> set[str]:
    """Those of a network's parameters and buffers."""
    with torch.device("meta"):
        return set(create_model(model).state_dict())


def _class_names(network: nn.Module, pretrained: bool, known: Known) -> tuple[str, ...]:
    outputs = _outputs(network)
    if known.classes is not None:
        if len(known.classes) != outputs:
            raise OptionError(
                f"--classes must name all {outputs} classes of the network; received {len(known.classes)}"
            )
        return tuple(known.classes)
    subset = infer_imagenet_subset(network) if pretrained else None
    return tuple(ImageNetInfo(subset).label_descriptions() if subset else [f"class {i}" for i in range(outputs)])


def _view(network: nn.Module, channels: int | None, size: int, known: Known) -> View:
    """What timm says of how it sees pictures, but for what is known."""
    view = View.of(network)
    channels = channels or view.channels
    given = {}
    for name in ("mean", "std"):
        values = getattr(known, name)
        if values is not None and len(values) != channels:
            raise OptionError(f"--{name} must have a number for each of {channels} channels; received {len(values)}")
        given[name] = _per_channel(values or getattr(view, name), channels)
    return replace(view, channels=channels, size=size, **given)


def _borders(model: str, weights: dict[str, Tensor]) -> tuple[int | None, int | None]:
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
