# SPDX-License-Identifier: Apache-2.0
"""A network to be looked at or measured, by what a person types: a run's folder, a file of weights, or a name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike

from torch import nn

from ..errors import NearsightError, OptionError
from ..files import to_path
from ..models import create_model, input_size, parse_spec, shipped
from ..models.data_config import class_names
from ..models.first_weights import is_untrained
from ..pages.brief import Brief
from .view import View
from .weights import load_model

UNTRAINED = "Untrained: what it looks at is what its random weights happen to prefer."


@dataclass(frozen=True, repr=False)
class OpenedModel(Brief):
    """A network in evaluation mode, and what is known of it.

    given     what was typed
    view      how it sees pictures
    classes   the names of its outputs; None where nobody noted them
    title, origin   what it is and where its weights are from, for a page
    """

    given: str
    network: nn.Module
    view: View
    classes: tuple[str, ...] | None
    title: str
    origin: str

    @contextmanager
    def shown_pictures(self) -> Iterator[None]:
        """A network raises what it likes about pictures that it cannot take: here one line says which.

        Raises:
            OptionError: it raised something.
        """
        try:
            yield
        except (NearsightError, MemoryError):
            raise
        except Exception as error:
            size, reason = self.view.size, (str(error) or type(error).__name__).splitlines()[0]
            raise OptionError(f"{self.given} cannot take {size}x{size} images: {reason}") from error


def open_model(given: str | PathLike[str], size: int | None = None, *, trained: bool = False) -> OpenedModel:
    """A trained network, or one by its name with the weights that it starts with.

    Args:
        given: what :func:`nearsight.saved.weights.load_model` takes, or what :func:`nearsight.create_model` does.
        size: of the pictures that it is to see; None takes its own.
        trained: whether a plain name stands for the weights that come with the package, where some do.

    Raises:
        DataError: a folder or file that cannot be read.
        OptionError: no such network.

    Example:
        >>> open_model("sasa_nano").view.size, open_model("sasa_nano", trained=True).view.size
        (32, 8)
    """
    given = os.fspath(given)
    path = to_path(given)
    is_ours = trained and shipped(given) is not None
    if is_ours or path.exists() or path.suffix in (".safetensors", ".ckpt") or (os.sep in given and ":" not in given):
        network, blueprint = load_model(path)
        view, classes, title = blueprint.view, blueprint.classes, blueprint.model
        origin = "" if blueprint.data == "nothing" else f"Trained on {blueprint.data}."
    else:
        network = create_model(given)
        view, classes, title = View.of(network), class_names(network), given
        options = parse_spec(given)[1]
        view = replace(view, size=input_size(given)) if "img_size" in options else view
        origin = "Made by its name, with the weights that it starts with."
        if is_untrained(network):
            title, origin = f"{given}, untrained", UNTRAINED
    return OpenedModel(given, network.eval(), replace(view, size=size or view.size), classes, title, origin)
