# SPDX-License-Identifier: Apache-2.0
"""FlexAttention on the CPU: its forward is held to the oracle; PyTorch has its backward on graphics cards only."""

from __future__ import annotations

import pytest
import torch
from conftest import Contestant
from test_contract import NAMED, by_dtype, check_values, named, tensors_of

import nearsight as ns
from nearsight.attention import flex
from nearsight.errors import BackendError

FLEX = Contestant(flex, None)


def why_not(case) -> str | None:
    _, inputs, arguments = tensors_of(case)
    return FLEX.why_not(*inputs[:3], case.window, **arguments)


@by_dtype
@pytest.mark.parametrize("name", NAMED)
def test_values(name, dtype):
    case = named(name, dtype)
    if dtype == torch.float64:
        assert why_not(case) == "FlexAttention takes float32, bfloat16 and float16; the tensors are torch.float64"
    else:
        assert why_not(case) is None
        check_values(FLEX.attend, case)


def test_gradients_are_refused():
    q = torch.randn(1, 2, 5, 7, 4, requires_grad=True)
    with pytest.raises(BackendError, match="FlexAttention has no backward on the CPU"):
        ns.local_attention(q, q, q, ns.Window(3), backend="flex")
