# SPDX-License-Identifier: Apache-2.0
"""A layer's projection and attention by one operator: the numbers of the two steps, where it serves, and where not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_contract import LAYOUTS, NAMED, Case, check_contract
from test_native import CHANNELS, HEIGHTS, ISAS, WIDTHS, needs_library, threads
from torch import Tensor, nn
from torch.nn.utils import prune

import nearsight as ns
from nearsight.attention.native import library, projected
from nearsight.attention.native.backend import _geometry
from nearsight.attention.problem import describe
from nearsight.errors import BackendError, DtypeError, OptionError, ShapeError

pytestmark = needs_library
FORMATS = (torch.contiguous_format, torch.channels_last)
TABLES = {"bias": True, "relative": True}


def at_once(x, weight, offset, window, *, heads, width, bias=None, relative=None, scale=None, isa="auto") -> Tensor:
    """The operator itself, wherever it is the faster way."""
    made = x.new_empty(()).expand(len(x), len(weight), *x.shape[2:])
    problem = describe(*projected.heads_of(made, heads, width), window, bias, relative)
    scale = problem.head_dim**-0.5 if scale is None else scale
    geometry = (*_geometry(problem), scale, library.ISAS.index(isa))
    layer = (x, weight, offset, bias, relative or [], heads, width)
    return projected.project_and_attend_above_autograd(*layer, False, *geometry)[0]


# ------------------------------------------------------------------------- the contract, of a projection that does nothing


def attend(isa: str):
    """Query, key and value side by side in the channels, and a weight that picks each out again."""

    def run(query, key, value, window, *, bias=None, relative=None, scale=None):
        x = torch.cat([one.movedim(-1, 2).flatten(1, 2) for one in (query, key, value)], 1)
        if x.ndim == 4 and x.shape[-1] % 2:
            x = x.contiguous(memory_format=torch.channels_last)
        channels, heads = x.shape[1], query.shape[1]
        weight = torch.eye(channels).view(channels, channels, *[1] * (x.ndim - 2))
        options = {"heads": heads, "width": heads * query.shape[-1], "bias": bias, "relative": relative, "scale": scale}
        return at_once(x, weight, None, window, **options, isa=isa).unflatten(1, (heads, -1)).movedim(2, -1)

    return run


CASES = {
    **{name: case for name, case in NAMED.items() if case.stride == 1 and case.batch},
    **{f"{width} columns": Case((2, width), 3, batch=3, heads=1, **TABLES) for width in WIDTHS},
    **{f"{height} rows": Case((height, 5), 3, batch=1, heads=1, **TABLES) for height in HEIGHTS},
    **{f"{d} channels": Case((2, 5), 3, batch=1, heads=3, head_dim=d, value_dim=d, **TABLES) for d in CHANNELS},
    # Values in cells, of one vector and of two; rows in strips, with gaps between the cells.
    "16 and 48 channels": Case((4, 9), 3, batch=5, heads=1, head_dim=16, value_dim=48, **TABLES),
    "32 channels of few cells": Case((2, 3), 3, batch=1, heads=1, head_dim=3, value_dim=32, relative=True),
    "strips": Case((2, 300), 3, batch=1, heads=1, head_dim=2, value_dim=16, relative=True),
    "strips of phases": Case((2, 300), (3, 5), dilation=7, batch=1, heads=1, head_dim=2, value_dim=3),
    "strips around": Case((1, 150), 3, border="wrap", dilation=3, batch=1, heads=1, head_dim=2, value_dim=3),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_the_contract(name, isa):
    check_contract(attend(isa), replace(CASES[name], dtype=torch.float32))


# --------------------------------------------------------------------------------------------------------- the projection


def layer_of(sizes: tuple, *, heads: int, offset: bool):
    """x, weight, offset and the incoming gradient in float64: (B, C, qk, out, *map)."""
    torch.manual_seed(5)
    batch, channels, width, out, *size = sizes
    rows = 2 * width + out
    x, grad = torch.randn(batch, channels, *size).double(), torch.randn(batch, out, *size).double()
    weight = torch.randn(rows, channels, *[1] * len(size)).double() * channels**-0.5
    return x, weight, torch.randn(rows).double() if offset else None, grad


def in_two_steps(x, weight, offset, window, heads, width, **tables) -> Tensor:
    joined = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.ndim - 2](x, weight, offset)
    made = projected.heads_of(joined, heads, width)
    return ns.local_attention(*made, window, **tables, backend="reference").movedim(-1, 2).flatten(1, 2)


LAYERS = {
    # (B, C, qk, out, *map), heads, window, offset
    "plain": ((2, 5, 6, 9, 7, 11), 3, ns.Window(3), False),
    "offset": ((2, 5, 6, 9, 7, 11), 3, ns.Window(3), True),
    "one channel": ((1, 1, 1, 1, 3, 5), 1, ns.Window(3), True),
    "line": ((3, 17, 4, 4, 37), 2, ns.Window(5, causal=True), True),
    "volume": ((1, 3, 4, 2, 3, 5, 4), 2, ns.Window(3), True),
    "zeros outside": ((5, 4, 4, 4, 5, 3), 2, ns.Window(3, border="zeros"), True),  # an offset must not fill them
    "a torus": ((2, 4, 4, 4, 5, 9), 2, ns.Window(3, border="wrap", dilation=2), True),
    "phases": ((1, 4, 4, 4, 9, 40), 2, ns.Window(3, border="zeros", dilation=5), True),
    "in cells": ((3, 33, 16, 32, 6, 14), 1, ns.Window(3), True),
    "rows in strips": ((1, 3, 2, 3, 2, 300), 1, ns.Window((2, 3), border="zeros"), True),
    "global": ((2, 6, 4, 4, 4, 6), 2, ns.Window.everywhere((4, 6)), False),
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=["planar", "channels last"])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_two_steps(name, memory_format, monkeypatch):
    sizes, heads, window, offset = LAYERS[name]
    monkeypatch.setattr(projected, "SLICE", 2 * (2 * sizes[2] + sizes[3]) * torch.Size(sizes[4:]).numel())
    wide = layer_of(sizes, heads=heads, offset=offset)
    entries = [axis.table_size for axis in window.axes(len(sizes) - 4)]
    relative = [torch.randn(heads, n, sizes[2] // heads).double() for n in entries]
    bias = torch.randn(heads, *entries).double()
    found = []
    for dtype in (torch.float64, torch.float32):
        x, weight, extra, grad = (None if one is None else one.to(dtype) for one in wide)
        if x.ndim == 4:
            x, grad = (one.to(memory_format=memory_format) for one in (x, grad))
        tables = {"bias": bias.to(dtype), "relative": [one.to(dtype) for one in relative]}
        inputs = [one for one in (x, weight, extra, tables["bias"], *tables["relative"]) if one is not None]
        for one in inputs:
            one.requires_grad_()
        if dtype == torch.float64:
            y = in_two_steps(x, weight, extra, window, heads, sizes[2], **tables)
        else:
            y = at_once(x, weight, extra, window, heads=heads, width=sizes[2], **tables)
            assert y.is_contiguous(memory_format=memory_format if y.ndim == 4 else torch.contiguous_format)
        found.append([y, *torch.autograd.grad(y, inputs, grad)])
    for expected, one in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), expected, rtol=1e-4, atol=2e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    from test_contract import laid_out

    x, weight, offset, grad = (one.float() for one in layer_of((2, 5, 6, 9, 7, 11), heads=3, offset=True))
    expected = at_once(x, weight, offset, ns.Window(3), heads=3, width=6)
    apart = laid_out(x[:, None].movedim(2, -1), layout)[:, 0].movedim(-1, 1)
    assert torch.equal(apart, x)
    strange = weight.mT.flatten(1).t().contiguous().t().view_as(weight) if layout == "sliced" else weight
    found = at_once(apart, strange, offset.repeat_interleave(2)[::2], ns.Window(3), heads=3, width=6)
    assert torch.equal(found, expected)
    apart.requires_grad_()
    at_once(apart, weight, offset, ns.Window(3), heads=3, width=6).backward(grad)
    x.requires_grad_()
    at_once(x, weight, offset, ns.Window(3), heads=3, width=6).backward(grad)
    torch.testing.assert_close(apart.grad, x.grad)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_same_bits_for_any_number_of_threads(batch):
    """Which take sets of heads, and parts of a map, according to how many there are."""
    x, weight, offset, _ = (one.float() for one in layer_of((batch, 8, 16, 16, 61, 13), heads=8, offset=True))
    found = []
    for count in (1, 2, 5, 16):
        with threads(count):
            found.append(at_once(x, weight, offset, ns.Window(5), heads=8, width=16))
    assert all(torch.equal(one, found[0]) for one in found)


def test_more_heads_than_take_turns_at_a_time():
    x, weight, _, _ = layer_of((1, 4, 1024, 1024, 7, 80), heads=8, offset=False)
    found = at_once(x.float(), weight.float(), None, ns.Window(7), heads=8, width=1024)
    torch.testing.assert_close(
        found.double(), in_two_steps(x, weight, None, ns.Window(7), 8, 1024), rtol=1e-4, atol=1e-4
    )


def test_numbers_that_are_none_stay_where_they_are_seen():
    x, weight, _, _ = (
        one if one is None else one.float() for one in layer_of((2, 4, 4, 4, 9, 9), heads=2, offset=False)
    )
    x[0, 1, 4, 4], x[1, 2, 0, 8] = float("nan"), float("inf")
    found = at_once(x, weight, None, ns.Window(3), heads=2, width=4).isfinite().all(1)
    expected = torch.ones(2, 9, 9, dtype=torch.bool)
    expected[0, 3:6, 3:6] = expected[1, :2, 7:] = False
    assert torch.equal(found, expected)


# ------------------------------------------------------------------------------------------------------------- the layer


def watched(layer: nn.Module, x: Tensor, monkeypatch) -> tuple[Tensor, int]:
    """What a layer makes of x, and how often by the one operator."""
    calls = []
    operator = projected.project_and_attend_above_autograd
    monkeypatch.setattr(projected, "project_and_attend_above_autograd", lambda *a: calls.append(a) or operator(*a))
    y = layer(x)
    monkeypatch.setattr(projected, "project_and_attend_above_autograd", operator)
    return y, len(calls)


SERVED = {
    "2d": lambda: (ns.LocalSelfAttention2d(8, num_heads=2), (2, 8, 9, 9)),
    "2d with biases": lambda: (ns.LocalSelfAttention2d(8, 12, num_heads=2, qkv_bias=True, out_proj=True), (2, 8, 9, 9)),
    "1d": lambda: (ns.LocalSelfAttention1d(8, num_heads=2, position="bias"), (2, 8, 19)),
    "3d": lambda: (ns.LocalSelfAttention3d(8, kernel_size=3, num_heads=2, position="none"), (2, 8, 3, 4, 5)),
    "global": lambda: (ns.GlobalSelfAttention2d(8, num_heads=2, map_size=9), (2, 8, 9, 9)),
    "unbatched": lambda: (ns.LocalSelfAttention2d(8, num_heads=2, position="learned"), (8, 9, 9)),
    "named": lambda: (ns.LocalSelfAttention2d(8, num_heads=2, backend="native"), (2, 8, 9, 9)),
}
NOT_SERVED = {
    "few cells": lambda: (ns.LocalSelfAttention2d(82, num_heads=2), (2, 82, 9, 9)),
    "stride": lambda: (ns.LocalSelfAttention2d(8, num_heads=2, stride=2), (2, 8, 9, 9)),
    "turned": lambda: (ns.LocalSelfAttention2d(8, num_heads=2, position="rope"), (2, 8, 9, 9)),
    "bfloat16": lambda: (ns.LocalSelfAttention2d(8, num_heads=2).bfloat16(), (2, 8, 9, 9)),
    "float64": lambda: (ns.LocalSelfAttention2d(8, num_heads=2).double(), (2, 8, 9, 9)),
    "another backend": lambda: (ns.LocalSelfAttention2d(8, num_heads=2, backend="blocked"), (2, 8, 9, 9)),
    "no image": lambda: (ns.LocalSelfAttention2d(8, num_heads=2), (0, 8, 9, 9)),
    "q.r alone": lambda: (ns.models.blocks.RelativeOnlySelfAttention2d(8, num_heads=2), (2, 8, 9, 9)),
}


@pytest.mark.parametrize("name", [*SERVED, *NOT_SERVED])
def test_where_it_serves(name, monkeypatch):
    torch.manual_seed(0)
    layer, shape = {**SERVED, **NOT_SERVED}[name]()
    x = torch.randn(shape, dtype=next(layer.parameters()).dtype)
    with torch.no_grad():
        y, calls = watched(layer, x, monkeypatch)
        assert calls == (name in SERVED)
        monkeypatch.setattr(projected, "serves", lambda *_: False)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_training_keeps_queries_where_that_is_faster_and_not_forbidden(monkeypatch):
    x = torch.randn(2, 8, 9, 9)
    for frugal in (False, True):
        layer = ns.LocalSelfAttention2d(8, num_heads=2, recompute_qkv=frugal)
        assert watched(layer, x, monkeypatch)[1] == frugal
        layer.requires_grad_(False)
        assert watched(layer, x, monkeypatch)[1] == 1
    monkeypatch.setattr(projected, "MANY", 2 * 24 * 81)
    assert watched(ns.LocalSelfAttention2d(8, num_heads=2), x, monkeypatch)[1] == 1


class Mine(nn.Conv2d):
    pass


PRIVATE = {  # what is done to the projection, after which it has to be called
    "a hook before": lambda qkv: qkv.register_forward_pre_hook(lambda *_: None),
    "a hook behind": lambda qkv: qkv.register_forward_hook(lambda *_: None),
    "a hook of the backward": lambda qkv: qkv.register_full_backward_hook(lambda *_: None),
    "a hook before the backward": lambda qkv: qkv.register_full_backward_pre_hook(lambda *_: None),
    "a hook of all modules": lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "a backward hook of all": lambda _: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    "another forward": lambda qkv: setattr(qkv, "forward", qkv.forward),
    "another way to convolve": lambda qkv: setattr(qkv, "_conv_forward", qkv._conv_forward),
    "spectral norm": lambda qkv: nn.utils.parametrizations.spectral_norm(qkv),
    "pruning": lambda qkv: prune.l1_unstructured(qkv, "weight", amount=0.5),
    "compiled by itself": lambda qkv: qkv.compile(backend="eager"),
    "a class of its own": lambda qkv: setattr(qkv, "__class__", Mine),
}


@pytest.mark.parametrize("change", PRIVATE.values(), ids=PRIVATE)
def test_a_projection_that_is_more_than_its_weight_is_called(change, monkeypatch):
    torch.manual_seed(0)
    layer, x = ns.LocalSelfAttention2d(8, num_heads=2, recompute_qkv=True), torch.randn(2, 8, 9, 9)
    assert watched(layer, x, monkeypatch)[1] == 1
    handle = change(layer.qkv)
    try:
        assert watched(layer, x, monkeypatch)[1] == 0
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


def test_autocast_transforms_and_traces_see_two_steps(monkeypatch):
    layer, x = ns.LocalSelfAttention2d(8, num_heads=2).requires_grad_(False), torch.randn(2, 8, 9, 9)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert watched(layer, x, monkeypatch)[1] == 0
    for seen in (
        lambda x: torch.func.vmap(layer)(x),
        lambda x: torch.func.jvp(layer, (x,), (x,))[0],
        lambda x: torch.jit.trace(layer, x, check_trace=False)(x),
        lambda x: torch.compile(layer, backend="eager")(x),
    ):
        found, calls = watched(seen, x, monkeypatch)
        assert calls == 0
        torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)


def test_weights_put_in_its_place_for_one_call():
    layer, x = ns.LocalSelfAttention2d(8, num_heads=2).requires_grad_(False), torch.randn(2, 8, 9, 9)
    other = ns.LocalSelfAttention2d(8, num_heads=2)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(layer, dict(other.named_parameters()), x), other(x))


# ----------------------------------------------------------------------------------------------------------- the backward


def trained(layer, x, grad, **options):
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad, **options)


def frugal(**options) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = ns.LocalSelfAttention2d(8, num_heads=2, kernel_size=3, recompute_qkv=True, **options)
    return layer, torch.randn(2, 8, 9, 9).requires_grad_(), torch.randn(2, 8, 9, 9)


def test_only_input_output_and_log_sum_exp_are_kept():
    layer, x, _ = frugal(position="none")
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.shape}) or t, lambda t: t):
        y = layer(x)
    assert sorted(kept.values()) == sorted([x.shape, layer.qkv.weight.shape, y.shape, (2, 2, 9, 9)])


def test_autocast_around_the_backward_changes_nothing():
    layer, x, grad = frugal(qkv_bias=True)
    expected = trained(layer, x, grad)
    for again in (False, True):
        y = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = torch.autograd.grad(y, [x, *layer.parameters()], grad, create_graph=again)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_each_gradient_alone():
    layer, x, grad = frugal(qkv_bias=True)
    inputs = [x, *layer.parameters()]
    every = torch.autograd.grad(layer(x), inputs, grad)
    for one, expected in zip(inputs, every, strict=True):
        for other in inputs:
            other.requires_grad_(other is one)
        (found,) = torch.autograd.grad(layer(x), [one], grad)
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_gradient(monkeypatch):
    layer, x, grad = frugal(qkv_bias=True)
    found = []
    for once in (True, False):
        monkeypatch.setattr(projected, "serves", lambda *_, once=once: once)
        first = trained(layer, x, grad, create_graph=True)
        total = sum(one.square().sum() for one in first)
        found.append([*first, *torch.autograd.grad(total, [x, *layer.parameters()])])
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("what", ["the input", "the output", "the weight"])
def test_what_was_changed_in_place_is_an_error(what):
    layer, x, _ = frugal()
    x = x.detach().clone().requires_grad_()
    twice = x * 2
    y = layer(twice)
    with torch.no_grad():
        {"the input": twice, "the output": y, "the weight": layer.qkv.weight}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_through_checkpoints_twice_and_by_the_tables_alone():
    layer, x, grad = frugal()
    expected = trained(layer, x, grad)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(grad)
        for one, other in zip((x, *layer.parameters()), expected, strict=True):
            torch.testing.assert_close(one.grad, other)
            one.grad = None
    y = layer(x)
    for _ in range(2):
        again = torch.autograd.grad(y, [x], grad, retain_graph=True)
    assert torch.equal(again[0], expected[0])


# ------------------------------------------------------------------------------------- the operators, which anyone may call


def sample(grad: bool = True) -> list:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(2, 5, 7, 6), torch.randn(21, 5, 1, 1), torch.randn(21)
    bias, relative = torch.randn(3, 3, 3), [torch.randn(3, 3, 2), torch.randn(3, 3, 2)]
    for one in (x, weight, offset, bias, *relative):
        one.requires_grad_(grad)
    return [x, weight, offset, bias, relative, 3, 6, True, [3, 3], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0], 0.5, 0]


def test_operators():
    """torch's own checks: schema, autograd registration, fake tensors, AOT dispatch with symbolic sizes."""
    torch.library.opcheck(projected.project_and_attend, sample())
    arguments = sample(grad=False)
    out, lse = projected.project_and_attend(*arguments)
    layer, geometry = arguments[:7], arguments[8:]
    torch.library.opcheck(
        projected.project_and_attend_backward, (torch.randn_like(out), *layer, out, lse, [True] * 5, *geometry)
    )


