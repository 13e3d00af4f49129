# SPDX-License-Identifier: Apache-2.0
"""Every network of ours is what timm expects of its own. What each family says of itself is in test_<family>.py.

Whole networks are built on the meta device, which has shapes and no numbers; what computes is narrow and shallow.
"""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.optim
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

import nearsight as ns
from nearsight.attention import native
from nearsight.errors import DtypeError, OptionError
from nearsight.models import input_size, made_for_size, parse_spec, refuse_ignored

MODELS = ns.list_models()
# At least one of every family and of every kind of block, with what makes it small.
SASA = {"depths": (1, 2, 1), "widths": (8, 16, 24), "stem_width": 16, "num_heads": 2, "kernel_size": 3}
HALO = {"depths": (1, 2), "widths": (8, 16), "stem_width": 16, "num_heads": 2, "block_size": 4, "halo_size": 1}
NAT = {"depths": (2, 2), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3}
SMALL = {
    "sasa_nano": {},
    "sasa_resnet50": SASA,
    "sasa_resnet26": {**SASA, "stem": "attention", "block": "sasa_relative_only"},
    "sasa_resnet26_small": SASA,
    "halo_h0": HALO,
    "halo_h5": {**HALO, "final_width": 20, "border": "zeros"},
    "nat_mini": NAT,
    "dinat_base": NAT,
}
AGAIN = ("sasa_resnet50", "sasa_resnet26_small", "dinat_base")  # of the kinds of the others
every_small = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.sweep if name in AGAIN else []) for name in SMALL]
)


def small(name, **kwargs):
    torch.manual_seed(0)
    return ns.create_model(name, **{**SMALL[name], **kwargs})


def documented():
    """The rows of docs/reference/models.md: name -> parameters, GFLOP, image size."""
    page = (Path(__file__).parent.parent / "docs" / "reference" / "models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d.]+) \| (\d+) \|", page, re.MULTILINE)
    return {name: (int(count.replace(",", "")), float(gflop), int(size)) for name, count, gflop, size in rows}


def map_size(pixels, reduction):
    return -(-pixels // reduction)


# ------------------------------------------------------------------------------------------------- every network, whole


@pytest.mark.parametrize("name", MODELS)
def test_whole_networks(name):
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    classes, size = model.default_cfg["num_classes"], model.default_cfg["input_size"][1]
    assert model.get_classifier().weight.shape == (classes, model.head_hidden_size)
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    count, _, image = documented()[name]
    assert (sum(p.numel() for p in model.parameters()), size) == (count, image)
    reductions = [entry["reduction"] for entry in model.feature_info]
    assert reductions == sorted(set(reductions)), "one map per scale"
    assert model.default_cfg["pool_size"] == (map_size(size, reductions[-1]),) * 2
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == model.in_chans == 3
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert inspect.getdoc(timm.model_entrypoint(name))


@pytest.mark.parametrize(
    "name", ["sasa_resnet50", *(pytest.param(name, marks=pytest.mark.sweep) for name in ("halo_h3", "nat_mini"))]
)
def test_whole_networks_take_their_image(name):
    with torch.device("meta"), torch.no_grad():
        model = ns.create_model(name).eval()
        assert model(torch.empty(1, *model.default_cfg["input_size"])).shape == (1, 1000)


@pytest.mark.parametrize("name", ["sasa_resnet26", "halo_h0", "dinat_mini"])
def test_features_only_of_whole_networks(name):
    with torch.device("meta"):
        backbone = ns.create_model(name, features_only=True)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]


def test_every_family_is_swept():
    swept = {timm.model_entrypoint(name).__module__ for name in SMALL}
    assert swept == {timm.model_entrypoint(name).__module__ for name in MODELS}


# ------------------------------------------------------------------------------------------- one of each kind, computing


@every_small
@pytest.mark.parametrize("size", [(32, 32), (17, 24), (5, 3)])
def test_any_image_size(name, size):
    model = small(name, num_classes=7, in_chans=1).eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 7)


@every_small
def test_every_parameter_gets_a_gradient(name):
    model = small(name, num_classes=3, drop_path_rate=0.0)
    F.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_small
def test_a_classifier_takes_no_map(name):
    """timm's networks are built so and fail at the first picture."""
    for options in ({}, {"num_classes": 5}):
        with pytest.raises(OptionError, match=r"global_pool='' give num_classes=0"):
            small(name, global_pool="", **options)
    model = small(name, global_pool="", num_classes=0).eval()
    assert model(torch.randn(1, 3, 32, 32)).ndim == 4
    with pytest.raises(OptionError, match="num_classes=0; received 5"):
        model.reset_classifier(5)
    model.reset_classifier(5, "avg")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(OptionError, match="num_classes=0; received 5"):
        model.reset_classifier(5, "")


