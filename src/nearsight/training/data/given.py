# SPDX-License-Identifier: Apache-2.0
"""Data sets of PyTorch, given from Python: whatever has a length and, for each number, a pair of a picture and its label.

A picture is what :meth:`nearsight.saved.loaded.Trained.preprocess` takes. A floating point tensor (C, S, S) is what the
network itself takes, and passes as it is; all others are shown as those of files are.
"""

from __future__ import annotations

import io
import operator
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from ...errors import DataError, DtypeError, NearsightError, OptionError
from ...models import GIVEN, given_name
from ...models.data_config import as_source, fitting
from ...pages.brief import Brief
from ...picture import open_picture
from ...saved.view import View
from ...telling import telling
from .decoded import in_three, seed_all
from .pictures import IGNORED, MAX_BROKEN, PictureDataset, Pictures, digest, digest_of_cells, stratified
from .splits import parts_among

PARTS = ("train", "val", "test")  # of a tuple, in this order
GREY = ("1", "L", "LA", "I", "F")  # Pillow's modes, beside all kinds of I;16
SAMPLE = 64  # pictures that are looked at before a training, to tell channels and size
SAMPLE_SEED = 0


def given_pictures(
    data: Any,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Pictures:
    """A data set of PyTorch's, or several, as the training takes one.

    Args:
        data: pictures that are split as those of a folder are; or a mapping of splits by their names, or a tuple of them in
            the order train, val, test, of which a lone second one is the test set.
        classes: their names, in the order of the labels; None takes ``data.classes``, else the labels are the names.
        mean, std: what floating point tensors were normalised with, per channel; None where they are between 0 and 1. Other
            pictures are normalised with them; None takes ImageNet's.

    Raises:
        DtypeError: what is no such data.
        DataError: labels, pictures or an item that are not as this file's head says, or too few to be split.
        OptionError: fewer classes than labels; pictures whose normalisation is not known, or that have other channels.
    """
    sources = _sources(data)
    labels = {part: _labels(source) for part, source in sources.items()}
    train = sources["train"]
    names = _class_names(sources, labels, classes)
    form = _form(train, mean, std)
    splits = {part: GivenSplit(one, labels[part], np.arange(len(one)), form.side) for part, one in sources.items()}
    return Pictures(
        given_name(train),
        names,
        *in_three(type(train).__name__, names, splits),
        channels=form.channels,
        size=form.size,
        mean=form.mean,
        std=form.std,
        defaults={"epochs": 30, "batch_size": 64, "lr": 3e-3},
        augment=nn.Identity(),
    )


@dataclass(frozen=True, repr=False)
class GivenSplit(Brief):
    """Some of the items of a data set."""

    source: Any
    all_labels: np.ndarray  # of the whole data set
    chosen: np.ndarray
    side: float  # the median of the pictures' shorter sides
    workers: int = 0  # whether it can be sent to a process is not known, nor what an item costs

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def labels(self) -> np.ndarray:
        return self.all_labels[self.chosen]

    def divide(self, share: float) -> tuple[GivenSplit, GivenSplit]:
        larger, smaller = stratified(self.labels, share)
        return replace(self, chosen=self.chosen[larger]), replace(self, chosen=self.chosen[smaller])

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=generator, device=generator.device)

    def median_side(self) -> float | None:
        return self.side

    def dataset(self, view: View, training: bool, seed: int = 0, max_broken: int = MAX_BROKEN) -> PictureDataset:
        return _GivenDataset(self, view, training, seed)


