# SPDX-License-Identifier: Apache-2.0
"""What the README says a run reaches, it reaches. Apart from the other tests of training, which cut the data down."""

import pytest

from nearsight.training import train
from nearsight.training.recipe import Recipe


@pytest.mark.slow
def test_three_epochs_reach_most_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_report", lambda *arguments: None)
    assert train.train(Recipe(epochs=3), tmp_path).evaluation.accuracy >= 0.8


@pytest.mark.sweep
def test_the_defaults_reach_98_percent_on_digits(tmp_path):
    run = train.train(Recipe(), tmp_path)
    assert run.evaluation.count == 360
    assert run.evaluation.accuracy >= 0.98
