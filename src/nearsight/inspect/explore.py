# SPDX-License-Identifier: Apache-2.0
"""The explorer: a page in which one moves over an image and sees what every layer and head weighs from there."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, OptionError, ShapeError
from ..files import write_whole
from ..finite import why_not_finite
from ..models.data_config import as_source, class_names, seen
from ..models.first_weights import is_untrained
from ..pages.brief import Brief, brief
from ..pages.csv_json import finite
from ..pages.html import frame, render
from ..pages.names import readable
from ..picture import read_picture
from ..saved.opened import UNTRAINED, open_model
from ..saved.view import View
from .equivariance import decisive, equivariance_by_layer
from .maps import AttentionMap, attention_layers, attention_maps
from .rollout import attention_rollout
from .statistics import attention_statistics
from .transforms import Transform, Translation

if TYPE_CHECKING:
    from ..picture import Source

# What base64 makes a third longer: weights, rollouts and position tables, for a page under 5 MB.
WEIGHT_BYTES, ROLLOUT_BYTES, TABLE_BYTES = 2_100_000, 800_000, 300_000
SHOWN_CLASSES = 5
SHOWN_PIXELS = 640  # of the picture's longer side
FEWEST = 4  # queries per axis that a layer keeps before layers are left out
ONE_CELL = Translation(1, 1)
PART = 224  # pixels per axis that equivariance is measured on
COARSE = 28  # cells per axis of a rollout, and queries per axis where there are too many to compute


@dataclass(frozen=True, repr=False)
class Exploration(Brief):
    """The page: shows itself in a notebook, and :meth:`save` writes it."""

    html: str
    title: str = ""

    def __repr__(self) -> str:
        return f"Exploration({brief(self.title)}: a page of {len(self.html) / 1e3:,.0f} kB; .save(path) writes it)"

    def _repr_html_(self) -> str:
        return frame(self.html, "nearsight explorer")

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all.

        Raises:
            DataError: the file cannot be written.
        """
        path = Path(path)
        try:
            write_whole(path, self.html.encode(errors="backslashreplace"))
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}") from error
        return path


def explore(
    model: nn.Module | str | PathLike[str],
    image: Source | Tensor,
    *,
    picture: Tensor | None = None,
    classes: Sequence[str] | None = None,
    title: str | None = None,
    subtitle: str | None = None,
    transform: Transform | None = ONE_CELL,
) -> Exploration:
    """A page that shows, from every pixel of an image, what each layer and head of a model attends to.

    One file that needs nothing else: the image; under the pointer, the memory block of every layer and head; attention
    rollout; the position tables; the prediction; how far and how widely each layer looks. Below 5 MB: weights are rounded to
    256 steps of each query's largest, and where that is not enough queries are left out; the page says so.

    Args:
        model: any module that holds nearsight's attention layers on maps of two axes; it is run once and left as it was. Or
            a run's folder, a file of weights, or a name, as ``nearsight explore`` takes them.
        image: (C, H, W) or (1, C, H, W) as the model sees it, floating point; or a picture, which is brought to what the
            model was made for (:meth:`nearsight.saved.view.View.of`: size, crop, mean and deviation): a file, its bytes, a
            picture of Pillow's, an array (H, W) or (H, W, channels), a uint8 tensor (channels, H, W).
        picture: what is shown, (1 or 3, H, W) between 0 and 1; None stretches ``image`` to that range.
        classes: names of the model's outputs; None takes those that it knows (``label_names`` of its ``pretrained_cfg``).
        title, subtitle: of the page; None says what is known of the model, that it was never trained included
            (:func:`nearsight.models.first_weights.is_untrained`).
        transform: of the image, for the section on equivariance: which layers do not follow it, as
            :func:`nearsight.inspect.equivariance_by_layer` tells. None leaves the section out.

    Raises:
        OptionError: the model has no attention layer of nearsight, or what it answers or weighs with is not finite.
        ShapeError: more than one image, or layers on maps of one or three axes.
        DataError: the picture cannot be read.

    Example:
        >>> explore(create_model("sasa_nano"), torch.randn(3, 32, 32)).save("page.html")
        PosixPath('page.html')
    """
    if isinstance(model, (str, PathLike)):
        opened = open_model(model, trained=True)
        title, subtitle = title or opened.title, opened.origin if subtitle is None else subtitle
        model, classes = opened.network, opened.classes if classes is None else classes
    if not (isinstance(image, Tensor) and image.is_floating_point()):
        view = View.of(model)
        image, picture = seen(read_picture(as_source(image), view.channels, view.background), view.data_config())
    batch = image if image.ndim == 4 else image[None]
    ranks = sorted({layer.rank for layer in attention_layers(model).values()})
    if batch.ndim != 4 or len(batch) != 1 or ranks != [2]:
        raise ShapeError(
            "explore shows one image, (C, H, W) or (1, C, H, W), to a model whose attention has maps of two axes; "
            f"received {tuple(image.shape)}, axes of the attention: {ranks}"
        )
    batch = batch.to(next((one for one in model.parameters() if one.is_floating_point()), batch))
    page = _Page(model, batch, batch[0].cpu() if picture is None else picture, stretched=picture is None)
    classes = class_names(model) if classes is None else classes
    untrained = is_untrained(model)
    title = title or f"{type(model).__name__}{', untrained' if untrained else ''}"
    subtitle = (UNTRAINED if untrained else "") if subtitle is None else subtitle
    return Exploration(page.render(classes, title, subtitle, transform), title)


