# SPDX-License-Identifier: Apache-2.0
"""A saved network on data that was not its own: classes by their names, the split that is measured, pictures it has seen."""

import io
import json
import shutil
import unicodedata

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from webdataset import TarWriter

from nearsight import cli
from nearsight.errors import DataError, OptionError
from nearsight.models import create_model
from nearsight.saved.trained_on import read_trained, write_trained
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, save_model
from nearsight.training.assess import assess
from nearsight.training.data import load_pictures, loader
from nearsight.training.data.pictures import digest
from nearsight.training.matching import match_classes
from nearsight.training.measures import measure
from nearsight.training.recipe import Recipe
from nearsight.training.train import resume, train

GREY = View(1, 8, (0.5,), (0.5,))
NAMES = ("zero", "one", "two", "three", "four")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr("nearsight.training.train.write_report", lambda *arguments: None)
    # To start processes takes longer than a few pictures.
    monkeypatch.setattr("nearsight.training.assess.loader", lambda images, batch_size, _: loader(images, batch_size, 0))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_digits(folder, names=NAMES, images=10, skip=0):
    """Handwritten digits as PNG files, in a folder per class."""
    bunch = load_digits()
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        chosen = np.flatnonzero(bunch.target == number)[skip : skip + images]
        for index in chosen:
            pixels = np.round(bunch.images[index] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """A network that knows the first five digits by their names, as a run leaves it; not a bad one."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_digits(folder / "data", images=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearsight.training.train.write_report", lambda *arguments: None)
        recipe = Recipe(model="sasa_nano", data=f"folder:{data}", epochs=4, batch_size=24, lr=0.01, workers=0)
        train(recipe, folder / "run")
    return folder / "run", data


@pytest.fixture
def untrained(tmp_path):
    """A function that leaves a network with given classes in a folder, without a note of what it was trained on."""

    def make(classes, data="digits"):
        folder = tmp_path / "untrained"
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = create_model("sasa_nano", num_classes=len(classes), in_chans=1)
        save_model(folder / "model.safetensors", model, Blueprint("sasa_nano", tuple(classes), GREY, data))
        return folder

    return make


def fails(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# ------------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("known", "names", "places"),
    [
        (("a", "b", "c"), ("c", "a", "b"), [2, 0, 1]),
        (("a", "b", "c"), ("c", "a"), [2, 0]),
        (("a", "b"), ("a", "x"), None),
        (("a", "b"), ("a", "b", "c"), None),
        (("Ankle  boot", "T-shirt"), (" t-SHIRT", "ankle boot "), [1, 0]),
        (("caf\u00e9", "stra\u00dfe"), ("STRASSE", unicodedata.normalize("NFD", "Caf\u00e9")), [1, 0]),
        (("Cat", "cat"), ("cat",), [1]),  # where case alone tells two apart, it counts
        (("Cat", "cat"), ("CAT",), None),
        (("cat", "dog"), ("cat", "Cat"), None),
        (("crane", "crane", "dog"), ("crane", "crane", "dog"), [0, 1, 2]),  # as they were trained
        (("crane", "crane", "dog"), ("dog",), [2]),
        (("crane", "crane", "dog"), ("dog", "crane"), None),
        (("cat", "dog"), ("dog", "dog"), None),
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), [0, 1, 3, 2]),
    ],
)
def test_names_agree_once_or_not_at_all(known, names, places):
    assert match_classes(known, names) == places


def in_folder(path, names):
    return f"folder:{write_digits(path, names, images=6)}"


def in_table(path, names):
    """Under the Hub's library the classes are in the order of the feature's names."""
    pixels = [np.full((8, 8), 10 * index, np.uint8) for index in range(6 * len(names))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [i % len(names) for i in range(len(pixels))]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(path))
    return f"hf:{path}"


def in_shards(path, names):
    path.mkdir()
    (path / "classes.txt").write_text("\n".join(names))
    with TarWriter(str(path / "train-0.tar")) as tar:
        for index in range(6 * len(names)):
            content = io.BytesIO()
            Image.fromarray(np.full((8, 8), 10 * index, np.uint8)).save(content, "PNG")
            tar.write({"__key__": f"{index:03}", "png": content.getvalue(), "cls": index % len(names)})
    return f"wds:{path}"


@pytest.mark.parametrize("form", [in_folder, in_table, in_shards])
def test_classes_of_any_source_are_paired_by_name_and_others_refused(tmp_path, untrained, form):
    network = untrained(("d", "a", "c", "b"))
    found = assess(network, form(tmp_path / "data", ("b", "d", "a")))
    assert found.split == "all"
    assert found.classes == ("d", "a", "b")
    assert found.evaluation.confusion.sum(1).tolist() == [6, 6, 0, 6]
    with pytest.raises(OptionError, match=r"has 3 classes \(.*\); .* tells 4 apart, those of digits \(d, a, c, b\)"):
        assess(network, form(tmp_path / "other", ("b", "d", "x")))


def test_the_same_pictures_in_another_order_of_classes_reach_the_same(digits_run, tmp_path):
    """The folders' order is that of the alphabet, so that names decide which class comes first."""
    run, data = digits_run
    before = assess(run, f"folder:{data}", split="all")
    assert len(np.unique(before.evaluation.confusion, axis=0)) > 1  # it does not answer always the same
    for name in NAMES:
        shutil.copytree(data / name, tmp_path / "renamed" / name.upper().center(9))
    after = assess(run, f"folder:{tmp_path / 'renamed'}", split="all")
    assert after.evaluation.accuracy == before.evaluation.accuracy
    assert (after.evaluation.confusion == before.evaluation.confusion).all()


def test_a_part_of_the_classes_is_measured_as_such_and_said(digits_run, tmp_path, capsys):
    run, data = digits_run
    whole = assess(run, f"folder:{data}", split="all").evaluation.confusion
    for name in ("two", "four"):
        shutil.copytree(data / name, tmp_path / "part" / name)
    assert cli.main(["eval", str(run), "--data", f"folder:{tmp_path / 'part'}", "--split", "all"]) == 0
    text = capsys.readouterr().out
    assert "a part of the network's classes, 2 of 5: four, two; an answer outside of them counts as wrong" in text
    places = [0, 3]  # "four" and "two" of four, one, three, two, zero
    correct = whole[places, places].sum()
    assert f"({correct} of 40 images)" in text


def test_other_classes_are_an_error_that_lists_both_and_by_order_insists(untrained, tmp_path, capsys):
    run = untrained("0123456789", data="digits")
    folder = write_digits(tmp_path / "data", names=[f"garment {n}" for n in range(10)])
    message = fails(capsys, "eval", run, "--data", f"folder:{folder}")
    assert all(f"garment {n}" in message for n in range(10))
    assert "(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)" in message
    assert "--by-order" in message
    assert cli.main(["eval", str(run), "--data", f"folder:{folder}", "--by-order", "--json"]) == 0
    by_order = json.loads(capsys.readouterr().out)
    assert [sum(row) for row in by_order["confusion"]] == [10] * 10
    shutil.rmtree(folder / "garment 9")
    message = fails(capsys, "eval", run, "--data", f"folder:{folder}", "--by-order")
    assert "has 9 classes" in message
    assert "as many classes are needed for --by-order" in message


def test_a_class_without_pictures_need_not_be_known(untrained, tmp_path):
    """hf and wds may name classes that their pictures do not have."""
    folder = tmp_path / "shards"
    data = in_shards(folder, ("a", "b"))
    (folder / "classes.txt").write_text("a\nb\nnowhere\n")
    assert assess(untrained(("b", "a")), data).evaluation.confusion.sum(1).tolist() == [6, 6]


def test_weights_from_elsewhere_name_no_classes(tmp_path, capsys):
    """Numbers would agree with the names of folders that mean something else."""
    torch.save(create_model("test_resnet", num_classes=5, in_chans=1).state_dict(), tmp_path / "mine.pth")
    options = ("--init", "exact", "--checkpoint", tmp_path / "mine.pth", "--output", tmp_path / "run")
    assert cli.main(["convert", "test_resnet", *map(str, options)]) == 0
    capsys.readouterr()
    data = f"folder:{write_digits(tmp_path / 'data', tuple('01234'))}"
    assert "(class 0, class 1, class 2, class 3, class 4)" in fails(capsys, "eval", tmp_path / "run", "--data", data)
    assert cli.main(["eval", str(tmp_path / "run"), "--data", data, "--by-order"]) == 0


def test_measuring_a_comparison_pairs_by_name_too(untrained, tmp_path):
    run = untrained(("two", "one", "zero"))
    (run / "config.yaml").write_text(Recipe(lr=0.1, opt="sgd").to_yaml())
    (run / "metrics.csv").write_text("epoch,train_loss,val_accuracy\n1,1,1\n")
    (run / "timing.csv").write_text("epoch,seconds,images_per_second,peak_memory\n1,1,1,1\n")
    same = load_pictures(f"folder:{write_digits(tmp_path / 'same', NAMES[:3])}")
    assert measure(run, "sasa_nano", 0, same, 8).accuracy == assess(run, same.name, split="test").evaluation.accuracy
    other = load_pictures(f"folder:{write_digits(tmp_path / 'other', ('two', 'one', 'six'))}")
    with pytest.raises(OptionError, match=r"\(one, six, two\); .* \(two, one, zero\)"):
        measure(run, "sasa_nano", 0, other, 8)


def test_a_run_does_not_go_on_with_other_classes(digits_run, tmp_path):
    run, data = digits_run
    shutil.copytree(run, tmp_path / "run")
    (data / "zero").rename(data / "null")
    try:
        message = r"have changed since the run began: there are 5 \(four, null, .*three, two, zero"
        with pytest.raises(OptionError, match=message):
            resume(tmp_path / "run")
    finally:
        (data / "null").rename(data / "zero")


# ------------------------------------------------------------------------------------------- the split and what was seen


def test_new_pictures_are_measured_all_and_those_of_the_run_by_its_test_split(digits_run, tmp_path, capsys):
    run, data = digits_run
    new = write_digits(tmp_path / "new", images=12, skip=100)
    renamed = shutil.copytree(data, tmp_path / "holiday")
    for folder, count, split in ((new, 60, "all"), (data, 20, "test"), (renamed, 20, "test")):
        found = assess(run, f"folder:{folder}")
        assert (found.evaluation.count, found.split, found.trained) == (count, split, 0)
    counts = {part: assess(run, f"folder:{renamed}", split=part) for part in ("test", "val", "train", "all")}
    assert {part: (one.evaluation.count, one.trained) for part, one in counts.items()} == {
        "test": (20, 0),
        "val": (8, 0),
        "train": (72, 72),
        "all": (100, 72),
    }
    for place, file in enumerate(sorted(renamed.rglob("*.png"), reverse=True)):  # which splits them otherwise
        file.rename(file.with_name(f"IMG_{place}.png"))
    assert assess(run, f"folder:{renamed}").trained > 0
    assert cli.main(["eval", str(run), "--data", f"folder:{renamed}", "--split", "all"]) == 0
    assert "it was trained on 72.00% of them (72 of 100)\n" in capsys.readouterr().out
    assert "must be one of test, val, train, all; received 'half'" in fails(
        capsys, "eval", run, "--data", f"folder:{data}", "--split", "half"
    )


def test_pictures_of_the_training_are_left_out_on_request(digits_run, tmp_path, untrained, capsys):
    run, data = digits_run
    mixed = shutil.copytree(data, tmp_path / "mixed")
    for name in NAMES:
        shutil.copytree(
            write_digits(tmp_path / f"new {name}", images=4, skip=100) / name, mixed / name, dirs_exist_ok=True
        )
    command = ["eval", str(run), "--data", f"folder:{mixed}", "--split", "all"]
    assert cli.main([*command, "--leave-out-trained", "--json"]) == 0
    left = json.loads(capsys.readouterr().out)
    assert (left["images"], left["trained_images"], left["left_out"]) == (120 - 72, 72, True)
    assert left["trained_share"] == pytest.approx(72 / 120)
    assert cli.main([*command, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert (whole["images"], whole["trained_images"]) == (120, 72)
    assert "there is nothing left to measure" in fails(
        capsys, "eval", run, "--data", f"folder:{data}", "--split", "train", "--leave-out-trained"
    )
    unknown = untrained(NAMES)
    assert "needs trained.npz beside the weights" in fails(
        capsys, "eval", unknown, "--data", f"folder:{data}", "--leave-out-trained"
    )
    assert assess(unknown, f"folder:{data}").trained is None


def test_pictures_are_known_again_in_any_form(digits_run, tmp_path):
    """In another class's folder, another format, a shard, a table and an array: the picture is the same."""
    run, data = digits_run
    noted, images = read_trained(run), [Image.open(file).copy() for file in sorted((data / "two").iterdir())]
    assert len(noted) == 72
    for name in NAMES:
        (tmp_path / "mixed" / name).mkdir(parents=True)
    for index, image in enumerate(images):
        image.convert("RGB").save(tmp_path / "mixed" / NAMES[index % 5] / f"{index}.bmp")
    expected = sum(digest(image.convert("RGB")) in noted for image in images)
    assert 10 <= expected <= 20
    assert assess(run, f"folder:{tmp_path / 'mixed'}", split="all").trained == expected


def test_a_run_on_arrays_is_known_in_files(tmp_path, untrained):
    run = untrained("0123456789")
    pictures = load_pictures("digits")
    write_trained(run, pictures.train.dataset(GREY, training=True).digests().numpy())
    assert len(read_trained(run)) == 1293
    assert [assess(run, "digits", split=split).trained for split in ("train", "test", "all")] == [1293, 0, 1293]
    assert assess(run, "digits").split == "test"
    folder = write_digits(tmp_path / "files", tuple("0123456789"), images=20)
    found = assess(run, f"folder:{folder}")
    trained = {image.numpy().tobytes() for image in pictures.train.images}
    files = [np.asarray(Image.open(file)).tobytes() for file in folder.rglob("*.png")]
    expected = sum(file in trained for file in files)
    assert 100 < expected < 200
    assert (found.split, found.evaluation.count) == ("test", 40)
    assert assess(run, f"folder:{folder}", split="all").trained == expected


def test_a_damaged_note_is_named_and_a_longer_one_keeps_what_it_had(tmp_path):
    write_trained(tmp_path, np.array([7, 5, 0, 7]))
    write_trained(tmp_path, np.array([6]))
    assert read_trained(tmp_path / "model.safetensors").tolist() == [5, 6, 7]
    content = (tmp_path / "trained.npz").read_bytes()
    place = content.index(np.array([5]).tobytes())
    for damaged in (content[:-30], content[:place] + b"\x04" + content[place + 1 :], b"", b"no zip"):
        (tmp_path / "trained.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"trained\.npz, which tells the pictures"):
            read_trained(tmp_path)


def test_a_converted_run_keeps_the_note(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run[0], tmp_path / "run")
    model = create_model("conv_nano", num_classes=5, in_chans=3)
    view = View(3, 224, (0.5,) * 3, (0.5,) * 3)
    save_model(run / "model.safetensors", model, Blueprint("conv_nano", tuple(sorted(NAMES)), view, "folder:x"))
    command = ["convert", str(run), "--init", "random", "--output", str(tmp_path / "converted")]
    assert cli.main(command) == 0
    assert read_trained(tmp_path / "converted").tolist() == read_trained(run).tolist()


# ------------------------------------------------------------------------------------------------------ broken pictures


def test_as_many_broken_pictures_as_are_allowed_are_left_out_by_eval_and_by_a_comparison(untrained, tmp_path, capsys):
    """A run that was trained with more than the default can be measured by both."""
    folder, data = untrained(NAMES), write_digits(tmp_path / "data", images=4)
    for name in NAMES[:3]:
        for file in sorted((data / name).iterdir()):
            file.write_bytes(b"\x89PNG")  # twelve of twenty
    line = fails(capsys, "eval", folder, "--data", f"folder:{data}", "--split", "all")
    assert "--max-broken" in line
    command = ["eval", str(folder), "--data", f"folder:{data}", "--split", "all", "--max-broken", "12", "--json"]
    assert cli.main(command) == 0
    assert '"images": 8' in capsys.readouterr().out
