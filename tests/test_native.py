# SPDX-License-Identifier: Apache-2.0
"""The native kernel beyond the contract: vector widths, layouts, threads, operators, forks, and callers that lie.

The contract suite runs over every instruction set by itself: they are the variants of the backend.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import Contestant
from test_contract import (
    CONTAINED,
    LAYOUTS,
    NAMED,
    POISON,
    SPOTS,
    TABLES,
    Case,
    check_containment,
    check_contract,
    tensors_of,
)
from torch import Tensor
from torch.profiler import profile
from torch.utils.data import DataLoader

import nearsight as ns
from nearsight.attention import native
from nearsight.attention.backend import choose
from nearsight.attention.native import library as lib
from nearsight.attention.problem import describe
from nearsight.built import SUFFIX
from nearsight.errors import BackendError, DtypeError, OptionError, ShapeError
from nearsight.window import BORDERS

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
ISAS = native.variants() if native.unavailable() is None else ()
every_isa = pytest.mark.parametrize("isa", ISAS)


def local(query, key, value, window, **options) -> Tensor:
    return ns.local_attention(query, key, value, window, backend="native", **options)


def run(case: Case) -> list[Tensor]:
    """The output and every gradient."""
    incoming, inputs, arguments = tensors_of(case, grad=True)
    out = local(*inputs[:3], case.window, **arguments)
    return [out.detach(), *torch.autograd.grad(out, inputs, incoming)]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------- just below, at, just above

WIDTHS = (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 49)  # lanes are 4, 8 or 16
HEIGHTS = (2, 3, 4, 5, 6, 7)  # rows go in groups of 3
KERNELS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 14, 15)  # sums are held for 4 or 7 entries at a time
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 24)  # and for 4 or 8 channels
EDGES = {
    **{f"{width} columns": Case((2, width), 3, batch=1, heads=1, **TABLES) for width in WIDTHS},
    **{f"{width} columns, batch 3": Case((1, width), 3, batch=3, heads=1, **TABLES) for width in WIDTHS if width < 17},
    **{f"{height} rows": Case((height, 5), 3, batch=1, heads=1, **TABLES) for height in HEIGHTS},
    **{f"{k} wide": Case((2, 18), (1, k), batch=1, heads=1, head_dim=2, value_dim=2, **TABLES) for k in KERNELS},
    **{f"{d} channels": Case((2, 5), 3, batch=1, heads=1, head_dim=d, value_dim=d, **TABLES) for d in CHANNELS},
}


@needs_library
@every_isa
@pytest.mark.parametrize("name", EDGES)
def test_edges(name, isa):
    case = EDGES[name]
    assert case.dtype == torch.float64  # the oracle's; what is tested is float32
    check_contract(Contestant(native, isa).attend, Case(**{**vars(case), "dtype": torch.float32}))


# Where channels fill the widest vectors, `mix` goes cell by cell: of every kind of geometry and memory one case.
IN_CELLS = {
    **{
        name: replace(NAMED[name], batch=min(NAMED[name].batch, 5), heads=1, head_dim=head_dim, value_dim=value_dim)
        for name, head_dim, value_dim in (
            ("line", 48, 16),
            ("volume", 16, 16),  # planes add to results that are there
            ("zeros even dilated", 16, 32),
            ("shift dilated strided", 32, 16),
            ("wrap dilated causal", 16, 16),
            ("causal rows", 64, 80),
            ("shared halos", 16, 16),
            ("shared causal dilated strided", 16, 16),
            ("narrow images", 16, 64),
            ("wide map", 16, 5),
            ("low bias", 3, 16),
        )
    },
    **{
        f"memory {layout}": Case((3, 37), (3, 5), batch=1, head_dim=16, value_dim=16, layout=layout, relative=True)
        for layout in LAYOUTS
    },
}


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_CELLS)
def test_channels_that_fill_vectors(name, dtype):
    check_contract(Contestant(native, "auto").attend, replace(IN_CELLS[name], dtype=dtype))


@needs_library
@pytest.mark.parametrize("name", ["shift", "shared", "causal", "half"])
def test_poison_stays_in_its_cell_where_channels_fill_vectors(name):
    case = replace(CONTAINED[name], head_dim=16, value_dim=16)
    for which, spot in product(range(3), SPOTS):
        check_containment(Contestant(native, "auto").attend, case, which, spot, POISON["NaN"])


@needs_library
@every_isa
@pytest.mark.parametrize("dtype", DTYPES := (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_misaligned(shift, dtype, isa):
    """Elements are all that is aligned: the same numbers at an odd address give the same bits."""
    tensors = [torch.randn(2, 3, 5, 19, 8, dtype=dtype) for _ in range(3)]
    moved = [
        torch.empty(tensor.numel() + shift, dtype=dtype)[shift:].view(tensor.shape).copy_(tensor) for tensor in tensors
    ]
    assert all(tensor.data_ptr() % 16 for tensor in moved)
    with native.use_variant(isa):
        assert torch.equal(local(*tensors, ns.Window(5)), local(*moved, ns.Window(5)))


# ---------------------------------------------------------------------------------- heads whose cells lie in one line

# Of 16 numbers: heads that are worked on together, as many as divide all of them.
TOGETHER = {
    f"{heads} heads of {head_dim} and {value_dim}": Case(
        size, 3, batch=batch, heads=heads, head_dim=head_dim, value_dim=value_dim, layout="heads last", **TABLES
    )
    for heads, head_dim, value_dim, size, batch in (
        (2, 8, 8, (5, 37), 1),
        (3, 8, 8, (7, 19), 2),
        (5, 3, 3, (4, 9), 3),
        (6, 4, 4, (8, 8), 5),
        (6, 1, 5, (3, 21), 2),
        (8, 2, 1, (2, 3, 7), 2),
        (9, 4, 2, (4, 17), 1),
        (16, 1, 1, (35,), 2),
        (4, 9, 4, (5, 6), 1),
    )
}


@needs_library
@every_isa
@pytest.mark.parametrize("name", TOGETHER)
def test_heads_that_share_lines(name, isa):
    check_contract(Contestant(native, isa).attend, replace(TOGETHER[name], dtype=torch.float32))


# ----------------------------------------------------------------------------------------------------- products of pairs

needs_pairs = pytest.mark.skipif("avx512_bf16" not in ISAS, reason="this processor has no AVX512-BF16")
PAIRS = Contestant(native, "avx512_bf16")
PAIRED = {
    **EDGES,
    **IN_CELLS,
    **{f"{entries} entries": Case((2, 37), (3, entries), batch=1, head_dim=16, value_dim=5) for entries in range(1, 8)},
    "dilated far": Case((2, 41), (1, 4), dilation=(1, 9), batch=1, heads=1, head_dim=5, value_dim=16, **TABLES),
    "strided": Case((5, 41), (3, 6), stride=(2, 3), batch=1, heads=1, head_dim=16, value_dim=3, **TABLES),
}


@needs_library
@needs_pairs
@pytest.mark.parametrize("name", PAIRED)
def test_pairs_at_every_edge(name):
    """Below, at and above each vector and pair: columns, channels and entries, odd and even."""
    check_contract(PAIRS.attend, replace(PAIRED[name], dtype=torch.bfloat16))


@needs_library
@needs_pairs
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("name", CONTAINED)
def test_poison_stays_in_its_half_of_a_pair(name, channels):
    case = replace(CONTAINED[name], head_dim=channels, value_dim=channels, dtype=torch.bfloat16)
    for which, spot, poison in product(range(3), SPOTS, POISON):
        check_containment(PAIRS.attend, case, which, spot, POISON[poison])


@needs_library
@needs_pairs
@pytest.mark.parametrize("border", ["shift", "mask"])
@pytest.mark.parametrize("columns", [*range(12, 20), 43, 44, 48])
def test_pairs_do_not_reach_into_the_next_channel(columns, border):
    """Where the last pair of a row ends, the next channel begins: with its first cells, which only the first queries see."""
    query, key, value = torch.randn(3, 1, 1, 4, columns, 5).bfloat16()
    window = ns.Window((1, 7), border=border)
    clean = PAIRS.attend(query, key, value, window)[..., 7:, :]
    for poisoned in (key, value):
        (kept := poisoned.clone())[..., 0, :] = float("nan")
        maps = [kept if one is poisoned else one for one in (query, key, value)]
        assert torch.equal(PAIRS.attend(*maps, window)[..., 7:, :], clean)


@needs_library
@needs_pairs
@pytest.mark.parametrize("channels", [5, 16])
def test_what_is_rounded_where_there_are_pairs(channels):
    """The weights and the gradients of the logits, to bfloat16 before they are mixed: no other number but the results.

    So the output is off by no more than 2^-8 of the sum of weight times |value|, and the gradients alike.
    """
    half, line, scale = 2.0**-8, 75, channels**-0.5
    query, key, value, incoming = torch.randn(4, 1, 2, line, channels).bfloat16()
    leaves = [one.requires_grad_() for one in (query, key, value)]
    out = PAIRS.attend(*leaves, ns.Window(7), scale=scale)
    found = [out, *torch.autograd.grad(out, leaves, incoming)]

    query, key, value, incoming, stored = (one.detach().double() for one in (query, key, value, incoming, out))
    near = (torch.arange(line)[:, None] - torch.arange(line)).abs() <= 3
    weights = (scale * query @ key.mT).masked_fill(~near, -torch.inf).softmax(-1)
    delta = (incoming * stored).sum(-1, keepdim=True)  # of the output as it was stored
    logits = weights * (incoming @ value.mT - delta)
    products = ((weights, value), (scale * logits, key), (scale * logits.mT, query), (weights.mT, incoming))
    for number, (rounded, exact) in zip(found, products, strict=True):
        right, sizes = rounded @ exact, rounded.abs() @ exact.abs()
        allowed = half * (sizes + right.abs()) * 1.02 + 1e-5
        error = (number.detach().double() - right).abs()
        assert (error <= allowed).all()
        assert (error > half * right.abs() * 1.02 + 1e-5).any()  # the bound has a reason


@needs_library
@needs_pairs
def test_numbers_of_float32_are_not_paired():
    """The same bits as without, and other ones in bfloat16."""
    tensors = torch.randn(3, 2, 3, 9, 21, 16)
    bits = {}
    for isa, dtype in product(("avx512", "avx512_bf16"), DTYPES):
        leaves = [one.to(dtype).requires_grad_() for one in tensors]
        with native.use_variant(isa):
            out = local(*leaves, ns.Window(5))
        bits[isa, dtype] = torch.cat([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    assert torch.equal(bits["avx512", torch.float32], bits["avx512_bf16", torch.float32])
    assert not torch.equal(bits["avx512", torch.bfloat16], bits["avx512_bf16", torch.bfloat16])


@needs_library
@needs_pairs
@pytest.mark.parametrize("channels", [5, 16])
def test_pairs_on_any_number_of_threads(channels):
    leaves = [torch.randn(3, 4, 23, 37, channels).bfloat16().requires_grad_() for _ in range(3)]

    def run(count):
        with threads(count), native.use_variant("avx512_bf16"):
            out = local(*leaves, ns.Window(7, dilation=(1, 2)))
            return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    for one, other in zip(run(1), run(3), strict=True):
        assert torch.equal(one, other)


NEIGHBOURS = {  # of which 131 images: a thread works on many, the last of them in a smaller group
    "narrow": ((4, 4), 5, 1),
    "narrower": ((5, 3), 3, 1),
    "7 columns": ((7, 7), 5, 1),
    "14 columns": ((5, 14), 3, 1),
    "one vector and more": ((4, 20), 5, 1),
    "stride": ((6, 13), 3, 2),
    "a sequence": ((11,), 3, 1),
}


def sweep_of_neighbours():
    """Every size under one rule, and one size under every rule; each under each in the sweeps."""
    for name, border, shared_by in product(NEIGHBOURS, BORDERS, (1, 2)):
        one_of_a_kind = name == "narrow" or (border, shared_by) == ("mask", 1)
        yield pytest.param(name, border, shared_by, marks=[] if one_of_a_kind else pytest.mark.sweep)


@needs_library
@every_isa
@pytest.mark.parametrize(("name", "border", "shared_by"), list(sweep_of_neighbours()))
def test_an_image_knows_nothing_of_those_before_it(name, border, shared_by, isa):
    """Scratch memory goes from image to image and head to head: what one left there, not a number even, stays its own."""
    size, kernel_size, stride = NEIGHBOURS[name]
    window = ns.Window(kernel_size, stride=stride, border=border, shared_by=shared_by)
    entries = window.axes(len(size))[0].table_size
    bias = torch.randn(2, *[entries] * len(size)).requires_grad_()
    query = torch.randn(131, 2, *window.output_size(size), 4)
    key, value = torch.randn(2, 131, 2, *size, 4)
    grad = torch.randn_like(query)

    def run(spoilt_head):
        tensors = [tensor.clone() for tensor in (query, key, value, grad)]
        for tensor in tensors:
            if spoilt_head is not None:
                tensor[1::2, spoilt_head] = float("nan")
        leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
        with native.use_variant(isa):
            out = local(*leaves, window, bias=bias)
            return [out, *torch.autograd.grad(out, [*leaves, bias], tensors[3])]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        *whole, whole_bias = run(None)
        for head in (0, 1):
            *spoilt, spoilt_bias = run(head)
            for one, other in zip(spoilt, whole, strict=True):
                assert torch.equal(one[::2], other[::2])
                assert torch.equal(one[:, 1 - head], other[:, 1 - head])
            assert torch.equal(spoilt_bias[1 - head], whole_bias[1 - head])
    finally:
        torch.set_num_threads(threads)


@needs_library
@every_isa
@pytest.mark.parametrize("loud", [1e5, 1e9, 1e15])
def test_logits_of_more_digits_than_a_float_has(loud, isa):
    """What the backward makes of them is lost in rounding, but a weight stays between zero and one."""
    query, key, value = (torch.randn(1, 2, 9, 19, 8) for _ in range(3))
    query, key, value = (one.requires_grad_() for one in (loud * query, loud * key, value))
    with native.use_variant(isa):
        out = local(query, key, value, ns.Window(3))
        gradients = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    torch.testing.assert_close(out, ns.local_attention(query, key, value, ns.Window(3), backend="reference"))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[2].min() >= 0
    assert gradients[2].max() <= 9


# -------------------------------------------------------------------------------------------------------------- layouts


def planar(batch=2, heads=3, size=(6, 9), dim=8) -> Tensor:
    return torch.randn(batch, heads, dim, *size).movedim(2, -1)


def heads_last(batch=2, heads=3, size=(6, 9), dim=8) -> Tensor:
    return torch.randn(batch, *size, heads, dim).movedim(-2, 1)


@needs_library
@pytest.mark.parametrize("make", [planar, heads_last])
def test_layouts_are_kept_and_nothing_is_copied(make):
    query, key, value = (make().requires_grad_() for _ in range(3))
    incoming = make()
    with profile() as recorded:
        out = local(query, key, value, ns.Window(3))
        gradients = torch.autograd.grad(out, (query, key, value), incoming)
    assert out.stride() == query.stride()
    for gradient in gradients:  # side by side, as in the gradient of a fused projection
        order = sorted(range(5), key=gradient.stride, reverse=True)
        assert order == sorted(range(5), key=query.stride, reverse=True)
        assert gradient.stride(0) == 3 * query.stride(0)
    operators = {event.name for event in recorded.events() if event.name.startswith(("aten::", "nearsight::"))}
    assert {"nearsight::attend", "nearsight::attend_backward"} <= operators
    assert not operators & {"aten::copy_", "aten::clone", "aten::contiguous", "aten::reshape"}


@needs_library
def test_heads_of_a_fused_projection_come_back_heads_last():
    """Slices of one channels_last convolution: merging the heads of what comes out is a view."""
    fused = torch.randn(2, 3 * 24, 6, 9).to(memory_format=torch.channels_last)
    query, key, value = (part.unflatten(1, (3, 8)).movedim(2, -1) for part in fused.chunk(3, 1))
    out = local(query, key, value, ns.Window(3))
    merged = out.movedim(1, -2).flatten(-2).movedim(-1, 1)
    assert merged.data_ptr() == out.data_ptr()
    assert merged.is_contiguous(memory_format=torch.channels_last)
    narrow = local(query, key, value[..., :5], ns.Window(3))  # value_dim is not head_dim
    assert narrow.movedim(1, -2).is_contiguous()
    assert torch.equal(narrow, out[..., :5])


# --------------------------------------------------------------------------------------------- windows of every kind


def any_window(rng: Random) -> tuple[list[int], ns.Window]:
    """A map, mostly of several vectors and groups of rows, and a window whose rules differ from axis to axis."""
    rank = rng.choice([1, 2, 2, 3])
    longest, widest = {1: (90, 17), 2: (24, 8), 3: (7, 4)}[rank]
    size = [rng.randint(1, longest) for _ in range(rank)]
    kernel_size = tuple(rng.randint(1, widest) for _ in size)
    return size, ns.Window(
        kernel_size,
        stride=tuple(rng.choice([1, 1, 2, 3]) for _ in size),
        dilation=tuple(rng.choice([1, 1, 2, rng.randint(1, 12)]) for _ in size),
        border=tuple(rng.choice(BORDERS) for _ in size),
        causal=tuple(rng.random() < 0.35 for _ in size),
        shared_by=tuple(rng.choice([1, rng.randint(1, k), k]) for k in kernel_size),
    )


def any_inputs(rng: Random, size: list[int], window: ns.Window) -> tuple[list[Tensor], dict]:
    """Query, key, value, bias and relative, and which of the two tables to take."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    batch, heads = rng.randint(1, 3), rng.randint(1, 2)
    head_dim, value_dim = (rng.choice([rng.randint(1, 9), 16]) for _ in range(2))
    sizes = (window.output_size(size), size, size)
    channels = (head_dim, head_dim, value_dim)
    inputs = [torch.randn(batch, heads, *n, d, generator=generator) for n, d in zip(sizes, channels, strict=True)]
    tables = window.table_size(len(size))
    inputs.append(torch.randn(heads, *tables, generator=generator))
    inputs += [torch.randn(heads, entries, head_dim, generator=generator) for entries in tables]
    return inputs, {"bias": rng.random() < 0.5, "relative": rng.random() < 0.5}


