# SPDX-License-Identifier: Apache-2.0
"""docs/reference/backends.md says what the code does, and what is chosen on which device."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nearsight as ns
from nearsight.attention import natten
from nearsight.attention.problem import Call

FILE = Path(__file__).parents[1] / "docs" / "reference" / "backends.py"
spec = importlib.util.spec_from_file_location("docs_backends", FILE)
assert spec is not None
assert spec.loader is not None
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


def test_page_is_current():
    assert docs.PAGE.read_text() == docs.page(), "run: python docs/reference/backends.py"


def test_page_would_notice_a_change(monkeypatch):
    monkeypatch.setattr(natten, "why_not", lambda problem: None)
    assert docs.PAGE.read_text() != docs.page()


def test_page_says_what_runs_here():
    """For the CPU the answers can be tried: a plain call takes the backend that the table names."""
    rows = {(device, dtype): chosen for device, dtype, chosen, *_ in docs.choices()}
    for dtype in docs.DTYPES:
        x = torch.randn(1, 2, 9, 11, 16, dtype=dtype)
        name = rows["cpu", docs._name(dtype)].strip("`")
        able = ns.backends()[name] is None
        window = ns.Window(3, border="shift")
        found = ns.local_attention(x, x, x, window)
        assert torch.equal(found, ns.local_attention(x, x, x, window, backend=name if able else "blocked"))


def chosen(**changes) -> str:
    """The backend that would be taken on a machine with the device and without NATTEN."""
    asked = docs.problem(ns.Window(3, border="shift"), **changes)
    return docs.first_choice(asked, [backend for backend in docs.BACKENDS if backend is not natten]).name


@pytest.mark.parametrize("grad", [False, True])
def test_choice_by_device(grad):
    assert chosen(device="cuda", needs_grad=grad) == "flex"
    assert chosen(device="cuda", needs_grad=grad, dtype=torch.float64) == "blocked"
    assert chosen(device="cuda", needs_grad=grad, compiling=True) == "flex"
    assert chosen(device="cuda", needs_grad=grad, compiling=True, exporting=True) == "blocked"
    assert chosen(device="mps", needs_grad=grad) == chosen(device="xpu", needs_grad=grad) == "blocked"
    assert chosen(device="cpu", needs_grad=grad) == "native"
    assert chosen(device="cpu", compiling=True, exporting=True) == "blocked"


NATTEN_TAKES = {"device": "cuda", "dtype": torch.float16}


@pytest.mark.parametrize(
    ("window", "changes", "reason"),
    [
        (ns.Window(3, border="shift"), {}, None),
        (ns.Window(3, border="shift", dilation=3, causal=(True, False)), {"needs_grad": True}, None),
        (ns.Window(3, border="shift", dilation=4), {}, "fit into the map"),
        (ns.Window(3), {}, "slide inwards"),
        (ns.Window(3, border="shift", stride=2), {}, "every query"),
        (ns.Window(3, border="shift"), {"bias": True}, "no position terms"),
        (ns.Window(3, border="shift"), {"relative": True}, "no position terms"),
        (ns.Window(3, border="shift"), {"head_dim": 12}, "one head_dim, a multiple of 8"),
        (ns.Window(3, border="shift"), {"lse": True}, "log-sum-exp"),
        (ns.Window(3, border="shift"), {"compiling": True}, "outside of torch.compile"),
        (ns.Window(3, border="shift"), {"device": "cpu"}, "CUDA"),
    ],
)
def test_what_natten_is_given(window, changes, reason):
    found = natten.why_not(docs.problem(window, **{**NATTEN_TAKES, **changes}))
    assert found is None if reason is None else reason in found


def test_natten_is_called_heads_last(monkeypatch):
    """A stand-in for the package that computes na2d as its documentation defines it, by our reference."""

    class Natten:
        @staticmethod
        def na2d(query, key, value, kernel_size, dilation, is_causal, scale):
            assert all(tensor.is_contiguous() for tensor in (query, key, value))
            window = ns.Window(kernel_size, dilation=dilation, causal=is_causal, border="shift")
            maps = (tensor.movedim(-2, 1) for tensor in (query, key, value))
            return ns.local_attention(*maps, window, scale=scale, backend="reference").movedim(1, -2)

    monkeypatch.setattr(natten, "_natten", lambda: Natten)
    window = ns.Window((3, 2), dilation=(2, 3), causal=(True, False), border="shift")
    q, k, v = torch.randn(3, 2, 3, 11, 8, 16)
    asked = replace(docs.problem(window, (11, 8)), batch=2, num_heads=3)
    found, _ = natten.attend(Call(q, k, v, None, None, 0.3), asked)
    torch.testing.assert_close(found, ns.local_attention(q, k, v, window, scale=0.3))
