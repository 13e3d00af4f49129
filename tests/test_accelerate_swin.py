# SPDX-License-Identifier: Apache-2.0
"""Attention that is accelerated in inference alone, above all Swin's windows; in training it is the makers' own."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

import nearsight as ns
from nearsight.acceleration import swin

SWIN = {"embed_dim": 12, "depths": (2,), "num_heads": (3,), "window_size": 4, "num_classes": 5, "img_size": 32}
OF_TORCHVISION = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2], "num_heads": [3], "window_size": [4, 3]}


def of_torchvision(block: type[nn.Module]) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(**OF_TORCHVISION, num_classes=5, block=block, stochastic_depth_prob=0.0)


CASES = {
    "timm": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
    "timm v2": lambda: timm.create_model("swinv2_tiny_window8_256", **SWIN),
    "torchvision": lambda: of_torchvision(torchvision.models.swin_transformer.SwinTransformerBlock),
    "torchvision v2": lambda: of_torchvision(torchvision.models.swin_transformer.SwinTransformerBlockV2),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[nn.Module, Tensor]:
    """A network whose second layer has shifted windows; torchvision's take maps that windows do not fill."""
    torch.manual_seed(0)
    model = CASES[case]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = "relative_position" in name or parameter.ndim == 1
            parameter.normal_(std=0.5 if wide else parameter[0].numel() ** -0.5)
    return model, torch.randn(2, 3, 32, 32 if "timm" in case else 44)


@every_case
def test_it_is_the_same_function(case, monkeypatch):
    theirs, x = made(case)
    calls = []
    attend = swin.attend
    monkeypatch.setattr(swin, "attend", lambda *args: calls.append(args[2] is not None) or attend(*args))
    ours = copy.deepcopy(theirs)
    report = ns.accelerate(ours)
    assert len(report.accelerated) == 2
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert calls == [False, True]  # the second with a mask; theirs would have called nothing
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), found)
        report.restore()
        assert torch.equal(ours(x), expected)


@every_case
def test_training_is_the_makers_own(case):
    theirs, x = made(case)
    ours = copy.deepcopy(theirs)
    ns.accelerate(ours)
    assert torch.equal(ours(x), theirs(x))  # recorded by autograd
    found = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    assert all(map(torch.equal, *found))


@every_case
def test_bfloat16(case):
    model, x = made(case)
    with torch.no_grad():
        exact = model(x)
        before = (model.bfloat16()(x.bfloat16()).float() - exact).abs().max()
        ns.accelerate(model)
        assert (model(x.bfloat16()).float() - exact).abs().max() < 2 * before


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "scale_pos_embed": True, "qkv_bias": True}], ids=["plain", "scaled"]
)
def test_bottleneck_attention(options, monkeypatch):
    theirs = BottleneckAttn(8, 24, feat_size=(6, 4), num_heads=2, dim_head=8, **options).eval()
    ours, x = copy.deepcopy(theirs), torch.randn(2, 8, 6, 4)
    ns.accelerate(ours)
    assert torch.equal(ours(x), theirs(x))  # recorded by autograd
    with torch.no_grad():
        expected = theirs(x)
        with pytest.raises(AssertionError):
            ours(torch.randn(2, 8, 4, 6))
        monkeypatch.delattr(BottleneckAttn, "forward")
        assert (ours(x) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["timm", "timm v2"])
@pytest.mark.parametrize("way", ["strict_img_size=False", "img_size", "window_size"])
def test_other_image_sizes_are_as_in_timm(case, way):
    """Accelerated before or after, a network that is then made for other sizes is still the same function."""
    name = {"timm": "swin_tiny_patch4_window7_224", "timm v2": "swinv2_tiny_window8_256"}[case]
    theirs = timm.create_model(name, **SWIN, strict_img_size=way != "strict_img_size=False").eval()
    ours = copy.deepcopy(theirs)
    report = ns.accelerate(ours)
    assert len(report.accelerated) == 2
    size = (48, 40)
    if way != "strict_img_size=False":
        for model in (theirs, ours):
            model.set_input_size(img_size=size, **({"window_size": 6} if way == "window_size" else {}))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        report.restore()
        assert torch.equal(ours(x), expected)