class _GivenDataset(PictureDataset):
    """Items as a network takes them. One that cannot be read is an error: it is its user's code that says what is one.

    All processes that load for this object share the digests of those that were read.
    """

    def __init__(self, split: GivenSplit, view: View, training: bool, seed: int) -> None:
        self.split, self.view, self.training, self.seed = split, view, training, seed
        self.read = torch.zeros(len(split), dtype=torch.int64, device="cpu").share_memory_()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        if item < 0:
            shape = (self.view.channels, self.view.size, self.view.size)
            return torch.zeros(shape, dtype=torch.float32, device="cpu"), IGNORED
        if self.training:
            seed_all(self.seed, item)
        index = item % len(self)
        place = int(self.split.chosen[index])
        picture, label = read_item(self.split.source, place)
        known = int(self.split.all_labels[place])
        if label != known:
            raise DataError(
                f"a label must stay what it is; that of {_called(self.split.source, place)} is {label}, and was {known} "
                "before (in its .targets, where there are some)"
            )
        image, number = self._seen(picture, place)
        if not self.read[index]:
            self.read[index] = number
        return image, label

    def _seen(self, picture: Any, place: int) -> tuple[Tensor, int]:
        """A picture as the network takes it, and its digest."""
        if _is_seen(picture):
            shape = (self.view.channels, self.view.size, self.view.size)
            if picture.shape != shape:
                raise DataError(
                    f"floating point tensors are what the network takes, {shape} here; {_called(self.split.source, place)} "
                    f"is {tuple(picture.shape)}"
                )
            return picture.detach().float(), _digest_of_seen(picture, self.view)
        opened = _opened(self.split.source, place, picture, self.view)
        return self._fit(opened), digest(opened)

    @cached_property
    def _fit(self) -> Any:
        return fitting(self.view.data_config())

    @property
    def known(self) -> Tensor:
        return self.read

    def digests(self, indices: Tensor | None = None) -> Tensor:
        chosen = torch.arange(len(self), device="cpu") if indices is None else indices
        for index in chosen[self.read[chosen] == 0].tolist():
            self[index]
        return self.read[chosen]


def read_item(source: Any, index: int) -> tuple[Any, int]:
    """The picture and the label of an item.

    Raises:
        DataError: the data's own code raises something, or there is no such pair.
    """
    try:
        item = source[index]
    except Exception as error:  # whatever it raises
        reason = " ".join((str(error) or type(error).__name__).split())
        raise DataError(f"cannot read {_called(source, index)}: {type(error).__name__}: {reason:.200}") from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise DataError(
            f"an item of the data must be a pair of a picture and its label; {_called(source, index)} is "
            f"{_told(item)}; TensorDataset(pictures, labels) makes pairs of two tensors"
        )
    try:
        return item[0], operator.index(item[1])
    except TypeError as error:
        raise DataError(
            f"a label must be a whole number; that of {_called(source, index)} is {item[1]!r:.100} of type "
            f"{type(item[1]).__name__}"
        ) from error


def check_sendable(pictures: Pictures) -> None:
    """See that processes that load pictures can be given the data, where they do not begin as copies of this one.

    Raises:
        OptionError: it cannot be pickled.
    """
    if torch.multiprocessing.get_start_method() == "fork":
        return
    for split in (pictures.train, pictures.validation):
        try:
            pickle.Pickler(_Nowhere()).dump(split)
        except Exception as error:  # of what is in it
            reason = " ".join((str(error) or type(error).__name__).split())
            raise OptionError(
                f"workers need data that can be pickled, and {pictures.name.removeprefix(GIVEN)} cannot: {reason:.200}; "
                "take workers=0, or functions and classes with a name in a module"
            ) from error


