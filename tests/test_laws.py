# SPDX-License-Identifier: Apache-2.0
"""What must hold whatever the numbers are: identities between different ways to ask for the same thing."""

from __future__ import annotations

from itertools import product

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, assert_near
from einops import rearrange
from timm.models.swin_transformer import WindowAttention
from torch import Tensor

import nearsight as ns

BORDERS = ("mask", "zeros", "shift", "wrap")
by_border = pytest.mark.parametrize("border", BORDERS)


@pytest.fixture(params=ALL, ids=str)
def attend(request):
    """local_attention on a backend; where that one refuses, on the backend that is chosen by default."""

    def attend(query, key, value, window, **tables) -> Tensor:
        refused = request.param.why_not(query, key, value, window, **tables)
        return (ns.local_attention if refused else request.param.attend)(query, key, value, window, **tables)

    return attend


def maps(*size, heads=2, dim=4, count=3) -> list[Tensor]:
    return [torch.randn(2, heads, *size, dim) for _ in range(count)]


def tables(window: ns.Window, rank=2, heads=2, dim=4) -> dict:
    """A bias table and one relative table per axis, as arguments."""
    entries = window.table_size(rank)
    return {"bias": torch.randn(heads, *entries), "relative": [torch.randn(heads, n, dim) for n in entries]}


def assert_same(found: Tensor, expected: Tensor, condition: float = 10) -> None:
    """Equal up to the roundings of both sides."""
    assert_near("result", found, expected.detach().double().numpy(), condition)


# ------------------------------------------------------------------------------------------------ the size of a block


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 2)], ids=str)
def test_a_block_twice_the_map_is_global_attention(attend, size):
    window = ns.Window(tuple(2 * n - 1 for n in size))
    query, key, value = maps(*size)
    arguments = tables(window, len(size))
    expected = ns.global_attention(query, key, value, backend="reference", **arguments)
    assert_same(attend(query, key, value, window, **arguments), expected)


@pytest.mark.parametrize("kernel_size", [(13, 9), (20, 31)])
def test_a_larger_block_changes_nothing(attend, kernel_size):
    query, key, value = maps(7, 5)
    assert_same(attend(query, key, value, ns.Window(kernel_size)), ns.global_attention(query, key, value))


def test_a_shifted_block_of_the_map_is_global_attention(attend):
    query, key, value = maps(3, 5)
    window = ns.Window((3, 5), border="shift")
    arguments = tables(window)
    assert_same(attend(query, key, value, window, **arguments), ns.global_attention(query, key, value, **arguments))


@by_border
def test_a_block_of_one_cell_returns_the_value(attend, border):
    query, key, value = maps(5, 7)
    window = ns.Window(1, border=border)
    assert_same(attend(query, key, value, window, **tables(window)), value, 1)
    assert_same(attend(query, key, value, ns.Window(1, border=border, causal=True)), value, 1)


def test_scale_zero_is_the_mean_of_the_block(attend):
    query, key, value = maps(5, 7)
    count = F.avg_pool2d(torch.ones(5, 7)[None], 3, 1, 1)[0, ..., None]
    mean = F.avg_pool2d(value.flatten(0, 1).movedim(-1, 1), 3, 1, 1).movedim(1, -1).view_as(value) / count
    assert_same(attend(query, key, value, ns.Window(3), scale=0.0), mean)


# ----------------------------------------------------------------------------------------------------------- weights


@by_border
def test_weights_sum_to_one(border):
    query, key = maps(5, 7, count=2)
    window = ns.Window((3, 4), border=border, causal=(True, False), dilation=2)
    weights = ns.attention_weights(query, key, window, **tables(window))
    assert weights.shape == (2, 2, 5, 7, 3, 4)
    assert (weights >= 0).all()
    assert_same(weights.sum((-2, -1)), torch.ones(2, 2, 5, 7))


def test_constant_values_stay(attend):
    """A weighted mean of ones, on every border where only cells of the map vote."""
    query, key, value = maps(5, 7)
    for border in ("mask", "shift", "wrap"):
        assert_same(attend(query, key, torch.ones_like(value), ns.Window(4, border=border)), torch.ones_like(value))


def test_weights_times_windows_is_the_result(attend):
    """The windows come from F.unfold: rows of channels, then cells of the block, for every query."""
    query, key, value = maps(5, 7)
    window = ns.Window((3, 5), dilation=(1, 2))
    arguments = tables(window)
    weights = ns.attention_weights(query, key, window, **arguments).flatten(-2).flatten(2, 3)  # B N P K
    windows = unfold(value, (3, 5), (1, 2))
    expected = torch.einsum("bnpk,bndkp->bnpd", weights, windows).view_as(value)
    assert_same(attend(query, key, value, window, **arguments), expected)


