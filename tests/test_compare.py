# SPDX-License-Identifier: Apache-2.0
"""Comparisons: the table against numbers worked out by hand, what they leave, and that they go on where they stopped."""

import csv
import html
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from nearsight.errors import DataError, OptionError, TrainingError
from nearsight.files import write_text
from nearsight.models import create_model
from nearsight.saved.weights import load_model
from nearsight.training import compare as comparison
from nearsight.training import compare_report, data
from nearsight.training.compare import Stopped, _alone, compare, run_name
from nearsight.training.compare_report import Comparison, Spread, common_accuracy, seconds_to, verdict
from nearsight.training.evaluate import evaluate
from nearsight.training.intervals import tango, wilson
from nearsight.training.measures import MEASURES_FILE, Measures, moved_by_a_pixel, read_measures
from nearsight.training.presets import PRESETS
from nearsight.training.recipe import Recipe, read_recipe
from nearsight.training.train import train

IN_A_PROCESS_OF_ITS_OWN, WHOLE_DIGITS = comparison._train, data.SOURCES["digits"]  # which a fixture below replaces
MODELS = ["sasa_nano", "sasa_nano,position=none"]
RECIPE = Recipe(epochs=2, batch_size=64, lr=0.01)
COLUMNS = {
    *("accuracy", "accuracy_sd", "parameters", "flops", "train_images_per_second", "inference_images_per_second"),
    *("peak_memory", "equivariance_error", "seconds_per_epoch", "seconds_to_target", "target"),
    *("size", "opt", "lr", "accuracy_low", "accuracy_high", "difference", "difference_low", "difference_high"),
}


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


# ------------------------------------------------------------------------------------------------------------ the table


def measured(model, seed, accuracy, seconds=(2.0, 3.0, 4.0)):
    return Measures(model, seed, accuracy, 1000, 5000, 100.0 + seed, 200.0, 1e6, 0.1 * (seed + 1), seconds)


def curve(*accuracies):
    return [{"epoch": n, "val_accuracy": a, "train_loss": 1 / n} for n, a in enumerate(accuracies, start=1)]


def hand_made():
    found = {("a", 0): measured("a", 0, 0.8), ("a", 1): measured("a", 1, 0.9), ("b", 0): measured("b", 0, 0.5)}
    epochs = {("a", 0): curve(0.5, 0.7, 0.8), ("a", 1): curve(0.6, 0.9, 0.8), ("b", 0): curve(0.3, 0.6, 0.7256)}
    return found, epochs


def test_the_table_is_mean_and_deviation_over_the_seeds():
    found, epochs = hand_made()
    a, b = Comparison.of({"": ["a", "b"]}, found, epochs).rows
    assert a.accuracy.mean == pytest.approx(0.85)
    assert a.accuracy.sd == pytest.approx(statistics.stdev([0.8, 0.9]))
    assert b.accuracy == Spread(0.5, None)  # one seed has no deviation
    assert a.equivariance_error.mean == pytest.approx(0.15)
    assert a.train_images_per_second == 100.5
    assert (a.seconds_per_epoch, a.seconds) == (3.0, 9.0)


def test_the_time_to_an_accuracy_ends_with_the_epoch_that_first_reaches_it():
    assert seconds_to(0.7, curve(0.5, 0.7, 0.8), (2.0, 3.0, 4.0)) == 5.0
    assert seconds_to(0.81, curve(0.5, 0.7, 0.8), (2.0, 3.0, 4.0)) is None
    found, epochs = hand_made()
    assert common_accuracy(list(epochs.values())) == 0.725  # the lowest of 0.8, 0.9 and 0.7256, to a tenth of a percent
    a, b = Comparison.of({"": ["a", "b"]}, found, epochs).rows
    assert (a.seconds_to_target, b.seconds_to_target) == ((9.0 + 5.0) / 2, 9.0)
    a, b = Comparison.of({"": ["a", "b"]}, found, epochs, target=0.85).rows
    assert (a.seconds_to_target, b.seconds_to_target) == (None, None)  # one seed of a does not reach it


def test_the_csv_has_a_line_per_model_and_leaves_empty_what_there_is_not():
    found, epochs = hand_made()
    table = Comparison.of({"first": ["a"], "second": ["b", "a"]}, found, epochs)
    lines = list(csv.DictReader(table.to_csv().splitlines()))
    assert [(line["group"], line["model"]) for line in lines] == [("first", "a"), ("second", "b"), ("second", "a")]
    assert set(lines[0]) >= COLUMNS
    assert lines[1]["accuracy_sd"] == ""
    assert [line["seed"] for line in csv.DictReader(table.runs_to_csv().splitlines())] == ["0", "1", "0"]