def results_of(backend: str, inputs: list[Tensor], window: ns.Window, bias: bool, relative: bool) -> list[Tensor]:
    """The output, the log-sum-exp, and every gradient of both."""
    used = [tensor.detach().requires_grad_() for tensor in inputs]
    tables = {"bias": used[3] if bias else None, "relative": used[4:] if relative else None}
    out, lse = ns.local_attention(*used[:3], window, **tables, backend=backend, return_lse=True)
    wanted = [*used[:3], *used[3 : 3 + bias], *(used[4:] if relative else [])]
    seen = torch.isfinite(lse)
    total = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + torch.where(seen, lse, 0).square().sum()
    return [out, torch.where(seen, lse, 0), *torch.autograd.grad(total, wanted)]


PHASE_AFTER_PHASE = [  # so wide and dilated that the phases of a row are laid one after another
    ([4, width], ns.Window((1, 7), dilation=(1, 12), border=border, causal=(False, causal), shared_by=(1, 4)))
    for width, border, causal in [(90, "wrap", False), (40, "wrap", True), (90, "zeros", False), (90, "mask", False)]
]


@needs_library
@every_isa
def test_windows_of_every_kind(isa):
    """Shared, causal, dilated and strided under every border, each axis in its own way, against the reference."""
    rng = Random(3)
    for size, window in [*PHASE_AFTER_PHASE, *(any_window(rng) for _ in range(24))]:
        inputs, tables = any_inputs(rng, size, window)
        expected = results_of("reference", [tensor.double() for tensor in inputs], window, **tables)
        with native.use_variant(isa):
            found = results_of("native", inputs, window, **tables)
        for one, other in zip(found, expected, strict=True):
            scale = max(1.0, other.abs().max().item())
            torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * scale, msg=f"{size} {window} {tables}")


