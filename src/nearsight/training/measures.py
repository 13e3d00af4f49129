# SPDX-License-Identifier: Apache-2.0
"""What a finished run is measured by when it is compared with others.

    accuracy                       of the saved weights on the test split
    parameters                     of the network
    flops                          of one image's forward pass, two per multiply-add (nearsight.flops.count_flops)
    train_images_per_second        training images over the time of an epoch's steps, median over the epochs
    inference_images_per_second    of the network alone, on one batch of test images in memory: median of several passes
    peak_memory                    largest resident memory of the training process, on a GPU the largest allocated: bytes
    equivariance_error             how much the answer changes when the picture moves by a pixel
    seconds                        of every epoch, validation and files included
    size                           pixels per side of the pictures that it was trained and measured on
    opt, lr                        optimiser and peak learning rate of its training
    answers                        one character per test image, in order: 1 right, 0 wrong, - unreadable

**Equivariance.** A class has no place, so an answer that moves with the picture is one that stays. With f the network from
the picture to its logits and T one of the four translations of the torus by one pixel (what leaves on one side comes in on
the other), on at most 256 test images x,

    error = max over T of  max | f(T x) - f(x) | / max | f(x) |
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.timing import race
from ..errors import DataError, TrainingError
from ..files import open_regular, read_text, to_path, write_text
from ..flops import count_flops
from ..inspect import equivariance_error
from ..pages.brief import Brief
from ..pages.csv_json import to_json
from ..saved.trained_on import told_overlap
from ..saved.weights import load_model
from .callbacks import METRICS_FILE, TIMING_FILE
from .data import MAX_BROKEN, Pictures, loader
from .evaluate import Evaluation, evaluate
from .matching import classes_in
from .recipe import CONFIG_FILE, read_recipe

MEASURES_FILE = "measures.json"
MEASURED_FROM = (METRICS_FILE, TIMING_FILE)
DIGEST, FILES = "digest", "digests of files"  # in measures.json, beside the numbers: of them, and of what they are from
METRICS = ("epoch", "train_loss", "val_accuracy")
TIMING = ("epoch", "seconds", "images_per_second", "peak_memory")
MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))  # rows, columns
MOVED_IMAGES = 256
PASSES, SECONDS = 10, 10.0  # of the inference's timing


@dataclass(frozen=True, repr=False)
class Measures(Brief):
    """The numbers above, of one run."""

    model: str
    seed: int
    accuracy: float
    parameters: int
    flops: int
    train_images_per_second: float
    inference_images_per_second: float
    peak_memory: float
    equivariance_error: float
    seconds: tuple[float, ...]
    size: int = 0  # from here on missing in files of before: see is_whole
    opt: str = ""
    lr: float = 0.0
    answers: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether all of it was measured."""
        return bool(self.answers)


def measure(
    run: str | PathLike[str], model: str, seed: int, pictures: Pictures, batch_size: int, max_broken: int = MAX_BROKEN
) -> Measures:
    """Measure a finished run, and leave the numbers in its folder as ``measures.json``.

    Args:
        max_broken: pictures that may be unreadable, as in the run's recipe.

    Raises:
        DataError: the run's files cannot be read.
        OptionError: the data has other classes than when the run was trained.
    """
    run = to_path(run)
    network, blueprint = load_model(run)
    view = blueprint.view
    flops = count_flops(network, (view.channels, view.size, view.size))
    network.to(_device())
    test = pictures.test.dataset(view, training=False, max_broken=max_broken)
    batches = loader(test, batch_size, pictures.test.workers)
    result = evaluate(network, batches, classes_in(blueprint, run, pictures, [pictures.test]))
    recipe = read_recipe(run / CONFIG_FILE)
    assert recipe.lr is not None
    assert recipe.opt is not None
    found = Measures(
        model=model,
        seed=seed,
        accuracy=result.accuracy,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops=flops,
        inference_images_per_second=_speed(network, next(iter(batches))[0].to(_device())),
        equivariance_error=moved_by_a_pixel(network, _first(batches, MOVED_IMAGES).to(_device())),
        size=view.size,
        opt=recipe.opt,
        lr=recipe.lr,
        answers=_answers(result, len(pictures.test)),
        **_of_training(run),
    )
    print(told_overlap(run, test.digests(result.places).numpy()), end="", flush=True)
    _write(found, run)
    return found


