# SPDX-License-Identifier: Apache-2.0
"""Attention of other makers, computed by our operation: the same function, gradients and names, and the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.vision_transformer_sam import Attention, Block
from torch import Tensor, nn

import nearsight as ns
from nearsight.errors import OptionError


def drawn(module: nn.Module) -> nn.Module:
    """With parameters that are neither zeros nor ones, so that none is without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * max(parameter[0].numel(), 2) ** -0.5)
    return module.eval()


def sam_block(window_size: int, side: int = 6, **options) -> nn.Module:
    return Block(12, 3, use_rel_pos=True, window_size=window_size, input_size=(side, side), **options)


def hf_sam(kind: str, window_size: int, attention: str = "eager") -> nn.Module:
    from transformers.models.sam import modeling_sam
    from transformers.models.sam.configuration_sam import SamVisionConfig

    config = SamVisionConfig(hidden_size=12, num_attention_heads=3, mlp_dim=16, image_size=96, patch_size=16)
    config._attn_implementation = attention
    return getattr(modeling_sam, kind)(config, window_size)


def original_sam(kind: str, **options) -> nn.Module:
    from segment_anything.modeling import image_encoder

    return getattr(image_encoder, kind)(12, 3, use_rel_pos=True, input_size=(6, 6), **options)


# A module, and the shape of what it takes.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "SAM of timm": (partial(Attention, 12, 3, use_rel_pos=True, input_size=(6, 5)), (2, 6, 5, 12)),
    "SAM of timm, another size": (partial(Attention, 12, 3, use_rel_pos=True, input_size=(6, 6)), (2, 4, 9, 12)),
    "SAM of timm, norms": (
        partial(Attention, 12, 3, use_rel_pos=True, input_size=(5, 5), qk_norm=True, qkv_bias=False),
        (1, 5, 5, 12),
    ),
    "SAM block, windows": (partial(sam_block, 4, init_values=0.5), (2, 6, 9, 12)),
    "SAM block, windows that fit": (partial(sam_block, 3, qkv_bias=False), (1, 6, 6, 12)),
    "SAM block, the whole map": (partial(sam_block, 0), (1, 6, 6, 12)),
    "SAM of transformers": (partial(hf_sam, "SamVisionAttention", 0), (2, 6, 4, 12)),
    "SAM of transformers, fused": (partial(hf_sam, "SamVisionSdpaAttention", 0), (2, 6, 6, 12)),
    "SAM layer of transformers, windows": (partial(hf_sam, "SamVisionLayer", 4), (2, 6, 9, 12)),
    "SAM layer of transformers, fused windows": (partial(hf_sam, "SamVisionLayer", 4, "sdpa"), (2, 6, 9, 12)),
    "SAM of its authors": (partial(original_sam, "Attention"), (2, 6, 6, 12)),
    "SAM block of its authors, windows": (partial(original_sam, "Block", window_size=4), (2, 6, 9, 12)),
    "halo": (partial(HaloAttn, 8, 24, num_heads=2, block_size=4, halo_size=1, dim_head=8), (2, 8, 8, 12)),
    "halo, scaled, pooled": (
        partial(HaloAttn, 8, 16, num_heads=2, block_size=3, halo_size=2, stride=2, scale_pos_embed=True, qkv_bias=True),
        (1, 8, 6, 12),
    ),
}
CASES |= {
    "halo, strided": (
        partial(HaloAttn, 8, 24, num_heads=2, block_size=4, halo_size=1, dim_head=8, stride=2),
        (2, 8, 8, 4),
    ),
    "halo, one block": (
        partial(HaloAttn, 8, 16, num_heads=2, block_size=4, halo_size=2, scale_pos_embed=True, qkv_bias=True),
        (2, 8, 4, 4),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[case]
    torch.manual_seed(0)
    return drawn(make()), torch.randn(shape, generator=torch.Generator().manual_seed(2))


def run(module: nn.Module, x: Tensor) -> Tensor:
    """The output, of those of transformers without the weights."""
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Of the input and of every parameter; zeros where there is none."""
    x = x.clone().requires_grad_()
    out = run(module, x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(wanted, found, strict=True)]


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)).item())


@every_case
def test_it_is_the_same_function_with_the_same_gradients(case):
    theirs, x = made(case)
    ours = copy.deepcopy(theirs)
    report = ns.accelerate(ours)
    assert report.accelerated, report
    assert near(run(ours, x), run(theirs, x))
    assert all(map(near, gradients(ours.train(), x), gradients(theirs.train(), x)))


@every_case
def test_the_forward_of_its_makers_is_not_called(case, monkeypatch):
    """Otherwise the test above would say nothing."""
    module, x = made(case)
    report = ns.accelerate(module)

    def refuse(*_):
        raise AssertionError("the forward of its makers ran")

    for name in report.accelerated:
        theirs = type(module.get_submodule(name)).__mro__[1]
        monkeypatch.setattr(theirs, "forward", refuse)
    module(x)


@every_case
def test_weights_stay_where_they_were_and_all_is_undone(case):
    module, x = made(case)
    kinds = [type(one) for one in module.modules()]
    before = dict(module.state_dict(keep_vars=True))
    expected = run(module, x)
    report = ns.accelerate(module)
    assert [type(one) for one in module.modules()] != kinds
    after = dict(module.state_dict(keep_vars=True))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not ns.accelerate(module).accelerated
    report.restore()
    assert [type(one) for one in module.modules()] == kinds
    assert torch.equal(run(module, x), expected)
    report.restore()  # which has nothing left to do


@every_case
def test_copies_and_pickles_go_on_with_it(case):
    module, x = made(case)
    ns.accelerate(module)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert [type(one) for one in again.modules()] == [type(one) for one in module.modules()]
        assert torch.equal(run(again, x), run(module, x))


@every_case
def test_bfloat16(case):
    theirs, x = made(case)
    exact = run(theirs, x)
    theirs, x = theirs.bfloat16(), x.bfloat16()
    ours = copy.deepcopy(theirs)
    ns.accelerate(ours)
    error = (run(ours, x).float() - exact).abs().max()
    assert run(ours, x).dtype == torch.bfloat16
    assert error <= 2 * (run(theirs, x).float() - exact).abs().max() + 1e-3


@pytest.mark.parametrize("case", [pytest.param("SAM block, windows", marks=pytest.mark.sweep), "halo"])
def test_compiled(case):
    torch.compiler.reset()
    module, x = made(case)
    ns.accelerate(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert all(map(near, gradients(compiled, x), gradients(module, x)))
    with pytest.raises(OptionError, match="accelerate it first"):
        ns.accelerate(compiled)


class OfPictures(nn.Module):
    """A module as a network of pictures, (B, C, H, W)."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        super().__init__()
        self.module = module
        self.channels_last = not isinstance(module, HaloAttn)
        channels, *size = (x.movedim(-1, 1) if self.channels_last else x).shape[1:]
        self.pretrained_cfg = {"input_size": (channels, *size)}

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.movedim(1, -1) if self.channels_last else x)


@pytest.mark.parametrize(
    "case", [pytest.param("SAM of timm, another size", marks=pytest.mark.sweep), "SAM block, windows"]
)
def test_one_node_in_onnx(case, tmp_path):
    import onnx

    module, x = made(case)
    network = OfPictures(module, x)
    ns.accelerate(network)
    size = network.pretrained_cfg["input_size"][1:]
    exported = ns.export_onnx(network, tmp_path / "model.onnx", operators="native", sizes=size)
    assert exported.difference < 1e-5
    nodes = [node.op_type for node in onnx.load(exported.file).graph.node]
    assert nodes.count("LocalAttention") == 1
    assert "Softmax" not in nodes


# ------------------------------------------------------------------------------------------------------- what stays


def of_sam(**options) -> Attention:
    return Attention(12, 3, use_rel_pos=True, input_size=(5, 5), **options)


class Mine(Attention):
    """Its forward is timm's, but who knows."""


def with_hook(module: nn.Module, child: str) -> nn.Module:
    module.get_submodule(child).register_forward_hook(lambda *_: None)
    return module


def with_forward() -> nn.Module:
    module = of_sam()
    module.forward = partial(module.forward)
    return module


def with_lora() -> nn.Module:
    module = sam_block(3)
    module.attn.qkv = nn.Sequential(module.attn.qkv)
    return module


STAY = {
    "a subclass": (lambda: Mine(12, 3, use_rel_pos=True, input_size=(5, 5)), "a subclass of Attention"),
    "its forward": (with_forward, "its forward was replaced"),
    "a hook": (lambda: with_hook(of_sam(), "attn_drop"), "its attn_drop carries hooks"),
    "no position": (lambda: Attention(12, 3), "PyTorch's own attention does the same"),
    "a parametrisation": (
        lambda: torch.nn.utils.parametrizations.weight_norm(of_sam(), "rel_pos_h"),
        "a subclass of Attention",
    ),
    "adapters in a block": (with_lora, "its qkv is a Sequential, no plain Linear"),
    "a hook in a block": (lambda: with_hook(sam_block(3), "attn.proj"), "its proj carries hooks"),
    "norms in a block": (lambda: sam_block(3, qk_norm=True), "its keys are normalised"),
    "the whole map": (lambda: sam_block(0), "nothing is cut"),
    "a hook in halos": (
        lambda: with_hook(HaloAttn(8, 16, num_heads=2, block_size=4, halo_size=1), "pos_embed"),
        "its pos_embed carries hooks",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_what_is_more_than_its_class_stays_and_the_report_says_why(name):
    make, reason = STAY[name]
    module = make()
    kind = type(module)
    report = ns.accelerate(module)
    assert type(module) is kind
    assert report.rows[0].outcome == "left alone"
    assert reason in report.rows[0].note
    assert reason in str(report)


def test_hooks_of_a_module_itself_run_as_before():
    module, x = made("halo")
    seen = []
    module.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    ns.accelerate(module)
    module(x)
    assert seen == [(2, 24, 8, 12)]


@pytest.mark.parametrize(("windows", "dropout"), [(0, "attn_drop"), (3, "drop_path"), (3, "attn_drop")])
def test_dropout_in_training_is_that_of_the_makers(windows, dropout):
    """The same random numbers drop the same."""
    module, x = sam_block(windows, **{dropout: 0.5}), torch.randn(2, 6, 6, 12)
    ours = copy.deepcopy(module)
    ns.accelerate(ours)
    found = []
    for one in (module.train(), ours.train()):
        torch.manual_seed(3)
        found.append(one(x))
    assert near(*found)


@pytest.mark.parametrize(("images", "recorded"), [(2, False), (2, True), (8, False)])
def test_a_few_maps_of_one_block_are_inferred_by_the_makers_forward(images, recorded, monkeypatch):
    """Which is faster there, and there alone."""
    module, x = HaloAttn(4, 16, num_heads=2, block_size=4, halo_size=2).eval(), torch.randn(images, 4, 4, 4)
    theirs, ran = HaloAttn.forward, []
    ns.accelerate(module)
    monkeypatch.setattr(HaloAttn, "forward", lambda self, x: ran.append(len(x)) or theirs(self, x))
    with torch.set_grad_enabled(recorded):
        module(x)
    assert ran == ([2] if images == 2 and not recorded else [])


def test_other_dtypes_and_maps_are_the_makers_own():
    module, x = made("halo")
    ns.accelerate(module)
    with pytest.raises(AssertionError):
        module(x[:, :, :7])
    assert module.double()(x.double()).dtype == torch.float64


def test_what_is_not_known_has_no_rows():
    report = ns.accelerate(nn.Sequential(nn.Conv2d(3, 16, 3), ns.LocalSelfAttention2d(16)))
    assert report.rows == ()
    assert str(report).endswith("nothing to accelerate: no attention that is known")
    assert report.to_dict() == {"rows": [], "accelerated": [], "folded": [], "unfolded": None}


def test_checkpoints_load_both_ways():
    theirs, x = made("SAM block, windows")
    ours = sam_block(4, init_values=0.5).eval()
    ns.accelerate(ours)
    ours.load_state_dict(theirs.state_dict())
    assert near(run(ours, x), run(theirs, x))
    again = sam_block(4, init_values=0.5).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), theirs(x))


# --------------------------------------------------------------------------------------------------------- batch norms


class Twice(nn.Module):
    """Norms that cannot be folded, but for the last: after what is looked at elsewhere, before a convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.after_seen = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.before, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.shared, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.last = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        y = self.seen(x)
        y = self.conv(self.before(self.after_seen(y) + y))
        return scale * self.last(self.second(self.shared(self.first(self.shared(y)))))


class Unfollowed(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum() > 1e9 else input


def with_statistics(model: nn.Module) -> nn.Module:
    """Running means and variances that are neither zeros nor ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight, 1, 0.3)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "folded"),
    [
        (lambda: timm.create_model("resnet10t"), 14),
        (lambda: timm.create_model("resnetv2_18"), 8),
        (Twice, 1),
    ],
    ids=["all", "norms before convolutions", "what cannot be"],
)
def test_batch_norms_are_folded_and_come_back(make, folded):
    model, x = with_statistics(make()), torch.randn(2, 3, 64, 64)
    names, expected = list(model.state_dict()), model(x)
    report = ns.accelerate(model, inference=True)
    assert len(report.folded) == folded, report.folded
    assert near(model(x), expected)
    report.restore()
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), expected)


def test_what_torch_fx_cannot_follow_is_not_folded():
    model = Unfollowed(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval()
    report = ns.accelerate(model, inference=True)
    assert report.folded == ()
    assert "no batch norm folded: torch.fx cannot follow the model" in str(report)
    with pytest.raises(OptionError, match=r"model\.eval"):
        ns.accelerate(model.train(), inference=True)
