# SPDX-License-Identifier: Apache-2.0
"""Steps in parts: what mixup and cutmix do with few or an odd number of pictures, and what batch norms make of parts."""

from types import SimpleNamespace

import pytest
import torch
from timm.data.mixup import Mixup
from torch import nn

from nearsight.errors import OptionError
from nearsight.training.announce import _remarks
from nearsight.training.data.decoded import seed_all
from nearsight.training.recipe import Recipe
from nearsight.training.report import _curve
from nearsight.training.task import Batches, Classifier, Mixed

KINDS = {"mixup": (1.0, 0.0), "cutmix": (0.0, 1.0), "either": (1.0, 1.0)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_even_number_is_mixed_as_timm_does(kind):
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    mixed = []
    for mix in (Mixup, Mixed):
        seed_all(3)
        mixed.append(mix(*KINDS[kind], label_smoothing=0.1, num_classes=6)(images.clone(), labels))
    assert all(map(torch.equal, *mixed))
    assert not torch.equal(mixed[0][0], images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [3, 5])
def test_an_odd_number_is_mixed_without_loss(kind, count):
    """Every picture in the share that its class has, and the middle one as it was."""
    images = torch.eye(count)[:, :, None, None].expand(-1, -1, 20, 20).contiguous()  # a channel for each picture
    seed_all(1)
    mixed, targets = Mixed(*KINDS[kind], label_smoothing=0.0, num_classes=count)(images.clone(), torch.arange(count))
    assert (len(mixed), len(targets)) == (count, count)
    torch.testing.assert_close(mixed.mean((2, 3)), targets)
    assert torch.equal(mixed[count // 2], images[count // 2])
    assert not torch.equal(mixed[0], images[0])


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize(
    "parts", [{"batch_size": 1}, {"batch_size": 8, "accumulate": 8}, {"batch_size": 2, "devices": 2}]
)
def test_one_picture_per_part_cannot_be_mixed(mix, parts):
    with pytest.raises(OptionError, match="mixup and cutmix need two images or more in each part of a step"):
        Recipe(**{mix: 0.2}, **parts)
    assert Recipe(**{mix: 0.0}, **parts).batch_size == parts["batch_size"]
    assert Recipe(**{mix: 0.2}, **{**parts, "batch_size": 2 * parts["batch_size"]})
    with pytest.raises(OptionError, match="need two images"):
        Recipe(**{**parts, mix: 0.2, "batch_size": None}).filled({"batch_size": parts["batch_size"]})


def test_few_training_pictures_cannot_be_mixed_in_many_parts():
    recipe = Recipe(batch_size=64, accumulate=8, mixup=0.2)
    assert Batches(SimpleNamespace(train=range(17)), None, recipe).step == 16
    with pytest.raises(OptionError, match="received a step of 8 in 8 parts"):
        _ = Batches(SimpleNamespace(train=range(15)), None, recipe).step


class Trainer(SimpleNamespace):
    world_size, global_rank, global_step, current_epoch = 1, 0, 0, 0


def test_a_step_learns_from_all_of_its_mixed_pictures_and_counts_their_larger_share(monkeypatch):
    recipe = Recipe(batch_size=5, mixup=1.0).filled({})
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    task = Classifier(network, nn.Identity(), SimpleNamespace(classes=("a", "b", "c")), recipe)
    monkeypatch.setattr(Classifier, "trainer", Trainer())
    monkeypatch.setattr(Classifier, "global_step", 0)
    monkeypatch.setattr(Classifier, "global_rank", 0)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    seen = []
    monkeypatch.setattr(task.train_loss, "forward", lambda logits, targets: seen.append(targets) or logits.sum())
    monkeypatch.setattr(task.train_accuracy, "forward", lambda logits, labels: seen.append(labels))
    task.training_step((torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])), 0)
    targets, labels = seen
    assert targets.shape == (5, 3)
    assert labels.tolist() == targets.argmax(1).tolist()


def test_a_run_says_what_mixed_pictures_and_parts_do_to_its_numbers():
    normed, plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), nn.Sequential(nn.LayerNorm(2))
    pictures = SimpleNamespace(train=range(1000))

    def said(model, **values):
        return _remarks(Recipe(**{"batch_size": 64, **values}), pictures, model)

    assert said(normed) == said(plain, accumulate=4) == []
    (line,) = said(normed, accumulate=4)
    assert line.startswith("parts    of 16 images: batch norms see one part at a time")
    (line,) = said(plain, cutmix=1.0)
    assert line.startswith("mixed    train_accuracy is of mixed images")
    rows = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5}] * 2
    assert "training accuracy is of mixed images" in _curve(rows, mixed=True).caption
    assert "training, mixed" in _curve(rows, mixed=True).numbers
    assert "mixed" not in _curve(rows, mixed=False).caption + _curve(rows, mixed=False).numbers
