# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives: those of the equation in float64, whatever backend there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nearsight as ns
from nearsight.attention import any_order, native
from nearsight.compat.natten import functional

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
COVER = ns.Window.everywhere((4, 5))
CASES = {  # backend, map, window, and what is given or asked for besides
    "native": ("native", (5, 6), ns.Window(3), ()),
    "native, one tensor for all": ("native", (5, 6), ns.Window(3, border="zeros"), ("same",)),
    "native, tables": ("native", (5, 6), ns.Window(3, dilation=2, border="shift"), ("bias", "relative")),
    "native, log-sum-exp": ("native", (9,), ns.Window(3, causal=True), ("bias", "lse")),
    "native, fewer heads of keys": ("native", (9,), ns.Window(4, stride=2), ("groups",)),
    "dense": ("dense", (4, 5), COVER, ()),
    "dense, one tensor for all": ("dense", (4, 5), COVER, ("same",)),
    "dense, tables": ("dense", (4, 5), COVER, ("bias", "relative", "groups")),
    "chosen": (None, (4, 5), COVER, ()),
}


def inputs_of(name: str) -> dict[str, Tensor]:
    _, size, window, more = CASES[name]
    keys = 2 if "groups" in more else 4
    # Halves: a third derivative of large logits multiplies roundings by thousands.
    found = {"query": 0.5 * torch.randn(2, 4, *window.output_size(size), 16)}
    if "same" not in more:
        found |= {"key": 0.5 * torch.randn(2, keys, *size, 16), "value": torch.randn(2, keys, *size, 8)}
    entries = window.table_size(len(size))
    if "bias" in more:
        found["bias"] = torch.randn(4, *entries)
    if "relative" in more:
        found |= {f"relative {axis}": 0.5 * torch.randn(4, one, 16) for axis, one in enumerate(entries)}
    return found


def loss(name: str, inputs: dict[str, Tensor], backend: str | None) -> Tensor:
    _, _, window, more = CASES[name]
    query = inputs["query"]
    maps = [inputs.get(part, query) for part in ("query", "key", "value")]
    relative = [tensor for part, tensor in inputs.items() if part.startswith("relative")]
    tables = {"bias": inputs.get("bias"), "relative": relative or None}
    found = ns.local_attention(*maps, window, **tables, return_lse="lse" in more, backend=backend)  # type: ignore
    return sum(((one.double() * (1 + one.double())).sin().sum() for one in (found if "lse" in more else [found])), 0.0)


def derivatives(name: str, dtype: torch.dtype, backend: str | None) -> list[Tensor]:
    """The first three of the loss, each of a sum over the one before."""
    inputs = {part: tensor.to(dtype).requires_grad_() for part, tensor in inputs_of(name).items()}
    total, found = loss(name, inputs, backend), []
    for _ in range(3):
        grads = torch.autograd.grad(total, list(inputs.values()), create_graph=True)
        found += [grad.detach() for grad in grads]
        total = sum((grad.double().square().sum() for grad in grads), torch.zeros(()))
    return found


@needs_native
@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_derivatives(name):
    torch.manual_seed(1)
    found = derivatives(name, torch.float32, CASES[name][0])
    torch.manual_seed(1)
    expected = derivatives(name, torch.float64, "reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@needs_native
@pytest.mark.parametrize("name", ["native, one tensor for all", "dense, one tensor for all"])
def test_derivatives_of_derivatives_of_a_function(name):
    """torch.func's, in which every first derivative is one that may be differentiated again."""
    query = inputs_of(name)["query"][:1, :1]

    def second(function):
        return torch.func.grad(lambda x: torch.func.grad(function)(x).sin().sum())

    found = second(lambda x: loss(name, {"query": x}, CASES[name][0]).float())(query)
    expected = second(lambda x: loss(name, {"query": x}, "reference"))(query.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@needs_native
def test_the_first_derivative_is_the_kernels_own():
    """Whether it can be differentiated again or not: to the bit."""
    inputs = [tensor.requires_grad_() for tensor in inputs_of("native").values()]
    out = ns.local_attention(*inputs, ns.Window(3), backend="native")
    once = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    assert all(map(torch.equal, once, again))


@needs_native
def test_a_gradient_penalty_through_natten_and_a_layer():
    """What trains discriminators: the norm of a gradient is minimised."""
    layer, x = ns.LocalSelfAttention2d(8, 8, 3, num_heads=2), torch.randn(1, 8, 6, 5)

    def penalty(dtype: torch.dtype) -> list[Tensor]:
        given = x.to(dtype).requires_grad_()
        maps = layer.to(dtype)(given).unflatten(1, (2, 4)).permute(0, 3, 4, 1, 2)
        out = functional.na2d(maps, maps, maps, kernel_size=3)
        (grad,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        return list(torch.autograd.grad((grad.norm() - 1) ** 2, list(layer.parameters()), allow_unused=True))

    for found, expected in zip(penalty(torch.float32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-6)


def test_a_derivative_that_ends_is_seen(monkeypatch):
    """The fault: the first derivative taken for a constant."""
    monkeypatch.setattr(
        any_order, "second_derivatives", lambda tensors, s, p, grads, w, seconds: [None] * (len(tensors) + len(grads))
    )
    with pytest.raises((AssertionError, RuntimeError)):
        test_derivatives_of_derivatives("dense")
