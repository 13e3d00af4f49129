# SPDX-License-Identifier: Apache-2.0
"""Attention maps, rollout and statistics: held to what the layers put out, and to plain loops."""

import itertools
import math
import subprocess
import sys
from importlib import import_module

import numpy as np
import oracle
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import projected
from torch import nn

import nearsight as ns
from nearsight.conversion.gpsa import GatedPositionalSelfAttention
from nearsight.errors import OptionError, ShapeError
from nearsight.inspect import AttentionMap, Translation, equivariance_by_layer, equivariance_error
from nearsight.layers import self_attention
from nearsight.layers.projection import split_heads
from nearsight.models import nat
from nearsight.window import Window

rollout = import_module("nearsight.inspect.rollout")

NEAR = {
    "rtol": 1e-5,
    "atol": 1e-6,
}  # maps are kept as the layers give them: float64 here, or float32 from half precision


def gated(convolution, margin=0):
    """Attention made from a convolution, whose heads have moved, widened and opened their gates."""
    layer = GatedPositionalSelfAttention(convolution, margin=margin)
    with torch.no_grad():
        layer.shift.uniform_(-0.7, 0.7)
        layer.spread.uniform_(0, 0.5)
        layer.gate.uniform_(0.1, 0.9)
    return layer


# Each with its input and what it mixes: a function from layer and input to values (N, *map, E), the output being (N, E) per
# query, heads one after the other.
def values_of(layer, x):
    return split_heads(projected(layer, x).split(layer.out_channels, 1)[-1], layer.num_heads)[0]


def in_blocks(layer, x):
    return split_heads(layer.kv(x)[:, layer.qk_channels :], layer.num_heads)[0]


LOCAL = {
    "1d": (lambda: ns.LocalSelfAttention1d(8, 8, 5, num_heads=2, causal=True), (1, 8, 11)),
    "2d, strided": (lambda: ns.LocalSelfAttention2d(8, 8, 5, num_heads=2, stride=(2, 3)), (1, 8, 7, 11)),
    "2d, zeros": (
        lambda: ns.LocalSelfAttention2d(8, 12, 4, num_heads=3, border="zeros", position="bias"),
        (1, 8, 5, 9),
    ),
    "2d, shift": (lambda: ns.LocalSelfAttention2d(8, 8, 3, num_heads=2, dilation=2, border="shift"), (1, 8, 7, 8)),
    "2d, torus": (lambda: ns.LocalSelfAttention2d(8, 8, 5, num_heads=2, border="wrap", position="rope"), (1, 8, 3, 7)),
    "3d": (lambda: ns.LocalSelfAttention3d(8, 8, 3, num_heads=2, position="quadratic"), (1, 8, 3, 4, 5)),
    "global 1d": (lambda: ns.GlobalSelfAttention1d(8, num_heads=2, map_size=11), (1, 8, 11)),
    "global 2d": (lambda: ns.GlobalSelfAttention2d(8, num_heads=2, map_size=7, position="bias"), (1, 8, 5, 7)),
    "global 3d": (lambda: ns.GlobalSelfAttention3d(8, num_heads=2, map_size=4), (1, 8, 2, 3, 4)),
    "half the halo": (lambda: ns.HaloSelfAttention2d(8, block_size=4, halo_size=2, num_heads=2), (1, 8, 9, 7)),
    "halo, strided": (
        lambda: ns.HaloSelfAttention2d(
            8, block_size=3, halo_size=1, stride=2, value_ratio=2.5, border="zeros", num_heads=2
        ),
        (1, 8, 7, 5),
    ),
}


def mixed(found: AttentionMap, values: torch.Tensor, image_index: int = 0) -> torch.Tensor:
    """What attention by a map puts out, query by query: (N * E, *out)."""
    out = torch.empty(found.num_heads * values.shape[-1], *found.out_size, dtype=torch.float64)
    for query in np.ndindex(*found.out_size):
        pixel = [math.ceil(centre[q]) - 1 for centre, q in zip(found.query_centres, query, strict=True)]
        assert found.query(pixel) == query
        block = torch.from_numpy(found.memory_block(pixel, image_index)).double()
        out[(slice(None), *query)] = torch.einsum("nc,nce->ne", block.flatten(1), values.flatten(1, -2)).flatten()
    return out