def _write(found: Measures, run: Path) -> None:
    sources = {name: _digest_of_file(run / name) for name in MEASURED_FROM}
    values = json.loads(to_json({**asdict(found), FILES: sources}))
    write_text(run / MEASURES_FILE, to_json({**values, DIGEST: _digest(values)}) + "\n")


def read_measures(run: str | PathLike[str]) -> Measures:
    """The numbers in a run's ``measures.json``.

    Raises:
        DataError: the file is not there or does not hold them; it, or a table that it was made from, has changed since.
    """
    run = to_path(run)
    file = run / MEASURES_FILE
    try:
        values = json.loads(read_text(file))
        digest = values.pop(DIGEST, None)
        if digest not in (None, _digest(values)):
            raise ValueError("it is not what was written")
        sources = values.pop(FILES, {})
        found = Measures(**{**values, "seconds": tuple(values["seconds"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"cannot read {file}: {error}; delete it, and the run is measured again") from error
    for name, known in sources.items():
        if _digest_of_file(run / name) != known:
            raise DataError(
                f"{run / name} has changed since the run was measured: put back a copy of it, or delete the run's folder, "
                "and it is trained again"
            )
    return found


def read_rows(run: str | PathLike[str]) -> list[dict[str, float]]:
    """The epochs of a run, from its ``metrics.csv``.

    Raises:
        DataError: the file is not there, or does not hold the numbers of every epoch.
    """
    return _read_csv(to_path(run) / METRICS_FILE, METRICS)


def moved_by_a_pixel(network: nn.Module, images: Tensor) -> float:
    """The equivariance error of the answer, as the head of this file defines it."""
    errors = [
        equivariance_error(network, images, lambda x, move=move: x.roll(move, (-2, -1)), out_transform=lambda y: y)
        for move in MOVES
    ]
    if not all(map(math.isfinite, errors)):
        raise TrainingError(f"the network's output is not finite when the picture moves by a pixel: errors {errors}")
    return max(errors)


def _answers(evaluation: Evaluation, images: int) -> str:
    answers = ["-"] * images
    for place, right in zip(evaluation.places, evaluation.predictions == evaluation.labels, strict=True):
        answers[int(place)] = "1" if right else "0"
    return "".join(answers)


def _of_training(run: Path) -> dict[str, Any]:
    """What the run noted of itself while it was trained."""
    epochs = _read_csv(run / TIMING_FILE, TIMING)
    if len(epochs) != len(read_rows(run)):
        raise DataError(
            f"{run / TIMING_FILE} and {METRICS_FILE} are not of the same epochs: one was cut; delete the run's folder, and "
            "it is trained again"
        )
    return {
        "train_images_per_second": median(epoch["images_per_second"] for epoch in epochs),
        "peak_memory": max(epoch["peak_memory"] for epoch in epochs),
        "seconds": tuple(epoch["seconds"] for epoch in epochs),
    }


def _read_csv(file: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    try:
        table = csv.DictReader(io.StringIO(read_text(file)), strict=True)
        rows = [{name: float(value) for name, value in row.items()} for row in table]
        missing = [name for name in columns if name not in (table.fieldnames or ())]
        if missing or not rows:
            raise ValueError(f"it has no {missing[0] if missing else 'epochs'}")
        if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("its epochs are not 1, 2, 3 ...")
        if not all(math.isfinite(value) for row in rows for value in row.values()):
            raise ValueError("a number in it is not finite")
        return rows
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"cannot read {file}: {error}; delete the run's folder, and it is trained again") from error


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest_of_file(file: Path) -> str:
    try:
        with open_regular(file) as content:
            return sha256(content.read()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}; delete the run's folder, and it is trained again") from error


def _speed(network: nn.Module, images: Tensor) -> float:
    def forward() -> None:
        with torch.inference_mode():
            network(images).sum().item()  # asking for a number waits for a GPU

    return len(images) * 1e3 / race({"inference": forward}, PASSES, SECONDS)["inference"].median


def _first(batches: Any, count: int) -> Tensor:
    """The first ``count`` images, or all if there are fewer."""
    taken: list[Tensor] = []
    for images, _ in batches:
        taken.append(images)
        if sum(map(len, taken)) >= count:
            break
    return torch.cat(taken)[:count]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
