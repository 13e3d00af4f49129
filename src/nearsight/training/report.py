# SPDX-License-Identifier: Apache-2.0
"""The page that shows a run: one file, pictures inside, for light and dark, for eyes and screen readers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import NearsightError
from ..files import to_path, write_text
from ..inspect.maps import AttentionMap, attention_maps
from ..layers import AttentionLayer
from ..modes import evaluating
from ..pages import drawings
from ..pages.brief import Brief
from ..pages.charts import Chart, Series, charts_to_csv, draw_charts
from ..pages.csv_json import write_csv
from ..pages.html import render
from ..pages.names import readable
from ..pages.style import to_svg
from ..saved.view import View
from ..saved.weights import Blueprint
from .evaluate import Evaluation
from .recipe import Recipe

REPORT_FILE = "report.html"
SHOWN_IMAGES = 4
SHOWN_LAYERS = 6
SHOWN_MISTAKES = 5


@dataclass(frozen=True, repr=False)
class Drawing(Brief):
    """An SVG element, the sentence under it, and as CSV the numbers that it shows."""

    svg: str
    caption: str
    numbers: str


def write_result(path: str | PathLike[str], recipe: Recipe, evaluation: Evaluation) -> None:
    """The accuracy alone as a page, which stands where the report will: nothing that fails in drawing it takes that away."""
    values = {
        "version": version("nearsight"),
        "recipe": recipe,
        "evaluation": evaluation,
        "folder": to_path(path).parent,
    }
    write_text(path, render("result.html.jinja", **values))


def is_drawn(path: str | PathLike[str], draw: Callable[[], None]) -> bool:
    """Draw a page. One that cannot be drawn is a line on standard error: what was trained and measured is kept."""
    try:
        draw()
    except NearsightError:
        raise
    except Exception as error:  # of what draws, as many kinds as there are names, numbers and versions of Matplotlib
        reason = readable(" ".join((str(error) or type(error).__name__).split()))
        message = f"nearsight: warning: cannot draw {path}: {reason:.200}; the results are kept"
        print(message, file=sys.stderr, flush=True)
        return False
    return True


def write_report(
    path: str | PathLike[str],
    recipe: Recipe,
    blueprint: Blueprint,
    model: nn.Module,
    rows: Sequence[Mapping[str, float]],
    evaluation: Evaluation,
    test: Dataset,
    augmentation: str = "",
) -> None:
    """Draw a run and write it as one HTML page.

    Args:
        rows: of ``metrics.csv``.
        evaluation: of the test split.
        test: the split itself, as the model sees it, for the pictures of what it attended to.
        augmentation: what training did to its pictures, in a few words.
    """
    page = render(
        "report.html.jinja",
        version=version("nearsight"),
        recipe=recipe,
        config=recipe.to_yaml(blueprint.model),
        size=blueprint.view.size,
        evaluation=evaluation,
        augmentation=augmentation,
        interval=_interval(evaluation),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rows=rows,
        curve=_curve(rows, mixed=bool(recipe.mixup or recipe.cutmix)),
        confusion=_confusion(evaluation, blueprint.classes),
        mistakes=_mistakes(evaluation, blueprint.classes),
        attention=_attention(model, blueprint, evaluation, test),
    )
    write_text(path, page)


def _interval(evaluation: Evaluation) -> tuple[float, float]:
    """Wilson's 95 % interval: how far the accuracy could be off by the luck of these test images."""
    from scipy.stats import binomtest

    interval = binomtest(evaluation.correct, evaluation.count).proportion_ci(method="wilson")
    return interval.low, interval.high


def _curve(rows: Sequence[Mapping[str, float]], *, mixed: bool) -> Drawing:
    first, last = rows[0], rows[-1]
    text = (
        f"Over {len(rows)} epochs the training loss goes from {first['train_loss']:.2f} to {last['train_loss']:.2f} and "
        f"the validation accuracy from {first['val_accuracy']:.1%} to {last['val_accuracy']:.1%}."
    )
    if mixed:
        text += " The training accuracy is of mixed images: how often the class with the larger share is named."
    epochs = [row["epoch"] for row in rows]
    charts = []
    for what, name, unit in (("loss", "loss", 1), ("accuracy", "accuracy, %", 100)):
        parts = (("training, mixed" if mixed else "training", "train"), ("validation", "val"))
        series = [Series(label, epochs, [unit * row[f"{part}_{what}"] for row in rows]) for label, part in parts]
        charts.append(Chart("epoch", name, {"": series}))
    return Drawing(to_svg(draw_charts(charts), f"Learning curve. {text}"), text, charts_to_csv(charts))


