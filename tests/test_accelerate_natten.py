# SPDX-License-Identifier: Apache-2.0
"""NATTEN's modules, accelerated: stand-ins here have the names, attributes and arguments of those that were published."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType

import natten_oracle
import pytest
import torch
from torch import Tensor, nn

import nearsight as ns

OURS = "nearsight.acceleration.natten_modules"


class Published(nn.Module):
    """What all versions have; the oracle's plain loops in the place of their kernels."""

    rank = 0

    def hold(self, dim: int, num_heads: int, kernel_size, dilation, *, rpb: bool, attn_drop: float | None) -> None:
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)
        sizes = [2 * k - 1 for k in natten_oracle.each(kernel_size, self.rank)]
        if attn_drop is not None:
            self.register_parameter("rpb", nn.Parameter(torch.zeros(num_heads, *sizes)) if rpb else None)
            self.attn_drop = nn.Dropout(attn_drop)

    def sees(self) -> dict:
        return {"kernel_size": self.kernel_size, "dilation": self.dilation}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = natten_oracle.na(q, k, v, **self.sees(), scale=self.scale, rpb=getattr(self, "rpb", None))
        return self.proj_drop(self.proj(out.flatten(-2)))


class Of014(Published):
    """natten.natten1d and natten2d: whole numbers, a bias always, padded to the window."""

    def __init__(self, dim, num_heads, kernel_size, dilation=1, attn_drop=0.0):
        super().__init__()
        self.kernel_size, self.dilation, self.window_size = kernel_size, dilation, kernel_size * dilation
        self.hold(dim, num_heads, kernel_size, dilation, rpb=True, attn_drop=attn_drop)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:-1]
        for axis, cells in enumerate(size):
            x = nn.functional.pad(x, [0, 0] * (self.rank - axis) + [0, max(0, self.window_size - cells)])
        return super().forward(x)[(slice(None), *map(slice, size))]


class Of015(Published):
    """natten.natten3d: the first of three axes by itself."""

    def __init__(self, dim, num_heads, kernel_size, kernel_size_d, dilation=1, dilation_d=1):
        super().__init__()
        self.kernel_size, self.kernel_size_d, self.dilation, self.dilation_d = (
            kernel_size,
            kernel_size_d,
            dilation,
            dilation_d,
        )
        self.hold(dim, num_heads, self.sees()["kernel_size"], dilation, rpb=True, attn_drop=0.0)

    def sees(self) -> dict:
        dilation = (self.dilation_d, self.dilation, self.dilation)
        return {"kernel_size": (self.kernel_size_d, self.kernel_size, self.kernel_size), "dilation": dilation}


class Of017(Published):
    """natten.na1d to na3d: a number for every axis, causal axes, a bias where it is asked for."""

    def __init__(self, dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False, attn_drop=0.0):
        super().__init__()
        given = (kernel_size, dilation, is_causal)
        self.kernel_size, self.dilation, self.is_causal = (natten_oracle.each(one, self.rank) for one in given)
        self.hold(dim, num_heads, kernel_size, dilation, rpb=rel_pos_bias, attn_drop=attn_drop)

    def sees(self) -> dict:
        return super().sees() | {"is_causal": self.is_causal}


