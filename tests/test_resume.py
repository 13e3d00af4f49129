# SPDX-License-Identifier: Apache-2.0
"""A run that is stopped at any moment goes on to the bytes it would have had; its files are whole or not there."""

import gzip
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nearsight import files
from nearsight.errors import TrainingError
from nearsight.files import remove_leftovers, write_bytes
from nearsight.models.halonet import HaloNet
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, read_checkpoint
from nearsight.training import task
from nearsight.training.data import SplitSampler
from nearsight.training.optimizer import make_optimizer
from nearsight.training.recipe import Recipe
from nearsight.training.task import Classifier
from nearsight.training.train import Interrupted, resume, train

# All that draws or keeps something: mean of the weights, mixup, dropped paths, erased rectangles, workers that augment.
STATEFUL = {"ema_decay": 0.9, "mixup": 0.4, "random_erasing": 0.3, "drop_path": 0.2, "accumulate": 2, "workers": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures with a class each for what is light and dark."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (folder / name).mkdir()
        for index in range(16):
            pixels = generator.integers(96 * number, 128 + 96 * number, (12, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr("nearsight.training.train.write_report", lambda *arguments: None)


def recipe_for(photos):
    model = "sasa_nano,depths=[1],widths=[8],num_heads=2,stem_width=8"
    return Recipe(model=model, data=f"folder:{photos}", epochs=2, batch_size=8, **STATEFUL)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearsight.training.train.write_report", lambda *arguments: None)
        train(recipe_for(photos), output)
    return output


def stopped_and_resumed(photos, output, monkeypatch):
    step = Classifier.training_step

    def stop(self, batch, index):
        if self.current_epoch == 1 and index == 3:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stop)
        with pytest.raises(Interrupted, match="stopped in epoch 2; go on with"):
            train(recipe_for(photos), output)
    torch.manual_seed(99)  # another process would have other random numbers
    resume(output)


def differences(one, other, path=""):
    """Where two nests of dicts, lists, tensors and values are not the same, to the bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        keys = [path] if one.keys() != other.keys() else []
        return keys + [found for key in one for found in differences(one[key], other.get(key), f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=True)
        return [found for place, pair in enumerate(pairs) for found in differences(*pair, f"{path}/{place}")]
    return [] if one == other else [path]


STATE = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def ends_alike(whole, output):
    for name in ("metrics.csv", "model.safetensors"):
        if (output / name).read_bytes() != (whole / name).read_bytes():
            return False
    one, other = (read_checkpoint(folder / "last.ckpt") for folder in (whole, output))
    return differences({name: one[name] for name in STATE}, {name: other[name] for name in STATE}) == []


@pytest.mark.slow
def test_a_resumed_run_ends_bit_identical_in_all_its_state(whole, photos, tmp_path, monkeypatch):
    stopped_and_resumed(photos, tmp_path, monkeypatch)
    assert any(name.startswith("ema.") for name in read_checkpoint(tmp_path / "last.ckpt")["state_dict"])
    assert ends_alike(whole, tmp_path)


def forget_the_epoch(patch):
    patch.setattr(SplitSampler, "set_epoch", lambda self, epoch: None)


def draw_from_where_the_process_stands(patch):
    patch.setattr(task, "seed_all", lambda *numbers: None)


def lose_the_mean(patch):
    save = Classifier.on_save_checkpoint

    def without(self, checkpoint):
        save(self, checkpoint)
        weights = checkpoint["state_dict"]
        for name in [name for name in weights if name.startswith("ema.module.")]:
            weights[name] = weights["model." + name.removeprefix("ema.module.")]

    patch.setattr(Classifier, "on_save_checkpoint", without)


def lose_the_optimiser(patch):
    patch.setattr(Classifier, "on_save_checkpoint", _without_moments(Classifier.on_save_checkpoint))


def _without_moments(save):
    def without(self, checkpoint):
        save(self, checkpoint)
        for state in checkpoint["optimizer_states"]:
            for moments in state["state"].values():
                moments["exp_avg"] = torch.zeros_like(moments["exp_avg"])

    return without


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        lose_the_optimiser,
        *(
            pytest.param(fault, marks=pytest.mark.sweep)
            for fault in (forget_the_epoch, draw_from_where_the_process_stands, lose_the_mean)
        ),
    ],
)
def test_the_comparison_sees_what_is_not_restored(fault, whole, photos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fault(patch)
        stopped_and_resumed(photos, tmp_path, monkeypatch)
    assert not ends_alike(whole, tmp_path)


# ---------------------------------------------------------------------------------------------- real data, real signals

GARMENTS = Path("/usr/share/datasets/fashion-mnist")
SIZES = {"train": 1200, "t10k": 200}


@pytest.fixture(scope="module")
def garments(tmp_path_factory):
    """The first pictures of Fashion-MNIST, as Debian's package dataset-fashion-mnist installs it."""
    folder = tmp_path_factory.mktemp("garments")
    for part, count in SIZES.items():
        for kind, rank, size in (("images", 3, 28 * 28), ("labels", 1, 1)):
            name = f"{part}-{kind}-idx{rank}-ubyte"
            content = gzip.decompress((GARMENTS / f"{name}.gz").read_bytes())
            header = 4 + 4 * rank
            body = content[:4] + count.to_bytes(4, "big") + content[8:header] + content[header:][: count * size]
            (folder / name).write_bytes(body)
    return folder


def train_command(garments, output, devices=2):
    return [
        *(sys.executable, "-m", "nearsight", "train", "--model=test_vit,patch_size=7"),
        *("--data=fashion-mnist", f"--data-root={garments}", "--epochs=2", "--batch-size=40", "--lr=0.003"),
        *(f"--devices={devices}", "--ema-decay=0.9", f"--output={output}"),
    ]


@pytest.mark.sweep
def test_two_processes_learn_fashion_mnist_and_survive_a_kill_to_the_same_bytes(garments, tmp_path):
    """kill -9 of both processes in the midst of an epoch; what the second command makes of it is what one run makes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(train_command(garments, whole), env=environment, check=True)
    said = (whole / "metrics.csv").read_text().splitlines()
    assert float(said[-1].split(",")[-1]) > 0.2  # validation accuracy after two epochs of 1,080 pictures; chance is 0.1

    process = subprocess.Popen(train_command(garments, killed), env=environment, start_new_session=True)
    while not (killed / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "model.safetensors").exists()
    read_checkpoint(killed / "last.ckpt")
    resumed = [sys.executable, "-m", "nearsight", "train", "--resume", f"--output={killed}"]
    subprocess.run(resumed, env=environment, check=True)
    for name in ("metrics.csv", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert list(killed.glob(".*")) == []


# ------------------------------------------------------------------------------------------------------ files and disks


def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    """Twenty writers in turn, each killed with -9 while it replaces the file over and over."""
    target, contents = tmp_path / "file", [letter * 3_000_000 for letter in (b"a", b"b")]
    write_bytes(target, contents[0])
    littered = False
    for round in range(20):
        child = os.fork()
        if child == 0:
            while True:
                for content in contents:
                    write_bytes(target, content)
        time.sleep(0.003 * round)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert target.read_bytes() in contents
        littered |= len(list(tmp_path.iterdir())) > 1
        remove_leftovers(tmp_path)
        assert list(tmp_path.iterdir()) == [target]
    assert littered  # some were in the midst of it


def test_a_power_cut_finds_the_content_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Written, flushed to the disk, renamed, and the renaming flushed too: in this order."""
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def noted(*arguments, name=name, original=original):
            folder = name == "fsync" and Path(f"/proc/self/fd/{arguments[0]}").is_dir()
            done.append("fsync of the folder" if folder else name)
            size = None if folder or name != "fsync" else os.fstat(arguments[0]).st_size
            assert size in (None, 7)  # all of it has left the buffers of the process
            return original(*arguments)

        monkeypatch.setattr(files.os, name, noted)
    write_bytes(tmp_path / "file", b"content")
    assert done == ["fsync", "replace", "fsync of the folder"]


@contextmanager
def no_file_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_the_run_and_the_last_checkpoint_goes_on(whole, photos, tmp_path, monkeypatch):
    limit = (whole / "last.ckpt").stat().st_size // 2
    begin = Classifier.on_train_epoch_start

    def fill(self):
        if self.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        begin(self)

    with no_file_larger_than(resource.getrlimit(resource.RLIMIT_FSIZE)[0]), monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_train_epoch_start", fill)
        with pytest.raises(TrainingError, match=r"cannot write .*last\.ckpt: File too large"):
            train(recipe_for(photos), tmp_path)
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == 0
    assert list(tmp_path.glob(".*")) == []
    resume(tmp_path)
    assert ends_alike(whole, tmp_path)


def as_one(checkpoint, names):
    """A checkpoint as of when layers held one ``qkv``; ``names`` are those of the optimiser's parameters, in order."""
    weights, (state,) = checkpoint["state_dict"], checkpoint["optimizer_states"]
    joined, places, groups = {}, {}, []
    for name, weight in weights.items():
        joined.setdefault(name.replace(".q.", ".qkv.").replace(".kv.", ".qkv."), []).append(weight)
    for group in state["param_groups"]:
        before = len(places)
        for number in group["params"]:
            places.setdefault(names[number].replace(".q.", ".qkv.").replace(".kv.", ".qkv."), []).append(number)
        groups.append({**group, "params": list(range(before, len(places)))})
    states = {
        number: {
            key: torch.cat([state["state"][one][key] for one in parts]) if value.ndim else value
            for key, value in state["state"][parts[0]].items()
        }
        for number, parts in enumerate(places.values())
    }
    return {
        "state_dict": {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()},
        "optimizer_states": [{"state": states, "param_groups": groups}],
    }


def test_a_run_from_before_queries_were_projected_apart_goes_on():
    """Weights, their mean and what the optimiser knows of each: nothing of it is lost or goes to another parameter."""
    network = HaloNet((1, 1), widths=(8, 16), num_heads=2, block_size=4, halo_size=1, stem_width=8, num_classes=2)
    recipe = Recipe(ema_decay=0.9).filled({"label_smoothing": 0.0, "lr": 0.1, "opt": "adamw", "weight_decay": 0.1})
    blueprint = Blueprint("halo_h0", ("a", "b"), View(3, 16, (0.5,) * 3, (0.5,) * 3), "nothing")
    then, now = (Classifier(deepcopy(network), nn.Identity(), blueprint, recipe) for _ in range(2))
    optimizer = make_optimizer(then.model, recipe)
    for _ in range(2):
        then.model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    expected = {"state_dict": then.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    names = {parameter: name for name, parameter in then.model.named_parameters()}
    old = as_one(expected, [names[parameter] for group in optimizer.param_groups for parameter in group["params"]])
    assert len(old["optimizer_states"][0]["state"]) == len(names) - 2
    assert "model.stages.0.0.spatial.qkv.weight" in old["state_dict"]
    now.on_load_checkpoint(old)
    now.load_state_dict(old["state_dict"])
    torch.testing.assert_close(now.state_dict(), expected["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(old["optimizer_states"], expected["optimizer_states"], rtol=0, atol=0)
    make_optimizer(now.model, recipe).load_state_dict(old["optimizer_states"][0])
