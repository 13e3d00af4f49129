# SPDX-License-Identifier: Apache-2.0
"""Weights for images of another size: position tables resized where that is asked for, and a clear error where it is not."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import nearsight as ns
from nearsight.errors import DataError, OptionError, ShapeError
from nearsight.models.nat import Nat
from nearsight.models.resized import resampled
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, save_model

LAYERS = {1: ns.GlobalSelfAttention1d, 2: ns.GlobalSelfAttention2d, 3: ns.GlobalSelfAttention3d}
GLOBAL = "sasa_nano,kernel_size=global,img_size="
POSITIONS = ["relative", "relative_shared", "bias", "learned"]


def layer(rank: int, position: str, map_size, **options):
    torch.manual_seed(0)
    return LAYERS[rank](12, num_heads=2, position=position, map_size=map_size, **options)


# ----------------------------------------------------------------------------------------------------------- the tables


def test_two_axes_are_pytorchs_bicubic_as_timms_swin_has_it():
    table = torch.randn(3, 13, 9)
    expected = F.interpolate(table[None], size=(19, 5), mode="bicubic", align_corners=False)[0]
    assert (resampled(table, [1, 2], [19, 5]) - expected).abs().max() < 1e-5
    flat = table[:, :, :9].permute(1, 2, 0)[:9].reshape(81, 3)  # Swin's: entries, heads
    theirs = timm.layers.resize_rel_pos_bias_table_simple(flat, (7, 7), (169, 3))
    ours = resampled(flat.view(9, 9, 3), [0, 1], [13, 13])
    assert (ours.view(169, 3) - theirs).abs().max() < 1e-5


def keys(x: Tensor) -> Tensor:
    """Keys' cubic of a distance, a = -3/4, as in his paper."""
    a, x = -0.75, x.abs()
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def by_hand(table: Tensor, size: int) -> Tensor:
    """Along the last dimension, by the formula of the docstring."""
    entries = table.shape[-1]
    x = (torch.arange(size, dtype=torch.float64) + 0.5) * entries / size - 0.5
    j = x.floor()[:, None] + torch.arange(-1, 3)
    return (table[..., j.clamp(0, entries - 1).long()] * keys(x[:, None] - j)).sum(-1)


@pytest.mark.parametrize("sizes", [(9,), (5, 11), (3, 9, 7)], ids=["1-D", "2-D", "3-D"])
def test_every_rank_is_keys_cubic_along_each_axis(sizes):
    table = torch.randn(2, *(7, 5, 5)[: len(sizes)], dtype=torch.float64)
    expected = table
    for dim, size in enumerate(sizes, start=1):
        expected = by_hand(expected.movedim(dim, -1), size).movedim(-1, dim)
    assert (resampled(table, range(1, 1 + len(sizes)), sizes) - expected).abs().max() < 1e-12


def test_constant_linear_and_turned_tables_stay_what_they_are():
    line = torch.arange(-6.0, 7.0)
    assert torch.allclose(resampled(torch.full((13,), 3.0), [0], [21]), torch.full((21,), 3.0))
    found = resampled(line, [0], [21])
    straight = torch.arange(-10.0, 11.0) * 13 / 21
    # PyTorch's cubic keeps a line to some hundredths of a step; at the ends entries are repeated.
    assert (found[4:-4] - straight[4:-4]).abs().max() < 0.05
    assert found[10].abs() < 1e-6  # offset 0 stays in the middle
    table = torch.randn(13)
    assert torch.allclose(resampled(table.flip(0), [0], [7]), resampled(table, [0], [7]).flip(0), atol=1e-5)
    half = table.bfloat16()
    assert torch.equal(resampled(half, [0], [7]), resampled(half.float(), [0], [7]).bfloat16())


# ----------------------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("rank", "size"), [(1, (9,)), (2, (3, 9)), (3, (3, 2, 6))], ids=["1-D", "2-D", "3-D"])
def test_layers_of_every_rank_and_table(position, rank, size):
    small, large = layer(rank, position, 4), layer(rank, position, size)
    state = small.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    found = ns.resize_positions(state, large)
    large.load_state_dict(found)
    assert large(torch.randn(1, 12, *size)).isfinite().all()
    assert all(torch.equal(state[name], before[name]) for name in before)
    changed = {name for name in found if found[name] is not state[name]}
    assert changed == {name for name in found if name.startswith("position.")}
    counted = {"relative": 1, "relative_shared": 0}
    for name in changed:
        axes = [int(name[-1])] if position in counted else range(rank)
        start = counted.get(position, 1)
        dims = [start] if position in counted else [1 + axis for axis in axes]
        entries = [size[axis] if position == "learned" else 2 * size[axis] - 1 for axis in axes]
        assert torch.equal(found[name], resampled(state[name], dims, entries))


def test_of_the_same_size_nothing_changes():
    model = ns.create_model(f"{GLOBAL}16")
    state = model.state_dict()
    found = ns.resize_positions(state, ns.create_model(f"{GLOBAL}16"))
    assert list(found) == list(state)
    assert all(found[name] is state[name] for name in state)


def test_a_network_of_windows_has_nothing_to_resize():
    model = Nat((1,), (2,), embed_dim=16, num_classes=3)
    state = model.state_dict()
    assert all(found is state[name] for name, found in ns.resize_positions(state, model).items())


def test_a_trained_function_is_nearly_kept():
    """On a smooth picture of twice the size, attention over smooth tables gives the same picture of twice the size."""
    small, large = layer(2, "bias", 8), layer(2, "bias", 16)
    with torch.no_grad():
        small.position.table.copy_(resampled(torch.randn(2, 3, 3), [1, 2], [15, 15]))
    large.load_state_dict(ns.resize_positions(small.state_dict(), large))
    picture = F.interpolate(torch.randn(1, 12, 3, 3), size=(8, 8), mode="bicubic")
    double = F.interpolate(picture, size=(16, 16), mode="bilinear")
    expected = F.interpolate(small(picture), size=(16, 16), mode="bilinear")
    middle = (..., slice(2, -2), slice(2, -2))
    error = (large(double) - expected)[middle].abs().max()
    torch.manual_seed(1)
    cropped = layer(2, "bias", 16)
    cropped.qkv.load_state_dict(small.qkv.state_dict())  # with a table of no meaning
    assert error < 0.5 * (cropped(double) - expected)[middle].abs().max()


# -------------------------------------------------------------------------------------------------- refused, and asked for


WRONG = {
    "heads": (
        lambda: layer(2, "bias", 4),
        lambda: ns.GlobalSelfAttention2d(12, num_heads=3, position="bias", map_size=6),
    ),
    "rank": (lambda: layer(1, "bias", 4), lambda: layer(2, "bias", 6)),
    "kernel": (
        lambda: ns.LocalSelfAttention2d(16, kernel_size=3, position="bias"),
        lambda: ns.LocalSelfAttention2d(16, kernel_size=5, position="bias"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_more_than_another_size_is_one_error(name):
    of, to = (make() for make in WRONG[name])
    reason = "another kernel_size" if name == "kernel" else "other heads or channels"
    with pytest.raises(ShapeError, match=rf"^position\.table is \(.*\) there and \(.*\) here: .*{reason}") as caught:
        ns.resize_positions(of.state_dict(), to)
    assert "\n" not in str(caught.value)


@pytest.fixture
def saved(tmp_path):
    def save(spec: str, size: int, channels: int = 1):
        view = View(channels, size, (0.5,) * channels, (0.5,) * channels)
        blueprint = Blueprint.of(spec, ("a", "b", "c"), view, "digits")
        model = blueprint.build()
        save_model(tmp_path / "model.safetensors", model, blueprint)
        return model.eval(), tmp_path

    return save


@pytest.mark.parametrize("spec", ["sasa_nano,kernel_size=global", f"{GLOBAL}16,position=learned"])
def test_a_run_is_loaded_for_images_of_another_size(spec, saved):
    trained, folder = saved(spec, 16)
    model = ns.load(folder, img_size=24)
    assert (model.view.size, model.preprocess(torch.zeros(9, 9, dtype=torch.uint8)).shape) == (24, (1, 1, 24, 24))
    made = ns.create_model(
        spec.replace("16", "24"), num_classes=3, in_chans=1, **({} if "16" in spec else {"img_size": 24})
    )
    made.load_state_dict(ns.resize_positions(trained.state_dict(), made))
    x = torch.randn(2, 1, 24, 24)
    assert torch.equal(model(x), made.eval()(x))
    assert len(model.predict(x)) == 2
    same = ns.load(folder, img_size=16)
    assert torch.equal(same(x[..., :16, :16]), trained(x[..., :16, :16]))
    assert all(map(torch.equal, same.state_dict().values(), trained.state_dict().values()))


def test_timms_networks_of_one_size_are_resized_timms_way(saved):
    trained, folder = saved("vit_micro", 16)
    model = ns.load(folder, img_size=24)
    x = torch.randn(2, 1, 24, 24)
    trained.set_input_size(img_size=(24, 24))
    assert torch.equal(model(x), trained(x))
    with pytest.raises(OptionError, match="cannot take 3x3 images"):
        ns.load(folder, img_size=3)
    for size in (0, 2.5, "24"):
        with pytest.raises(OptionError, match=f"img_size must be a number of pixels.*received {size!r}"):
            ns.load(folder, img_size=size)


def test_unasked_another_size_is_an_error_that_says_how_to_ask(saved, tmp_path):
    trained, _ = saved("sasa_nano,kernel_size=global", 16)
    file = tmp_path / "weights.pth"
    torch.save(trained.state_dict(), file)
    options = {"num_classes": 3, "in_chans": 1}
    with pytest.raises(
        DataError, match=r"images of another size, or for windows: .*img_size.*resize_positions\(weights, network\)"
    ):
        ns.create_model(f"{GLOBAL}24", checkpoint_path=file, **options)
    model = timm.create_model("sasa_nano", kernel_size="global", img_size=24, **options)
    timm.models.load_checkpoint(model, str(file), filter_fn=ns.resize_positions)  # as timm takes one of its own
    assert model(torch.randn(2, 1, 24, 24)).shape == (2, 3)
    type(trained)((1,), (16,), kernel_size="global", num_heads=2, img_size=32).save_pretrained(tmp_path / "hub")
    with pytest.raises(DataError, match=r"mismatch for .*position.*resize_positions"):
        type(trained).from_pretrained(tmp_path / "hub", img_size=64)