@pytest.mark.parametrize("name", LOCAL)
def test_a_map_and_the_values_make_the_layers_output(name):
    make, shape = LOCAL[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    (found,) = ns.attention_maps(nn.Sequential(layer), x)
    assert (found.layer, found.map_size, found.image_size) == ("0", shape[2:], shape[2:])
    values = (in_blocks if isinstance(layer, ns.HaloSelfAttention2d) else values_of)(layer, x)
    torch.testing.assert_close(mixed(found, values.detach()), layer(x)[0].detach(), **NEAR)


CONVOLUTIONS = {
    "same": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), 1),
    "valid": (lambda: nn.Conv2d(3, 4, (3, 4)), 0),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 0),
    "circular with a margin": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), 1),
    "dilated groups": (lambda: nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3), 0),
    "1d": (lambda: nn.Conv1d(3, 4, 5, padding=2), 0),
    "3d": (lambda: nn.Conv3d(3, 4, 2), 0),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_map_of_a_converted_convolution_makes_its_output(name):
    """y[p] = b + sum_h W_h sum_c a_h[p, c] x[c], with the matrices W_h of the kernel's places."""
    make, margin = CONVOLUTIONS[name]
    layer = gated(make(), margin).double()
    x = torch.randn(1, 3, *(7, 9, 5)[: layer.rank], dtype=torch.float64)
    (found,) = ns.attention_maps(nn.Sequential(layer), x)
    looked = mixed(found, x[0].movedim(0, -1).expand(layer.num_heads, *x.shape[2:], 3))
    looked = looked.unflatten(0, (layer.num_heads, layer.groups, -1)).flatten(3)  # heads, groups, channels, queries
    weight = layer.weight.flatten(2).unflatten(0, (layer.groups, -1))  # groups, out, channels, heads
    y = torch.einsum("goch,hgcq->goq", weight, looked).flatten(0, 1) + layer.bias[:, None]
    y = y.unflatten(1, found.out_size)
    wanted = layer(x)[0]
    inside = (slice(None), *[slice(n) for n in wanted.shape[1:]])  # without padding the last queries do not exist
    torch.testing.assert_close(y[inside].detach(), wanted.detach(), **NEAR)


def test_a_random_conversion_keeps_its_queries_in_place():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
    ns.convert(model, init="random", kernel_size=3, num_heads=2, stem=True)
    first, last = ns.attention_maps(model, torch.randn(2, 3, 9, 11))
    assert (first.layer, last.layer) == ("0", "2.attention")
    assert first.weights.shape == (2, 2, 9, 11, 3, 3)
    torch.testing.assert_close(last.weights.sum((-1, -2)), torch.ones(last.weights.shape[:-2]), **NEAR)


def test_an_exact_conversion_looks_at_one_cell_per_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    ns.convert(model, init="exact", stem=True)
    (found,) = ns.attention_maps(model, torch.randn(3, 8, 7))
    for head, (row, column) in enumerate(np.ndindex(3, 3)):
        block = found.memory_block((4, 2))[head]
        assert block[3 + row, 1 + column] == block.sum() == 1


def test_the_stem_mixes_before_it_pools():
    stem = ns.AttentionStem2d(3, 8, kernel_size=4, num_heads=2).double().eval()
    x = torch.randn(1, 3, 9, 6, dtype=torch.float64)
    (found,) = ns.attention_maps(nn.Sequential(stem), x)
    y = mixed(found, split_heads(stem._values(x), 2)[0].detach())[None]
    torch.testing.assert_close(F.max_pool2d(stem.norm(y), 4, ceil_mode=True), stem(x), **NEAR)


