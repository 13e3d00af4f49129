# SPDX-License-Identifier: Apache-2.0
"""FlexAttention's logic on the CPU, and what is left out: a graphics card's own kernels, in test_gpu.py.

PyTorch runs its forward here. Its backward exists for tensors of every device but is refused on the CPU by one check of the
device, which the gradient tests lift.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import Contestant
from test_contract import NAMED, check_gradients, check_values, each_named, named, tensors_of

import nearsight as ns
from nearsight.attention import flex
from nearsight.attention.problem import describe
from nearsight.errors import BackendError

FLEX = Contestant(flex, None)


@pytest.fixture
def written_out(monkeypatch):
    """As it stands: PyTorch would trace the same anew for every case. Its gradients are right of what it traces alone."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def why_not(case) -> str | None:
    _, inputs, arguments = tensors_of(case)
    return FLEX.why_not(*inputs[:3], case.window, **arguments)


@each_named()
def test_values(name, dtype, written_out):
    case = named(name, dtype)
    if dtype == torch.float64:
        assert why_not(case) == "FlexAttention takes float32, bfloat16 and float16; the tensors are torch.float64"
    else:
        assert why_not(case) is None
        check_values(FLEX.attend, case)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_refused():
    q = torch.randn(1, 2, 5, 7, 4, requires_grad=True)
    with pytest.raises(BackendError, match="FlexAttention has no backward on the CPU"):
        ns.local_attention(q, q, q, ns.Window(3), backend="flex")


@pytest.fixture
def backward_on_the_cpu(monkeypatch):
    from torch.nn.attention import flex_attention

    refuses = flex.why_not
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "DTYPES", (torch.float64, *flex.DTYPES))
    monkeypatch.setattr(flex, "why_not", lambda problem: refuses(replace(problem, needs_grad=False)))


GRADIENTS = (
    "line",
    "volume",
    "even",
    "dilation and stride",
    "causal rows",
    "zeros even dilated",
    "shift dilated strided",
    "wrap dilated causal",
    "value narrower",
    "shared",
    "shared causal wrap",
    "zeros and shift",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.sweep] * (name in ("even", "shift dilated strided", "value narrower")))
        for name in GRADIENTS
    ],
)
def test_gradients(name, backward_on_the_cpu):
    """By query, key, value, bias and relative tables; in float64, so that nothing hides in rounding."""
    check_gradients(FLEX.attend, NAMED[name])


IN_DTYPES = product(("both tables", "shared halos", "mask and wrap"), flex.DTYPES)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [  # each dtype and each case, and all pairs in the sweeps
        pytest.param(*pair, id=f"{pair[0]}-{pair[1]}", marks=[] if place % 4 == 0 else pytest.mark.sweep)
        for place, pair in enumerate(IN_DTYPES)
    ],
)
def test_gradients_in_every_dtype(name, dtype, backward_on_the_cpu):
    check_gradients(FLEX.attend, named(name, dtype))


def test_rotary_layer_has_the_gradients_of_blocked(backward_on_the_cpu):
    layers = [
        ns.LocalSelfAttention2d(16, kernel_size=3, num_heads=2, position="rope", backend=backend).double()
        for backend in ("flex", "blocked")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x, found = torch.randn(1, 16, 5, 7, dtype=torch.float64), []
    for layer in layers:
        y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), layer.parameters())])
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------------------ what is prepared


def test_geometry_is_worked_out_once_per_problem(written_out):
    q = torch.randn(1, 2, 9, 11, 4)
    flex._plan.cache_clear()
    for batch in (1, 2, 3):
        x = q.expand(batch, -1, -1, -1, -1)
        ns.local_attention(x, x, x, ns.Window(3), backend="flex")
    assert (flex._plan.cache_info().misses, flex._plan.cache_info().hits) == (1, 2)
    ns.local_attention(q, q, q, ns.Window(3, border="shift"), backend="flex")
    assert flex._plan.cache_info().misses == 2


def test_a_kernel_serves_every_size():
    """What it is compiled for holds no size of batch or map, and all else."""

    def kind(batch: int, *size: int, kernel_size: int = 3, channels: int = 4) -> tuple:
        q = torch.empty(batch, 2, *size, channels)
        return flex._kind(describe(q, q, q, ns.Window(kernel_size), None, None))

    assert kind(1, 9, 11) == kind(3, 200, 7)
    different = [kind(1, 9, 11), kind(1, 9, 11, kernel_size=5), kind(1, 9, 11, channels=8), kind(1, 9)]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((19, 23), ns.Window(5)),
        ((41, 23), ns.Window(5, stride=(2, 1), dilation=3, border="shift")),
        ((19, 23), ns.Window((3, 5), dilation=(2, 1), border="zeros", causal=(True, False))),
        ((7, 6, 9), ns.Window(3, border="wrap")),
        ((37, 23), ns.Window((8, 3), shared_by=(4, 2), stride=(1, 2), border=("wrap", "mask"))),
        ((900,), ns.Window(7, shared_by=3, dilation=5, causal=True)),
    ],
)
def test_blocks_without_a_pair_are_skipped_and_no_other(size, window, monkeypatch):
    """Held to PyTorch's own search through every pair; from both sides, and in several parts."""
    from torch.nn.attention.flex_attention import create_block_mask

    monkeypatch.setattr(flex, "PAIRS_AT_ONCE", 1000)
    plan = flex._plan.__wrapped__(window.axes(len(size)), size, torch.device("cpu"))
    queries, cells = plan.lines[0].first.numel(), plan.lines[0].place.numel()
    searched = create_block_mask(flex._mask(plan.lines), None, None, queries, cells, "cpu", flex.BLOCK)
    sides = [(plan.cells, searched.kv_num_blocks, searched.kv_indices)]
    sides += [(plan.queries, searched.q_num_blocks, searched.q_indices)]
    for blocks, count, which in sides:
        assert torch.equal(blocks.count, count[0, 0])
        assert blocks.which.shape == which.shape[2:]
        for mine, theirs, held in zip(blocks.which, which[0, 0], blocks.count, strict=True):
            assert torch.equal(mine[:held], theirs[:held])
        assert 0 < blocks.count.sum() < blocks.which.numel(), "a case in which nothing is skipped shows nothing"


