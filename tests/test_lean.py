# SPDX-License-Identifier: Apache-2.0
"""The parts around attention compute what PyTorch's modules do, in fewer passes and with less kept."""

from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import nearsight as ns
from nearsight.models import lean
from nearsight.models.backbone import Bottleneck
from nearsight.models.lean import ConvNorm, MaxPool2d, conv_norm, conv_norm_add_relu

every_layout = pytest.mark.parametrize("layout", ["planar", "channels_last", "every_second"])


@pytest.fixture
def fused(monkeypatch):
    """What every call of oneDNN's convolution is to do after it."""
    if lean._convolve is None:
        pytest.skip("this PyTorch was built without oneDNN")

    class Spy:
        def __call__(self, *args):
            calls.append(args[7])
            return convolve(*args)

        def binary(self, *args):
            calls.append(f"{args[8]} {args[10]}")
            return convolve.binary(*args)

    convolve, calls = lean._convolve, []
    monkeypatch.setattr(lean, "_convolve", Spy())
    return calls


def filled(module):
    """In inference, with batch norms as after a training, gammas of both signs and one of zero."""
    torch.manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.1, 3)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            with torch.no_grad():
                norm.weight[0] = 0
    return module.eval()


def laid_out(x, layout):
    if layout == "every_second":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def by_hand(x, conv, norm, shortcut=None):
    """In float64, as the papers write it."""
    x, weight = x.double(), conv.weight.double()
    y = F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    mean, var, gamma, beta = (one.double()[:, None, None] for one in _of(norm))
    y = gamma * (y - mean) / (var + norm.eps).sqrt() + beta
    return y if shortcut is None else (y + shortcut.double()).relu()


def _of(norm):
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


# ------------------------------------------------------------------------------------------------------------ one pass


@every_layout
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 10, 1, bias=False),
        nn.Conv2d(6, 7, 1, 2, bias=False),
        nn.Conv2d(6, 10, 3, 2, 1, bias=False),
        nn.Conv2d(6, 10, (3, 2), (1, 2), (2, 0), (2, 1), groups=2, bias=False),
    ],
    ids=["pointwise", "strided", "spatial", "uneven"],
)
@torch.no_grad()
def test_convolution_and_norm(conv, layout, fused):
    block = filled(ConvNorm(conv, nn.BatchNorm2d(conv.out_channels)))
    x = laid_out(torch.randn(5, 6, 29, 23), layout)
    shortcut = laid_out(torch.randn(conv(x).shape), layout)
    before, expected = shortcut.clone(), by_hand(x, *block)
    close = {"atol": 2e-6, "rtol": 2e-6}
    torch.testing.assert_close(block(x).double(), expected, **close)
    torch.testing.assert_close(ConvNorm(*block, nn.ReLU())(x).double(), expected.relu(), **close)
    torch.testing.assert_close(conv_norm(x, *block, nn.Identity()).double(), expected, **close)
    end = conv_norm_add_relu(x, block, shortcut)
    torch.testing.assert_close(end.double(), by_hand(x, *block, shortcut), **close)
    assert end.stride() == F.relu(conv(x)).stride()
    assert torch.equal(shortcut, before)
    assert fused == ["none", "relu", "none", "add relu"]


@pytest.mark.parametrize("name", ["sasa_resnet26", "sasa_micro", "conv_micro", "halo_h0"])
def test_whole_networks(name, fused, monkeypatch):
    monkeypatch.setattr(lean, "MANY", 0)
    model = filled(ns.create_model(name, in_chans=1, num_classes=5))
    x = torch.randn(3, 1, 61, 66)
    with torch.no_grad():
        found = model(x)
    calls = list(fused)
    torch.testing.assert_close(found, model(x).detach(), atol=1e-5, rtol=1e-5)
    assert fused == calls, "with gradients the modules are called"
    assert calls.count("add relu") == sum(isinstance(block, Bottleneck) for block in model.modules())


@torch.no_grad()
def test_it_is_never_out_of_date(fused):
    block, x = filled(ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))), torch.randn(2, 4, 12, 12)
    for tensor in (block[0].weight.data, block[1].weight.data, block[1].bias.data, *_of(block[1])[:2]):
        before = block(x)
        tensor.mul_(2)
        assert not torch.equal(block(x), before)
        torch.testing.assert_close(block(x).double(), by_hand(x, *block), atol=1e-5, rtol=1e-5)
    assert len(fused) == 15


