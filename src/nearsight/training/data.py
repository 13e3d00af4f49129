# SPDX-License-Identifier: Apache-2.0
"""Pictures by name: digits, mnist, fashion-mnist, cifar10, cifar100 and folder:PATH, each split in three.

The splits are fixed, whatever the seed of the run, so that runs can be compared:

    digits        scikit-learn's 1797 handwritten digits, 8x8: 20 % test, stratified; 10 % of the rest validation
    mnist ...     the official test set; 10 % of the official training set, stratified, is validation
    folder:PATH   PATH/train with PATH/val and/or PATH/test, one folder per class inside; or the class folders
                  straight in PATH, split as digits are

Nothing is ever chosen by its result on the test split.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError, OptionError

SPLIT_SEED = 0
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
DIGITS = tuple(str(digit) for digit in range(10))
USUAL_PLACES = ("data", "~/.cache/nearsight", "/usr/share/datasets", "/usr/share")


@dataclass(frozen=True)
class View:
    """How a model sees pictures: channels, size and normalisation."""

    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Split(Protocol):
    """One of the three parts of a data set."""

    @property
    def workers(self) -> int:
        """Processes that it is worth loading with."""
        ...

    def __len__(self) -> int: ...

    def seen(self, view: View, training: bool) -> Dataset:
        """The pictures as a model with that view wants them: pairs of float32 (C, H, W) and label."""
        ...


@dataclass(frozen=True)
class Pictures:
    """A data set: its splits, what they look like, and the settings found best for training on it."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    channels: int
    size: int | None  # None: whatever the model asks for
    mean: tuple[float, ...]
    std: tuple[float, ...]
    defaults: dict[str, Any]
    augment: nn.Module = field(default_factory=nn.Identity)

    def view(self, size: int) -> View:
        """How a model for these pictures sees them."""
        return View(self.channels, self.size or size, self.mean, self.std)


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
    if name.startswith("folder:"):
        return _folder(name, Path(name.removeprefix("folder:")).expanduser())
    if name not in SOURCES:
        raise OptionError(f"data must be one of {', '.join(SOURCES)} or folder:PATH; received {name!r}")
    return SOURCES[name](name, root, download)


def loader(
    data: Dataset, batch_size: int, workers: int, sampler: Sampler | None = None, drop_last: bool = False
) -> DataLoader:
    """Batches of a prepared split, in order or in the sampler's."""
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=_as_is if isinstance(data, _SeenArrays) else None,
        persistent_workers=workers > 0,
    )


def _as_is(batch: Any) -> Any:
    return batch


# ---------------------------------------------------------------------------------------------- pictures in memory


@dataclass(frozen=True)
class ArraySplit:
    """Pictures held in memory: uint8 (n, C, H, W) and their labels."""

    images: Tensor
    labels: Tensor
    workers: int = 0  # slicing a tensor is quicker than handing it over from another process

    def __len__(self) -> int:
        return len(self.labels)

    def seen(self, view: View, training: bool) -> Dataset:
        return _SeenArrays(self.images, self.labels, view)