class _Nowhere(io.RawIOBase):
    """Takes all and keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


# ------------------------------------------------------------------------------------------------ what the data says


def _sources(data: Any) -> dict[str, Any]:
    if isinstance(data, tuple):
        parts = ("train", "test") if len(data) == 2 else PARTS[: len(data)]
        if not 1 <= len(data) <= len(PARTS):
            raise DtypeError(f"a tuple of splits is (train, test) or (train, val, test); received {len(data)} of them")
        data = dict(zip(parts, data, strict=True))
    if isinstance(data, Mapping):
        named = {str(name): one for name, one in data.items()}
        spelled = parts_among(named, "the data")
        if len(spelled) < len(named) or not spelled:
            raise DataError(f"the splits of the data are named train, val and test; received {', '.join(named)}")
        data = {part: named[name] for part, name in spelled.items()}
    else:
        data = {"train": data}
    for source in data.values():
        _check_source(source)
    return data


def _check_source(source: Any) -> None:
    if isinstance(source, DataLoader):
        raise DtypeError(
            "the data is a Dataset, which is dealt out in batches here; received a DataLoader: give its .dataset"
        )
    if isinstance(source, IterableDataset) or not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        raise DtypeError(
            "the data must be a name, a Dataset with a length and an item for each number, or several such splits; received "
            f"{type(source).__name__}, which has no {'numbers' if hasattr(source, '__len__') else 'length'}"
        )
    try:
        count = len(source)
    except Exception as error:
        raise DtypeError(f"the data must have a length; that of {type(source).__name__} raises: {error}") from error
    if not count:
        raise DataError(f"the data must have items; {type(source).__name__} is empty")


def _labels(source: Any) -> np.ndarray:
    """Of all items: those that the data set notes, as torchvision's do, else each is read once."""
    noted = _noted(source, "targets")
    try:
        labels = np.asarray([operator.index(one) for one in noted]) if len(noted) == len(source) else None
    except TypeError:
        labels = None
    if labels is None:
        with telling(f"reading the labels of {len(source)} items of {type(source).__name__}"):
            labels = np.asarray([read_item(source, index)[1] for index in range(len(source))])
    if labels.min() < 0:
        index = int(labels.argmin())
        raise DataError(f"labels count from 0; that of {_called(source, index)} is {labels[index]}")
    return labels.astype(np.int64)


def _noted(source: Any, name: str) -> Any:
    """An attribute of a data set, or that of the one that it is a part of."""
    if isinstance(source, Subset):
        whole = _noted(source.dataset, name)
        return whole if name != "targets" or whole is None else [whole[index] for index in source.indices]
    return getattr(source, name, None)


def _class_names(
    sources: Mapping[str, Any], labels: Mapping[str, np.ndarray], given: Sequence[str] | None
) -> tuple[str, ...]:
    noted = {part: _texts(_noted(source, "classes")) for part, source in sources.items()}
    other = [part for part, names in noted.items() if names not in (None, noted["train"])]
    if given is None and other:
        raise DataError(
            f"all splits must have the classes of train, {', '.join(noted['train'] or ('none',))}; {other[0]} has "
            f"{', '.join(noted[other[0]] or ())}: give classes="
        )
    count = 1 + max(int(one.max()) for one in labels.values())
    names = noted["train"] if given is None else _texts(given)
    if given is not None and names is None:
        raise OptionError(f"classes must be texts, one for each label; received {given!r:.100}")
    names = tuple(map(str, range(count))) if names is None else names
    if len(names) < count:
        raise OptionError(
            f"there must be a class for each label, 0 to {count - 1}; received {len(names)}: {', '.join(names)}"
        )
    return names


def _texts(names: Any) -> tuple[str, ...] | None:
    is_list = isinstance(names, (list, tuple)) and len(names) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else None


# --------------------------------------------------------------------------------------------- what the pictures are


@dataclass(frozen=True)
class _Form:
    """What the pictures look like; a ``size`` of None is any."""

    channels: int
    size: int | None
    side: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _form(source: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> _Form:
    """By a sample from all over the data."""
    places = np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).round().astype(int)).tolist()
    seed_all(SAMPLE_SEED)  # the same at every call, where the data draws at random
    sample = {place: read_item(source, place)[0] for place in places}
    if (mean is None) != (std is None):
        raise OptionError("mean and std belong together: give both or none")
    if any(map(_is_seen, sample.values())):
        return _form_of_seen(source, sample, mean, std)
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    view = View(3, 1, (0.0,) * 3, (1.0,) * 3)
    sizes = [_opened(source, place, picture, view).size for place, picture in sample.items()]
    channels = 1 if all(map(_is_grey, sample.values())) else 3
    usual = [IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]
    mean, std = (
        _per_channel(name, values, [sum(known) / 3] if channels == 1 else known, channels)
        for name, values, known in zip(("mean", "std"), (mean, std), usual, strict=True)
    )
    (width, height), side = sizes[0], float(np.median([min(size) for size in sizes]))
    size = width if width == height and len(set(sizes)) == 1 else None
    return _Form(channels, size, side, mean, std)


