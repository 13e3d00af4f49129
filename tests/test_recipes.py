# SPDX-License-Identifier: Apache-2.0
"""The recipes that come along: each is read, fits a model that exists, and is named in the documentation."""

from pathlib import Path

import pytest
import timm.optim
import torch

from nearsight.errors import OptionError
from nearsight.models import create_model
from nearsight.training.optimizer import make_optimizer
from nearsight.training.recipe import Recipe, read_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_recipes_that_the_documentation_promises_are_there():
    assert {file.stem for file in RECIPES} >= {"digits", "fashion_mnist", "cifar10", "sasa_imagenet"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_read_builds_its_model_and_is_documented(file):
    recipe = read_recipe(file)
    with torch.device("meta"):
        assert create_model(recipe.model, num_classes=10) is not None
    assert f"recipes/{file.name}" in (ROOT / "docs" / "howto" / "training.md").read_text()
    assert f"--config recipes/{file.name}" in file.read_text()


def test_the_recipe_of_sasa_is_the_papers():
    """130 epochs, 10 of them warm-up, peak 1.6 of Nesterov's momentum, 4096 images per step, mean of the weights 0.9999."""
    recipe = read_recipe(ROOT / "recipes" / "sasa_imagenet.yaml")
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.ema_decay) == (130, 4096, 1.6, 0.9999)
    assert recipe.warmup_share == pytest.approx(10 / 130)
    optimizer = make_optimizer(torch.nn.Linear(2, 2), recipe)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["nesterov"], optimizer.defaults["momentum"]) == (True, 0.9)


def asked_for(name):
    try:
        return Recipe(opt=name, lr=0.1, weight_decay=0.05)
    except OptionError as error:
        return None if f"received {name!r}: " in str(error) else error


def test_an_optimiser_trains_or_is_refused_by_its_name(monkeypatch):
    """Those that are accepted take two steps; kron, which would compile for most of a minute, steps uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda function, *_, **__: function)
    names = [str(name) for name in timm.optim.list_optimizers()]
    recipes = {name: asked_for(name) for name in names}
    refused = {name for name in names if recipes[name] is None}
    for_cards = {name for name in names if name.startswith(("bnb", "fused"))}
    assert refused >= {"adahessian"} | (set() if torch.cuda.is_available() else for_cards)
    assert refused <= {"adahessian"} | for_cards
    with torch._dynamo.config.patch(disable=True):
        for name in set(names) - for_cards - refused:
            network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 3))
            before = [weight.clone() for weight in network.parameters()]
            optimizer = make_optimizer(network, recipes[name])
            for _ in range(2):
                network(torch.ones(1, 2, 4, 4)).square().sum().backward()
                optimizer.step()
            assert all(weight.isfinite().all() for weight in network.parameters()), name
            assert any(not torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True)), name


def test_an_optimiser_that_calls_for_several_gradients_is_refused(monkeypatch):
    from timm.optim._optim_factory import OptimInfo, default_registry

    class Stepping(torch.optim.SGD):
        def step(self, closure):
            closure()

    monkeypatch.setitem(default_registry._optimizers, "closing", OptimInfo("closing", Stepping))
    with pytest.raises(OptionError, match="received 'closing': it computes a step's gradient several times"):
        Recipe(opt="closing")


def test_the_optimisers_that_are_advised_can_train():
    with pytest.raises(OptionError, match="did you mean") as refusal:
        Recipe(opt="adamw8")
    advised = str(refusal.value).split("did you mean ")[1].rstrip("?").split(", ")
    assert [name for name in advised if asked_for(name) is None] == []
