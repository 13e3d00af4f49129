# SPDX-License-Identifier: Apache-2.0
"""Blocked local attention is what loops say it is, and HaloNet has the paper's numbers of parameters."""

import pytest
import torch
from conftest import projected
from torch import nn

import nearsight as ns
from nearsight.errors import OptionError, ShapeError

TABLE = {
    "halo_h0": (5_502_248, 256),
    "halo_h1": (8_101_352, 256),
    "halo_h2": (9_405_608, 256),
    "halo_h3": (11_842_792, 320),
    "halo_h4": (19_103_464, 384),
    "halo_h5": (30_718_952, 448),
    "halo_h6": (43_458_280, 512),
    "halo_h7": (67_434_728, 600),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_of_networks(name):
    with torch.device("meta"):
        model = ns.create_model(name)
    count, size = TABLE[name]
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.default_cfg["input_size"] == (3, size, size)


def by_loops(layer, x):
    """The layer's equation, cell by cell, for one image without batch."""
    heads, width, block, halo = layer.num_heads, layer.qk_channels, layer.block_size, layer.halo_size
    q, k, v = projected(layer, x[None])[0].split([width, width, layer.out_channels])
    q, k, v = (t.unflatten(0, (heads, -1)).movedim(1, -1) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    middle = block + 2 * halo - 1
    stride, (row, column) = layer.window.stride, layer.position.vectors
    rows, columns = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    y = torch.zeros(heads, len(rows), len(columns), v.shape[-1], dtype=x.dtype)
    for n in range(heads):
        for p, i in enumerate(rows):
            for r, j in enumerate(columns):
                logits, values = [], []
                for a in range(i // block * block - halo, i // block * block + block + halo):
                    for b in range(j // block * block - halo, j // block * block + block + halo):
                        inside = 0 <= a < x.shape[1] and 0 <= b < x.shape[2]
                        if inside or layer.window.border == "zeros":
                            key = k[n, a, b] if inside else torch.zeros_like(k[n, 0, 0])
                            key = key + row[a - i + middle] + column[b - j + middle]
                            logits.append(scale * (q[n, i, j] @ key))
                            values.append(v[n, a, b] if inside else torch.zeros_like(v[n, 0, 0]))
                y[n, p, r] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return y.movedim(-1, 1).flatten(0, 1)


@pytest.mark.parametrize("border", ["mask", "zeros"])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"block_size": 3, "halo_size": 1}, (6, 6)),
        ({"block_size": 3, "halo_size": 1}, (7, 8)),  # no multiple of the block
        ({"block_size": 2, "halo_size": 3}, (5, 3)),  # a halo wider than block and map
        ({"block_size": 8, "halo_size": 1}, (5, 3)),  # a block larger than the map
        ({"block_size": 3, "halo_size": 0, "scale": 0.7}, (5, 4)),
        ({"block_size": 4, "halo_size": 1, "stride": 2}, (9, 8)),
        ({"block_size": 3, "halo_size": 1, "stride": 2}, (8, 7)),  # blocks hold 1 or 2 queries per axis
        ({"block_size": 2, "halo_size": 1, "stride": 3}, (8, 7)),  # some blocks hold none
        ({"block_size": 3, "halo_size": 1, "value_ratio": 1.5, "qkv_bias": True}, (5, 6)),
    ],
)
def test_by_loops(options, size, border):
    layer = ns.HaloSelfAttention2d(4, num_heads=2, border=border, **options).double()
    if layer.kv.bias is not None:
        nn.init.normal_(layer.q.bias)
        nn.init.normal_(layer.kv.bias)
    x = torch.randn(4, *size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x))


def test_gradients():
    layer = ns.HaloSelfAttention2d(4, num_heads=2, block_size=2, halo_size=1, stride=2, value_ratio=2).double()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(1, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))


def test_a_block_as_large_as_the_map_is_global_attention():
    layer = ns.HaloSelfAttention2d(8, num_heads=2, block_size=9, halo_size=0)
    x = torch.randn(2, 8, 9, 9)
    q, k, v = (t.unflatten(1, (2, 4)).movedim(2, -1) for t in projected(layer, x).chunk(3, 1))
    relative = [table.expand(2, -1, -1) for table in layer.position.vectors]
    expected = ns.global_attention(q, k, v, relative=relative)
    torch.testing.assert_close(layer(x), expected.movedim(-1, 2).flatten(1, 2))


