# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of docs/gallery/networks.md, each with its numbers as CSV beside it.

.venv/bin/python examples/gallery.py

Trains sasa_nano on digits and, for one epoch, sasa_micro on Fashion-MNIST into runs/gallery, unless they are there already;
then it draws them into docs/images/gallery.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nearsight as ns
from nearsight.files import make_folder
from nearsight.inspect import Translation, draw_equivariance
from nearsight.inspect.equivariance import decisive
from nearsight.pages import csv_json, drawings
from nearsight.pages.charts import Chart, Series, charts_to_csv, draw_charts, write_plot
from nearsight.saved.weights import WEIGHTS_FILE, load_model
from nearsight.training.data import load_pictures
from nearsight.training.recipe import Recipe
from nearsight.training.train import train

RECIPES = {
    "digits": Recipe(model="sasa_nano", data="digits"),
    "fashion-mnist": Recipe(model="sasa_micro", data="fashion-mnist", epochs=1),
}
LOOKED_AT = 64  # test images, for what is a mean over images
HEADS = 8  # of each layer, in pictures that have one for each head
SHOWN = {"digits": 3, "fashion-mnist": 0}  # number of the test image that is drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/gallery"), help="where the trained networks are")
    parser.add_argument("--output", type=Path, default=Path("docs/images/gallery"), help="where the pictures go")
    options = parser.parse_args()
    make_folder(options.output)
    for data, recipe in RECIPES.items():
        run = options.runs / data
        if not (run / WEIGHTS_FILE).exists():
            train(recipe, run)
        model, blueprint = load_model(run)
        test = load_pictures(data).test.dataset(blueprint.view, training=False)
        images = torch.stack([test[index][0] for index in range(LOOKED_AT)])
        image = images[SHOWN[data]]
        grey = (image * blueprint.view.std[0] + blueprint.view.mean[0]).clamp(0, 1)[0].numpy()
        for name, (figure, numbers) in pictures(model, images, image, grey).items():
            write_plot(options.output / f"{data}-{name}", figure, numbers, formats=("svg",))
            print(options.output / f"{data}-{name}.svg")


def pictures(model: nn.Module, images: Tensor, image: Tensor, grey: np.ndarray) -> dict[str, tuple[Any, str]]:
    """Name -> figure and CSV."""
    maps = ns.attention_maps(model, image)
    few = [FirstHeads(layer) for layer in maps]
    pixel = tuple(n // 2 for n in grey.shape)
    rollouts = [
        Rollout(layer.layer, places[0]) for layer, places in zip(maps, ns.attention_rollout(maps, [pixel]), strict=True)
    ]
    charts = statistics(ns.attention_statistics(ns.attention_maps(model, images)))
    rows = ns.equivariance_by_layer(model, images, Translation(1, 1))
    tables = position_tables(model, maps)
    return {
        "heads": (drawings.heads(grey, few, pixel), drawings.blocks_to_csv(few, pixel)),
        "rollout": (drawings.memory_blocks(grey, rollouts, pixel), drawings.blocks_to_csv(rollouts, pixel)),
        "positions": (draw_tables(tables), tables_csv(tables)),
        "statistics": (draw_charts(charts), charts_to_csv(charts)),
        "equivariance": (
            draw_equivariance(rows, "moved by one pixel, down and to the right"),
            csv_json.to_csv(decisive(rows)),
        ),
    }


@dataclass(frozen=True)
class FirstHeads:
    """A layer's map, of which not more heads than the page has room for are drawn."""

    whole: Any

    @property
    def layer(self) -> str:
        return self.whole.layer

    def memory_block(self, pixel: tuple[int, int], image_index: int = 0) -> np.ndarray:
        return self.whole.memory_block(pixel, image_index)[:HEADS]


@dataclass(frozen=True)
class Rollout:
    """In the form in which blocks are drawn: one head on the pixels of the image."""

    layer: str
    weights: np.ndarray

    def memory_block(self, pixel: tuple[int, int], image_index: int = 0) -> np.ndarray:
        return self.weights[None]


def statistics(layers: Sequence[Any]) -> list[Chart]:
    """Distance, entropy and diversity of every layer, in the order in which they run."""
    number = list(range(1, len(layers) + 1))

    def over_heads(name: str) -> Series:
        values = [getattr(layer, name) for layer in layers]
        return Series("mean, and spread over heads", number, [v.mean() for v in values], [v.std() for v in values])

    uniform = Series("all cells alike", number, [layer.uniform for layer in layers])
    diversity = Series("diversity", number, [layer.diversity for layer in layers])
    return [
        Chart("layer", "distance, pixels", {"": [over_heads("distance")]}),
        Chart("layer", "entropy, bits", {"": [over_heads("entropy"), uniform]}),
        Chart("layer", "difference between heads", {"": [diversity]}),
    ]


def position_tables(model: nn.Module, maps: Sequence[Any]) -> dict[tuple[str, str], np.ndarray]:
    """Of the first and the last layer: (layer, what is in the table) -> one picture of numbers per head.

    Relative vectors by axis, offsets down and channels across. Of a table for whole offsets the weights that it gives where
    content says nothing: its softmax, row and column offsets.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    found = {}
    for layer in (maps[0], maps[-1]):
        bias, relative = modules[layer.layer].tables_on(layer.map_size)
        if bias is not None:
            found[layer.layer, "offsets"] = bias.flatten(1).softmax(1).view_as(bias)[:HEADS].detach().numpy()
        for axis, vectors in zip(("rows", "columns"), relative or (), strict=False):
            used = vectors[..., vectors.abs().amax((0, 1)) > 0]  # every axis has a share of the channels
            found[layer.layer, axis] = used[:HEADS].detach().numpy()
    return found


def draw_tables(tables: dict[tuple[str, str], np.ndarray]) -> Any:
    most = max(map(len, tables.values()))
    labels = [f"{layer}\n{what}" for layer, what in tables]
    return drawings.grid(
        [list(values) for values in tables.values()], labels, [f"head {head + 1}" for head in range(most)]
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def tables_csv(tables: dict[tuple[str, str], np.ndarray]) -> str:
    lines = []
    for (layer, what), values in tables.items():
        places = np.ndindex(values.shape)
        lines += [(layer, what, head + 1, row, column, values[head, row, column]) for head, row, column in places]
    return csv_json.write_csv(("layer", "table", "head", "row", "column", "value"), lines)


if __name__ == "__main__":
    main()
