# SPDX-License-Identifier: Apache-2.0
"""The stem's max-pool computes what PyTorch's does and keeps less of it."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from nearsight.models.stem import MaxPool2d


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
@pytest.mark.parametrize("geometry", [(3, 2, 1, 1, False), (2, 2, 0, 1, True), ((2, 3), (1, 2), (1, 1), 1, True)])
def test_the_stems_pool_is_a_max_pool(memory_format, geometry):
    torch.manual_seed(0)
    ours, theirs = (kind(*geometry[:4], ceil_mode=geometry[4]) for kind in (MaxPool2d, nn.MaxPool2d))
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64).relu().to(memory_format=memory_format).requires_grad_()
    y, expected = ours(x), theirs(x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    grad = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, grad)[0] for out in (y, expected)))
    assert torch.autograd.gradgradcheck(ours, torch.randn_like(x).requires_grad_())  # there are no ties
    assert torch.equal(torch.func.grad(lambda x: ours(x).sum())(x), torch.func.grad(lambda x: theirs(x).sum())(x))
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(ours(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None
    with torch.no_grad():
        assert torch.equal(ours(x), expected)


def test_the_stems_pool_keeps_no_map():
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        MaxPool2d(2)(x)
    assert kept == [(2, 3, 6, 6)]
