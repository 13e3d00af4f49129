# SPDX-License-Identifier: Apache-2.0
"""Every network of ours is what timm expects of its own, and sasa_nano is what it says."""

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import nearsight as ns
from nearsight.errors import OptionError

MODELS = ns.list_models()


def small(name, **kwargs):
    torch.manual_seed(0)
    return ns.create_model(name, **kwargs)


def spatial_convolutions(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_registered_with_timm(name):
    model = timm.create_model(name, num_classes=7, in_chans=1)
    assert model(torch.randn(2, 1, 17, 24)).shape == (2, 7)
    assert timm.is_model(name)
    assert model.default_cfg["classifier"] == "head.fc"


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model = small(name, num_classes=3)
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 24, 24)), torch.tensor([0, 1, 2, 0])).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", MODELS)
def test_features_and_head(name):
    model, x = small(name).eval(), torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    torch.testing.assert_close(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize("name", MODELS)
def test_features_only(name):
    backbone, x = small(name, features_only=True), torch.randn(1, 3, 32, 48)
    for feature, channels, reduction in zip(
        backbone(x), backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (1, channels, 32 // reduction, 48 // reduction)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_changes_nothing(name):
    x, grads = torch.randn(2, 3, 16, 16), []
    for enable in (False, True):
        model = small(name).eval()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", MODELS)
def test_safetensors_round_trip(name, tmp_path):
    model, other, x = small(name).eval(), ns.create_model(name).eval(), torch.randn(1, 3, 16, 16)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert not torch.equal(model(x), other(x))
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", MODELS)
def test_parameter_groups(name):
    model = ns.create_model(name)
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_sasa_nano_is_small_and_free_of_convolutions():
    model = ns.create_model("sasa_nano")
    assert sum(p.numel() for p in model.parameters()) == 84_906
    assert spatial_convolutions(model) == []


def test_sasa_nano_twin_is_made_of_convolutions():
    twin = ns.create_model("sasa_nano", attention_stages=())
    assert len(spatial_convolutions(twin)) == 5  # the stem and four blocks
    assert not any(isinstance(m, ns.LocalSelfAttention2d | ns.AttentionStem2d) for m in twin.modules())
    assert twin(torch.randn(1, 3, 9, 12)).shape == (1, 10)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (28, 28), (64, 64)])
def test_sasa_nano_takes_small_images_of_any_size(size):
    assert ns.create_model("sasa_nano", in_chans=1)(torch.randn(2, 1, *size)).shape == (2, 10)


def test_options_of_sasa():
    model = small("sasa_nano", attention_stages=(2, 3), kernel_size=(3, 5, 7), stem="conv", position="rope")
    kinds = [type(block.spatial).__name__ for stage in model.stages for block in stage]
    assert kinds == ["Conv2d", "LocalSelfAttention2d", "LocalSelfAttention2d", "LocalSelfAttention2d"]
    assert [stage[0].spatial.window.kernel_size for stage in model.stages[1:]] == [5, 7]
    assert spatial_convolutions(model) == ["stem.0", "stages.0.0.spatial"]


def test_attention_runs_at_full_resolution_before_the_pool():
    model, sizes = small("sasa_nano"), []
    for stage in model.stages:
        stage[0].spatial.register_forward_hook(lambda layer, x, y: sizes.append((x[0].shape[-1], y.shape[-1])))
    model(torch.randn(1, 3, 16, 16))
    assert sizes == [(16, 16), (16, 16), (8, 8)]


def test_list_models():
    assert ns.list_models() == sorted(ns.list_models())
    assert "sasa_nano" in ns.list_models()
    assert "SasaResNet" not in ns.list_models()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: ns.create_model("sasa_nan"), r"no model 'sasa_nan'; did you mean sasa_nano"),
        (lambda: ns.create_model("zzzzzzzzzzzz"), "nearsight models"),
        (lambda: ns.create_model("sasa_nano", attention_stages=(1, 4)), r"among \[1, 2, 3\]; received \(1, 4\)"),
        (lambda: ns.create_model("sasa_nano", kernel_size=(3, 5)), r"one number or 3.*received \(3, 5\)"),
        (lambda: ns.create_model("sasa_nano", stem="pixel", stem_stride=2), "received 'pixel' with stem_stride=2"),
        (lambda: ns.create_model("sasa_nano", stem="patch"), "received 'patch' with stem_stride=1"),
    ],
)
def test_errors(run, message):
    with pytest.raises(OptionError, match=message):
        run()
