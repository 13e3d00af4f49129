# SPDX-License-Identifier: Apache-2.0
"""``nearsight.train``: a network and data that are there as objects, trained as those that commands name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from os import PathLike
from typing import TYPE_CHECKING, Any

from .errors import DtypeError, OptionError
from .extras import TRAINING, need

if TYPE_CHECKING:
    from torch import nn

    from .training.train import TrainedRun


def train(
    model: str | nn.Module,
    data: Any,
    output: str | PathLike[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    resume: bool = False,
    download: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train a network as ``nearsight train`` does, and leave the same folder: docs/howto/training.md.

    A module given here is trained itself, in one process. No file makes it again: ``nearsight.load(run, model=network)``
    takes one like it, and the folder holds no ``config.json``, by which timm would make it.

    Args:
        model: a module from float32 (B, C, S, S) to logits (B, classes); or a name, as of :func:`nearsight.create_model`.
        data: a ``Dataset`` of PyTorch's whose items are pairs of a picture and its label, a whole number from 0; a mapping
            of such splits by the names train, val and test, or a tuple ``(train, test)`` or ``(train, val, test)``; or a
            name, as of ``nearsight train --data``. What is missing is split off train. A picture is what
            :meth:`~nearsight.saved.loaded.Trained.preprocess` takes; a floating point tensor passes as it is.
        output: the run's folder; None takes ``runs/MODEL-DATA``.
        classes: the names of the labels; None takes ``data.classes``, else the labels are the names.
        mean, std: of what pictures are normalised with, per channel. Needed where tensors come normalised, so that the
            trained network can be shown pictures.
        resume: go on with the run in ``output``, with the same objects and settings.
        download: fetch data that is missing.
        settings: of a :class:`nearsight.training.recipe.Recipe`: ``epochs``, ``lr``, ``batch_size`` ...

    Raises:
        DtypeError, OptionError, DataError: a model, data or settings that are not as said here, or do not fit together.
        TrainingError: the folder holds a run or cannot be written, the loss is not finite, or the user stopped it.
        PackageError: the extra ``train`` is not installed.

    Example:
        >>> run = train(model=network, data=dataset, output="runs/mine", epochs=10)
        >>> run.evaluation.accuracy
        0.93
        >>> model = nearsight.load("runs/mine", model=network)
    """
    need(TRAINING, "`nearsight.train`", "train")
    from torch import nn

    from .models import given_name
    from .training.data import given_pictures
    from .training.data.given import check_sendable
    from .training.recipe import Recipe, of_wrong_type
    from .training.train import Given
    from .training.train import resume as go_on
    from .training.train import train as begin

    if not isinstance(model, (str, nn.Module)):
        advice = ": call it" if isinstance(model, type) else ""
        raise DtypeError(f"model must be a name or a network, as Tiny(); received {model!r:.100}{advice}")
    _check_settings(settings, {field.name for field in fields(Recipe)}, of_wrong_type)
    named = isinstance(data, str)
    if named and (classes, mean, std) != (None, None, None):
        raise OptionError(
            f"classes, mean and std are of data that is given as an object; {data} has its own: leave them out"
        )
    pictures = None if named else given_pictures(data, classes, mean, std)
    network = None if isinstance(model, str) else model
    asked = {
        **settings,
        "model": model if isinstance(model, str) else given_name(model),
        "data": data if pictures is None else pictures.name,
    }
    recipe = Recipe(**asked)
    if recipe.given:
        _check_alone(recipe, network)
    if pictures is not None and recipe.workers:
        check_sendable(pictures)
    objects = Given(network, pictures)
    if resume:
        from .training.train import default_output

        return go_on(default_output(recipe) if output is None else output, asked, objects)
    return begin(recipe, output, download=download, objects=objects)


def _check_settings(settings: Mapping[str, Any], known: set[str], of_wrong_type: Any) -> None:
    for name in settings.keys() - known:
        near = get_close_matches(name, sorted(known), n=1)
        raise OptionError(
            f"there is no setting {name}; {f'did you mean {near[0]}?' if near else 'they are ' + ', '.join(sorted(known))}"
        )
    for name in of_wrong_type({name: value for name, value in settings.items() if value is not None}):
        raise DtypeError(
            f"{name} is of another type than the settings of a recipe have it; received {settings[name]!r:.100}"
        )


def _check_alone(recipe: Any, network: nn.Module | None) -> None:
    """What an object cannot be asked for."""
    if recipe.processes > 1:
        raise OptionError(
            f"{' and '.join(recipe.given)} given as objects train in one process, for no other could make them; received "
            f"{recipe.devices} devices on {recipe.nodes} host{'s' * (recipe.nodes > 1)}: register the network "
            "(nearsight.models.register) and take data by its name for several"
        )
    if network is not None and recipe.drop_path:
        raise OptionError(
            f"drop_path is built into a network that is made by its name; received {recipe.drop_path:g}: leave it out"
        )
