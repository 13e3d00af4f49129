# SPDX-License-Identifier: Apache-2.0
"""SASA's networks have the paper's numbers of parameters, its order of layers, and the options of its tables."""

import pytest
import torch
import torch.nn.functional as F
from conftest import projections
from torch import nn

import nearsight as ns
from nearsight.errors import OptionError
from nearsight.models.blocks import BLOCKS, MicroBlock, RelativeOnlySelfAttention2d, SasaBlock


def parameters(name, **kwargs):
    with torch.device("meta"):
        return sum(p.numel() for p in ns.create_model(name, **kwargs).parameters())


def spatial_convolutions(model):
    """Those whose neighbouring outputs see a pixel in common: not 1 x 1, not patches."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size > m.stride]


# ------------------------------------------------------------------------------------- the paper's tables, by arithmetic


def by_hand(depths, attention_stages, kernel_size=7, stem=3 * 64 * 49 + 2 * 64, content=True, relative=True):
    """Parameters of the network by the equations of the paper and of ResNet, independent of the code."""
    total, channels = stem, 64
    for stage, depth in enumerate(depths, start=1):
        width = 64 * 2 ** (stage - 1)
        attention = (3 if content else 2) * width**2 + (kernel_size * width if relative else 0)
        spatial = attention if stage in attention_stages else 9 * width**2
        for block in range(depth):
            total += channels * width + 2 * width + spatial + 2 * width + 4 * width**2 + 8 * width
            total += channels * 4 * width + 8 * width if block == 0 else 0
            channels = 4 * width
    return total + channels * 1000 + 1000


@pytest.mark.parametrize(
    ("depth", "blocks", "attention", "convolution"),
    [
        (26, (1, 2, 4, 1), 10_342_632, 13_696_552),
        (38, (2, 3, 5, 2), 14_190_632, 19_626_792),
        (50, (3, 4, 6, 3), 18_038_632, 25_557_032),
    ],
)
def test_table_1_parameters(depth, blocks, attention, convolution):
    name = f"sasa_resnet{depth}"
    assert parameters(name) == by_hand(blocks, {1, 2, 3, 4}) == attention
    assert parameters(name, attention_stages=()) == by_hand(blocks, ()) == convolution
    # The attention stem: 3 -> 64 for query, key and four value matrices, 7 offsets, 4 + 4 places and 4 mixtures, batch norm.
    stem = 6 * 3 * 64 + 7 * 64 + 12 * 16 + 2 * 64
    assert parameters(name, stem="attention") == by_hand(blocks, {1, 2, 3, 4}, stem=stem)


@pytest.mark.parametrize(
    ("stages", "count"),
    [
        ((1, 2, 3, 4), 18_038_632),
        ((2, 3, 4), 18_111_016),
        ((3, 4), 18_500_648),
        ((4,), 20_849_192),
        ((), 25_557_032),
        ((1,), 25_484_648),
        ((1, 2), 25_095_016),
        ((1, 2, 3), 22_746_472),
    ],
)
def test_table_3_parameters(stages, count):
    assert parameters("sasa_resnet50", attention_stages=stages) == by_hand((3, 4, 6, 3), stages) == count


@pytest.mark.parametrize("kernel_size", [3, 5, 9, 11])
def test_table_4_parameters_hardly_depend_on_the_window(kernel_size):
    rows = sum(depth * width for depth, width in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True))
    assert parameters("sasa_resnet50", kernel_size=kernel_size) == 18_038_632 + (kernel_size - 7) * rows


def test_tables_5_and_6_parameters():
    assert parameters("sasa_resnet50", position="none") == 18_012_200
    assert parameters("sasa_resnet50", position="sinusoidal") == 18_012_200
    assert parameters("sasa_resnet50", block="sasa_relative_only") == 16_781_160


def test_small_networks():
    assert parameters("sasa_nano") == 84_906
    assert spatial_convolutions(ns.create_model("sasa_nano")) == []
    assert parameters("sasa_micro") == 1_086_548
    assert spatial_convolutions(ns.create_model("sasa_micro")) == ["stem.0"]
    assert spatial_convolutions(ns.create_model("conv_micro"))[0] == "stem.0"


def test_what_the_small_network_is_held_against():
    """A twin of convolutions in the same places, and a transformer of about as many parameters."""
    squares, last = 48**2 + 96**2, 2 * 224**2  # two stages of the same ratios, and two blocks of another
    convolutions = 9 * (squares + last) + 2 * (48 + 96 + 2 * 224)  # and their norms
    attention = (0.5 + 0.5 + 2) * squares + (0.25 + 0.25 + 1.75) * last + 3 * (6 + 12 + 2 * 14)  # and its hills
    patches = 3 * (96 * 96 + 192 * 224)  # what 2 x 2 cells have more than one
    ups = 2 * squares + 0.75 * 2 * last  # what wide values have more to read
    assert parameters("conv_micro") - parameters("sasa_micro") == convolutions - attention - patches - ups
    assert parameters("vit_micro") == pytest.approx(parameters("sasa_micro"), rel=0.03)


# ---------------------------------------------------------------------------------------------------- how it is put together


def test_attention_runs_at_full_resolution_before_the_pool():
    model, sizes = ns.create_model("sasa_nano"), []
    for stage in model.stages:
        stage[0].spatial.register_forward_hook(lambda layer, x, y: sizes.append((x[0].shape[-1], y.shape[-1])))
    model(torch.randn(1, 3, 16, 16))
    assert sizes == [(16, 16), (16, 16), (8, 8)]


def test_a_small_network_attends_to_halved_maps():
    model, sizes = ns.create_model("sasa_micro"), []
    for stage in model.stages:
        stage[0].spatial.register_forward_hook(lambda layer, x, y: sizes.append((x[0].shape[-1], y.shape[-1])))
    model(torch.randn(1, 3, 28, 28))
    assert sizes == [(14, 14), (7, 7), (4, 4)]
    with pytest.raises(OptionError, match="downsample must be 'pool' or 'patch'; received 'max'"):
        ns.create_model("sasa_micro", block_kwargs={"downsample": "max"})


def test_a_bottleneck_whose_up_projects_what_attention_puts_out():
    block = ns.create_model("sasa_micro").eval().stages[1][0]
    x = torch.randn(2, 96, 10, 12)
    y = block.up(block.norm(block.spatial(block.down(x))))
    torch.testing.assert_close(block(x), (y + block.shortcut(x)).relu())
    assert (block.spatial(block.down(x)) < 0).any()
    twin = ns.create_model("conv_micro").stages[1][0]
    assert isinstance(twin.act, nn.ReLU)


def test_a_bottleneck_by_hand():
    torch.manual_seed(0)
    block = ns.create_model("sasa_nano").eval().stages[1][0]
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.randn(2, 64, 10, 12)
    y = F.avg_pool2d(block.spatial(block.down(x).relu()), 2)
    y = block.up[1](block.up[0](block.norm(y).relu()))
    expected = (y + block.shortcut[1](F.conv2d(x[..., ::2, ::2], block.shortcut[0].weight))).relu()
    torch.testing.assert_close(block(x), expected)


def test_the_twin_is_a_resnet():
    """With convolutions in place of attention, timm's ResNet-26 layout computes the same from the same weights."""
    import timm

    twin = ns.create_model("sasa_resnet26", attention_stages=(), depths=(1, 1, 1, 1), num_classes=5).eval()
    resnet = timm.models.ResNet(timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=5).eval()
    assert [p.shape for p in resnet.state_dict().values()] == [resorted(twin)[k].shape for k in resnet.state_dict()]
    resnet.load_state_dict(resorted(twin))
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(twin(x), resnet(x))


