# SPDX-License-Identifier: Apache-2.0
"""Data by name: fixed stratified splits, the files' formats, what a model sees, and clear errors."""

import gzip
import io
import struct
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset
from webdataset import TarWriter

from nearsight.errors import DataError, OptionError
from nearsight.saved.view import View
from nearsight.training.data import IGNORED, RandomAffine, SplitSampler, decoded, load_pictures, loader, warn_of_broken
from nearsight.training.data.arrays import _turned
from nearsight.training.evaluate import evaluate
from nearsight.training.recipe import Recipe

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
    data = pictures.train.dataset(pictures.view(8), training=True)
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
    coloured = pictures.test.dataset(View(3, 12, (0.0,) * 3, (1.0,) * 3), training=False)
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


@pytest.fixture(scope="module")
def garments():
    """Fashion-MNIST upright and turned: 140,000 pictures, which take a second to read and two to turn."""
    before = torch.random.get_rng_state()
    found = load_pictures("fashion-mnist"), load_pictures("rotated-fashion-mnist")
    assert torch.equal(torch.random.get_rng_state(), before)
    return found


def test_fashion_mnist_has_a_recipe_of_its_own(garments):
    upright, turned = (pictures.defaults for pictures in garments)
    assert upright == {"epochs": 20, "batch_size": 128, "lr": 0.0015, "random_erasing": 0.25}
    assert turned == {"epochs": 20, "batch_size": 128, "lr": 0.003}
    filled = Recipe(data="fashion-mnist", lr=0.01).filled(upright)
    assert (filled.lr, filled.random_erasing) == (0.01, 0.25)


