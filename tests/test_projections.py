# SPDX-License-Identifier: Apache-2.0
"""A layer's projections are modules and are called as such: what hangs on them or stands in their place takes part."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from conftest import projected, projections
from torch import nn
from torch.nn.utils import parametrize, prune

import nearsight as ns
from nearsight.compat.natten.modules import NeighborhoodAttention2D
from nearsight.conversion.gpsa import GatedPositionalSelfAttention
from nearsight.models.blocks import RelativeOnlySelfAttention2d
from nearsight.models.nat import NeighbourhoodAttention

LOCAL: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: ns.LocalSelfAttention1d(4, 8, 3, stride=2, num_heads=2),
    "2d": lambda: ns.LocalSelfAttention2d(4, 8, 3, num_heads=2, out_proj=True),
    "2d, strided": lambda: ns.LocalSelfAttention2d(4, 8, 3, stride=2, num_heads=2, qkv_bias=True),
    "2d, one axis strided": lambda: ns.LocalSelfAttention2d(4, 8, 3, stride=(1, 2), num_heads=2, qk_channels=4),
    "2d, q.r alone": lambda: RelativeOnlySelfAttention2d(4, 8, 3, stride=2, num_heads=2),
    "2d, projected again": lambda: ns.LocalSelfAttention2d(4, 8, 3, stride=2, num_heads=2, recompute_qkv=True),
    "3d": lambda: ns.LocalSelfAttention3d(4, 8, 3, stride=(1, 2, 1), num_heads=2, position="bias"),
    "global": lambda: ns.GlobalSelfAttention2d(4, 8, num_heads=2, map_size=8),
    "halo": lambda: ns.HaloSelfAttention2d(4, 8, num_heads=2, block_size=4, halo_size=1),
    "halo, strided": lambda: ns.HaloSelfAttention2d(4, 8, num_heads=2, block_size=4, halo_size=1, stride=2),
}
LAYERS = {
    **LOCAL,
    "stem": lambda: ns.AttentionStem2d(4, 8, num_heads=2),
    "gated": lambda: _opened(GatedPositionalSelfAttention(nn.Conv2d(4, 8, 3, stride=2, padding=1))),
    "nat": lambda: NeighbourhoodAttention(8, 2, ns.Window(3, border="shift")),
    "natten": lambda: NeighborhoodAttention2D(embed_dim=8, num_heads=2, kernel_size=3),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def _opened(layer: GatedPositionalSelfAttention) -> nn.Module:
    nn.init.constant_(layer.gate, 0.5)
    return layer


def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, nn.Module], torch.Tensor]:
    """A layer, its convolutions and linear maps by name, and an input."""
    torch.manual_seed(0)
    layer = make()
    maps = {name: one for name, one in layer.named_modules() if isinstance(one, (nn.Linear, *CONVOLUTIONS))}
    last = isinstance(next(iter(maps.values())), nn.Linear)
    x = torch.randn(2, 8, 8, 8) if last else torch.randn(2, 4, *[8] * getattr(layer, "rank", 2))
    return layer, maps, x


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@every_layer
def test_hooks_see_every_call(make):
    layer, maps, x = built(make)
    seen = []
    for name, one in maps.items():
        one.register_forward_pre_hook(lambda *_, name=name: seen.append(("before", name)))
        one.register_forward_hook(lambda *_, name=name: seen.append(("after", name)))
        one.register_full_backward_hook(lambda *_, name=name: seen.append(("backward", name)))
    layer(x.requires_grad_()).sum().backward()
    assert sorted(seen) == sorted((when, name) for name in maps for when in ("before", "after", "backward"))
    assert len(maps) >= (2 if "q" in maps else 1)


@every_layer
def test_hooks_can_change_what_is_projected(make):
    layer, maps, x = built(make)
    y = layer(x)
    for one in maps.values():
        handle = one.register_forward_hook(lambda module, inputs, output: 2 * output)
        assert not torch.allclose(layer(x), y)
        handle.remove()
    assert torch.equal(layer(x), y)


class Adapted(nn.Module):
    """A frozen module and a low-rank map beside it that starts at zero, as peft's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        if isinstance(base, nn.Linear):
            self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        else:
            kind = CONVOLUTIONS[base.weight.ndim - 3]
            self.a, self.b = (
                kind(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False),
                kind(2, base.out_channels, 1, bias=False),
            )
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def adapted(layer: nn.Module, maps: dict[str, nn.Module]) -> list[nn.Module]:
    for name, one in maps.items():
        layer.set_submodule(name, Adapted(one))
    return [one for one in layer.modules() if isinstance(one, Adapted)]


@every_layer
def test_adapters_in_the_place_of_a_projection_train(make):
    layer, maps, x = built(make)
    y = layer(x)
    adapters = adapted(layer, maps)
    assert torch.equal(layer(x), y)
    optimizer = torch.optim.SGD([p for one in adapters for p in (one.a.weight, one.b.weight)], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert all(one.a.weight.grad.any() and one.b.weight.grad.any() for one in adapters)
    assert all(one.base.weight.grad is None for one in adapters)
    assert not torch.allclose(layer(x), y)


def test_every_adapter_of_a_halonet_learns():
    model = ns.create_model("halo_h0", depths=(1, 1), widths=(16, 32), num_heads=4, block_size=4, num_classes=3)
    wanted = {name: one for name, one in model.named_modules() if name.endswith((".q", ".kv"))}
    assert len(wanted) == 4
    adapters = adapted(model, wanted)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(one.b.weight.grad.any() for one in adapters)


PARAMETRISED = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "low rank": lambda one: parametrize.register_parametrization(one, "weight", LowRank(one.weight)),
    "pruned": lambda one: prune.l1_unstructured(one, "weight", amount=0.5),
}


