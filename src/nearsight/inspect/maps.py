# SPDX-License-Identifier: Apache-2.0
"""Where every attention layer of a model looks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..layers import AttentionLayer
from ..modes import as_written, evaluating
from ..pages import drawings
from ..pages.brief import Brief, Rows
from ..window import Window
from .layer_list import layers_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = 2**28  # weights of all layers together: 1 GB in float32
GATHERED = 2**20  # weights; above, a layer's queries are asked for in turns, so that its gathered keys stay small


@dataclass(frozen=True, repr=False)
class AttentionMap(Brief):
    """The weights of one layer on a batch of images.

    Attributes:
        layer: the module's name in the model.
        weights: (B, N, *out, *kernel_size), each query's weights over the places of its memory block; or
            (B, N, Q, *kernel_size) where only some queries were asked for.
        window: the memory block.
        map_size: cells of the layer's input.
        image_size: pixels of the image; of a layer whose map has other axes than the image, as tokens have, its own
            map_size.
        queries: those in ``weights``, an index per axis of the output each; None for all of them.
    """

    layer: str
    weights: Tensor
    window: Window
    map_size: tuple[int, ...]
    image_size: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_heads(self) -> int:
        return self.weights.shape[1]

    @property
    def out_size(self) -> tuple[int, ...]:
        """Queries per axis, whether they were asked for or not."""
        return self.window.output_size(self.map_size)

    @property
    def cell_size(self) -> tuple[float, ...]:
        """Pixels of the image per cell of the layer's input, per axis."""
        return tuple(pixels / cells for pixels, cells in zip(self.image_size, self.map_size, strict=True))

    @property
    def block(self) -> tuple[int, ...]:
        """Places of a memory block per axis."""
        return tuple(axis.kernel_size for axis in self.window.axes(len(self.map_size)))

    @property
    def cells(self) -> list[np.ndarray]:
        """Per axis the cell in each place of each query's memory block, (queries, kernel_size).

        -1 where the place lies outside and takes no part, -2 where it lies outside and votes as a zero. Made anew each
        time; :meth:`cells_of` makes those of some queries.
        """
        return self.cells_of([np.arange(queries) for queries in self.out_size])

    def cells_of(self, queries: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same for the queries with these indices along every axis."""
        axes = zip(self.window.axes(len(self.map_size)), self.map_size, queries, strict=True)
        return [axis.neighbours(n, torch.from_numpy(some))[..., 0].numpy() for axis, n, some in axes]

    @property
    def query_centres(self) -> list[np.ndarray]:
        """Per axis the centre of every query's own cell in pixels of the image, (queries,)."""
        return [_centres(cells, size) for cells, size in zip(self._own_cells, self.cell_size, strict=True)]

    @property
    def key_centres(self) -> list[np.ndarray]:
        """Per axis the centre of the cell in each place in pixels of the image, (queries, kernel_size); NaN outside."""
        return [
            np.where(cells < 0, np.nan, _centres(cells, size))
            for cells, size in zip(self.cells, self.cell_size, strict=True)
        ]

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

        Raises:
            ShapeError: the pixel is not in the image, or its query was not asked for.
        """
        query = self.query(pixel)
        weights = self.weights[(image_index, slice(None), *self._place(query))].numpy()
        block = np.zeros((self.num_heads, *self.map_size), dtype=weights.dtype)
        cells = [table[0] for table in self.cells_of([np.array([index]) for index in query])]
        inside = np.ix_(*[place >= 0 for place in cells])
        index = np.ix_(np.arange(self.num_heads), *[place[place >= 0] for place in cells])
        # A torus smaller than the window shows a cell more than once: its weights add up.
        np.add.at(block, index, weights[(slice(None), *inside)])
        return block

    def distances(self) -> Tensor:
        """Pixels of the image between the centres of query and key, (*out, *kernel_size) or (Q, *kernel_size).

        On a torus the shortest way counts. NaN at places outside the map.
        """
        axes = self.window.axes(len(self.map_size))
        square = torch.zeros((), dtype=torch.float64, device="cpu")
        for axis, (queries, cells) in enumerate(zip(self._held, self.cells_of(self._held), strict=True)):
            size, pixels = self.cell_size[axis], self.image_size[axis]
            own = _centres(axes[axis].stride * queries, size)
            apart = np.abs(np.where(cells < 0, np.nan, _centres(cells, size)) - own[:, None])
            if axes[axis].border == "wrap":
                apart = np.minimum(apart, pixels - apart)
            square = square + self._spread(apart**2, axis)
        return square.sqrt().float()

    def key_cells(self) -> Tensor:
        """The flat index of the cell in every place, (*out, *kernel_size) or (Q, *kernel_size); -1 outside the map."""
        flat, outside = (torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.long, torch.bool))
        for axis, (cells, count) in enumerate(zip(self.cells_of(self._held), self.map_size, strict=True)):
            spread = self._spread(cells, axis)
            flat, outside = flat * count + spread, outside | (spread < 0)
        return flat.masked_fill(outside, -1)

    def takes_part(self) -> Tensor:
        """Which places are in the softmax, (*out, *kernel_size) or (Q, *kernel_size)."""
        part = torch.ones((), dtype=torch.bool, device="cpu")
        for axis, cells in enumerate(self.cells_of(self._held)):
            part = part & self._spread(cells != -1, axis)
        return part

    @property
    def _own_cells(self) -> list[np.ndarray]:
        axes = self.window.axes(len(self.map_size))
        return [axis.stride * np.arange(n) for axis, n in zip(axes, self.out_size, strict=True)]

    @property
    def _held(self) -> list[np.ndarray]:
        """Per axis the index of every query whose weights are here: of a grid of all, or of each that was asked for."""
        if self.queries is None:
            return [np.arange(queries) for queries in self.out_size]
        return list(np.array(self.queries, dtype=np.int64).reshape(-1, len(self.map_size)).T)

    def _place(self, query: tuple[int, ...]) -> tuple[int, ...]:
        """Where a query's weights are."""
        if self.queries is None:
            return query
        if query not in self.queries:
            raise ShapeError(f"query {query} of layer {self.layer} was not asked for; these were: {self.queries}")
        return (self.queries.index(query),)

    def _spread(self, table: np.ndarray, axis: int) -> Tensor:
        """A (queries, places) table of one axis for those that are held, in the shape of the weights of one head."""
        values, rank = torch.from_numpy(np.ascontiguousarray(table)), len(self.map_size)
        places = [1] * rank
        places[axis] = table.shape[1]
        if self.queries is not None:
            return values.view(-1, *places)
        queries = [1] * rank
        queries[axis] = table.shape[0]
        return values.view(*queries, *places)


class AttentionMaps(Rows[AttentionMap]):
    """The maps of a model's layers: a list that shows itself as a table, and can be drawn.

    Args:
        maps: in the order in which the layers ran.
        images: (B, C, H, W), that they were made from.
    """

    def __init__(self, maps: Iterable[AttentionMap] = (), images: Tensor | None = None) -> None:
        super().__init__(maps)
        self.images = images

    def plot(self, pixel: Sequence[int] | None = None, *, image_index: int = 0, heads: bool = False) -> Figure:
        """How the query at a pixel weighs the cells of its memory block: a picture for every layer, or for every head.

        Args:
            pixel: row and column in the image; None takes that of the first query asked for, or the middle.
            image_index: of the image in the batch.
            heads: draw each head, layers down and heads across, in place of their mean.

        Returns:
            Matplotlib's figure, which a notebook shows; ``.savefig(path)`` writes it.

        Raises:
            ShapeError: the maps are not of images of two axes, or the pixel is not in them.
            OptionError: there are no maps.
            PackageError: Matplotlib is not installed.

        Example:
            >>> maps = attention_maps(create_model("sasa_nano"), torch.randn(1, 3, 32, 32))
            >>> maps.plot((16, 16)).savefig("looks.png")
        """
        if not self or self.images is None:
            raise OptionError("there are no maps to draw: attention_maps(model, images) makes them")
        ranks = sorted({len(layer.map_size) for layer in self})
        if ranks != [2]:
            raise ShapeError(f"only maps of two axes can be drawn; received maps of {ranks} axes: take some, maps[1:2]")
        draw = drawings.heads if heads else drawings.memory_blocks
        row, column = self._usual_pixel() if pixel is None else pixel
        return draw(_shown(self.images[image_index]), self, (row, column), image_index)

    def _usual_pixel(self) -> tuple[int, ...]:
        layer = self[0]
        if not layer.queries:
            return tuple(n // 2 for n in layer.image_size)
        places = zip(layer.query_centres, layer.queries[0], strict=True)
        return tuple(int(centres[index]) for centres, index in places)

    def columns(self) -> dict[str, Callable[[AttentionMap], Any]]:
        return {
            "layer": lambda row: row.layer,
            "heads": lambda row: row.num_heads,
            "queries": lambda row: row.out_size if row.queries is None else len(row.queries),
            "block": lambda row: row.block,
            "map": lambda row: row.map_size,
        }

    def heading(self) -> str:
        images = len(self[0].weights) if self else 0
        return f"{len(self)} attention map{'s' * (len(self) != 1)} of {images} image{'s' * (images != 1)}"

    def _part(self, rows: list[AttentionMap]) -> AttentionMaps:
        return AttentionMaps(rows, self.images)


def attention_maps(
    model: nn.Module, images: Tensor, *, queries: Sequence[Sequence[int]] | None = None
) -> AttentionMaps:
    """What every attention layer of a model looked at, in the order in which the layers ran.

    Args:
        model: any module that holds nearsight's attention layers; it is run once, in evaluation mode, and left as it was.
            A layer is known by what it offers, :class:`nearsight.layers.AttentionLayer`.
        images: (B, C, H, W), or one image (C, H, W); with as many axes as the model takes.
        queries: pixels (row, column) of the image; of every layer only the queries that cover them are computed, whose
            memory does not grow with the image. None is all of them.

    Raises:
        OptionError: the model has no such layer; a layer did not run, or was given another number of maps than there are
            images, as where windows are folded into the batch; or the weights of all queries would not fit in 1 GB, so that
            ``queries`` have to be named.
        ShapeError: a pixel that is not in the image.

    Example:
        >>> maps = attention_maps(create_model("sasa_nano"), torch.randn(1, 3, 32, 32))
        >>> maps[0].memory_block((16, 16)).shape
        (4, 32, 32)
        >>> few = attention_maps(create_model("sasa_nano"), torch.randn(1, 3, 256, 256), queries=[(16, 16), (200, 31)])
        >>> few[0].weights.shape
        torch.Size([1, 4, 2, 5, 5])
    """
    layers = attention_layers(model)
    batch = images[None] if images.ndim == _axes_of_image(model, layers) + 1 else images
    maps = AttentionMaps(images=batch.detach())

    def hook(name: str):
        def record(layer, args, kwargs):
            room = KEPT - sum(found.weights.numel() for found in maps)
            x = args[0] if args else kwargs["x"]
            maps.append(_look(name, layer, x, batch, queries, room))

        return record

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)  # pyright: ignore[reportAttributeAccessIssue]
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad(), evaluating(model), as_written(model):
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := sorted(layers.keys() - {found.layer for found in maps}):
        raise OptionError(
            f"layer {missing[0]} did not run, so that it has no weights to show; {len(missing)} of {len(layers)} attention "
            "layers did not: take out what the model does not call, or give the model that calls them"
        )
    return maps


def _axes_of_image(model: nn.Module, layers: dict[str, AttentionLayer]) -> int:
    """Those of the first layer that says how many it takes, in the order in which the model holds them."""
    ranks: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
    for module in model.modules():
        kinds = [rank for kind, rank in ranks.items() if isinstance(module, kind)]
        if kinds or isinstance(module, AttentionLayer):
            return kinds[0] if kinds else module.rank  # pyright: ignore[reportReturnType]
    return max(layer.rank for layer in layers.values())


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """The layers of a model that can be looked at, by name.

    Raises:
        OptionError: it has none; the message says what it is made of.
    """
    layers: dict[str, AttentionLayer] = {
        name: layer for name, layer in layers_of(model).items() if isinstance(layer, AttentionLayer)
    }
    if not layers:
        leaves = (module for module in model.modules() if next(module.children(), None) is None)
        kinds = Counter(type(module).__name__ for module in leaves).most_common(5)
        made_of = ", ".join(f"{name} ({count})" for name, count in kinds)
        raise OptionError(
            f"the model has no attention layer of nearsight; it is made of {made_of}. "
            "nearsight.convert(model, init='exact'), or `nearsight convert`, puts attention in the place of its convolutions"
        )
    return layers


def _look(
    name: str,
    layer: AttentionLayer,
    x: Tensor,
    images: Tensor,
    pixels: Sequence[Sequence[int]] | None,
    room: int,
) -> AttentionMap:
    x = x if x.ndim == layer.rank + 2 else x[None]
    if len(x) != len(images):
        raise OptionError(
            f"layer {name} was given {len(x)} maps for a batch of {len(images)}: windows, or frames, are folded into its "
            "batch, so that nothing tells where in which image they lie; give the layer the whole map and let its window "
            "cut it, as LocalSelfAttention2d(kernel_size=8, shared_by=8) does"
        )
    size = tuple(x.shape[1:-1] if getattr(layer, "channels_last", False) else x.shape[2:])
    image_size = tuple(images.shape[2:])
    image_size = image_size if len(image_size) == layer.rank else size
    blank = AttentionMap(name, x.new_zeros(0, 0), layer.window_on(size), size, image_size)
    chosen = None if pixels is None else tuple(dict.fromkeys(blank.query(pixel) for pixel in pixels))
    asked = math.prod(blank.out_size) if chosen is None else len(chosen)
    count = len(x) * layer.num_heads * asked * math.prod(blank.block)
    if count > room:
        gigabytes = (KEPT - room + count) * 4 / 2**30
        raise OptionError(
            f"the weights of all queries up to layer {name} take {gigabytes:.1f} GB, more than the 1 GB that is "
            "kept: name the queries wanted, attention_maps(model, images, queries=[(row, column), ...])"
        )
    weights = _weights(layer, x, blank.out_size, chosen, count)
    weights = weights.to("cpu", torch.promote_types(weights.dtype, torch.float32))
    return AttentionMap(name, weights, blank.window, size, image_size, chosen)


def _weights(
    layer: AttentionLayer, x: Tensor, out: tuple[int, ...], chosen: Sequence[tuple[int, ...]] | None, count: int
) -> Tensor:
    if chosen is not None:
        return layer.attention_weights(x, torch.tensor(chosen, dtype=torch.long, device=x.device).view(-1, len(out)))
    if count <= GATHERED:
        return layer.attention_weights(x)
    everywhere = torch.cartesian_prod(*(torch.arange(queries, device=x.device) for queries in out)).view(-1, len(out))
    return layer.attention_weights(x, everywhere).unflatten(2, out)


def _shown(image: Tensor) -> np.ndarray:
    """(H, W) or (H, W, 3), an image as a model takes it stretched to 0 ... 1."""
    image = image.detach().float().cpu()
    low, high = image.min(), image.max()
    pixels = ((image - low) / (high - low).clamp(min=1e-12)).numpy()
    return pixels[:3].transpose(1, 2, 0) if len(pixels) >= 3 else pixels[0]


def _centres(cells: np.ndarray, cell_size: float) -> np.ndarray:
    return (cells + 0.5) * cell_size
