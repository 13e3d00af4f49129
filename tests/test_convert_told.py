# SPDX-License-Identifier: Apache-2.0
"""Convolutions that are more than their class says, and what a conversion says of them, refuses, or has to get right."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.byobnet import RepVggBlock
from timm.models.convnext import ConvNeXtBlock
from timm.utils import reparameterize_model
from torch import Tensor, nn

import nearsight as ns
from nearsight.conversion import GatedPositionalSelfAttention, gpsa
from nearsight.errors import OptionError, ShapeError

X = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))


def conv(*sides, **options) -> nn.Conv2d:
    return nn.Conv2d(8, 8, *(sides or (3,)), **{"padding": 1, **options})


# ------------------------------------------------------------------------------------------ what is more than its class


def seamless(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What scripts for seamless tiles put into every convolution."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), weight, bias)


def with_method(name: str, function=seamless) -> nn.Module:
    module = conv()
    setattr(module, name, function.__get__(module))
    return module


def offloaded() -> nn.Module:
    module = conv()
    module.forward = functools.partial(module.forward)
    return module


def padded_anew() -> nn.Module:
    module = conv(padding_mode="circular")
    module.padding = (0, 0)
    return module


class OwnCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class Saved(nn.Conv2d):
    def state_dict(self, *args, **kwargs):
        return {}


class Scaled(nn.Conv2d):
    """Its forward is PyTorch's, and it holds more."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", torch.ones(1))


