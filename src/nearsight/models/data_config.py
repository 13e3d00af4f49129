# SPDX-License-Identifier: Apache-2.0
"""How a network sees pictures, as it says itself, and pictures as it sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from ..errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's ``resolve_model_data_config``: what ``timm.data.create_transform`` makes the model's pictures with.

    From ``model.pretrained_cfg``, which a model that nearsight trained has from its run. A model that takes other channels
    than its configuration says, as one that was made with ``in_chans``, is given the mean of their mean and deviation.

    Example:
        >>> from nearsight import create_model
        >>> data_config(create_model("sasa_nano", in_chans=1))["input_size"]
        (1, 32, 32)
    """
    found = resolve_model_data_config(model)
    counts = (getattr(module, "in_channels", None) for module in model.modules())
    channels = next((count for count in counts if isinstance(count, int)), found["input_size"][0])
    for name in ("mean", "std"):
        values = found[name]
        found[name] = values if len(values) == channels else (sum(values) / len(values),) * channels
    return {**found, "input_size": (channels, *found["input_size"][1:])}


def class_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a model's outputs, where it knows them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return None if names is None else tuple(names)


def as_source(image: Any) -> Any:
    """What :func:`nearsight.picture.read_picture` takes: a tensor (H, W) or (C, H, W) as an array, all else as it is."""
    if not isinstance(image, Tensor):
        return image
    cells = image.cpu().numpy()
    return np.moveaxis(cells, 0, -1) if image.ndim == 3 else cells


def fitting(config: dict[str, Any]) -> Callable[[Image], Tensor]:
    """What makes of a picture what a model with that configuration takes, (C, H, W): timm's transform for evaluation.

    Raises:
        OptionError: a model that takes neither one channel nor three.
    """
    from timm.data.transforms_factory import create_transform

    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise OptionError(f"a picture has 1 channel or 3, and the model takes {channels}: give it a tensor")
    return create_transform(**config)  # pyright: ignore[reportReturnType]


def seen(picture: Image, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A picture as a model takes it, and the same between 0 and 1 as a person sees it: both (C, H, W).

    Raises:
        OptionError: a model that takes neither one channel nor three.
    """
    image = fitting(config)(picture)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return image, (image * std + mean).clamp(0, 1)