def test_averaged_shortcuts(monkeypatch):
    """``avg_down`` is timm's: the same from the same weights, odd maps included, and no parameter more."""
    import timm

    depths = {"depths": (1, 1, 1, 1), "num_classes": 5}
    with monkeypatch.context() as patch:
        patch.setattr(MicroBlock, "expansion", 4)
        twin = ns.create_model("sasa_resnet26", attention_stages=(), block="micro", **depths).eval()
    resnet = timm.models.ResNet(timm.models.resnet.Bottleneck, (1, 1, 1, 1), num_classes=5, avg_down=True).eval()
    resnet.load_state_dict(dict(zip(resnet.state_dict(), twin.state_dict().values(), strict=True)))
    x = torch.randn(1, 3, 70, 100)
    torch.testing.assert_close(twin(x), resnet(x))

    for name in ("sasa_micro", "conv_micro"):
        assert parameters(name, block_kwargs={"avg_down": False}) == parameters(name)
        shortcuts = ns.create_model(name, block_kwargs={"avg_down": False}).stages[1][0].shortcut
        assert isinstance(shortcuts[0], nn.Conv2d)
    block = ns.create_model("sasa_micro").stages[1][0].eval()
    x = torch.randn(2, 96, 7, 9)
    averages = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2)
    averages[..., -1, :] *= 2  # of the cells that there are
    averages[..., -1] *= 2
    project = block.shortcut[1]
    y = block.up(block.norm(block.spatial(block.down(x))))
    torch.testing.assert_close(block(x), (y + project[1](F.conv2d(averages, project[0].weight))).relu())


