# SPDX-License-Identifier: Apache-2.0
"""Splits and classes as people store them: read right, or refused in one line that names what is wrong."""

import io
import re
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from nearsight import cli
from nearsight.errors import DataError
from nearsight.training.data import load_pictures, load_whole
from nearsight.training.data.pictures import plainly


@pytest.fixture(autouse=True)
def _no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(shade=0):
    content = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(content, "PNG")
    return content.getvalue()


def write_classes(folder, count, classes=("cat", "dog")):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.png").write_bytes(picture(index))
    return folder


def table(labels, feature=None):
    feature = feature or datasets.ClassLabel(names=["cat", "dog"])
    rows = [{"bytes": picture(index), "path": None} for index in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    return datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features)


def hub(path, **splits):
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return f"hf:{path}"


def sizes(name):
    pictures = load_pictures(name)
    return [len(part) for part in (pictures.train, pictures.validation, pictures.test)]


def named_labels(name):
    """The names of the classes of all pictures, split by split in the order in which they are stored."""
    whole = load_whole(name)
    return [[whole.classes[label] for label in split.labels] for split in whole.splits]


# -------------------------------------------------------------------------------------------------- names of splits


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Valid", "Test"),
        ("training", "validation", "testing"),
        ("TRN", "DEV", "TEST"),
    ],
)
def test_splits_are_known_by_any_spelling_in_folder_and_hub(tmp_path, train, validation, test, capsys):
    for name, count in ((train, 7), (validation, 2), (test, 3)):
        write_classes(tmp_path / "folder" / name, count)
    assert sizes(f"folder:{tmp_path / 'folder'}") == [14, 4, 6]
    splits = {train: table([0, 1] * 7), validation: table([0, 1] * 2), test: table([0, 1] * 3)}
    assert sizes(hub(tmp_path / "hub", **splits)) == [14, 4, 6]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train", "val", "valid"), r"one val split; .* has val and valid"),
        (("train", "Train"), r"one train split; .* has Train and train"),
        (("train", "test", "testing"), r"one test split; .* has test and testing"),
        (("val", "test"), r"a split named train; it has test, val"),
        (("Validation",), r"a split named train; it has Validation: .*where Validation is a class, rename"),
    ],
)
def test_splits_that_contradict_each_other_are_refused(tmp_path, names, message):
    for name in names:
        write_classes(tmp_path / "folder" / name, 5)
    for source in (f"folder:{tmp_path / 'folder'}", hub(tmp_path / "hub", **{name: table([0, 1]) for name in names})):
        for load in (load_pictures, load_whole):
            with pytest.raises(DataError, match=message):
                load(source)


@pytest.mark.parametrize("beside", ["cat", "CAT", "fox"])
def test_class_folders_beside_splits_are_refused(tmp_path, beside):
    write_classes(tmp_path / "train", 5)
    write_classes(tmp_path, 5, [beside])
    with pytest.raises(DataError, match=rf"either splits or classes; it has train beside the class folders {beside}"):
        load_pictures(f"folder:{tmp_path}")


def test_a_copy_of_a_class_beside_two_splits_is_refused(tmp_path):
    for part in ("train", "test"):
        write_classes(tmp_path / part, 5)
    write_classes(tmp_path, 5, ["dog"])
    with pytest.raises(DataError, match=r"it has train, test beside the class folders dog"):
        load_pictures(f"folder:{tmp_path}")


def test_a_class_called_train_is_refused(tmp_path):
    write_classes(tmp_path, 20, ["plane", "train"])
    with pytest.raises(DataError, match=r"beside the class folders plane: .*where train is a class, rename that"):
        load_pictures(f"folder:{tmp_path}")


def test_what_lies_beside_the_splits_is_a_line(tmp_path, capsys):
    for part in ("train", "test"):
        write_classes(tmp_path / "folder" / part, 10)
    write_classes(tmp_path / "folder" / "extra", 5)
    (tmp_path / "folder" / "notes").mkdir()
    (tmp_path / "folder" / ".cache").mkdir()
    assert sizes(f"folder:{tmp_path / 'folder'}") == [18, 2, 20]
    load_whole(f"folder:{tmp_path / 'folder'}")  # says it no second time
    assert (
        capsys.readouterr().err == f"not read: extra, notes in {tmp_path / 'folder'}, beside the splits train, test\n"
    )
    write_classes(tmp_path / "folder", 5, ["unlabelled"])
    assert sizes(f"folder:{tmp_path / 'folder'}") == [18, 2, 20]
    assert "not read: extra, notes, unlabelled in" in capsys.readouterr().err
    source = hub(tmp_path / "hub", train=table([0, 1] * 10), test=table([0, 1]), extra=table([0]))
    assert sizes(source) == [18, 2, 2]
    assert capsys.readouterr().err == f"not read: extra in {tmp_path / 'hub'}, beside the splits train, test\n"


@pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("train2017", "val2017"), ("TrainSet", "TestSet")])
def test_splits_of_other_names_are_no_classes(tmp_path, names):
    for name in names:
        write_classes(tmp_path / name, 5)
    with pytest.raises(DataError, match=rf"must be named train, val and test; .* has {', '.join(sorted(names))}"):
        load_pictures(f"folder:{tmp_path}")


def test_classes_whose_names_hold_such_words_are_classes(tmp_path):
    write_classes(tmp_path, 20, ["test tube", "train station"])
    assert load_pictures(f"folder:{tmp_path}").classes == ("test tube", "train station")


# ---------------------------------------------------------------------------------------------- labels of the Hub's data


def test_names_in_another_order_are_paired_by_name(tmp_path):
    other = datasets.ClassLabel(names=["dog", "cow", "cat"])
    source = hub(tmp_path / "hub", train=table([0, 0, 1]), validation=table([2, 0, 2], other), test=table([1, 0]))
    assert load_whole(source).classes == ("cat", "dog")
    assert named_labels(source) == [["cat", "cat", "dog"], ["cat", "dog", "cat"], ["dog", "cat"]]


def test_a_class_that_train_does_not_have_is_refused(tmp_path):
    other = datasets.ClassLabel(names=["dog", "cow"])
    source = hub(tmp_path / "hub", train=table([0, 1]), test=table([0, 1], other))
    with pytest.raises(DataError, match=r"row 1 of test is of the class cow, and train has cat, dog"):
        load_pictures(source)


def test_names_in_some_splits_alone_are_refused(tmp_path):
    source = hub(tmp_path / "hub", train=table([0, 1]), test=table([0, 1], datasets.Value("int64")))
    with pytest.raises(DataError, match=r"name their classes or none; test does not"):
        load_pictures(source)


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 1, 2], [10, 30, 20]])
def test_numbers_without_names_are_as_many_classes_as_there_are_numbers(tmp_path, labels):
    whole = datasets.Value("int32")
    source = hub(tmp_path / "hub", train=table(labels, whole), test=table(labels[::-1], whole))
    assert load_whole(source).classes == tuple(map(str, sorted(labels)))
    assert named_labels(source) == [list(map(str, labels)), list(map(str, labels[::-1]))]


@pytest.mark.parametrize("feature", [None, datasets.Value("int64")])
def test_a_label_that_is_none_is_named(tmp_path, feature):
    source = hub(tmp_path / "hub", train=table([0, 1, 0]), test=table([0, 1, None, None], feature))
    with pytest.raises(DataError, match=r"every row must have a label; row 2 of test has none, and so 2 of 4"):
        load_pictures(source)


@pytest.mark.parametrize("feature", [None, datasets.Value("int64")])
def test_a_label_below_zero_is_named(tmp_path, feature):
    source = hub(tmp_path / "hub", train=table([0, 1, 0], feature), test=table([0, -1], feature))
    with pytest.raises(DataError, match=r"received -1 in row 1 of test: is test a split without labels"):
        load_pictures(source)


def test_a_split_without_the_columns_of_train_is_refused(tmp_path):
    other = table([0, 1]).rename_column("label", "labels")
    with pytest.raises(DataError, match=r"same columns; test lacks label, which train has"):
        load_pictures(hub(tmp_path / "hub", train=table([0, 1]), test=other))


def test_a_row_without_a_picture_is_named(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(), "path": None}, None] * 10, "label": [0, 1] * 10},
        features=table([0]).features,
    )
    whole = load_whole(hub(tmp_path / "hub", train=rows))
    view = load_pictures("digits").view(8)
    with pytest.raises(DataError, match=r"cannot read the image row 1 of train"):
        whole.splits[0].dataset(view, training=False, max_broken=0)[1]
    assert np.array_equal(whole.splits[0].labels, [0, 1] * 10)


# ------------------------------------------------------------------------------------------------------------ shards