def test_rotated_pictures_are_the_same_ones_turned_once(garments):
    """Angles out of the whole circle, the same at every call, and nothing but the middle of a picture is kept in place."""
    upright, turned = garments
    assert np.array_equal(turned.test.images[:, 0], _turned(upright.test.images[:, 0].numpy()))
    assert torch.equal(turned.test.labels, upright.test.labels)
    rows, columns = torch.meshgrid(torch.arange(28.0) - 13.5, torch.arange(28.0) - 13.5, indexing="ij")

    def lean(images):
        """The angle of a picture's axis of inertia, where it is clear: shirts and trousers stand upright."""
        weight = images[:, 0].double()
        moments = [(weight * part).sum((1, 2)) for part in (rows * rows, columns * columns, rows * columns)]
        return 0.5 * torch.atan2(2 * moments[2], moments[0] - moments[1])

    trousers = upright.test.labels == 1
    assert lean(upright.test.images[trousers]).abs().median() < 0.1
    quarters = torch.histc(lean(turned.test.images[trousers]), 4, -torch.pi / 2, torch.pi / 2) / trousers.sum()
    assert ((quarters > 0.2) & (quarters < 0.3)).all()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_data_says_what_to_do(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} is not in {tmp_path}.*--data-root.*--download"):
        load_pictures(name, str(tmp_path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        OptionError,
        match=r"digits, mnist, fashion-mnist, .*cifar100, folder:PATH, hf:NAME or wds:PATH.*'digit'",
    ):
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
    image, label = pictures.test.dataset(pictures.view(16), training=False)[0]
    assert image.shape == (3, 16, 16)
    assert label == 0


@pytest.mark.parametrize(
    ("sides", "made_for", "expected"),
    [
        ([70] * 40, 224, 96),
        ([64] * 40, 224, 64),
        ([10] * 40, 224, 32),
        ([300] * 40, 224, 224),
        ([70] * 40, 32, 32),
        ([20] * 10 + [90] * 30, 224, 96),  # the median, not the mean
    ],
)
def test_pictures_of_a_folder_come_at_the_models_size_or_at_their_own_if_that_is_smaller(
    tmp_path, sides, made_for, expected
):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index, side in enumerate(sides):
            Image.new("RGB", (side + 50, side) if index % 2 else (side, side + 50)).save(
                tmp_path / name / f"{index}.png"
            )
    pictures = load_pictures(f"folder:{tmp_path}")
    break_images(tmp_path, ["cat/0.png"])
    assert pictures.fitting(made_for) == expected


def test_only_headers_and_a_sample_of_many_are_read(tmp_path, monkeypatch):
    write_folder(tmp_path)
    pictures = load_pictures(f"folder:{tmp_path}")
    opened = []
    monkeypatch.setattr(decoded, "SAMPLE", 7)
    monkeypatch.setattr(decoded.ImageFiles, "fetch", lambda self, index: opened.append(index) or self.paths[index])
    monkeypatch.setattr(Image.Image, "load", None)  # what decodes
    assert pictures.train.median_side() == 10
    assert len(opened) == 7


def test_pictures_in_memory_have_their_own_size_and_shifts_grow_with_them():
    assert load_pictures("digits").fitting(224) == 8
    dot = torch.zeros(64, 1, 32, 32)
    dot[..., 14:18, 14:18] = 1
    torch.manual_seed(0)
    near = RandomAffine(shift=2, side=32)(dot)
    torch.manual_seed(0)
    torch.testing.assert_close(RandomAffine(shift=1, side=16)(dot), near)


def test_a_folder_with_train_alone_is_split_too(tmp_path):
    write_folder(tmp_path / "train")
    pictures = load_pictures(f"folder:{tmp_path}")
    assert [len(part) for part in (pictures.train, pictures.validation, pictures.test)] == [28, 4, 8]


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
def test_a_broken_image_is_an_error_that_names_it_when_none_may_be(tmp_path, cut):
    write_folder(tmp_path)
    break_images(tmp_path, ["cat/0.png"], cut)
    pictures = load_pictures(f"folder:{tmp_path}")
    parts = [
        part.dataset(pictures.view(16), training=False, max_broken=0)
        for part in (pictures.train, pictures.validation, pictures.test)
    ]
    with pytest.raises(DataError, match=r"cannot read the image .*cat/0\.png: .*mend or remove them"):
        list(ConcatDataset(parts))


def break_images(folder, names, keep=0):
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped_and_named_up_to_a_limit(tmp_path, workers, capsys):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    names = ["train/cat/3.png", "train/cat/4.png", "train/dog/0.png"]
    break_images(tmp_path, names)
    train = load_pictures(f"folder:{tmp_path}").train
    view = View(3, 16, (0.5,) * 3, (0.5,) * 3)
    broken = [f"{tmp_path}/{name}" for name in names if f"{tmp_path}/{name}" in paths_of(train)]
    assert len(broken) >= 2

    seen = train.dataset(view, training=True, max_broken=len(broken))
    labels = torch.cat([labels for _, labels in loader(seen, 6, workers)])
    assert len(labels) == len(train)  # the next image takes the place of each
    assert (labels >= 0).all()
    assert seen.broken() == broken
    warn_of_broken(seen, known := set())
    assert capsys.readouterr().err == f"skipped {len(broken)} images that cannot be read: {', '.join(broken)}\n"
    warn_of_broken(seen, known)
    assert capsys.readouterr().err == ""

    with pytest.raises(
        DataError, match=rf"more than {len(broken) - 1} images cannot be read, among them {tmp_path}/train"
    ):
        list(loader(train.dataset(view, training=True, max_broken=len(broken) - 1), 6, workers))


def paths_of(split):
    return [split.store.name(index) for index in split.chosen]


def test_an_evaluation_leaves_broken_images_out(tmp_path, capsys):
    write_folder(tmp_path)
    test = load_pictures(f"folder:{tmp_path}").test
    first, *others = paths_of(test)
    break_images(tmp_path, [first])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    result = evaluate(model, loader(test.dataset(View(3, 8, (0.5,) * 3, (0.5,) * 3), training=False), 3, 0))
    assert result.count == len(others) == len(result.labels)
    assert result.places.tolist() == list(range(1, len(test)))
    assert first in capsys.readouterr().err


def test_what_is_drawn_follows_from_seed_and_draw_alone(tmp_path):
    write_folder(tmp_path)
    train = load_pictures(f"folder:{tmp_path}").train
    view = View(3, 16, (0.5,) * 3, (0.5,) * 3)
    once, again = train.dataset(view, training=True, seed=3), train.dataset(view, training=True, seed=3)
    other_seed, draw = train.dataset(view, training=True, seed=4), 5 + 2 * len(train)
    image, label = once[draw]
    once[7]
    assert torch.equal(again[draw][0], image)
    assert label == once[5][1]
    assert not torch.equal(once[5][0], image)  # another epoch
    assert not torch.equal(other_seed[draw][0], image)
    with_workers = [images for images, _ in loader(again, 4, workers=2)]
    assert torch.equal(torch.cat(with_workers), torch.stack([once[index][0] for index in range(len(train))]))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_order_is_dealt_out_among_processes(world):
    split = load_pictures("digits").train
    whole = SplitSampler(split, step=64, seed=5)
    samplers = [SplitSampler(split, rank, world, step=64, seed=5) for rank in range(world)]
    for epoch in (0, 1):
        for sampler in (whole, *samplers):
            sampler.set_epoch(epoch)
        parts = [list(sampler) for sampler in samplers]
        assert [len(part) for part in parts] == [len(sampler) for sampler in samplers] == [1280 // world] * world
        together = [draw for draws in zip(*parts, strict=True) for draw in draws]
        assert together == list(whole)
        assert len({draw % len(split) for draw in together}) == 1280
        assert {draw // len(split) for draw in together} == {epoch}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_image_of_an_evaluation_counts_once(world):
    split = load_pictures("digits").validation
    data = split.dataset(View(1, 8, (0.3,), (0.4,)), training=False)
    batches = [list(loader(data, 10, 0, SplitSampler(split, rank, world))) for rank in range(world)]
    assert len({len(one) for one in batches}) == 1  # as many for each process
    labels = torch.cat([labels for one in batches for _, labels in one])
    assert sorted(labels[labels != IGNORED].tolist()) == sorted(split.labels.tolist())
    assert (labels == IGNORED).sum() == -len(split) % world


def test_random_affine_of_a_part_is_that_part_of_the_whole():
    images, draw = torch.rand(12, 1, 8, 8), RandomAffine(shift=2, degrees=20, scale=0.2, mirror=True)
    torch.manual_seed(1)
    whole = draw(images)
    rows = torch.tensor([1, 5, 9])
    torch.manual_seed(1)
    assert torch.equal(draw(images[rows], rows, 12), whole[rows])


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


# ------------------------------------------------------------------------------------------- the Hub's library and shards


def picture_bytes(shade, size=(12, 10)):
    content = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 255 - shade)).save(content, "PNG")
    return content.getvalue()


def hub_table(count, classes=("cat", "dog"), label="label"):
    rows = [{"bytes": picture_bytes(index), "path": None} for index in range(count)]
    labels = [index % len(classes) for index in range(count)]
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=list(classes))})
    return datasets.Dataset.from_dict({"image": rows, label: labels}, features=features)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shade_of(image):
    """The shade that a picture was made of, back from what the model sees with mean 0 and deviation 1."""
    return round(image[0].mean().item() * 255)


