# SPDX-License-Identifier: Apache-2.0
"""NAT and DiNAT have the published numbers of parameters and names, and load what is published under them."""

import pytest
import torch
from safetensors.torch import save_file

import nearsight as ns
from nearsight.errors import OptionError, ShapeError
from nearsight.models.nat import NeighbourhoodAttention

TABLE = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,  # published without the layer scale of nat_small
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
}
DEPTHS = {"mini": (3, 4, 6, 5)}
HEADS = {"small": (3, 6, 12, 24), "base": (4, 8, 16, 32), "large": (6, 12, 24, 48)}
DIM = {"small": 96, "base": 128, "large": 192}


def published(name, depths=None, heads=None, dim=None, k=7):
    """Names and shapes of a published checkpoint, written down independently of our code."""
    size = name.split("_")[1]
    depths, heads = depths or DEPTHS.get(size, (3, 4, 18, 5)), heads or HEADS.get(size, (2, 4, 8, 16))
    dim, hidden = dim or DIM.get(size, 64), 3 if size in ("mini", "tiny") else 2
    shapes = {
        "patch_embed.proj.0.weight": (dim // 2, 3, 3, 3),
        "patch_embed.proj.0.bias": (dim // 2,),
        "patch_embed.proj.1.weight": (dim, dim // 2, 3, 3),
        "patch_embed.proj.1.bias": (dim,),
        **norm("patch_embed.norm", dim),
    }
    for level, depth in enumerate(depths):
        c = dim * 2**level
        for block in range(depth):
            prefix = f"levels.{level}.blocks.{block}"
            shapes |= {
                **norm(f"{prefix}.norm1", c),
                **linear(f"{prefix}.attn.qkv", c, 3 * c),
                f"{prefix}.attn.rpb": (heads[level], 2 * k - 1, 2 * k - 1),
                **linear(f"{prefix}.attn.proj", c, c),
                **norm(f"{prefix}.norm2", c),
                **linear(f"{prefix}.mlp.fc1", c, hidden * c),
                **linear(f"{prefix}.mlp.fc2", hidden * c, c),
            }
            if name in ("nat_small", "nat_base", "dinat_base"):
                shapes |= {f"{prefix}.gamma1": (c,), f"{prefix}.gamma2": (c,)}
        if level < len(depths) - 1:
            prefix = f"levels.{level}.downsample"
            shapes |= {f"{prefix}.reduction.weight": (2 * c, c, 3, 3), **norm(f"{prefix}.norm", 2 * c)}
    return shapes | norm("norm", c) | linear("head", c, 1000)


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("nat_mini", "nat_small", "dinat_small") else pytest.mark.sweep)
        for name in TABLE
    ],
)
def test_parameters_and_names(name):
    with torch.device("meta"):
        model = ns.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == TABLE[name]
    assert {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} == published(name)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 300}])
@pytest.mark.parametrize("name", ["nat_mini", "dinat_base"])
def test_loads_a_checkpoint_file(name, wrap, tmp_path):
    small = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 32}
    weights = {key: torch.randn(shape) for key, shape in published(name, (1, 1), (1, 2), 32).items()}
    torch.save(wrap(weights), tmp_path / "checkpoint.pth")
    model = ns.create_model(name, checkpoint_path=str(tmp_path / "checkpoint.pth"), **small)
    torch.testing.assert_close(dict(model.state_dict()), weights, atol=0, rtol=0)
    save_file(weights, str(tmp_path / "checkpoint.safetensors"))
    other = ns.create_model(name, checkpoint_path=str(tmp_path / "checkpoint.safetensors"), **small)
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(model.eval()(x), other.eval()(x))
    del weights["norm.bias"]
    torch.save(weights, tmp_path / "incomplete.pth")
    with pytest.raises(RuntimeError, match=r"norm\.bias"):
        ns.create_model(name, checkpoint_path=str(tmp_path / "incomplete.pth"), **small)


