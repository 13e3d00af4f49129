# SPDX-License-Identifier: Apache-2.0
"""The geometry: against the oracle's, and every way to ask for a window that cannot be."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from dataclasses import FrozenInstanceError

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nearsight as ns
from nearsight.errors import DtypeError, NearsightError, OptionError, ShapeError
from nearsight.window import Axis

axes = st.builds(
    oracle.Axis,
    cells=st.integers(1, 20),
    kernel_size=st.integers(1, 25),
    stride=st.integers(1, 5),
    dilation=st.integers(1, 5),
    border=st.sampled_from(["mask", "zeros", "shift", "wrap"]),
    causal=st.booleans(),
    shared_by=st.integers(1, 25),
).map(lambda axis: axis._replace(shared_by=min(axis.shared_by, axis.kernel_size)))


def window_of(axis: oracle.Axis) -> ns.Window:
    options = {name: getattr(axis, name) for name in ("stride", "dilation", "border", "causal", "shared_by")}
    return ns.Window(axis.kernel_size, **options)


@given(axes)
def test_every_place_is_the_oracles(axis):
    (ours,) = window_of(axis).axes(1)
    assert window_of(axis).output_size((axis.cells,)) == (axis.queries,)
    neighbours = ours.neighbours(axis.cells)
    assert len(neighbours) == axis.queries
    for query, places in enumerate(neighbours):
        taking_part = [(axis.cells if cell == -2 else cell, entry) for cell, entry in places if cell != -1]
        assert taking_part == [(cell, entry) for _, cell, entry in oracle.places(axis, query)]
        assert all(0 <= entry < axis.table_size for _, entry in places)


@given(axes, st.data())
def test_places_of_chosen_queries(axis, data):
    (ours,) = window_of(axis).axes(1)
    queries = torch.tensor(data.draw(st.lists(st.integers(0, axis.queries - 1), max_size=4)), dtype=torch.long)
    assert torch.equal(ours.neighbours(axis.cells, queries), ours.neighbours(axis.cells)[queries])


@pytest.mark.parametrize("axis", [Axis(1599), Axis(1599, border="shift", dilation=2), Axis(1500, shared_by=100)])
def test_places_are_kept_by_nobody_and_are_no_python_objects(axis):
    tracemalloc.start()
    try:
        assert len(axis.neighbours(800)) == 800
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000  # tensors are not Python's memory; a tuple per place would be 140 MB
    assert now < 10_000


@given(axes)
def test_offsets_are_key_minus_query(axis):
    offsets = window_of(axis).offsets(1)[0]
    assert len(offsets) == window_of(axis).table_size(1)[0] == axis.table_size
    for query in range(axis.queries):
        for _, cell, entry in oracle.places(axis, query):
            if cell < axis.cells:
                distance = cell - query * axis.stride - offsets[entry]
                assert distance % axis.cells == 0 if axis.border == "wrap" else distance == 0


@given(axes)
def test_covers_means_all_cells_once_and_nothing_else(axis):
    blocks = [[cell for _, cell, _ in oracle.places(axis, query)] for query in range(axis.queries)]
    sees_all = all(sorted(block) == list(range(axis.cells)) for block in blocks)
    if window_of(axis).covers((axis.cells,)):
        assert sees_all
    # The other way round it need not see every chance; but these it has to.
    if axis.border in ("mask", "shift") and not axis.causal and axis.dilation == 1 and axis.stride == 1:
        assert window_of(axis).covers((axis.cells,)) == sees_all


SHARED = {  # of six or seven cells in a row: for each query the cells that it sees
    "Swin's blocks": (7, ns.Window(3, shared_by=3), ["012", "012", "012", "345", "345", "345", "6"]),
    "HaloNet's blocks of 2 with a halo of 1": (
        6,
        ns.Window(4, shared_by=2),
        ["012", "012", "1234", "1234", "345", "345"],
    ),
    "NATTEN's stride": (7, ns.Window(4, shared_by=3, border="shift"), ["0123"] * 3 + ["2345"] * 3 + ["3456"]),
    "causal": (7, ns.Window(3, shared_by=2, causal=True), ["0", "01", "12", "123", "34", "345", "456"]),
    "causal shift": (
        7,
        ns.Window(3, shared_by=2, causal=True, border="shift"),
        ["0", "01", "12", "123", "34", "345", "456"],
    ),
    "dilated": (7, ns.Window(2, shared_by=2, dilation=2), ["02", "13", "02", "13", "46", "5", "46"]),
    "every second query": (7, ns.Window(3, shared_by=3, stride=2), ["012", "012", "345", "6"]),
    "around": (6, ns.Window(4, shared_by=2, border="wrap"), ["5012", "5012", "1234", "1234", "3450", "3450"]),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_windows_counted_by_hand(name):
    cells, window, seen = SHARED[name]
    (axis,) = window.axes(1)
    found = ["".join(str(int(cell)) for cell, _ in places if cell >= 0) for places in axis.neighbours(cells)]
    assert found == seen


def test_everywhere_covers():
    for size in [(1,), (7,), (3, 5), (2, 1, 4)]:
        window = ns.Window.everywhere(size)
        assert window.covers(size)
        assert window.table_size(len(size)) == tuple(2 * n - 1 for n in size)


def test_one_value_is_for_all_axes():
    assert ns.Window(7, stride=2).output_size((56, 29)) == (28, 15)
    assert ns.Window(3).offsets(2) == ((-1, 0, 1), (-1, 0, 1))
    assert ns.Window((2, 3)).offsets(2) == ((-1, 0), (-1, 0, 1))
    assert ns.Window(4, dilation=(1, 2)).offsets(2) == ((-2, -1, 0, 1), (-4, -2, 0, 2))
    assert ns.Window(3, causal=(True, False)).offsets(2) == ((-2, -1, 0), (-1, 0, 1))
    assert ns.Window(2, border="shift", dilation=3).offsets(1) == ((-3, 0, 3),)
    assert ns.Window([3, 5]) == ns.Window((3, 5))
    assert ns.Window(np.int64(3)) == ns.Window(3)


def test_a_window_is_a_value():
    window = ns.Window((3, 5), stride=2, border="shift")
    assert window == ns.Window((3, 5), stride=2, border="shift")
    assert window != ns.Window((3, 5), stride=2)
    assert len({window, copy.deepcopy(window), pickle.loads(pickle.dumps(window))}) == 1
    with pytest.raises(FrozenInstanceError):
        window.stride = 3
    assert eval(repr(window), {"Window": ns.Window}) == window


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        ns.Window(3, 2)


WRONG = {
    "kernel 0": ((0,), {}, OptionError, "kernel_size must be at least 1; received 0"),
    "negative kernel": (((3, -5),), {}, OptionError, r"kernel_size must be at least 1; received \(3, -5\)"),
    "negative stride": ((3,), {"stride": -2}, OptionError, "stride must be at least 1; received -2"),
    "dilation 0": ((3,), {"dilation": (1, 0)}, OptionError, r"dilation must be at least 1; received \(1, 0\)"),
    "float kernel": ((3.0,), {}, DtypeError, "kernel_size must be an int.*received 3.0"),
    "bool kernel": ((True,), {}, DtypeError, "kernel_size must be an int.*received True"),
    "bool stride": ((3,), {"stride": (1, True)}, DtypeError, r"stride must be an int.*received \(1, True\)"),
    "text": (("7",), {}, DtypeError, "kernel_size must be an int.*received '7'"),
    "nothing": ((None,), {}, DtypeError, "kernel_size must be an int.*received None"),
    "unknown border": (
        (3,),
        {"border": "reflect"},
        OptionError,
        "mask, zeros, shift, wrap, .* per axis; received 'reflect'",
    ),
    "border in capitals": ((3,), {"border": "Mask"}, OptionError, "received 'Mask'"),
    "unknown border of an axis": ((3,), {"border": ("wrap", "mirror")}, OptionError, r"received \('wrap', 'mirror'\)"),
    "borders of other axes": (((3, 5),), {"border": ("mask",)}, ShapeError, "'kernel_size': 2, 'border': 1"),
    "border None": ((3,), {"border": None}, OptionError, "received None"),
    "causal int": ((3,), {"causal": 1}, DtypeError, "causal must be a bool.*received 1"),
    "causal text": ((3,), {"causal": ("yes", False)}, DtypeError, "causal must be a bool.*'yes'"),
    "shared by 0": ((3,), {"shared_by": 0}, OptionError, "shared_by must be at least 1; received 0"),
    "shared by more than it holds": (
        ((5, 3),),
        {"shared_by": 4},
        OptionError,
        r"received shared_by=4, kernel_size=\(5, 3\)",
    ),
    "unequal lengths": (((3, 5),), {"stride": (1, 2, 3)}, ShapeError, "'kernel_size': 2, 'stride': 3"),
    "four axes": (((3, 3, 3, 3),), {}, ShapeError, "1 to 3 axes; received 4"),
    "no axes": (((),), {}, ShapeError, "1 to 3 axes; received 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_windows(name):
    arguments, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        ns.Window(*arguments, **options)


def test_a_window_for_other_axes():
    with pytest.raises(ShapeError, match="has 2 axes but the map has 3"):
        ns.Window((3, 5)).output_size((4, 4, 4))


def test_errors_are_also_pythons_own():
    """Whoever catches ValueError or TypeError goes on working; whoever wants all of ours catches one."""
    assert issubclass(ShapeError, ValueError)
    assert issubclass(OptionError, ValueError)
    assert issubclass(DtypeError, TypeError)
    assert issubclass(ShapeError, NearsightError)
