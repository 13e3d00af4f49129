# SPDX-License-Identifier: Apache-2.0
"""Runs: what they leave, that they repeat and resume exactly, and that they stop well."""

import csv
import errno
import io
import os
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
import yaml

from nearsight import files
from nearsight.cli import main
from nearsight.errors import DataError, OptionError, TrainingError
from nearsight.saved.weights import RECIPE as RECIPE_KEY
from nearsight.saved.weights import load_model, read_checkpoint
from nearsight.training import data
from nearsight.training.data import loader
from nearsight.training.evaluate import evaluate
from nearsight.training.recipe import Recipe, read_recipe
from nearsight.training.task import Classifier
from nearsight.training.train import Interrupted, _is_same, default_output, image_size, resume, train

FILES = {
    "config.json",
    "config.yaml",
    "last.ckpt",
    "metrics.csv",
    "model.safetensors",
    "report.html",
    "timing.csv",
    "trained.npz",
}


@pytest.fixture(scope="module")
def few_digits():
    """The digits with a tenth of the training images: a run takes a second."""
    whole = data.SOURCES["digits"]

    def few(*args):
        pictures = whole(*args)
        parts = {name: getattr(pictures, name) for name in ("train", "validation", "test")}
        small = {name: data.ArraySplit(part.images[:128], part.labels[:128]) for name, part in parts.items()}
        return replace(pictures, **small)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "digits", few)
        yield


RECIPE = Recipe(epochs=3, batch_size=64, lr=0.01)


@pytest.fixture
def no_report(monkeypatch):
    """To draw it takes longer than to train."""
    monkeypatch.setattr("nearsight.training.train.write_report", lambda *arguments: None)


@pytest.fixture(scope="module")
def run(few_digits, tmp_path_factory):
    return train(RECIPE, tmp_path_factory.mktemp("run") / "whole")


def stop_in_epoch_3(monkeypatch, error):
    """What happens in the third epoch's first step."""
    step = Classifier.training_step

    def stumble(self, batch, index):
        if self.current_epoch == 2:
            raise error
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", stumble)


def rows(output: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((output / "metrics.csv").read_text())))


def test_a_run_leaves_the_files_of_the_contract_and_nothing_else(run):
    assert {file.name for file in run.output.iterdir()} == FILES
    assert [row["epoch"] for row in rows(run.output)] == ["1", "2", "3"]
    assert list(rows(run.output)[0]) == ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]


def test_the_loss_falls(run):
    first, *_, last = rows(run.output)
    assert float(last["train_loss"]) < 0.9 * float(first["train_loss"])


def test_the_config_reruns_it_to_the_same_bytes(run, tmp_path, no_report):
    again = train(read_recipe(run.output / "config.yaml"), tmp_path / "again")
    for name in ("metrics.csv", "model.safetensors", "config.yaml"):
        assert (again.output / name).read_bytes() == (run.output / name).read_bytes(), name


def test_another_seed_gives_another_run(run, tmp_path, no_report):
    other = train(replace(RECIPE, seed=1, epochs=1), tmp_path / "other")
    assert rows(other.output)[0]["train_loss"] != rows(run.output)[0]["train_loss"]


@pytest.mark.parametrize("file", [".", "model.safetensors", "last.ckpt"])
def test_the_trained_model_is_rebuilt_with_its_answers(run, few_digits, file):
    model, blueprint = load_model(run.output / file)
    assert blueprint.classes == tuple("0123456789")
    pictures = data.load_pictures("digits")
    test = pictures.test.dataset(blueprint.view, training=False)
    result = evaluate(model, loader(test, 50, workers=0))
    torch.testing.assert_close(result.logits, run.evaluation.logits)
    assert result.accuracy == run.evaluation.accuracy
    assert result.confusion.sum() == len(test)
    assert result.confusion.trace() == result.correct