def resorted(twin):
    """A twin's state_dict under timm's names."""
    renamed = {}
    for name, tensor in twin.state_dict().items():
        name = name.replace("stem.0", "conv1").replace("stem.1", "bn1").replace("head.fc", "fc")
        if name.startswith("stages"):
            _, stage, block, rest = name.split(".", 3)
            pairs = [("down.0", "conv1"), ("down.1", "bn1"), ("spatial", "conv2"), ("norm", "bn2")]
            for ours, theirs in [*pairs, ("up.0", "conv3"), ("up.1", "bn3"), ("shortcut", "downsample")]:
                rest = rest.replace(ours, theirs) if rest.startswith(ours) else rest
            name = f"layer{int(stage) + 1}.{block}.{rest}"
        renamed[name] = tensor
    return renamed


def test_options():
    model = ns.create_model(
        "sasa_nano",
        attention_stages=(2, 3),
        kernel_size=(3, 5, 7),
        num_heads=(1, 2, 4),
        stem="conv",
        position="rope",
        attn_kwargs={"scale": 1.0},
    )
    kinds = [type(block.spatial).__name__ for stage in model.stages for block in stage]
    assert kinds == ["Conv2d", "LocalSelfAttention2d", "LocalSelfAttention2d", "LocalSelfAttention2d"]
    assert [stage[0].spatial.window.kernel_size for stage in model.stages[1:]] == [5, 7]
    assert [stage[0].spatial.num_heads for stage in model.stages[1:]] == [2, 4]
    assert [stage[0].spatial.scale for stage in model.stages[1:]] == [1.0, 1.0]
    assert spatial_convolutions(model) == ["stem.0", "stages.0.0.spatial"]


def test_what_is_passed_on_joins_what_the_network_passes_on():
    layers = [
        ns.create_model("sasa_resnet26", depths=(1,), widths=(16,), attn_kwargs=given).stages[0][0].spatial
        for given in (None, {"scale": 1.0}, {"recompute_qkv": False})
    ]
    assert [(layer.recompute_qkv, layer.scale) for layer in layers] == [(True, None), (True, 1.0), (False, None)]
    typed = ns.create_model("sasa_micro,block_kwargs={norm: true, act: true},attn_kwargs={border: wrap}")
    block = typed.stages[2][1]
    assert (type(block.norm), type(block.act), block.spatial.window.border) == (nn.BatchNorm2d, nn.ReLU, "wrap")


def test_a_block_of_ones_own(monkeypatch, tmp_path):
    class Wide(SasaBlock):
        expansion = 6

    monkeypatch.setitem(BLOCKS, "wide", Wide)
    model = ns.create_model("sasa_nano", block="wide")
    assert model.num_features == 6 * 48
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again.stages[0][0]) is Wide
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_default_stems():
    assert spatial_convolutions(ns.create_model("sasa_nano", attention_stages=()))[0] == "stem.0"
    assert isinstance(ns.create_model("sasa_nano", stem_stride=2).stem, ns.AttentionStem2d)
    with torch.device("meta"):
        assert spatial_convolutions(ns.create_model("sasa_resnet38")) == ["stem.0"]
        assert spatial_convolutions(ns.create_model("sasa_resnet38", stem="attention")) == []


