# SPDX-License-Identifier: Apache-2.0
"""How a network sees pictures."""

from __future__ import annotations

from dataclasses import dataclass

from ..picture import BACKGROUND


@dataclass(frozen=True)
class View:
    """How a model sees pictures: channels, size, normalisation, and what shows where they are transparent."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    background: str = BACKGROUND
