# SPDX-License-Identifier: Apache-2.0
"""Data by name: fixed stratified splits, the files' formats, what a model sees, and clear errors."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset

from nearsight.errors import DataError, OptionError
from nearsight.training.data import RandomAffine, View, load_pictures, loader

MNIST_FILES = {
    "train-images-idx3-ubyte": (100, 6, 5),
    "train-labels-idx1-ubyte": (100,),
    "t10k-images-idx3-ubyte": (20, 6, 5),
    "t10k-labels-idx1-ubyte": (20,),
}


def write_mnist(folder, pack=gzip.compress, suffix=".gz"):
    """A little MNIST: labels cycle through the digits, every pixel of an image equals its label."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in MNIST_FILES.items():
        labels = np.arange(shape[0], dtype=np.uint8) % 10
        values = np.broadcast_to(labels.reshape(-1, *[1] * (len(shape) - 1)), shape)
        header = struct.pack(f">BBBB{len(shape)}i", 0, 0, 8, len(shape), *shape)
        (folder / f"{name}{suffix}").write_bytes(pack(header + values.tobytes()))


def write_folder(folder, classes=("cat", "dog"), images=20):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            Image.new("RGB", (12, 10), (100 * number, index, 0)).save(folder / name / f"{index}.png")


def test_digits_are_split_in_three_disjoint_stratified_parts_the_same_each_time():
    one, two = load_pictures("digits"), load_pictures("digits")
    assert [len(part) for part in (one.train, one.validation, one.test)] == [1293, 144, 360]
    assert one.classes == tuple("0123456789")
    assert torch.equal(one.test.images, two.test.images)
    for part in (one.train, one.validation, one.test):
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert share.min() > 0.08
        assert share.max() < 0.12
    everything = torch.cat([part.images.flatten(1) for part in (one.train, one.validation, one.test)])
    assert len(everything.unique(dim=0)) == 1797  # no image is in two parts


def test_batches_are_normalised():
    pictures = load_pictures("digits")
    data = pictures.train.seen(pictures.view(8), training=True)
    images, labels = next(iter(loader(data, len(data), workers=0)))
    assert images.shape == (1293, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02
    single, label = data[7]
    assert torch.equal(single, images[7])
    assert label == labels[7]


def test_pictures_are_brought_to_the_channels_and_size_of_the_model():
    pictures = load_pictures("digits")
    coloured = pictures.test.seen(View(3, 12, (0.0,) * 3, (1.0,) * 3), training=False)
    image, _ = coloured[0]
    assert image.shape == (3, 12, 12)
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, "")])
@pytest.mark.parametrize("inside", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_idx_files_are_found_and_read(tmp_path, pack, suffix, inside):
    write_mnist(tmp_path / inside, pack, suffix)
    pictures = load_pictures("fashion-mnist", str(tmp_path))
    assert (len(pictures.train), len(pictures.validation), len(pictures.test)) == (90, 10, 20)
    assert pictures.classes[9] == "ankle boot"
    assert pictures.test.images.shape == (20, 1, 6, 5)
    assert torch.equal(pictures.test.images[:, 0, 0, 0].long(), pictures.test.labels)


def test_a_truncated_idx_file_is_named(tmp_path):
    write_mnist(tmp_path)
    broken = tmp_path / "train-images-idx3-ubyte.gz"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*train-images-idx3-ubyte\.gz: .*is the file whole"):
        load_pictures("mnist", str(tmp_path))


def test_a_lacking_idx_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        load_pictures("mnist", str(tmp_path))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_data_says_what_to_do(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} is not in {tmp_path}.*--data-root.*--download"):
        load_pictures(name, str(tmp_path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH.*'digit'"):
        load_pictures("digit")


def test_damaged_cifar_is_reported(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"cifar10 in .* are damaged"):
        load_pictures("cifar10", str(tmp_path))


def test_a_folder_of_class_folders_is_split(tmp_path):
    write_folder(tmp_path)
    pictures = load_pictures(f"folder:{tmp_path}")
    assert pictures.classes == ("cat", "dog")
    assert [len(part) for part in (pictures.train, pictures.validation, pictures.test)] == [28, 4, 8]
    image, label = pictures.test.seen(pictures.view(16), training=False)[0]
    assert image.shape == (3, 16, 16)
    assert label == 0


def test_a_folder_with_train_and_val_takes_val_as_test(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", images=5)
    pictures = load_pictures(f"folder:{tmp_path}")
    assert [len(part) for part in (pictures.train, pictures.validation, pictures.test)] == [36, 4, 10]


def test_a_folder_whose_parts_hold_other_classes_is_refused(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", classes=("cat", "fox"))
    with pytest.raises(DataError, match="in one only: dog, fox"):
        load_pictures(f"folder:{tmp_path}")


def test_a_missing_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*nowhere"):
        load_pictures(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="must hold one folder of images per class"):
        load_pictures(f"folder:{tmp_path}")


@pytest.mark.parametrize("cut", [30, 0])
def test_a_broken_image_is_named(tmp_path, cut):
    write_folder(tmp_path)
    broken = tmp_path / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:cut])
    pictures = load_pictures(f"folder:{tmp_path}")
    parts = [
        part.seen(pictures.view(16), training=False) for part in (pictures.train, pictures.validation, pictures.test)
    ]
    with pytest.raises(DataError, match=r"cannot read the image .*cat/0\.png: .*mend or remove it"):
        list(ConcatDataset(parts))


def test_random_affine_draws_anew_for_every_image_within_its_bounds():
    torch.manual_seed(0)
    dot = torch.zeros(64, 1, 17, 17)
    dot[:, 0, 8, 8] = 1
    moved = RandomAffine(shift=3)(dot)
    rows, columns = torch.meshgrid(torch.arange(17.0), torch.arange(17.0), indexing="ij")
    centres = torch.stack([(moved[:, 0] * axis).sum((1, 2)) for axis in (rows, columns)], 1) - 8
    assert centres.abs().max() <= 3.01
    assert centres.abs().max() > 2
    assert len(centres.unique(dim=0)) == 64


def test_random_affine_of_nothing_is_the_identity_and_mirrors_half():
    image = torch.rand(40, 1, 8, 8)
    torch.testing.assert_close(RandomAffine(shift=0)(image), image)
    mirrored = RandomAffine(shift=0, mirror=True)(image)
    kept = [torch.allclose(new, old, atol=1e-5) for new, old in zip(mirrored, image, strict=True)]
    turned = [torch.allclose(new, old.flip(-1), atol=1e-5) for new, old in zip(mirrored, image, strict=True)]
    assert sum(kept) + sum(turned) == 40
    assert 5 < sum(kept) < 35