class Functional(nn.Module):
    """A convolution that is none by class, and has a layer besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, padding=1))


class Subclass(Tensor):
    pass


def of_a_subclass() -> nn.Module:
    module = conv()
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Subclass))
    return module


def normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 8, 3))


MORE = {
    "a _conv_forward on the instance": (lambda: with_method("_conv_forward"), "has a forward of its own"),
    "a forward on the instance": (offloaded, "has a forward of its own"),
    "__call__ of the class": (lambda: OwnCall(8, 8, 3), "OwnCall has a __call__ of its own"),
    "another method": (lambda: Saved(8, 8, 3), "Saved has a state_dict of its own"),
    "padding changed later": (padded_anew, "its padding was changed"),
    "a buffer": (lambda: Scaled(8, 8, 3), "it holds scale besides"),
    "a weight of a kind": (of_a_subclass, "its weight is a Subclass"),
    "transposed and normed": (normed, "is no plain convolution"),
    "functional": (Functional, "Functional is no plain convolution"),
    "scripted": (lambda: torch.jit.script(conv()), "scripted or traced"),
    "traced": (lambda: torch.jit.trace(nn.Sequential(conv()), X), "scripted or traced"),
    "frozen": (lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(conv()).eval())), "scripted or traced"),
    "exported": (lambda: torch.export.export(nn.Sequential(conv()), (X,)).module(), "a graph that convolves by itself"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", MORE)
def test_what_is_more_than_a_convolution_stays_and_has_a_row(kind):
    make, reason = MORE[kind]
    network = nn.Sequential(make())
    before = network(X)
    report = ns.convert(network, init="exact")
    assert report.converted == ()
    assert reason in report.rows[0].note
    assert torch.equal(network(X), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_a_script_as_a_whole_has_rows_too():
    scripted = torch.jit.script(nn.Sequential(conv(), nn.ReLU(), nn.Sequential(conv())))
    assert [row.name for row in ns.convert(scripted, init="exact").rows] == ["0", "2.0"]


def test_names_and_pictures_are_no_convolutions():
    """A class called after convolutions, and a table that is added, are not in the report."""
    network = nn.Sequential(ConvNeXtBlock(8))
    network.register_parameter("pos_embed", nn.Parameter(torch.randn(1, 8, 7, 7)))
    kinds = {row.layer.split()[0] for row in ns.convert(network, init="exact").rows}
    assert kinds == {"Conv2d"}


# --------------------------------------------------------------------------------------------------- wrapped, and merged


def compiled_in_place() -> nn.Module:
    network = nn.Sequential(conv())
    network.compile()
    return network


WRAPPED = {
    "compiled": (lambda: torch.compile(nn.Sequential(conv())), "the model is wrapped already \\(OptimizedModule\\)"),
    "one layer": (lambda: nn.Sequential(torch.compile(conv())), "0 is wrapped already"),
    "in place": (compiled_in_place, "the model is wrapped already \\(compiled\\)"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_first_convert_then_compile(kind):
    make, message = WRAPPED[kind]
    with pytest.raises(OptionError, match=f"{message}.*convert first, wrap after"):
        ns.convert(make(), init="exact")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True])
def test_first_convert_then_distribute(one_process, inner):
    """Also where the network is taken out of its wrapper: nothing in it tells, and its new gradients are not reduced."""
    network = nn.Sequential(conv())
    wrapped = nn.parallel.DistributedDataParallel(nn.Sequential(nn.ReLU(), network))
    with pytest.raises(OptionError, match=r"DistributedDataParallel.*convert first, wrap after"):
        ns.convert(network if inner else wrapped, init="exact")
    assert isinstance(network[0], nn.Conv2d)
    assert ns.convert(nn.Sequential(conv()), init="exact").converted, "another network is not concerned"


def test_data_parallel_copies_what_it_finds():
    network = nn.DataParallel(nn.Sequential(conv()))
    before = network(X)
    assert ns.convert(network, init="exact").converted == ("module.0",)
    assert torch.equal(network(X), before)


def test_what_merges_convolutions_has_to_do_so_first():
    network = nn.Sequential(RepVggBlock(8, 8))
    merged = reparameterize_model(network)
    assert ns.convert(network, init="exact").converted == ("0.conv_kxk.conv",)
    with pytest.raises(OptionError, match="merge first, as by timm"):
        reparameterize_model(copy.deepcopy(network))
    assert ns.convert(merged, init="exact").converted == ("0.reparam_conv",)


class Pyramid(nn.Module):
    """Its ``fuse`` mixes maps, and has nothing to do with kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def fuse(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(x, self.conv(x))


def test_what_mixes_maps_goes_on():
    network = nn.Sequential(Pyramid())
    before = network(X)
    assert ns.convert(network, init="exact").converted == ("0.conv",)
    assert torch.equal(network(X), before)


# ------------------------------------------------------------------------------------------------- frozen, tied, named


def test_frozen_stays_frozen_and_the_weight_decides():
    network = nn.Sequential(conv(), conv(), conv())
    network[0].requires_grad_(False)
    network[1].bias.requires_grad_(False)
    network[2].weight.requires_grad_(False)
    frozen = network[0].weight.clone()
    ns.convert(network, init="exact", margin=1)
    grads = [{name: p.requires_grad for name, p in layer.named_parameters()} for layer in network]
    assert not any(grads[0].values())
    assert [name for name, wanted in grads[1].items() if not wanted] == ["bias"]
    assert [name for name, wanted in grads[2].items() if wanted] == ["bias"]
    optimiser = torch.optim.SGD((p for p in network.parameters() if p.requires_grad), lr=0.1)
    network(X).square().sum().backward()
    optimiser.step()
    assert torch.equal(network[0](X), F.conv2d(X, frozen, network[0].bias, padding=1))
    network.requires_grad_(True)
    assert network[0].gate.requires_grad


def test_fresh_attention_of_a_frozen_layer_is_to_be_trained_and_said():
    network = nn.Sequential(conv())
    network.requires_grad_(False)
    (row,) = ns.convert(network, init="random").rows
    assert "its weight was frozen" in row.note
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(("init", "said"), [("exact", "that stays so"), ("random", "the fresh ones are its own")])
def test_tied_weights_are_told(init, said):
    network = nn.Sequential(conv(), nn.ConvTranspose2d(8, 8, 3))
    network[1].weight = network[0].weight
    row, _ = ns.convert(network, init=init).rows
    assert f"its weight is that of 1, too; {said}" in row.note
    assert (getattr(network[0], "weight", None) is network[1].weight) == (init == "exact")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "rope"}, r"layer stage\.0 \(Conv2d 8 -> 7, 3x3\): rotary encoding needs"),
        ({"kernel_size": (3, 3, 3)}, r"layer stage\.0 .*: a window needs"),
    ],
)
def test_what_a_layer_refuses_is_said_of_that_layer(options, message):
    network = nn.Sequential()
    network.stage = nn.Sequential(nn.Conv2d(8, 7, 3))
    with pytest.raises(ShapeError, match=message):
        ns.convert(network, init="random", **options)