def answered(model, seed, answers):
    count = len(answers) - answers.count("-")
    return replace(measured(model, seed, answers.count("1") / count), size=8, opt="adamw", lr=0.01, answers=answers)


def table_of(answers):
    """From model -> its answers, one text per seed."""
    found = {(m, seed): answered(m, seed, one) for m, seeds in answers.items() for seed, one in enumerate(seeds)}
    return Comparison.of({"": list(answers)}, found, {key: curve(0.5, 0.6, 0.7) for key in found})


def test_differences_are_to_the_first_model_on_the_same_images_and_seeds():
    table = table_of({"a": ["1111100000"] * 2, "b": ["1111111100", "11111100--"]})
    a, b = table.rows
    assert (a.accuracy_low, a.accuracy_high) == pytest.approx(wilson(0.5, 10)[1:])
    assert a.difference is a.difference_low is a.difference_high is None
    assert b.difference == pytest.approx(2 / 8)  # without the images that one of the runs could not read: 3 and 1 of 8
    lines = list(csv.DictReader(table.runs_to_csv().splitlines()))
    assert "answers" not in lines[0]
    assert [line["difference"] for line in lines] == ["", "", "0.3", "0.125"]
    assert float(lines[2]["difference_low"]) == pytest.approx(tango(3, 0, 10).low)


@pytest.mark.parametrize(
    ("answers", "undecided", "said"),
    [
        ({"a": ["1" * 30 + "0" * 7], "b": ["1" * 32 + "0" * 5]}, ["a"], "no model is known to be ahead"),
        ({"a": ["1" * 37], "b": ["1" * 37]}, ["b"], "no model is known to be ahead"),
        ({"a": ["1" * 20 + "0" * 17], "b": ["1" * 37]}, [], "b is ahead of all others (100.00%) with this one seed"),
        ({"a": ["0" * 37] * 2, "b": ["1" * 37] * 2, "c": ["1" * 36 + "0"] * 2}, ["c"], "difference from c spans zero"),
        ({"a": ["1" * 37]}, [], "a: 100.00%"),
    ],
)
def test_a_model_is_ahead_only_where_no_interval_spans_zero(answers, undecided, said):
    table = table_of(answers)
    assert table.undecided == undecided
    assert said in verdict(table)


def test_runs_that_were_measured_on_other_images_are_not_held_against_each_other():
    with pytest.raises(DataError, match=r"a .* b were|b and a were measured on 3 and 4 test images: delete"):
        table_of({"a": ["111"], "b": ["1111"]})


def test_an_answer_that_does_not_move_has_no_equivariance_error_and_one_that_does_has():
    import torch
    from torch import nn

    images = torch.rand(4, 1, 6, 5)
    everywhere = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    corner = nn.Sequential(nn.Flatten(), nn.Linear(30, 2, bias=False))
    assert moved_by_a_pixel(everywhere, images) < 1e-6
    moves = [images.roll(move, (-2, -1)) for move in ((1, 0), (-1, 0), (0, 1), (0, -1))]
    still = corner(images)
    expected = max(((corner(moved) - still).abs().max() / still.abs().max()).item() for moved in moves)
    assert moved_by_a_pixel(corner, images) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- the comparison


@pytest.fixture(scope="module")
def here_and_small():
    """Runs in this process, on the digits with a tenth of the training images."""
    whole = data.SOURCES["digits"]

    def few(*args):
        pictures = whole(*args)
        parts = {name: getattr(pictures, name) for name in ("train", "validation", "test")}
        small = {name: data.ArraySplit(part.images[:128], part.labels[:128]) for name, part in parts.items()}
        return replace(pictures, **small)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, "digits", few)
        patch.setattr(comparison, "_train", lambda run, recipe, lock: train(recipe, run))
        patch.setattr("nearsight.training.train.write_report", lambda path, *rest: write_text(path, ""))
        yield


@pytest.fixture
def no_page(monkeypatch):
    """To draw it takes longer than to measure."""
    monkeypatch.setattr(comparison, "write_comparison", lambda *arguments: None)