# ----------------------------------------------------------------------------------------------------- the modules' turn


class Louder(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


def hooked(register):
    block = ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    register(block)
    return block


PLAIN = {
    "another class": ConvNorm(Louder(4, 8, 1, bias=False), nn.BatchNorm2d(8)),
    "a bias": ConvNorm(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)),
    "borders that wrap": ConvNorm(
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", bias=False), nn.BatchNorm2d(8)
    ),
    "padding by name": ConvNorm(nn.Conv2d(4, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8)),
    "a parametrized weight": hooked(lambda b: nn.utils.parametrizations.weight_norm(b[0])),
    "a hook on the convolution": hooked(lambda b: b[0].register_forward_hook(lambda m, args, out: out + 1)),
    "a hook before the norm": hooked(lambda b: b[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))),
    "a hook on the ReLU": hooked(lambda b: b[2].register_forward_hook(lambda m, args, out: out + 1)),
    "a forward of its own": hooked(lambda b: setattr(b[0], "forward", lambda x: nn.Conv2d.forward(b[0], x) + 1)),
    "a norm without statistics": hooked(lambda b: b.__setitem__(1, nn.BatchNorm2d(8, track_running_stats=False))),
    "a norm without gamma": hooked(lambda b: b.__setitem__(1, nn.BatchNorm2d(8, affine=False))),
}


@pytest.mark.parametrize("block", PLAIN.values(), ids=PLAIN)
@torch.no_grad()
def test_what_is_not_just_these_modules_is_called(block, fused):
    block.eval()
    conv, norm, *after = block
    x = torch.randn(2, 4, 12, 12)
    expected = norm(conv(x))
    for module in after:
        expected = module(expected)
    assert torch.equal(block(x), expected)
    assert fused == []


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


CONTEXTS = {"gradients": torch.enable_grad, "autocast": autocast, "no oneDNN": torch.backends.mkldnn.flags}
CONTEXTS["a counter of FLOPs"] = lambda: FlopCounterMode(display=False)
CONTEXTS["a hook on every module"] = lambda: nn.modules.module.register_module_forward_hook(lambda *args: None)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@torch.no_grad()
def test_who_looks_on_sees_the_modules(context, fused):
    block, x = filled(ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))), torch.randn(2, 4, 12, 12)
    expected = by_hand(x, *block).float()
    with ExitStack() as stack:
        stack.enter_context(context())
        found = block(x).float()
        end = conv_norm_add_relu(x, block, torch.zeros_like(found)).float()
    is_half = context is autocast
    torch.testing.assert_close(found, expected, atol=0.1 if is_half else 1e-5, rtol=1e-5)
    torch.testing.assert_close(end, expected.relu(), atol=0.1 if is_half else 1e-5, rtol=1e-5)
    assert fused == []
    block(x)
    assert fused == ["none"]


@torch.no_grad()
def test_transforms_tracers_and_other_types_get_the_modules(fused):
    block, x = filled(ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))), torch.randn(2, 4, 12, 12)
    expected = by_hand(x, *block)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(torch.func.vmap(block)(x[None])[0].double(), expected, **close)
    torch.testing.assert_close(torch.jit.trace(block, x, check_trace=False)(x).double(), expected, **close)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    assert torch.export.export(block, (x,)).module()(x).shape == expected.shape
    torch.testing.assert_close(block.double()(x.double()), expected, atol=1e-6, rtol=1e-6)
    assert block.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert block.to("meta")(x.to("meta")).shape == expected.shape
    assert fused == []


@torch.no_grad()
def test_a_norm_in_training_learns(fused):
    block, x = ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)), torch.randn(2, 4, 12, 12)
    block(x)
    assert block[1].num_batches_tracked == 1
    assert fused == []


