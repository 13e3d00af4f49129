# SPDX-License-Identifier: Apache-2.0
"""Pictures that stay where they are stored until they are needed, decoded by processes of their own; folders of them."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import DataError
from ...pages.brief import Brief, brief_fields
from ...pages.names import readable
from ...picture import open_picture, shorter_side
from ...saved.view import View
from .folders import class_folders, refuse_shared
from .pictures import (
    AUGMENTS,
    IGNORED,
    MAX_BROKEN,
    TEST_SHARE,
    VALIDATION_SHARE,
    Changes,
    PictureDataset,
    Pictures,
    Split,
    digest,
    hashed,
    plainly,
    stratified,
)
from .splits import PARTS, parts_among, tell_unread

SAMPLE = 512  # pictures whose size is looked up
WINDOW = 16384  # images of neighbouring blocks that are shuffled among each other
WORTH_WORKERS = 512  # images to decode, from which on processes of their own are worth starting


class ImageStore(Protocol):
    """Labelled pictures that are fetched one by one.

    Attributes:
        labels: of all pictures, int64.
        blocks: the number of the block, as a shard, in which each is stored; None where the order of reading is free.
    """

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def blocks(self) -> np.ndarray | None: ...

    def name(self, index: int) -> str:
        """What to call a picture in a message."""
        ...

    def fetch(self, index: int) -> str | bytes:
        """The file of a picture, or what is in it."""
        ...


class Whole(NamedTuple):
    """A data set as it is stored, its parts not divided any further."""

    name: str
    classes: tuple[str, ...]
    splits: tuple[Split, ...]

    def __repr__(self) -> str:
        return brief_fields(self)


Gather = Callable[
    [str, tuple[str, ...], Mapping[str, ImageStore]], Any
]  # name, classes and parts: what becomes of a data set


def whole(name: str, classes: tuple[str, ...], stores: Mapping[str, ImageStore]) -> Whole:
    """All pictures of a data set: a few new ones can be measured, though they are too few to be split."""
    return Whole(
        name,
        tuple(map(readable, classes)),
        tuple(DecodedSplit(store, np.arange(len(store.labels))) for store in stores.values()),
    )


def divided(name: str, classes: tuple[str, ...], stores: Mapping[str, ImageStore]) -> Pictures:
    """A data set from its parts ``train`` and, where there are, ``val`` and ``test``.

    A lone val or test is taken as the test set, as is usual for ImageNet; what is missing is split off train, every class
    in proportion.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    splits = {part: DecodedSplit(store, np.arange(len(store.labels))) for part, store in stores.items()}
    train, validation, test = in_three(name, classes, splits)
    return Pictures(
        name,
        classes,
        train,
        validation,
        test,
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        defaults={"epochs": 30, "batch_size": 64, "lr": 3e-3, "augment": "light"},
    )


def in_three(name: str, classes: tuple[str, ...], splits: Mapping[str, Divisible]) -> tuple[Any, Any, Any]:
    """Training, validation and test of what is there of them: see :func:`divided`."""
    splits = dict(splits)
    train = splits.pop("train")
    if not splits:
        _check_divisible(name, classes, train)
        train, splits["test"] = train.divide(TEST_SHARE)
    if len(splits) == 2:
        return train, splits["val"], splits["test"]
    (test,) = splits.values()
    _check_divisible(name, classes, train)
    return *train.divide(VALIDATION_SHARE), test


class Divisible(Split, Protocol):
    """A split that can be divided in two, every class in proportion."""

    def divide(self, share: float) -> tuple[Any, Any]:
        """The larger part, and the smaller one."""
        ...


def _check_divisible(name: str, classes: tuple[str, ...], train: Split) -> None:
    """That each class can be in both parts of what is divided."""
    (alone,) = (np.bincount(np.asarray(train.labels)) == 1).nonzero()
    if len(alone):
        raise DataError(
            f"too few images to split some off every class: {name} has a single one for training of "
            f"{', '.join(classes[number] for number in alone[:5])}; add some, or leave the class out"
        )