@pytest.fixture(scope="module")
def compared(here_and_small, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    return output, compare({"": MODELS}, RECIPE, 2, output)


def test_a_comparison_leaves_table_plots_page_and_runs(compared):
    output, _ = compared
    lines = rows(output / "table.csv")
    assert [line["model"] for line in lines] == MODELS
    assert set(lines[0]) >= COLUMNS
    assert all(float(line["accuracy_sd"]) >= 0 and int(line["seeds"]) == 2 for line in lines)
    assert int(lines[0]["parameters"]) > int(lines[1]["parameters"])  # the position's vectors
    assert len(rows(output / "runs.csv")) == 4
    names = ("accuracy_parameters", "accuracy_flops", "accuracy_seconds", "validation_accuracy", "training_loss")
    assert {file.name for file in (output / "plots").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("csv", "png", "svg")
    }
    assert (output / "plots" / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "compare.html").read_text()
    assert page.count("<svg") == page.count('<div class="scroll" tabindex="0"><svg') == 5  # to be read on a phone
    assert "src=" not in page
    outside = page.replace("xlink:href", "").replace('href="data:text/csv;', "")
    assert "href=" not in outside  # only the drawings' own marks, and their numbers
    mean = statistics.fmean(float(line["accuracy"]) for line in rows(output / "runs.csv") if line["model"] == MODELS[0])
    assert f"{100 * mean:.2f} ±" in page


def test_the_measures_are_those_of_the_run(compared):
    output, table = compared
    run = output / "runs" / run_name("sasa_nano", 1)
    found = read_measures(run)
    assert found == table.measures["sasa_nano", 1]
    assert found.parameters == sum(
        p.numel() for p in create_model("sasa_nano", num_classes=10, in_chans=1).parameters()
    )
    timing = rows(run / "timing.csv")
    assert found.seconds == tuple(float(row["seconds"]) for row in timing)
    assert found.peak_memory == max(float(row["peak_memory"]) for row in timing)
    assert 0 < found.equivariance_error < 2


def test_the_answers_are_those_of_the_saved_network(compared):
    output, table = compared
    network, blueprint = load_model(output / "runs" / run_name("sasa_nano", 1))
    test = data.load_pictures("digits").test
    said = evaluate(network, data.loader(test.dataset(blueprint.view, training=False), 128, 0))
    found = table.measures["sasa_nano", 1]
    assert found.answers == "".join("01"[right] for right in (said.predictions == said.labels).tolist())
    assert (found.size, found.opt, found.lr) == (8, "adamw", 0.01)
    page = (output / "compare.html").read_text()
    assert "test images of 8 &times; 8 pixels" in page
    assert "highest test accuracy</dt>" not in page
    assert verdict(table)[1:] in html.unescape(page)


def test_measures_of_before_are_measured_again(compared, monkeypatch, no_page):
    output, table = compared
    file = output / "runs" / run_name("sasa_nano", 0) / MEASURES_FILE
    whole = file.read_text()
    values = json.loads(whole)
    file.write_text(
        json.dumps({name: values[name] for name in values if name not in ("size", "opt", "lr", "answers", "digest")})
    )
    monkeypatch.setattr(comparison, "_train", None)
    again = compare({"": MODELS}, RECIPE, 1, output)
    assert again.measures["sasa_nano", 0].answers == table.measures["sasa_nano", 0].answers
    file.write_text(whole)


def noted_runs(monkeypatch):
    """The recipes that a comparison trains by; nothing is trained."""
    recipes = {}

    def note(run, model, recipe, pictures, lock):
        recipes[run.name] = recipe
        return replace(answered(model, recipe.seed, "1100"), size=recipe.size, opt=recipe.opt, lr=recipe.lr)

    monkeypatch.setattr(comparison, "_measured", note)
    monkeypatch.setattr(comparison, "read_rows", lambda run: curve(0.5, 0.6, 0.7))
    monkeypatch.setattr(compare_report, "charts", lambda table: {})
    return recipes


def folder_of(path, size):
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for index in range(20):
            Image.new("RGB", (size + 9, size), (index, 0, 0)).save(path / name / f"{index}.png")
    return f"folder:{path}"


def test_all_models_see_pictures_of_one_size_the_largest_of_theirs(tmp_path, monkeypatch, capsys):
    recipes = noted_runs(monkeypatch)
    models = ["sasa_nano", "test_resnet"]  # 32 and 160
    photos = folder_of(tmp_path / "photos", 70)
    compare({"": models}, Recipe(data=photos), 1, tmp_path / "a")
    assert [recipe.size for recipe in recipes.values()] == [96, 96]  # 70 rounded up
    said = capsys.readouterr().out
    assert (
        "all models train on pictures of 96x96 (sasa_nano is made for 32x32, test_resnet is made for 160x160)" in said
    )
    assert {line["size"] for line in rows(tmp_path / "a" / "table.csv")} == {"96"}
    assert read_recipe(tmp_path / "a" / "compare.yaml").size == 96
    compare({"": ["sasa_nano"]}, Recipe(data=photos), 1, tmp_path / "a")  # what the folder has, it keeps
    assert recipes[run_name("sasa_nano", 0)].size == 96
    compare({"": models}, Recipe(data=photos, size=40), 1, tmp_path / "b")
    assert [recipe.size for recipe in recipes.values()] == [40, 40]
    compare({"": models}, Recipe(data=photos, size="own"), 1, tmp_path / "c")
    assert [recipe.size for recipe in recipes.values()] == [32, 160]
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "32, 160" in page
    assert "they did not see the same pixels" in page
    with pytest.raises(OptionError, match=r"size is own in .*compare.yaml; received 64"):
        compare({"": models}, Recipe(data=photos, size=64), 1, tmp_path / "c")


def test_a_finished_run_of_another_size_is_not_put_into_the_table(compared, tmp_path):
    run = tmp_path / "runs" / run_name("sasa_nano", 0)
    shutil.copytree(compared[0] / "runs" / run_name("sasa_nano", 0), run)
    with pytest.raises(OptionError, match="was trained on pictures of 8x8, and this comparison gives sasa_nano 12x12"):
        compare({"": ["sasa_nano"]}, replace(RECIPE, size=12), 1, tmp_path)


def test_a_model_may_have_its_own_learning_rate_and_optimiser(here_and_small, tmp_path, monkeypatch):
    recipes = noted_runs(monkeypatch)
    own = "conv_nano,lr=0.003,opt=sgd,stem_width=16,weight_decay=5e-4"
    compare({"": ["sasa_nano", own]}, RECIPE, 1, tmp_path)
    theirs, others = recipes[run_name(own, 0)], recipes[run_name("sasa_nano", 0)]
    settings = (theirs.model, theirs.lr, theirs.opt, theirs.weight_decay)
    assert settings == ("conv_nano,stem_width=16", 0.003, "sgd", 5e-4)
    assert (others.model, others.lr, others.opt, others.weight_decay) == ("sasa_nano", 0.01, "adamw", 0.05)
    assert [(line["model"], line["lr"], line["opt"]) for line in rows(tmp_path / "table.csv")] == [
        ("sasa_nano", "0.01", "adamw"),
        (own, "0.003", "sgd"),
    ]
    page = (tmp_path / "compare.html").read_text()
    assert own in page
    assert "sgd, lr 0.003" in page
    assert "learning rate 0.01 unless a model has its own" in page


def test_what_is_finished_is_not_trained_again_and_models_can_be_added(compared, monkeypatch, no_page):
    output, table = compared
    trained = []

    def noted(run, recipe, lock):
        trained.append(run.name)
        train(recipe, run)

    monkeypatch.setattr(comparison, "_train", noted)
    again = compare({"": MODELS}, RECIPE, 2, output)
    assert trained == []
    assert again.rows == table.rows
    (output / "runs" / run_name("sasa_nano", 0) / MEASURES_FILE).unlink()  # killed between training and measuring
    more = compare({"": [*MODELS, "sasa_nano,kernel_size=5"]}, RECIPE, 1, output)
    assert trained == [run_name("sasa_nano,kernel_size=5", 0)]
    assert more.rows[0].accuracy.mean == table.measures["sasa_nano", 0].accuracy


def test_another_recipe_in_the_same_folder_is_refused(compared):
    with pytest.raises(OptionError, match=r"share one recipe: epochs is 2 in .*compare\.yaml; received 3"):
        compare({"": MODELS}, replace(RECIPE, epochs=3), 1, compared[0])


def test_two_comparisons_do_not_work_in_one_folder(compared):
    with (
        _alone(compared[0]),
        pytest.raises(TrainingError, match="still at work"),
    ):
        compare({"": MODELS}, RECIPE, 1, compared[0])


@pytest.mark.parametrize(
    ("groups", "seeds", "target", "message"),
    [
        ({"": []}, 1, None, "there is nothing to compare"),
        ({"": ["sasa_nano", "sasa_nano"]}, 1, None, "once; received 'sasa_nano' twice"),
        ({"": ["a b", "a_b"]}, 1, None, "share a folder's name"),
        ({"": ["sasa_nano"]}, 0, None, "seeds must be at least 1; received 0"),
        ({"": ["sasa_nano"]}, 1, 1.5, "target must be an accuracy above 0 and up to 1; received 1.5"),
        ({"": ["sasa_nan"]}, 1, None, "did you mean sasa_nano"),
        ({"": ["sasa_nano,img_size=64"]}, 1, None, "give the size of the pictures as --size 64"),
        ({"": ["sasa_nano", "sasa_nano,epochs=3"]}, 1, None, "epochs is no option of a network .* give --epochs"),
        ({"": ["sasa_nano,lr=fast"]}, 1, None, "lr must be a number; received 'fast'"),
        ({"": ["sasa_nano,opt=3"]}, 1, None, "opt must be a name; received 3"),
        ({"": ["sasa_nano,opt=adamm"]}, 1, None, "opt must be an optimiser of timm; received 'adamm'"),
        ({"": ["conv_nano,num_heads=2"]}, 1, None, "'conv_nano' has no attention, and so no num_heads"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(here_and_small, groups, seeds, target, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        compare(groups, RECIPE, seeds, tmp_path / "new", target=target)
    assert not (tmp_path / "new").exists()


def test_the_article_has_its_questions_and_its_models_exist():
    groups = PRESETS["article"]
    assert set(groups) == {"what looks", "kernel size", "position", "block"}
    for model in {model for models in groups.values() for model in models}:
        assert create_model(model, num_classes=10, in_chans=1) is not None
    asked = " ".join(model for models in groups.values() for model in models)
    for word in ("conv_micro", "vit_micro", "global", "stem=attention", "position=none", "position=learned"):
        assert word in asked
    assert all(f"kernel_size={k}" in asked for k in (3, 5, 9, 11))


@pytest.mark.sweep
def test_a_comparison_that_was_killed_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """kill -9 of everything in the midst of the second run: the first stays, the second goes on from its checkpoint."""
    one, other = (f"test_vit,patch_size={size}" for size in (8, 4))
    recipe = Recipe(data="digits", epochs=2, batch_size=256, lr=0.001)
    monkeypatch.setitem(data.SOURCES, "digits", WHOLE_DIGITS)  # as the other process has it
    monkeypatch.setattr(comparison, "_train", lambda run, recipe, lock: train(recipe, run))
    compare({"": [one]}, recipe, 1, tmp_path)
    monkeypatch.setattr(comparison, "_train", IN_A_PROCESS_OF_ITS_OWN)
    first, second = (tmp_path / "runs" / run_name(model, 0) for model in (one, other))
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    command = [
        *(sys.executable, "-m", "nearsight", "compare", "--models", one, other, "--data=digits", "--epochs=2"),
        *("--batch-size=256", "--lr=0.001", "--seeds=1", f"--output={tmp_path}"),
    ]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True) as process:
        while not (second / "last.ckpt").exists():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (second / "report.html").exists()
    table = compare({"": [one, other]}, recipe, 1, tmp_path)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [row["epoch"] for row in rows(second / "metrics.csv")] == ["1", "2"]
    assert [row.model for row in table.rows] == [one, other]


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch):
    class Child:
        stderr, returncode = iter(()), 0
        signals: list[int] = []  # noqa: RUF012

        def __init__(self, *arguments, **keywords):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def send_signal(self, number):
            self.signals.append(number)

        def wait(self):
            if not self.signals:
                raise KeyboardInterrupt

    monkeypatch.setattr(comparison.subprocess, "Popen", Child)
    with pytest.raises(Stopped, match="the same command goes on from there"):
        IN_A_PROCESS_OF_ITS_OWN(tmp_path, RECIPE, 0)
    assert Child.signals == [signal.SIGINT]


def test_measuring_leaves_out_as_many_broken_pictures_as_the_recipe_allows(tmp_path, monkeypatch):
    """Else a run that was trained with --max-broken could not be measured, and its comparison never end."""
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        return SimpleNamespace(is_whole=True, size=8)

    monkeypatch.setattr(comparison, "measure", measure)
    (tmp_path / comparison.REPORT_FILE).touch()  # as a run leaves it that has been trained
    comparison._measured(tmp_path, "sasa_nano", Recipe(max_broken=77, batch_size=8, size=8), None, 0)
    assert [arguments[-1] for arguments in asked] == [77]