def _form_of_seen(
    source: Any, sample: Mapping[int, Any], mean: Sequence[float] | None, std: Sequence[float] | None
) -> _Form:
    first = next(picture for picture in sample.values() if _is_seen(picture))
    channels, size = first.shape[0] if first.ndim else 0, first.shape[-1] if first.ndim else 0
    for place, picture in sample.items():
        if not _is_seen(picture) or picture.shape != first.shape or picture.shape != (channels, size, size):
            raise DataError(
                "floating point tensors must all be of one shape (C, S, S), as the network takes them; "
                f"{_called(source, place)} is {_told(picture)}"
            )
        low, high = picture.min().item(), picture.max().item()
        if mean is None and not (low >= 0 and high <= 1):
            raise OptionError(
                f"tensors that are not between 0 and 1 need mean= and std=, which made them of the pictures; "
                f"{_called(source, place)} holds {low:.3g} to {high:.3g}"
            )
    mean, std = (
        _per_channel(name, values, [usual] * channels, channels)
        for name, values, usual in (("mean", mean, 0.0), ("std", std, 1.0))
    )
    return _Form(channels, size, float(size), mean, std)


def _per_channel(name: str, given: Sequence[float] | None, usual: Sequence[float], channels: int) -> tuple[float, ...]:
    try:
        values = tuple(map(float, usual if given is None else given))
    except TypeError as error:
        raise OptionError(f"{name} must be a list of numbers, one per channel; received {given!r:.100}") from error
    if len(values) != channels or not all(map(np.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise OptionError(
            f"{name} must be {channels} finite number{'s' * (channels > 1)}{', above 0' * (name == 'std')}, one per "
            f"channel; received {values}"
        )
    return values


def _is_seen(picture: Any) -> bool:
    """Whether it is what the network takes already."""
    return isinstance(picture, Tensor) and picture.is_floating_point()


def _is_grey(picture: Any) -> bool:
    source = as_source(picture)
    if isinstance(source, np.ndarray):
        return source.ndim == 2 or source.shape[-1] in (1, 2)
    mode = getattr(source, "mode", "RGB")
    return mode in GREY or mode.startswith("I;16")


def _opened(source: Any, place: int, picture: Any, view: View) -> Any:
    """A picture of Pillow's in the network's channels; colours are not lost without a word."""
    if view.channels == 1 and not _is_grey(picture):
        raise DataError(f"all pictures must be grey where the others are; {_called(source, place)} has colours")
    try:
        return open_picture(as_source(picture), view.channels, view.background)
    except (OSError, NearsightError) as error:
        raise DataError(f"{_called(source, place)} is no picture that can be read: {error}") from error


def _digest_of_seen(image: Tensor, view: View) -> int:
    """As that of the picture in eight bits that it was made of, where it was only normalised."""
    mean, std = (torch.tensor(values, device="cpu").view(-1, 1, 1) for values in (view.mean, view.std))
    cells = ((image.detach().cpu().float() * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
    height, width, channels = cells.shape
    mode = {1: "L", 3: "RGB"}.get(channels, f"{channels} channels")
    return digest_of_cells(mode, width, height, cells.contiguous().numpy().tobytes())


def _called(source: Any, index: int) -> str:
    return f"item {index} of {type(source).__name__}"


def _told(thing: Any) -> str:
    if isinstance(thing, Tensor):
        return f"a tensor {tuple(thing.shape)} of {thing.dtype}"
    return f"of type {type(thing).__name__}" + (f" with {len(thing)} parts" if isinstance(thing, (tuple, list)) else "")