def test_equivariant_to_shifts_by_a_block_alone():
    layer = ns.HaloSelfAttention2d(4, num_heads=2, block_size=4, halo_size=1)
    x = torch.randn(1, 4, 20, 20)

    def error(shift):
        moved = layer(x.roll(shift, 2))
        inside = slice(8, -8)
        return (moved - layer(x).roll(shift, 2))[..., inside, inside].abs().max().item()

    assert error(4) < 1e-5
    assert error(1) > 1e-2


@pytest.mark.parametrize("stride", [1, 2])
def test_borders_and_formats_of_the_layer(stride):
    layer = ns.HaloSelfAttention2d(8, 12, value_ratio=1.5, num_heads=4, block_size=4, halo_size=1, stride=stride)
    x = torch.randn(2, 8, 10, 7)
    y = layer(x)
    assert y.shape == (2, 12, -(-10 // stride), -(-7 // stride))
    assert y.is_contiguous()
    y_last = layer(x.contiguous(memory_format=torch.channels_last))
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, y_last)
    torch.testing.assert_close(layer(x[0]), y[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), y, atol=0.1, rtol=0.1)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_parameters_and_names():
    layer = ns.HaloSelfAttention2d(16, value_ratio=2.5, num_heads=4, block_size=4, halo_size=1)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "q.weight": (16, 16, 1, 1),
        "kv.weight": (16 + 40, 16, 1, 1),
        "position.vectors.0": (11, 4),
        "position.vectors.1": (11, 4),
    }
    assert repr(layer).splitlines()[1].strip() == "16, 40, kernel_size=6, num_heads=4, qk_channels=16, shared_by=4"


def test_tables_of_older_files_are_the_positions():
    layer, other = (ns.HaloSelfAttention2d(8, num_heads=2, block_size=4, halo_size=1) for _ in range(2))
    state = {name.replace("position.vectors.0", "rows"): tensor for name, tensor in layer.state_dict().items()}
    state = {name.replace("position.vectors.1", "columns"): tensor for name, tensor in state.items()}
    assert {"rows", "columns"} <= state.keys()
    nn.Sequential(other).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    x = torch.randn(1, 8, 9, 9)
    assert torch.equal(other(x), layer(x))


def test_padding_votes_under_zeros_alone():
    x = torch.randn(1, 4, 4, 4)
    mask, zeros = (
        ns.HaloSelfAttention2d(4, num_heads=1, block_size=4, halo_size=2, border=border) for border in ("mask", "zeros")
    )
    zeros.load_state_dict(mask.state_dict())
    for layer in (mask, zeros):
        for table in layer.position.vectors:
            nn.init.zeros_(table)
        nn.init.zeros_(layer.q.weight)  # queries of zero look everywhere alike
    torch.testing.assert_close(mask(x).mean(), mask.kv(x)[:, 4:].mean())
    torch.testing.assert_close(zeros(x), mask(x) * 16 / 64)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: ns.HaloSelfAttention2d(10, num_heads=4), ShapeError, "num_heads=4 must divide out_channels=10"),
        (lambda: ns.HaloSelfAttention2d(8, 12, value_ratio=5), ShapeError, "value_ratio=5 must divide out_channels=12"),
        (lambda: ns.HaloSelfAttention2d(8, border="reflect"), OptionError, "border must be one of .*'reflect'"),
        (lambda: ns.HaloSelfAttention2d(8, block_size=0), OptionError, "block_size must be .* received 0"),
        (lambda: ns.HaloSelfAttention2d(8, halo_size=-1), OptionError, "halo_size must be .* received -1"),
        (lambda: ns.HaloSelfAttention2d(8)(torch.randn(2, 4, 5, 5)), ShapeError, r"\(B, 8, H, W\).*\(2, 4, 5, 5\)"),
        (lambda: ns.create_model("halo_h0", num_heads=(4, 8)), OptionError, r"one number or 4.*received \(4, 8\)"),
    ],
)
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()
