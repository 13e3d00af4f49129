# SPDX-License-Identifier: Apache-2.0
"""FlexAttention's logic on the CPU, and what is left out: a graphics card's own kernels, in test_gpu.py.

PyTorch runs its forward here. Its backward exists for tensors of every device but is refused on the CPU by one check of the
device, which the gradient tests lift.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Contestant
from test_contract import NAMED, check_gradients, check_values, each_named, named, tensors_of

import nearsight as ns
from nearsight.attention import flex
from nearsight.attention.problem import describe
from nearsight.errors import BackendError

FLEX = Contestant(flex, None)


def why_not(case) -> str | None:
    _, inputs, arguments = tensors_of(case)
    return FLEX.why_not(*inputs[:3], case.window, **arguments)


@each_named()
def test_values(name, dtype, monkeypatch):
    from torch.nn.attention import flex_attention

    # Written out as it stands: PyTorch would trace the same anew for every case.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
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
)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name, backward_on_the_cpu):
    """By query, key, value, bias and relative tables; in float64, so that nothing hides in rounding."""
    check_gradients(FLEX.attend, NAMED[name])


def test_gradients_in_half_precision(backward_on_the_cpu):
    check_gradients(FLEX.attend, named("both tables", torch.bfloat16))


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


def test_geometry_is_worked_out_once_per_problem():
    q = torch.randn(1, 2, 9, 11, 4)
    flex._plan.cache_clear()
    for batch in (1, 2, 3):
        x = q.expand(batch, -1, -1, -1, -1)
        ns.local_attention(x, x, x, ns.Window(3), backend="flex")
    assert (flex._plan.cache_info().misses, flex._plan.cache_info().hits) == (1, 2)
    ns.local_attention(q, q, q, ns.Window(3, border="shift"), backend="flex")
    assert flex._plan.cache_info().misses == 2


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((19, 23), ns.Window(5)),
        ((41, 23), ns.Window(5, stride=(2, 1), dilation=3, border="shift")),
        ((19, 23), ns.Window((3, 5), dilation=(2, 1), border="zeros", causal=(True, False))),
        ((7, 6, 9), ns.Window(3, border="wrap")),
    ],
)
def test_blocks_without_a_pair_are_skipped_and_no_other(size, window):
    """Held to PyTorch's own search through every pair."""
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = flex._plan(window.axes(len(size)), size, torch.device("cpu")).blocks
    queries, cells = blocks.seq_lengths
    searched = create_block_mask(blocks.mask_mod, None, None, queries, cells, "cpu", flex.BLOCK)
    held = searched.to_dense()
    assert torch.equal(blocks.to_dense(), held)
    assert 0 < held.sum() < held.numel(), "a case in which nothing is skipped shows nothing"


@pytest.mark.slow
def test_compiled_kernel(monkeypatch):
    """What runs on a graphics card, compiled for the CPU: tables included.

    The log-sum-exp is not: PyTorch compiles it for graphics cards alone.
    """
    case = named("shift larger than a phase", torch.float32)
    _, inputs, arguments = tensors_of(case)
    tables = arguments["bias"], arguments["relative"]
    problem = describe(*inputs[:3], case.window, *tables)
    wanted = ns.local_attention(*inputs[:3], case.window, **arguments, backend="reference")
    compiled, runs = flex._compiled(replace(problem, batch=1), torch.device("cpu")), []
    monkeypatch.setattr(flex, "_flex", lambda *given: (runs.append(given[0].shape[0]), compiled(*given))[1])
    found = ns.local_attention(*inputs[:3], case.window, **arguments, backend="flex")
    torch.testing.assert_close(found, wanted)
    assert runs == [case.batch]