@every_small
@pytest.mark.parametrize("global_pool", ["avg", "max", "catavgmax"])
def test_features_and_head(name, global_pool):
    model, x = small(name, global_pool=global_pool).eval(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    expected = [features.mean((2, 3))] if "avg" in global_pool else []
    expected += [features.amax((2, 3))] if "max" in global_pool else []
    torch.testing.assert_close(pooled, torch.cat(expected, 1))


@every_small
def test_reset_classifier(name):
    model, x = small(name).eval(), torch.randn(2, 3, 32, 32)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(4, "max")
    torch.testing.assert_close(model(x), model.get_classifier()(model.forward_features(x).amax((2, 3))))


@every_small
def test_features_only(name):
    backbone, x = small(name, features_only=True).eval(), torch.randn(1, 3, 33, 48)
    info = backbone.feature_info
    maps = backbone(x)
    for feature_map, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert feature_map.shape == (1, channels, map_size(33, reduction), map_size(48, reduction))
    one = small(name, features_only=True, out_indices=(1,)).eval()
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in small(name).parameters())
    torch.testing.assert_close(one(x), [maps[1]])


@every_small
@pytest.mark.filterwarnings("ignore:Was not able to add assertion")
def test_graphs_of_torch_fx(name):
    """As timm traces its own networks; the graph serves maps of other sizes too."""
    model = small(name).eval()
    graph = timm.models.GraphExtractNet(model, ["head"])
    for size in ((32, 32), (29, 40)):
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(graph(x), model(x))


def test_networks_of_convolutions_are_traced_by_torch_fx_itself():
    model, x = ns.create_model("conv_nano").eval(), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


DILATED = {
    **{name: (name, {}) for name in SMALL},
    "sasa_micro": ("sasa_micro", {"position": "relative"}),
    "sasa_micro, pool": ("sasa_micro", {"position": "cpb", "block_kwargs": {"downsample": "pool"}}),
    "conv_micro": ("conv_micro", {}),
    "mixed": ("sasa_nano", {"attention_stages": (3,), "attn_kwargs": {"dilation": (1, 2)}, "position": "bias"}),
}


@pytest.mark.parametrize(("name", "kwargs"), DILATED.values(), ids=DILATED)
def test_output_stride_computes_the_same_for_more_cells(name, kwargs):
    kwargs = {**SMALL.get(name, {}), **kwargs, "num_classes": 5}
    torch.manual_seed(0)
    plain, x = ns.create_model(name, **kwargs).eval(), torch.randn(1, 3, 45, 64)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.bias)
    reductions = [entry["reduction"] for entry in plain.feature_info]
    for output_stride in reductions[:-1]:
        dense = ns.create_model(name, output_stride=output_stride, **kwargs).eval()
        dense.load_state_dict(plain.state_dict())
        assert [entry["reduction"] for entry in dense.feature_info] == [min(r, output_stride) for r in reductions]
        found, expected = (model.forward_intermediates(x, intermediates_only=True) for model in (dense, plain))
        for dense_map, plain_map, reduction in zip(found, expected, reductions, strict=True):
            assert dense_map.shape[2:] == (
                map_size(45, min(reduction, output_stride)),
                64 // min(reduction, output_stride),
            )
            apart = max(1, reduction // output_stride)
            torch.testing.assert_close(dense_map[:, :, ::apart, ::apart], plain_map)


@pytest.mark.parametrize("name", [*SMALL, "conv_micro", "vit_micro"])
def test_weights_load_with_other_channels(name, tmp_path):
    """timm fits those of what reads the picture: in one channel it then sees what it saw in three equal ones."""
    kwargs = {**SMALL.get(name, {}), "pretrained_cfg_overlay": {"file": str(tmp_path / "model.safetensors")}}
    model = ns.create_model(name, **kwargs).eval()
    save_model(model, str(tmp_path / "model.safetensors"))
    grey = ns.create_model(name, **kwargs, pretrained=True, in_chans=1).eval()
    assert grey.in_chans == 1
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), model(x.expand(2, 3, 32, 32)))