# ------------------------------------------------------------------------------------------- fresh attention at the edge


class Cut(nn.Module):
    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : -self.cells]


class PadsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (2, 0)))


def sees_ahead(network: nn.Module, x: Tensor) -> list[bool]:
    """Per axis, whether outputs in the first half change with the second half of the input."""
    found = []
    for axis in range(2, x.ndim):
        half = x.shape[axis] // 2
        changed = x.clone()
        changed.narrow(axis, half, half).normal_()
        with torch.no_grad():
            one, other = (network(picture).narrow(axis, 0, half) for picture in (x, changed))
        found.append(not torch.allclose(one, other, atol=1e-6))
    return found


CAUSAL = {
    "padded in front": (lambda: [nn.ConstantPad1d((4, 0), 0.0), nn.Conv1d(8, 8, 3, dilation=2)], (24,), [False]),
    "padded and cut": (lambda: [nn.Conv1d(8, 8, 3, padding=4, dilation=2), Cut(4)], (24,), [False]),
    "two places": (lambda: [nn.Conv1d(8, 8, 2, padding=3, dilation=3), Cut(3)], (24,), [False]),
    "rows only": (lambda: [nn.ZeroPad2d((1, 1, 2, 0)), nn.Conv2d(8, 8, 3)], (12, 12), [False, True]),
    "time only": (
        lambda: [nn.ConstantPad3d((1, 1, 1, 1, 2, 0), 0.0), nn.Conv3d(8, 8, 3)],
        (8, 6, 6),
        [False, True, True],
    ),
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_chain_stays_causal(kind):
    make, size, ahead = CAUSAL[kind]
    network, x = nn.Sequential(*make()), torch.randn(1, 8, *size)
    assert sees_ahead(network, x) == ahead
    shape = network(x).shape
    report = ns.convert(network, init="random", num_heads=2)
    assert network(x).shape == shape
    assert sees_ahead(network, x) == ahead
    (note,) = [row.note for row in report.rows]
    assert "causal along axis 0" in note


def test_a_causal_stride_ends_at_its_own_cells():
    network = nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(8, 8, 4, stride=2))
    x = torch.randn(1, 8, 24)
    changed = x.clone()
    changed[..., 12:] += 1
    ns.convert(network, init="random", num_heads=2)
    assert network(x).shape == (1, 8, 12)
    assert torch.allclose(network(x)[..., :6], network(changed)[..., :6])


def test_where_a_network_pads_by_itself_it_is_told():
    network = PadsItself()
    (row,) = ns.convert(network, init="random").rows
    assert (
        "unpadded along axis 0: if the network pads in front alone to be causal, it now sees what lies ahead"
        in row.note
    )
    mirrored = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3))
    assert "ahead" not in ns.convert(mirrored, init="random").rows[0].note, "this one pads on both sides, as is seen"


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_padding_modes_of_fresh_attention(mode, padding):
    """A torus where it is 'same'; else what the mode puts around the map is seen, and never a border that is not there."""
    network = nn.Sequential(conv(padding=padding, padding_mode=mode))
    shape = network(X).shape
    (row,) = ns.convert(network, init="random", kernel_size=3, num_heads=2, position="none").rows
    found = network(X)
    assert found.shape == shape
    if padding == 1:
        assert (f"{mode} padding became a masked border" in row.note) == (mode != "circular")
    else:
        plain = network[0].attention(F.pad(X, [padding] * 4, mode))[..., 1:-1, 1:-1]
        torch.testing.assert_close(found, plain)