@needs_library
@every_isa
def test_what_a_window_does_not_hold_is_never_touched(isa):
    """One cell's value is not a number: nor is the output of the queries that see it, and of them alone."""
    rng = Random(4)
    for _ in range(40):
        size, window = any_window(rng)
        (query, key, value, *_), _ = any_inputs(rng, size, window)
        value[(..., *(rng.randrange(n) for n in size), slice(None))] = float("nan")
        with native.use_variant(isa):
            found = local(query, key, value, window)
        expected = ns.local_attention(query, key, value, window, backend="reference")
        assert torch.equal(found.isnan(), expected.isnan()), f"{size} {window}"


# -------------------------------------------------------------------------------------------------------------- threads

GEOMETRIES = {
    "plain": Case((23, 19), 7, head_dim=8, value_dim=8, **TABLES),
    "volume": Case((5, 7, 9), 3, border="zeros", **TABLES),
    "small": Case((7, 7), 5, batch=5, head_dim=8, value_dim=8, **TABLES),
    "shift": Case((19, 23), 5, border="shift", dilation=2, stride=2, **TABLES),
    "wrap": Case((67,), 9, border="wrap", batch=3, **TABLES),
    "shared": Case((19, 37), 7, shared_by=(3, 7), border=("zeros", "wrap"), **TABLES),
}


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_number_of_threads_gives_the_same_bits(name, dtype):
    case = Case(**{**vars(GEOMETRIES[name]), "dtype": dtype})
    results = []
    for count in (1, 2, 3, 7):
        with threads(count):
            results.append(run(case))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert torch.equal(one, same)


@needs_library
def test_calls_from_several_threads_at_once():
    expected = run(GEOMETRIES["plain"].__class__(**{**vars(GEOMETRIES["plain"]), "dtype": torch.float32}))
    case = Case(**{**vars(GEOMETRIES["plain"]), "dtype": torch.float32})
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: run(case), range(16)):
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def attend_somewhere(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, 2, 17, 19, 8, generator=generator) for _ in range(3)]
    return local(*(tensor.requires_grad_() for tensor in maps), ns.Window(5))


