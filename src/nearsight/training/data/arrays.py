# SPDX-License-Identifier: Apache-2.0
"""Pictures that fit in memory: digits, the MNIST family and the CIFARs, and how whole batches of them are augmented."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import DataError
from ...extras import need
from ...files import open_regular
from ...pages.brief import Brief
from ...saved.view import View
from .pictures import (
    IGNORED,
    MAX_BROKEN,
    TEST_SHARE,
    VALIDATION_SHARE,
    Changes,
    PictureDataset,
    Pictures,
    digest,
    stratified,
)

DIGITS = tuple(str(digit) for digit in range(10))
TURN_SEED = 0  # of rotated data: whatever the seed of the run, the pictures are the same
LARGEST_IDX = 1 << 31  # bytes; EMNIST, the largest of the family, has a quarter of them
USUAL_PLACES = ("data", "~/.cache/nearsight", "/usr/share/datasets", "/usr/share")


@dataclass(frozen=True, repr=False)
class ArraySplit(Brief):
    """Pictures held in memory: uint8 (n, C, H, W) and their labels."""

    images: Tensor
    labels: Tensor
    workers: int = 0  # slicing a tensor is quicker than handing it over from another process

    def __len__(self) -> int:
        return len(self.labels)

    def order(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(len(self), generator=generator, device=generator.device)

    def median_side(self) -> float:
        return min(self.images.shape[-2:])

    def dataset(self, view: View, training: bool, seed: int = 0, max_broken: int = MAX_BROKEN) -> PictureDataset:
        return _ArrayDataset(self.images, self.labels, view)


class _ArrayDataset(PictureDataset):
    """A batch at a time: for small pictures the loop over single ones would cost more than the network."""

    def __init__(self, images: Tensor, labels: Tensor, view: View) -> None:
        self.images, self.labels, self.view = images, labels, view
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
            for values in (view.mean, view.std)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        items = torch.as_tensor(indices, device=self.images.device)
        batch = items % len(self)
        images = _fit(self.images[batch].float() / 255, self.view)
        return (images - self.mean) / self.std, self.labels[batch].where(items >= 0, IGNORED)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    @cached_property
    def known(self) -> Tensor:
        from PIL import Image

        mode = "L" if self.view.channels == 1 else "RGB"
        pixels = self.images.permute(0, 2, 3, 1).squeeze(3).numpy()
        return torch.tensor([digest(Image.fromarray(one).convert(mode)) for one in pixels], device="cpu")

    def digests(self, indices: Tensor | None = None) -> Tensor:
        return self.known if indices is None else self.known[indices]


def _fit(images: Tensor, view: View) -> Tensor:
    """Bring pictures of another data set to the channels and the size that the model knows, in its way."""
    from torchvision.transforms.functional import center_crop, rgb_to_grayscale

    if images.shape[1] != view.channels:
        images = rgb_to_grayscale(images) if view.channels == 1 else images.expand(-1, view.channels, -1, -1)
    side = math.floor(view.size / view.crop_pct)
    if images.shape[-2:] != (side, side):
        mode = "bicubic" if view.interpolation == "bicubic" else "bilinear"  # no others are smooth for tensors
        images = F.interpolate(images, size=(side, side), mode=mode, antialias=True).clamp(0, 1)
    return images if side == view.size else center_crop(images, [view.size, view.size])


class RandomAffine(nn.Module):
    """Shift, turn, scale and mirror every picture of a batch on its own, in one resampling.

    The edge is repeated outwards, so a black margin stays black.

    Args:
        shift: largest shift, in pixels of pictures that are ``side`` wide.
        degrees: largest turn.
        scale: largest relative change of size.
        mirror: whether half of the pictures are mirrored.
        side: None counts the shift in pixels of the pictures that come.
        crop: least share of the area that is cut out and enlarged, of sides up to 4 to 3; 1 cuts nothing out.
    """

    def __init__(
        self,
        shift: float,
        degrees: float = 0.0,
        scale: float = 0.0,
        mirror: bool = False,
        side: int | None = None,
        crop: float = 1.0,
    ) -> None:
        super().__init__()
        self.shift, self.degrees, self.scale, self.mirror, self.side = shift, degrees, scale, mirror, side
        self.crop = crop

    def but(self, mirror: bool | None, crop: float | None) -> RandomAffine:
        """The same with what is not None."""
        mirror, crop = self.mirror if mirror is None else mirror, self.crop if crop is None else crop
        return RandomAffine(self.shift, self.degrees, self.scale, mirror, self.side, crop)

    def told(self) -> str:
        """In a few words."""
        parts = (
            (self.shift, f"shifts by up to {self.shift:g} pixels"),
            (self.degrees, f"turns by up to {self.degrees:g} degrees"),
            (self.scale, f"scales by up to {100 * self.scale:g} %"),
        )
        return ", ".join([said for on, said in parts if on] + [Changes(self.crop, self.mirror).told()])

    def forward(self, images: Tensor, rows: Tensor | None = None, total: int | None = None) -> Tensor:
        """Change ``images`` as the ``rows`` of a batch of ``total`` would be, however that is dealt out; (B, C, H, W)."""
        n, device = total or len(images), images.device
        angle = _uniform(n, math.radians(self.degrees), device)
        size = 1 + _uniform(n, self.scale, device)
        flip = 1 - 2 * torch.randint(0, 2, (n,), device=device) if self.mirror else 1
        height, width = images.shape[-2:]
        right = _uniform(n, 2 * self.shift / (self.side or width), device)  # affine_grid's coordinates run from -1 to 1
        down = _uniform(n, 2 * self.shift / (self.side or height), device)
        cos, sin = size * angle.cos(), size * angle.sin()
        matrices = torch.stack([torch.stack([flip * cos, -sin, right]), torch.stack([flip * sin, cos, down])])
        if self.crop < 1:
            matrices = _cropped(matrices, self.crop)
        matrices = matrices.permute(2, 0, 1)
        if rows is not None:
            matrices = matrices[rows]
        wide = torch.promote_types(
            images.dtype, torch.float32
        )  # half precision has too few places for the pixels of a row
        grid = F.affine_grid(matrices.to(wide), list(images.shape), align_corners=False)
        changed = F.grid_sample(images.to(wide), grid, mode="bilinear", padding_mode="border", align_corners=False)
        return changed.to(images.dtype)


def _cropped(matrices: Tensor, least: float) -> Tensor:
    """To all of each picture from a random rectangle in it, and then by ``matrices``; (2, 3, n)."""
    n, device = matrices.shape[2], matrices.device
    area = 1 - (1 - least) * torch.rand(n, dtype=torch.float32, device=device)
    ratio = _uniform(n, math.log(4 / 3), device).exp().clamp(area, 1 / area)  # no side is longer than the picture's
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()])
    place = (1 - sides) * torch.stack([_uniform(n, 1, device), _uniform(n, 1, device)])
    moved = (matrices[:, :2] * place).sum(1) + matrices[:, 2]
    return torch.cat([matrices[:, :2] * sides, moved[:, None]], 1)


def _uniform(n: int, bound: float, device: torch.device) -> Tensor:
    return (2 * torch.rand(n, dtype=torch.float32, device=device) - 1) * bound


def _digits(name: str, root: str | None, download: bool) -> Pictures:
    need(("sklearn",), "digits", "explore")
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rest, test = stratified(bunch.target, TEST_SHARE)
    return _in_memory(
        name,
        classes=DIGITS,
        rest=(images[rest], bunch.target[rest]),
        test=(images[test], bunch.target[test]),
        mean=(0.305,),
        std=(0.376,),
        defaults={"epochs": 30, "batch_size": 64, "lr": 1e-2},
        augment=RandomAffine(shift=0.25, degrees=10, scale=0.1, side=8),
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
    turned: bool = False,
    **defaults: Any,
) -> Pictures:
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    if download:
        import torchvision

        _fetch(getattr(torchvision.datasets, folder), root)
    files_of = name.removeprefix("rotated-")
    inside = ("", files_of, f"dataset-{files_of}", f"{folder}/raw")
    where = _find(files_of, root, inside, lambda path: _idx_file(path, files[0]))
    arrays = [_read_idx(where, file) for file in files]
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise DataError(f"the files in {where} do not match: {images.shape} images, {labels.shape} labels")
        if labels.size and labels.max() >= len(classes):
            raise DataError(
                f"the labels in {where} must be 0 to {len(classes) - 1}; received {labels.max()}: the file is damaged, "
                "fetch it anew"
            )
    if turned:
        arrays[0], arrays[2] = _turned(arrays[0]), _turned(arrays[2])
    return _in_memory(
        name,
        classes=classes,
        rest=(arrays[0], arrays[1]),
        test=(arrays[2], arrays[3]),
        mean=mean,
        std=std,
        defaults={"epochs": 20, "batch_size": 128, "lr": 3e-3, **defaults},
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
    except Exception as error:  # of a cut or damaged pickle, if its sum is not known, as many kinds as there are bytes
        raise DataError(f"the files of {name} in {where / folder} are damaged: fetch them anew") from error
    return _in_memory(
        name,
        classes=tuple(rest.classes),
        rest=(rest.data, np.asarray(rest.targets)),
        test=(test.data, np.asarray(test.targets)),
        mean=mean,
        std=std,
        defaults={"epochs": 60, "batch_size": 128, "lr": 3e-3},
        augment=RandomAffine(shift=4, mirror=True, side=32),
    )


def _turned(images: np.ndarray) -> np.ndarray:
    """Every picture turned once, by an angle of its own out of the whole circle; always the same angles."""
    turn = RandomAffine(shift=0, degrees=180)
    with torch.random.fork_rng():
        torch.manual_seed(TURN_SEED)
        return turn(torch.from_numpy(images)[:, None].float()).round().byte()[:, 0].numpy()


SOURCES: dict[str, Callable[[str, str | None, bool], Pictures]] = {
    "digits": _digits,
    "mnist": partial(
        _mnist,
        folder="MNIST",
        classes=DIGITS,
        mean=(0.1307,),
        std=(0.3081,),
        augment=RandomAffine(shift=2, degrees=10, scale=0.1, side=28),
    ),
    "fashion-mnist": partial(
        _mnist,
        folder="FashionMNIST",
        classes=GARMENTS,
        mean=(0.2860,),
        std=(0.3530,),
        augment=RandomAffine(shift=2, mirror=True, side=28),
        lr=1.5e-3,
        random_erasing=0.25,
    ),
    "rotated-fashion-mnist": partial(
        _mnist,
        folder="FashionMNIST",
        classes=GARMENTS,
        mean=(0.2860,),
        std=(0.3530,),
        augment=RandomAffine(shift=2, degrees=180, mirror=True, side=28),
        turned=True,
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
    train, validation = stratified(rest[1], VALIDATION_SHARE)
    parts = [(rest[0][train], rest[1][train]), (rest[0][validation], rest[1][validation]), test]
    first, second, third = (_array_split(images, labels) for images, labels in parts)
    channels, size = first.images.shape[1:3]
    return Pictures(name, classes, first, second, third, channels, size, mean, std, defaults, augment)


def _array_split(images: np.ndarray, labels: np.ndarray) -> ArraySplit:
    tensor = torch.from_numpy(images)
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return ArraySplit(tensor.contiguous(), torch.from_numpy(labels).long())


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
        with open_regular(path) as packed, gzip.GzipFile(fileobj=packed) if path.suffix == ".gz" else packed as stream:
            head = stream.read(4)
            if head[:3] != b"\0\0\x08" or len(head) < 4:
                raise ValueError("it does not begin as an IDX file of bytes")
            shape = np.frombuffer(stream.read(4 * head[3]), ">i4", count=head[3])
            size = math.prod(shape.tolist())
            if not 0 <= size <= LARGEST_IDX:
                raise ValueError(f"it claims to hold {size} bytes")
            content = stream.read(size + 1)  # no more, whatever a packed file unfolds to; one more finds its checksum
            if len(content) != size:
                raise ValueError(f"it does not hold the {size} bytes that it claims to")
            return np.frombuffer(content, np.uint8).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; is the file whole? Fetch it anew") from error
