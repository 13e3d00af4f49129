# SPDX-License-Identifier: Apache-2.0
"""Models that belong together: what ``nearsight compare --preset`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# The question of the article: can attention stand in for convolution, and what does it need for that? Each group changes one
# thing about sasa_micro, which has a convolutional stem, kernel_size=[3, 5, 5] and position=quadratic; the last undoes
# its block piece by piece.
ARTICLE = {
    "what looks": (
        "conv_micro",
        "sasa_micro",
        "sasa_micro,stem=attention",
        "sasa_micro,kernel_size=global",
        "vit_micro",
    ),
    "kernel size": (
        "sasa_micro,kernel_size=3",
        "sasa_micro",
        "sasa_micro,kernel_size=5",
        "sasa_micro,kernel_size=7",
        "sasa_micro,kernel_size=9",
        "sasa_micro,kernel_size=11",
    ),
    "position": (
        "sasa_micro,position=none",
        "sasa_micro,position=sinusoidal",
        "sasa_micro,position=learned",
        "sasa_micro,position=relative",
        "sasa_micro",
    ),
    "block": (
        "sasa_micro,block_kwargs={norm: true}",
        "sasa_micro,block_kwargs={norm: true, act: true}",
        "sasa_micro,value_ratio=1,qk_ratio=1",
        "sasa_micro,block_kwargs={avg_down: false}",
        "sasa_micro,block_kwargs={downsample: pool}",
        "sasa_micro",
    ),
}
PRESETS: dict[str, Mapping[str, Sequence[str]]] = {"article": ARTICLE}