class Attending(torch.utils.data.Dataset):
    """Attends while it loads, in whatever process that happens."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, item: int) -> Tensor:
        out = attend_somewhere(item)
        out.sum().backward()
        return out.detach()


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_after_use():
    """The OpenMP runtime's threads do not survive a fork: the child may not wait for them.

    In a process of its own: autograd refuses to run in a fork of one whose engine has threads, as other tests may leave it.
    """
    fresh = multiprocessing.get_context("spawn").Process(target=fork_after_use)
    fresh.start()
    fresh.join(240)
    hung = fresh.is_alive()
    fresh.kill()
    assert not hung
    assert fresh.exitcode == 0


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process")  # that forks with threads may hang, which is the point
def test_a_library_that_is_loaded_after_the_fork(tmp_path):
    """PyTorch alone had used its threads: a copy of the library, which no fork has seen, stands for one not loaded."""
    shutil.copy(lib.loaded()._name, tmp_path)
    maps, window = [torch.randn(2, 2, 17, 19, 8) for _ in range(3)], ns.Window(5)
    expected = local(*maps, window)
    with threads(2):
        (torch.ones(1 << 20) * 2).exp().sum()
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                with installed_in(tmp_path), torch.no_grad():
                    failed = int(not torch.equal(local(*maps, window), expected))
            finally:
                os._exit(failed)
    ended, deadline = 0, time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def fork_after_use():
    with threads(2):
        expected = torch.stack([attend_somewhere(seed).detach() for seed in range(4)])
        context = multiprocessing.get_context("fork")
        loader = DataLoader(Attending(), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=60)
        assert torch.equal(torch.cat(list(loader)), expected)
        child = context.Process(target=attend_somewhere, args=(0,))
        child.start()
        child.join(60)
        hung = child.is_alive()
        child.kill()
        assert not hung
        assert child.exitcode == 0


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime():
    program = """
import re, torch, nearsight as ns
torch.set_num_threads(2)
q = torch.randn(2, 2, 9, 9, 8)
ns.local_attention(q, q, q, ns.Window(3), backend="native")
files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*sorted(file for file in files if re.search(r"/lib[a-z]*omp[0-9]*[-.]", file)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 1, found
    assert lib.loaded().nearsight_has_openmp()


# ------------------------------------------------------------------------------------------------------------ operators


def sample(dtype=torch.float32, bias=True, relative=True, value_dim=6, grad=True):
    query, key = (torch.randn(2, 5, 7, 3, 6).movedim(-2, 1).to(dtype) for _ in range(2))
    value = torch.randn(2, 5, 7, 3, value_dim).movedim(-2, 1).to(dtype)
    tables = torch.randn(3, 3, 3), [torch.randn(3, 3, 6) for _ in range(2)]
    maps = [tensor.requires_grad_(grad) for tensor in (query, key, value)]
    tables = [
        tables[0].requires_grad_(grad) if bias else None,
        [r.requires_grad_(grad) for r in tables[1]][: 2 * relative],
    ]
    return (*maps, *tables, [3, 3], [1, 1], [1, 1], [0, 1], [1, 1], [0, 0], 0.5, lib.AUTO)


SAMPLES = {
    "both tables": {},
    "bias": {"relative": False},
    "relative": {"bias": False},
    "no table": {"bias": False, "relative": False},
    "value narrower": {"value_dim": 4},
    "bfloat16": {"dtype": torch.bfloat16},
}


@needs_library
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.sweep] * (name in ("bias", "relative"))) for name in SAMPLES]
)
def test_operators(name):
    """torch's own checks: schema, autograd registration, fake tensors, AOT dispatch with symbolic sizes."""
    arguments = sample(**SAMPLES[name])
    torch.library.opcheck(torch.ops.nearsight.attend.default, arguments)
    arguments = sample(**SAMPLES[name], grad=False)
    out, lse = torch.ops.nearsight.attend.default(*arguments)
    wanted = [True, True, True, arguments[3] is not None, bool(arguments[4])]
    torch.library.opcheck(
        torch.ops.nearsight.attend_backward.default,
        (torch.randn_like(out), *arguments[:5], out, lse, wanted, *arguments[5:]),
    )


@needs_library
def test_tables_of_an_empty_batch_have_gradients_of_zero():
    maps, (bias, relative, *geometry) = sample(grad=False)[:3], sample(grad=False)[3:]
    maps = [one[:0] for one in maps]
    out, lse = torch.ops.nearsight.attend.default(*maps, bias, relative, *geometry)
    gradients = torch.ops.nearsight.attend_backward.default(
        out, *maps, bias, relative, out, lse, [False, False, False, True, True], *geometry
    )
    assert [one.shape for one in gradients] == [one.shape for one in (bias, *relative)]
    assert not any(one.any() for one in gradients)


def meddled(place: int, change):
    """Arguments of attend_backward with one of them changed; those of attend lie among them."""
    arguments = list(sample(grad=False))
    out, lse = torch.ops.nearsight.attend.default(*arguments)
    whole = [torch.randn_like(out), *arguments[:5], out, lse, [True] * 5, *arguments[5:]]
    whole[place] = change(whole[place])
    return whole


def shorter(axis: int):
    return lambda tensor: tensor.narrow(axis, 0, tensor.shape[axis] - 1)


SHARED_LIES = {  # the place of the argument, what becomes of it, the error
    "fewer batches of query": (1, shorter(0), ShapeError),
    "fewer heads of query": (1, shorter(1), ShapeError),
    "a smaller map of query": (1, shorter(3), ShapeError),
    "fewer channels of query": (1, shorter(4), ShapeError),
    "query without an axis": (1, lambda query: query[0], ShapeError),
    "a single number": (1, lambda query: query.new_zeros(()), ShapeError),
    "fewer batches of key": (2, shorter(0), ShapeError),
    "one head of key": (2, lambda key: key[:, :1], ShapeError),
    "a smaller map of key": (2, shorter(2), ShapeError),
    "no heads of key": (2, lambda key: key[:, :0], ShapeError),
    "a smaller map of value": (3, shorter(2), ShapeError),
    "value of another dtype": (3, lambda value: value.bfloat16(), DtypeError),
    "query of whole numbers": (1, lambda query: query.long(), DtypeError),
    "fewer heads of bias": (4, shorter(0), ShapeError),
    "fewer entries of bias": (4, shorter(1), ShapeError),
    "a flat bias": (4, lambda bias: bias.flatten(), ShapeError),
    "an empty bias": (4, lambda bias: bias[:0], ShapeError),
    "bias of half precision": (4, lambda bias: bias.bfloat16(), DtypeError),
    "bias of double precision": (4, lambda bias: bias.double(), DtypeError),
    "one table for two axes": (5, lambda relative: relative[:1], ShapeError),
    "three tables for two axes": (5, lambda relative: [*relative, relative[0]], ShapeError),
    "fewer entries of relative": (5, lambda relative: [relative[0], relative[1][:, 1:]], ShapeError),
    "fewer channels of relative": (5, lambda relative: [relative[0][..., 1:], relative[1]], ShapeError),
    "relative of double precision": (5, lambda relative: [relative[0], relative[1].double()], DtypeError),
    "one kernel_size": (9, lambda _: [3], ShapeError),
    "four kernel_sizes": (9, lambda _: [3] * 4, ShapeError),
    "no kernel_size": (9, lambda _: [], ShapeError),
    "kernel_size of another table": (9, lambda _: [5, 5], ShapeError),
    "kernel_size 0": (9, lambda _: [3, 0], OptionError),
    "a stride that query has not": (10, lambda _: [2, 2], ShapeError),
    "stride negative": (10, lambda _: [-1, 1], OptionError),
    "dilation 0": (11, lambda _: [0, 1], OptionError),
    "three dilations": (11, lambda _: [1] * 3, ShapeError),
    "one causal": (12, lambda _: [1], ShapeError),
    "causal neither 0 nor 1": (12, lambda _: [0, 2], OptionError),
    "causal negative": (12, lambda _: [0, -1], OptionError),
    "shared by none": (13, lambda _: [1, 0], OptionError),
    "shared by more than see it": (13, lambda _: [4, 1], OptionError),
    "shared with other tables": (13, lambda _: [1, 3], ShapeError),
    "one shared_by": (13, lambda _: [1], ShapeError),
    "border unknown": (14, lambda _: [0, 4], OptionError),
    "border negative": (14, lambda _: [0, -1], OptionError),
    "one border": (14, lambda _: [0], ShapeError),
    "no border": (14, lambda _: [], ShapeError),
    "border of other tables": (14, lambda _: [0, 2], ShapeError),
    "scale not a number": (15, lambda _: float("nan"), OptionError),
    "scale infinite": (15, lambda _: float("inf"), OptionError),
    "isa unknown": (16, lambda _: len(lib.ISAS), OptionError),
    "isa negative": (16, lambda _: -1, OptionError),
    "isa huge": (16, lambda _: 1 << 40, OptionError),
}
BACKWARD_LIES = {
    "a smaller grad": (0, shorter(2), ShapeError),
    "fewer channels of grad": (0, shorter(4), ShapeError),
    "grad of another dtype": (0, lambda grad: grad.bfloat16(), DtypeError),
    "a smaller out": (6, shorter(0), ShapeError),
    "out of another dtype": (6, lambda out: out.double(), DtypeError),
    "an empty lse": (7, lambda lse: lse[:0], ShapeError),
    "a smaller lse": (7, shorter(3), ShapeError),
    "lse with channels": (7, lambda lse: lse[..., None], ShapeError),
    "lse of half precision": (7, lambda lse: lse.bfloat16(), DtypeError),
    "four flags": (8, lambda wanted: wanted[:4], OptionError),
    "no flag": (8, lambda wanted: [], OptionError),
    "a gradient of no bias": (4, lambda _: None, OptionError),
    "a gradient of no relative": (5, lambda _: [], OptionError),
}


