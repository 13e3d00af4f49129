# SPDX-License-Identifier: Apache-2.0
"""The contract on a graphics card. Without one these tests are not collected; none of them has run on one yet."""

from __future__ import annotations

import pytest
import torch
from test_contract import NAMED, by_dtype, check_contract, named, tensors_of

import nearsight as ns
from nearsight.attention.backend import BACKENDS
from nearsight.attention.problem import describe

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BY_NAME = {backend.name: backend for backend in BACKENDS if backend.name != "native"}


def moved(thing):
    if isinstance(thing, torch.Tensor):
        return thing.to(DEVICE)
    return [one.to(DEVICE) for one in thing] if isinstance(thing, list) else thing


@by_dtype
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("backend", BY_NAME)
def test_contract(backend, name, dtype):
    case = named(name, dtype)
    _, inputs, arguments = tensors_of(case, grad=True)
    tables = {name: moved(table) for name, table in arguments.items()}
    problem = describe(*map(moved, inputs[:3]), case.window, tables["bias"], tables["relative"])
    if BY_NAME[backend].unavailable() or BY_NAME[backend].why_not(problem):
        return

    def attend(query, key, value, window, **tables):
        tables = {name: moved(table) for name, table in tables.items()}
        return ns.local_attention(moved(query), moved(key), moved(value), window, **tables, backend=backend).cpu()

    check_contract(attend, case)


@pytest.mark.parametrize("position", ["relative", "bias", "rope"])
def test_layer_trains_by_flex(position):
    layer = ns.LocalSelfAttention2d(32, num_heads=2, position=position).to(DEVICE)
    twin = ns.LocalSelfAttention2d(32, num_heads=2, position=position, backend="blocked").to(DEVICE)
    twin.load_state_dict(layer.state_dict())
    x, found = torch.randn(2, 32, 37, 53, device=DEVICE), []
    for one in (layer, twin):
        y = one(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), one.parameters())])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