@every_small
def test_timms_optimisers_leave_positions_alone(name):
    model = small(name)
    places = {id(p) for n, p in model.named_parameters() if re.search(r"position|rpb|\.row$|\.column$|\.mixture$", n)}
    groups = timm.optim.create_optimizer_v2(model, "adamw", weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert places
    assert decayed
    assert not places & decayed


def test_numbers_of_numpy_are_numbers():
    n, x = np.int64, torch.randn(1, 8, 6, 6)
    layers = [
        ns.LocalSelfAttention2d(
            n(8), n(8), n(3), stride=(n(1), n(2)), num_heads=n(2), map_size=n(8), scale=np.float32(1)
        ),
        ns.LocalSelfAttention2d(8, kernel_size=np.array([3, 5]), causal=(np.bool_(True), False), num_heads=2),
        ns.GlobalSelfAttention2d(n(8), n(8), num_heads=n(2), qk_channels=n(4), map_size=np.array([6, 6])),
        ns.HaloSelfAttention2d(n(8), block_size=n(4), halo_size=n(1), stride=n(2), num_heads=n(2)),
        ns.AttentionStem2d(n(8), n(8), kernel_size=n(2), num_heads=n(2), mixtures=n(2)),
    ]
    for layer in layers:
        assert layer(x).shape[1] == 8
        assert "np." not in repr(layer)
    widths = np.array([8, 16])
    for name in ("sasa_nano", "halo_h0"):
        model = ns.create_model(name, depths=widths // 8, widths=widths, num_heads=n(2), num_classes=n(3))
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
        assert len(model.forward_intermediates(torch.randn(1, 3, 16, 16), n(1), intermediates_only=True)) == 1
    with pytest.raises(DtypeError, match=r"kernel_size must be an int .*; received 3\.0"):
        ns.Window(np.float64(3))


@every_small
def test_forward_intermediates(name):
    model, x = small(name).eval(), torch.randn(1, 3, 32, 32)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    torch.testing.assert_close(maps, small(name, features_only=True).eval()(x))
    last_two = model.forward_intermediates(x, 2, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close([m.permute(0, 3, 1, 2) for m in last_two], maps[-2:])
    assert torch.equal(model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)[0], final)
    ran = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(x, [-1], intermediates_only=True)
    everything, ran[:] = len(ran), []
    model.forward_intermediates(x, [0], intermediates_only=True)
    assert len(ran) < everything


@every_small
def test_gradient_checkpointing_changes_nothing(name):
    x, grads = torch.randn(2, 3, 16, 16), []
    for enable in (False, True):
        model = small(name).eval()
        model.set_grad_checkpointing(enable)
        runs = count_runs(model)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
        assert (max(runs.values()) > 1) == enable
    torch.testing.assert_close(*grads)


def count_runs(model):
    runs = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, *_: runs.__setitem__(m, runs.get(m, 0) + 1))
    return runs


@every_small
def test_drop_path_grows_with_depth(name):
    rates = [m.drop_prob for m in small(name, drop_path_rate=0.3).modules() if type(m).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.3)


@every_small
def test_safetensors_round_trip(name, tmp_path):
    model, other, x = small(name).eval(), ns.create_model(name, **SMALL[name]).eval(), torch.randn(1, 3, 32, 32)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert not torch.equal(model(x), other(x))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(model(x), other(x))
    third = ns.create_model(name, **SMALL[name], checkpoint_path=str(tmp_path / "model.safetensors")).eval()
    assert torch.equal(model(x), third(x))


@every_small
def test_hub_round_trip(name, tmp_path):
    model, x = small(name, num_classes=6), torch.randn(1, 3, 32, 32)
    model.reset_classifier(4)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert other.num_classes == 4
    assert torch.equal(model.eval()(x), other(x))


def test_what_timm_saves_is_created_by_name(tmp_path):
    model, x = small("sasa_nano", num_classes=6).eval(), torch.randn(1, 3, 16, 16)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(ns.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


@pytest.mark.parametrize("name", ["sasa_nano", "halo_h0", pytest.param("nat_mini", marks=pytest.mark.sweep)])
def test_compiled_networks_compute_and_train_the_same(name):
    torch.compiler.reset()
    one_stage = {"depths": (1,), **({"num_heads": (1,)} if name == "nat_mini" else {"widths": (8,)})}
    model, x = small(name, **one_stage).eval(), torch.randn(2, 3, 8, 8)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*found)


# -------------------------------------------------------------------------------------------------- our layers in timm's


@pytest.mark.parametrize("layer", [ns.LocalSelfAttention2d, ns.HaloSelfAttention2d])
def test_our_layers_in_byobnet(layer):
    """As models.md says: a Local layer needs its own arguments in place of timm's block_size and halo_size."""
    own = {"self_attn_kwargs": {"kernel_size": 5}} if layer is ns.LocalSelfAttention2d else {}
    torch.manual_seed(0)
    model = timm.create_model("halonet26t", self_attn_layer=layer, width_factor=0.125, num_classes=2, **own)
    layers = [module for module in model.modules() if isinstance(module, layer)]
    assert len(layers) == 3
    assert [module.window.stride for module in layers] == [1, 2, 1]
    x, target = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 0, 1])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert all(p.grad.any() for module in layers for p in module.parameters())