@needs_library
@pytest.mark.parametrize("name", [*SHARED_LIES, *BACKWARD_LIES])
def test_operators_check_what_anyone_may_call_them_with(name):
    place, change, error = {**SHARED_LIES, **BACKWARD_LIES}[name]
    arguments = meddled(place, change)
    with pytest.raises(error):
        torch.ops.nearsight.attend_backward(*arguments)
    if name in SHARED_LIES:
        forward = [*arguments[1:6], *arguments[9:]]
        for grad in (False, True):  # above autograd and below it
            with pytest.raises(error), torch.set_grad_enabled(grad):
                torch.ops.nearsight.attend(*forward)


@needs_library
def test_operators_take_any_strides():
    """Of the log-sum-exp and the tables too, which C takes to be contiguous."""
    arguments = meddled(7, lambda lse: lse)
    expected = torch.ops.nearsight.attend_backward(*arguments)
    apart = [one.mT.contiguous().mT if place in (4, 7) else one for place, one in enumerate(arguments)]
    apart[5] = [table.mT.contiguous().mT for table in arguments[5]]
    assert not any(one.is_contiguous() for one in (apart[4], apart[7], *apart[5]))
    for one, other in zip(torch.ops.nearsight.attend_backward(*apart), expected, strict=True):
        assert torch.equal(one, other)


class Layer(torch.nn.Module):
    def __init__(self, border="mask"):
        super().__init__()
        self.attend = ns.LocalSelfAttention2d(8, 12, 3, num_heads=3, border=border, backend="native")

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


@needs_library
@pytest.mark.parametrize(
    ("memory_format", "backend"),
    [
        (torch.contiguous_format, "aot_eager"),
        (torch.channels_last, "aot_eager"),
        pytest.param(torch.contiguous_format, "inductor", marks=pytest.mark.sweep),
        pytest.param(torch.channels_last, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compile(memory_format, backend):
    torch._dynamo.reset()
    layer = Layer()
    x = torch.randn(2, 8, 6, 9).to(memory_format=memory_format).requires_grad_()
    inputs = [x, *layer.parameters()]
    found, expected = torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@needs_library
def test_compile_once_for_every_size():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = Layer("shift")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for batch, height, width in ((2, 6, 9), (3, 8, 7), (5, 11, 12)):
        x = torch.randn(batch, 8, height, width)
        torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 1


@needs_library
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer, x = Layer().eval(), torch.randn(2, 8, 6, 9)
    sizes = {0: torch.export.Dim("batch", min=2), 2: torch.export.Dim("height", min=4)}
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": sizes}, strict=strict)
    assert "nearsight.attend" in "".join(part.code for part in exported.graph_module.modules())
    for one in (x, torch.randn(3, 8, 10, 9)):
        torch.testing.assert_close(exported.module()(one), layer(one))


@needs_library
@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0, 0, 0), (0, None, 2, None, 0, None), (3, 1, 0, 2, None, 1)])
def test_vmap(in_dims):
    """Over any axis, with tables mapped or shared, and over gradients."""
    shapes = [(2, 2, 4, 5, 3)] * 3 + [(2, 3, 3), (2, 3, 3), (2, 3, 3)]
    tensors = [
        torch.randn(*shape[:dim], 4, *shape[dim:]) if dim is not None else torch.randn(shape)
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]

    def function(query, key, value, bias, *relative):
        return local(query, key, value, ns.Window(3), bias=bias, relative=relative)

    def each(transformed):
        slices = [
            [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, in_dims, strict=True)] for i in range(4)
        ]
        return [transformed(*inputs) for inputs in slices]

    torch.testing.assert_close(torch.func.vmap(function, in_dims)(*tensors), torch.stack(each(function)))
    gradient = torch.func.grad(lambda *inputs: function(*inputs).square().sum(), argnums=tuple(range(6)))
    found = torch.func.vmap(gradient, in_dims)(*tensors)
    for one, other in zip(found, zip(*each(gradient), strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(other))


@needs_library
@pytest.mark.parametrize("widths", [(6, 6, 6), (4, 4, 10)])
def test_vmap_where_gradients_come_as_one_tensor(widths):
    """Every mapped element needs its own channels of it."""

    def function(*maps):
        heads = (one.unflatten(1, (2, -1)).movedim(2, -1) for one in maps)
        return local(*heads, ns.Window(3)).square().sum()

    many = [torch.randn(2, 4, width, 5, 6) for width in widths]  # mapped over axis 1: then heads join without a copy
    gradient = torch.func.grad(function, argnums=(0, 1, 2))
    found = torch.func.vmap(gradient, (1, 1, 1))(*many)
    each = [gradient(*(one.select(1, index) for one in many)) for index in range(4)]
    for one, other in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(other))


@needs_library
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("widths", [(24, 24, 24), (12, 12, 30), (6, 6, 3)])
def test_gradients_of_a_fused_projection_are_its_gradient(widths, memory_format):
    """Taken together they fill one piece of memory, laid out as the projection is."""

    def split(joined):
        return [part.unflatten(1, (3, -1)).movedim(2, -1) for part in joined.split(widths, 1)]

    fused = torch.randn(2, sum(widths), 6, 9).to(memory_format=memory_format)
    maps = [part.requires_grad_() for part in split(fused)]

    def gradients_by(backend):
        y = ns.local_attention(*maps, ns.Window(3), backend=backend)
        return torch.autograd.grad(y.square().sum(), maps)

    gradients = gradients_by("native")
    torch.testing.assert_close(gradients, gradients_by("reference"), atol=1e-4, rtol=1e-4)
    whole = gradients[0].as_strided(fused.shape, fused.stride(), gradients[0].storage_offset())
    assert all(torch.equal(part, gradient) for part, gradient in zip(split(whole), gradients, strict=True))
    assert whole.untyped_storage().nbytes() == fused.untyped_storage().nbytes()


