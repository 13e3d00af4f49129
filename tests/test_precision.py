# SPDX-License-Identifier: Apache-2.0
"""Logits, softmax and mixing in half precision: computed in float32 inside, so that the result's own rounding is left."""

import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight.compat.natten.modules import NeighborhoodAttention2D
from nearsight.conversion.gpsa import GatedPositionalSelfAttention

HALF = [torch.bfloat16, torch.float16]


def assert_rounded_once(found, expected):
    """No further away than the rounding to the dtype of what was found."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=eps, atol=eps / 16)


@pytest.mark.parametrize("dtype", HALF)
def test_a_halo_layer_is_as_exact_as_the_operation(dtype):
    """Under autocast too, where the projections alone are in half precision. A block over all of the map is global."""
    torch.manual_seed(0)
    layer = ns.HaloSelfAttention2d(16, num_heads=2, block_size=8, halo_size=0)
    nn.init.normal_(layer.q.weight, std=2)
    x = torch.randn(2, 16, 8, 8)
    for run, given in ((torch.autocast("cpu", dtype), x), (torch.autocast("cpu", enabled=False), x.to(dtype))):
        with run:
            found, (query, key, value) = layer(given), layer._heads(given, layer.window)
        tables = [table.double().expand(2, -1, -1) for table in layer.position.vectors]
        wide = (tensor.double() for tensor in (query, key, value))
        expected = ns.global_attention(*wide, relative=tables, backend="reference").movedim(-1, 2).flatten(1, 2)
        assert found.dtype == dtype
        assert_rounded_once(found, expected)
        layer.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_the_stem_mixes_its_values_as_exactly(dtype):
    torch.manual_seed(0)
    stem = ns.AttentionStem2d(3, 16, num_heads=2, mixtures=4)
    wide = ns.AttentionStem2d(3, 16, num_heads=2, mixtures=4).double()
    for given, run in ((stem, torch.autocast("cpu", dtype)), (stem.to(dtype), torch.autocast("cpu", enabled=False))):
        wide.load_state_dict(given.state_dict())
        with run:
            p = given.mixing()
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.double(), wide.mixing(), atol=1e-6, rtol=1e-5)
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    values = stem.value(x).double().unflatten(1, (4, 16))
    expected = (p.double().repeat(1, 2, 2)[:, None] * values).sum(1)
    assert_rounded_once(stem._values(x), expected)


def test_the_heads_of_a_converted_convolution_are_placed_as_exactly():
    torch.manual_seed(0)
    layer = GatedPositionalSelfAttention(nn.Conv2d(4, 8, 3, padding=1))
    nn.init.uniform_(layer.shift, -0.7, 0.7)
    nn.init.uniform_(layer.spread, 0, 1)
    kernel = layer._kernel()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer._kernel(), kernel, rtol=0, atol=0)
    layer.bfloat16()
    found = layer._kernel()
    assert found.dtype == torch.bfloat16
    assert_rounded_once(found, layer.double()._kernel())


@pytest.mark.parametrize("dtype", HALF)
def test_natten_layers_that_hold_their_weights(dtype):
    torch.manual_seed(0)
    layer = NeighborhoodAttention2D(embed_dim=32, num_heads=2, kernel_size=7, rel_pos_bias=True).to(dtype)
    tensors = [3 * torch.randn(2, 10, 10, 2, 16, dtype=dtype) for _ in range(3)]
    found = layer._in_two_calls(*tensors)
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(layer._in_two_calls(*tensors), found, rtol=0, atol=0)
    assert found.dtype == dtype
    assert_rounded_once(found, layer.double()._in_two_calls(*(tensor.double() for tensor in tensors)))
