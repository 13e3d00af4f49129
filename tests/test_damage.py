# SPDX-License-Identifier: Apache-2.0
"""Damaged files are noticed when they are read: a flipped bit and a cut end, in everything that nearsight reads again."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nearsight import create_model
from nearsight.cli import main
from nearsight.errors import DataError
from nearsight.saved.view import View
from nearsight.saved.weights import KEY, RECIPE, Blueprint, load_model, read_checkpoint, save_model
from nearsight.training.callbacks import WholeFiles
from nearsight.training.data import load_pictures
from nearsight.training.measures import (
    DIGEST,
    FILES,
    MEASURES_FILE,
    Measures,
    _of_training,
    _write,
    read_measures,
    read_rows,
)
from nearsight.training.recipe import Recipe, read_recipe
from nearsight.training.train import resume

SPEC = "sasa_nano,depths=[1,1],widths=[8,8],stem_width=8,num_heads=2"
BLUEPRINT = Blueprint(SPEC, ("none", "some", "many"), View(1, 8, (0.5,), (0.5,)), "digits")


def flipped(content: bytes, place: int) -> bytes:
    """One bit of the byte at that place is another, a different one at each."""
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def places(content: bytes, count: int) -> list[int]:
    return np.linspace(0, len(content) - 1, count).astype(int).tolist()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = create_model(SPEC, num_classes=3, in_chans=1).eval()
    model.stages[0][0].up[1].num_batches_tracked.fill_(7)
    return model


@pytest.fixture
def weights(network, tmp_path):
    save_model(tmp_path / "model.safetensors", network, BLUEPRINT)
    return tmp_path / "model.safetensors"


@pytest.fixture
def checkpoint(network, tmp_path):
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    recipe = Recipe(model=SPEC, epochs=2, batch_size=64, lr=0.01)
    values = {KEY: BLUEPRINT.to_json(), "state_dict": state, RECIPE: vars(recipe)}
    WholeFiles().save_checkpoint(values, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(recipe.to_yaml())
    return tmp_path / "last.ckpt"


# ------------------------------------------------------------------------------------------------------ weights


def test_a_flipped_bit_anywhere_in_the_weights_is_noticed(weights):
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in {*places(content, 60), *places(content[:header], 60)}:
        weights.write_bytes(flipped(content, place))
        with pytest.raises(DataError, match=r"model\.safetensors"):
            load_model(weights)
    weights.write_bytes(content)
    assert load_model(weights)[1] == BLUEPRINT


def test_damaged_weights_name_the_checkpoint_beside_them(weights, checkpoint):
    content = weights.read_bytes()
    weights.write_bytes(flipped(content, len(content) - 5))
    with pytest.raises(DataError, match=r"model\.safetensors is damaged.*take .*last\.ckpt"):
        load_model(weights.parent)


def test_weights_of_an_older_run_have_no_digest_and_are_read(weights, network):
    save_file(load_file(weights), weights, metadata={KEY: BLUEPRINT.to_json()})
    model, blueprint = load_model(weights)
    assert blueprint == BLUEPRINT
    assert all(torch.equal(one, network.state_dict()[name]) for name, one in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(weights, network, tmp_path):
    save_model(tmp_path / "again.safetensors", network, BLUEPRINT)
    assert (tmp_path / "again.safetensors").read_bytes() == weights.read_bytes()


def test_a_flipped_bit_in_a_checkpoint_is_noticed_where_it_matters(checkpoint):
    content = checkpoint.read_bytes()
    whole = read_checkpoint(checkpoint)
    noticed = 0
    for place in places(content, 100):
        checkpoint.write_bytes(flipped(content, place))
        try:
            found = read_checkpoint(checkpoint)
        except DataError as error:
            assert "last.ckpt" in str(error)  # noqa: PT017 (it need not be raised)
            noticed += 1
            continue
        # A bit of what fills the archive up, or of its dates: nothing that is read.
        assert found[KEY] == whole[KEY]
        assert all(torch.equal(tensor, whole["state_dict"][name]) for name, tensor in found["state_dict"].items())
    assert noticed >= 50  # the archive of so small a network is half filling


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "{}", "--data", "digits"),
        ("export", "{}", "--format", "pt2"),
        ("explore", "{}", "digits:3"),
        ("profile", "{}"),
        ("convert", "{}", "--init", "random", "--output", "{}-converted"),
        ("convert", "test_resnet", "--init", "random", "--checkpoint", "{}", "--output", "{}-converted"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_says_which_file_is_damaged(command, checkpoint, capsys):
    content = bytearray(checkpoint.read_bytes())
    tensor = read_checkpoint(checkpoint)["state_dict"]["model.head.fc.weight"].numpy().tobytes()
    content[content.index(tensor) + 3] ^= 0x40  # the exponent of a weight
    checkpoint.write_bytes(content)
    assert main([part.format(checkpoint) for part in command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nearsight: error: ")
    assert "last.ckpt" in said
    assert "damaged" in said
    assert said.count("\n") == 1


def test_a_run_with_a_damaged_checkpoint_is_not_told_to_learn_slower(checkpoint, capsys):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(flipped(content, content.index(b"\x80\x02") + 40))
    assert main(["train", "--resume", "--output", str(checkpoint.parent)]) == 2
    said = capsys.readouterr().err
    assert "cannot read the checkpoint" in said
    assert "another --output" in said
    assert "lr" not in said


# ------------------------------------------------------------------------------------------------- settings and tables


def test_a_config_that_has_changed_since_the_checkpoint_is_named(checkpoint):
    config = checkpoint.with_name("config.yaml")
    text = config.read_text()
    for changed in (text.replace("lr: 0.01", "lr: 0.03"), text.partition("batch_size")[0]):
        config.write_text(changed)
        with pytest.raises(DataError, match=r"config\.yaml is not what the run was started with: (lr|batch_size) is"):
            resume(checkpoint.parent)


@pytest.mark.parametrize(
    "text", ["model: 3", "data: [digits]", "epochs: 2.5", "epochs: true", "seed:", "compile: maybe", "lr: fast", ""]
)
def test_a_config_with_a_value_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_recipe(tmp_path / "config.yaml")


METRICS = "epoch,lr,train_loss,train_accuracy,val_loss,val_accuracy\n1,0.01,2.5,0.25,2.0,0.5\n2,0.01,1.5,0.5,1.0,0.75\n"
TIMING = "epoch,seconds,train_seconds,images_per_second,peak_memory\n1,2.5,2.0,100,1000\n2,2.0,1.5,120,1000\n"


@pytest.fixture
def measured(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "timing.csv").write_text(TIMING)
    _write(Measures("a", 0, 0.75, 10, 20, 100.0, 50.0, 1000.0, 0.25, (2.5, 2.0)), tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", ["metrics.csv", "timing.csv", MEASURES_FILE])
def test_a_flipped_bit_in_what_a_comparison_reads_is_noticed(measured, file):
    known, content = read_measures(measured), (measured / file).read_bytes()
    for place in places(content, 100):
        (measured / file).write_bytes(flipped(content, place))
        try:
            assert read_measures(measured) == known  # a space of the JSON may have become another
        except DataError as error:
            assert file in str(error)  # noqa: PT017
        else:
            assert content[place : place + 1].isspace()


def test_measures_of_an_older_run_are_read(measured):
    values = json.loads((measured / MEASURES_FILE).read_text())
    del values[DIGEST], values[FILES]
    (measured / MEASURES_FILE).write_text(json.dumps(values))
    assert read_measures(measured).accuracy == 0.75


@pytest.mark.parametrize(
    "text",
    [
        "",
        METRICS[:40],
        METRICS[:60],
        METRICS[:-4].rpartition(",")[0],
        METRICS.replace("0.75", "nan"),
        METRICS.replace("\n2,", "\n3,"),
        METRICS.replace("val_accuracy", "val_akkuracy"),
        METRICS.replace("1.5", "1\x005"),
        METRICS.replace("2,0.01", '2,"0.01'),
    ],
)
def test_a_cut_or_damaged_table_is_named(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(DataError, match=r"metrics\.csv: .*trained again"):
        read_rows(tmp_path)


def test_tables_of_different_lengths_are_noticed(tmp_path):
    (tmp_path / "metrics.csv").write_text(METRICS)
    (tmp_path / "timing.csv").write_text(TIMING[: TIMING.index("\n2,") + 1])
    with pytest.raises(DataError, match="not of the same epochs"):
        _of_training(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- data


def shard(file, count=12):
    with tarfile.open(file, "w") as tar:
        for number in range(count):
            for name, content in ((f"{number}.png", bytes([number]) * 100), (f"{number}.cls", b"%d" % (number % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def samples(folder):
    pictures = load_pictures(f"wds:{folder}")
    splits = (pictures.train, pictures.validation, pictures.test)
    return sorted((split.store.fetch(int(n)), int(split.store.labels[n])) for split in splits for n in split.chosen)


@pytest.fixture
def shards(tmp_path):
    for part in ("train", "val", "test"):
        shard(tmp_path / f"{part}-0.tar")
    return tmp_path


def test_a_cut_shard_is_noticed_wherever_it_was_cut(shards):
    whole, file = samples(shards), shards / "train-0.tar"
    content = file.read_bytes()
    members = 24 * 1024
    for length in (*range(0, members + 1024, 512), *places(content[: members + 1024], 50), members + 1023):
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"train-0\.tar.*Fetch it anew"):
            samples(shards)
    file.write_bytes(content[: members + 1024])  # what fills it up to a tape's block may be missing
    assert samples(shards) == whole


def test_what_lies_behind_a_shards_end_is_noticed(shards):
    file = shards / "train-0.tar"
    file.write_bytes(file.read_bytes() * 2)  # two of them in one: readers stop at the end of the first
    with pytest.raises(DataError, match=r"train-0\.tar"):
        samples(shards)


def test_an_index_that_is_damaged_or_of_other_shards_is_made_anew(shards):
    whole, index = samples(shards), shards / "nearsight-index.npz"
    content = index.read_bytes()
    for place in places(content, 50):
        index.write_bytes(flipped(content, place))
        assert samples(shards) == whole
    for length in (0, 10, 100, len(content) - 1):
        index.write_bytes(content[:length])
        assert samples(shards) == whole
    samples(shards)
    file = shards / "train-0.tar"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[1536] ^= 1  # the first picture's label
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    assert file.stat().st_size == before.st_size
    assert samples(shards) != whole


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


@pytest.mark.parametrize("way", ["label", "cut", "short", "gzip"])
def test_damaged_idx_files_are_named(tmp_path, way):
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 8, 8), dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 3))
    assert len(load_pictures("mnist", str(tmp_path)).test) == 20
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    content = labels.read_bytes()
    if way == "gzip":
        labels.unlink()
        packed = bytearray(gzip.compress(content))
        packed[-6] ^= 1  # its checksum
        labels.with_name(f"{labels.name}.gz").write_bytes(packed)
    else:
        labels.write_bytes({"label": content[:-1] + b"\xc8", "cut": content[:-1], "short": content[:3]}[way])
    with pytest.raises(DataError, match=str(tmp_path) + r".*[Ff]etch it anew"):
        load_pictures("mnist", str(tmp_path))
