# SPDX-License-Identifier: Apache-2.0
"""A query that sees no key: zeros, a log-sum-exp of -inf and gradients of zero, on every backend and all built on it."""

from __future__ import annotations

import pytest
import torch
from conftest import ALL, Contestant, every_backend
from torch import Tensor

import nearsight as ns
from nearsight.attention import flex
from nearsight.attention.softmax import softmax
from nearsight.compat.natten.functional import na2d_av, na2d_qk
from nearsight.compat.natten.modules import NeighborhoodAttention2D

INF = float("inf")
FLEX = Contestant(flex)  # its forward runs on the CPU
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _flex_as_it_stands(monkeypatch):
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def maps(*size: int, heads: int = 2, dtype: torch.dtype = torch.float64, grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, heads, *size, 8, dtype=dtype).requires_grad_(grad) for _ in range(3)]


def takes(contestant: Contestant, inputs, window, *, lse: bool, **tables) -> bool:
    problem = ns.attention.problem.describe(*inputs, window, tables.get("bias"), tables.get("relative"), lse=lse)
    return contestant.backend.why_not(problem) is None


@DTYPES
@every_backend((*ALL, FLEX))
def test_a_head_that_is_shut_out(contestant, dtype):
    """Of two heads one has a bias of -inf everywhere; the other is as it would be alone."""
    differentiable, ran = contestant is not FLEX, 0
    for window in (
        ns.Window(3, border="zeros"),
        ns.Window((3, 5), border="shift", dilation=2),
        ns.Window.everywhere((5, 7)),
    ):
        inputs = maps(5, 7, dtype=dtype, grad=differentiable)
        entries = window.table_size(2)
        bias = torch.randn(2, *entries, dtype=dtype)
        bias[0] = -INF
        tables = [bias, *(torch.randn(2, n, 8, dtype=dtype) for n in entries)]
        tables = [one.requires_grad_(differentiable) for one in tables]
        options = {"bias": tables[0], "relative": tables[1:]}
        lse = contestant.backend.name != "dense"
        if not takes(contestant, inputs, window, lse=lse, **options):
            continue
        ran += 1
        found = contestant.attend(*inputs, window, **options, return_lse=lse)
        out, *scalars = found if lse else (found,)
        assert not out[:, 0].any()
        assert not lse or (scalars[0][:, 0] == -INF).all()
        second = [one[:, 1:] for one in inputs]
        own = {"bias": tables[0][1:], "relative": [one[1:] for one in tables[1:]]}
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(out[:, 1:], ns.local_attention(*second, window, **own, backend="reference"), **close)
        if not differentiable:
            continue
        incoming = [torch.randn_like(out), *(torch.randn_like(one) for one in scalars)]
        for head, gradient in enumerate(torch.autograd.grad((out, *scalars), (*inputs, *tables), incoming)):
            shut, seeing = gradient.transpose(0, 1) if head < 3 else gradient
            assert not shut.any()
            assert seeing.isfinite().all()
            assert seeing.any()
    assert ran or dtype == torch.float64  # which two backends do not take


@DTYPES
@every_backend([one for one in (*ALL, FLEX) if one.backend.name != "dense"])
def test_strictly_causal(contestant, dtype):
    """The first query sees nothing; each other one what a causal window that is shorter by one sees one cell before it."""
    query, key, value = inputs = maps(9, dtype=dtype, grad=contestant is not FLEX)
    bias = torch.zeros(2, 4, dtype=dtype)
    bias[:, -1] = -INF  # the query's own cell
    if not takes(contestant, inputs, ns.Window(4, causal=True), lse=True, bias=bias):
        return
    out, lse = contestant.attend(*inputs, ns.Window(4, causal=True), bias=bias, return_lse=True)
    shifted = query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]
    wanted, wanted_lse = ns.local_attention(*shifted, ns.Window(3, causal=True), return_lse=True, backend="reference")
    assert not out[:, :, 0].any()
    assert (lse[:, :, 0] == -INF).all()
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out[:, :, 1:], wanted, **close)
    torch.testing.assert_close(lse[:, :, 1:], wanted_lse, **close)
    if contestant is FLEX:
        return
    grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    found = torch.autograd.grad((out, lse), inputs, (grad, grad_lse))
    expected = torch.autograd.grad((wanted, wanted_lse), inputs, (grad[:, :, 1:], grad_lse[:, :, 1:]))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **close)
    assert not found[0][:, :, 0].any()


@every_backend([one for one in ALL if one.backend.name != "dense"])
def test_a_bias_of_cells_that_are_hidden_anyway(contestant):
    """Those of a shared window that lie behind the query: that theirs is finite lets nobody see."""
    inputs = maps(8, dtype=torch.float32, grad=True)
    bias = torch.zeros(2, 5)
    bias[:, :3] = -INF  # the query's own cell and those before it
    out, lse = contestant.attend(*inputs, ns.Window(3, causal=True, shared_by=2), bias=bias, return_lse=True)
    assert not out.any()
    assert (lse == -INF).all()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), inputs))


