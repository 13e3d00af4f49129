# SPDX-License-Identifier: Apache-2.0
"""Pictures by name, each split in three.

The splits are fixed, whatever the seed of the run, so that runs can be compared:

    digits        scikit-learn's 1797 handwritten digits, 8x8: 20 % test, stratified; 10 % of the rest validation
    mnist ...     the official test set; 10 % of the official training set, stratified, is validation
    rotated-...   the same pictures, each turned once by an angle out of the whole circle
    folder:PATH   PATH/train with PATH/val and/or PATH/test, one folder per class inside; or the class folders
                  straight in PATH, split as digits are
    hf:NAME       a data set of the Hugging Face Hub, or a local folder that its library reads; its own splits
    wds:PATH      WebDataset shards, named after their split

A lone val is taken as the test set, and then 10 % of the training images are validation. Nothing is ever chosen by its
result on the test split.

pictures.py   what a data set is to the rest of the training
arrays.py     those that fit in memory
decoded.py    those that are decoded when needed; folder:PATH
hub.py        hf:NAME
given.py      data sets of PyTorch, given from Python
shards.py     wds:PATH
augment.py    how training varies them
"""

from __future__ import annotations

from torch import Tensor

from ...errors import OptionError
from ...models import GIVEN
from ...saved.view import View
from .arrays import SOURCES, ArraySplit, RandomAffine
from .augment import augmented, told
from .decoded import DecodedSplit, Whole, load_folder, warn_of_broken, whole
from .given import given_pictures
from .hub import load_hub
from .pictures import IGNORED, MAX_BROKEN, PictureDataset, Pictures, Split, SplitSampler, check_trainable, loader
from .shards import load_shards

__all__ = [
    "FILE_KINDS",
    "IGNORED",
    "MAX_BROKEN",
    "SOURCES",
    "ArraySplit",
    "DecodedSplit",
    "PictureDataset",
    "Pictures",
    "RandomAffine",
    "Split",
    "SplitSampler",
    "Whole",
    "augmented",
    "check_trainable",
    "given_pictures",
    "load_pictures",
    "load_whole",
    "loader",
    "numbered_picture",
    "told",
    "warn_of_broken",
]

FILE_KINDS = {"folder": load_folder, "hf": load_hub, "wds": load_shards}


def load_pictures(name: str, root: str | None = None, download: bool = False) -> Pictures:
    """Find a data set by name.

    Args:
        root: a folder that holds the files; else the usual places are searched.
        download: fetch what is missing, where torchvision knows how to.

    Raises:
        OptionError: an unknown name.
        DataError: the files are missing or cannot be read; the message says where they were looked for.

    Example:
        >>> len(load_pictures("digits").test)
        360
    """
    kind, colon, _ = name.partition(":")
    if colon and kind in FILE_KINDS:
        return FILE_KINDS[kind](name)
    if name.startswith(GIVEN):
        raise OptionError(
            f"the data {name.removeprefix(GIVEN)} was given from Python, and no name makes it again: "
            "nearsight.train(data=...)"
        )
    if name not in SOURCES:
        raise OptionError(
            f"data must be one of {', '.join(SOURCES)}, folder:PATH, hf:NAME or wds:PATH; received {name!r}"
        )
    return SOURCES[name](name, root, download)


def load_whole(name: str, root: str | None = None) -> Whole:
    """All of a data set, to measure a network on; as :func:`load_pictures`, but that nothing is split.

    Example:
        >>> sum(map(len, load_whole("digits").splits))
        1797
    """
    kind, colon, _ = name.partition(":")
    if colon and kind in FILE_KINDS:
        return FILE_KINDS[kind](name, whole)
    pictures = load_pictures(name, root)
    return Whole(name, pictures.classes, (pictures.train, pictures.validation, pictures.test))


def numbered_picture(name: str, view: View, root: str | None = None) -> tuple[Tensor, Tensor, str]:
    """One test image of a data set: as a network sees it, as a person does, and its class.

    Args:
        name: ``DATA:N``, where N counts from 0.
        root: as of :func:`load_pictures`.

    Shapes: twice (C, H, W); the second is between 0 and 1.

    Raises:
        OptionError: an unknown name, or no image of that number.
        DataError: the files are missing or cannot be read.
    """
    data, number = name.rsplit(":", 1)
    pictures = load_pictures(data, root)
    if int(number) >= len(pictures.test):
        raise OptionError(f"{data} has {len(pictures.test)} test images, counted from 0; received {name}")
    image, label = pictures.test.dataset(view, training=False, max_broken=0)[int(number)]
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (view.mean, view.std))
    return image, (image * std + mean).clamp(0, 1), pictures.classes[int(label)]
