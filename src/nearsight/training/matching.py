# SPDX-License-Identifier: Apache-2.0
"""Which class of a network each class of a data set is: by their names, for their numbers are but an order of folders."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import OptionError
from ..saved.weights import Blueprint
from .data import Pictures, Split, Whole

SHOWN_NAMES = 20  # of a long list


def match_classes(known: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The place in ``known`` of each of ``names``; None unless every one has exactly one place, and no two share it.

    Names agree that are equal; or else all of them are compared without case, surrounding and repeated spaces, and
    differences of Unicode that cannot be seen: a Mac writes é as two characters.

    Example:
        >>> match_classes(("ant", "bee", "cat"), ("Cat ", "ant"))
        [2, 0]
        >>> match_classes(("ant", "bee"), ("ant", "dog")) is None
        True
    """
    if tuple(known) == tuple(names):
        return list(range(len(known)))  # two classes may share a name then
    for form in (_same, _folded):
        places: dict[str, list[int]] = {}
        for place, name in enumerate(known):
            places.setdefault(form(name), []).append(place)
        found = [places.get(form(name), []) for name in names]
        if all(len(one) == 1 for one in found) and len({one[0] for one in found}) == len(names):
            return [one[0] for one in found]
    return None


def classes_in(
    blueprint: Blueprint, run: object, pictures: Pictures | Whole, splits: Sequence[Split], *, by_order: bool = False
) -> Tensor:
    """The network's class of each of a data set's classes, (classes of the data,); -1 for one without a picture.

    Args:
        run: what the network is called in a message.
        splits: those that are measured: of the data's classes, only those with pictures there have to be the network's.
        by_order: take the data's first class for the network's first, and so on, whatever their names.

    Raises:
        OptionError: a class of the pictures that the network does not know; or ``by_order`` and another number of classes.
    """
    if by_order and len(pictures.classes) == len(blueprint.classes):
        return torch.arange(len(blueprint.classes), device="cpu")
    counts = sum(torch.bincount(torch.as_tensor(split.labels), minlength=len(pictures.classes)) for split in splits)
    there = torch.as_tensor(counts).nonzero().flatten().tolist()
    whole = match_classes(blueprint.classes, pictures.classes)
    if whole is not None:
        return torch.tensor(whole, device="cpu")
    places = None if by_order else match_classes(blueprint.classes, [pictures.classes[index] for index in there])
    if places is None:
        advice = "as many classes are needed for --by-order" if by_order else _advice(blueprint, pictures)
        raise OptionError(
            f"{pictures.name} has {len(pictures.classes)} classes ({_listed(pictures.classes)}); {run} tells "
            f"{len(blueprint.classes)} apart, those of {blueprint.data} ({_listed(blueprint.classes)}): {advice}"
        )
    found = torch.full((len(pictures.classes),), -1, device="cpu")
    found[there] = torch.tensor(places, device="cpu")
    return found


def check_same_classes(blueprint: Blueprint, pictures: Pictures) -> None:
    """That a run which goes on still finds the classes, in their order, with which it began.

    Raises:
        OptionError: a class came, went or was renamed.
    """
    if blueprint.classes != pictures.classes:
        raise OptionError(
            f"the classes of {pictures.name} have changed since the run began: there are {len(pictures.classes)} "
            f"({_listed(pictures.classes)}), the run tells {len(blueprint.classes)} apart ({_listed(blueprint.classes)}): "
            "put them back, or start another run"
        )


def _advice(blueprint: Blueprint, pictures: Pictures | Whole) -> str:
    agree = "their names do not agree"
    if len(pictures.classes) != len(blueprint.classes):
        return f"{agree}; rename them as the network's are"
    return f"{agree}; rename them, or take them in their order with --by-order"


def _listed(names: Sequence[str]) -> str:
    left = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {left} more" if left > 0 else "")


def _same(name: str) -> str:
    return name


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
