# SPDX-License-Identifier: Apache-2.0
"""What looks at a network leaves every module in its own mode: frozen batch norms stay frozen."""

from __future__ import annotations

from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nearsight as ns
from nearsight.bench.profile import profile
from nearsight.inspect import Reflection, attention_maps, equivariance_by_layer
from nearsight.modes import evaluating, keeping_modes
from nearsight.training.announce import _flops, backends_used
from nearsight.training.evaluate import evaluate


def network() -> nn.Module:
    """In training, with a frozen batch norm and a frozen dropout."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8).eval(),
        ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2),
    ]
    return nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Dropout(0.5).eval(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


IMAGES = torch.randn(4, 3, 8, 8)


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError("of the network's own")


def batches() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, torch.tensor([0, 1, 2, 3])), batch_size=2)


WAYS = {
    "evaluate": lambda model: evaluate(model, batches()),
    "attention_maps": lambda model: attention_maps(model, IMAGES),
    "equivariance_by_layer": lambda model: equivariance_by_layer(model, IMAGES, Reflection()),
    "profile": lambda model: profile(model, IMAGES, rounds=1),
    "explore": lambda model: ns.explore(model, IMAGES[:1]),
    "convert exactly": lambda model: ns.convert(model, init="exact", stem=True, input_size=(3, 8, 8)),
    "convert": lambda model: ns.convert(model, init="random", stem=True, input_size=(3, 8, 8)),
    "backends_used": lambda model: backends_used(model, IMAGES),
    "the announcement's FLOPs": lambda model: _flops(model, (3, 8, 8)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", [False, True], ids=["", "raising"])
def test_every_module_stays_in_its_own_mode(way, fails):
    model = network()
    if fails:
        model.append(Failing())
    modes = [module.training for module in model[1:]]
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with suppress(ValueError) if fails else nullcontext():
        WAYS[way](model)
    assert [module.training for module in model[1:]] == modes
    assert model.training
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, state.get(name, buffer), rtol=0, atol=0)


def test_evaluation_is_by_the_frozen_statistics_afterwards_too():
    """A frozen batch norm in training mode takes the batch's own mean: other numbers in the next step."""
    model = network()
    before = model[1](model[0](IMAGES))
    evaluate(model, batches())
    torch.testing.assert_close(model[1](model[0](IMAGES)), before, rtol=0, atol=0)


def test_modules_are_not_told_of_a_mode_that_does_not_last():
    """Some merge their weights when they are told to evaluate, and are merged still when they train on."""

    class Merging(nn.Module):
        merged = False

        def train(self, mode: bool = True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging())
    with evaluating(model):
        assert not model[0].training
    assert model[0].training
    assert not model[0].merged


def test_modes_are_kept_whatever_happens():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())

    def fail():
        with keeping_modes(model):
            model.train()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