class Of021(Published):
    """natten.modules: queries that share a window, and no bias."""

    def __init__(self, embed_dim, num_heads, kernel_size, stride=1, dilation=1, is_causal=False):
        super().__init__()
        given = (kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = (
            natten_oracle.each(one, self.rank) for one in given
        )
        self.hold(embed_dim, num_heads, kernel_size, dilation, rpb=False, attn_drop=None)

    def sees(self) -> dict:
        return super().sees() | {"stride": self.stride, "is_causal": self.is_causal}


# The file of the class, its version, its axes, what a module is made with, and the map.
CASES = {
    "0.14, 1-D": ("natten1d", Of014, 1, {"kernel_size": 5, "dilation": 2}, (13,)),
    "0.14, 2-D": ("natten2d", Of014, 2, {"kernel_size": 3, "dilation": 2}, (7, 6)),
    "0.15, 3-D": ("natten3d", Of015, 3, {"kernel_size": 3, "kernel_size_d": 2, "dilation_d": 2}, (5, 4, 3)),
    "0.17, 1-D": ("na1d", Of017, 1, {"kernel_size": 4, "is_causal": True}, (9,)),
    "0.17, 2-D": ("na2d", Of017, 2, {"kernel_size": (3, 5), "dilation": (2, 1), "rel_pos_bias": True}, (6, 7)),
    "0.17, 3-D": ("na3d", Of017, 3, {"kernel_size": (2, 3, 3), "is_causal": (True, False, False)}, (4, 3, 5)),
    "0.21, 1-D": ("modules", Of021, 1, {"kernel_size": 5, "stride": 2}, (11,)),
    "0.21, 2-D": ("modules", Of021, 2, {"kernel_size": (5, 4), "stride": (2, 3), "dilation": (1, 2)}, (6, 9)),
    "0.21, 3-D": ("modules", Of021, 3, {"kernel_size": (2, 3, 3), "stride": (1, 3, 1)}, (3, 6, 4)),
}
every_case = pytest.mark.parametrize("case", CASES)


def installed(monkeypatch, file: str, version: type[Published]) -> ModuleType:
    """A natten of that version in place of whatever there is, and our file about it imported anew."""
    natten, inner = ModuleType("natten"), ModuleType(f"natten.{file}")
    for rank in (1, 2, 3):
        name = f"NeighborhoodAttention{rank}D"
        made = type(name, (version,), {"__module__": inner.__name__, "rank": rank})
        setattr(natten, name, made)
        setattr(inner, name, made)
    if version is Of014:
        del natten.NeighborhoodAttention3D  # came with 0.15
    monkeypatch.setitem(sys.modules, "natten", natten)
    monkeypatch.setitem(sys.modules, inner.__name__, inner)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    monkeypatch.setattr(ns.acceleration, "natten_modules", None, raising=False)
    return natten


@pytest.fixture
def made(monkeypatch):
    def make(case: str, **options) -> tuple[nn.Module, Tensor]:
        file, version, rank, given, size = CASES[case]
        natten = installed(monkeypatch, file, version)
        torch.manual_seed(0)
        module = getattr(natten, f"NeighborhoodAttention{rank}D")(12, 2, **given, **options).eval()
        if getattr(module, "rpb", None) is not None:
            nn.init.normal_(module.rpb)
        return module, torch.randn(2, *size, 12)

    yield make
    sys.modules.pop(OURS, None)


@every_case
def test_it_is_the_same_function_with_the_same_gradients(case, made, monkeypatch):
    theirs, x = made(case)
    ours, original = copy.deepcopy(theirs), type(theirs)
    expected = theirs(x.requires_grad_())
    gradients = torch.autograd.grad(expected.square().sum(), [x, *theirs.parameters()])
    names = list(ours.state_dict())
    report = ns.accelerate(ours)
    assert [row.outcome for row in report.rows] == ["accelerated"], report
    assert list(ours.state_dict()) == names
    with monkeypatch.context() as patched:
        patched.delattr(Published, "forward")  # nothing falls back to it
        patched.setattr(original, "forward", None)
        found = ours(x)
        assert (found - expected).abs().max() < 1e-5
        mine = torch.autograd.grad(found.square().sum(), [x, *ours.parameters()])
        assert all((a - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(mine, gradients, strict=True))
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), copy.deepcopy(ours)(x))
    report.restore()
    assert type(ours) is original
    assert torch.equal(ours(x), expected)


@pytest.mark.parametrize("case", ["0.14, 1-D", "0.14, 2-D"])
def test_maps_smaller_than_the_window_and_other_dtypes_are_the_makers_own(case, made):
    theirs, x = made(case)
    small, ours = x[:, :4], copy.deepcopy(theirs)
    ns.accelerate(ours)
    assert torch.equal(ours(small), theirs(small))
    assert torch.equal(ours.double()(x.double()), theirs.double()(x.double()))


def test_dropped_weights_are_the_makers_own(made, monkeypatch):
    module, x = made("0.17, 2-D", attn_drop=0.5)
    ns.accelerate(module)
    ran = []
    monkeypatch.setattr(Published, "forward", lambda self, x: ran.append(self) or x)
    module(x)
    assert not ran
    module.train()(x)
    assert ran == [module]


def test_what_is_more_than_its_class_stays(made):
    module, _ = made("0.14, 2-D")
    module.dilation = None  # which up to 0.14.4 meant as far as the map reaches
    assert "its dilation follows the map" in str(ns.accelerate(module))
    module, _ = made("0.17, 2-D")
    module.attn_drop.register_forward_hook(lambda *_: None)
    assert "its attn_drop carries hooks" in str(ns.accelerate(module))


def test_the_stand_in_for_natten_is_our_operation_already():
    from nearsight.compat.natten.modules import NeighborhoodAttention2D

    assert ns.accelerate(NeighborhoodAttention2D(12, 2, 3)).rows == ()
