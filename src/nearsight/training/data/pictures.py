# SPDX-License-Identifier: Apache-2.0
"""What a data set is to the rest of the training: three splits, how a model sees them, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ...errors import DataError
from ...extras import need
from ...pages.brief import Brief
from ...pages.names import readable
from ...saved.view import View

if TYPE_CHECKING:
    from PIL.Image import Image

SPLIT_SEED = 0
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
IGNORED = -1  # the label of what does not count: padding, and images that cannot be read
MAX_BROKEN = 10
SIZES = 32  # a multiple of which most networks halve to the end


@dataclass(frozen=True)
class Changes:
    """How training varies a picture.

    Attributes:
        crop: the least share of a picture's area that is cut out and brought to the size; 1 cuts nothing out.
        mirror: whether half of them are mirrored, left to right.
        jitter: how far brightness, contrast and saturation of coloured ones vary, as torchvision's ``ColorJitter`` has it.
    """

    crop: float = 1.0
    mirror: bool = False
    jitter: float = 0.0

    def but(self, mirror: bool | None, crop: float | None) -> Changes:
        """The same with what is not None."""
        mirror, crop = self.mirror if mirror is None else mirror, self.crop if crop is None else crop
        return replace(self, mirror=mirror, crop=crop)

    def told(self) -> str:
        """In a few words."""
        crop = "no crop" if self.crop == 1 else f"crops to {100 * self.crop:g} to 100 % of the area"
        return f"{crop}, {'mirrors half' if self.mirror else 'no mirror'}" + (", varies colours" if self.jitter else "")


AUGMENTS = {
    "none": Changes(),
    "light": Changes(crop=0.8, jitter=0.4),
    "full": Changes(crop=0.08, mirror=True, jitter=0.4),
}


class PictureDataset(Dataset[tuple[Tensor, Tensor]]):
    """The pictures of a split as a model with a certain view wants them."""

    @property
    def known(self) -> Tensor:
        """The :func:`digest` of each picture that was decoded so far, by any process that loads for this object; or 0."""
        raise NotImplementedError

    def digests(self, indices: Tensor | None = None) -> Tensor:
        """Those of all pictures, or of some, decoded for this where they were not before; 0 for what cannot be read."""
        raise NotImplementedError


def digest(picture: Image) -> int:
    """A number from 1 to 2**63 - 1 for what a decoded picture shows: its mode, its size and its cells.

    Two of n different pictures share one with a chance of about n**2 / 2**64.
    """
    return digest_of_cells(picture.mode, picture.width, picture.height, picture.tobytes())


def digest_of_cells(mode: str, width: int, height: int, cells: bytes) -> int:
    """:func:`digest` of a picture that is there as its parts."""
    state = blake2b(f"{mode} {width} {height} ".encode(), digest_size=8)
    state.update(cells)
    return (int.from_bytes(state.digest(), "big") >> 1) or 1


class Split(Protocol):
    """One of the three parts of a data set."""

    @property
    def labels(self) -> Tensor | np.ndarray:
        """The class of each picture."""
        ...

    @property
    def workers(self) -> int:
        """Processes that it is worth loading with."""
        ...

    def __len__(self) -> int: ...

    def order(self, generator: torch.Generator) -> Tensor:
        """All indices once, shuffled."""
        ...

    def median_side(self) -> float | None:
        """Of the pictures' shorter sides, in pixels; None where none can be read."""
        ...

    def dataset(self, view: View, training: bool, seed: int = 0, max_broken: int = MAX_BROKEN) -> PictureDataset:
        """The pictures as a model with that view wants them: pairs of float32 (C, H, W) and label.

        Item ``epoch * len(split) + index`` is the picture at ``index`` as it is drawn in that epoch. Its random changes in
        training follow from this number and ``seed`` alone, whichever process draws them. A negative item is padding.
        """
        ...


