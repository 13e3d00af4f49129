# SPDX-License-Identifier: Apache-2.0
"""Windows that reach far: long rows whose dilation phases the kernel lays out one after another, and what planning takes."""

from __future__ import annotations

import ctypes
import gc
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nearsight as ns
from nearsight.attention import blocked, native
from nearsight.attention.problem import Problem, describe

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

# Of these rows most are laid out phase after phase, in the forward, in the backward or in both.
ROWS = {
    "a few cells on each phase": (4003, ns.Window(9, dilation=1201)),
    "phases of one length": (4000, ns.Window(3, dilation=1000)),
    "no query on some phases": (4000, ns.Window(9, stride=4, dilation=1602)),
    "every query of some phases": (3990, ns.Window(9, stride=2, dilation=1330)),
    "even": (4003, ns.Window(4, dilation=1200)),
    "causal": (4003, ns.Window(5, dilation=1201, causal=True)),
    "strided and causal": (3990, ns.Window(4, stride=3, dilation=1330, causal=True)),
}


def maps_of(size, out_size, heads_last: bool, batch: int = 1):
    def one(cells):
        memory = (batch, *cells, 2, 16) if heads_last else (batch, 2, 16, *cells)
        tensor = torch.randn(memory)
        return (tensor.movedim(-2, 1) if heads_last else tensor.movedim(2, -1)).requires_grad_()

    return one(out_size), one(size), one(size)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of sums."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max().clamp(min=1)))


def check(size, window, heads_last, batch=1, tables=True):
    maps = maps_of(size, window.output_size(size), heads_last, batch)
    bias = torch.randn(2, *window.table_size(len(size)), requires_grad=True)
    relative = [torch.randn(2, entries, 16, requires_grad=True) for entries in window.table_size(len(size))]
    given = {"bias": bias, "relative": relative} if tables else {}
    inputs = [*maps, bias, *relative] if tables else maps
    grad = torch.randn_like(maps[0])
    ours, expected = (
        (out := ns.local_attention(*maps, window, backend=backend, **given), *torch.autograd.grad(out, inputs, grad))
        for backend in ("native", "reference")
    )
    for one, other in zip(ours, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("name", "border"),
    [  # every row and every border, and all pairs in the sweeps
        pytest.param(name, border, marks=[] if place % 4 == number or border == "shift" else pytest.mark.sweep)
        for place, name in enumerate(ROWS)
        for number, border in enumerate(("mask", "zeros", "shift", "wrap"))
    ],
)
def test_long_rows(name, border):
    cells, window = ROWS[name]
    window = ns.Window(
        window.kernel_size, stride=window.stride, dilation=window.dilation, causal=window.causal, border=border
    )
    for heads_last in (True, False):
        check((cells,), window, heads_last, batch=2)


def test_a_row_with_room_for_zeros_between_its_phases():
    check((30_000,), ns.Window(3, dilation=3000, border="zeros"), True)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        # A window that goes around the torus once and more, by one row, not at all, along cycles of five rows.
        ((7, 5), {"kernel_size": (16, 7)}),
        ((9, 5), {"kernel_size": (9, 3)}),
        ((9, 5), {"kernel_size": (8, 3)}),
        ((20, 6), {"kernel_size": (7, 3), "dilation": (8, 4)}),
        ((21, 6), {"kernel_size": (3, 3), "dilation": (8, 1), "stride": (2, 1)}),
        ((20, 6), {"kernel_size": (5, 3), "dilation": (12, 1), "stride": (2, 2), "causal": (True, False)}),
        ((6, 5, 4), {"kernel_size": (7, 3, 5), "dilation": (4, 2, 3)}),
    ],
)
def test_around_a_torus(size, options):
    check(size, ns.Window(**options, border="wrap"), True, batch=2)


def test_wide_maps_with_halos_wider_than_a_tile():
    for border, heads_last in product(("mask", "shift", "wrap"), (True, False)):
        check((3, 301), ns.Window((3, 9), dilation=(1, 36), border=border), heads_last)