@pytest.mark.parametrize("stride", [1, 2])
def test_small_resnet_keeps_small_images_large(stride):
    with torch.device("meta"):
        model = ns.create_model("sasa_resnet26_small", stem_stride=stride).eval()
        assert model.forward_features(torch.empty(1, 3, 32, 32)).shape == (1, 2048, 4 // stride, 4 // stride)
        assert (
            sum(p.numel() for p in model.parameters())
            == by_hand((1, 2, 4, 1), {1, 2, 3, 4}, stem=27 * 64 + 128) - 990 * 2049
        )


def test_values_wider_than_queries():
    """A channel of the values costs one matrix and what two in the projection up have more to read."""
    equal = parameters("sasa_micro", value_ratio=1, qk_ratio=1)
    first, last = 48**2 + 96**2, 2 * 224**2  # ratios of 2 and 0.5, of 1.75 and 0.25
    assert parameters("sasa_micro") == equal + (3 * 1 - 2 * 0.5) * first + (3 * 0.75 - 2 * 0.75) * last
    assert parameters("sasa_micro", value_ratio=(3, 2, 1.75)) == parameters("sasa_micro") + 3 * 48**2
    assert parameters("conv_micro", value_ratio=1, qk_ratio=1) == parameters("conv_micro")
    for options in ({}, {"kernel_size": "global"}):
        block = ns.create_model("sasa_micro", **options).stages[1][0]
        assert (block.spatial.in_channels, block.spatial.qk_channels, block.spatial.out_channels) == (96, 48, 192)
        assert block(torch.randn(2, 96, 7, 9)).shape == (2, 192, 4, 5)


def test_attention_with_nothing_behind_it():
    normed = {"block_kwargs": {"norm": True}}
    assert parameters("sasa_micro", **normed) == parameters("sasa_micro") + 2 * (2 * 48 + 2 * 96 + 2 * 1.75 * 224)
    assert parameters("conv_micro", **normed) == parameters("conv_micro")
    block = ns.create_model("sasa_micro").stages[0][0].eval()
    x = torch.randn(2, 32, 6, 5)
    expected = block.up(block.spatial(block.down(x))) + block.shortcut(x)
    torch.testing.assert_close(block(x), expected.relu())


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (28, 28), (64, 64)])
def test_small_images_of_any_size(size):
    assert ns.create_model("sasa_nano", in_chans=1)(torch.randn(2, 1, *size)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_stages": (1, 4)}, r"among \[1, 2, 3\]; received \(1, 4\)"),
        ({"kernel_size": (3, 5)}, r"one number or 3.*received \(3, 5\)"),
        ({"num_heads": (2, 4)}, r"num_heads must be one number or 3.*received \(2, 4\)"),
        ({"value_ratio": (1, 2)}, r"value_ratio must be one number or 3.*received \(1, 2\)"),
        ({"qk_ratio": (0.5,)}, r"qk_ratio must be one number or 3.*received \(0.5,\)"),
        ({"widths": (16, 32)}, r"widths must be one number or 3.*received \(16, 32\)"),
        ({"stem": "pixel", "stem_stride": 2}, "received 'pixel' with stem_stride=2"),
        ({"stem": "attention"}, "received 'attention' with stem_stride=1"),
        (
            {"block": "sasa_relative_only", "position": "bias"},
            "needs position='relative', which has an r; received BiasPosition",
        ),
        ({"block": "sasa_relative_only", "kernel_size": (3, 3, "global")}, "has local attention alone"),
        ({"block": "halo"}, "block must be one of sasa, sasa_relative_only, micro; received 'halo'"),
        ({"block_kwargs": {"norm": True}}, "block_kwargs takes nothing here; received 'norm'"),
        (
            {"block": "micro", "block_kwargs": {"normed": True}},
            "takes act, avg_down, downsample, norm; received 'normed'",
        ),
        ({"block": "micro", "block_kwargs": {"stride": 2}}, "received 'stride'"),
        ({"attn_kwargs": {"num_heads": 2}}, "attn_kwargs takes .*scale.*; received 'num_heads'"),
        ({"attn_kwargs": {"border": "wrap"}, "kernel_size": (3, 5, "global")}, "received 'border'"),
        ({"attn_kwargs": "scale"}, "attn_kwargs must be a table of names and values; received 'scale'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(OptionError, match=message):
        ns.create_model("sasa_nano", **options)


# ------------------------------------------------------------------------------------------------------- q.r without q.k


@pytest.mark.parametrize("stride", [1, 2])
def test_without_content(stride):
    """The layer is that with a key's projection of zeros."""
    torch.manual_seed(0)
    layer = RelativeOnlySelfAttention2d(6, 8, 3, stride=stride, num_heads=2, qkv_bias=True)
    full = ns.LocalSelfAttention2d(6, 8, 3, stride=stride, num_heads=2, qkv_bias=True, position=layer.position)
    state = full.state_dict()
    for name in ("weight", "bias"):
        nn.init.normal_(mine := torch.cat([getattr(projection, name) for projection in projections(layer)]).detach())
        layer.load_state_dict({f"qkv.{name}": mine}, strict=False)
        state[f"qkv.{name}"] = torch.cat([mine[:8], torch.zeros_like(mine[:8]), mine[8:]])
    full.load_state_dict({name: value for name, value in state.items() if name[:2] not in ("q.", "kv")})
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(layer(x), full(x))
    torch.testing.assert_close(layer.attention_weights(x), full.attention_weights(x))
    assert sum(p.numel() for p in layer.parameters()) == 2 * 6 * 8 + 2 * 8 + 3 * 8
    assert repr(layer).startswith("RelativeOnlySelfAttention2d(")


def test_device_and_dtype_of_a_layer():
    layer = ns.LocalSelfAttention2d(8, num_heads=2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
