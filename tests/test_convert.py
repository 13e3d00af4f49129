# SPDX-License-Identifier: Apache-2.0
"""Convolutions become attention: exactly, then held to plain loops wherever training may take them; and in any model."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from itertools import product

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import timm
import torch
import torch.ao.nn.quantized as quantized
from torch import Tensor, nn
from torch.nn.utils import prune
from torchvision.models.vgg import make_layers

import nearsight as ns
from nearsight.conversion import GatedPositionalSelfAttention, gpsa
from nearsight.errors import OptionError, ShapeError
from nearsight.layers import AttentionLayer

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NUMPY_PAD = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


# ---------------------------------------------------------------------------------------------------- the oracle


def by_loops(layer: GatedPositionalSelfAttention, conv: nn.Module, x: Tensor) -> np.ndarray:
    """The equation of the layer's docstring, in float64, one query, head and cell at a time.

    From the layer only its parameters are taken; the geometry is that of the convolution it was made from.
    """
    parameters = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    kernel, rank, margin = conv.kernel_size, len(conv.kernel_size), layer.margin
    around, steps = sides_of(conv), [*zip(conv.stride, conv.dilation, strict=True)]
    wide = [(before + margin * d, after + margin * d) for (before, after), (_, d) in zip(around, steps, strict=True)]
    padded = np.pad(x.double().numpy(), [(0, 0), (0, 0), *wide], NUMPY_PAD[conv.padding_mode])
    out_size = [
        (n + sum(side) - d * (k - 1) - 1) // s + 1
        for n, side, k, (s, d) in zip(x.shape[2:], around, kernel, steps, strict=True)
    ]
    out = np.zeros((len(x), conv.out_channels, *out_size))
    out += 0 if conv.bias is None else parameters["bias"].reshape(-1, *[1] * rank)
    block = [range(k + 2 * margin) for k in kernel]
    for b, *p in np.ndindex(len(x), *out_size):
        cells = {j: padded[(b, slice(None), *cell_of(p, j, steps))] for j in product(*block)}
        middle = cells[tuple(k // 2 + margin for k in kernel)]
        for head, place in enumerate(np.ndindex(*kernel)):
            weights = mixture(parameters, head, place, cells, middle, block, margin)
            mixed = sum(weights[j] * cells[j] for j in cells)
            out[(b, slice(None), *p)] += grouped(parameters["weight"][(..., *place)], mixed, conv.groups)
    return out


def cell_of(p, j, steps):
    """Where place j of the block of query p lies on the padded map."""
    return [q * s + i * d for q, i, (s, d) in zip(p, j, steps, strict=True)]


def sides_of(conv):
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(side, side) for side in conv.padding]


def mixture(parameters, head, place, cells, middle, block, margin):
    """The weight of every place of the block: by position, and by content as far as the gate is open."""
    shift, spread = parameters["shift"][head], max(parameters["spread"][head], 0)
    hats = []
    for axis, side in enumerate(block):
        centre = min(max(place[axis] + margin + shift[axis], 0), len(side) - 1)
        hat = np.array([max(0, 1 - abs(j - centre) / (1 + spread)) for j in side])
        hats.append(hat / hat.sum())
    position = {j: math.prod(hat[i] for hat, i in zip(hats, j, strict=True)) for j in cells}
    if "gate" not in parameters:
        return position
    gate = min(max(parameters["gate"][head], 0), 1)
    heads = len(parameters["gate"])
    query, key = (parameters[f"{name}.weight"].reshape(heads, -1, len(middle))[head] for name in ("query", "key"))
    logits = {j: (query @ middle) @ (key @ cell) / len(query) ** 0.5 for j, cell in cells.items()}
    largest = max(logits.values())
    total = sum(math.exp(logit - largest) for logit in logits.values())
    return {j: (1 - gate) * position[j] + gate * math.exp(logits[j] - largest) / total for j in cells}


def grouped(weight, mixed, groups):
    """One place of the kernel, (out, in / groups), applied to a cell's channels."""
    parts = zip(np.split(weight, groups), np.split(mixed, groups), strict=True)
    return np.concatenate([w @ part for w, part in parts])


