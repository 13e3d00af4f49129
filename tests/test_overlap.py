# SPDX-License-Identifier: Apache-2.0
"""Any strides: tensors whose elements share places in memory, as ``unfold``, ``expand`` and ``as_strided`` make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from conftest import ALL, Contestant, every_backend
from torch import Tensor

import nearsight as ns
from nearsight.attention import flex
from nearsight.attention.problem import Problem, describe

FLEX = Contestant(flex)  # its forward runs on the CPU
View = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _flex_as_it_stands(monkeypatch):
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def overlapping(shape: torch.Size) -> Iterator[tuple[Tensor, View]]:
    """Memory, and views of it in a shape whose elements are more than it holds."""
    strides = [3 if axis == 1 else 1 + axis % 2 for axis in range(len(shape))]
    yield torch.randn(*shape[:-2], shape[-2] + shape[-1] - 1), lambda memory: memory.unfold(-1, shape[-1], 1)
    yield torch.randn(sum(strides) * max(shape)), lambda memory: memory.as_strided(shape, strides, 1)
    yield torch.randn(()), lambda memory: memory.expand(shape)
    yield torch.randn(1, *shape[1:]), lambda memory: memory.expand(shape)
    yield torch.randn(*shape[:-1], 1), lambda memory: memory.expand(shape)


class Call(NamedTuple):
    window: ns.Window
    tensors: list[Tensor]  # query, key and value, and where there are tables bias and those of each axis
    place: int  # which of them is a view of memory
    view: View

    def results(self, attend: Callable[..., Tensor], grad: bool, view: View | None = None) -> list[Tensor]:
        """The output and, if asked for, the gradients by what lies in memory."""
        leaves = [one.clone().requires_grad_(grad) for one in self.tensors]
        inputs = [(view or self.view)(one) if nth == self.place else one for nth, one in enumerate(leaves)]
        options = {"bias": inputs[3], "relative": inputs[4:]} if len(inputs) > 3 else {}
        out = attend(*inputs[:3], self.window, **options)
        return [out, *(torch.autograd.grad(out.square().sum(), leaves) if grad else ())]

    def of_copies(self) -> list[Tensor]:
        """The reference's, over copies in which each element has its own place."""
        apart = partial(torch.clone, memory_format=torch.contiguous_format)
        return self.results(partial(ns.local_attention, backend="reference"), True, lambda one: apart(self.view(one)))

    def problem(self) -> Problem:
        tensors = [self.view(one) if nth == self.place else one for nth, one in enumerate(self.tensors)]
        bias, relative = (tensors[3], tensors[4:]) if len(tensors) > 3 else (None, None)
        return describe(*tensors[:3], self.window, bias, relative)


@cache
def calls() -> list[tuple[Call, list[Tensor]]]:
    """Every tensor in turn, and what is right."""
    torch.manual_seed(0)
    found = []
    for size, kernel_size in (((7,), 13), ((7,), 3), ((2, 3), (3, 5)), ((3, 4), 3)):
        window = ns.Window(kernel_size)
        entries = window.table_size(len(size))
        maps = [torch.Size((2, 3, *size, 4))] * 3
        tables = [torch.Size((3, *entries)), *(torch.Size((3, n, 4)) for n in entries)]
        for shapes, places in ((maps, range(3)), ([*maps, *tables], range(3, 4 + len(size)))):
            for place in places:
                for memory, view in overlapping(shapes[place]):
                    tensors = [memory if nth == place else torch.randn(shape) for nth, shape in enumerate(shapes)]
                    call = Call(window, tensors, place, view)
                    found.append((call, call.of_copies()))
    return found


@every_backend((*ALL, FLEX))
def test_values_and_gradients(contestant):
    able = [one for one in calls() if contestant.backend.why_not(one[0].problem()) is None]
    assert len(able) > 20
    for call, wanted in able if contestant is not FLEX else able[:15]:
        torch.testing.assert_close(call.results(contestant.attend, grad=False), wanted[:1], rtol=1e-4, atol=1e-4)
        if contestant is not FLEX:
            found = call.results(contestant.attend, grad=True)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [8, 32])
def test_dense_over_long_unfolded_sequences(channels, dtype):
    """PyTorch's fused kernel wrote its result after the strides of such a query."""
    memory, (key, value) = (
        torch.randn(2, 3, 16 + channels - 1, dtype=dtype),
        torch.randn(2, 2, 3, 16, channels, dtype=dtype),
    )
    query = memory.unfold(-1, channels, 1)
    found = ns.global_attention(query, key, value, backend="dense")
    torch.testing.assert_close(found, ns.global_attention(query.contiguous(), key, value, backend="dense"))


@pytest.mark.parametrize("layer", ["local", "strided", "global", "halo"])
def test_layers(layer):
    """One picture expanded to a batch, one row to a map, windows of a signal: outputs and gradients are those of copies."""
    make = {
        "local": lambda: ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2),
        "strided": lambda: ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, stride=2),
        "global": lambda: ns.GlobalSelfAttention2d(8, num_heads=2, position="bias"),
        "halo": lambda: ns.HaloSelfAttention2d(8, block_size=2, halo_size=1, num_heads=2),
    }
    module = make[layer]()
    for memory, view in overlapping(torch.Size((3, 8, 5, 6))):
        leaf = memory.clone().requires_grad_()
        found, wanted = module(view(leaf)), module(view(leaf).clone(memory_format=torch.contiguous_format))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        inputs = [leaf, *(one for one in module.parameters() if one.requires_grad)]
        gradients = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, wanted))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
