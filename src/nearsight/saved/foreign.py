# SPDX-License-Identifier: Apache-2.0
"""Weights that others saved, wherever in their file they are.

A file may hold a network's weights themselves, or a dictionary with them beside an optimiser, an epoch and arguments; and
what trains a network puts a word before the names: ``module.``, ``_orig_mod.``, ``model.``. Nobody has to know the words:
the weights are where the network's own names are.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DataError
from ..files import open_regular, to_path
from .weights import check_sums

DEEPEST = 3  # dictionaries in each other
MEANS = ("ema", "swa")  # in the word for what is a mean of weights, which is taken before the weights of the last step


def read_weights(path: str | PathLike[str], model: str, names: Collection[str]) -> tuple[dict[str, Tensor], str]:
    """The weights of a network in a ``.safetensors`` or ``.pth`` file, by the network's own names; no code in it runs.

    Where it holds several, the mean of a training's weights goes before those of its last step, as in timm.

    Args:
        model: what the network is called in a message.
        names: of its parameters and buffers.

    Returns:
        the weights; and where they were, as ``"model_state_dict"``, or ``""`` where they are all that there is.

    Raises:
        DataError: no such file; it is damaged, of another kind, or would run code; no name of the network is in it.

    Example:
        >>> torch.save({"epoch": 3, "model_state_dict": network.state_dict()}, "mine.pth")
        >>> read_weights("mine.pth", "resnet18", network.state_dict().keys())[1]
        'model_state_dict'
    """
    path = to_path(path)
    found = [
        (len(names & weights.keys()), any(word in where.lower() for word in MEANS), where, weights)
        for place, state in _states(_read(path))
        for where, weights in _without_prefix(place, state, names)
    ]
    if not found:
        raise DataError(f"{path} does not fit {model}: it holds no tensor by a name of the network's")
    *_, where, weights = max(found, key=lambda one: one[:2])  # of equals the first
    return weights, where


def _read(path: Any) -> Any:
    try:
        open_regular(path).close()
    except OSError as error:
        raise DataError(f"there is no {path}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if is_zipfile(path):
            check_sums(path)
        with torch.serialization.safe_globals([Namespace]):  # plain values by names: what timm's own training notes
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # as many kinds as there are formats; each means the same to the user
        raise DataError(
            f"cannot read {path}: it is damaged, of another kind, or would run code; torch.save(model.state_dict(), FILE) "
            "writes one that does not"
        ) from error


def _states(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary of tensors in a file, however deep, and where it is."""
    if not isinstance(content, Mapping) or depth > DEEPEST:
        return
    tensors = {name: one for name, one in content.items() if isinstance(name, str) and isinstance(one, Tensor)}
    if tensors:
        yield place, tensors
    for name, one in content.items():
        yield from _states(one, f"{place}.{name}".lstrip("."), depth + 1)


def _without_prefix(
    place: str, state: Mapping[str, Tensor], names: Collection[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What is left of a state's names without a word before them, for every word that leaves a name of the network's."""
    longest = sorted(names, key=len, reverse=True)[:1]  # as good as any, and rarely the end of another
    ends = {name[: -len(end)] for end in longest for name in state if name.endswith(end)}
    if not ends and names & state.keys():
        ends = {""}
    for prefix in sorted(ends):
        if prefix and not prefix.endswith("."):
            continue
        weights = {name.removeprefix(prefix): one for name, one in state.items() if name.startswith(prefix)}
        yield f"{place}.{prefix}".strip("."), weights