@needs_library
def test_only_the_gradients_that_are_wanted_are_computed():
    with profile() as recorded:
        query, key, value = (planar() for _ in range(3))
        out = local(query, key, value.requires_grad_(), ns.Window(3))
        out.sum().backward()
    assert out.requires_grad
    assert query.grad is None
    assert value.grad is not None
    (event,) = (event for event in recorded.events() if event.name == "nearsight::attend_backward")
    assert sum(child.name == "aten::empty_like" for child in event.cpu_children) == 1


@needs_library
def test_saves_its_inputs_its_output_and_one_number_per_query():
    saved: list[Tensor] = []
    query, key, value = (planar().requires_grad_() for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = local(query, key, value, ns.Window(3))
    assert {tensor.data_ptr() for tensor in (query, key, value, out)} <= {tensor.data_ptr() for tensor in saved}
    assert sum(tensor.numel() for tensor in saved) == 4 * out.numel() + out[..., 0].numel()


# --------------------------------------------------------------------------------------------------- which backend runs


def problem_of(*size, head_dim=32, dtype=torch.float32, kernel_size=3, bias=False):
    maps = torch.empty(2, 2, *size, head_dim, dtype=dtype)
    window = ns.Window(kernel_size)
    table = torch.empty(2, *window.table_size(len(size))) if bias else None
    return describe(maps, maps, maps, window, table, None)


REFUSALS = {
    "float64": (problem_of(5, dtype=torch.float64), "takes float32 and bfloat16.*float64"),
    "float16": (problem_of(5, dtype=torch.float16), "takes float32 and bfloat16.*float16"),
    "no channels": (problem_of(5, head_dim=0), "at least one channel"),
    "a block of 2 ** 27 entries": (problem_of(5, kernel_size=1 << 27), "too large"),
}


@needs_library
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    problem, reason = REFUSALS[name]
    assert re.search(reason, native.why_not(problem) or "")


def large_problem(*size, kernel_size, head_dim=1, needs_grad=False):
    """Of tensors that have no memory."""
    maps = torch.empty(1).expand(1, 1, *size, head_dim)
    return replace(describe(maps, maps, maps, ns.Window(kernel_size), None, None), needs_grad=needs_grad)


NEEDS_SCRATCH = {
    "many planes": ((88_000, 1, 1), {"kernel_size": 3, "head_dim": 256}),
    "a large block": ((96, 96), {"kernel_size": 191}),
}


@needs_library
@every_isa
@pytest.mark.parametrize("name", NEEDS_SCRATCH)
def test_a_backward_beyond_the_scratch_memory(isa, name):
    size, options = NEEDS_SCRATCH[name]
    with native.use_variant(isa):
        assert native.why_not(large_problem(*size, **options)) is None
        reason = native.why_not(large_problem(*size, **options, needs_grad=True))
    assert re.search(rf"exceed 2 GiB per thread; received a map {re.escape(str(size))}.*its gradients", reason or "")


@needs_library
@every_isa
def test_a_forward_beyond_the_scratch_memory(isa):
    with native.use_variant(isa):
        reason = native.why_not(large_problem(64, 64, kernel_size=(64, 1), head_dim=1 << 18))
    assert re.search(r"exceed 2 GiB per thread.*under a kernel_size of \(64, 1\)$", reason or "")


@needs_library
def test_the_gradient_of_the_log_sum_exp_needs_scratch_memory_for_one_channel_more():
    asked = large_problem(88_000, 1, 1, kernel_size=3, needs_grad=True)

    def too_wide(value_dim: int) -> bool:
        return native.why_not(replace(asked, value_dim=value_dim)) is not None

    widest = bisect_right(range(1, 513), False, key=too_wide)
    assert too_wide(widest + 1)
    assert not too_wide(widest)
    assert native.why_not(replace(asked, value_dim=widest, lse=True))
    assert native.why_not(replace(asked, value_dim=widest, lse=True, needs_grad=False)) is None


@needs_library
def test_another_backend_serves_where_the_scratch_memory_does_not_suffice():
    query = torch.randn(1, 1, 96, 96, 1, requires_grad=True)
    window = ns.Window(191)
    with pytest.raises(BackendError, match=r"exceed 2 GiB.*received a map \(96, 96\).*These can: .*blocked"):
        local(query, query, query, window)
    (grad,) = torch.autograd.grad(ns.local_attention(query, query, query, window).sum(), query)
    with torch.no_grad():
        assert local(query, query, query, window).shape == query.shape
    assert grad.isfinite().all()


@needs_library
def test_it_is_the_default_where_it_is_the_faster():
    assert choose(problem_of(9, 9), None) is native
    covered = problem_of(9, 9, kernel_size=17)
    assert native.why_not(covered) is None
    assert native.second_best(covered)
    assert choose(covered, None).name == "dense"
    assert choose(covered, "native") is native
    assert choose(problem_of(9, 9, kernel_size=17, bias=True), None) is native
    assert choose(problem_of(9, 9, kernel_size=17, head_dim=8), None) is native


# ----------------------------------------------------------------------------------------------------- the environment


@needs_library
@every_isa
def test_environment_chooses_the_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("NEARSIGHT_ISA", isa)
    assert native.instruction_set() == isa
    assert native.unavailable() is None


@needs_library
@pytest.mark.parametrize("value", ["", "1", "AVX2", "sse9", "avx10"])
def test_environment_is_read_strictly(value, monkeypatch):
    monkeypatch.setenv("NEARSIGHT_ISA", value)
    query = planar()
    for backend in ("native", None):
        with pytest.raises(BackendError, match=f"NEARSIGHT_ISA must be auto, {ISAS[0]}.*received '{value}'"):
            ns.local_attention(query, query, query, ns.Window(3), backend=backend)
    ns.local_attention(query, query, query, ns.Window(3), backend="blocked")


@needs_library
def test_an_instruction_set_of_another_machine(monkeypatch):
    monkeypatch.setenv("NEARSIGHT_ISA", next(isa for isa in lib.ISAS[1:] if isa not in ISAS))
    with pytest.raises(BackendError, match=f"NEARSIGHT_ISA must be auto.*{ISAS[-1]} on this machine; received"):
        native.unavailable()


# ---------------------------------------------------------------------------------------------------- the wrong library

STUB = """
extern "C" {{
int nearsight_abi_version(void) {{ return {version}; }}
int nearsight_check(const void*, int) {{ return {check}; }}
int nearsight_forward(void) {{ return 0; }}
int nearsight_forward_projected(void) {{ return 0; }}
int nearsight_backward(void) {{ return 0; }}
const char* nearsight_error_string(int) {{ return ""; }}
int nearsight_available_isas(void) {{ return 2; }}
int nearsight_default_isa(void) {{ return 1; }}
const char* nearsight_isa_name(int) {{ return ""; }}
int nearsight_has_openmp(void) {{ return 0; }}
}}
"""


@contextmanager
def installed_in(folder: Path):
    """As if the package lay in `folder`."""
    before = native.__path__[:]
    native.__path__[:] = [str(folder)]
    lib.find.cache_clear()
    try:
        yield
    finally:
        native.__path__[:] = before
        lib.find.cache_clear()


def compiled(folder: Path, source: str) -> Path:
    compiler = shutil.which("g++")
    assert compiler, "this test needs g++"
    code, library = folder / "stub.cpp", folder / f"libnearsight{SUFFIX}"
    code.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, code], check=True)
    return library