@torch.no_grad()
def test_small_maps_are_not_worth_folded_weights(fused):
    block = filled(ConvNorm(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)))
    cells = lean.MANY * 16
    block(torch.randn(2, 16, 1, cells // 2))
    assert fused == ["none"]
    block(torch.randn(1, 16, 1, cells - 1))
    assert fused == ["none"]


@torch.no_grad()
def test_the_end_of_a_block_heeds_hooks_and_derivatives_of_its_own(fused):
    block, x = filled(ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))), torch.randn(2, 4, 12, 12)
    shortcut = torch.randn(2, 8, 12, 12)
    with forward_ad.dual_level():
        end = conv_norm_add_relu(x, block, forward_ad.make_dual(shortcut, torch.ones_like(shortcut)))
        assert torch.equal(forward_ad.unpack_dual(end).tangent, (end > 0).float())
    with block.register_forward_hook(lambda module, args, out: out + 100):
        end = conv_norm_add_relu(x, block, shortcut)
    torch.testing.assert_close(end.double(), by_hand(x, *block) + shortcut + 100, atol=1e-4, rtol=1e-5)
    assert "add relu" not in fused


@torch.no_grad()
def test_a_block_calls_what_hangs_in_the_place_of_its_pool(fused):
    block, x = filled(Bottleneck(8, 8, 8, 8, nn.Conv2d(8, 8, 3, padding=1, bias=False))), torch.randn(2, 8, 24, 24)
    before = block(x)
    assert fused == ["relu", "relu", "add relu"]
    with block.pool.register_forward_hook(lambda module, args, out: torch.zeros_like(out)):
        after = block(x)
    assert fused[3:] == ["relu", "add relu"]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, (block.up(block.norm(torch.zeros_like(x)).relu()) + x).relu())


@torch.no_grad()
def test_slices_are_sequences_too(fused):
    block, x = filled(ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())), torch.randn(2, 4, 12, 12)
    assert torch.equal(block[:1](x), block[0](x))
    assert torch.equal(block[1:](block[0](x)), block[2](block[1](block[0](x))))
    torch.testing.assert_close(block[:2](x).relu(), block(x))
    end = conv_norm_add_relu(x, block[:1], torch.zeros(2, 8, 12, 12))
    assert torch.equal(end, block[0](x).relu())
    assert fused == ["none", "relu"]


@torch.no_grad()
def test_errors_are_those_of_the_convolution(fused):
    block = filled(ConvNorm(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)))
    with pytest.raises(RuntimeError, match="to have 4 channels, but got 5"):
        block(torch.randn(2, 5, 12, 12))
    with pytest.raises(RuntimeError, match=r"3D.*or 4D"):
        block(torch.randn(2, 1, 4, 12, 12))


@torch.no_grad()
def test_blocks_drop_out_in_training_with_their_norms_frozen(fused):
    """As in the last steps of a fine-tuning, watched without gradients."""
    block = filled(Bottleneck(8, 8, 8, 8, nn.Conv2d(8, 8, 3, padding=1, bias=False), drop_path=0.5)).train()
    for norm in (block.norm, block.up[1], block.down[1]):
        norm.eval()
    x = torch.randn(64, 8, 12, 12)
    y = block(x)
    dropped = [torch.equal(one, before.relu()) for one, before in zip(y, x, strict=True)]
    assert 0 < sum(dropped) < 64
    assert "add relu" not in fused


# ------------------------------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
@pytest.mark.parametrize("geometry", [(3, 2, 1, 1, False), (2, 2, 0, 1, True), ((2, 3), (1, 2), (1, 1), 1, True)])
def test_the_stems_pool_is_a_max_pool(memory_format, geometry):
    torch.manual_seed(0)
    ours, theirs = (kind(*geometry[:4], ceil_mode=geometry[4]) for kind in (MaxPool2d, nn.MaxPool2d))
    x = torch.randn(2, 3, 11, 8, dtype=torch.float64).relu().to(memory_format=memory_format).requires_grad_()
    y, expected = ours(x), theirs(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))
    assert torch.autograd.gradgradcheck(ours, torch.randn_like(x).requires_grad_())  # there are no ties
    assert torch.equal(torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: theirs(x).sum())(x))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(ours(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None
    with torch.no_grad():
        assert torch.equal(ours(x), expected)


def test_the_stems_pool_keeps_no_map():
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        MaxPool2d(2)(x)
    assert kept == [(2, 3, 6, 6)]
