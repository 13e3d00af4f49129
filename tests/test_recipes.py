# SPDX-License-Identifier: Apache-2.0
"""The recipes that come along: each is read, fits a model that exists, and is named in the documentation."""

from pathlib import Path

import pytest
import torch

from nearsight.models import create_model
from nearsight.training.recipe import read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_recipes_that_the_documentation_promises_are_there():
    assert {file.stem for file in RECIPES} >= {"digits", "fashion_mnist", "cifar10", "sasa_imagenet"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_read_builds_its_model_and_is_documented(file):
    recipe = read_recipe(file)
    with torch.device("meta"):
        assert create_model(recipe.model, num_classes=10) is not None
    assert f"recipes/{file.name}" in (ROOT / "docs" / "training.md").read_text()
    assert f"--config recipes/{file.name}" in file.read_text()


def test_the_recipe_of_sasa_is_the_papers():
    """130 epochs, 10 of them warm-up, peak 1.6 of Nesterov's momentum, 4096 images per step, mean of the weights 0.9999."""
    recipe = read_recipe(ROOT / "recipes" / "sasa_imagenet.yaml")
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.ema_decay) == (130, 4096, 1.6, 0.9999)
    assert recipe.warmup_share == pytest.approx(10 / 130)
    from nearsight.training.optimizer import make_optimizer

    optimizer = make_optimizer(torch.nn.Linear(2, 2), recipe)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["nesterov"], optimizer.defaults["momentum"]) == (True, 0.9)