@pytest.mark.parametrize(
    ("version", "check"),
    [(lib.ABI_VERSION + 1, 0), (lib.ABI_VERSION, lib.ERROR_VERSION)],
)
def test_a_library_of_another_version_is_refused(version, check, tmp_path):
    compiled(tmp_path, STUB.format(version=version, check=check))
    with installed_in(tmp_path):
        reason = native.unavailable()
        assert re.search(
            f"another interface, version {version}.*needs {lib.ABI_VERSION}.*install nearsight again", reason
        )
        query = planar()
        with pytest.raises(BackendError, match=r"another interface.*blocked"):
            local(query, query, query, ns.Window(3))
        ns.local_attention(query, query, query, ns.Window(3))
    assert native.unavailable() != reason


def test_the_stub_is_taken_when_it_is_right(tmp_path):
    lib.load(compiled(tmp_path, STUB.format(version=lib.ABI_VERSION, check=0)))


@pytest.mark.parametrize("content", ["", "no library", "a library of something else"])
def test_a_file_that_is_no_library_of_ours(content, tmp_path):
    if content.startswith("a library"):
        compiled(tmp_path, "int something;")
    else:
        (tmp_path / f"libnearsight{SUFFIX}").write_text(content)
    with installed_in(tmp_path):
        assert "cannot be loaded" in native.unavailable()


def test_without_a_library_blocked_serves(tmp_path):
    with installed_in(tmp_path):
        assert re.search("no native kernel, and 'blocked' serves: .*--no-cache-dir", native.unavailable())
        assert ns.backends()["native"] == native.unavailable()
        query = planar()
        ns.local_attention(query, query, query, ns.Window(3))
        for function in (native.variants, native.instruction_set):
            with pytest.raises(BackendError, match="no native kernel"):
                function()


# ----------------------------------------------------------------------------------------- callers of the C ABI that lie

HUGE = 1 << 62
LIES = {  # what is said of a right 2-d problem of 5 x 7 cells: the error
    "struct_size 0": ({"struct_size": 0}, 1),
    "struct_size of a longer struct": ({"struct_size": ctypes.sizeof(lib.CProblem) + 8}, 1),
    "abi_version": ({"abi_version": lib.ABI_VERSION + 1}, 1),
    "rank 0": ({"rank": 0}, 3),
    "rank 4": ({"rank": 4}, 3),
    "rank negative": ({"rank": -1}, 3),
    "dtype": ({"dtype": 2}, 3),
    "border": ({"border": (0, 4, 0)}, 3),
    "border negative": ({"border": (-1, 0, 0)}, 3),
    "causal": ({"causal": (2, 0, 0)}, 3),
    "isa": ({"isa": len(lib.ISAS)}, 3),
    "isa of another machine": ({"isa": 4 if ISAS and "neon" not in ISAS else 2}, 8),
    "no thread": ({"num_threads": 0}, 4),
    "elements of half precision": ({"element_size": 2}, 12),
    "elements of double precision": ({"element_size": 8}, 12),
    "a log-sum-exp of half precision": ({"scalar_size": 2}, 12),
    "tables of double precision": ({"scalar_size": 8}, 12),
    "element sizes left out": ({"element_size": 0, "scalar_size": 0}, 12),
    "batch": ({"batch": -1}, 4),
    "heads": ({"heads": -1}, 4),
    "head_dim 0": ({"head_dim": 0}, 4),
    "value_dim 0": ({"value_dim": 0}, 4),
    "size negative": ({"size": (5, -7, 0)}, 4),
    "kernel 0": ({"kernel": (0, 3, 0)}, 4),
    "stride 0": ({"stride": (1, 0, 0)}, 4),
    "dilation negative": ({"dilation": (-1, 1, 0)}, 4),
    "shared by none": ({"shared_by": (1, 0, 0)}, 4),
    "shared by more cells than the window has": ({"shared_by": (4, 1, 0)}, 4),
    "shared_by huge": ({"shared_by": (1, HUGE, 0)}, 4),
    "batch huge": ({"batch": HUGE}, 6),
    "batch that overflows": ({"batch": (1 << 63) - 1}, 6),
    "head_dim huge": ({"head_dim": HUGE}, 6),
    "size huge": ({"size": (HUGE, 7, 0)}, 6),
    "product huge": ({"size": (1 << 30, 1 << 30, 0), "batch": 1 << 20}, 6),
    "product huge on an empty map": ({"size": (1 << 30, 0, 0), "batch": 1 << 30, "heads": 1 << 20}, 6),
    "kernel huge": ({"kernel": (HUGE, 3, 0)}, 6),
    "stride huge": ({"stride": (HUGE, 1, 0)}, 6),
    "dilation huge": ({"dilation": (HUGE, 1, 0)}, 6),
    "table too large": ({"kernel": (1 << 14, 1 << 14, 0)}, 7),
}
SIZE, HEADS, DIM = (5, 7), 2, 4


def c_problem(**changes) -> lib.CProblem:
    fields = (
        torch.float32,
        1,
        HEADS,
        DIM,
        DIM,
        SIZE,
        (3, 3),
        (1, 1),
        (1, 1),
        (0, 0),
        (1, 1),
        (0, 0),
        0.5,
        lib.AUTO,
        1,
    )
    problem = lib.CProblem.from_buffer_copy(lib.c_problem(*fields))
    for field, value in changes.items():
        setattr(problem, field, value)
    return problem


class Call:
    """A right call of the C ABI, to be made wrong; the memory that it writes is watched."""

    def __init__(self) -> None:
        self.maps = [torch.randn(1, HEADS, *SIZE, DIM) for _ in range(3)]
        self.written = [torch.full((1, HEADS, *SIZE, DIM), 7.0) for _ in range(4)]
        self.lse = torch.full((1, HEADS, *SIZE), 7.0)
        self.inputs = lib.c_inputs(*self.maps, None, [])
        self.out, *self.places = map(lib.c_tensor, self.written)
        self.gradients = lib.CGradients(*map(ctypes.pointer, self.places))

    def forward(self, problem: lib.CProblem) -> int:
        return lib.loaded().nearsight_forward(problem, self.inputs, self.out, self.lse.data_ptr())

    def backward(self, problem: lib.CProblem) -> int:
        args = self.inputs, self.out, self.lse.data_ptr(), self.out, self.gradients
        return lib.loaded().nearsight_backward(problem, *args)

    def untouched(self) -> bool:
        return all((tensor == 7).all() for tensor in (*self.written, self.lse))


@needs_library
def test_a_right_call():
    call = Call()
    assert call.forward(c_problem()) == lib.OK
    assert call.backward(c_problem()) == lib.OK
    assert not any((tensor == 7).any() for tensor in (*call.written, call.lse))


@needs_library
@pytest.mark.parametrize("name", LIES)
def test_lies_about_the_problem(name):
    changes, error = LIES[name]
    call, problem, library = Call(), c_problem(**changes), lib.loaded()
    assert library.nearsight_check(problem, 1) == call.forward(problem) == call.backward(problem) == error
    assert call.untouched()
    assert lib.text(error, library) not in ("", "no error")


def strides_of(tensor: lib.CTensor, *strides: int) -> None:
    tensor.strides[:] = (*strides, *tensor.strides[len(strides) :])