# -------------------------------------------------------------------------------------------------------------- page


class _Page:
    """What the template is filled with; gathers in ``notes`` what had to be left out."""

    def __init__(self, model: nn.Module, batch: Tensor, picture: Tensor, stretched: bool) -> None:
        self.model, self.batch, self.picture, self.stretched = model, batch, picture, stretched
        self.notes: list[str] = []
        self.size: tuple[int, int] = tuple(batch.shape[2:])  # pyright: ignore[reportAttributeAccessIssue]

    def render(
        self,
        classes: Sequence[str] | None,
        title: str,
        subtitle: str,
        transform: Transform | None,
    ) -> str:
        maps, output = self._look()
        self._check_finite(maps, output)
        data = {
            "title": title,
            "image": {"height": self.size[0], "width": self.size[1], "source": _picture_source(self._shown())},
            "layers": finite(self._layers(maps)),
            "rollout": self._rollout(maps),
            "prediction": _prediction(output, classes),
            "equivariance": self._equivariance(transform),
        }
        return render(
            "explore.html.jinja",
            title=title,
            subtitle=subtitle,
            data=data,
            notes=self.notes,
            version=version("nearsight"),
        )

    def _look(self) -> tuple[list[AttentionMap], Any]:
        """The weights of all queries, or of a grid of them where they are too many, and the model's output."""
        self._say("the weights of every layer")
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        try:
            try:
                maps = attention_maps(self.model, self.batch)
            except OptionError:
                grid = _grid(self.size, COARSE)
                maps = attention_maps(self.model, self.batch, queries=grid)
                self.notes.append(
                    f"The image has too many queries to compute all: there are at most {COARSE} x {COARSE} of each layer, "
                    "those that cover a grid of pixels, and no rollout, which needs all."
                )
        finally:
            handle.remove()
        return maps, outputs[-1]

    def _say(self, what: str) -> None:
        """Of a large picture, what is being done: it takes a while."""
        if math.prod(self.size) > PART**2:
            print(f"explore, {' x '.join(map(str, self.size))} pixels: {what} ...", file=sys.stderr, flush=True)

    def _equivariance(self, transform: Transform | None) -> dict[str, Any] | None:
        """The layers that can break a symmetry, with how far each does; of a large picture by its middle."""
        if transform is None:
            return None
        self._say("equivariance, layer by layer")
        part = self.batch if _takes_one_size(self.model) else _middle(self.batch, PART)
        if part.shape != self.batch.shape:
            self.notes.append(f"Equivariance is that of the middle {' x '.join(map(str, part.shape[2:]))} pixels.")
        rows = [asdict(row) for row in decisive(equivariance_by_layer(self.model, part, transform))]
        return {"transform": str(transform), "rows": finite(rows)}

    def _check_finite(self, maps: Sequence[AttentionMap], output: Any) -> None:
        """A page of NaN would be blank, or show a picture of nothing."""
        if not self.batch.isfinite().all():
            raise OptionError("the image holds NaN or infinity, so that the network can say nothing about it")
        reason = why_not_finite(output, self.model)
        broken = [layer.layer for layer in maps if not layer.weights.isfinite().all()]
        if reason is None and broken:
            reason = f"the attention weights of layer {broken[0]} are not finite"
        if reason is not None:
            raise OptionError(f"{reason}; there is nothing to show: take earlier weights, or train anew")

    def _shown(self) -> np.ndarray:
        """(H, W, 3) uint8."""
        picture = self.picture.detach().float().cpu()
        picture = picture[:3] if len(picture) >= 3 else picture[:1].expand(3, -1, -1)
        if self.stretched:
            low, high = picture.min(), picture.max()
            picture = (picture - low) / (high - low).clamp(min=1e-12)
        return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    def _layers(self, maps: Sequence[AttentionMap]) -> list[dict[str, Any]]:
        steps = self._steps(maps)
        layers = attention_layers(self.model)
        room = TABLE_BYTES
        pages = []
        for layer, step, numbers in zip(maps, steps, attention_statistics(maps), strict=True):
            tables = _tables(layers[layer.layer], layer.map_size)
            room -= sum(table["bytes"] for table in tables)
            if room < 0 and tables:
                self.notes.append(f"The position tables of layer {layer.layer} are left out: they are too large.")
                tables = []
            if step is None:
                continue
            pages.append(
                {
                    "name": layer.layer,
                    "kind": type(layers[layer.layer]).__name__,
                    "heads": layer.num_heads,
                    "map": layer.map_size,
                    "block": list(layer.block),
                    **_pack(layer, step),
                    "tables": tables,
                    "distance": numbers.distance.round(4).tolist(),
                    "entropy": numbers.entropy.round(4).tolist(),
                    "uniform": round(numbers.uniform, 4),
                    "diversity": round(numbers.diversity, 4),
                }
            )
        return pages

    def _steps(self, maps: Sequence[AttentionMap]) -> list[int | None]:
        """Every how manieth query per axis is kept of each layer, None for layers left out, so that the page stays small."""
        steps = [1] * len(maps)
        while sum(sizes := [_size(layer, step) for layer, step in zip(maps, steps, strict=True)]) > WEIGHT_BYTES:
            thinnable = [n for n, layer in enumerate(maps) if min(_query_grid(layer)) // (2 * steps[n]) >= FEWEST]
            if not thinnable:
                break
            steps[max(thinnable, key=sizes.__getitem__)] *= 2
        thinned = [f"{layer.layer} (every {_nth(step)})" for layer, step in zip(maps, steps, strict=True) if step > 1]
        if thinned:
            self.notes.append(f"Fewer queries per axis, to keep the page below 5 MB: {', '.join(thinned)}.")
        kept = len(maps)
        while sum(sizes[n] for n in _spread(len(maps), kept)) > WEIGHT_BYTES and kept > 1:
            kept -= 1
        shown = _spread(len(maps), kept)
        if kept < len(maps):
            self.notes.append(f"{kept} of {len(maps)} layers are shown, evenly apart, to keep the page below 5 MB.")
        return [step if n in shown else None for n, step in enumerate(steps)]

    def _rollout(self, maps: Sequence[AttentionMap]) -> dict[str, Any] | None:
        if any(layer.queries is not None for layer in maps):
            return None
        shown = [layer.layer for layer in maps]
        size = tuple(min(n, COARSE) for n in self.size)
        side = min(max(self.size), COARSE)
        while side > 1 and len(maps) * len(_grid(self.size, side)) * math.prod(size) > ROLLOUT_BYTES:
            side -= 1
        grid = _grid(self.size, side)
        if (len(grid), size) != (math.prod(self.size), self.size):
            self.notes.append(
                f"Rollout starts from a grid of {' x '.join(str(min(n, side)) for n in self.size)} pixels and ends on "
                f"{' x '.join(map(str, size))} cells of the image."
            )
        self._say("rollout")
        rollout = attention_rollout(maps, grid, size=size)
        steps, largest = _quantise(rollout.reshape(*rollout.shape[:2], -1))
        rows = [min(n, side) for n in self.size]
        return {"layers": shown, "grid": rows, "size": size, "weights": _base64(steps), "largest": _base64(largest)}


def _takes_one_size(model: nn.Module) -> bool:
    return bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size"))


def _middle(batch: Tensor, most: int) -> Tensor:
    """At most so many pixels per axis."""
    for axis in (2, 3):
        kept = min(batch.shape[axis], most)
        batch = batch.narrow(axis, (batch.shape[axis] - kept) // 2, kept)
    return batch


def _grid(size: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Pixels in the middles of at most ``most`` stripes per axis, row by row."""
    rows, columns = (
        [(2 * n + 1) * pixels // (2 * k) for n in range(k)] for pixels in size for k in [min(pixels, most)]
    )
    return [(row, column) for row in rows for column in columns]


def _spread(count: int, kept: int) -> set[int]:
    """``kept`` of ``count`` places, evenly apart, the last one among them."""
    return {round((n + 1) * count / kept) - 1 for n in range(kept)}


def _nth(step: int) -> str:
    return "2nd" if step == 2 else f"{step}th"


def _query_grid(layer: AttentionMap) -> tuple[int, int]:
    """Rows and columns of the queries that a map holds."""
    if layer.queries is None:
        rows, columns = layer.out_size
    else:
        rows, columns = (len({query[axis] for query in layer.queries}) for axis in (0, 1))
    return rows, columns


def _kept(count: int, step: int) -> np.ndarray:
    return np.arange(min(step // 2, count - 1), count, step)


def _size(layer: AttentionMap, step: int) -> int:
    """Bytes of a layer's weights when every ``step``-th query per axis is kept, with their scales of four."""
    rows, columns = (len(_kept(count, step)) for count in _query_grid(layer))
    block = math.prod(min(places, n) for places, n in zip(layer.block, layer.map_size, strict=True))
    return layer.num_heads * rows * columns * (block + 4)


def _pack(layer: AttentionMap, step: int) -> dict[str, Any]:
    """Weights on cells, in 256 steps of each query's largest, with the geometry that finds them."""
    grid = _query_grid(layer)
    kept = [_kept(count, step) for count in grid]
    places = np.ix_(*kept)
    weights = layer.weights[0].float()
    weights = (weights if layer.queries is None else weights.unflatten(1, grid)).numpy()[(slice(None), *places)]
    queries = [np.arange(count) for count in grid]
    if layer.queries is not None:
        queries = [np.array(sorted({query[axis] for query in layer.queries})) for axis in (0, 1)]
    queries = [indices[some] for indices, some in zip(queries, kept, strict=True)]
    rows, columns = (_on_cells(places) for places in layer.cells_of(queries))
    on_cells = _gathered(weights, rows[1][:, None, :, None], rows[0].shape[1], axis=3)
    on_cells = _gathered(on_cells, columns[1][:, None, :], columns[0].shape[1], axis=4)
    steps, largest = _quantise(on_cells.reshape(*on_cells.shape[:3], -1))
    strides = [axis.stride for axis in layer.window.axes(2)]
    return {
        "queries": [(stride * some).tolist() for stride, some in zip(strides, queries, strict=True)],
        "cells": [rows[0].tolist(), columns[0].tolist()],
        "weights": _base64(steps),
        "largest": _base64(largest),
    }


def _on_cells(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From places to cells along one axis: a torus shows a cell more than once, and beside the map there is none.

    Args:
        places: (queries, kernel_size), the cell in each place, negative outside.

    Returns:
        The cells that each query sees, each once, (queries, most), filled up with -1; and which of them each place holds,
        (queries, kernel_size), ``most`` for a place beside the map.
    """
    seen = [np.unique(row[row >= 0]) for row in places]
    most = max(map(len, seen))
    cells = np.array([np.pad(row, (0, most - len(row)), constant_values=-1) for row in seen])
    nth = [np.where(row >= 0, np.searchsorted(one, row), most) for one, row in zip(seen, places, strict=True)]
    return cells, np.array(nth)


def _gathered(weights: np.ndarray, nth: np.ndarray, most: int, axis: int) -> np.ndarray:
    """Add up along an axis the weights of places that hold the same cell; those beside the map are left out."""
    size = [*weights.shape[:axis], most + 1, *weights.shape[axis + 1 :]]
    index = torch.from_numpy(np.broadcast_to(nth, weights.shape).copy())
    values = torch.from_numpy(np.ascontiguousarray(weights))
    found = values.new_zeros(size).scatter_add(axis, index, values)
    return found.narrow(axis, 0, most).numpy()


def _quantise(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of non-negative numbers in 255 steps of the row's largest: uint8, and the largest in float32."""
    largest = rows.max(-1, keepdims=True).astype(np.float32)
    steps = np.round(255 * rows / np.maximum(largest, np.finfo(np.float32).tiny)).astype(np.uint8)
    return steps, largest


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _tables(layer: Any, size: Sequence[int]) -> list[dict[str, Any]]:
    """A layer's learned position tables: pictures of one head each, or of one channel of an absolute embedding."""
    tables = []
    with torch.no_grad():
        bias, relative = getattr(layer, "tables_on", lambda size: (None, None))(size)
    if bias is not None:
        tables.append(_table("bias", "row offset", "column offset", bias))
    for axis, vectors in zip(("row", "column"), relative or (), strict=False):
        used = vectors[..., vectors.abs().amax((0, 1)) > 0]  # an axis may have a share of the channels only
        tables.append(_table(f"{axis} vectors", f"{axis} offset", "channel", used))
    embedding = getattr(getattr(layer, "position", None), "embedding", None)
    if embedding is not None:
        tables.append(_table(f"the first channels of {len(embedding)}", "row", "column", embedding[:8], of="channel"))
    return [table for table in tables if table["shape"][-1]]


def _table(name: str, rows: str, columns: str, values: Tensor, of: str = "head") -> dict[str, Any]:
    values = values.detach().float().cpu()
    usual = values[values.isfinite()]
    largest = usual.abs().max().clamp(min=torch.finfo(torch.float32).tiny) if usual.numel() else values.new_ones(())
    values = values.nan_to_num(0.0, largest.item(), -largest.item())  # a bias of -inf shuts a cell out
    steps = (values / largest * 127).round().to(torch.int8).numpy()
    return {
        "name": name,
        "of": of,
        "rows": rows,
        "columns": columns,
        "shape": list(values.shape),
        "largest": largest.item(),
        "values": _base64(steps),
        "bytes": steps.size,
    }


def _prediction(output: Any, classes: Sequence[str] | None) -> list[dict[str, Any]]:
    """The likeliest classes; nothing for a model that is no classifier."""
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] < 2:
        return []
    probabilities = output[0].detach().float().cpu().softmax(0)
    best = probabilities.topk(min(SHOWN_CLASSES, len(probabilities)))
    names = classes if classes is not None and len(classes) == len(probabilities) else None
    return [
        {"name": readable(str(names[index])) if names else f"class {index}", "probability": value}
        for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _picture_source(pixels: np.ndarray) -> str:
    """The picture as a data: address: PNG where that is small, JPEG for photographs."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    kind, options = ("png", {}) if pixels.size <= 3 * 128 * 128 else ("jpeg", {"quality": 88})
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