@pytest.mark.parametrize("dilation", [1, 2])
def test_neighbourhood_attention_in_a_network(dilation, monkeypatch):
    """q, k and v as its forward pass hands them on, and the oracle's loops."""
    calls = []
    attend = nat.local_attention
    monkeypatch.setattr(
        nat, "local_attention", lambda *args, **kwargs: (calls.append(args), attend(*args, **kwargs))[1]
    )
    model = nat.Nat((1, 2), (2, 4), embed_dim=16, kernel_size=3, dilations=[[1], [dilation, 1]], num_classes=5).double()
    maps = ns.attention_maps(model, torch.randn(1, 3, 28, 36, dtype=torch.float64))
    assert [found.layer for found in maps] == [f"levels.{n}.attn" for n in ("0.blocks.0", "1.blocks.0", "1.blocks.1")]
    for found, (query, key, _, window) in zip(maps, calls, strict=True):
        axes = [oracle.Axis(n, 3, 1, window.dilation, "shift") for n in found.map_size]
        bias = model.get_submodule(found.layer).rpb.detach().numpy()
        wanted = oracle.attention(query.numpy(), key.numpy(), key.numpy(), axes, bias)[1]
        np.testing.assert_allclose(found.weights.numpy(), wanted, **NEAR)


def test_the_weights_are_those_of_the_operation_on_what_the_layer_hands_on(monkeypatch):
    calls = []
    attend = self_attention.local_attention

    def spy(query, key, value, window, *, backend=None, **tables):
        calls.append(ns.attention_weights(query, key, window, **tables))
        return attend(query, key, value, window, backend=backend, **tables)

    monkeypatch.setattr(self_attention, "local_attention", spy)
    monkeypatch.setattr(self_attention, "project_and_attend", lambda *_, **__: None)  # in two steps
    maps = ns.attention_maps(ns.create_model("sasa_nano", num_classes=10), torch.randn(2, 3, 19, 14))
    assert len(maps) == len(calls) == 4
    for found, weights in zip(maps, calls, strict=True):
        torch.testing.assert_close(found.weights, weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sasa_micro", "halo_h0", "nat", "resnet10t"])
def test_every_attention_layer_of_a_network_is_looked_at(name):
    if name == "nat":
        model = nat.Nat((1, 1), (2, 4), embed_dim=16)
    else:
        model = timm.create_model(name)
        if name == "resnet10t":
            ns.convert(model, init="exact")
    maps = ns.attention_maps(model, torch.randn(1, 3, 64, 64))
    assert [found.layer for found in maps] == list(ns.inspect.attention_layers(model))
    assert len(maps) >= 2
    for found in maps:
        total = found.weights.sum(tuple(range(-len(found.map_size), 0)))
        torch.testing.assert_close(total, torch.ones_like(total), **NEAR)


# ------------------------------------------------------------------------------------------------------------- geometry


def test_centres_and_distances_in_pixels():
    """A map of half the image's size, looked at with a stride: by loops over the oracle's memory blocks."""
    model = nn.Sequential(nn.AvgPool2d(2), ns.LocalSelfAttention2d(4, kernel_size=(3, 5), stride=(1, 2), num_heads=2))
    (found,) = ns.attention_maps(model, torch.randn(1, 4, 14, 22))
    assert found.cell_size == (2, 2)
    assert found.out_size == (7, 6)
    np.testing.assert_array_equal(found.query_centres[1], [1, 5, 9, 13, 17, 21])
    axes, distances, cells = [oracle.Axis(7, 3), oracle.Axis(11, 5, 2)], found.distances(), found.key_cells()
    for query in np.ndindex(7, 6):
        seen = {place: cell for place, cell, _ in oracle.block(axes, query)}
        for place in np.ndindex(3, 5):
            if place not in seen:
                assert distances[query][place].isnan()
                assert cells[query][place] == -1
                continue
            row, column = seen[place]
            apart = math.hypot(2 * (row - query[0]), 2 * (column - 2 * query[1]))
            assert distances[query][place] == pytest.approx(apart)
            assert cells[query][place] == 11 * row + column
            assert found.key_centres[0][query[0], place[0]] == 2 * row + 1


def test_on_a_torus_the_shortest_way_counts():
    (found,) = ns.attention_maps(
        ns.LocalSelfAttention1d(4, kernel_size=7, num_heads=2, border="wrap"), torch.randn(1, 4, 9)
    )
    np.testing.assert_allclose(found.distances()[0], [3, 2, 1, 0, 1, 2, 3])


def test_tokens_are_measured_in_their_own_cells():
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), ns.GlobalSelfAttention1d(8, num_heads=2))
    (found,) = ns.attention_maps(model, torch.randn(2, 3, 16, 12))
    assert (found.map_size, found.image_size, len(found.weights)) == ((12,), (12,), 2)


