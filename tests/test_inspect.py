# SPDX-License-Identifier: Apache-2.0
"""What is shown of a network is what the network does."""

import numpy as np
import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight.errors import OptionError, ShapeError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        ns.LocalSelfAttention2d(3, 8, 5, num_heads=2),
        nn.AvgPool2d(2),
        ns.LocalSelfAttention2d(8, 8, 3, stride=2, border="wrap", num_heads=4),
        ns.GlobalSelfAttention2d(8, num_heads=2),
    )


def test_maps_are_the_layers_weights(model):
    images = torch.randn(2, 3, 12, 8)
    maps = ns.attention_maps(model, images)
    assert [m.layer for m in maps] == ["0", "2", "3"]
    assert [m.map_size for m in maps] == [(12, 8), (6, 4), (3, 2)]
    assert [m.num_heads for m in maps] == [2, 4, 2]
    assert torch.equal(maps[0].weights, model[0].attention_weights(images))
    for image in (0, 1):
        for m in maps:
            block = m.memory_block((7, 5), image)
            assert block.shape == (m.num_heads, *m.map_size)
            np.testing.assert_allclose(block.sum((1, 2)), 1, rtol=1e-5)


def test_a_memory_block_mixes_the_values_into_the_output(model):
    images, layer = torch.randn(2, 3, 12, 8), model[0]
    block = ns.attention_maps(model, images)[0].memory_block((7, 5), 1)
    values = layer.qkv(images)[1].chunk(3)[2].unflatten(0, (2, 4))
    mixed = torch.einsum("nhw,ndhw->nd", torch.from_numpy(block), values).flatten()
    torch.testing.assert_close(mixed, layer(images)[1, :, 7, 5])


def test_a_memory_block_covers_the_window_only(model):
    block = ns.attention_maps(model, torch.randn(1, 3, 12, 8))[0].memory_block((7, 5))
    assert set(zip(*np.nonzero(block.sum(0)), strict=True)) == {(i, j) for i in range(5, 10) for j in range(3, 8)}


def test_a_pixel_finds_its_query(model):
    maps = ns.attention_maps(model, torch.randn(1, 3, 12, 8))
    assert [m.query((7, 5)) for m in maps] == [(7, 5), (1, 1), (1, 1)]
    assert maps[1].query((11, 7)) == (2, 1)


def test_a_window_larger_than_the_torus_adds_up():
    layer = nn.Sequential(ns.LocalSelfAttention2d(4, kernel_size=7, num_heads=2, border="wrap"))
    block = ns.attention_maps(layer, torch.randn(1, 4, 3, 5))[0].memory_block((2, 2))
    np.testing.assert_allclose(block.sum((1, 2)), 1, rtol=1e-5)


def test_looking_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ns.attention_maps(model, torch.randn(3, 8, 8))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_maps_say_what_is_wrong(model):
    with pytest.raises(OptionError, match="no attention layer of nearsight; it is made of Conv2d"):
        ns.attention_maps(nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8))
    with pytest.raises(ShapeError, match=r"image of \(12, 8\); received \(12, 0\)"):
        ns.attention_maps(model, torch.randn(1, 3, 12, 8))[0].memory_block((12, 0))


def test_equivariance_error_of_known_modules():
    x = torch.randn(1, 2, 8, 8)

    def roll(x):
        return x.roll(1, -1)

    assert ns.equivariance_error(torch.relu, x, roll) == 0
    ramp = torch.arange(8.0)
    error = ns.equivariance_error(lambda x: x + ramp, torch.zeros(1, 1, 8, 8), roll)
    assert error == 1  # the ramp's jump from 7 to 0 over its height of 7
    assert ns.equivariance_error(lambda x: x + ramp, torch.zeros(1, 1, 8, 8), roll, margin=1) == pytest.approx(1 / 7)


def test_equivariance_after_a_stride():
    layer = ns.LocalSelfAttention2d(4, kernel_size=3, stride=2, num_heads=2, border="wrap")
    x = torch.randn(1, 4, 8, 8)
    error = ns.equivariance_error(layer, x, lambda x: x.roll(2, -1), out_transform=lambda y: y.roll(1, -1))
    assert error < 1e-5
    assert ns.equivariance_error(layer, x, lambda x: x.roll(1, -1)) > 1e-2


def test_equivariance_errors_are_clear():
    x = torch.randn(1, 2, 8, 6)
    with pytest.raises(ShapeError, match="give out_transform"):
        ns.equivariance_error(lambda x: x[..., ::2], x, lambda x: x.mT)
    with pytest.raises(ShapeError, match="margin of 4 leaves nothing"):
        ns.equivariance_error(torch.relu, x, torch.neg, margin=4)