def natten(layer, x):
    """Neighbourhood attention of one image as published: the start of the window and of the bias by NATTEN's cases."""
    heads, k, d = layer.num_heads, layer.window.kernel_size, layer.window.dilation
    rows, columns, channels = x.shape
    q, k_, v = layer.qkv(x).view(rows, columns, 3, heads, channels // heads).unbind(2)
    q = q * (channels // heads) ** -0.5
    y = torch.zeros(rows, columns, heads, channels // heads, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            (i0, bi), (j0, bj) = start(i, rows, k, d), start(j, columns, k, d)
            for n in range(heads):
                pairs = [(a, b) for a in range(k) for b in range(k)]
                logits = [q[i, j, n] @ k_[i0 + a * d, j0 + b * d, n] + layer.rpb[n, bi + a, bj + b] for a, b in pairs]
                values = torch.stack([v[i0 + a * d, j0 + b * d, n] for a, b in pairs])
                y[i, j, n] = torch.stack(logits).softmax(0) @ values
    return layer.proj(y.flatten(2))


def start(index, length, kernel_size, dilation):
    """The first key of a query's window and the first entry of the bias table, along one axis."""
    half = kernel_size // 2
    if index - half * dilation < 0:
        return index % dilation, kernel_size - 1 - index // dilation
    if index + half * dilation >= length:
        last = length - 1 - (length - 1 - index) % dilation
        return last - (kernel_size - 1) * dilation, (last - index) // dilation
    return index - half * dilation, half


@pytest.mark.parametrize(("dilation", "size"), [(1, (5, 7)), (2, (6, 8)), (2, (7, 9)), (3, (9, 11))])
def test_the_window_is_nattens(dilation, size):
    torch.manual_seed(0)
    layer = NeighbourhoodAttention(8, 2, ns.Window(3, dilation=dilation, border="shift")).double()
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(*size, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x[None])[0], natten(layer, x))


def test_the_layer_of_nchw_maps_computes_the_same():
    mine = NeighbourhoodAttention(8, 2, ns.Window(3, border="shift"))
    layer = ns.LocalSelfAttention2d(
        8, kernel_size=3, num_heads=2, border="shift", position="bias", qkv_bias=True, out_proj=True
    )
    state = {name.replace("rpb", "position.table"): tensor for name, tensor in mine.state_dict().items()}
    for name in ("qkv.weight", "proj.weight"):
        state[name] = state[name][..., None, None]
    layer.load_state_dict(state)
    x = torch.randn(2, 6, 7, 8)
    torch.testing.assert_close(mine(x), layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_a_block_by_hand():
    block = (
        ns.create_model("nat_base", depths=(1,), num_heads=(2,), embed_dim=16, layer_scale=0.5)
        .levels[0]
        .blocks[0]
        .eval()
    )
    torch.nn.init.normal_(block.gamma2)
    x = torch.randn(1, 8, 9, 16)
    y = x + 0.5 * block.attn(block.norm1(x))
    expected = y + block.gamma2 * block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(y))))
    torch.testing.assert_close(block(x), expected)


def test_dilations_of_dinat():
    with torch.device("meta"):
        model = ns.create_model("dinat_mini")
    found = [[block.attn.window.dilation for block in level.blocks] for level in model.levels]
    assert found == [[1, 8, 1], [1, 4, 1, 4], [1, 2, 1, 2, 1, 2], [1, 1, 1, 1, 1]]
    # The widest window of 7 that the map of a 224 pixel image holds.
    assert [7 * max(level) for level in found] == [56, 28, 14, 7]


@pytest.mark.parametrize("size", [(224, 64), (32, 32), (9, 130), (4, 4), (1, 1)])
def test_any_image_size_also_smaller_than_the_window(size):
    model = ns.create_model("dinat_mini", depths=(2, 2), num_heads=(1, 2), embed_dim=16, num_classes=3).eval()
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_options():
    model = ns.create_model(
        "nat_mini", depths=(1, 2), num_heads=(1, 2), embed_dim=16, kernel_size=5, dilations=((2,), (1, 3))
    )
    windows = [block.attn.window for level in model.levels for block in level.blocks]
    assert windows == [ns.Window(5, dilation=d, border="shift") for d in (2, 1, 3)]
    assert len(model.no_weight_decay()) == 3
    assert all(name.endswith("attn.rpb") for name in model.no_weight_decay())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dilations": ((1,), (1,), (1,), (1,))}, OptionError, r"one per block, depths=\(3, 4, 6, 5\)"),
        ({"num_heads": (1, 2)}, OptionError, r"received num_heads=\(1, 2\)"),
        ({"num_heads": (3, 3, 3, 3)}, ShapeError, "num_heads=3 must divide the 64 channels"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        ns.create_model("nat_mini", **options)