LIES = {
    "input of half precision": (0, lambda x: x.bfloat16(), DtypeError),
    "input without an axis": (0, lambda x: x[0], ShapeError),
    "input of other channels": (0, lambda x: x[:, 1:], ShapeError),
    "no cells": (0, lambda x: x[..., :0], ShapeError),
    "weight of double precision": (1, lambda w: w.double(), DtypeError),
    "weight of a larger kernel": (1, lambda w: w.expand(-1, -1, 3, 3), ShapeError),
    "a row too few": (1, lambda w: w[1:], ShapeError),
    "offset too short": (2, lambda one: one[1:], ShapeError),
    "bias of other entries": (3, lambda one: one[:, 1:], ShapeError),
    "one table": (4, lambda tables: tables[:1], ShapeError),
    "no heads": (5, lambda _: 0, ShapeError),
    "heads that do not divide": (5, lambda _: 4, ShapeError),
    "all rows are queries' and keys'": (6, lambda _: 12, ShapeError),
    "a stride": (9, lambda _: [2, 1], (ShapeError, BackendError)),
    "an unknown border": (13, lambda _: [0, 9], OptionError),
}


@pytest.mark.parametrize("name", LIES)
def test_operators_check_what_anyone_may_call_them_with(name):
    place, change, error = LIES[name]
    arguments = sample(grad=False)
    out, lse = projected.project_and_attend(*arguments)
    arguments[place] = change(arguments[place])
    with pytest.raises(error):
        projected.project_and_attend(*arguments)
    with pytest.raises(error):
        projected.project_and_attend_backward(out, *arguments[:7], out, lse, [True] * 5, *arguments[8:])


@pytest.mark.parametrize("place", [0, 8, 9])
def test_results_of_another_size_are_refused(place):
    arguments = sample(grad=False)
    out, lse = projected.project_and_attend(*arguments)
    backward = [out, *arguments[:7], out, lse, [True] * 5, *arguments[8:]]
    backward[place] = backward[place][..., 1:]
    with pytest.raises(ShapeError):
        projected.project_and_attend_backward(*backward)
    backward = [out, *arguments[:7], out, lse, [True] * 4, *arguments[8:]]
    with pytest.raises(OptionError):
        projected.project_and_attend_backward(*backward)