RAW = View(3, 8, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("form", ["save_to_disk", "parquet", "folder of images"])
def test_local_data_of_the_hubs_library_is_read(tmp_path, form):
    folder = tmp_path / "pets"
    if form == "save_to_disk":
        datasets.DatasetDict(train=hub_table(40), test=hub_table(6)).save_to_disk(str(folder))
    elif form == "parquet":
        folder.mkdir()
        for part, count in (("train", 40), ("test", 6)):
            hub_table(count).to_parquet(folder / f"{part}.parquet")
    else:
        for part, count in (("train", 20), ("test", 3)):
            write_folder(folder / part, images=count)
    pictures = load_pictures(f"hf:{folder}")
    assert pictures.classes == ("cat", "dog")
    assert [len(part) for part in (pictures.train, pictures.validation, pictures.test)] == [36, 4, 6]
    image, label = pictures.test.dataset(RAW, training=False)[5]
    assert image.shape == (3, 8, 8)
    assert int(label) == 1
    if form != "folder of images":
        assert shade_of(image) == 5


def test_a_broken_row_is_named(tmp_path):
    table = hub_table(20).cast_column("image", datasets.Image(decode=False))
    table = table.map(
        lambda row, index: {"image": {"bytes": row["image"]["bytes"][:30], "path": None}}, with_indices=True
    )
    table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "pets"))
    test = load_pictures(f"hf:{tmp_path / 'pets'}").test
    with pytest.raises(DataError, match=r"cannot read the image row \d+ of train"):
        test.dataset(RAW, training=False, max_broken=0)[0]