def difference(found: Tensor, expected) -> float:
    """The largest difference, relative to the largest expected value."""
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    return ((found.detach().double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


# -------------------------------------------------------------------------------------- convolutions of every kind


@st.composite
def convolutions(
    draw, max_rank: int = 3, modes=("zeros", "zeros", "circular", "reflect", "replicate")
) -> tuple[nn.Module, Tensor]:
    """A convolution in float64 and an input that it takes: H != W, odd and even kernels, every padding."""
    rank = draw(st.integers(1, max_rank))
    side = st.integers(1, {1: 5, 2: 4, 3: 2}[rank])
    kernel, dilation, stride = (
        tuple(draw(sides) for _ in range(rank)) for sides in (side, st.integers(1, 2), st.integers(1, 3))
    )
    mode = draw(st.sampled_from(modes))
    padding = draw(st.sampled_from(("same", "valid", "numbers", "numbers")))
    if padding == "same":
        stride = (1,) * rank
    elif padding == "numbers":
        padding = tuple(draw(st.integers(0, 3)) for _ in range(rank))
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    conv = CONV[rank](
        4, draw(st.sampled_from((4, 8))), kernel, stride=stride, dilation=dilation, padding=padding, groups=groups,
        padding_mode=mode, bias=draw(st.booleans()), dtype=torch.float64,
    )  # fmt: skip
    least = 9 if rank == 1 else 5  # as large as any padding and margin here
    size = [draw(st.integers(max(least, d * (k - 1) + 1), 11)) for k, d in zip(kernel, dilation, strict=True)]
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    for parameter in conv.parameters():
        nn.init.normal_(parameter, generator=generator)
    return conv, torch.randn(2 if rank < 3 else 1, 4, *size, generator=generator, dtype=torch.float64)


@hypothesis.given(convolutions(), st.integers(0, 1), st.booleans())
@hypothesis.settings(max_examples=80)
def test_every_convolution_becomes_the_same_function(drawn, margin, content):
    """Without gradients the layer leaves out what does nothing, with them it computes all: both are the convolution."""
    conv, x = drawn
    expected = conv(x).detach()
    layer = GatedPositionalSelfAttention(conv, margin=margin, content=content)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert difference(layer(x), expected) < 1e-12
    narrow = copy.deepcopy(layer).float()
    assert difference(narrow(x.float()), expected) < 1e-5
    assert torch.equal(layer(x[0]), layer(x)[0]) or difference(layer(x[0]), expected[0]) < 1e-12


@hypothesis.given(convolutions(max_rank=2), st.integers(0, 1), st.booleans(), st.integers(0, 2**20))
@hypothesis.settings(max_examples=20)
def test_wherever_training_takes_it_the_layer_is_its_equation(drawn, margin, content, seed):
    conv, x = drawn
    x = x[:1]
    layer = moved(GatedPositionalSelfAttention(conv, margin=margin, content=content), seed)
    expected = by_loops(layer, conv, x)
    with torch.no_grad():
        assert difference(layer(x), expected) < 1e-10
    assert difference(layer(x), expected) < 1e-10


def moved(layer: GatedPositionalSelfAttention, seed: int = 0) -> GatedPositionalSelfAttention:
    """Heads away from home, wider, with content, and some of each beyond its range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.shift.normal_(0, 0.8, generator=generator)
        layer.spread.uniform_(-0.5, 1.5, generator=generator)
        if layer.content:
            layer.gate.uniform_(-0.3, 1.3, generator=generator)
    return layer


def small_layer(content: bool = True, **kwargs) -> tuple[GatedPositionalSelfAttention, nn.Conv2d, Tensor]:
    """A convolution that is different along its axes in every way, as a layer, and an input."""
    given = {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 2, **kwargs}
    conv = nn.Conv2d(4, 6, (3, 2), dtype=torch.float64, **given)
    layer = GatedPositionalSelfAttention(copy.deepcopy(conv), margin=1, content=content)
    return layer, conv, torch.randn(2, 4, 7, 5, dtype=torch.float64)


@pytest.mark.parametrize("mode", NUMPY_PAD)
def test_the_margin_sees_what_the_padding_mode_puts_there(mode):
    """A head that leaves the kernel of a circular convolution still looks at a torus."""
    layer, conv, x = small_layer(padding_mode=mode)
    assert difference(moved(layer)(x), by_loops(layer, conv, x)) < 1e-10
    if mode == "circular":
        layer, _, x = small_layer(padding_mode=mode, stride=1, padding="same", dilation=1)
        rolled = moved(layer)(x.roll((2, 1), (2, 3)))
        assert difference(rolled, layer(x).roll((2, 1), (2, 3))) < 1e-12


FAULTS: dict[str, tuple[str, Callable]] = {
    "a flipped kernel": ("_kernel", lambda right: lambda self: right(self).flip(-1)),
    "rows and columns exchanged": (
        "_hats",
        lambda right: lambda self: right(self) if self.shift.shape[1] < 2 else swapped(self, right),
    ),
    "a masked border": (
        "_window",
        lambda right: lambda self: ns.Window(self._block(), stride=self.stride, dilation=self.dilation, border="mask"),
    ),
    "a gate that adds": (
        "_kernel",
        lambda right: lambda self: (self.weight.flatten(2) @ self._hats().flatten(1)).unflatten(2, self._block()),
    ),
    "hats that do not sum to one": ("_hats", lambda right: lambda self: right(self) * 1.01),
    "heads that ignore their shift": ("_centres", lambda right: lambda self: right(self) - self.shift),
    "the margin on one side": ("_zeros", lambda right: lambda self, margin: right(self, 0)),
}


def swapped(layer, right):
    shift = layer.shift.data
    layer.shift.data = shift.flip(1)
    try:
        return right(layer)
    finally:
        layer.shift.data = shift


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_catches(fault, monkeypatch):
    layer, conv, x = small_layer()
    expected = by_loops(moved(layer), conv, x)
    assert difference(layer(x), expected) < 1e-10
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(gpsa.GatedPositionalSelfAttention, name, wrong(getattr(GatedPositionalSelfAttention, name)))
    if fault == "a flipped kernel":
        plain = GatedPositionalSelfAttention(conv)
        assert difference(plain(x), conv(x)) > 1e-3
    found = layer(x)
    assert found.shape != expected.shape or difference(found, expected) > 1e-3


# ------------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_those_of_the_equation():
    """Away from corners, where finite differences can be trusted."""
    layer = GatedPositionalSelfAttention(
        nn.Conv2d(2, 2, (2, 1), stride=(1, 2), padding=(1, 0), dilation=(2, 1), dtype=torch.float64), margin=1
    )
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.shift.uniform_(0.1, 0.4)
        layer.spread.uniform_(0.2, 0.6)
        layer.gate.uniform_(0.2, 0.8)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values))


def test_a_closed_gate_feels_what_opening_it_would_do():
    layer, _, x = small_layer()
    target = torch.randn_like(layer(x))
    (layer(x) * target).sum().backward()
    before = (layer(x) * target).sum().item()
    for head in range(layer.num_heads):
        opened = copy.deepcopy(layer)
        with torch.no_grad():
            opened.gate[head] = 1e-3  # the output is linear in it
        change = ((opened(x) * target).sum().item() - before) / 1e-3
        assert change == pytest.approx(layer.gate.grad[head].item(), rel=1e-6, abs=1e-8)


def test_what_is_out_of_range_counts_as_the_edge_and_comes_back():
    layer, conv, x = small_layer()
    with torch.no_grad():
        layer.gate.fill_(-0.5)
        layer.spread.fill_(-2)
        assert torch.equal(layer(x), conv(x))
    layer(x).square().sum().backward()
    assert layer.gate.grad.abs().min() > 0


def test_gradients_reach_every_parameter_of_a_network():
    network = timm.create_model("test_resnet", num_classes=10).double()
    network.load_state_dict(unsilenced(network).state_dict())
    ns.convert(network, init="exact", stem=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    x, labels = torch.randn(4, 3, 33, 40, dtype=torch.float64), torch.arange(4)
    for step in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
        if step == 0:  # a query matters once its gate is open
            assert all(name.endswith(("query.weight", "key.weight")) for name in still)
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    if name.endswith("gate"):
                        parameter.fill_(0.1)
        else:
            assert still == set()
        optimizer.step()


# ---------------------------------------------------------------------------------------------- what is left out


def count_calls(monkeypatch) -> list[str]:
    """From here on, the names of the operations that a layer uses."""
    calls = []
    attend, convolve = gpsa.local_attention, gpsa._convolve[2]
    monkeypatch.setattr(gpsa, "local_attention", lambda *args: calls.append("attention") or attend(*args))

    def noted(x, weight, *args, **kwargs):
        calls.append(tuple(weight.shape))
        return convolve(x, weight, *args, **kwargs)

    monkeypatch.setitem(gpsa._convolve, 2, noted)
    return calls


@pytest.mark.parametrize("change", ["shift", "spread", "gate"])
def test_the_shortcut_ends_the_moment_training_changes_a_head(change, monkeypatch):
    """While every head is at home the layer is one convolution with the kernel it was made from, and not a step longer."""
    conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.float64)
    layer = GatedPositionalSelfAttention(copy.deepcopy(conv), margin=1)
    x = torch.randn(1, 4, 7, 5, dtype=torch.float64)
    calls = count_calls(monkeypatch)
    with torch.inference_mode():
        assert torch.equal(layer(x), conv(x))
    assert calls == [(4, 4, 3, 3)]

    optimizer = torch.optim.SGD([getattr(layer, change)], lr=1.0)
    (layer(x) * torch.randn(1, 4, 7, 5)).sum().backward()
    getattr(layer, change).grad.copy_(-torch.rand_like(getattr(layer, change)) * 0.1)
    optimizer.step()
    calls.clear()
    with torch.inference_mode():
        y = layer(x)
    assert calls[0] == (4, 4, 5, 5)
    assert ("attention" in calls) == (change == "gate")
    assert difference(y, by_loops(layer, conv, x)) < 1e-10
    assert difference(y, conv(x)) > 1e-4

    with torch.no_grad():  # and back
        getattr(layer, change).zero_()
    calls.clear()
    with torch.inference_mode():
        assert torch.equal(layer(x), conv(x))
    assert calls == [(4, 4, 3, 3)]


def test_training_sees_content_from_the_first_step(monkeypatch):
    layer = GatedPositionalSelfAttention(nn.Conv2d(4, 4, 3, padding=1))
    calls = count_calls(monkeypatch)
    layer(torch.randn(1, 4, 7, 5))
    assert "attention" in calls
    layer.gate.requires_grad_(False)  # nobody asks what content would do
    calls.clear()
    layer(torch.randn(1, 4, 7, 5))
    assert "attention" not in calls


def test_weights_changed_in_place_or_anew_are_seen():
    """The shortcut remembers nothing: it reads the parameters of this moment."""
    layer, x = GatedPositionalSelfAttention(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 7, 5)
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert torch.equal(layer(x), 2 * before)
        layer.load_state_dict({**layer.state_dict(), "shift": torch.full((9, 2), 0.5)})
        assert not torch.allclose(layer(x), 2 * before)


@pytest.mark.slow
def test_compiled_it_is_the_same_function():
    layer, conv, x = small_layer()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert difference(compiled(x), conv(x)) < 1e-12
        moved(layer)
        assert difference(compiled(x), by_loops(layer, conv, x)) < 1e-10


# ------------------------------------------------------------------------------------------------- looking at it


def test_locality_shows_and_sets_how_hard_the_heads_look():
    layer = GatedPositionalSelfAttention(nn.Conv2d(4, 4, 3, padding=1), locality=0.5)
    assert torch.equal(layer.locality, torch.full((9,), 0.5))
    weights = layer.attention_weights(torch.randn(1, 4, 7, 5))
    assert weights[0, 4, 3, 2, 1, 1].item() == pytest.approx(0.25)  # the head at home in the middle
    layer.locality = 1
    weights = layer.attention_weights(torch.randn(1, 4, 7, 5))[0, :, 3, 2]
    assert torch.equal(weights.flatten(1), torch.eye(9))
    layer.locality = torch.linspace(0.2, 1, 9)
    assert torch.allclose(layer.locality, torch.linspace(0.2, 1, 9))
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(OptionError, match="locality must be above 0 and at most 1"):
            layer.locality = wrong


def test_centres_are_in_cells():
    layer = GatedPositionalSelfAttention(nn.Conv2d(4, 4, (3, 2), dilation=(2, 3)), margin=1)
    assert layer.centres.tolist() == [[y, x] for y in (-2.0, 0.0, 2.0) for x in (-3.0, 0.0)]
    with torch.no_grad():
        layer.shift.fill_(9)  # further than the block
    assert layer.centres.unique(dim=0).tolist() == [[4.0, 3.0]]


@hypothesis.given(convolutions(2, ("zeros",)), st.integers(0, 1), st.integers(0, 2**20))
@hypothesis.settings(max_examples=15)
def test_the_weights_that_it_shows_are_those_it_uses(drawn, margin, seed):
    """The output computed again from the shown weights, on the cells that the window names."""
    conv, x = drawn
    x = x[:1]
    layer = moved(GatedPositionalSelfAttention(conv, margin=margin), seed)
    window, y, weights = layer.window_on(x.shape[2:]), layer(x).detach(), layer.attention_weights(x).detach().numpy()
    axes = [
        oracle.Axis(n, rule.kernel_size, rule.stride, rule.dilation, "zeros")
        for n, rule in zip(x.shape[2:], window.axes(x.ndim - 2), strict=True)
    ]
    cells = np.pad(x.numpy(), [(0, 0), (0, 0), *[(0, 1)] * len(axes)])  # the last votes with zeros
    kernels = conv.weight.detach().flatten(2).numpy()
    again = np.zeros(y.shape) if conv.bias is None else np.zeros(y.shape) + conv.bias.detach().numpy().reshape(
        1, -1, *[1] * len(axes)
    )  # fmt: skip
    shown = tuple(
        map(min, y.shape[2:], weights.shape[2 : -len(axes)])
    )  # more padding than 'same' has outputs off the map
    for p in np.ndindex(*shown):
        for head in range(layer.num_heads):
            seen = oracle.block(axes, p)
            mixed = sum(weights[(0, head, *p, *place)] * cells[(0, slice(None), *cell)] for place, cell, _ in seen)
            again[(0, slice(None), *p)] += grouped(kernels[..., head], mixed, conv.groups)
    inside = (..., *map(slice, shown))
    assert difference(y[inside], again[inside]) < 1e-10
    some = torch.tensor([[n // 2 for n in shown], [0] * len(axes)])
    chosen = layer.attention_weights(x, some).detach().numpy()
    assert all(
        np.allclose(chosen[:, :, i], weights[(slice(None), slice(None), *q)]) for i, q in enumerate(some.tolist())
    )


def test_attention_maps_finds_converted_layers():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1))
    ns.convert(network, init="exact")
    maps = ns.attention_maps(network, torch.randn(1, 8, 9, 11))
    assert [(one.layer, one.weights.shape) for one in maps] == [
        ("0", (1, 9, 9, 11, 3, 3)),
        ("2", (1, 9, 5, 6, 3, 3)),
    ]


# ------------------------------------------------------------------------------------------------- whole networks


def unsilenced(network: nn.Module) -> nn.Module:
    """Freshly made networks begin with branches of weight zero, behind which nothing could be seen to go wrong."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return network


class OfTheUser(nn.Module):
    """Layers in lists and dicts, one of them used twice, and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular") for _ in range(2))
        self.shared = nn.ModuleDict({"a": nn.Conv2d(8, 8, (1, 4), padding="same", groups=4), "b": nn.Conv2d(8, 8, 1)})
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + self.shared["a"](block(x)).relu()
        return self.head(self.shared["b"](x).mean((2, 3)))


def vgg() -> nn.Module:
    layers = make_layers([8, "M", 16, "M"], batch_norm=True)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def of_timm(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=10, **kwargs)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": of_timm("test_resnet"),
    "ConvNeXt": of_timm("test_convnext"),
    "EfficientNet": of_timm("test_efficientnet"),
    "MobileNetV3": of_timm("mobilenetv3_small_050"),
    "RegNet": of_timm("regnetx_002"),
    "ByobNet": of_timm("test_byobnet"),
    "DenseNet": of_timm("densenet121", block_config=(2, 2), growth_rate=8),
    "VGG": vgg,
    "of the user": OfTheUser,
}


# What these have is in the others too: grouped and strided convolutions, gates, activations of every kind.
MORE = ("MobileNetV3", "RegNet", "ByobNet")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[pytest.mark.sweep] * (family in MORE)) for family in NETWORKS]
)
def test_a_whole_network_is_the_same_function(family):
    torch.manual_seed(0)
    network = unsilenced(NETWORKS[family]()).eval()
    x = torch.randn(2, 3, 45, 64)
    spatial = {
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    }
    with torch.no_grad():
        expected = network(x)
    converted = copy.deepcopy(network)
    report = ns.convert(converted, init="exact", stem=True, input_size=(3, 45, 64))
    assert set(report.converted) == spatial
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in converted.modules())
    assert report.error < 1e-5
    with torch.no_grad():
        assert difference(converted(x), expected) < 1e-5  # the shortcut
    assert difference(converted(x), expected) < 1e-5  # all of it
    exact = network.double()(x.double())
    assert exact.std() > 1e-3  # else nothing was compared
    assert difference(converted.double()(x.double()), exact) < 1e-10


@pytest.mark.parametrize("family", ["ResNet", "ConvNeXt", "MobileNetV3", "VGG", "of the user"])
def test_fresh_attention_fits_where_the_convolutions_were(family):
    network = NETWORKS[family]()
    x = torch.randn(2, 3, 45, 64)
    shapes = shapes_of(network, x)
    report = ns.convert(network, init="random", kernel_size=3, num_heads=4)
    assert report.converted
    after = shapes_of(network, x)
    assert {name: after[name] for name in report.converted} == {name: shapes[name] for name in report.converted}
    for name in report.converted:
        assert any(isinstance(module, AttentionLayer) for module in network.get_submodule(name).modules())
    network(x).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def shapes_of(network: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    """What comes out of every module that is run."""
    shapes = {}
    hooks = [
        module.register_forward_hook(lambda _, __, y, name=name: shapes.__setitem__(name, tuple(y.shape)))
        for name, module in network.named_modules()
    ]
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return shapes


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("init", ["random", "exact"])
def test_convolutions_of_one_and_of_three_axes(rank, init):
    kind = CONV[rank]
    network = nn.Sequential(kind(8, 16, 3, stride=2, padding=1), nn.ReLU(), kind(16, 8, (4, 2, 1)[:rank], dilation=2))
    x = torch.randn(2, 8, 15, 13, 11)[(..., *[0] * (3 - rank))]
    expected = network(x)
    report = ns.convert(network, init=init, **({"kernel_size": 3} if init == "random" else {}))
    assert report.converted == ("0", "2")
    assert network(x).shape == expected.shape
    if init == "exact":
        assert difference(network(x), expected) < 1e-5


def test_a_random_layer_is_centred_where_the_convolution_was():
    """A picture of one bright cell reaches exactly the outputs whose convolution saw that cell."""
    for conv in (nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 5, stride=3, padding=1), nn.Conv2d(8, 8, 3)):
        network = nn.Sequential(copy.deepcopy(conv)).double()
        ns.convert(network, init="random", kernel_size=conv.kernel_size[0], position="none")
        x = torch.randn(1, 8, 13, 17, dtype=torch.float64)
        changed = x.clone()
        changed[..., 6, 9] += 1
        with torch.no_grad():
            nn.init.constant_(conv.weight, 1)
            seen = (conv.double()(changed) - conv(x)).abs().sum(1) > 1e-9
            assert torch.equal((network(changed) - network(x)).abs().sum(1) > 1e-9, seen)


# -------------------------------------------------------------------------------------------- filters and options


def converted(**filters) -> tuple[str, ...]:
    with torch.device("meta"):
        return ns.convert(timm.create_model("resnet18"), init="random", **filters).converted


def test_filters():
    """By name, stage, kernel and predicate; a layer has to pass them all."""
    everything = converted(stem=True)
    assert len(everything) == 17
    assert everything[0] == "conv1"
    assert converted() == everything[1:]
    late = tuple(name for name in everything if name.startswith("layer4"))
    assert converted(names="layer4.*") == converted(stages=4) == late
    assert converted(names=["layer4.*", "*.0.conv2"], stages=[1, 4]) == ("layer1.0.conv2", *late)
    assert converted(kernels=7, stem=True) == converted(kernels=[(7, 7)], stem=True) == ("conv1",)
    assert converted(where=lambda name, conv: conv.stride == (2, 2)) == tuple(f"layer{i}.0.conv1" for i in (2, 3, 4))


def test_options_of_random_attention():
    network = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False, stride=2, padding_mode="circular"))
    report = ns.convert(network, init="random", kernel_size=5, num_heads=4, position="bias")
    layer = network[0]
    assert (layer.window.kernel_size, layer.num_heads, layer.window.border) == (5, 4, "wrap")
    assert layer.window.stride == (2, 2)
    assert not any(name.endswith(".bias") for name, _ in layer.named_parameters() if "position" not in name)
    assert report.options["num_heads"] == 4


REFUSED = {
    "a name that is not there": (
        {"names": "block*"},
        "names: the model has no spatial convolution for 'block\\*'; it has",
    ),
    "a stage that is not there": ({"stages": 7}, "stages: .* for 7; it has 0, 1, 2, 3, 4"),
    "a kernel that is not there": ({"kernels": 9}, "kernels: .* for 9"),
    "another init": ({"init": "fast"}, "init must be 'random' or 'exact'; received 'fast'"),
    "an option of exact": ({"margin": 1}, "margin cannot be set with init='random'"),
    "an option of random": ({"init": "exact", "num_heads": 4}, "num_heads cannot be set with init='exact'"),
    "a margin below 0": ({"init": "exact", "margin": -1}, "margin must be an int of at least 0; received -1"),
    "no heads": ({"num_heads": 0}, "num_heads must be an int of at least 1; received 0"),
    "no kernel": ({"kernel_size": 0}, "kernel_size must be at least 1; received 0"),
    "a locality above 1": ({"init": "exact", "locality": 2.0}, "locality must be above 0 and at most 1"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refused(wrong):
    """One sentence, and the model is as it was."""
    network = timm.create_model("test_resnet")
    before = list(network.modules())
    options, message = REFUSED[wrong]
    with pytest.raises(OptionError, match=message):
        ns.convert(network, **{"init": "random", **options})
    assert list(network.modules()) == before


def test_init_is_always_said():
    """Fresh attention throws trained layers away: nothing that happens by itself."""
    network = nn.Sequential(nn.Conv2d(8, 8, 3))
    with pytest.raises(TypeError, match="init"):
        ns.convert(network)
    assert isinstance(network[0], nn.Conv2d)


def test_refused_models_and_inputs():
    with pytest.raises(OptionError, match="give the module that holds it"):
        ns.convert(nn.Conv2d(8, 8, 3), init="exact")
    with pytest.raises(OptionError, match="does not say where its stages end"):
        ns.convert(nn.Sequential(nn.Conv2d(8, 8, 3)), init="exact", stages=1)
    with pytest.raises(OptionError, match="received Linear"):
        GatedPositionalSelfAttention(nn.Linear(3, 3))
    layer = GatedPositionalSelfAttention(nn.Conv2d(8, 8, 3))
    with pytest.raises(ShapeError, match=r"takes \(B, 8, H, W\) or \(8, H, W\); received \(1, 4, 9, 9\)"):
        layer(torch.randn(1, 4, 9, 9))
    with pytest.raises(ShapeError, match="lie in an output of"):
        layer.attention_weights(torch.randn(1, 8, 9, 9), torch.tensor([[0, 99]]))


# ------------------------------------------------------------------------------------------- what cannot be converted


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OnlyNamed(nn.Conv2d):
    """A name of its own changes nothing."""


def hooked() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


def pruned() -> nn.Module:
    conv = nn.Conv2d(8, 8, 3)
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


COMPUTED = "its weight is computed"
UNUSUAL: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "lazy": (lambda: nn.LazyConv2d(8, 3), "not initialised yet: run the model once"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)), COMPUTED),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3)), COMPUTED),
    "weight norm of old": (lambda: nn.utils.weight_norm(nn.Conv2d(8, 8, 3)), COMPUTED),
    "pruned": (pruned, COMPUTED),
    "quantised": (lambda: quantized.Conv2d(8, 8, 3), "Conv2d is no plain convolution"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d is no plain convolution"),
    "with hooks": (hooked, "it carries hooks"),
    "with its own forward": (lambda: OwnForward(8, 8, 3), "OwnForward has a forward of its own"),
    "complex": (lambda: nn.Conv2d(8, 8, 3, dtype=torch.complex64), "not floating point"),
    "a subclass by name": (lambda: OnlyNamed(8, 8, 3), None),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("init", ["random", "exact"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_no_plain_convolution_is_left_and_named(kind, init):
    make, reason = UNUSUAL[kind]
    network = nn.Sequential(make())
    before = network[0]
    (row,) = ns.convert(network, init=init).rows
    if reason is None:
        assert row.outcome == "converted"
        assert network[0] is not before
    else:
        assert row.outcome == "skipped"
        assert reason in row.note
        assert network[0] is before


def test_a_lazy_convolution_is_converted_once_it_has_run():
    network, x = nn.Sequential(nn.LazyConv2d(8, 3)), torch.randn(1, 5, 9, 7)
    expected = network(x)
    assert ns.convert(network, init="exact").converted == ("0",)
    assert difference(network(x), expected) < 1e-5


def test_a_weight_norm_that_was_made_permanent_is_converted():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    assert ns.convert(nn.Sequential(conv), init="exact").converted == ("0",)


@pytest.mark.parametrize("init", ["random", "exact"])
def test_converting_twice_changes_nothing_and_says_so(init):
    network = OfTheUser()
    assert len(ns.convert(network, init=init).converted) == 3
    before = list(network.modules())
    for again in ("random", "exact"):
        report = ns.convert(network, init=again)
        assert report.converted == ()
        assert report.summary()[0] == "nothing to convert: 3 layers attend already, 1 skipped"
        assert list(network.modules()) == before


def test_a_network_of_attention_is_left_as_it_is():
    network = ns.create_model("sasa_nano")
    before = list(network.modules())
    report = ns.convert(network, init="random")
    assert report.summary()[0] == "nothing to convert: 4 layers attend already, 0 skipped"
    assert {row.outcome for row in report.rows} == {"attention"}
    assert list(network.modules()) == before


def test_a_layer_that_is_used_twice_stays_one():
    shared = nn.Conv2d(8, 8, 3, padding=1)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    ns.convert(network, init="exact")
    assert network[0] is network[2]
    assert isinstance(network[0], GatedPositionalSelfAttention)


def test_modes_dtypes_and_frozen_weights_are_kept():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, dtype=torch.bfloat16), nn.Conv2d(8, 8, 3)).eval()
    weight = network[1].weight
    network[1].requires_grad_(False)
    ns.convert(network, init="exact", input_size=None)
    assert not any(module.training for module in network.modules())
    assert network[1].weight is weight
    assert not any(parameter.requires_grad for parameter in network[1].parameters())
    assert all(parameter.requires_grad for parameter in network[0].parameters())
    assert {p.dtype for p in network[0].parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------ files and reports


@pytest.mark.parametrize("options", [{"init": "random", "kernel_size": 3}, {"init": "exact", "margin": 1}])
def test_a_state_dict_goes_into_a_network_converted_in_the_same_way(options):
    network = unsilenced(timm.create_model("test_resnet", num_classes=10)).eval()
    report = ns.convert(network, stages=[2, 3], **options)
    for module in network.modules():
        if isinstance(module, GatedPositionalSelfAttention):
            moved(module)
    another = timm.create_model("test_resnet", num_classes=10).eval()
    again = ns.convert(another, **json.loads(json.dumps(report.options)))
    assert again.converted == report.converted
    another.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 33, 40)
    assert torch.equal(another(x), network(x))


def test_the_convolutions_weights_keep_their_names():
    network = timm.create_model("test_resnet", num_classes=10)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ns.convert(network, init="exact")
    missing = network.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert {key.split(".", key.count("."))[-1] for key in missing.missing_keys} <= {
        "shift",
        "spread",
        "gate",
        "weight",
        "_extra_state",
    }


def test_the_report():
    network = timm.create_model("test_resnet", num_classes=10)
    before = sum(p.numel() for p in network.parameters())
    report = ns.convert(network, init="exact", stages=[0, 4], input_size=(3, 40, 33))
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in network.parameters())
    grown = sum(row.parameters_after - row.parameters_before for row in report.rows)
    assert grown == report.parameters_after - report.parameters_before
    assert report.flops_before == report.flops_after < report.flops_with_content
    stem, *others = report.rows
    assert (stem.name, stem.outcome) == ("conv1.0", "skipped")
    assert "stem=True converts it" in stem.note
    assert {row.note for row in others if row.outcome == "skipped"} == {"not in these stages"}

    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["converted"] == list(report.converted)
    assert plain["rows"][0]["layer"] == "Conv2d 3 -> 16, 3x3, stride 2x2"
    text = str(report)
    assert all(row.name in text for row in report.rows)
    assert f"{report.flops_with_content:,} with all gates open" in text

    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    shown = console.export_text()
    assert all(line in shown for line in (*report.converted, *report.summary()))


def test_the_parameters_that_the_docstring_counts():
    conv = nn.Conv2d(10, 6, (3, 2), groups=2)
    heads, head_dim, before = 6, 4, sum(p.numel() for p in conv.parameters())
    for content, extra in ((True, 4 * heads + 2 * 10 * heads * head_dim), (False, 3 * heads)):
        layer = GatedPositionalSelfAttention(copy.deepcopy(conv), content=content)
        assert sum(p.numel() for p in layer.parameters()) == before + extra