class LowRank(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(len(weight), 1) / 9), nn.Parameter(torch.randn(1, weight[0].numel()))

    def forward(self, weight):
        return weight + (self.a @ self.b).view_as(weight)


@every_layer
@pytest.mark.parametrize("change", PARAMETRISED.values(), ids=PARAMETRISED)
def test_computed_weights_train_step_after_step(make, change):
    """And mean what their weights do: a plain layer with these computes the same."""
    layer, maps, x = built(make)
    plain = built(make)[0]
    if isinstance(layer, GatedPositionalSelfAttention):
        maps = {name: maps[name] for name in ("query", "key")}
    for one in maps.values():
        change(one)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    learnt = [
        name for (name, now), then in zip(layer.named_parameters(), before, strict=True) if not torch.equal(now, then)
    ]
    assert learnt == [name for name, _ in layer.named_parameters()]
    layer.eval()
    y = layer(x)
    state = {name: value for name, value in layer.state_dict().items() if name in plain.state_dict()}
    for name, one in maps.items():
        state[f"{name}.weight"] = one.weight.detach()
    plain.load_state_dict(state)
    torch.testing.assert_close(plain.eval()(x), y)


@pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
def test_the_other_way_of_holding_the_projections_is_loaded(make):
    torch.manual_seed(0)
    layer, fresh = nn.Sequential(make()), nn.Sequential(make())
    own = layer.state_dict()
    parts, there = (("q", "kv"), ["qkv"]) if "0.q.weight" in own else (("qkv",), ["q", "kv"])
    other = {name: value for name, value in own.items() if name.split(".")[1] not in parts}
    for kind in ("weight", "bias"):
        if f"0.{parts[0]}.{kind}" in own:
            joined = torch.cat([own[f"0.{part}.{kind}"] for part in parts])
            pieces = [joined] if len(there) == 1 else joined.split([layer[0]._widths[0], sum(layer[0]._widths[1:])])
            other |= {f"0.{name}.{kind}": piece for name, piece in zip(there, pieces, strict=True)}
    given = dict(other)
    assert fresh.load_state_dict(other) == ([], [])
    assert other.keys() == given.keys()  # the caller's own is not touched
    assert own.keys() == fresh.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in fresh.state_dict().items())
    fresh = nn.Sequential(make())
    fresh.load_state_dict(other, assign=True)
    storages = [parameter.untyped_storage().data_ptr() for parameter in fresh.parameters()]
    assert len(set(storages)) == len(storages)  # safetensors writes no shared memory


def test_a_part_of_a_file_is_loaded_too():
    layer = ns.LocalSelfAttention2d(4, 8, 3, stride=2, num_heads=2, qkv_bias=True)
    weight, bias = torch.randn(24, 4, 1, 1), torch.randn(24)
    x = torch.randn(1, 4, 5, 5)
    missing, unexpected = layer.load_state_dict({"qkv.weight": weight}, strict=False)
    assert set(missing) == {"q.bias", "kv.bias", "position.vectors.0", "position.vectors.1"}
    assert unexpected == []
    layer.load_state_dict({"qkv.bias": bias}, strict=False)
    torch.testing.assert_close(projected(layer, x), torch.nn.functional.conv2d(x, weight, bias))


@pytest.mark.parametrize(
    ("stride", "state", "message"),
    [
        (2, {"qkv.weight": torch.zeros(23, 4, 1, 1)}, r"kv.weight: copying a param with shape .*\[15, 4, 1, 1\]"),
        (2, {"qkv.weight": torch.zeros(24, 3, 1, 1)}, "size mismatch for q.weight"),
        (2, {"qkv.weight": torch.zeros(())}, r"Unexpected key\(s\) in state_dict: \"qkv.weight\""),
        (2, {"qkv.weight": torch.zeros(24, 4, 1, 1), "qkv.bias": torch.zeros(24)}, r"Unexpected .*: \"qkv.bias\""),
        (2, {"qkv.weight": torch.zeros(24, 4, 1, 1), "q.weight": torch.zeros(8, 4, 1, 1)}, r"Unexpected .*qkv.weight"),
        (1, {"q.weight": torch.zeros(7, 4, 1, 1), "kv.weight": torch.zeros(17, 4, 1, 1)}, r"Unexpected .*q.weight"),
        (
            1,
            {"q.weight": torch.zeros(8, 4, 1, 1), "kv.weight": torch.zeros(15, 4, 1, 1)},
            "size mismatch for qkv.weight",
        ),
        (1, {"q.weight": torch.zeros(8, 4, 1, 1)}, r"Missing .*qkv.weight"),
    ],
)
def test_what_does_not_fit_is_refused(stride, state, message):
    layer = ns.LocalSelfAttention2d(4, 8, 3, stride=stride, num_heads=2, position="none")
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "out_proj": True}, {"position": "quadratic"}], ids=str)
def test_a_seed_gives_the_same_projections_apart_as_in_one(options):
    together, apart = {}, {}
    for found, stride in ((together, 1), (apart, 2)):
        torch.manual_seed(3)
        layer = ns.LocalSelfAttention2d(5, 6, 3, stride=stride, num_heads=2, **options)
        found["weight"] = torch.cat([projection.weight for projection in projections(layer)])
        found.update({name: p for name, p in layer.named_parameters() if name.split(".")[0] in ("position", "proj")})
        found["next"] = torch.rand(3)
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together)