# ---------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.parametrize("name", [*LOCAL, "stem", "gated"])
def test_chosen_queries_are_those_of_all(name):
    if name in LOCAL:
        make, shape = LOCAL[name]
        layer = make()
    else:
        stem = ns.AttentionStem2d(3, 8, num_heads=2), gated(nn.Conv2d(3, 4, 3, stride=2), 1)
        layer, shape = stem[name == "gated"], (1, 3, 10, 9)
    model, x = nn.Sequential(layer), torch.randn(2, *shape[1:])
    pixels = [tuple(n // 2 for n in shape[2:]), tuple(n - 1 for n in shape[2:]), (0,) * len(shape[2:])]
    (whole,), (few,) = ns.attention_maps(model, x), ns.attention_maps(model, x, queries=[*pixels, pixels[0]])
    assert few.queries == tuple(dict.fromkeys(whole.query(pixel) for pixel in pixels))
    for image, pixel in itertools.product((0, 1), pixels):
        np.testing.assert_allclose(few.memory_block(pixel, image), whole.memory_block(pixel, image), **NEAR)
    for ours, theirs in ((few.distances(), whole.distances()), (few.key_cells(), whole.key_cells())):
        torch.testing.assert_close(ours, torch.stack([theirs[query] for query in few.queries]), equal_nan=True)


def test_a_query_that_was_not_asked_for():
    model = nn.Sequential(ns.LocalSelfAttention2d(8, num_heads=2))
    (found,) = ns.attention_maps(model, torch.randn(8, 9, 9), queries=[(1, 1)])
    with pytest.raises(ShapeError, match=r"query \(2, 2\) of layer 0 was not asked for; these were: \(\(1, 1\),\)"):
        found.memory_block((2, 2))


def test_one_image_is_a_batch_of_one():
    model, images = ns.create_model("sasa_nano"), torch.randn(3, 3, 15, 12)
    alone, together = ns.attention_maps(model, images[1]), ns.attention_maps(model, images)
    for one, all_three in zip(alone, together, strict=True):
        torch.testing.assert_close(one.weights[0], all_three.weights[1], rtol=1e-4, atol=1e-5)


def test_a_layer_called_by_keyword_and_without_a_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ns.LocalSelfAttention2d(4, kernel_size=3, num_heads=2)

        def forward(self, x):
            return self.attention(x=x[0])

    model, x = Model(), torch.randn(1, 4, 5, 6)
    (found,) = ns.attention_maps(model, x)
    torch.testing.assert_close(found.weights, model.attention.attention_weights(x))


def test_half_precision_is_kept_in_single():
    model = nn.Sequential(ns.LocalSelfAttention2d(8, num_heads=2), gated(nn.Conv2d(8, 8, 3, padding=1))).bfloat16()
    for found in ns.attention_maps(model, torch.randn(1, 8, 9, 9, dtype=torch.bfloat16)):
        assert found.memory_block((4, 4)).dtype == np.float32


# -------------------------------------------------------------------------------------------------- the model is left alone


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken):
    parts = [
        ns.LocalSelfAttention2d(3, 8, num_heads=2),
        nn.BatchNorm2d(8),
        nn.Dropout(),
        ns.LocalSelfAttention2d(8, num_heads=2),
    ]
    model = nn.Sequential(*parts, Breaks() if broken else nn.ReLU()).train()
    model[1].eval()  # a mix of modes is kept too
    model[0].qkv.weight.requires_grad_(False)
    model[3].qkv.weight.grad = torch.ones_like(model[3].qkv.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    if broken:
        with pytest.raises(RuntimeError, match="broken"):
            ns.attention_maps(model, images)
    else:
        ns.attention_maps(model, images)
    assert [name for name, module in model.named_modules() if not module.training] == ["1"]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {
        name: name != "0.qkv.weight" for name, _ in model.named_parameters()
    }
    assert [name for name, value in model.named_parameters() if value.grad is not None] == ["3.qkv.weight"]
    assert torch.equal(model[3].qkv.weight.grad, torch.ones_like(model[3].qkv.weight))
    assert images.grad is None
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_dropout_sleeps_while_one_looks():
    model = nn.Sequential(nn.Dropout(0.9), ns.LocalSelfAttention2d(8, num_heads=2)).train()
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(ns.attention_maps(model, x)[0].weights, model[1].attention_weights(x).detach())


# ------------------------------------------------------------------------------------------------------------------ memory

PEAK = """
import sys
import torch
from torch import nn
import nearsight as ns

def peak():
    # Not getrusage: its maximum outlives an exec and would be that of the process which started this one.
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

look = ns.attention_maps  # what looking needs is loaded when it is first asked for
model = nn.Sequential(ns.LocalSelfAttention2d(3, 16, num_heads=4), nn.ReLU(), ns.LocalSelfAttention2d(16, num_heads=4))
image = torch.randn(1, 3, 512, 512)
with torch.no_grad():
    model(image)
before = peak()
maps = look(model, image, queries=[(0, 0), (255, 300), (511, 511)])
print(peak() - before)
del maps
look(model, image[..., :256, :256])
print(peak() - before)
"""


@pytest.mark.sweep
def test_chosen_queries_of_a_large_image_need_little_more_than_a_forward_pass():
    """All weights of both layers are 411 MB, 103 MB of a quarter of the image; those of three queries are a few kB."""
    finished = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    few, whole = map(int, finished.stdout.split())
    assert few < 64e6  # the allocator does not always find again the room of a map, 17 MB
    assert whole > 80e6, "the measure is blind"


def test_too_many_weights_are_refused_before_they_are_made():
    layer = ns.LocalSelfAttention2d(8, kernel_size=32, num_heads=4)
    with pytest.raises(
        OptionError, match=r"layer 0 take 4\.0 GB, more than the 1 GB that is kept: name the queries want"
    ):
        ns.attention_maps(nn.Sequential(layer), torch.randn(4, 8, 256, 256))


# ----------------------------------------------------------------------------------------------------------------- rollout


def rolled_out(maps, pixel, layer):
    """Rollout to one layer, by a dense matrix per layer and loops over queries, at one result per pixel of the image."""

    def shares(cells, others):
        """(cells, others): how much of each cell every one of others covers, by counting fine slices."""
        fine = math.lcm(cells, others)
        counts = np.zeros((cells, others))
        for slice_ in range(fine):
            counts[slice_ * cells // fine, slice_ * others // fine] += cells / fine
        return counts

    row = None
    for found in reversed(maps[: layer + 1]):
        if row is None:
            row = np.zeros(found.out_size)
            row[found.query(pixel)] = 1
        else:  # of this layer's outputs to the cells of the next layer's input
            down, across = (shares(a, b) for a, b in zip(row.shape, found.out_size, strict=True))
            row = np.einsum("yx,yp,xq->pq", row, down, across)
        attended = np.zeros(found.map_size)
        strides = [axis.stride for axis in found.window.axes(2)]
        for query in np.ndindex(*found.out_size):
            own = tuple(q * stride for q, stride in zip(query, strides, strict=True))
            pixel = [int((cell + 0.5) * size) for cell, size in zip(own, found.cell_size, strict=True)]
            attended += row[query] / 2 * found.memory_block(pixel).mean(0)
            attended[own] += row[query] / 2
        row = attended
    down, across = (shares(a, b) for a, b in zip(row.shape, maps[0].image_size, strict=True))
    return np.einsum("yx,yp,xq->pq", row, down, across)


def network():
    return nn.Sequential(
        ns.LocalSelfAttention2d(3, 8, 3, num_heads=2),
        nn.AvgPool2d(2),
        ns.LocalSelfAttention2d(8, kernel_size=3, stride=2, num_heads=4, border="wrap"),
        ns.GlobalSelfAttention2d(8, num_heads=2),
    )


def test_rollout_by_dense_matrices():
    maps = ns.attention_maps(network(), torch.randn(1, 3, 12, 20))
    pixels = [(0, 0), (7, 13), (11, 19)]
    rollout = ns.attention_rollout(maps, pixels)
    assert rollout.shape == (3, 3, 12, 20)
    np.testing.assert_allclose(rollout.sum((-1, -2)), 1, rtol=1e-5)
    for layer, (index, pixel) in itertools.product(range(3), enumerate(pixels)):
        np.testing.assert_allclose(rollout[layer, index], rolled_out(maps, pixel, layer), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("border", ["mask", "zeros", "shift", "wrap"])
@pytest.mark.parametrize(
    "options", [{}, {"shared_by": 3}, {"dilation": 2, "causal": (True, False)}, {"stride": (2, 1)}]
)
def test_rollout_from_cell_to_cell_is_that_of_matrices(border, options, monkeypatch):
    """Rows that see little of a map are not multiplied with all of it."""
    model = nn.Sequential(
        ns.LocalSelfAttention2d(3, 8, 3, num_heads=2, border=border),
        nn.AvgPool2d(2),
        ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, border=border, **options),
        ns.LocalSelfAttention2d(8, kernel_size=2, num_heads=2),
    )
    maps = ns.attention_maps(model, torch.randn(3, 28, 34))
    pixels, size = [(0, 0), (14, 17), (27, 33), (5, 30)], (7, 9)
    by_cells = []
    for few in (0, 10**9):
        monkeypatch.setattr(rollout, "FEW", few)
        by_cells.append([ns.attention_rollout(maps, pixels), ns.attention_rollout(maps, pixels, size=size)])
    monkeypatch.setattr(rollout, "GATHERED", 1000)
    monkeypatch.setattr(rollout, "FEW", 0)
    by_cells.append([ns.attention_rollout(maps, pixels), ns.attention_rollout(maps, pixels, size=size)])
    for found in by_cells[::2]:
        for one, other in zip(found, by_cells[1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_rollout_of_wide_weights_is_in_float32():
    maps = ns.attention_maps(network().double(), torch.randn(1, 3, 12, 20, dtype=torch.float64))
    assert maps[0].weights.dtype == torch.float64
    assert ns.attention_rollout(maps, [(3, 4)]).dtype == np.float32


def test_rollout_stays_where_memory_blocks_lead():
    model = nn.Sequential(
        ns.LocalSelfAttention2d(3, 8, 3, num_heads=2), ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2)
    )
    rollout = ns.attention_rollout(ns.attention_maps(model, torch.randn(3, 11, 13)), [(5, 6)])
    for layer, reach in enumerate((1, 2)):
        rows, columns = np.nonzero(rollout[layer, 0])
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5 - reach, 5 + reach, 6 - reach, 6 + reach)


def test_rollout_on_fewer_cells_is_the_sum_of_pixels():
    maps = ns.attention_maps(network(), torch.randn(2, 3, 12, 20))
    fine = ns.attention_rollout(maps, [(3, 4)], image_index=1)
    coarse = ns.attention_rollout(maps, [(3, 4)], image_index=1, size=(4, 5))
    np.testing.assert_allclose(coarse, fine.reshape(3, 1, 4, 3, 5, 4).sum((3, 5)), rtol=1e-5)


def test_rollout_needs_all_queries():
    with pytest.raises(OptionError, match="needs the maps of all queries"):
        ns.attention_rollout(ns.attention_maps(network(), torch.randn(1, 3, 12, 20), queries=[(1, 1)]), [(1, 1)])
    with pytest.raises(OptionError, match="of at least one layer"):
        ns.attention_rollout([], [(1, 1)])


# -------------------------------------------------------------------------------------------------------------- statistics


def test_statistics_by_loops():
    model = nn.Sequential(
        nn.AvgPool2d(2),
        ns.LocalSelfAttention2d(6, kernel_size=3, stride=2, num_heads=3, border="zeros", position="bias"),
    )
    (found,) = ns.attention_maps(model, torch.randn(2, 6, 14, 10))
    (numbers,) = ns.attention_statistics([found])
    axes = [oracle.Axis(7, 3, 2, border="zeros"), oracle.Axis(5, 3, 2, border="zeros")]
    distance, entropy, shared = [], [], []
    for image, query in itertools.product(range(2), np.ndindex(4, 3)):
        weights = found.weights[(image, slice(None), *query)].double().numpy()
        near = np.zeros(3), np.zeros(3)  # weighted distance and weight, per head, of the cells that are on the map
        for place, cell, _ in oracle.block(axes, query):
            if cell[0] < 7 and cell[1] < 5:
                apart = 2 * math.hypot(cell[0] - 2 * query[0], cell[1] - 2 * query[1])
                near[0][:] += apart * weights[(slice(None), *place)]
                near[1][:] += weights[(slice(None), *place)]
        distance.append(near[0] / near[1])
        entropy.append([-sum(w * math.log2(w) for w in head.flat) for head in weights])
        mean = weights.mean(0)
        shared.append(-sum(w * math.log2(w) for w in mean.flat) - np.mean(entropy[-1]))
    np.testing.assert_allclose(numbers.distance, np.mean(distance, 0), rtol=1e-5)
    np.testing.assert_allclose(numbers.entropy, np.mean(entropy, 0), rtol=1e-5)
    assert numbers.diversity == pytest.approx(np.mean(shared) / math.log2(3), rel=1e-4)
    assert numbers.uniform == pytest.approx(math.log2(9))  # with zeros every place votes


def known(weights):
    """A map of one query's block, (heads, 3), on every query of a torus of 5 cells and 50 pixels."""
    weights = torch.tensor(weights).expand(1, 5, -1, -1).movedim(1, 2)
    return AttentionMap("known", weights, Window(3, border="wrap"), (5,), (50,))


@pytest.mark.parametrize(
    ("weights", "distance", "entropy", "diversity"),
    [
        ([[0.0, 1, 0], [0, 1, 0]], [0, 0], [0, 0], 0),  # both look at themselves
        ([[1.0, 0, 0], [0, 0, 1]], [10, 10], [0, 0], 1),  # no cell in common
        ([[0.5, 0, 0.5], [0.5, 0, 0.5]], [10, 10], [1, 1], 0),
        ([[1 / 3, 1 / 3, 1 / 3], [0, 1, 0]], [20 / 3, 0], [math.log2(3), 0], None),
    ],
)
def test_statistics_of_known_heads(weights, distance, entropy, diversity):
    (numbers,) = ns.attention_statistics([known(weights)])
    np.testing.assert_allclose(numbers.distance, distance, atol=1e-6)
    np.testing.assert_allclose(numbers.entropy, entropy, atol=1e-6)
    assert numbers.uniform == pytest.approx(math.log2(3))
    if diversity is not None:
        assert numbers.diversity == pytest.approx(diversity, abs=1e-6)


def test_one_head_has_no_diversity():
    assert ns.attention_statistics([known([[0.25, 0.5, 0.25]])])[0].diversity == 0


def test_statistics_of_chosen_queries_are_means_over_them():
    model, x = nn.Sequential(ns.LocalSelfAttention2d(4, kernel_size=3, num_heads=2)), torch.randn(1, 4, 6, 7)
    pixels = list(np.ndindex(6, 7))
    (whole,), (few,) = (ns.attention_statistics(ns.attention_maps(model, x, queries=some)) for some in (None, pixels))
    for name in ("distance", "entropy", "uniform", "diversity"):
        np.testing.assert_allclose(getattr(whole, name), getattr(few, name), rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ planted faults


def test_a_transposed_map_would_be_seen(monkeypatch):
    """The comparison with the layer's output is no formality: a map whose axes are exchanged fails it."""
    layer, x = ns.LocalSelfAttention2d(8, 8, 5, num_heads=2).double(), torch.randn(1, 8, 7, 7, dtype=torch.float64)
    (found,) = ns.attention_maps(nn.Sequential(layer), x)
    turned = AttentionMap("0", found.weights.mT.contiguous(), found.window, found.map_size, found.image_size)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mixed(turned, values_of(layer, x).detach()), layer(x)[0].detach(), **NEAR)


# ------------------------------------------------------------------------------------------- what hooks do not see

X = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))


def chain():
    return nn.Sequential(
        ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2),
        nn.Sequential(nn.ReLU(), ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, stride=2)),
    ).eval()