def shard(file, *members):
    """A tar file of members, each a name and its content; None is a picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for place, (name, content) in enumerate(members):
            content = picture(place) if content is None else content
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return file


def samples(labels, first=0):
    return [
        member
        for number, label in enumerate(labels, start=first)
        for member in ((f"{number:03}.png", None), (f"{number:03}.cls", str(label).encode()))
    ]


@pytest.mark.parametrize(
    "files",
    [
        ("train-0.tar", "val-0.tar", "test-0.tar"),
        ("Training_0.tar", "DEV_0.tar", "pets.Testing.tar"),
        ("train/0.tar", "valid/0.tar", "test/0.tar"),
        ("TRAIN/train-0.tar", "Validation/validation-0.tar", "test/x.TAR"),
        ("train/0.tar", "val-0.tar", "test-0.tar"),
    ],
)
def test_shards_are_of_the_split_that_their_name_or_folder_tells(tmp_path, files):
    for file, count in zip(files, (7, 2, 3), strict=True):
        shard(tmp_path / "dev" / file, *samples([0, 1] * count))
    shard(tmp_path / "dev" / "._train-0.tar", *samples([0]))
    assert sizes(f"wds:{tmp_path / 'dev'}") == [14, 4, 6]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train-0.tar", "training-1.tar"), r"one train split; .* has train and training"),
        (("val-0.tar", "test-0.tar"), r"a split named train; it has test, val"),
        (("train-test-0.tar",), r"one split; the name of .*train-test-0\.tar holds test and train"),
        (("test/train-0.tar",), r"one split; the name of .*train-0\.tar holds test and train"),
        (("0.tar",), r"of a shard or of its folder must hold the word train, val or test; received .*0\.tar"),
    ],
)
def test_shards_whose_names_contradict_are_refused(tmp_path, files, message):
    for file in files:
        shard(tmp_path / "s" / file, *samples([0, 1]))
    with pytest.raises(DataError, match=message):
        load_whole(f"wds:{tmp_path / 's'}")


def test_a_folder_of_shards_that_is_not_read_is_a_line(tmp_path, capsys):
    for file in ("train/0.tar", "test/0.tar", "extra/0.tar"):
        shard(tmp_path / file, *samples([0, 1] * 10))
    assert sizes(f"wds:{tmp_path}") == [18, 2, 20]
    assert capsys.readouterr().err == f"not read: extra in {tmp_path}, beside the splits test, train\n"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*samples([0, 1]), ("000.png", None), ("000.cls", b"1")], "000 in .* has two, .png and .png"),
        ([("a.jpg", None), ("a.png", None), ("a.cls", b"1")], "a in .* has two, .jpg and .png"),
        ([("a.png", None), ("a.cls", b"1"), ("a.CLS", b"0")], "one label; a in .* has two"),
        ([*samples([0]), ("b.png", None)], "b in .* has no label"),
        ([*samples([0]), ("b.cls", b"1")], "b in .* has no image"),
        ([*samples([0]), ("b.v2.png", None)], r"b\.v2 in .* has no label"),
        ([*samples([0, "cat"])], r"all numbers or all names.* received 'cat' in .*001\.png"),
        ([*samples([0, ""])], r"received '' for the sample 001 in"),
        ([*samples([0, -1])], r"whole numbers from 0; received '-1' in .*001\.png"),
        ([*samples([0]), ("b.png", None), ("b.cls", b"\xff\xfe1\0")], "the sample b in .* is neither"),
    ],
)
def test_samples_that_are_not_sure_are_refused_by_name(tmp_path, members, message):
    file = shard(tmp_path / "train-0.tar", *members)
    with pytest.raises(DataError, match=message) as error:
        load_whole(f"wds:{tmp_path}")
    assert str(file) in str(error.value)


def test_keys_with_dots_capitals_and_further_fields_are_read(tmp_path):
    members = [("./a/1.5.PNG", None), ("a/1.5.cls", b"0"), ("a/1.6.png", None), ("a/1.6.Cls", b" 1\n")]
    members += [("b.jpeg", None), ("b.mask.png", None), ("b.cls", "\ufeff0".encode()), ("b.coarse.cls", b"7")]
    shard(tmp_path / "train-0.tar", *members, ("._b.png", b"a Mac's"), ("b.json", b"{}"))
    whole = load_whole(f"wds:{tmp_path}")
    assert named_labels(f"wds:{tmp_path}") == [["0", "1", "0"]]
    assert [whole.splits[0].store.fetch(place) for place in range(3)] == [picture(0), picture(2), picture(4)]


@pytest.mark.parametrize("names", [None, "dog\ncat\n", "\ufeffdog\r\ncat \r\n\r\n"])
def test_labels_that_are_words_are_classes(tmp_path, names):
    shard(tmp_path / "train-0.tar", *samples(["dog", "cat"]))
    shard(tmp_path / "test-0.tar", *samples(["cat", "cat", "dog"]))
    if names is not None:
        (tmp_path / "classes.txt").write_bytes(names.encode())
    for _ in range(2):  # from the shards, then from the index
        assert load_whole(f"wds:{tmp_path}").classes == (("cat", "dog") if names is None else ("dog", "cat"))
        assert sorted(named_labels(f"wds:{tmp_path}")) == [["cat", "cat", "dog"], ["dog", "cat"]]


def test_numbers_of_shards_begin_where_they_do(tmp_path):
    shard(tmp_path / "train-0.tar", *samples([1, 3, 2, 10]))
    assert load_whole(f"wds:{tmp_path}").classes == ("1", "2", "3", "10")
    assert named_labels(f"wds:{tmp_path}") == [["1", "3", "2", "10"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ant\n\nbee\n", r"classes\.txt must name a class on every line; line 2 is empty"),
        (b"\n", r"line 1 is empty"),
        ("ant\nbee\n".encode("utf-16"), r"cannot read .*classes\.txt"),
        (b"ant\nbee\n", r"0 to 1 or one of the names in .*classes\.txt; received '2' in .*train-0\.tar/002\.png"),
    ],
)
def test_names_of_classes_that_are_not_sure_are_refused(tmp_path, content, message):
    shard(tmp_path / "train-0.tar", *samples([0, 1, 2]))
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_whole(f"wds:{tmp_path}")


def test_the_classes_of_folders_of_shards_are_the_same(tmp_path):
    for part in ("train", "test"):
        shard(tmp_path / part / "0.tar", *samples([0, 1]))
        (tmp_path / part / "classes.txt").write_text("ant\nbee")
    assert load_whole(f"wds:{tmp_path}").classes == ("ant", "bee")
    (tmp_path / "test" / "classes.txt").write_text("bee\nant")
    with pytest.raises(DataError, match=r"the same classes; .*classes\.txt and .*classes\.txt differ"):
        load_whole(f"wds:{tmp_path}")


# -------------------------------------------------------------------------------------------- too few, and unreadable


def line_of(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_a_single_class_is_a_line(tmp_path, capsys):
    write_classes(tmp_path / "pets", 20, ["cat"])
    words = "training needs images of two classes or more; those of .* are all of one, cat"
    for command in (["train"], ["compare", "--models", "sasa_nano", "conv_nano"]):
        line = line_of(capsys, *command, "--data", f"folder:{tmp_path / 'pets'}", "--output", tmp_path / "out")
        assert re.search(words, line)
    for part in ("train", "val", "test"):
        write_classes(tmp_path / "split" / part, 20, ["cat"])
    assert re.search(words, line_of(capsys, "train", "--data", f"folder:{tmp_path / 'split'}"))


def test_a_class_with_a_single_picture_is_named(tmp_path):
    write_classes(tmp_path, 20, ["cat", "dog"])
    write_classes(tmp_path, 1, ["fox"])
    with pytest.raises(DataError, match="has a single one for training of fox; add some"):
        load_pictures(f"folder:{tmp_path}")


class _Broken(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_a_loading_process_is_told_without_its_traceback(workers):
    batches = torch.utils.data.DataLoader(_Broken(DataError("cannot read a.png")), 2, num_workers=workers)
    with pytest.raises(DataError, match=r"^cannot read a\.png$") as caught:
        list(plainly(batches))
    assert caught.value.__context__ is None


def test_a_loading_process_that_dies_is_told():
    class Dying:
        def __iter__(self):
            raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")

    with pytest.raises(
        DataError, match=r"worker \(pid\(s\) 7\) exited unexpectedly; memory may be short: try --workers 0"
    ):
        list(plainly(Dying()))
    with pytest.raises(RuntimeError, match="other"):
        list(plainly(_iterator_of(RuntimeError("other"))))


def _iterator_of(error):
    yield from ()
    raise error