class _SeenArrays(Dataset):
    """A batch at a time: for small pictures the loop over single ones would cost more than the network."""

    def __init__(self, images: Tensor, labels: Tensor, view: View) -> None:
        self.images, self.labels, self.view = images, labels, view
        self.mean = torch.tensor(view.mean).view(-1, 1, 1)
        self.std = torch.tensor(view.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        batch = torch.as_tensor(indices)
        images = _fit(self.images[batch].float() / 255, self.view)
        return (images - self.mean) / self.std, self.labels[batch]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


def _fit(images: Tensor, view: View) -> Tensor:
    """Bring pictures of another data set to the channels and the size that the model knows."""
    from torchvision.transforms.functional import rgb_to_grayscale

    if images.shape[1] != view.channels:
        images = rgb_to_grayscale(images) if view.channels == 1 else images.expand(-1, view.channels, -1, -1)
    if images.shape[-2:] != (view.size, view.size):
        images = F.interpolate(images, size=(view.size, view.size), mode="bilinear", antialias=True)
    return images


class RandomAffine(nn.Module):
    """Shift, turn, scale and mirror every picture of a batch on its own, in one resampling.

    The edge is repeated outwards, so a black margin stays black.

    Args:
        shift: largest shift, in pixels.
        degrees: largest turn.
        scale: largest relative change of size.
        mirror: whether half of the pictures are mirrored.
    """

    def __init__(self, shift: float, degrees: float = 0.0, scale: float = 0.0, mirror: bool = False) -> None:
        super().__init__()
        self.shift, self.degrees, self.scale, self.mirror = shift, degrees, scale, mirror

    def forward(self, images: Tensor) -> Tensor:
        n, device = len(images), images.device
        angle = _uniform(n, math.radians(self.degrees), device)
        size = 1 + _uniform(n, self.scale, device)
        flip = 1 - 2 * torch.randint(0, 2, (n,), device=device) if self.mirror else torch.ones(n, device=device)
        height, width = images.shape[-2:]
        right = _uniform(n, 2 * self.shift / width, device)  # affine_grid's coordinates run from -1 to 1
        down = _uniform(n, 2 * self.shift / height, device)
        cos, sin = size * angle.cos(), size * angle.sin()
        rows = torch.stack([torch.stack([flip * cos, -sin, right]), torch.stack([flip * sin, cos, down])])
        grid = F.affine_grid(rows.permute(2, 0, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _uniform(n: int, bound: float, device: torch.device) -> Tensor:
    return (2 * torch.rand(n, device=device) - 1) * bound


# ------------------------------------------------------------------------------------------------ the named ones


def _digits(name: str, root: str | None, download: bool) -> Pictures:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rest, test = _stratified(bunch.target, TEST_SHARE)
    return _in_memory(
        name,
        classes=DIGITS,
        rest=(images[rest], bunch.target[rest]),
        test=(images[test], bunch.target[test]),
        mean=(0.305,),
        std=(0.376,),
        defaults={"epochs": 30, "batch_size": 64, "lr": 1e-2},
        augment=RandomAffine(shift=0.25, degrees=10, scale=0.1),
    )


GARMENTS = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def _mnist(
    name: str,
    root: str | None,
    download: bool,
    *,
    folder: str,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    augment: nn.Module,
) -> Pictures:
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    if download:
        import torchvision

        _fetch(getattr(torchvision.datasets, folder), root)
    where = _find(name, root, ("", name, f"dataset-{name}", f"{folder}/raw"), lambda path: _idx_file(path, files[0]))
    arrays = [_read_idx(where, file) for file in files]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"the files in {where} do not match: {images.shape} images, {labels.shape} labels")
    return _in_memory(
        name,
        classes=classes,
        rest=(arrays[0], arrays[1]),
        test=(arrays[2], arrays[3]),
        mean=mean,
        std=std,
        defaults={"epochs": 20, "batch_size": 128, "lr": 3e-3},
        augment=augment,
    )


def _cifar(
    name: str,
    root: str | None,
    download: bool,
    *,
    dataset: str,
    folder: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Pictures:
    import torchvision

    kind = getattr(torchvision.datasets, dataset)
    if download:
        _fetch(kind, root)
    where = _find(name, root, ("", name), lambda path: (path / folder).is_dir())
    try:  # torchvision checks the files' sums before it unpickles them
        rest, test = kind(where, train=True), kind(where, train=False)
    except RuntimeError as error:
        raise DataError(f"the files of {name} in {where / folder} are damaged: fetch them anew") from error
    return _in_memory(
        name,
        classes=tuple(rest.classes),
        rest=(rest.data, np.asarray(rest.targets)),
        test=(test.data, np.asarray(test.targets)),
        mean=mean,
        std=std,
        defaults={"epochs": 60, "batch_size": 128, "lr": 3e-3},
        augment=RandomAffine(shift=4, mirror=True),
    )


SOURCES: dict[str, Callable[[str, str | None, bool], Pictures]] = {
    "digits": _digits,
    "mnist": partial(
        _mnist,
        folder="MNIST",
        classes=DIGITS,
        mean=(0.1307,),
        std=(0.3081,),
        augment=RandomAffine(shift=2, degrees=10, scale=0.1),
    ),
    "fashion-mnist": partial(
        _mnist,
        folder="FashionMNIST",
        classes=GARMENTS,
        mean=(0.2860,),
        std=(0.3530,),
        augment=RandomAffine(shift=2, mirror=True),
    ),
    "cifar10": partial(
        _cifar,
        dataset="CIFAR10",
        folder="cifar-10-batches-py",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": partial(
        _cifar,
        dataset="CIFAR100",
        folder="cifar-100-python",
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def _in_memory(
    name: str,
    *,
    classes: tuple[str, ...],
    rest: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    defaults: dict[str, Any],
    augment: nn.Module,
) -> Pictures:
    train, validation = _stratified(rest[1], VALIDATION_SHARE)
    parts = [(rest[0][train], rest[1][train]), (rest[0][validation], rest[1][validation]), test]
    first, second, third = (_array_split(images, labels) for images, labels in parts)
    channels, size = first.images.shape[1:3]
    return Pictures(name, classes, first, second, third, channels, size, mean, std, defaults, augment)


def _array_split(images: np.ndarray, labels: np.ndarray) -> ArraySplit:
    tensor = torch.from_numpy(images)
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return ArraySplit(tensor.contiguous(), torch.from_numpy(labels).long())


def _stratified(labels: Sequence[int] | np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the larger and of the smaller part, every class in proportion; the same at every call."""
    from sklearn.model_selection import train_test_split

    try:
        larger, smaller = train_test_split(
            np.arange(len(labels)), test_size=share, stratify=labels, random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise DataError(f"too few images to split {share:.0%} off every class: {error}") from error
    return np.sort(larger), np.sort(smaller)


def _find(name: str, root: str | None, inside: Sequence[str], holds: Callable[[Path], object]) -> Path:
    """The first folder that holds the data: under ``root`` when given, else under the usual places."""
    places = [root] if root is not None else USUAL_PLACES
    candidates = [Path(place).expanduser() / folder for place in places for folder in inside]
    for path in candidates:
        if holds(path):
            return path
    raise DataError(
        f"{name} is not in {', '.join(str(place) for place in places)}: name its folder with --data-root, or fetch it "
        f"with --download{' (or apt-get install dataset-fashion-mnist)' if name == 'fashion-mnist' else ''}"
    )


def _fetch(kind: Any, root: str | None) -> None:
    folder = Path(root or "~/.cache/nearsight").expanduser()
    try:
        kind(folder, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot download {kind.__name__} to {folder}: {error}") from error


def _idx_file(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)


def _read_idx(folder: Path, file: str) -> np.ndarray:
    """MNIST's file format: two zero bytes, a type (8: uint8), the rank, the sizes as big-endian int32, the data."""
    path = _idx_file(folder, file)
    if path is None:
        raise DataError(f"{folder} lacks {file} (or {file}.gz)")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not begin as an IDX file of bytes")
        rank = content[3]
        shape = np.frombuffer(content, ">i4", count=rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; is the file whole?") from error


# ---------------------------------------------------------------------------------------------- pictures in files


@dataclass(frozen=True)
class FileSplit:
    """Pictures in files, decoded when they are needed by processes of their own."""

    samples: Sequence[tuple[str, int]]
    workers: int = min(8, os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self.samples)

    def seen(self, view: View, training: bool) -> Dataset:
        from timm.data.transforms_factory import create_transform

        transform = create_transform(
            (view.channels, view.size, view.size),
            is_training=training,
            mean=view.mean,
            std=view.std,
            interpolation="bilinear",
            crop_pct=1.0,
            color_jitter=0.0 if view.channels == 1 else 0.4,
        )
        return _SeenFiles(self.samples, transform, "L" if view.channels == 1 else "RGB")


class _SeenFiles(Dataset):
    def __init__(self, samples: Sequence[tuple[str, int]], transform: Any, mode: str) -> None:
        self.samples, self.transform, self.mode = samples, transform, mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(_open_image(path, self.mode)), label


def _open_image(path: str, mode: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error}; mend or remove it") from error


def _folder(name: str, path: Path) -> Pictures:
    if not path.is_dir():
        raise DataError(f"there is no folder {path}; folder:PATH needs one with a folder of images per class")
    apart = {part: path / part for part in ("train", "val", "test") if (path / part).is_dir()}
    if "train" in apart:
        classes, train = _samples(apart["train"])
        others = {part: _samples(folder, classes)[1] for part, folder in apart.items() if part != "train"}
        if not others:
            raise DataError(f"{path} has a folder train, but neither val nor test beside it")
    else:
        classes, everything = _samples(path)
        train, test = _divide(everything, TEST_SHARE)
        others = {"test": test}
    if len(others) == 2:
        validation, test = others["val"], others["test"]
    else:  # a lone val is taken as the test set, as is usual for ImageNet
        (test,) = others.values()
        train, validation = _divide(train, VALIDATION_SHARE)
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    return Pictures(
        name,
        tuple(classes),
        *(FileSplit(samples) for samples in (train, validation, test)),
        channels=3,
        size=None,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        defaults={"epochs": 30, "batch_size": 64, "lr": 3e-3},
    )


def _samples(folder: Path, classes: list[str] | None = None) -> tuple[list[str], list[tuple[str, int]]]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} must hold one folder of images per class: {error}") from error
    if classes is not None and found.classes != classes:
        odd = sorted(set(found.classes) ^ set(classes))
        raise DataError(f"{folder} must hold the classes that train holds; these are in one only: {', '.join(odd)}")
    return found.classes, found.samples


def _divide(samples: list[tuple[str, int]], share: float) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    larger, smaller = _stratified([label for _, label in samples], share)
    return [samples[index] for index in larger], [samples[index] for index in smaller]
