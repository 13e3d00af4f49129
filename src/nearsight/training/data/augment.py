# SPDX-License-Identifier: Apache-2.0
"""How much training varies its pictures: none, light or full, and what each data set does unless told otherwise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .arrays import RandomAffine
from .decoded import DecodedSplit
from .pictures import AUGMENTS, Pictures


def augmented(pictures: Pictures, augment: str | None, mirror: bool | None, crop: float | None) -> Pictures:
    """The same data set with other changes in training.

    Args:
        augment: a name in ``AUGMENTS``; None keeps the data set's own. Of pictures held in memory colours do not vary.
        mirror, crop: go before it; None leaves it as it is.

    Example:
        >>> told(augmented(load_pictures("digits"), "light", mirror=True, crop=None))
        'crops to 80 to 100 % of the area, mirrors half'
    """
    train: Any = pictures.train
    if isinstance(train, DecodedSplit):
        changes = train.changes if augment is None else AUGMENTS[augment]
        return replace(pictures, train=replace(train, changes=changes.but(mirror, crop)))
    if (augment, mirror, crop) == (None, None, None):
        return pictures
    own: Any = pictures.augment
    if augment is not None or not isinstance(own, RandomAffine):
        changes = AUGMENTS[augment or "none"]
        own = RandomAffine(shift=0, mirror=changes.mirror, crop=changes.crop)
    own = own.but(mirror, crop)
    nothing = own.told() == AUGMENTS["none"].told()
    return replace(pictures, augment=nn.Identity() if nothing else own)


def told(pictures: Pictures) -> str:
    """In a few words, what training does to the pictures."""
    changes: Any = pictures.train.changes if isinstance(pictures.train, DecodedSplit) else pictures.augment
    return AUGMENTS["none"].told() if isinstance(changes, nn.Identity) else changes.told()