# ------------------------------------------------------------------------------------------------- what planning takes


def problem_of(size, window: ns.Window, needs_grad: bool = True) -> Problem:
    query = torch.empty(1, device="cpu").expand(1, 1, *window.output_size(size), 1).requires_grad_(needs_grad)
    key = torch.empty(1, device="cpu").expand(1, 1, *size, 1)
    return describe(query, key, key, window, None, None)


def memory(what: str) -> int:
    """Bytes that the process has now, or had at most since the last :func:`forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def taken_by(call) -> tuple[int, int]:
    """Bytes that a call takes at most, and that it keeps."""
    # What earlier tests have freed and the allocator still has would be taken again, and not be seen.
    trim = ctypes.CDLL(None).malloc_trim
    gc.collect()
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    call()
    peak = memory("VmHWM")
    trim(0)
    return peak - before, memory("VmRSS") - before


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
HUGE = {
    "around a torus a thousand times": ((5, 5), ns.Window(8192, border="wrap")),
    "far beyond the edge": ((5, 5), ns.Window(2047, border="shift")),
    "dilation beyond the edge": ((64, 64), ns.Window(31, dilation=1 << 20, border="zeros")),
}


@on_linux
@pytest.mark.parametrize("name", HUGE)
def test_checking_a_block_larger_than_the_map_takes_little_memory(name):
    assert taken_by(lambda: native.why_not(problem_of(*HUGE[name])))[0] < 100 << 20


@on_linux
def test_lists_that_would_be_huge_are_not_made():
    problem = problem_of((1 << 20, 1), ns.Window((1 << 20, 1)))
    peak, _ = taken_by(lambda: native.why_not(problem))
    assert peak < 50 << 20
    assert "too large" in str(native.why_not(problem))


def test_many_rows_under_a_kernel_that_sees_them_all():
    """Planned in a time that grows with rows x kernel; rows x kernel x kernel took 20 s."""
    window = ns.Window((511, 1), border="shift")
    query, key, value = (torch.randn(1, 1, 512, 2, 4, requires_grad=True) for _ in range(3))
    ours, theirs = (
        (
            out := ns.local_attention(query, key, value, window, backend=backend),
            *torch.autograd.grad(out.square().sum(), (query, key, value)),
        )
        for backend in ("native", "blocked")
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("border", ["mask", "zeros", "shift", "wrap"])
def test_long_lines_stay_with_the_kernel(border):
    window = ns.Window(31, border=border)
    assert native.why_not(problem_of((1 << 20,), window)) is None  # 2 ** 24 cells x entries and more
    query, key, value = (torch.randn(1, 1, 600_000, 1) for _ in range(3))
    with torch.no_grad():
        ours = ns.local_attention(query, key, value, window, backend="native")[:, :, -2000:]
        last = (tensor[:, :, -4000:] for tensor in (query, key, value))
        # The end of the line sees nothing else, but on a torus the beginning.
        theirs = ns.local_attention(*last, window, backend="blocked")[:, :, -2000:]
    end = 1980 if border == "wrap" else 2000
    assert_same(ours[:, :, :end], theirs[:, :, :end])


@on_linux
def test_much_scratch_memory_is_given_back():
    query, key, value = (torch.randn(1, 1, 72, 72, 8, requires_grad=True) for _ in range(3))

    def step():
        out = ns.local_attention(query, key, value, ns.Window(57), backend="native")
        torch.autograd.grad(out.sum(), (query, key, value))

    ns.local_attention(query, key, value, ns.Window(3), backend="native")
    peak, kept = taken_by(step)
    assert peak > 100 << 20, "the measure is blind"
    assert kept < 60 << 20


def test_block_sizes_of_long_lines_are_weighed_by_the_few_that_differ():
    for queries in (*range(1, 200), 10_000):
        every = {-(-queries // -(-queries // block)) for block in range(1, queries + 1)}
        assert every <= blocked._even_sizes(queries)
    assert len(blocked._even_sizes(1_000_000)) <= 2001
