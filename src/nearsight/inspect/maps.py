# SPDX-License-Identifier: Apache-2.0
"""Where every attention layer of a model looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..layers import SelfAttention
from ..window import Window


@dataclass(frozen=True)
class AttentionMap:
    """The weights of one layer on a batch of images.

    layer       the module's name in the model
    weights     (B, N, *out, *kernel_size), each query's weights over the places of its memory block
    window      the memory block
    map_size    cells of the layer's input
    image_size  pixels of the image
    """

    layer: str
    weights: Tensor
    window: Window
    map_size: tuple[int, ...]
    image_size: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return self.weights.shape[1]

    def query(self, pixel: Sequence[int]) -> tuple[int, ...]:
        """The query whose cell covers an image pixel (row, column).

        Raises:
            ShapeError: the pixel is not in the image.
        """
        if len(pixel) != len(self.image_size) or not all(
            0 <= p < n for p, n in zip(pixel, self.image_size, strict=True)
        ):
            raise ShapeError(f"pixel must lie in an image of {self.image_size}; received {tuple(pixel)}")
        axes = self.window.axes(len(pixel))
        return tuple(
            p * cells // pixels // axis.stride
            for p, cells, pixels, axis in zip(pixel, self.map_size, self.image_size, axes, strict=True)
        )

    def memory_block(self, pixel: Sequence[int], image_index: int = 0) -> np.ndarray:
        """How the query that covers a pixel weighs each cell of the layer's input: (heads, *map_size).

        Cells outside the memory block are zero. With border ``"zeros"`` what went to cells off the map is missing, so the
        sum can be below one.
        """
        query = self.query(pixel)
        weights = self.weights[(image_index, slice(None), *query)].numpy()
        axes = self.window.axes(len(query))
        block = np.zeros((self.num_heads, *self.map_size), dtype=weights.dtype)
        cells = [
            np.array([cell for cell, _ in axis.neighbours(n)[q]])
            for axis, n, q in zip(axes, self.map_size, query, strict=True)
        ]
        inside = np.ix_(*[place >= 0 for place in cells])
        index = np.ix_(np.arange(self.num_heads), *[place[place >= 0] for place in cells])
        # A torus smaller than the window shows a cell more than once: its weights add up.
        np.add.at(block, index, weights[(slice(None), *inside)])
        return block


def attention_maps(model: nn.Module, images: Tensor) -> list[AttentionMap]:
    """What every attention layer of a model looked at, in the order in which the layers ran.

    Args:
        model: any module that holds nearsight's attention layers; it is run once, in evaluation mode, and left as it was.
        images: (B, C, H, W), or one image (C, H, W).

    Raises:
        OptionError: the model has no such layer.

    Example:
        >>> maps = attention_maps(create_model("sasa_nano"), torch.randn(1, 3, 32, 32))
        >>> maps[0].memory_block((16, 16)).shape
        (4, 32, 32)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SelfAttention)}
    if not layers:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise OptionError(f"the model has no attention layer of nearsight; it is made of {', '.join(kinds)}")
    batch = images if images.ndim == next(iter(layers.values())).rank + 2 else images[None]
    maps: list[AttentionMap] = []

    def record(name: str, layer: SelfAttention, x: Tensor) -> None:
        size = tuple(x.shape[2:])
        maps.append(
            AttentionMap(name, layer.attention_weights(x).cpu(), layer.window_on(size), size, tuple(batch.shape[2:]))
        )

    def hook(name: str):
        return lambda layer, inputs: record(name, layer, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return maps
