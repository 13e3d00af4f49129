# SPDX-License-Identifier: Apache-2.0
"""``nearsight eval``: a trained network on any data, with the classes matched by name and known pictures pointed out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch

from ..errors import OptionError
from ..pages.brief import Brief
from ..picture import opaque
from ..saved.trained_on import TRAINED_FILE, read_trained
from ..saved.view import View
from ..saved.weights import Blueprint, load_model
from ..telling import telling
from .data import FILE_KINDS, MAX_BROKEN, Pictures, Split, Whole, load_pictures, load_whole, loader
from .evaluate import Evaluation, evaluate, joined
from .intervals import Interval, wilson
from .matching import classes_in

SPLITS = ("test", "val", "train", "all")
BATCH = 256
SPREAD = 200  # pictures of a split that are looked at to tell whether a run was trained on it


@dataclass(frozen=True, repr=False)
class Assessment(Brief):
    """What a network reached.

    data        as it was asked for
    split       one of ``SPLITS``
    evaluation  of the pictures that were measured; labels are the network's classes
    classes     those of the network's classes that have pictures among the measured, in the network's order
    trained     how many pictures of the split the network was trained on; None where its run noted none
    left_out    whether those are not among the measured ones
    """

    blueprint: Blueprint
    data: str
    split: str
    evaluation: Evaluation
    classes: tuple[str, ...]
    trained: int | None
    left_out: bool

    def __repr__(self) -> str:
        return f"Assessment({self.summary()[0]})"

    @property
    def share(self) -> float | None:
        """Of the split's pictures, those that the network was trained on."""
        whole = self.evaluation.count + (self.trained or 0) * self.left_out
        return None if self.trained is None else self.trained / whole

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON. The confusion matrix is of the network's classes."""
        result = self.evaluation
        return {
            "model": self.blueprint.model,
            "data": self.data,
            "split": self.split,
            "images": result.count,
            "trained_images": self.trained,
            "trained_share": self.share,
            "left_out": self.left_out,
            "classes": self.blueprint.classes,
            "measured_classes": self.classes,
            "accuracy": result.accuracy,
            "accuracy_low": self.interval.low,
            "accuracy_high": self.interval.high,
            "loss": result.loss,
            "by_class": self.by_class(),
            "confusion": result.confusion.tolist(),
        }

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the accuracy: how far it could be off by the luck of these images."""
        return wilson(self.evaluation.accuracy, self.evaluation.count)

    def by_class(self) -> list[dict[str, Any]]:
        """The accuracy on the images of each class that has any, with its interval: a record a class."""
        rows = []
        for place, counts in enumerate(self.evaluation.confusion):
            images, correct = int(counts.sum()), int(counts[place])
            if images:
                found = wilson(correct / images, images)
                score = {"accuracy": found.value, "accuracy_low": found.low, "accuracy_high": found.high}
                rows.append({"class": self.blueprint.classes[place], "images": images, "correct": correct, **score})
        return rows

    def summary(self) -> list[str]:
        """In a few lines."""
        what = {"test": "test images", "val": "validation images", "train": "training images", "all": "images"}
        result, known = self.evaluation, self.blueprint.classes
        score = f"{result.accuracy:.2%} ({result.correct} of {result.count} {what[self.split]})"
        low, high = self.interval.low, self.interval.high
        lines = [f"{self.blueprint.model} on {self.data}: {score}, 95 % interval {100 * low:.1f} to {100 * high:.1f} %"]
        if len(self.classes) < len(known):
            lines.append(
                f"a part of the network's classes, {len(self.classes)} of {len(known)}: {', '.join(self.classes)}; an "
                "answer outside of them counts as wrong"
            )
        if self.trained is None:
            lines.append(f"what it was trained on is not known: there is no {TRAINED_FILE} beside the weights")
        elif self.left_out:
            lines.append(f"left out: {self.trained} more that it was trained on, {self.share:.2%} of all")
        else:
            lines.append(f"it was trained on {self.share:.2%} of them ({self.trained} of {result.count})")
        return lines


def assess(
    run: str | PathLike[str],
    data: str,
    root: str | None = None,
    *,
    split: str | None = None,
    by_order: bool = False,
    leave_out_trained: bool = False,
    max_broken: int = MAX_BROKEN,
    background: str | None = None,
) -> Assessment:
    """Measure a saved network on a data set.

    Args:
        run: what :func:`nearsight.saved.weights.load_model` takes.
        data, root: as of :func:`nearsight.training.data.load_pictures`.
        split: one of ``SPLITS``; None takes ``"test"``, and ``"all"`` for pictures in files that the run was not trained on.
        by_order: pair classes by their order, whatever they are called.
        leave_out_trained: measure only pictures that the run was not trained on.
        max_broken: pictures of a split that may be unreadable; they are named and do not count.
        background: the colour that shows where pictures are transparent; None takes the run's.

    Raises:
        OptionError: an unknown split, or max_broken below 0; classes that are not the network's; nothing known of what the
            run was trained on, or nothing left to measure.
        DataError: a file that cannot be read.
        TrainingError: an output or a loss that is not finite.
    """
    if split is not None and split not in SPLITS:
        raise OptionError(f"--split must be one of {', '.join(SPLITS)}; received {split!r}")
    if max_broken < 0:
        raise OptionError(f"--max-broken must be at least 0; received {max_broken}")
    model, blueprint = load_model(run)
    if background is not None:
        opaque(background)
        blueprint = replace(blueprint, view=replace(blueprint.view, background=background))
    known = read_trained(run)
    if leave_out_trained and known is None:
        raise OptionError(
            f"--leave-out-trained needs {TRAINED_FILE} beside the weights, which a run leaves; {run} has none"
        )
    split = split or _usual_split(data, root, blueprint, known)
    pictures, chosen = _chosen(data, root, split)
    classes = classes_in(blueprint, run, pictures, chosen, by_order=by_order)
    found, seen_before = [], []
    for part in chosen:
        images = part.dataset(blueprint.view, training=False, max_broken=max_broken)
        with telling(f"measuring {len(part)} images of {data}"):
            result = evaluate(model, loader(images, BATCH, part.workers), classes)
        found.append(result)
        seen_before.append(np.isin(images.digests(result.places).numpy(), [] if known is None else known))
    result, trained = joined(found), torch.from_numpy(np.concatenate(seen_before))
    if leave_out_trained:
        if trained.all():
            raise OptionError(f"{run} was trained on all {result.count} images: there is nothing left to measure")
        result = result.part(~trained)
    there = [blueprint.classes[index] for index in result.labels.unique().tolist()]
    count = None if known is None else int(trained.sum())
    return Assessment(blueprint, data, split, result, tuple(there), count, leave_out_trained)


def _chosen(data: str, root: str | None, split: str) -> tuple[Pictures | Whole, Sequence[Split]]:
    """A data set, and those of its splits that make up the one asked for."""
    if split == "all":
        whole = load_whole(data, root)
        return whole, whole.splits
    pictures = load_pictures(data, root)
    return pictures, [{"test": pictures.test, "val": pictures.validation, "train": pictures.train}[split]]


def _usual_split(data: str, root: str | None, blueprint: Blueprint, known: np.ndarray | None) -> str:
    """Of pictures in files all, unless the run was trained on them: then those that it has not seen."""
    if data.partition(":")[0] not in FILE_KINDS:
        return "test"
    if known is None:
        return "test" if data == blueprint.data else "all"
    return "test" if any(_holds(split, blueprint.view, known) for split in load_whole(data, root).splits) else "all"


def _holds(split: Split, view: View, known: np.ndarray) -> bool:
    """Whether a run was trained on any of a split's pictures; of many, some all over it are looked at."""
    spread = torch.from_numpy(np.linspace(0, len(split) - 1, min(SPREAD, len(split))).round().astype(np.int64))
    images = split.dataset(view, training=False, max_broken=len(split))
    return bool(np.isin(images.digests(spread).numpy(), known).any())