def compiled(how):
    model = chain()
    if how == "in place":
        model.compile(backend="eager")
    elif how == "a layer":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model = torch.compile(model, backend="eager", fullgraph=True)
    return model


@pytest.mark.parametrize("how", ["as one graph", pytest.param("in place", marks=pytest.mark.sweep), "a layer"])
def test_a_compiled_model_loses_no_layer(how):
    model = compiled(how)
    with torch.no_grad():
        before = model(X)
        maps = ns.attention_maps(model, X)
        assert [found.layer for found in maps] == ["0", "1.1"]
        kinds = [row.kind for row in equivariance_by_layer(model, X, Translation(2, 2))]
        assert kinds == ["LocalSelfAttention2d", "ReLU", "LocalSelfAttention2d"]
        assert equivariance_error(model, X, Translation(2, 2), margin=2) < 1e-5
        assert torch.equal(model(X), before)


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = chain(), chain()

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_did_not_run_is_told():
    with pytest.raises(OptionError, match=r"layer unused\.0 did not run.*2 of 4 attention layers"):
        ns.attention_maps(Skips(), X)


class Folded(nn.Module):
    """Swin by hand: every window is an image of the batch; or, in three axes, every image is a frame."""

    def __init__(self, in_time=False):
        super().__init__()
        self.in_time = in_time
        self.first = nn.Conv2d(8, 8, 1)
        kind = ns.GlobalSelfAttention3d if in_time else ns.GlobalSelfAttention2d
        self.attention = kind(8, num_heads=2, map_size=6)

    def forward(self, x):
        if self.in_time:
            return self.attention(self.first(x).transpose(0, 1)[None])[0].transpose(0, 1)
        b, c, h, w = x.shape
        windows = x.view(b, c, h // 6, 6, w // 6, 6).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 6, 6)
        y = self.attention(windows).view(b, h // 6, w // 6, c, 6, 6)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


@pytest.mark.parametrize(("in_time", "given"), [(False, 8), (True, 1)])
def test_windows_in_the_batch_are_no_images(in_time, given):
    images = torch.randn(2, 8, 12, 12)
    with pytest.raises(
        OptionError, match=rf"layer attention was given {given} maps for a batch of 2: windows, or frames"
    ):
        ns.attention_maps(Folded(in_time), images)
    if not in_time:
        with pytest.raises(OptionError, match="was given 4 maps for a batch of 1"):
            ns.explore(Folded(), images[0], picture=torch.rand(3, 12, 12))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 8, 4, 4), ns.LocalSelfAttention1d(8, kernel_size=3, num_heads=2)

    def forward(self, x):
        return self.attention(self.patches(x).flatten(2))


def test_a_single_image_where_attention_has_one_axis():
    x = torch.randn(3, 16, 12)
    (single,), (batch,) = ns.attention_maps(Tokens(), x), ns.attention_maps(Tokens(), x[None])
    assert single.weights.shape == batch.weights.shape == (1, 2, 12, 3)


@pytest.mark.parametrize("wide", ["the model", "the default"])
def test_a_page_of_a_model_in_another_dtype(wide):
    model = chain().double() if wide == "the model" else chain()
    if wide == "the default":
        torch.set_default_dtype(torch.float64)
    try:
        assert '"rollout": {' in ns.explore(model, X, picture=torch.rand(3, 12, 12)).html
        assert equivariance_by_layer(model, X.to(next(model.parameters())), Translation(2, 2))[-1].error > 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_of_a_large_picture_a_part_is_measured_and_what_is_done_is_said(capsys, monkeypatch):
    monkeypatch.setattr(import_module("nearsight.inspect.explore"), "PART", 8)
    page = ns.explore(chain(), X, picture=torch.rand(3, 12, 12))
    assert "Equivariance is that of the middle 8 x 8 pixels." in page.html
    said = capsys.readouterr().err
    assert [line.split(": ")[1] for line in said.splitlines()] == [
        "the weights of every layer ...",
        "rollout ...",
        "equivariance, layer by layer ...",
    ]
    monkeypatch.setattr(import_module("nearsight.inspect.explore"), "PART", 12)
    assert "Equivariance is" not in ns.explore(chain(), X, picture=torch.rand(3, 12, 12)).html
    assert capsys.readouterr().err == ""
