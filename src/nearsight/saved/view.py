# SPDX-License-Identifier: Apache-2.0
"""How a network sees pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.data_config import data_config
from ..picture import BACKGROUND


@dataclass(frozen=True)
class View:
    """How a model sees pictures: channels, size, normalisation, and what shows where they are transparent."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: str = BACKGROUND

    @classmethod
    def of(cls, model: nn.Module) -> View:
        """That of a model which says so itself; see :func:`nearsight.models.data_config.data_config`."""
        config = data_config(model)
        channels, _, size = config["input_size"]
        return cls(channels, size, tuple(config["mean"]), tuple(config["std"]))

    def data_config(self) -> dict[str, Any]:
        """The view in timm's words. The whole of a picture is seen, but for what makes it a square, and it is resized so."""
        return {
            "input_size": (self.channels, self.size, self.size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
        }