def test_hub_data_without_images_or_labels_or_a_train_split_is_refused(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(DataError, match=r"must have one column of images.* its columns are text \(Value\)"):
        load_pictures(f"hf:{tmp_path / 'text'}")
    datasets.DatasetDict(test=hub_table(4)).save_to_disk(str(tmp_path / "test"))
    with pytest.raises(DataError, match="must have a split named train; it has test"):
        load_pictures(f"hf:{tmp_path / 'test'}")
    with pytest.raises(DataError, match=r"datasets cannot load .*nobody/nothing"):
        load_pictures("hf:nobody/nothing")


SHARDS = {"train-000": 13, "train-001": 1, "train-002": 26, "val-000": 7}


def write_shards(folder, shards=SHARDS, classes=4):
    """Samples numbered through all shards; the shade of a picture is its number, its label the number modulo the classes."""
    folder.mkdir(exist_ok=True)
    number = 0
    for name, count in shards.items():
        with TarWriter(str(folder / f"{name}.tar")) as tar:
            for _ in range(count):
                tar.write({"__key__": f"{number:04}", "png": picture_bytes(number), "cls": number % classes})
                number += 1
    return folder


def seen_by(split, world, workers, training, epoch=0, step=None):
    """The shades that each of ``world`` ranks loads with ``workers`` processes, and their labels."""
    shades, labels = [], []
    for rank in range(world):
        sampler = SplitSampler(split, rank, world, step=step, seed=1)
        sampler.set_epoch(epoch)
        # As validation sees them, so that a picture shows which it is; the order is that of training.
        data = split.dataset(RAW, training=False)
        for images, truth in loader(UnitEpoch(data) if training else data, 3, workers, sampler):
            counts = truth != IGNORED
            shades += [shade_of(image) for image in images[counts]]
            labels += truth[counts].tolist()
    return shades, labels


class UnitEpoch(torch.utils.data.Dataset):
    """Draws of any epoch as those of the first, as training takes them."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, draw):
        return self.data[draw % len(self)]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), pytest.param(2, 2, marks=pytest.mark.sweep), (3, 2)])
def test_each_sample_of_the_shards_is_seen_once_per_epoch(tmp_path, world, workers):
    pictures = load_pictures(f"wds:{write_shards(tmp_path / 'shards')}")
    assert [len(part) for part in (pictures.train, pictures.validation, pictures.test)] == [36, 4, 7]
    shades, labels = seen_by(pictures.test, world, workers, training=False)
    assert sorted(shades) == list(range(40, 47))
    assert labels == [shade % 4 for shade in shades]
    trained = {}
    for epoch in (0, 1):
        shades, labels = seen_by(pictures.train, world, workers, training=True, epoch=epoch, step=6)
        assert max(Counter(shades).values()) == 1
        assert len(shades) == 36
        assert labels == [shade % 4 for shade in shades]
        trained[epoch] = shades
    assert trained[0] != trained[1]


def test_what_a_step_leaves_over_comes_in_other_epochs(tmp_path):
    train = load_pictures(f"wds:{write_shards(tmp_path / 'shards')}").train
    epochs = [seen_by(train, 2, 0, training=True, epoch=epoch, step=16)[0] for epoch in range(6)]
    assert all(len(set(shades)) == len(shades) == 32 for shades in epochs)
    assert len(set().union(*epochs)) == 36


def test_shards_come_in_runs_of_their_own(tmp_path, monkeypatch):
    """With a window of a few pictures, an epoch goes through one shard after the other."""
    monkeypatch.setattr("nearsight.training.data.decoded.WINDOW", 1)
    train = load_pictures(f"wds:{write_shards(tmp_path / 'shards')}").train
    order = train.order(torch.Generator().manual_seed(0))
    shards = train.store.blocks[train.chosen[order]]
    assert sorted(order.tolist()) == list(range(36))
    assert (np.diff(shards) != 0).sum() == len(np.unique(shards)) - 1


def test_the_index_is_kept_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards")
    first = load_pictures(f"wds:{folder}")
    assert (folder / "nearsight-index.npz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr("nearsight.training.data.shards._scan", None)  # not needed
        assert len(load_pictures(f"wds:{folder}").train) == len(first.train)
    write_shards(folder, {**SHARDS, "val-000": 11})
    assert len(load_pictures(f"wds:{folder}").test) == len(first.test) + 4
    (folder / "nearsight-index.npz").write_bytes(b"damaged")
    assert len(load_pictures(f"wds:{folder}").test) == len(first.test) + 4


def test_patterns_and_names_of_classes(tmp_path):
    folder = write_shards(tmp_path / "shards")
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    pictures = load_pictures(f"wds:{folder}/{{train-000,train-002,val-000}}.tar")
    assert pictures.classes == ("ant", "bee", "cat", "dog")
    assert (len(pictures.train) + len(pictures.validation), len(pictures.test)) == (39, 7)


def test_shards_that_cannot_be_used_are_named(tmp_path):
    folder = write_shards(tmp_path / "shards")
    with pytest.raises(DataError, match=r"there is no shard .*train-009\.tar"):
        load_pictures(f"wds:{folder}/train-009.tar")
    with pytest.raises(DataError, match=r"they must be files: mount what https://host/train-0\.tar names"):
        load_pictures("wds:https://host/train-0.tar")
    (folder / "classes.txt").write_text("ant\n")
    with pytest.raises(
        DataError, match=r"labels must be 0 to 0 or .* in .*classes\.txt; received '1' in .*train-000\.tar/0001\.png"
    ):
        load_pictures(f"wds:{folder}")
    shard = folder / "train-002.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train-002\.tar"):
        load_pictures(f"wds:{folder}")
    shard.rename(folder / "other.tar")
    with pytest.raises(DataError, match=r"must hold the word train, val or test; received .*other\.tar"):
        load_pictures(f"wds:{folder}")