@dataclass(frozen=True, repr=False)
class DecodedSplit(Brief):
    """Some of the pictures of a store."""

    store: ImageStore
    chosen: np.ndarray
    changes: Changes = AUGMENTS["light"]
    workers: int = min(8, os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> np.ndarray:
        return self.store.labels[self.chosen]

    def divide(self, share: float) -> tuple[DecodedSplit, DecodedSplit]:
        larger, smaller = stratified(self.labels, share)
        return replace(self, chosen=self.chosen[larger]), replace(self, chosen=self.chosen[smaller])

    def order(self, generator: torch.Generator) -> Tensor:
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        if self.store.blocks is None:
            return order
        # Block by block, so that each is read about once, at random within a window of some of them.
        blocks = torch.from_numpy(self.store.blocks[self.chosen])
        rank = torch.randperm(int(blocks.max()) + 1, generator=generator, device=generator.device)
        order = order[rank[blocks[order]].argsort(stable=True)]
        windows = order.split(WINDOW)
        shuffles = (torch.randperm(len(window), generator=generator, device=generator.device) for window in windows)
        return torch.cat([window[shuffle] for window, shuffle in zip(windows, shuffles, strict=True)])

    def median_side(self) -> float | None:
        """Of all pictures, or of a sample evenly spread over many; only their headers are read."""
        places = np.linspace(0, len(self) - 1, min(len(self), SAMPLE)).round().astype(int)
        sides = [self._shorter_side(int(index)) for index in self.chosen[places]]
        known = [side for side in sides if side is not None]
        return float(np.median(known)) if known else None

    def _shorter_side(self, index: int) -> int | None:
        """None for a picture that cannot be read: training will name it."""
        try:
            return shorter_side(self.store.fetch(index))
        except (OSError, DataError):
            return None

    def dataset(self, view: View, training: bool, seed: int = 0, max_broken: int = MAX_BROKEN) -> PictureDataset:
        return DecodingDataset(self, view, training, seed, max_broken)


class DecodingDataset(PictureDataset):
    """The pictures of a split, decoded and, in training, changed at random as the split says.

    One that cannot be read is skipped: in training the next one takes its place, otherwise it does not count. More than
    ``max_broken`` of them are an error. All processes that load for this object share the list of them, and the digests of
    those that were read.
    """

    def __init__(self, split: DecodedSplit, view: View, training: bool, seed: int, max_broken: int) -> None:
        self.split, self.view, self.training, self.seed, self.max_broken = split, view, training, seed, max_broken
        self.unreadable = torch.zeros(len(split), dtype=torch.bool, device="cpu").share_memory_()
        self.read = torch.zeros(len(split), dtype=torch.int64, device="cpu").share_memory_()
        self.transform = _transform(view, split.changes if training else Changes())

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        if item >= 0:
            if self.training:
                seed_all(self.seed, item)
            for place in range(len(self) if self.training else 1):
                index = (item + place) % len(self)
                image = self._open(index)
                if image is not None:
                    return self.transform(image), int(self.split.store.labels[self.split.chosen[index]])
        if self.training:
            raise DataError(f"none of the {len(self)} training images can be read; the first is {self.name(0)}")
        return torch.zeros(
            self.view.channels, self.view.size, self.view.size, dtype=torch.float32, device="cpu"
        ), IGNORED

    def name(self, index: int) -> str:
        return readable(self.split.store.name(int(self.split.chosen[index])))

    def broken(self) -> list[str]:
        """The names of the pictures that could not be read so far."""
        return [self.name(index) for index in self.unreadable.nonzero().flatten().tolist()]

    @property
    def known(self) -> Tensor:
        return self.read

    def digests(self, indices: Tensor | None = None) -> Tensor:
        chosen = torch.arange(len(self), device="cpu") if indices is None else indices
        unread = chosen[(self.read[chosen] == 0) & ~self.unreadable[chosen]]
        workers = self.split.workers if len(unread) >= WORTH_WORKERS else 0
        opened = DataLoader(_Opened(self), 64, sampler=unread.tolist(), num_workers=workers, collate_fn=len)
        for _ in plainly(opened):
            pass
        return self.read[chosen]

    def _open(self, index: int) -> Any:
        if self.unreadable[index]:
            return None
        try:
            source = self.split.store.fetch(int(self.split.chosen[index]))
            image = open_picture(source, self.view.channels, self.view.background)
            if not self.read[index]:
                self.read[index] = digest(image)
            return image
        except (OSError, DataError) as error:
            self.unreadable[index] = True
            names = self.broken()
            if len(names) > self.max_broken:
                limit = f"more than {self.max_broken} images cannot be read, among them " if self.max_broken else ""
                raise DataError(
                    f"{limit or 'cannot read the image '}{', '.join(names[:5])}: {error}; mend or remove them, or allow "
                    f"more with --max-broken"
                ) from error
            return None


def _transform(view: View, changes: Changes) -> Callable[[Any], Tensor]:
    """From a picture of Pillow's to what a model with that view wants; without changes it is only resized."""
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import ColorJitter, Compose, RandomHorizontalFlip

    crops = changes.crop < 1
    jitter = 0.0 if view.channels == 1 else changes.jitter
    mirror = 0.5 if changes.mirror else 0.0
    fit: Any = create_transform(
        **view.data_config(),
        is_training=crops,
        scale=(changes.crop, 1.0),
        hflip=mirror,
        color_jitter=jitter,
    )
    if crops:
        return fit
    return Compose([RandomHorizontalFlip(mirror)] * (mirror > 0) + [ColorJitter(*[jitter] * 3)] * (jitter > 0) + [fit])


class _Opened(Dataset):
    """Nothing but the decoding of pictures, which leaves their digests behind."""

    def __init__(self, pictures: DecodingDataset) -> None:
        self.pictures = pictures

    def __getitem__(self, index: int) -> None:
        self.pictures._open(index)


def warn_of_broken(data: Any, known: set[str] | None = None) -> None:
    """Tell on standard error which pictures were skipped, but for those that are ``known``; these are added to it."""
    known = set() if known is None else known
    found = [name for name in data.broken() if name not in known] if isinstance(data, DecodingDataset) else []
    if found:
        print(f"skipped {len(found)} images that cannot be read: {', '.join(found)}", file=sys.stderr, flush=True)
    known.update(found)


def seed_all(*numbers: int) -> None:
    """Python's, NumPy's and PyTorch's random numbers from here on follow from these."""
    state = hashed(*numbers)
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


# ------------------------------------------------------------------------------------------------- folder:PATH


class ImageFiles:
    """Pictures in files."""

    blocks = None

    def __init__(self, samples: list[tuple[str, int]]) -> None:
        self.paths = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples])

    def name(self, index: int) -> str:
        return self.paths[index]

    def fetch(self, index: int) -> str:
        return self.paths[index]