def _confusion(evaluation: Evaluation, classes: Sequence[str]) -> Drawing:
    wrong = evaluation.count - evaluation.correct
    text = f"{evaluation.correct} of {evaluation.count} test images are right, {wrong} wrong."
    figure = drawings.confusion_matrix(evaluation.confusion, classes)
    pairs = ((classes[true], classes[said], count) for (true, said), count in np.ndenumerate(evaluation.confusion))
    numbers = write_csv(("true class", "predicted", "images"), pairs)
    return Drawing(to_svg(figure, f"Confusion matrix of {len(classes)} classes. {text}"), text, numbers)


def _mistakes(evaluation: Evaluation, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """The most frequent confusions: true class, predicted class, count."""
    counts = evaluation.confusion.copy()
    np.fill_diagonal(counts, 0)
    worst: list[int] = np.argsort(-counts, axis=None, kind="stable")[:SHOWN_MISTAKES].tolist()
    pairs = [divmod(place, len(classes)) for place in worst]
    return [(classes[true], classes[guess], int(counts[true, guess])) for true, guess in pairs if counts[true, guess]]


def _attention(model: nn.Module, blueprint: Blueprint, evaluation: Evaluation, test: Any) -> list[Drawing]:
    """Memory blocks in a few test images, then head by head in the first; empty for a network without attention."""
    if not any(isinstance(module, AttentionLayer) for module in model.modules()):
        return []
    chosen = _choose(evaluation)
    images = torch.stack([test[int(evaluation.places[index])][0] for index in chosen]).to(
        next(model.parameters()).device
    )
    maps = _spread(attention_maps(model, images), SHOWN_LAYERS)
    pictures = []
    with evaluating(model):
        pixels = _decisive_pixels(model, images)
    shown = [_visible(image, blueprint.view) for image in images.cpu()]
    for place, (index, image, pixel) in enumerate(zip(chosen, shown, pixels, strict=True)):
        true = blueprint.classes[int(evaluation.labels[index])]
        said = blueprint.classes[int(evaluation.predictions[index])]
        verdict = f"a {true}, recognised" if said == true else f"a {true}, taken for a {said}"
        text = f"Test image {index}: {verdict}. The query is the pixel in row {pixel[0]}, column {pixel[1]}, from 0."
        figure = drawings.memory_blocks(image, maps, pixel, place)
        numbers = drawings.blocks_to_csv(maps, pixel, place)
        pictures.append(Drawing(to_svg(figure, f"{text} {_where(maps, pixel, place)}"), text, numbers))
    text = f"The same query in test image {chosen[0]}, head by head."
    figure = drawings.heads(shown[0], maps, pixels[0])
    pictures.append(Drawing(to_svg(figure, text), text, drawings.blocks_to_csv(maps, pixels[0])))
    return pictures


def _choose(evaluation: Evaluation) -> list[int]:
    """Right answers spread over the test set, and the first mistake if there is one."""
    right = evaluation.predictions == evaluation.labels
    wrong = (~right).nonzero().flatten().tolist()[:1]
    return _spread(right.nonzero().flatten().tolist(), SHOWN_IMAGES - len(wrong)) + wrong


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most ``most`` of the items, evenly apart, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, most).round().astype(int)]


def _decisive_pixels(model: nn.Module, images: Tensor) -> list[tuple[int, int]]:
    """Row and column of the pixel of each image on which its answer depends most, by the gradient."""
    images = images.detach().clone().requires_grad_()
    best = model(images).max(1).values.sum()
    (gradient,) = torch.autograd.grad(best, images)
    places = gradient.abs().sum(1).flatten(1).argmax(1).tolist()
    return [divmod(place, images.shape[-1]) for place in places]


def _visible(image: Tensor, view: View) -> np.ndarray:
    """Undo the normalisation: (H, W) or (H, W, 3), 0 to 1."""
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (view.mean, view.std))
    pixels = (image * std + mean).clamp(0, 1)
    return pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()


def _where(maps: Sequence[AttentionMap], pixel: tuple[int, int], index: int) -> str:
    """For those who cannot see the picture: the cell that each layer weighted most."""
    parts = []
    for layer in maps:
        weights = layer.memory_block(pixel, index).mean(0)
        row, column = np.unravel_index(weights.argmax(), weights.shape)
        size = "x".join(str(n) for n in weights.shape)
        parts.append(f"{layer.layer}: most weight, {weights.max():.0%}, on cell {row}, {column} of {size}")
    return "; ".join(parts) + "."