def test_padding_beyond_same_is_told():
    (row,) = ns.convert(nn.Sequential(conv(padding=3)), init="random").rows
    assert "padded beyond 'same' along axes 0, 1" in row.note
    (row,) = ns.convert(nn.Sequential(conv(padding=(3, 1))), init="random").rows
    assert "padded beyond 'same' along axis 0" in row.note


@pytest.mark.parametrize(
    ("kernel", "given", "expected"),
    [((1, 3, 3), None, (1, 7, 7)), ((3, 1, 1), 5, (5, 1, 1)), ((3, 3, 3), None, 7), ((1, 3, 3), (3, 5, 5), (3, 5, 5))],
)
def test_an_axis_of_one_place_keeps_one(kernel, given, expected):
    network = nn.Sequential(nn.Conv3d(8, 8, kernel, padding=tuple(side // 2 for side in kernel)))
    ns.convert(network, init="random", kernel_size=given, num_heads=2)
    assert network[0].window.kernel_size == expected


def test_a_map_smaller_than_the_kernel_is_refused_as_by_the_convolution():
    network = nn.Sequential(conv(5, padding=0))
    small = torch.randn(1, 8, 9, 4)
    with pytest.raises(RuntimeError, match="can't be greater than actual input size"):
        network(small)
    ns.convert(network, init="random")
    with pytest.raises(ShapeError, match=r"as large as the kernel, \[5, 5\]; received a map of \(9, 4\)"):
        network(small)


# ------------------------------------------------------------------------------------------- margins and half precision


@pytest.mark.parametrize(("mode", "numpy_mode"), [("reflect", "reflect"), ("circular", "wrap")])
def test_a_margin_wider_than_the_map(mode, numpy_mode):
    """Round and round, or back and forth: the same cells in training as before."""
    layer = GatedPositionalSelfAttention(conv(padding_mode=mode), margin=3)
    small = torch.randn(2, 8, 2, 3)
    with torch.no_grad():
        expected = layer(small)
    torch.testing.assert_close(layer(small), expected, rtol=1e-4, atol=1e-5)
    widened = np.pad(small.numpy(), [(0, 0), (0, 0), (4, 4), (4, 4)], numpy_mode)
    assert np.array_equal(gpsa._continued(small, ((4, 4), (4, 4)), mode).numpy(), widened)
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        layer(small[:1, :, :1, :1] if mode == "reflect" else small[..., :0])


@pytest.mark.parametrize("autocast", [False, True])
def test_near_the_top_of_float16_it_is_as_finite_as_the_convolution(autocast):
    dtype = torch.float32 if autocast else torch.float16
    module = conv(dtype=dtype)
    layer = GatedPositionalSelfAttention(copy.deepcopy(module))
    x = (6e4 * torch.rand(1, 8, 9, 9)).to(dtype)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        expected, found = module(x), layer(x)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)
    found.float().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_state_of_another_margin_is_refused():
    wide, narrow = (nn.Sequential(GatedPositionalSelfAttention(conv(), margin=margin)) for margin in (1, 0))
    before = narrow[0].shift.clone()
    nn.init.normal_(wide[0].shift)
    with pytest.raises(OptionError, match=r"the state of 0 was trained with margin=1.*than with margin=0"):
        narrow.load_state_dict(wide.state_dict())
    assert torch.equal(narrow[0].shift, before)
    with pytest.raises(OptionError, match="margin"):
        narrow.load_state_dict(wide.state_dict(), strict=False)
    another = nn.Sequential(GatedPositionalSelfAttention(conv(), margin=1))
    another.load_state_dict(wide.state_dict())
    assert torch.equal(another(X), wide(X))


def test_a_state_without_a_margin_is_an_older_one():
    layer = nn.Sequential(GatedPositionalSelfAttention(conv(), margin=1))
    state = {name: one for name, one in layer.state_dict().items() if "extra" not in name}
    assert layer.load_state_dict(state).missing_keys == []
