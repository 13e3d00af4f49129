# SPDX-License-Identifier: Apache-2.0
"""What changes from step to step, against its formula: learning rate, mean of the weights, order of the pictures."""

import csv
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from nearsight.training import data
from nearsight.training.callbacks import METRICS_FILE
from nearsight.training.data import SplitSampler
from nearsight.training.optimizer import make_schedule
from nearsight.training.recipe import Recipe
from nearsight.training.task import Classifier
from nearsight.training.train import train


def rate(step, steps, share, peak):
    """As training.md has it: up to the peak in a share of the steps, then half a cosine, to and from a hundredth."""
    rising, final = min(math.ceil(share * steps), steps - 1), peak / 100
    if step < rising:
        return final + (peak - final) * step / rising
    return final + (peak - final) * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 97])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9, 0.999])
def test_every_step_has_the_rate_of_the_formula(steps, share):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    schedule = make_schedule(optimizer, steps, share)
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(step + 1)
    assert found == pytest.approx([rate(step, steps, share, 0.4) for step in range(steps)])
    assert max(found) == pytest.approx(0.4)  # the peak is reached
    after = found[found.index(max(found)) :]
    assert all(later < earlier for earlier, later in pairwise(after))


@pytest.fixture
def observed(monkeypatch, tmp_path):
    """Train on some digits; the rate that each step was made with, and the rows of metrics.csv."""

    def run(count=96, **recipe):
        pictures = data.load_pictures("digits")
        small = {
            name: data.ArraySplit(part.images[:count], part.labels[:count])
            for name, part in (("train", pictures.train), ("validation", pictures.validation), ("test", pictures.test))
        }
        monkeypatch.setitem(data.SOURCES, "digits", lambda *_: replace(pictures, **small))
        rates, step = [], Classifier.training_step

        def noted(self, batch, index):
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return step(self, batch, index)

        monkeypatch.setattr(Classifier, "training_step", noted)
        monkeypatch.setattr("nearsight.training.train.write_report", lambda *arguments: None)
        output = tmp_path / "run"
        train(Recipe(model="sasa_nano", data="digits", lr=0.01, **recipe), output)
        return rates, list(csv.DictReader((output / METRICS_FILE).open()))

    return run


def test_epochs_of_one_step_follow_each_other(observed, capsys):
    rates, rows = observed(epochs=3, batch_size=64)
    assert rates == pytest.approx([rate(step, 3, 0.1, 0.01) for step in range(3)])
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=1e-4)  # that of the step, not of the next
    assert capsys.readouterr().out.count("per epoch") == 1


def test_a_batch_larger_than_the_data_is_one_step(observed):
    rates, rows = observed(epochs=2, batch_size=1000)
    assert len(rates) == len(rows) == 2


def test_the_mean_of_the_weights_begins_as_a_plain_mean_and_ends_with_its_decay():
    network = torch.nn.Linear(1, 1, bias=False)
    recipe = Recipe(ema_decay=0.6, label_smoothing=0.0)
    task = Classifier(network, torch.nn.Identity(), _Blueprint(), recipe)
    mean, found, wanted = 0.0, [], []
    for step in range(1, 7):
        torch.nn.init.constant_(network.weight, float(step**2))
        task.ema.update(network, step=step)
        decay = min(0.6, 1 - 1 / step)  # of a plain mean of as many weights
        mean = decay * mean + (1 - decay) * step**2
        found.append(task.best.weight.item())
        wanted.append(mean)
    assert found == pytest.approx(wanted)
    assert found[1] == pytest.approx((1 + 4) / 2)


class _Blueprint:
    classes = ("a", "b")


def test_seeds_and_epochs_have_orders_of_their_own():
    split = data.ArraySplit(torch.zeros(50, 1, 1, 1), torch.zeros(50, dtype=torch.long))
    orders = set()
    for seed in range(5):
        for epoch in range(5):
            sampler = SplitSampler(split, step=50, seed=seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(draw - epoch * 50 for draw in sampler))
    assert len(orders) == 25
    assert all(sorted(order) == list(range(50)) for order in orders)