def test_ctrl_c_says_how_to_go_on_and_resume_ends_where_the_whole_run_did(run, tmp_path, monkeypatch, no_report):
    output = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_in_epoch_3(patch, KeyboardInterrupt())
        with pytest.raises(
            Interrupted, match=f"stopped in epoch 3; go on with: nearsight train --resume --output {output}"
        ):
            train(RECIPE, output)
    assert len(rows(output)) == 2
    assert not (output / "model.safetensors").exists()
    resume(output)
    for name in ("metrics.csv", "model.safetensors", "config.yaml"):
        assert (output / name).read_bytes() == (run.output / name).read_bytes(), name


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(few_digits, tmp_path, monkeypatch):
    def poison(self):
        if self.current_epoch == 1:
            torch.nn.utils.vector_to_parameters(torch.full((85_000_000,), torch.nan), self.model.parameters())

    monkeypatch.setattr(Classifier, "on_train_epoch_start", poison)
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 2, step 1: .*smaller --lr than 0\.01"):
        train(RECIPE, tmp_path)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["state_dict"].values())
    assert len(rows(tmp_path)) == 1


def test_a_run_at_another_size_says_so_everywhere_and_is_measured_and_resumed_at_it(few_digits, tmp_path, capsys):
    """Global attention keeps a table for every offset of the map: it is made for the size."""
    name = "sasa_nano,kernel_size=global,depths=[1,1],widths=[8,8],num_heads=2,lr=0.002"
    recipe = Recipe(model=name, size=13, epochs=1, batch_size=64, lr=0.5)
    found = train(recipe, tmp_path)
    assert "13x13x1 (scaled from 8x8)" in capsys.readouterr().out
    kept = read_recipe(tmp_path / "config.yaml")
    assert (kept.size, kept.lr, kept.model) == (13, 0.002, name.removesuffix(",lr=0.002"))
    assert "13 &times; 13 pixels" in (tmp_path / "report.html").read_text()
    model, blueprint = load_model(tmp_path)
    assert (blueprint.view.size, blueprint.img_size) == (13, 13)
    test = data.load_pictures("digits").test
    again = evaluate(model, loader(test.dataset(blueprint.view, training=False), 64, 0))
    assert again.accuracy == found.evaluation.accuracy
    assert any(2 * 13 - 1 in table.shape for table in model.parameters())
    # The command that began it goes on, and so does one whose config does not name the size yet.
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config.pop("size")
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    checkpoint[RECIPE_KEY].pop("size")
    torch.save(checkpoint, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    resumed = resume(tmp_path, {"model": name, "size": 13, "lr": 0.5})
    assert (resumed.recipe.size, resumed.recipe.lr) == (13, 0.002)
    with pytest.raises(OptionError, match=r"size is 13 in .*received 8"):
        resume(tmp_path, {"size": 8})


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"size": 0}, "size must be at least 1; received 0"),
        ({"size": "large"}, "size must be a whole number of pixels or own; received 'large'"),
        ({"size": True}, "size must be a whole number"),
        ({"model": "sasa_nano,img_size=64"}, "leave it out of .* --size 64"),
        ({"model": "vit_micro,img_size=64"}, "leave it out of .* --size 64"),
        ({"model": "vit_micro", "size": 3}, "cannot take 3x3 images: .*; --size trains it on others"),
        ({"model": "sasa_nano,seed=3"}, "give --seed"),
        ({"model": "sasa_nano,drop-path=0.1"}, "give --drop-path"),
    ],
)
def test_sizes_and_options_that_cannot_be_are_refused_before_anything_is_written(recipe, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        train(Recipe(**{"epochs": 1, **recipe}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_size_may_be_the_models_own(few_digits):
    pictures = data.load_pictures("digits")
    sizes = [image_size(Recipe(model="vit_micro", size=size), pictures) for size in (None, "own", 20)]
    assert sizes == [8, 32, 20]


def test_resume_refuses_other_settings_and_a_folder_without_a_checkpoint(run, tmp_path):
    with pytest.raises(OptionError, match=r"a resumed run keeps its settings: epochs is 3 in .*; received 9"):
        resume(run.output, {"epochs": 9})
    with pytest.raises(TrainingError, match=r"there is no checkpoint .*last\.ckpt to resume from"):
        resume(tmp_path)


def test_resume_takes_the_runs_own_settings_however_they_are_typed(run, tmp_path, monkeypatch):
    """The command line reads 32 as a number, a recipe's null leaves a setting open, and a model has several spellings."""
    seen = []
    monkeypatch.setattr("nearsight.training.train._run", lambda recipe, *_, **__: seen.append(recipe))
    noted = read_recipe(run.output / "config.yaml")
    for given in ({"precision": 32}, {"precision": "32"}, {"epochs": None, "lr": None}, {"lr": 1e-2, "epochs": 3}):
        resume(run.output, given)
        assert seen.pop() == noted
    for flags in (["--precision", "32"], ["--precision=32", "--lr", "1e-2", "--no-compile", "--seed", "0"]):
        assert main(["train", "--resume", "--output", str(run.output), *flags]) == 0
        assert seen.pop() == noted
    (tmp_path / "asked.yaml").write_text("precision: 32\nlr: 1e-2\nopt: null\nbatch_size: 64\ntensorboard: no\n")
    assert main(["train", "--resume", "--output", str(run.output), "--config", str(tmp_path / "asked.yaml")]) == 0
    assert seen.pop() == noted
    with pytest.raises(OptionError, match=r"precision is 32 in .*; received bf16"):
        resume(run.output, {"precision": "bf16"})
    assert _is_same("model", "sasa_nano, kernel_size = 5", Recipe(model="sasa_nano,kernel_size=5"))
    assert not _is_same("model", "sasa_nano,kernel_size=3", Recipe(model="sasa_nano,kernel_size=5"))


def test_a_folder_that_holds_a_run_is_not_overwritten(run):
    before = (run.output / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=r"holds a run already: continue it with --resume"):
        train(RECIPE, run.output)
    assert (run.output / "model.safetensors").read_bytes() == before


def test_an_output_that_cannot_be_made_is_reported(few_digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"cannot make the folder .*file/run: Not a directory"):
        train(RECIPE, tmp_path / "file" / "run")


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_checkpoint_is_refused(run, tmp_path, keep):
    for name in ("config.yaml", "last.ckpt"):
        content = (run.output / name).read_bytes()
        (tmp_path / name).write_bytes(content[:keep] if name == "last.ckpt" else content)
    with pytest.raises(DataError, match=r"cannot read the checkpoint .*last\.ckpt: it is truncated"):
        resume(tmp_path)


def test_a_truncated_model_file_is_refused(run, tmp_path):
    broken = tmp_path / "model.safetensors"
    broken.write_bytes((run.output / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"cannot read .*model\.safetensors: .*is it a whole safetensors file"):
        load_model(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_that_would_run_code_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"nearsight": Bomb(), "state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(DataError, match="cannot read the checkpoint"):
        load_model(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("text", ["model: [", "epochs: many\nmodel: sasa_nano", "surprise: 1", "- 1", "\x00"])
def test_a_damaged_config_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_recipe(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1; received 0"),
        ({"batch_size": -1}, "batch-size must be at least 1; received -1"),
        ({"lr": -0.1}, r"lr must be a positive number; received -0\.1"),
        ({"lr": float("nan")}, "lr must be a positive number; received nan"),
        ({"seed": -1}, "seed must be at least 0; received -1"),
        ({"seed": 2**32}, "seed must be below"),
        ({"devices": 0}, "devices must be at least 1; received 0"),
        (
            {"devices": 2, "batch_size": 33},
            "batch-size must be a multiple of devices x nodes x accumulate; received 33 for 2 x 1 x 1",
        ),
    ],
)
def test_settings_outside_their_range_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Recipe(**values)


def test_the_defaults_are_the_datas_own_and_land_in_the_config(run):
    defaults = data.load_pictures("digits").defaults
    filled = Recipe(lr=1.0).filled(defaults)
    assert {name: getattr(filled, name) for name in defaults} == {**defaults, "lr": 1.0}
    assert (filled.opt, filled.weight_decay, filled.workers) == ("adamw", 0.05, None)
    assert yaml.safe_load((run.output / "config.yaml").read_text())["epochs"] == 3


def test_an_unknown_model_and_one_that_cannot_take_the_images_are_refused(few_digits, tmp_path):
    with pytest.raises(OptionError, match="did you mean sasa_nano"):
        train(Recipe(model="sasa_nan"), tmp_path / "a")
    with pytest.raises(OptionError, match=r"model 'vit_tiny_patch16_224' cannot take 8x8 images"):
        train(Recipe(model="vit_tiny_patch16_224"), tmp_path / "b")


def test_default_outputs_are_plain_folder_names():
    assert default_output(Recipe()) == Path("runs/sasa_nano-digits")
    assert default_output(Recipe(data="folder:/my photos/../x")).parent == Path("runs")


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    target = tmp_path / "file"
    files.write_text(target, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"cannot write .*file: No space left on device"):
        files.write_text(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


class Page(HTMLParser):
    """The tags of a page, and whether each is closed."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_report_is_one_page_with_described_pictures(run):
    text = (run.output / "report.html").read_text()
    assert text.count("<svg") == text.count('<div class="scroll" tabindex="0"><svg') > 2  # to be read on a phone
    page = Page(text)
    assert page.open == []
    pictures = [attributes for tag, attributes in page.found if tag == "svg"]
    assert len(pictures) == 7  # curve, confusion, four images, the heads of one
    assert all(picture["role"] == "img" and len(picture["aria-label"]) > 20 for picture in pictures)
    assert "stages.0.0.spatial: most weight" in pictures[2]["aria-label"]
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    outside = [value for _, attributes in page.found for name, value in attributes.items() if name in ("src", "href")]
    assert all(value.startswith("data:text/csv;charset=utf-8,") for value in outside)
    assert f"{100 * run.evaluation.accuracy:.2f} %" in text


def test_every_picture_of_the_report_can_be_had_as_numbers(run):
    page = Page((run.output / "report.html").read_text())
    links = [attributes for tag, attributes in page.found if tag == "a"]
    assert len(links) == sum(tag == "svg" for tag, _ in page.found)
    tables = {
        link["download"]: list(csv.DictReader(io.StringIO(unquote(link["href"].partition(",")[2])))) for link in links
    }
    assert list(tables) == ["learning_curve.csv", "confusion.csv", *(f"weights_{n}.csv" for n in range(1, 6))]
    curve = [float(line["y"]) for line in tables["learning_curve.csv"] if line["series"] == "validation"]
    metrics = list(csv.DictReader(io.StringIO((run.output / "metrics.csv").read_text())))
    assert curve[: len(metrics)] == pytest.approx([float(row["val_loss"]) for row in metrics])
    assert curve[len(metrics) :] == pytest.approx([100 * float(row["val_accuracy"]) for row in metrics])
    counts = [int(line["images"]) for line in tables["confusion.csv"]]
    assert counts == run.evaluation.confusion.flatten().tolist()
    weights = {}
    for line in tables["weights_5.csv"]:
        head = line["layer"], line["head"]
        weights[head] = weights.get(head, 0) + float(line["weight"])
    assert len(weights) == 16
    assert list(weights.values()) == pytest.approx([1] * 16, abs=1e-4)


def test_a_network_without_attention_trains_and_says_so(few_digits, tmp_path):
    run = train(Recipe(model="test_resnet", epochs=1), tmp_path)
    assert "no attention layer" in (run.output / "report.html").read_text()
