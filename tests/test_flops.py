# SPDX-License-Identifier: Apache-2.0
"""torch.utils.flop_counter counts our operation by its equation, and the papers' networks as the papers do.

Nothing runs: fake tensors have shapes only, so the native operator is counted whether or not its library was built.
"""

import pytest
import torch
from test_models import documented
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import nearsight as ns
from nearsight.attention import native
from nearsight.flops import count_flops


@pytest.fixture(autouse=True)
def _native_operator(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda problem: None)


def flops(name, size=224, **kwargs):
    with FakeTensorMode():
        model = ns.create_model(name, **kwargs).eval()
    return count_flops(model, (3, size, size))


def by_hand(depths, attention_stages, kernel_size=7):
    """2 x multiply-adds of SASA-ResNet at 224 pixels: 6 w^2 for the projections and 6 k^2 w for the attention of a pixel."""
    total, channels, side = 2 * 3 * 49 * 64 * 112**2, 64, 56
    for stage, depth in enumerate(depths, start=1):
        width, before = 64 * 2 ** (stage - 1), side
        for block in range(depth):
            side = before // 2 if stage > 1 else before
            inner = before if block == 0 else side
            total += 2 * channels * width * inner**2 + 8 * width**2 * side**2
            total += 8 * channels * width * side**2 if block == 0 else 0
            attention, convolution = (6 * width**2 + 6 * kernel_size**2 * width) * inner**2, 18 * width**2 * side**2
            total += attention if stage in attention_stages else convolution
            channels = 4 * width
    return total + 2 * 2048 * 1000


@pytest.mark.parametrize(
    ("depth", "blocks", "attention", "convolution", "full"),
    [
        (26, (1, 2, 4, 1), 4.484, 4.685, 4.7),
        pytest.param(38, (2, 3, 5, 2), 5.725, 6.431, 6.0, marks=pytest.mark.sweep),
        pytest.param(50, (3, 4, 6, 3), 6.966, 8.178, 7.2, marks=pytest.mark.sweep),
    ],
)
def test_sasa_table_1(depth, blocks, attention, convolution, full):
    name = f"sasa_resnet{depth}"
    assert flops(name) == by_hand(blocks, {1, 2, 3, 4}) == pytest.approx(attention * 1e9, abs=5e5)
    assert flops(name, attention_stages=()) == by_hand(blocks, ()) == pytest.approx(convolution * 1e9, abs=5e5)
    # The number of mixtures in the stem is our guess: the paper's number of one decimal, truncated in places.
    assert flops(name, stem="attention") == pytest.approx(full * 1e9, abs=1e8)


@pytest.mark.parametrize(
    ("kernel_size", "count"),
    [(3, 6.509), *(pytest.param(*row, marks=pytest.mark.sweep) for row in ((5, 6.692), (9, 7.332), (11, 7.790)))],
)
def test_sasa_table_4(kernel_size, count):
    found = flops("sasa_resnet50", kernel_size=kernel_size)
    assert found == by_hand((3, 4, 6, 3), {1, 2, 3, 4}, kernel_size) == pytest.approx(count * 1e9, abs=5e5)


def test_sasa_table_3():
    assert flops("sasa_resnet50", attention_stages=(3, 4)) == pytest.approx(7.43e9, abs=5e6)


@pytest.mark.parametrize(
    ("name", "gmac"),
    [
        *(pytest.param(*row, marks=pytest.mark.sweep) for row in (("nat_mini", 2.70), ("nat_small", 7.77))),
        ("dinat_mini", 2.70),
    ],
)
def test_nat(name, gmac):
    """The publication counts a few layers that PyTorch's counter does not: half a percent."""
    assert flops(name) / 2e9 == pytest.approx(gmac, rel=5e-3)


@pytest.mark.parametrize(
    "name",
    [
        "sasa_micro",
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("sasa_resnet26_small", "nat_tiny")),
        "halo_h1",
    ],
)
def test_what_is_documented(name):
    _, gflop, size = documented()[name]
    assert flops(name, size) / 1e9 == pytest.approx(gflop, abs=5e-4)


B, N, D, E, CELLS = 2, 3, 4, 6, 5 * 8


@pytest.mark.parametrize(
    ("window", "queries", "places"),
    [
        (ns.Window(3), CELLS, 9),
        (ns.Window((1, 3), stride=2), 3 * 4, 3),
        (ns.Window(7, border="shift"), CELLS, 5 * 7),  # no more cells than the map has
        (ns.Window((9, 15)), CELLS, CELLS),  # global attention
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_the_operation(window, queries, places, relative):
    pairs, terms = B * N * queries * places, 2 if relative else 1
    with FakeTensorMode():
        query = torch.randn(B, N, *window.output_size((5, 8)), D, requires_grad=True)
        key, value = (torch.randn(B, N, 5, 8, c, requires_grad=True) for c in (D, E))
        tables = [torch.randn(N, k, D, requires_grad=True) for k in window.table_size(2)] if relative else None
        with FlopCounterMode(display=False) as forward:
            y = ns.local_attention(query, key, value, window, relative=tables, backend="native")
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    assert forward.get_total_flops() == 2 * pairs * (terms * D + E)
    assert backward.get_total_flops() == 2 * pairs * (3 * terms * D + 2 * E)


def test_global_attention_is_counted_on_the_processor():
    """PyTorch's counter knows its own attention on GPUs only."""
    layer = ns.GlobalSelfAttention2d(16, position="none", num_heads=2, backend="dense").requires_grad_(False)
    projections, pairs = 2 * 3 * 16 * 16 * CELLS, CELLS**2
    assert count_flops(layer, (16, 5, 8)) == projections + 2 * 2 * 16 * pairs
    query, key, value = (torch.randn(2, 3, 5, 8, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        ns.global_attention(query, key, value, backend="dense").sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 3 * 8 * pairs