@every_backend([one for one in ALL if one.backend.name != "dense"])
def test_registers_join_a_query_that_sees_nothing_else(contestant):
    inputs = maps(9, dtype=torch.float32, grad=True)
    bias = torch.full((2, 3), -INF)
    near = contestant.attend(*inputs, ns.Window(3), bias=bias, return_lse=True)
    keys, values = torch.randn(2, 2, 4, 8).requires_grad_()
    scores = torch.einsum("bnld, nrd -> bnlr", inputs[0], keys)
    registers = torch.einsum("bnlr, nrd -> bnld", scores.softmax(-1), values), scores.logsumexp(-1)
    for one, other in zip(ns.merge_attentions(*zip(near, registers, strict=True)), registers, strict=True):
        torch.testing.assert_close(one, other)
        found = torch.autograd.grad(one.sum(), inputs, retain_graph=True, materialize_grads=True)
        expected = torch.autograd.grad(other.sum(), inputs[0], retain_graph=True)
        torch.testing.assert_close(found[0], *expected)
        assert not any(gradient.any() for gradient in found[1:])


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_derivatives_of_every_order(backend):
    """Second ones through values and log-sum-exp, forward mode, and under vmap: numbers, and zero where nothing is seen."""
    query, key, value = maps(5, grad=True)
    bias = torch.tensor([[0.0, 0.0, -INF], [-INF] * 3], dtype=torch.float64, requires_grad=True)

    def attend(*tensors: Tensor) -> Tensor:
        *qkv, table = tensors
        out, lse = ns.local_attention(*qkv, ns.Window(3, causal=True), bias=table, return_lse=True, backend=backend)
        return out.sum(-1) + lse.masked_fill(lse == -INF, 0)

    inputs = (query, key, value, bias)
    first = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs)
    assert all(one.isfinite().all() for one in (*first, *second))
    for gradient in (*first[:3], *second[:3]):
        assert not gradient[:, 1].any()
        assert gradient[:, 0].any()
    tangents = tuple(torch.ones_like(one) for one in inputs)
    _, moved = torch.func.jvp(attend, inputs, tangents)
    assert moved.isfinite().all()
    assert not moved[:, 1].any()
    mapped = torch.func.vmap(attend, (None, None, None, 0))(query, key, value, torch.stack([bias, bias]))
    torch.testing.assert_close(mapped[1], attend(*inputs))


def test_weights():
    """Of all queries and of some alone: zeros, not shares of nothing."""
    query, key, _ = maps(5, 7)
    bias = torch.zeros(2, 3, 3)
    bias[0] = -INF
    weights = ns.attention_weights(query, key, ns.Window(3), bias=bias)
    assert not weights[:, 0].any()
    torch.testing.assert_close(weights[:, 1].sum((-1, -2)), torch.ones(2, 5, 7, dtype=torch.float64))
    layer = ns.LocalSelfAttention2d(16, kernel_size=3, num_heads=2, position="bias")
    with torch.no_grad():
        layer.position.table[0] = -INF  # pyright: ignore[reportIndexIssue]
    x = torch.randn(1, 16, 5, 7)
    some = layer.attention_weights(x, torch.tensor([[0, 0], [3, 4]]))
    assert not some[:, 0].any()
    torch.testing.assert_close(some[:, 1].sum((-1, -2)), torch.ones(1, 2))
    out = layer(x)
    out.sum().backward()
    assert not out[:, :8].any()
    assert all(one.grad.isfinite().all() for one in layer.parameters() if one.grad is not None)


def test_in_two_calls():
    """NATTEN's split calls, and the module that makes them where weights are dropped out."""
    query, key, value = maps(4, 5, grad=True)
    rpb = torch.zeros(2, 5, 5, dtype=torch.float64)
    rpb[0] = -INF
    rpb.requires_grad_()
    weights = softmax(na2d_qk(query, key, 3, rpb=rpb))
    out = na2d_av(weights, value, 3)
    assert not out[:, 0].any()
    torch.testing.assert_close(
        out[:, 1], ns.local_attention(query, key, value, ns.Window(3, border="shift"), scale=1)[:, 1]
    )
    inputs = (query, key, value, rpb)
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(one.square().sum() for one in first), inputs)
    assert all(one.isfinite().all() for one in (*first, *second))
    assert not any(one[:, 0].any() for one in (*first[:3], *second[:3]))
    module = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True, attn_drop=0.5)
    with torch.no_grad():
        module.rpb.fill_(-INF)
    x = torch.randn(1, 4, 5, 16)
    torch.testing.assert_close(module.train()(x), module.proj.bias.expand(x.shape))
    torch.testing.assert_close(module.eval()(x), module.proj.bias.expand(x.shape))


@every_backend(ALL)
def test_the_most_negative_number_hides_nothing_by_itself(contestant):
    """Masks are written with it too. Where all places have it they weigh alike: it is not minus infinity."""
    for window in (ns.Window(3), ns.Window.everywhere((5, 7))):
        inputs = maps(5, 7, dtype=torch.float32)
        bias = torch.full((2, *window.table_size(2)), torch.finfo(torch.float32).min)
        if takes(contestant, inputs, window, lse=False, bias=bias):
            out = contestant.attend(*inputs, window, bias=bias)
            mean = ns.local_attention(0 * inputs[0], *inputs[1:], window, backend="reference")
            torch.testing.assert_close(out, mean, rtol=1e-4, atol=1e-5)