# ------------------------------------------------------------------------------------------------------- names and errors


def test_list_models():
    assert ns.list_models() == sorted(ns.list_models())
    assert {"sasa_nano", "halo_h1", "nat_mini", "dinat_large"} <= set(ns.list_models())
    assert not {"SasaResNet", "HaloNet", "Nat"} & set(ns.list_models())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: ns.create_model("sasa_nan"), r"no model 'sasa_nan'; did you mean sasa_nano\?$"),
        (lambda: ns.create_model("zzzzzzzzzzzz"), "nearsight models"),
        (
            lambda: small("sasa_nano", drop_path_rate=0).forward_intermediates(torch.randn(1, 3, 8, 8), [3]),
            "3 feature maps",
        ),
        (lambda: small("sasa_nano", output_stride=3), "output_stride must be one of 1, 2, 4, .*; received 3"),
        (lambda: small("nat_mini", output_stride=2), "output_stride must be one of 4, 8, .*; received 2"),
        (
            lambda: ns.create_model("sasa_micro", output_stride=4),
            "position relative, .*; received position='quadratic'",
        ),
        (lambda: small("sasa_nano", output_stride=2, kernel_size="global"), "local attention .* kernel_size='global'"),
        (lambda: small("sasa_nano").forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="NLC"), "received 'NLC'"),
    ],
)
def test_errors(run, message):
    with pytest.raises(OptionError, match=message):
        run()


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_a_sasa_network_keeps_no_more_than_the_resnet_that_it_replaces():
    """Activations for the backward, and weights with their gradients: they decide how much memory training takes."""

    def bytes_kept(model):
        sizes = {parameter.untyped_storage().data_ptr(): 2 * parameter.nbytes for parameter in model.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept.append(tensor)  # or its memory would be used again
            sizes.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor

        kept = []
        x = torch.randn(16, 3, 128, 128).to(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.to(memory_format=torch.channels_last)(x)
        return sum(sizes.values())

    attention, convolution = (bytes_kept(ns.create_model(name)) for name in ("sasa_resnet50", "resnet50"))
    assert attention <= convolution
    assert bytes_kept(ns.create_model("sasa_resnet50", attn_kwargs={"recompute_qkv": False})) > 1.1 * attention


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("conv_nano,kernel_size=3", "'conv_nano' has no attention, and so no kernel_size"),
        ("conv_micro.untrained,value_ratio=1", "has no attention, and so no value_ratio"),
        ("sasa_nano,attention_stages=[],position=none", "has no attention, and so no position"),
        ("conv_micro,attn_kwargs={scale: 1}", "has no attention, and so no attn_kwargs"),
        ("conv_micro,block_kwargs={avg_down: false, norm: true}", "has no attention, and so no norm"),
        ("sasa_micro,stem=null", "option stem of model 'sasa_micro' is null, which leaves the default"),
    ],
)
def test_options_that_would_change_nothing_are_refused(spec, message):
    with pytest.raises(OptionError, match=message):
        refuse_ignored(spec)


def test_options_that_change_something_are_not_refused():
    for spec in (
        "conv_micro,block_kwargs={avg_down: false},widths=[8,8,8]",
        "sasa_nano,position=none",
        "sasa_nano,attention_stages=[2]",
    ):
        refuse_ignored(spec)


def test_an_option_stands_once_in_a_name():
    with pytest.raises(OptionError, match="each option once; received kernel_size twice"):
        parse_spec("sasa_nano,kernel_size=3,position=none,kernel_size=5")


def test_the_size_that_a_network_is_made_for():
    sizes = {"sasa_nano": 32, "sasa_nano,img_size=[48,64]": 64, "resnet18": 224, "vit_tiny_patch16_224,img_size=96": 96}
    assert {spec: input_size(spec) for spec in sizes} == sizes
    assert [
        made_for_size(spec) for spec in ("vit_tiny_patch16_224", "sasa_nano.untrained", "resnet18", "nat_mini")
    ] == [*(True, True, False, False)]


def test_a_name_is_found_however_it_is_spelled():
    spelled = {
        "SASA-ResNet-50": "sasa_resnet50",
        "NAT_Tiny": "nat_tiny",
        "ResNet-18": "resnet18",
        "sasa nano": "sasa_nano",
    }
    for written, name in spelled.items():
        assert parse_spec(f"{written},kernel_size=3") == (name, {"kernel_size": 3})
    assert input_size("SASA-ResNet-50") == 224
    with pytest.raises(OptionError, match="there is no model 'SASA-Nan'; did you mean sasa_nano"):
        ns.create_model("SASA-Nan")
    assert ns.list_models("dinat_[ms]*") == ["dinat_mini", "dinat_small"]
