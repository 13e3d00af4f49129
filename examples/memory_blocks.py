# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of the README: where a trained network looks, from one pixel of an image that it has not seen.

make demo
.venv/bin/python examples/memory_blocks.py runs/demo docs/images/memory_blocks.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import nearsight as ns
from nearsight.files import write_bytes
from nearsight.pages import drawings
from nearsight.pages.style import to_svg_file
from nearsight.saved.weights import load_model
from nearsight.training.data import load_pictures


def main(run: str, output: str, image_index: int = 3, pixel: tuple[int, int] | None = None) -> None:
    model, blueprint = load_model(Path(run))
    view = blueprint.view
    test = load_pictures(blueprint.data).test.dataset(view, training=False)
    image, _ = test[image_index]
    maps = ns.attention_maps(model, image[None])
    grey = (image * view.std[0] + view.mean[0]).clamp(0, 1)[0].numpy()
    figure = drawings.heads(grey, maps[:2], pixel or (view.size // 2, view.size // 2))
    write_bytes(Path(output), to_svg_file(figure))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