def load_folder(name: str, gather: Gather = divided) -> Any:
    """``folder:PATH``: PATH/train with PATH/val and/or PATH/test, one folder per class inside; or these in PATH itself.

    Splits go by any of their ``SPELLINGS``.
    """
    path = Path(name.partition(":")[2]).expanduser()
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; folder:PATH needs one with a folder of images per class")
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    parts = parts_among(folders, str(path))
    if not parts:
        _check_not_splits(path, folders)
        found = class_folders(path)
        return gather(name, tuple(found.classes), {"train": ImageFiles(found.samples)})
    beside = [folder for folder in folders if folder not in parts.values()]
    _check_not_classes(path, parts, beside)
    found = {part: class_folders(path / folder) for part, folder in parts.items()}
    classes = found["train"].classes
    for part, other in found.items():
        odd = sorted(set(other.classes) ^ set(classes))
        if odd:
            raise DataError(
                f"{path / parts[part]} must hold the classes that {parts['train']} holds; these are in one only: "
                f"{', '.join(odd)}"
            )
    tell_unread(beside, parts.values(), str(path))
    refuse_shared(found)
    return gather(name, tuple(classes), {part: ImageFiles(one.samples) for part, one in found.items()})


def _check_not_classes(path: Path, parts: Mapping[str, str], beside: Sequence[str]) -> None:
    """That no class folder lies beside the splits: one of a class that train has, or any where train is the only split."""
    known = {entry.name.casefold() for entry in (path / parts["train"]).iterdir()}
    classes = [
        folder
        for folder in beside
        if (len(parts) == 1 or folder.casefold() in known) and _holds_pictures(path / folder)
    ]
    if classes:
        splits = ", ".join(parts.values())
        raise DataError(
            f"{path} must hold either splits or classes; it has {splits} beside the class folders {', '.join(classes)}: "
            f"move these elsewhere, or, where {splits} is a class, rename that"
        )


def _check_not_splits(path: Path, folders: Sequence[str]) -> None:
    """That folders of folders are no splits of another name, as seg_train and seg_test; they would be taken for classes."""
    alike = {
        part: folder
        for folder in folders
        for word, part in PARTS.items()
        if folder.casefold().startswith(word) or folder.casefold().endswith(word)
        if not _holds_pictures(path / folder)
    }
    if len(alike) > 1:
        named = ", ".join(sorted(set(alike.values())))
        raise DataError(f"the splits of a folder must be named train, val and test; {path} has {named}: rename them")


def _holds_pictures(folder: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return any(entry.suffix.lower() in IMG_EXTENSIONS for entry in folder.iterdir() if entry.name[0] != ".")