def unfold(tensor: Tensor, kernel_size, dilation) -> Tensor:
    """(B, N, H, W, D) -> (B, N, D, cells of the block, queries), zero-padded, as the tutorials do it."""
    planar = tensor.movedim(-1, 2).flatten(1, 2)
    padding = [(k - 1) // 2 * d for k, d in zip(kernel_size, dilation, strict=True)]
    columns = F.unfold(planar, kernel_size, dilation=dilation, padding=padding)
    return columns.unflatten(1, (tensor.shape[1], tensor.shape[-1], -1))


def test_zeros_is_unfold_with_padding(attend):
    query, key, value = maps(5, 7)
    window = ns.Window((3, 5), dilation=(2, 1), border="zeros")
    keys, values = (unfold(tensor, (3, 5), (2, 1)) for tensor in (key, value))
    logits = torch.einsum("bnpd,bndkp->bnpk", query.flatten(2, 3), keys) / 2  # D = 4
    expected = torch.einsum("bnpk,bndkp->bnpd", logits.softmax(-1), values).view_as(value)
    assert_same(attend(query, key, value, window), expected)


def test_zeros_is_mask_on_a_padded_map(attend):
    """An explicit frame of zeros, wide enough for the block."""
    query, key, value = maps(5, 7)
    window = ns.Window((3, 4), border="zeros")
    arguments = tables(window)
    framed = [F.pad(tensor, [0, 0, 2, 2, 1, 1]) for tensor in (query, key, value)]
    expected = ns.local_attention(*framed, ns.Window((3, 4)), **arguments)[:, :, 1:-1, 2:-2]
    assert_same(attend(query, key, value, window, **arguments), expected)


@pytest.mark.parametrize(("kernel_size", "dilation"), [((3, 4), 1), ((2, 3), (2, 3)), ((9, 2), 1)], ids=str)
def test_shift_shows_every_query_as_many_cells_as_there_are(kernel_size, dilation):
    """min(k, m) on an axis, m being the cells of the query's dilation phase."""
    window = ns.Window(kernel_size, dilation=dilation, border="shift")
    weights = ns.attention_weights(*maps(7, 8, count=2), window)
    per_axis = []
    for axis, n in zip(window.axes(2), (7, 8), strict=True):
        steps = [len(range(p % axis.dilation, n, axis.dilation)) for p in range(n)]
        per_axis.append(torch.tensor([min(axis.kernel_size, m) for m in steps]))
    expected = per_axis[0][:, None] * per_axis[1]
    assert ((weights > 0).sum((-2, -1)) == expected).all()


@by_border
def test_every_query_sees_something(border):
    """No geometry leaves a softmax over nothing, which would be NaN."""
    for n, k, s, d, causal in product((1, 2, 5), (1, 2, 4, 9), (1, 3), (1, 3, 7), (False, True)):
        window = ns.Window(k, stride=s, dilation=d, border=border, causal=causal)
        key = torch.randn(1, 1, n, 2)
        assert ns.attention_weights(key[:, :, ::s], key, window).isfinite().all(), window


# ------------------------------------------------------------------------------------------- strides, dilation, causal


@by_border
def test_stride_keeps_some_of_the_queries(attend, border):
    query, key, value = maps(7, 8)
    dense = ns.Window((3, 4), border=border, dilation=(1, 2))
    strided = ns.Window((3, 4), border=border, dilation=(1, 2), stride=(2, 3))
    arguments = tables(dense)
    expected = attend(query, key, value, dense, **arguments)[:, :, ::2, ::3]
    assert_same(attend(query[:, :, ::2, ::3], key, value, strided, **arguments), expected)


@pytest.mark.parametrize("causal", [False, True])
@by_border
def test_dilation_is_attention_on_interleaved_grids(attend, border, causal):
    query, key, value = maps(8, 9)  # multiples of the dilation: a torus falls apart into whole grids only then
    window = ns.Window(3, border=border, dilation=(2, 3), causal=causal)
    arguments = tables(window)
    found = attend(query, key, value, window, **arguments)
    for y, x in product(range(2), range(3)):
        grid = (slice(None), slice(None), slice(y, None, 2), slice(x, None, 3))
        small = ns.Window(3, border=border, causal=causal)
        assert_same(found[grid], attend(query[grid], key[grid], value[grid], small, **arguments))


def test_dilation_is_interleaved_grids_of_unequal_size(attend):
    query, key, value = maps(7, 11)
    for border in ("mask", "zeros", "shift"):
        window = ns.Window((3, 2), border=border, dilation=(2, 3))
        found = attend(query, key, value, window)
        for y, x in product(range(2), range(3)):
            grid = (slice(None), slice(None), slice(y, None, 2), slice(x, None, 3))
            small = ns.Window((3, 2), border=border)
            assert_same(found[grid], attend(query[grid], key[grid], value[grid], small))


@pytest.mark.parametrize("border", ["mask", "zeros", "shift"])  # on a torus what lies behind comes round again
def test_causal_does_not_know_the_future(attend, border):
    query, key, value = maps(11)
    window = ns.Window(4, border=border, causal=True)
    before = attend(query, key, value, window)
    for tensor in (query, key, value):
        tensor[:, :, 6:] = torch.randn(2, 2, 5, 4)
    after = attend(query, key, value, window)
    assert_same(after[:, :, :6], before[:, :, :6])
    assert (after[:, :, 6:] - before[:, :, 6:]).abs().min() > 1e-6


# ------------------------------------------------------------------------------------------------------- equivariances


def test_permuting_the_heads_permutes_the_result(attend):
    query, key, value = maps(5, 7, heads=3)
    window = ns.Window((3, 4))
    arguments = tables(window, heads=3)
    order = [2, 0, 1]
    expected = attend(query, key, value, window, **arguments)[:, order]
    arguments = {"bias": arguments["bias"][order], "relative": [table[order] for table in arguments["relative"]]}
    permuted = [tensor[:, order] for tensor in (query, key, value)]
    assert_same(attend(*permuted, window, **arguments), expected)


def test_every_head_and_image_stands_alone(attend):
    query, key, value = maps(5, 7)
    whole = attend(query, key, value, ns.Window(3))
    for b, n in product(range(2), range(2)):
        part = [tensor[b : b + 1, n : n + 1] for tensor in (query, key, value)]
        assert_same(attend(*part, ns.Window(3)), whole[b : b + 1, n : n + 1])


def test_global_attention_is_permutation_equivariant(attend):
    """Without position terms the map is a set: any permutation of its cells, here of 3 x 5, permutes the result."""
    query, key, value = maps(3, 5)
    order = torch.randperm(15)
    permuted = [tensor.flatten(2, 3)[:, :, order].view_as(tensor) for tensor in (query, key, value)]
    window = ns.Window(9)
    expected = attend(query, key, value, window).flatten(2, 3)[:, :, order].view_as(value)
    assert_same(attend(*permuted, window), expected)
    bias = torch.randn(2, 9, 9)
    expected = attend(query, key, value, window, bias=bias).flatten(2, 3)[:, :, order].view_as(value)
    assert (attend(*permuted, window, bias=bias) - expected).abs().max() > 0.1, "a position term has to break this"


@pytest.mark.parametrize("shift", [(1, 0), (0, 1), (3, -2)], ids=str)
def test_a_torus_is_translation_equivariant(attend, shift):
    query, key, value = maps(5, 7)
    window = ns.Window((3, 4), border="wrap", dilation=(1, 2))
    arguments = tables(window)

    def roll(tensor):
        return tensor.roll(shift, (2, 3))

    expected = roll(attend(query, key, value, window, **arguments))
    assert_same(attend(roll(query), roll(key), roll(value), window, **arguments), expected)


@by_border
def test_the_interior_is_translation_equivariant(attend, border):
    """A crop moved by (1, 2): results whose blocks lie inside both crops are the same."""
    query, key, value = maps(12, 13)
    window = ns.Window((3, 4), border=border)
    arguments = tables(window)
    crops = [[tensor[:, :, y : y + 11, x : x + 11] for tensor in (query, key, value)] for y, x in ((0, 0), (1, 2))]
    still, moved = (attend(*crop, window, **arguments) for crop in crops)
    assert_same(moved[:, :, 2:8, 3:7], still[:, :, 3:9, 5:9])


def test_transposing_the_image_transposes_the_result(attend):
    query, key, value = maps(5, 7)
    window = ns.Window((3, 4), stride=(1, 2), dilation=(2, 1), causal=(True, False))
    turned = ns.Window((4, 3), stride=(2, 1), dilation=(1, 2), causal=(False, True))
    query = query[:, :, :, ::2]
    arguments = tables(window)
    expected = attend(query, key, value, window, **arguments).transpose(2, 3)
    arguments = {"bias": arguments["bias"].transpose(1, 2), "relative": arguments["relative"][::-1]}
    assert_same(attend(*(tensor.transpose(2, 3) for tensor in (query, key, value)), turned, **arguments), expected)


@pytest.mark.parametrize("border", ["mask", "zeros", "shift", "wrap"])
def test_mirroring_the_image_mirrors_the_result(attend, border):
    """With an odd block and the tables mirrored too."""
    query, key, value = maps(5, 7)
    window = ns.Window((3, 5), border=border)
    arguments = tables(window)
    expected = attend(query, key, value, window, **arguments).flip(3)
    rows, columns = arguments["relative"]
    arguments = {"bias": arguments["bias"].flip(2), "relative": [rows, columns.flip(1)]}
    assert_same(attend(*(tensor.flip(3) for tensor in (query, key, value)), window, **arguments), expected)


def test_a_line_is_an_image_of_one_row(attend):
    query, key, value = maps(11)
    window = ns.Window(4, stride=2, dilation=2)
    expected = attend(query[:, :, ::2], key, value, window)
    flat = ns.Window((1, 4), stride=(1, 2), dilation=(1, 2))
    assert_same(attend(query[:, :, None, ::2], key[:, :, None], value[:, :, None], flat)[:, :, 0], expected)


# -------------------------------------------------------------------------------------------------------------- logits


def test_scale_belongs_to_the_query(attend):
    query, key, value = maps(5, 7)
    relative = tables(ns.Window(3))["relative"]
    expected = attend(2 * query, key, value, ns.Window(3), relative=relative, scale=0.3)
    assert_same(attend(query, key, value, ns.Window(3), relative=relative, scale=0.6), expected)


def test_no_scale_is_one_over_the_root_of_head_dim(attend):
    query, key, value = maps(5, 7, dim=9)
    expected = attend(query, key, value, ns.Window(3), scale=1 / 3)
    assert_same(attend(query, key, value, ns.Window(3)), expected)


def test_softmax_forgets_a_constant(attend):
    query, key, value = maps(5, 7)
    bias = torch.randn(2, 3, 3)
    expected = attend(query, key, value, ns.Window(3), bias=bias)
    assert_same(attend(query, key, value, ns.Window(3), bias=bias + 20), expected, 40)
    each_head = torch.tensor([5.0, -9.0])[:, None, None]
    assert_same(attend(query, key, value, ns.Window(3), bias=bias + each_head), expected, 40)


def test_relative_is_the_bias_of_a_constant_query(attend):
    """With the same query q everywhere, q.r is a table of numbers."""
    _, key, value = maps(5, 7)
    query = torch.randn(4).expand(2, 2, 5, 7, 4)
    rows, columns = tables(ns.Window((3, 4)))["relative"]
    bias = (rows @ query[0, 0, 0, 0])[:, :, None] + (columns @ query[0, 0, 0, 0])[:, None]
    expected = attend(query, key, value, ns.Window((3, 4)), bias=bias, scale=1.0)
    assert_same(attend(query, key, value, ns.Window((3, 4)), relative=[rows, columns], scale=1.0), expected)


def test_attention_is_linear_in_the_values(attend):
    query, key, value = maps(5, 7)
    other = torch.randn_like(value)
    expected = 2 * attend(query, key, value, ns.Window(3)) - attend(query, key, other, ns.Window(3))
    assert_same(attend(query, key, 2 * value - other, ns.Window(3)), expected)


@by_border
def test_a_bias_of_minus_infinity_hides_a_cell(attend, border):
    """A user's own mask: -inf in the table takes an offset out of the softmax."""
    query, key, value = maps(5, 7)
    window = ns.Window((1, 3), border=border)
    bias = torch.zeros(2, *window.table_size(2))
    bias[..., 0 if border != "shift" else slice(0, 2)] = float("-inf")  # all that lies to the left
    found = attend(query, key, value, window, bias=bias)
    axes = [oracle.Axis(5, 1, border=border), oracle.Axis(7, 3, border=border)]
    numbers = [tensor.double().numpy() for tensor in (query, key, value, bias)]
    with np.errstate(invalid="ignore"):
        expected, *_ = oracle.attention(*numbers[:3], axes, numbers[3])
    assert np.isfinite(expected).all()
    assert_near("result", found, expected, 10)


@pytest.mark.parametrize("size", [(12, 8), (4, 4)])
def test_swins_blocks_are_a_shared_window(size):
    """timm's WindowAttention over a map that is cut into blocks. Swin's table goes by query minus key, ours by key minus
    query: turned around, the one is the other."""
    block, heads, channels = 4, 2, 16
    theirs = WindowAttention(channels, heads, window_size=block).double()
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    ours = ns.LocalSelfAttention2d(
        channels, kernel_size=block, shared_by=block, num_heads=heads, position="bias", qkv_bias=True, out_proj=True
    ).double()
    table = theirs.relative_position_bias_table.view(2 * block - 1, 2 * block - 1, heads).permute(2, 0, 1).flip(1, 2)
    state = {"qkv": theirs.qkv, "proj": theirs.proj}
    ours.load_state_dict(
        {"position.table": table}
        | {f"{name}.weight": linear.weight[..., None, None] for name, linear in state.items()}
        | {f"{name}.bias": linear.bias for name, linear in state.items()}
    )
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    blocks = rearrange(x, "b c (y p) (x q) -> (b y x) (p q) c", p=block, q=block)
    expected = rearrange(
        theirs(blocks), "(b y x) (p q) c -> b c (y p) (x q)", b=2, y=size[0] // block, p=block, q=block
    )
    torch.testing.assert_close(ours(x), expected)
