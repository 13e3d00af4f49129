# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of the README: where a trained network looks, from one pixel of an image that it has not seen.

.venv/bin/python examples/memory_blocks.py docs/images/memory_blocks.svg

The network is sasa_nano with the weights that come with the package.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import nearsight as ns
from nearsight.files import write_bytes
from nearsight.pages import drawings
from nearsight.pages.style import to_svg_file
from nearsight.saved.opened import open_model
from nearsight.training.data import load_pictures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(image_index: int = 3, layers: int = 2) -> Figure:
    opened = open_model("sasa_nano", trained=True)
    view = opened.view
    image, _ = load_pictures("digits").test.dataset(view, training=False)[image_index]
    maps = ns.attention_maps(opened.network, image[None])
    grey = (image * view.std[0] + view.mean[0]).clamp(0, 1)[0].numpy()
    return drawings.heads(grey, maps[:layers], (view.size // 2, view.size // 2))


def main(output: str) -> None:
    write_bytes(Path(output), to_svg_file(draw()))


if __name__ == "__main__":
    main(sys.argv[1])