def test_planning_does_not_grow_with_the_square_of_the_map(monkeypatch):
    """Twice the map, twice the pairs that are looked at."""
    looked_at, real = [], torch.Tensor.unique
    monkeypatch.setattr(torch.Tensor, "unique", lambda one: (looked_at.append(one.numel()), real(one))[1])
    for rows in (32, 64):
        flex._held(ns.Window(5).axes(2), (rows, 64), torch.device("cpu"))
    first, last = looked_at[0], looked_at[2]
    assert 1.8 * first < last < 2.2 * first


# ----------------------------------------------------------------------------------------------------------- torch.compile


def networks(**arguments) -> list[torch.nn.Module]:
    """One that computes by flex and one by the reference, with the same weights."""
    torch.manual_seed(0)
    both = [
        torch.nn.Sequential(
            ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, backend=backend, **arguments),
            torch.nn.ReLU(),
            ns.LocalSelfAttention2d(8, 12, kernel_size=4, num_heads=2, stride=2, position="bias", backend=backend),
        )
        for backend in ("flex", "reference")
    ]
    both[1].load_state_dict(both[0].state_dict())
    return both


@pytest.fixture
def traced_on_the_cpu(monkeypatch):
    refuses = flex.why_not
    monkeypatch.setattr(flex, "why_not", lambda problem: refuses(replace(problem, compiling=False)))


def test_compiling_for_the_cpu_is_refused():
    layer = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, backend="flex")
    with torch.no_grad(), pytest.raises(Exception, match="compiler for the CPU fails on FlexAttention"):
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(1, 8, 5, 7))


@pytest.mark.slow
def test_compiled_network_takes_every_size(traced_on_the_cpu):
    """In one program, as it is traced for a graphics card, without a break."""
    from torch._dynamo.testing import CompileCounterWithBackend

    ours, wanted = networks(shared_by=2, border=("wrap", "mask"))
    programs = CompileCounterWithBackend("eager")
    compiled = torch.compile(ours, dynamic=True, fullgraph=True, backend=programs)
    with torch.no_grad():
        for batch, height, width in ((2, 16, 20), (3, 24, 17)):
            x = torch.randn(batch, 8, height, width)
            torch.testing.assert_close(compiled(x), wanted(x))
    assert programs.frame_count == 1


@pytest.mark.sweep
def test_compiled_network_has_the_gradients(backward_on_the_cpu, traced_on_the_cpu):
    """Through AOTAutograd, which makes the backward of a compiled network on every device."""
    ours, wanted = networks()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, found = torch.randn(2, 8, 9, 14), []
    for network in (compiled, wanted):
        y = network(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), network.parameters())])
    torch.testing.assert_close(*found)


def kernel_on(batch: int, cells: int, window: ns.Window, tables: dict) -> list[torch.Tensor]:
    """What the compiled kernel computes of a line, and what the reference does."""
    heads, _, channels = tables["relative"][0].shape
    q, k, v = torch.randn(3, batch, heads, cells, channels)
    problem = describe(q, k, v, window, tables["bias"], tables["relative"])
    asked = flex.Asked(problem.table_size, channels**-0.5, False, False)
    plan = flex._plan(problem.axes, problem.in_size, q.device)
    with torch.no_grad():
        found, _ = flex._compiled(flex._kind(problem), asked)(q, k, v, *tables.values(), plan, asked)
    return [found, ns.local_attention(q, k, v, window, **tables, backend="reference")]


def tables_of(case) -> dict:
    arguments = tensors_of(case)[2]
    return {name: arguments[name] for name in ("bias", "relative")}


@pytest.mark.sweep
def test_compiled_kernel():
    """What runs on a graphics card, compiled for the CPU: tables included.

    The log-sum-exp and open sizes are not: PyTorch compiles them for graphics cards alone.
    """
    case = named("shift larger than a phase", torch.float32)
    torch.testing.assert_close(*kernel_on(2, 9, case.window, tables_of(case)))


@pytest.mark.slow
def test_a_kernel_is_compiled_for_one_size_and_for_all_others(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    programs, compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=programs))
    case = named("shift larger than a phase", torch.float32)
    flex._compiled.cache_clear()
    try:
        for batch, cells in ((2, 9), (3, 200), (5, 131), (4, 300)):
            torch.testing.assert_close(*kernel_on(batch, cells, case.window, tables_of(case)))
    finally:
        flex._compiled.cache_clear()
    assert programs.frame_count <= 3