@dataclass(frozen=True, repr=False)
class Pictures(Brief):
    """A data set: its splits, what they look like, and the settings found best for training on it."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    channels: int
    size: int | None  # None: pictures of any sizes
    mean: tuple[float, ...]
    std: tuple[float, ...]
    defaults: dict[str, Any]
    augment: nn.Module = field(
        default_factory=nn.Identity
    )  # of whole batches, for splits that do not change their pictures

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(readable, self.classes)))

    def view(self, size: int) -> View:
        """How a model that takes them at this size sees these pictures."""
        return View(self.channels, size, self.mean, self.std)

    def fitting(self, made_for: int) -> int:
        """The size at which a model that was made for ``made_for`` pixels a side sees these pictures, unless told otherwise.

        Their own where all have one. Else the model's, or the pictures' if that is smaller: the median of their shorter
        sides, rounded up to a multiple of 32.
        """
        if self.size is not None:
            return self.size
        side = self._median_side
        return made_for if side is None else min(made_for, SIZES * math.ceil(side / SIZES))

    @cached_property
    def _median_side(self) -> float | None:
        return self.train.median_side()


class SplitSampler(Sampler[int]):
    """Shares one order of a split among processes: image i goes to process i modulo their number.

    In training the order is shuffled by ``(seed, epoch)`` and cut to whole steps, so that any number of processes take the
    same steps over the same images. Otherwise all images come in order, with padding (-1) so that all processes get as many.

    Args:
        step: images per step over all processes, in training; None to go through all images in order.
    """

    def __init__(self, split: Split, rank: int = 0, world: int = 1, *, step: int | None = None, seed: int = 0) -> None:
        self.split, self.rank, self.world, self.step, self.seed = split, rank, world, step, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells the epoch here."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = len(self.split)
        return -(-count // self.world) if self.step is None else count // self.step * self.step // self.world

    def __iter__(self) -> Iterator[int]:
        total = len(self) * self.world
        if self.step is None:
            count = len(self.split)
            items = [*range(count), *[-1] * (total - count)]
        else:
            generator = torch.Generator().manual_seed(hashed(self.seed, self.epoch))
            items = (self.epoch * len(self.split) + self.split.order(generator)[:total]).tolist()
        return iter(items[self.rank :: self.world])


def hashed(*numbers: int) -> int:
    """A seed that follows from several numbers, so that no sum of them, as of seed and epoch, comes twice."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def loader(data: Dataset, batch_size: int, workers: int, sampler: Sampler | None = None) -> DataLoader:
    """Batches of a prepared split, in order or in the sampler's."""
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_is if hasattr(data, "__getitems__") else None,
        persistent_workers=workers > 0,
    )


def plainly(batches: DataLoader) -> Iterator[Any]:
    """All batches; what went wrong in a process that loads them is told as here, without that process's traceback.

    Raises:
        DataError: too many pictures cannot be read, or such a process has died.
    """
    try:
        yield from batches
    except DataError as error:
        message = last_words(error)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = f"a process that loads images has ended: {last_words(error)}; memory may be short: try --workers 0"
    else:
        return
    raise DataError(message)  # out here, where nothing holds on to the first error and so to the loading processes


def last_words(error: Exception) -> str:
    """An error's message; from another process it comes with that process's traceback around it."""
    return " ".join(str(error).rsplit("DataError: ", 1)[-1].split())


def _as_is(batch: Any) -> Any:
    return batch


def check_trainable(pictures: Pictures) -> None:
    """That there is something to tell apart.

    Raises:
        DataError: the training pictures are all of one class.
    """
    there = np.unique(np.asarray(pictures.train.labels))
    if len(there) < 2:
        name = pictures.classes[int(there[0])] if len(there) else "none"
        raise DataError(
            f"training needs images of two classes or more; those of {pictures.name} are all of one, {name}: add another"
        )


def stratified(labels: Sequence[int] | np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the larger and of the smaller part, every class in proportion; the same at every call."""
    need(("sklearn",), "splitting images", "explore")
    from sklearn.model_selection import train_test_split

    try:
        larger, smaller = train_test_split(
            np.arange(len(labels)), test_size=share, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise DataError(f"too few images to split {share:.0%} off every class: {error}") from error
    return np.sort(larger), np.sort(smaller)
