# SPDX-License-Identifier: Apache-2.0
"""How a network sees pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.data_config import data_config
from ..picture import BACKGROUND

# What timm's transforms know.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class View:
    """How a model sees pictures: channels, size, normalisation, what shows where they are transparent, how they are fitted.

    Attributes:
        interpolation, crop_pct, crop_mode: as timm has them. What nearsight trains sees the whole of a picture, but for what
            makes it a square.
    """

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: str = BACKGROUND
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def of(cls, model: nn.Module) -> View:
        """That of a model which says so itself: one of :func:`nearsight.load`, or by its ``pretrained_cfg``.

        See :func:`nearsight.models.data_config.data_config`.
        """
        own = getattr(model, "view", None)
        if isinstance(own, View):
            return own
        config = data_config(model)
        channels, _, size = config["input_size"]
        fitted = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
        return cls(channels, size, tuple(config["mean"]), tuple(config["std"]), **fitted)

    def data_config(self) -> dict[str, Any]:
        """The view in timm's words."""
        return {
            "input_size": (self.channels, self.size, self.size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }
