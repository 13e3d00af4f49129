# SPDX-License-Identifier: Apache-2.0
"""Errors of equivariance, and their causes, on layers for which the truth is known."""

import csv
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nearsight as ns
from nearsight.errors import OptionError, ShapeError
from nearsight.inspect import (
    Permutation,
    Reflection,
    Rotation90,
    Scaling,
    Translation,
    draw_equivariance,
    equivariance_by_layer,
    equivariance_error,
)
from nearsight.inspect.equivariance import decisive
from nearsight.inspect.grid import Following
from nearsight.inspect.layer_list import layers_of
from nearsight.inspect.reach import reach_of
from nearsight.pages.csv_json import to_csv

EXACT = 1e-12  # in float64


def image(channels=8, size=(16, 16)):
    return torch.randn(1, channels, *size, dtype=torch.float64)


def layer(**options):
    kind = options.pop("kind", ns.LocalSelfAttention2d)
    return kind(8, num_heads=2, **({"kernel_size": 5} if kind is ns.LocalSelfAttention2d else {}) | options).double()


def alone(module, transform, x=None):
    """The only row of a network of one layer."""
    (row,) = equivariance_by_layer(module, image() if x is None else x, transform)
    return row


# ----------------------------------------------------------------------------------------------------- transformations


def waves(n, frequencies=(1, 2), shift=0.0, period=None):
    """A band-limited function on a torus of n cells, sampled with an offset."""
    places = (torch.arange(n, dtype=torch.float64) - shift) / (period or n)
    return sum(torch.cos(2 * math.pi * f * places + f) for f in frequencies)


@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("shift", [0.25, -1.5, 3, 10.75])
def test_translation_is_that_of_the_band_limited_function(n, shift):
    x = waves(n)[:, None] * waves(9)
    expected = waves(n, shift=shift)[:, None] * waves(9, shift=-2)
    torch.testing.assert_close(Translation(shift, -2)(x[None, None])[0, 0], expected)


def test_translations_by_whole_cells_are_rolls_and_add_up():
    x = image()
    assert torch.equal(Translation(3, -2)(x), x.roll((3, -2), (-2, -1)))
    odd = image(size=(7, 9))
    torch.testing.assert_close(Translation(0.5, 0.25)(Translation(0.5, 0.75)(odd)), odd.roll((1, 1), (-2, -1)))


def test_of_the_nyquist_frequency_the_cosine_is_left():
    x = torch.tensor([1.0, -1, 1, -1])[None, None, None]
    torch.testing.assert_close(Translation(0, 1 / 3)(x), math.cos(math.pi / 3) * x)


@pytest.mark.parametrize(("n", "factor"), [(8, 2), (9, 2), (12, 0.5), (8, 1.5), (15, 1 / 3)])
def test_scaling_samples_the_same_band_limited_function(n, factor):
    m = round(n * factor)
    scaled = Scaling(factor)(waves(n)[None, None, None].expand(1, 1, n, n))
    torch.testing.assert_close(scaled, waves(m)[None, None, None].expand(1, 1, m, m))


@pytest.mark.parametrize("n", [7, 8])
def test_enlarging_can_be_undone(n):
    x = image(size=(n, 6))
    torch.testing.assert_close(Scaling(0.5)(Scaling(2)(x)), x)
    assert Scaling(2)(x).shape == (1, 8, 2 * n, 12)


def test_a_permutation_moves_whole_cells():
    x = image(size=(3, 5))
    moved = Permutation(1)(x)
    found = (moved.flatten(2)[..., None] == x.flatten(2)[..., None, :]).all(1)[0]
    assert found.sum(0).tolist() == found.sum(1).tolist() == [1] * 15
    assert not torch.equal(moved, x)
    assert torch.equal(moved, Permutation(1)(x))


def test_a_cell_between_two_is_kept_if_both_are():
    inside = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    inside[..., 2] = False
    assert Translation(0, 1.5).keeps(inside, torus=True)[0, 0, 0].tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert Translation(0, -1).keeps(inside, torus=True)[0, 0, 0].tolist() == [True, False] + [True] * 6
    assert Translation(0, -1).keeps(inside, torus=False)[0, 0, 0].tolist() == [True, False] + [True] * 5 + [False]


def test_the_nearest_shift_that_a_grid_can_follow():
    shift = Translation(7, -3.5)
    assert shift.on_grid((4, 2), (32, 32)).shift == (8, -4)
    assert Translation(1, 0).on_grid((4, 4), (32, 32)).shift == (4, 0), "not zero: nothing would have moved"
    assert shift.on_grid((32, 16), (32, 16)) is None, "once around is no shift either"
    assert Translation(8, 4).on_grid((4, 2), (32, 32)).shift == (8, 4)
    assert Rotation90().on_grid((2, 2), (32, 32)) is None


def test_transforms_that_cannot_be():
    with pytest.raises(OptionError, match="one shift per axis of the map, 1 to 3"):
        Translation()
    with pytest.raises(OptionError, match=r"counts from the last: -1, -2 or -3; received 0"):
        Reflection(0)
    with pytest.raises(OptionError, match="factor of a scaling must be positive; received 0"):
        Scaling(0)


# ------------------------------------------------------------------------------------------------------ whole modules


def stirred(module):
    """With every parameter at random: tables that start with zeros would prove nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return module


@pytest.mark.parametrize("position", ["none", "relative", "bias", "cpb", "quadratic", "rope", "mixed_rope"])
def test_on_a_torus_attention_commutes_with_every_roll(position):
    module = stirred(layer(border="wrap", position=position))
    assert equivariance_error(module, image(), Translation(3, -5)) < EXACT


@pytest.mark.parametrize("position", ["relative", "bias", "rope", "mixed_rope"])
def test_a_panorama_commutes_with_turning_around(position):
    """Masked above and below, and a ring from left to right: every roll of the columns, and none of the rows."""
    module = stirred(layer(border=("mask", "wrap"), position=position))
    assert equivariance_error(module, image(), Translation(0, -5)) < EXACT
    assert equivariance_error(module, image(), Translation(3, 0)) > 1e-2
    row = alone(module, Translation(0, -5))
    assert max(row.error, row.interior, row.own, row.border, row.stride, row.encoding) < EXACT
    row = alone(module, Translation(3, -5))
    assert row.border > 1e-2
    assert max(row.interior, row.stride, row.encoding) < EXACT


def test_no_layer_of_a_panorama_brings_an_edge_nearer_along_the_ring():
    model = nn.Sequential(*[layer(border=("mask", "wrap")) for _ in range(4)])  # four times two cells to either side
    *_, last = equivariance_by_layer(model, image(size=(40, 16)), Translation(3, 5))
    assert last.interior is not None
    assert last.interior < EXACT < last.error


@pytest.mark.parametrize(
    ("options", "period"),
    [
        ({"kernel_size": 4, "shared_by": 4}, 4),
        ({"kernel_size": 6, "shared_by": 4, "border": "wrap"}, 4),
        ({"kernel_size": 5, "shared_by": 2, "dilation": 2}, 4),
        ({"kernel_size": 3, "shared_by": 2, "causal": True}, 2),
        ({"kernel_size": 5, "shared_by": 4, "stride": 2}, 4),
    ],
)
def test_where_queries_share_a_window_whole_groups_can_move(options, period):
    x = torch.randn(1, 8, 32, 32, dtype=torch.float64)
    module = stirred(layer(position="relative", **options))
    assert reach_of(module, (32, 32), module(x).shape[2:]).period == (period, period)
    assert alone(module, Translation(period, -2 * period), x).interior < EXACT
    row = alone(module, Translation(options.get("stride", 1), 0), x)
    assert row.stride > 1e-2
    assert row.encoding < EXACT


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_an_absolute_position_breaks_it_on_a_torus_too(position):
    module = stirred(layer(border="wrap", position=position))
    assert equivariance_error(module, image(), Translation(3, -5)) > 1e-2


def test_the_output_of_a_stride_is_moved_by_less():
    module = layer(border="wrap", stride=(2, 4))
    assert equivariance_error(module, image(), Translation(2, -4)) < EXACT
    assert equivariance_error(module, image(), Translation(2, -2)) > 1e-2


def test_global_attention_without_position_is_permutation_equivariant():
    everywhere, near = layer(kind=ns.GlobalSelfAttention2d, position="none"), layer(position="none")
    assert equivariance_error(everywhere, image(), Permutation(3)) < EXACT
    assert equivariance_error(near, image(), Permutation(3)) > 1e-2
    assert equivariance_error(layer(kind=ns.GlobalSelfAttention2d), image(), Permutation(3)) > 1e-2


@pytest.mark.parametrize("transform", [Rotation90(), Rotation90(2), Reflection(-1), Reflection(-2)])
@pytest.mark.parametrize(("size", "stride"), [((11, 11), 1), ((12, 12), 1), ((9, 9), 2), ((7, 10), 1)])
def test_without_position_odd_windows_are_symmetric(transform, size, stride):
    """With a stride as well, where it divides n - 1."""
    x = image(size=size)
    assert equivariance_error(layer(position="none", stride=stride), x, transform) < EXACT
    assert equivariance_error(layer(position="relative", stride=stride), x, transform) > 1e-2


def test_a_stride_on_an_even_map_breaks_the_rotation():
    assert equivariance_error(layer(position="none", stride=2), image(size=(10, 10)), Rotation90()) > 1e-2


def test_scaling_of_what_works_cell_by_cell():
    assert equivariance_error(nn.Conv2d(8, 4, 1).double(), image(), Scaling(2)) < EXACT
    assert equivariance_error(layer(position="none", border="wrap"), image(), Scaling(2)) > 1e-2


def test_a_vector_has_to_stay_as_it_is():
    pool, flatten = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Flatten()
    assert equivariance_error(pool, image(), Translation(1.25, 3)) < EXACT
    assert equivariance_error(pool, image(), Rotation90()) < EXACT
    assert equivariance_error(flatten, image(), Rotation90()) > 1e-2


def test_a_permutation_has_no_meaning_on_a_smaller_map():
    with pytest.raises(ShapeError, match=r"Permutation\(0\) of \(16, 16\) cells has no meaning on \(8, 8\) cells"):
        equivariance_error(layer(stride=2), image(), Permutation())


# ------------------------------------------------------------------------------------------------------------- causes

TORUS = {"border": "wrap"}


@pytest.mark.parametrize("options", [{"position": "none"}, {"position": "relative"}, {"dilation": 3}, {"stride": 2}])
def test_nothing_breaks_a_torus(options):
    row = alone(layer(**TORUS, **options), Translation(2, -4))
    assert max(row.error, row.interior, row.own, row.border, row.stride, row.encoding) < EXACT


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_an_absolute_position_is_all_encoding(position):
    row = alone(layer(**TORUS, position=position), Translation(1, 1))
    assert row.border == row.stride == 0
    assert row.own == row.encoding == row.error > 1e-3


@pytest.mark.parametrize("border", ["mask", "zeros", "shift"])
@pytest.mark.parametrize("options", [{"kernel_size": 5}, {"kernel_size": 4}, {"kernel_size": 3, "dilation": 2}])
@pytest.mark.parametrize("position", ["none", "relative"])
def test_a_border_is_all_border(border, options, position):
    module = ns.LocalSelfAttention2d(8, num_heads=2, border=border, position=position, **options).double()
    row = alone(module, Translation(1, -2))
    assert row.own == row.error > 1e-2
    assert row.border == pytest.approx(row.own)
    assert max(row.interior, row.stride, row.encoding) < EXACT


@pytest.mark.parametrize("shift", [(1, 0), (3, 3), (0.5, 0)])
def test_what_a_stride_breaks_is_all_stride(shift):
    row = alone(layer(**TORUS, stride=2), Translation(*shift))
    assert row.own > 1e-2
    assert row.stride == pytest.approx(row.own)
    assert max(row.border, row.encoding) < EXACT


def test_all_three_at_once_add_up():
    row = alone(layer(stride=2, position="learned"), Translation(1, 1))
    assert min(row.border, row.stride, row.encoding) > 1e-3
    assert row.own == pytest.approx(row.border + row.stride + row.encoding)
    multiple = alone(layer(stride=2, position="learned"), Translation(2, 2))
    assert multiple.stride == 0 < multiple.encoding


def test_global_attention_has_no_border():
    row = alone(layer(kind=ns.GlobalSelfAttention2d, position="relative"), Translation(1, 1))
    assert row.own == row.encoding > 1e-2
    assert alone(layer(kind=ns.GlobalSelfAttention2d, position="none"), Translation(1, 1)).own < EXACT


def test_blocks_are_a_stride_that_the_output_does_not_show():
    module = ns.HaloSelfAttention2d(8, block_size=4, halo_size=1, num_heads=2).double()
    x = image(size=(24, 24))
    by_block, by_cell = alone(module, Translation(4, -4), x), alone(module, Translation(1, 0), x)
    assert by_block.border > 1e-3 > EXACT > by_block.interior
    assert by_cell.stride > 1e-3
    assert by_cell.encoding < EXACT


def test_the_attention_stem_has_a_grid_and_no_border():
    module = ns.AttentionStem2d(3, 8, num_heads=2).double().eval()
    assert alone(module, Translation(4, 8), image(3)).own < EXACT
    row = alone(module, Translation(1, 0), image(3))
    assert row.stride > 1e-3
    assert row.encoding < EXACT


CONVOLUTIONS = {
    "circular": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "zeros": nn.Conv2d(8, 8, 3, padding=1),
    "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "same": nn.Conv2d(8, 8, 5, padding="same"),
    "valid": nn.Conv2d(8, 8, 3, padding="valid"),
    "patches": nn.Conv2d(8, 8, 4, stride=4),
    "strided": nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "pool": nn.MaxPool2d(3, 1, padding=1),
    "average": nn.AvgPool2d(2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_pools_have_borders_and_strides_only(name):
    module = CONVOLUTIONS[name].double()
    row = alone(module, Translation(4, -4))
    assert row.interior is not None
    assert max(row.interior, row.stride, row.encoding) < EXACT
    assert (row.border > 1e-3) == (name not in ("circular", "patches", "average"))
    moved = alone(module, Translation(1, 0))
    assert moved.encoding < EXACT
    assert (moved.stride > 1e-3) == (name in ("patches", "strided", "average"))


def test_only_padding_cuts_a_kernel_off():
    cut = {name: reach_of(module, (16, 16), (16, 16)).is_cut for name, module in CONVOLUTIONS.items()}
    assert [name for name, axes in cut.items() if not any(axes)] == ["circular"]


def test_rotations_have_parts_where_nothing_is_strided():
    row = alone(layer(position="relative"), Rotation90())
    assert row.own == pytest.approx(row.border + row.encoding)
    assert row.encoding > 1e-2
    strided = alone(layer(position="none", stride=2), Rotation90())
    assert strided.own > 1e-2
    assert strided.stride is strided.encoding is None


def test_scalings_and_permutations_have_no_interior():
    for transform in (Scaling(2), Permutation()):
        row = alone(layer(), transform)
        assert row.own > 1e-2
        assert row.interior is row.border is row.stride is row.encoding is None


# ----------------------------------------------------------------------------------------------------------- networks


def network(*modules):
    return nn.Sequential(*modules).double()


def test_the_layer_that_breaks_it_is_named():
    model = network(layer(**TORUS), nn.ReLU(), layer(**TORUS, position="learned"), nn.BatchNorm2d(8), layer(**TORUS))
    rows = equivariance_by_layer(model, image(), Translation(2, 3))
    assert [row.layer for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row.kind for row in rows][1:3] == ["ReLU", "LocalSelfAttention2d"]
    assert [row.error > EXACT for row in rows] == [False, False, True, True, True]
    assert [row.own > EXACT for row in rows] == [False, False, True, False, False]
    assert [row.mixes for row in rows] == [True, False, True, False, True]


def test_the_last_row_is_the_network_s_error():
    model, x = network(layer(), layer(stride=2), nn.ReLU()), image()
    rows = equivariance_by_layer(model, x, Translation(2, 2))
    assert rows[-1].error == equivariance_error(model, x, Translation(2, 2))


@pytest.mark.parametrize(
    "modules",
    [
        lambda: (layer(), nn.ReLU(), layer(**TORUS), nn.Conv2d(8, 8, 3, padding=1)),
        lambda: (layer(border="zeros"), nn.MaxPool2d(2), layer(border="shift")),
        lambda: (nn.Conv2d(8, 8, 3, padding=0), nn.Conv2d(8, 8, 3, padding=1)),
    ],
)
def test_the_interior_has_seen_no_edge(modules):
    rows = equivariance_by_layer(network(*modules()), image(size=(32, 32)), Translation(2, 4))
    assert all(row.interior is not None and row.interior < EXACT < row.error for row in rows)


class Residual(nn.Module):
    """A branch that strides in two steps beside one that does in one."""

    def __init__(self):
        super().__init__()
        self.long = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.short = nn.Conv2d(8, 8, 1, 4)

    def forward(self, x):
        return self.long(x) + self.short(x)


class ByFunctions(nn.Module):
    """No layer of its own says a stride."""

    def forward(self, x):
        x = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, stride=2)[:, :, 1:]
        tokens = F.layer_norm(x.flatten(2).transpose(1, 2), (8,))
        return tokens.transpose(1, 2).reshape(x.shape)[..., ::2, ::2]


# name: layers, cells of the image, a shift that all strides divide, cells of the output that see an edge
CHAINS = {
    "unpadded": (lambda: [nn.Conv2d(8, 8, 3)], (6, 6), (1, 0), 1),
    "unpadded twice": (lambda: [nn.Conv2d(8, 8, 5), nn.ReLU(), nn.Conv2d(8, 8, (1, 3))], (19, 21), (2, -3), 3),
    "dilated": (
        lambda: [nn.Conv2d(8, 8, 3, dilation=3), nn.Conv2d(8, 8, 3, padding=2, dilation=2)],
        (25, 23),
        (1, 2),
        4,
    ),
    "odd halvings": (lambda: [nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3)], (57, 57), (8, -8), 3),
    "the README's size": (lambda: [nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3)], (60, 60), (8, 16), 3),
    "pooled": (lambda: [nn.Conv2d(8, 8, 3), nn.MaxPool2d(3, 2), nn.AvgPool2d((3, 1), (3, 1))], (45, 29), (6, 2), 2),
    "ceiling": (lambda: [nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(8, 8, 3)], (23, 29), (2, 4), 3),
    "adaptive": (lambda: [nn.AdaptiveAvgPool2d((6, 9))], (24, 18), (4, 2), 1),
    "transposed": (lambda: [nn.Conv2d(8, 8, 3, 2), nn.ConvTranspose2d(8, 8, 3, 2)], (33, 29), (2, -2), 5),
    "upsampled": (lambda: [nn.MaxPool2d(4), nn.Upsample(scale_factor=2)], (34, 30), (4, 4), 3),
    "bilinear": (lambda: [nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")], (34, 30), (4, 2), 5),
    "residual": (lambda: [Residual()], (41, 43), (4, -4), 3),
    "by functions": (lambda: [ByFunctions()], (37, 39), (4, 4), 2),
    "padded by a layer": (lambda: [nn.ZeroPad2d(2), nn.Conv2d(8, 8, 3, 2)], (23, 21), (2, 2), 3),
    "shuffled": (lambda: [nn.Conv2d(8, 32, 3, 2, 1), nn.PixelShuffle(2)], (24, 26), (2, 4), 6),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_convolutions_is_equivariant_in_its_interior(name):
    make, size, shift, margin = CHAINS[name]
    model, x = network(*make()), image(size=size)
    assert equivariance_error(model, x, Translation(*shift), margin=margin) < EXACT
    for row in equivariance_by_layer(model, x, Translation(*shift)):
        assert row.interior is None or row.interior < EXACT, row
        assert row.encoding is None or max(row.encoding, row.stride) < EXACT, row


def test_attention_with_a_stride_that_the_size_does_not_show():
    x = image(size=(57, 57))
    assert equivariance_error(layer(stride=8), x, Translation(8, -8), margin=2) < EXACT
    assert equivariance_error(layer(stride=8), x, Translation(7, 0), margin=1) > 1e-2
    torus = network(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"))
    assert equivariance_error(torus, x, Translation(1, 30)) < EXACT


def test_a_stride_that_cannot_be_told_is_asked_for():
    def fourier(x):
        return torch.fft.irfft2(torch.fft.rfft2(x)[..., :4, :5], s=(8, 8))

    with pytest.raises(
        ShapeError, match=r"output of \(1, 8, 8, 8\) lie in an input of \(1, 8, 16, 16\) cannot be told"
    ):
        equivariance_error(fourier, image(), Translation(2, 4))
    assert equivariance_error(fourier, image(), Translation(2, 4), out_transform=Translation(1, 2)) >= 0


def test_strides_are_followed_and_not_guessed():
    x = torch.randn(2, 8, 29, 31, dtype=torch.float64)
    with Following(x) as follow:
        tokens = F.avg_pool2d(x, 4, 3).flatten(2).transpose(1, 2)
        back = tokens.unflatten(1, (9, 10)).movedim(-1, 1)
        uneven = F.adaptive_avg_pool2d(x, 7)
        mixed = F.avg_pool2d(x[:, :, :14, :14], 2) + x[:, :, :7, :7]
    assert follow.grid(tokens) is None
    assert follow.grid(back) == ((2, 3), (3.0, 3.0))
    assert follow.grid(uneven) is None, "its cells are of several sizes"
    assert follow.grid(mixed) is None, "two branches say two things"


@pytest.mark.parametrize(
    ("transform", "axes"), [(Translation(1), 2), (Translation(1, 1), 3), (Translation(1, 2, 3), 1)]
)
def test_a_transform_of_another_number_of_axes(transform, axes):
    with pytest.raises(ShapeError, match=r"moves maps of [123] ax[ie]s, .*; received \("):
        equivariance_error(nn.Identity(), torch.randn(1, 8, *[6] * axes), transform)
    if axes != 3:
        with pytest.raises(ShapeError, match=r"moves maps of [13] ax[ie]s"):
            equivariance_by_layer(nn.Identity(), image(), transform)


def test_one_input_without_a_batch():
    module = stirred(layer(border="wrap"))
    assert equivariance_error(module, image()[0], Translation(3, -5)) < EXACT
    sequence = ns.LocalSelfAttention1d(8, kernel_size=5, num_heads=2, border="wrap").double()
    assert equivariance_error(sequence, image()[0, :, 0], Translation(3)) < EXACT


def test_several_outputs_are_refused_in_a_line():
    with pytest.raises(ShapeError, match="must return one tensor; received tuple: choose one of its parts"):
        equivariance_error(lambda x: (x, x), image(), Translation(1, 0))


def test_an_interior_ends_where_the_edge_is_seen_from_everywhere():
    model = network(*(layer() for _ in range(5)))
    rows = equivariance_by_layer(model, image(), Translation(1, 0))
    assert [row.interior is None for row in rows] == [False, False, False, True, True]
    globally = network(layer(), layer(kind=ns.GlobalSelfAttention2d, position="none"))
    assert equivariance_by_layer(globally, image(), Translation(1, 0))[1].interior is None


class Squeeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


def test_squeeze_and_excitation_brings_the_edge_everywhere():
    rows = equivariance_by_layer(network(layer(), Squeeze(), nn.ReLU()), image(), Translation(1, 0))
    assert rows[0].interior < EXACT
    assert rows[-1].interior is None


def test_channels_last_maps_are_maps_too():
    model = ns.create_model("nat_mini", num_classes=0, global_pool="").double()
    row = {row.layer: row for row in equivariance_by_layer(model, image(3, (128, 128)), Translation(32, 0))}
    attention = row["levels.0.blocks.0.attn"]
    assert attention.map_size == (32, 32)
    assert attention.border > 1e-4 > EXACT > attention.own - attention.border
    assert row["levels.0.blocks.0.norm1"].own < EXACT


def test_a_network_to_its_classes():
    torus = network(layer(**TORUS, position="none"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    rows = equivariance_by_layer(torus, image(), Translation(5, 1))
    assert rows[-1].map_size == ()
    assert max(row.error for row in rows) < EXACT
    flat = equivariance_by_layer(network(nn.Flatten(), nn.Linear(2048, 3)), image(), Translation(5, 1))
    assert flat[0].own == flat[0].error > 1e-2
    assert flat[1].own is None


def test_a_layer_used_twice_has_two_rows_and_in_place_layers_spoil_nothing():
    relu = nn.ReLU(inplace=True)
    model = network(layer(**TORUS), relu, layer(**TORUS, position="learned"), relu)
    rows = equivariance_by_layer(model, image(), Translation(1, 0))
    assert [row.layer for row in rows] == ["0", "1", "2", "1 (2)"]
    twin = network(*(nn.ReLU() if module is relu else module for module in model))
    assert [row.error for row in equivariance_by_layer(twin, image(), Translation(1, 0))] != []
    x = image()
    ours, theirs = (equivariance_by_layer(one, x, Translation(1, 0)) for one in (model, twin))
    assert [row.error for row in ours] == [row.error for row in theirs]


def test_looking_leaves_the_model_as_it_was():
    model = network(layer(), nn.BatchNorm2d(8), nn.Dropout())
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = equivariance_by_layer(model, image()[0], Translation(1, 0))
    assert rows[-1].error == rows[-2].error, "dropout does nothing in evaluation mode"
    assert [module.training for module in model] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_of_a_network():
    model = nn.Sequential(
        ns.LocalSelfAttention2d(8, num_heads=2, out_proj=True), nn.Sequential(nn.ReLU(), nn.Identity())
    )
    assert list(layers_of(model)) == ["0", "1.0", "1.1"]
    assert list(layers_of(model[0])) == [""]
    assert equivariance_by_layer(model[0], torch.randn(8, 9, 9), Rotation90())[0].layer == "LocalSelfAttention2d"


def test_what_cannot_be_asked():
    with pytest.raises(OptionError, match=r"must be a Transform of nearsight.inspect; received <function"):
        equivariance_by_layer(layer(), image(), lambda x: x)
    with pytest.raises(ShapeError, match=r"one \(C, H, W\); received \(8, 16\)"):
        equivariance_by_layer(layer(), image()[0, :, 0], Translation(1))


# -------------------------------------------------------------------------------------------------------------- drawn


@pytest.fixture(scope="module")
def rows():
    torch.manual_seed(0)
    model = network(layer(), nn.ReLU(), layer(stride=2, position="learned"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return equivariance_by_layer(model, image(), Translation(1, 1))


def test_csv_holds_every_number(rows):
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert [line["layer"] for line in table] == [row.layer for row in rows]
    assert [float(line["error"]) for line in table] == [row.error for row in rows]
    assert [line["map_size"] for line in table] == ["16x16", "16x16", "8x8", "1x1", ""]
    assert table[3]["encoding"] == ""


def test_the_drawing_shows_every_part_and_names_what_it_shows(rows):
    (axes,) = draw_equivariance(rows, "a title").axes
    shown = decisive(rows)
    assert [row.layer for row in shown] == ["0", "2", "3", "4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.layer for row in shown]
    assert axes.get_xlabel() == "max |f(Tx) - Tf(x)| / max |f(x)|"
    assert axes.get_title(loc="left") == "a title"
    widths = [sum(bar[place].get_width() for bar in axes.containers) for place in range(len(shown))]
    assert widths == pytest.approx([row.own for row in shown], abs=1e-5)
    labels = [text.get_text() for text in axes.get_figure().legends[0].get_texts()]
    assert {"the layer alone: border", "the layer alone: stride", "the layer alone: encoding"} <= set(labels)
