# SPDX-License-Identifier: Apache-2.0
"""PyTorch's default dtype and default device are the caller's: nothing of ours may take its own memory by them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from conftest import ALL, assert_near, every_backend
from test_contract import NAMED, check_or_refusal, expected_of, inputs_of, tensors_of
from torch import Tensor, nn

import nearsight as ns
from nearsight.attention import native
from nearsight.attention.native import library as lib
from nearsight.flops import count_flops
from nearsight.inspect.rollout import attention_rollout
from nearsight.inspect.statistics import attention_statistics
from nearsight.inspect.transforms import Permutation, Translation
from nearsight.positions import POSITIONS
from nearsight.saved.view import View
from nearsight.training.data.arrays import ArraySplit, RandomAffine

DEFAULTS = {"float64": torch.float64, "bfloat16": torch.bfloat16, "another device": torch.device("meta")}


@contextmanager
def default(name: str):
    """A default dtype, or a default device on which nothing can be read."""
    if isinstance(DEFAULTS[name], torch.device):
        with DEFAULTS[name]:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(DEFAULTS[name])
    try:
        yield
    finally:
        torch.set_default_dtype(before)


every_default = pytest.mark.parametrize("name", DEFAULTS)
CASES = (
    "both tables",
    "volume",
    "zeros even dilated",
    "shift dilated strided",
    "shared causal wrap",
    "value narrower",
    "covers",
)


@every_default
@every_backend(ALL)
def test_the_contract(contestant, name):
    with default(name):
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                check_or_refusal(contestant, replace(NAMED[case], dtype=dtype))


@every_default
@every_backend([one for one in ALL if one.backend.name != "dense"])  # which keeps it to itself
def test_the_log_sum_exp(contestant, name):
    """Its memory is float32, whatever the default: as bfloat16 it would be overrun, as float64 half of it is garbage."""
    case = replace(NAMED["both tables"], dtype=torch.float32)
    grad, *numbers = inputs_of(case)
    incoming, inputs, arguments = tensors_of(case, grad=True)
    with default(name):
        out, lse = contestant.attend(*inputs[:3], case.window, **arguments, return_lse=True)
        grad_lse = torch.ones_like(lse)
        found = torch.autograd.grad((out, lse), inputs, (incoming, grad_lse))
    assert (lse.dtype, lse.device.type) == (torch.float32, "cpu")
    assert_near("lse", lse, oracle.log_sum_exp(*numbers[:2], case.axes, *numbers[3:], case.scale), expected_of(case)[2])
    ones = np.ones(lse.shape)
    wanted = oracle.gradients(grad, *numbers[:3], case.axes, *numbers[3:], case.scale, ones)
    for gradient, reference in zip(found, wanted, strict=True):
        assert_near("gradient", gradient, reference, expected_of(case)[3])


@every_default
@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_what_the_kernel_writes_is_as_large_as_it_thinks(name):
    """Bytes, not only numbers: the scalars of the interface are float32."""
    maps = [torch.randn(1, 2, 5, 7, 4) for _ in range(3)]
    bias, relative = torch.randn(2, 3, 3), [torch.randn(2, 3, 4) for _ in range(2)]
    geometry = ([3, 3], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0], 0.5, lib.AUTO)
    with default(name):
        out, lse = torch.ops.nearsight.attend(*maps, bias, relative, *geometry)
        wanted = [True] * 5
        found = torch.ops.nearsight.attend_backward(out, *maps, bias, relative, out, lse, wanted, *geometry)
    assert {one.dtype for one in (out, lse, *found)} == {torch.float32}
    assert {one.device.type for one in (out, lse, *found)} == {"cpu"}
    assert lse.untyped_storage().nbytes() == 4 * lse.numel()


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What a layer gives, its gradients, and its weights."""
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    wanted = [leaf, *(one for one in layer.parameters() if one.requires_grad)]
    found = [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]
    with torch.no_grad():
        found.append(layer.attention_weights(leaf))  # pyright: ignore[reportCallIssue]
    return [one for one in found if one is not None]


LAYERS = {
    **{
        name: lambda name=name: ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position=name, map_size=(6, 9))
        for name in ns.positions.POSITIONS
    },
    "rope on a torus": lambda: ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position="rope", border="wrap"),
    "strided": lambda: ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, stride=2),
    "global": lambda: ns.GlobalSelfAttention2d(8, num_heads=2, position="cpb"),
    "halo": lambda: ns.HaloSelfAttention2d(8, block_size=4, halo_size=1, num_heads=2, stride=2),
    "stem": lambda: ns.AttentionStem2d(8, 8, num_heads=2),
}


@every_default
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, name):
    layer, x = LAYERS[kind](), torch.randn(2, 8, 6, 9)
    expected = step(layer, x)
    with default(name):
        found = step(layer, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


MADE = {
    **{
        name: lambda name=name, **place: ns.LocalSelfAttention2d(24, num_heads=2, position=name, out_proj=True, **place)
        for name in POSITIONS
    },
    "global": lambda **place: ns.GlobalSelfAttention2d(24, num_heads=2, map_size=5, **place),
    "halo": lambda **place: ns.HaloSelfAttention2d(24, num_heads=2, **place),
    "stem": lambda **place: ns.AttentionStem2d(24, 8, num_heads=2, **place),
}


@pytest.mark.parametrize("name", MADE)
def test_a_layer_is_made_on_the_device_that_it_is_given(name):
    with torch.device("meta"):
        layer = MADE[name](device="cpu")
        assert {tensor.device.type for tensor in layer.state_dict().values()} <= {"cpu"}
        assert layer(torch.randn(1, 24, 5, 5, device="cpu")).isfinite().all()
        assert {tensor.device.type for tensor in MADE[name]().state_dict().values()} == {"meta"}


@every_default
def test_looking_at_a_network(name):
    model, x = ns.create_model("sasa_nano", num_classes=5).eval(), torch.randn(1, 3, 16, 24)

    def look() -> list:
        maps, few = ns.attention_maps(model, x), ns.attention_maps(model, x, queries=[(3, 4)])
        numbers = [value for one in attention_statistics(maps) for value in (one.distance, one.entropy)]
        seen = [one for layer in (*maps, *few) for one in (layer.weights, layer.distances(), layer.key_cells())]
        errors = [ns.equivariance_error(model.forward_features, x, change) for change in (Translation(1, 1),)]
        page = ns.explore(model, x[0].clamp(0, 1)).html
        mixed = Permutation()(x)
        return [
            *seen,
            *numbers,
            mixed,
            len(page),
            attention_rollout(maps, [(3, 4)]),
            *errors,
            count_flops(model, (3, 16, 24)),
        ]

    expected = look()
    with default(name):
        found = look()
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other)
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6, atol=1e-7)


@every_default
@pytest.mark.parametrize("init", ["exact", "random"])
def test_converting(init, name):
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)), torch.randn(1, 8, 6, 9)
    before = model(x)
    with default(name):
        ns.convert(model, init=init)
        after = model(x)
        weights = model[1].attention_weights(x)  # pyright: ignore[reportCallIssue]
    assert {(one.dtype, one.device.type) for one in (*model.parameters(), after, weights)} == {(torch.float32, "cpu")}
    if init == "exact":
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@every_default
def test_training_data(name):
    images, labels = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6)
    split, view = ArraySplit(images, labels), View(1, 8, (0.3,), (0.7,))

    def read() -> list[Tensor]:
        torch.manual_seed(3)
        pictures, _ = split.dataset(view, training=True).__getitems__([0, 4])  # pyright: ignore[reportAttributeAccessIssue]
        return [
            pictures,
            RandomAffine(2, 10, 0.1, mirror=True)(pictures),
            split.order(torch.Generator().manual_seed(1)),
        ]

    expected = read()
    with default(name):
        found = read()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_pictures_in_half_precision_are_moved_by_fractions_of_a_pixel():
    """Where a pixel comes from is a number of float32: in bfloat16 the columns of a wide picture would share places."""
    ramp = (torch.arange(512.0) / 512).expand(1, 1, 2, 512)
    torch.manual_seed(3)
    expected = RandomAffine(0.5)(ramp)
    torch.manual_seed(3)
    found = RandomAffine(0.5)(ramp.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=4e-3)