TENSOR_LIES = {
    "query NULL": (lambda call: setattr(call.inputs.query, "data", None), 2),
    "key NULL": (lambda call: setattr(call.inputs.key, "data", None), 2),
    "value NULL": (lambda call: setattr(call.inputs.value, "data", None), 2),
    "out NULL": (lambda call: setattr(call.out, "data", None), 2),
    "query's stride negative": (lambda call: strides_of(call.inputs.query, 0, -4), 5),
    "key's stride negative": (lambda call: strides_of(call.inputs.key, -1), 5),
    "value's stride beyond memory": (lambda call: strides_of(call.inputs.value, 0, HUGE), 6),
    "strides that overflow": (lambda call: strides_of(call.inputs.key, 0, (1 << 63) - 1, (1 << 63) - 1), 6),
}


@needs_library
@pytest.mark.parametrize("name", TENSOR_LIES)
def test_lies_about_tensors(name):
    lie, error = TENSOR_LIES[name]
    call = Call()
    lie(call)
    assert call.forward(c_problem()) == call.backward(c_problem()) == error
    assert call.untouched()


@needs_library
def test_what_is_written_may_not_be_expanded():
    call = Call()
    strides_of(call.out, 0, 0)
    assert call.forward(c_problem()) == 5
    call = Call()
    strides_of(call.places[1], 0, 0)
    call.gradients = lib.CGradients(*map(ctypes.pointer, call.places))
    assert call.backward(c_problem()) == 5
    assert call.untouched()


@needs_library
@every_isa
def test_the_check_knows_which_calls_need_too_much_scratch_memory(isa):
    library, tensor = lib.loaded(), lib.c_tensor
    query, key, value, out, incoming, *places = torch.randn(8, 1, 1, 96, 96, 1)
    gradients = lib.CGradients(*(ctypes.pointer(tensor(place)) for place in places))
    inputs, lse = lib.c_inputs(query, key, value, None, []), torch.empty(96, 96)
    sizes = {"batch": 1, "heads": 1, "head_dim": 1, "value_dim": 1, "size": (96, 96, 0)}
    for kernel, expected in ((191, 11), (3, lib.OK)):
        problem = c_problem(**sizes, kernel=(kernel, kernel, 0), isa=lib.ISAS.index(isa))
        assert library.nearsight_check(problem, 0) == lib.OK
        assert library.nearsight_forward(problem, inputs, tensor(out), lse.data_ptr()) == lib.OK
        found = library.nearsight_backward(problem, inputs, tensor(out), lse.data_ptr(), tensor(incoming), gradients)
        assert library.nearsight_check(problem, 1) == found == expected


@needs_library
def test_null_structures():
    call, problem, library = Call(), c_problem(), lib.loaded()
    assert library.nearsight_check(None, 1) == 2
    assert library.nearsight_forward(None, call.inputs, call.out, None) == 2
    assert library.nearsight_forward(problem, None, call.out, None) == 2
    assert library.nearsight_forward(problem, call.inputs, None, None) == 2
    lse = call.lse.data_ptr()
    assert library.nearsight_backward(problem, call.inputs, None, lse, call.out, call.gradients) == 2
    assert library.nearsight_backward(problem, call.inputs, call.out, None, call.out, call.gradients) == 2
    assert library.nearsight_backward(problem, call.inputs, call.out, lse, None, call.gradients) == 2
    assert library.nearsight_backward(problem, call.inputs, call.out, lse, call.out, None) == 2
    assert call.untouched()
    assert library.nearsight_isa_name(99) is None
    assert library.nearsight_error_string(-5)
    assert library.nearsight_error_string(99)


def test_structures_are_those_of_the_header(tmp_path):
    """The compiler's own sizes and offsets."""
    compiler = shutil.which("g++")
    assert compiler, "this test needs g++"
    structures = {
        "nearsight_problem": lib.CProblem,
        "nearsight_tensor": lib.CTensor,
        "nearsight_inputs": lib.CInputs,
        "nearsight_gradients": lib.CGradients,
        "nearsight_projection": lib.CProjection,
    }
    lines, expected = [], []
    for c_name, structure in structures.items():
        lines.append(f"sizeof({c_name})")
        expected.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            lines.append(f"offsetof({c_name}, {field})")
            expected.append(getattr(structure, field).offset)
    body = "\n".join(f'    printf("%zu\\n", (size_t){line});' for line in lines)
    (tmp_path / "sizes.cpp").write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "nearsight.h"\nint main() {{\n{body}\n}}\n'
    )
    program = tmp_path / "sizes"
    subprocess.run([compiler, f"-I{ROOT / 'csrc'}", "-o", program, tmp_path / "sizes.cpp"], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert [int(one) for one in found] == expected
    names = dict(re.findall(r"NEARSIGHT_(\w+) = (\d+)", (ROOT / "csrc" / "nearsight.h").read_text()))
    assert [names[f"ISA_{isa.upper()}"] for isa in lib.ISAS] == [str(n) for n in range(len(lib.ISAS))]
    assert [names[f"BORDER_{border.upper()}"] for border in BORDERS] == ["0", "1", "2", "3"]
    assert {names["FLOAT32"], names["BFLOAT16"]} == {str(number) for number in lib.DTYPES.values()}


# ------------------------------------------------------------------------------------------- C++ by itself, sanitizers

AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
FLAGS_OF = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}


@every_isa
def test_functions_of_a_vector(isa, tmp_path):
    """Exponential and logarithm against doubles; transposes, halves, pairs and extremes against plain loops."""
    compiler = shutil.which("g++")
    assert compiler, "this test needs g++"
    flags = ["-std=c++17", "-O2", "-ffp-contract=fast", "-Wno-psabi", *FLAGS_OF.get(isa, []), "-I", ROOT / "csrc"]
    program = tmp_path / "simd"
    subprocess.run([compiler, *flags, ROOT / "tests" / "native_simd.cpp", "-o", program], check=True)
    finished = subprocess.run([program], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    errors = re.search(r"exp2 (\S+), log (\S+)", finished.stdout)
    assert errors, finished.stdout
    assert float(errors[1]) < 1.8e-7
    assert float(errors[2]) < 2.3e-7


@pytest.mark.sweep
@every_isa
def test_under_sanitizers(tmp_path, isa):
    """Random geometries through the C ABI, every instruction set that can run, with AddressSanitizer and UBSan."""
    compiler = shutil.which("g++")
    assert compiler, "this test needs g++"
    flags = [
        "-std=c++17",
        "-g1",
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-I",
        ROOT / "csrc",
    ]
    # The least is in every build, and of the others one at a time: each takes a minute or two.
    kernels = {"baseline": [], **{name: flags for name, flags in FLAGS_OF.items() if name == isa}}
    defined = [f"-DNEARSIGHT_WITH_{name.upper()}" for name in kernels]
    units = {
        **{
            f"kernel_{name}": (ROOT / "csrc" / "kernel.cpp", [*of_isa, f"-DNEARSIGHT_KERNEL=kernel_{name}"])
            for name, of_isa in kernels.items()
        },
        **{file.stem: (file, defined) for file in (ROOT / "csrc").glob("*.cpp") if file.stem != "kernel"},
        "driver": (ROOT / "tests" / "native_driver.cpp", []),
    }

    def build(name: str) -> Path:
        source, more = units[name]
        target = tmp_path / f"{name}.o"
        subprocess.run([compiler, *flags, *more, "-Wno-psabi", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, units))
    program = tmp_path / "driver"
    subprocess.run([compiler, *flags, *objects, "-o", program], check=True)
    finished = subprocess.run([program, "300"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    assert "300 problems" in finished.stdout
