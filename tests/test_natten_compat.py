# SPDX-License-Identifier: Apache-2.0
"""The stand-in for NATTEN: every call against plain loops in float64, values and gradients, and networks that call it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pydoc
import subprocess
import sys
from contextlib import contextmanager
from itertools import product
from types import ModuleType, SimpleNamespace

import natten_cases
import natten_names
import natten_oracle
import numpy as np
import oracle
import pytest
import torch
from conftest import assert_near
from torch import Tensor, nn

import nearsight as ns
from nearsight.attention import native
from nearsight.attention import natten as natten_backend
from nearsight.bench.memory import NOTHING_KEPT
from nearsight.compat import natten as stand_in
from nearsight.compat.natten import __main__ as program
from nearsight.compat.natten import context, flops, functional, modules, split, utils, windows
from nearsight.errors import DtypeError, OptionError, ShapeError

# ------------------------------------------------------------------------------------------------------------ the windows

AXES = [  # cells, kernel_size, dilation, causal
    (9, 3, 1, False),
    (9, 4, 1, False),
    (11, 3, 3, False),
    (11, 5, 3, False),  # a phase of 3 cells and windows of 5
    (4, 7, 1, False),
    (10, 4, 1, True),
    (11, 3, 2, True),
    (7, 1, 1, False),
]


@pytest.mark.parametrize(("cells", "kernel_size", "dilation", "causal"), AXES)
def test_the_loops_agree_with_the_oracle_of_the_operation(cells, kernel_size, dilation, causal):
    axis = oracle.Axis(cells, kernel_size, 1, dilation, "shift", causal)
    for query in range(cells):
        expected = [(cell, entry) for _, cell, entry in oracle.places(axis, query)]
        found = natten_oracle.seen_along(cells, kernel_size, 1, dilation, causal, query)
        assert [(cell, (cell - query) // dilation + kernel_size - 1) for cell in found] == expected


WINDOWS = {  # cells, kernel_size, stride, causal -> the first and the last cell of every query, counted out by hand
    (7, 3, 2, False): [(0, 2), (0, 2), (2, 4), (2, 4), (4, 6), (4, 6), (4, 6)],
    (6, 3, 3, False): [(0, 2)] * 3 + [(3, 5)] * 3,  # Swin's blocks
    (8, 4, 4, False): [(0, 3)] * 4 + [(4, 7)] * 4,
    (7, 4, 3, False): [(0, 3)] * 3 + [(2, 5)] * 3 + [(3, 6)],
    (7, 3, 2, True): [(0, 0), (0, 1), (1, 2), (1, 3), (3, 4), (3, 5), (4, 6)],
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_that_groups_of_queries_share(case):
    cells, kernel_size, stride, causal = case
    for query, (first, last) in enumerate(WINDOWS[case]):
        seen = list(range(first, last + 1))
        assert natten_oracle.seen_along(cells, kernel_size, stride, 1, causal, query) == seen
    (axis,) = windows.window_of(1, kernel_size, stride, 1, causal).axes(1)
    first, last = windows.seen_by(axis, torch.arange(cells), torch.tensor(cells))
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == WINDOWS[case]


# ------------------------------------------------------------------------------------------------------------ fused calls

FUSED = {
    "one axis": ((13,), {"kernel_size": 5}, {}),
    "two axes": ((7, 11), {"kernel_size": 3}, {}),
    "three axes": ((3, 5, 4), {"kernel_size": (2, 3, 3)}, {}),
    "even": ((7, 6), {"kernel_size": (4, 2)}, {}),
    "dilated": ((9, 11), {"kernel_size": 3, "dilation": (2, 3)}, {}),
    "causal": ((9, 5), {"kernel_size": (4, 3), "is_causal": (True, False)}, {}),
    "causal and dilated": ((11,), {"kernel_size": 3, "dilation": 2, "is_causal": True}, {}),
    "scale": ((5, 6), {"kernel_size": 3, "scale": 1.0}, {}),
    "a scale of zero": ((5, 6), {"kernel_size": 3, "scale": 0.0}, {}),  # the default, in every NATTEN
    "bias": ((7, 9), {"kernel_size": (3, 5), "dilation": (2, 1)}, {"rpb": True}),
    "grouped heads": ((6, 7), {"kernel_size": 3}, {"heads": (4, 2)}),
    "wide values": ((6, 7), {"kernel_size": 3}, {"dims": (5, 9)}),
    "small map": ((3, 8), {"kernel_size": 5}, {"rpb": True}),
    "additional keys": ((6, 7), {"kernel_size": 3}, {"additional": 4}),
    "additional keys, grouped": ((9,), {"kernel_size": 4, "is_causal": True}, {"additional": 2, "heads": (4, 2)}),
    "shared windows": ((7, 11), {"kernel_size": (3, 5), "stride": (2, 3)}, {}),
    "blocks": ((6, 8), {"kernel_size": (3, 4), "stride": (3, 4)}, {"additional": 3}),
    "shared windows, dilated": ((11, 10), {"kernel_size": (3, 4), "stride": (2, 1), "dilation": (3, 2)}, {}),
    "shared windows, causal": ((9, 6), {"kernel_size": 4, "stride": (3, 2), "is_causal": (True, False)}, {}),
    "shared windows, grouped": ((4, 3, 5), {"kernel_size": 2, "stride": (1, 2, 2)}, {"heads": (4, 2), "dims": (3, 6)}),
    "shared windows, small map": ((3, 7), {"kernel_size": 5, "stride": 3}, {}),
}


def tensors_of(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    size, options, more = FUSED[name]
    (heads, groups), (d, e) = more.get("heads", (3, 3)), more.get("dims", (8, 8))
    shapes = {"query": (heads, d), "key": (groups, d), "value": (groups, e)}
    found = {part: torch.randn(2, *size, *shape) for part, shape in shapes.items()}
    if "additional" in more:
        for part, width in (("additional_keys", d), ("additional_values", e)):
            found[part] = torch.randn(2, more["additional"], groups, width)
    if "rpb" in more:
        found["rpb"] = torch.randn(heads, *(2 * k - 1 for k in natten_oracle.each(options["kernel_size"], len(size))))
    return {part: tensor.to(dtype) for part, tensor in found.items()}, options


def outcomes(call, inputs: dict[str, Tensor], signed: bool = True, **options) -> dict[str, Tensor]:
    """What a call returns, and the gradients of one weighted sum of it all by every input.

    Not ``signed``, of the absolute values of inputs and weights.
    """
    if not signed:
        inputs = {name: tensor.abs() for name, tensor in inputs.items()}
    inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    found = call(**inputs, **options)
    found = found if isinstance(found, tuple) else (found,)
    total = torch.zeros((), dtype=torch.float64)
    for one in found:
        seen = torch.linspace(-1, 2, one.numel(), dtype=torch.float64).reshape(one.shape)
        seen = seen if signed else seen.abs()
        # A place without a cell has the logit -inf, of which nothing is to be known.
        total = total + (seen * one.double().masked_fill(one.isinf(), 0)).sum()
    grads = torch.autograd.grad(total, list(inputs.values()))
    results = {f"result {number}": one.detach() for number, one in enumerate(found)}
    return results | {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def check(
    call, expected_call, inputs: dict[str, Tensor], condition: float = 4, linear: bool = False, **options
) -> None:
    """Hold ``call`` to ``expected_call``; of one that is ``linear`` in every input, long sums may cancel.

    The gradient by a key that every cell sees is a sum over the map. Its error follows the sizes of its terms and the order
    in which the machine's matrix product adds them, however small the sum: each gets a rounding of the sum of their absolute
    values, which is the same gradient of the same call with all signs taken away.
    """
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    expected = outcomes(expected_call, doubles, **options)
    found = outcomes(call, inputs, **options)
    sizes = outcomes(expected_call, doubles, signed=False, **options) if linear else {}
    for name, one in found.items():
        nothing = one.isinf()
        assert torch.equal(nothing, expected[name].isinf()), name
        reference = expected[name].masked_fill(nothing, 0).numpy()
        slack = torch.finfo(one.dtype).eps * sizes[name].masked_fill(nothing, 0).numpy() if linear else 0.0
        assert_near(name, one.masked_fill(nothing, 0), reference, condition, slack)


def check_fused(name: str, dtype: torch.dtype = torch.float32) -> None:
    inputs, options = tensors_of(name, dtype)
    call = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}[len(FUSED[name][0])]
    check(call, natten_oracle.na, inputs, **options, return_lse=True)


@pytest.mark.parametrize("name", FUSED)
def test_fused_calls(name):
    check_fused(name)


@pytest.mark.parametrize("name", ["causal", "bias", "shared windows, grouped", "additional keys"])
def test_fused_calls_in_float64(name):
    check_fused(name, torch.float64)


@pytest.mark.parametrize("name", ["dilated", "shared windows"])
def test_fused_calls_in_half_precision(name):
    inputs, options = tensors_of(name, torch.bfloat16)
    expected = natten_oracle.na(**{part: tensor.double() for part, tensor in inputs.items()}, **options)
    assert_near("result", functional.na2d(**inputs, **options), expected.numpy(), 4)


def test_the_generic_call_takes_what_chooses_a_kernel():
    inputs, options = tensors_of("three axes", torch.float32)
    tiles = dict.fromkeys(
        ("q_tile_shape", "kv_tile_shape", "backward_q_tile_shape", "backward_kv_tile_shape"), (2, 2, 2)
    )
    kernel = {
        "backend": "hopper-fna",
        "backward_kv_splits": (1, 1, 1),
        "run_persistent_kernel": False,
        "torch_compile": True,
    }
    kernel |= {
        "kernel_schedule": "coop",
        "backward_use_pt_reduction": True,
        "attention_kwargs": {"backend": "cutlass-fmha"},
    }
    plain = functional.na3d(**inputs, **options)
    assert torch.equal(functional.neighborhood_attention_generic(**inputs, **options, **tiles, **kernel), plain)


@pytest.mark.parametrize("spot", [0, 5])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_the_windows_that_see_it(poison, spot):
    query, key, value = torch.randn(3, 1, 9, 1, 4)
    window = {"kernel_size": 3, "stride": 2}
    clean = functional.na1d(query, key, value, **window)
    value[0, spot, 0, 1] = poison
    found = functional.na1d(query, key, value, **window)
    sees = torch.tensor([spot in natten_oracle.seen_along(9, 3, 2, 1, False, query) for query in range(9)])
    assert sees.any()
    assert not sees.all()
    torch.testing.assert_close(found[0, ~sees], clean[0, ~sees])
    assert not found[0, sees].isfinite().all(-1).any()


def heads_last(*size: int, dim: int = 8) -> Tensor:
    return torch.randn(2, *size, 4, dim)


CONTIGUOUS = {
    "plain": lambda q: functional.na2d(q, q, q, kernel_size=3, return_lse=True),
    "the map covered": lambda q: functional.na2d(q, q, q, kernel_size=9),
    "window stride": lambda q: functional.na2d(q, q, q, kernel_size=3, stride=2, return_lse=True),
    "fewer heads of keys": lambda q: functional.na2d(q, q[..., :2, :], q[..., :2, :], kernel_size=3, return_lse=True),
    "wide values": lambda q: functional.na2d(q, q, torch.cat([q, q], -1), kernel_size=3, return_lse=True),
    "additional keys": lambda q: functional.na2d(
        q, q, q, kernel_size=3, additional_keys=q[:, 0], additional_values=q[:, 0], return_lse=True
    ),
    "a bias": lambda q: functional.na2d(q, q, q, kernel_size=3, rpb=q.new_zeros(4, 5, 5)),
    "nothing": lambda q: functional.na2d(q[:0], q[:0], q[:0], kernel_size=3, return_lse=True),
    "attention": lambda q: functional.attention(q[:, 0], q[:, 0], q[:, 0], return_lse=True),
    "merged": lambda q: functional.merge_attentions([q, q], [q[..., 0], q[..., 0]]),
    "split": lambda q: (functional.na2d_qk(q, q, 3), functional.na2d_av(q.new_ones(*q.shape[:-1], 9), q, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CONTIGUOUS)
def test_results_are_contiguous(case, dtype):
    """Clients go on with ``view``, whatever backend there was and however their maps lay."""
    plain = heads_last(9, 8).to(dtype)
    planar = plain.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    turned = plain.transpose(1, 2).contiguous().transpose(1, 2)
    for maps in (plain, planar, turned):
        found = CONTIGUOUS[case](maps)
        assert all(one.is_contiguous() for one in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("nothing", [0, 0.0, False, None])
def test_a_scale_of_nothing_is_the_default(nothing):
    """``scale or default`` in every NATTEN, of calls and of modules."""
    maps = [heads_last(7) for _ in range(3)]
    window = {"kernel_size": 3}
    assert torch.equal(functional.na1d(*maps, **window, scale=nothing), functional.na1d(*maps, **window))
    assert torch.equal(functional.attention(*maps, scale=nothing), functional.attention(*maps))
    assert LAYERS[2](8, 2, 3, qk_scale=nothing).scale == 0.5
    fused = functional.FusedNeighborhoodAttention1D.apply(*maps, None, 3, 1, False, nothing, None, None)
    assert torch.equal(fused[0], functional.na1d(*maps, **window))


def test_none_is_the_default_of_a_window():
    maps = [heads_last(7, 6) for _ in range(3)]
    none = {"stride": None, "dilation": None, "is_causal": None}
    assert torch.equal(functional.na2d(*maps, kernel_size=3, **none), functional.na2d(*maps, kernel_size=3))
    logits = functional.na2d_qk(*maps[:2], 3)
    assert torch.equal(functional.na2d_qk(*maps[:2], 3, None, None, None), logits)
    assert torch.equal(functional.natten2dqkrpb(*maps[:2], None, 3, None), logits)
    assert torch.equal(functional.na2d_av(logits, maps[2], 3, None), functional.na2d_av(logits, maps[2], 3))
    layer = LAYERS[2](8, 2, 3, **none)
    assert (layer.stride, layer.dilation, layer.is_causal) == ((1, 1), (1, 1), (False, False))
    assert LAYERS[3](8, 2, 3, dilation=None, dilation_d=2).dilation == (2, 1, 1)
    assert utils.check_all_args(2, 3, None, None) == ((3, 3), (1, 1), (False, False))
    assert utils.check_all_args(1, 3, None, None, None) == ((3,), (1,), (1,), (False,))
    assert utils.check_dilation_arg(2, None) == utils.check_stride_arg(2, None) == (1, 1)
    assert utils.check_causal_arg(2, None) == (False, False)


def test_attention_of_all_to_all():
    def expected(query, key, value, is_causal):
        groups = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
        logits = torch.einsum("blnd, bsnd -> bnls", query, key) * query.shape[-1] ** -0.5
        if is_causal:
            hidden = [[s > row for s in range(key.shape[1])] for row in range(query.shape[1])]
            logits = logits.masked_fill(torch.tensor(hidden), float("-inf"))
        return torch.einsum("bnls, bsne -> blne", logits.softmax(-1), value), logits.logsumexp(-1).transpose(1, 2)

    inputs = {"query": torch.randn(2, 5, 4, 8), "key": torch.randn(2, 7, 2, 8), "value": torch.randn(2, 7, 2, 3)}
    for causal in (False, True):
        check(
            lambda **given: functional.attention(**given, return_lse=True),
            expected,
            inputs,
            is_causal=causal,
        )


def test_two_windows_merge_into_one_attention():
    """A sequence cut into two sets of keys, attended apart."""
    query, key, value = torch.randn(3, 1, 12, 2, 8).double()
    parts = [functional.attention(query, key[:, s], value[:, s], return_lse=True) for s in (slice(5), slice(5, None))]
    out, lse = functional.merge_attentions(*map(list, zip(*parts, strict=True)))
    whole, whole_lse = functional.attention(query, key, value, return_lse=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


# --------------------------------------------------------------------------------------------------- NATTEN's own answers


@pytest.fixture(scope="module")
def of_natten():
    with np.load(natten_cases.FILE) as file:
        return dict(file)


def check_answers(name: str, of_natten) -> None:
    torch.manual_seed(0)
    answers = natten_cases.answers(as_natten(), name)
    assert sum(key.rpartition("/")[0] == name for key in of_natten) == len(answers)
    for place, found in enumerate(answers):
        assert_near(f"result {place}", found, of_natten[f"{name}/{place}"].astype(np.float64), 4)


def as_natten() -> SimpleNamespace:
    return SimpleNamespace(**{name: getattr(one, name) for one in (functional, modules) for name in one.__all__})


def test_the_file_holds_all_cases(of_natten):
    """It is written anew by tests/make_natten_cases.py."""
    assert of_natten.pop("natten") == natten_cases.VERSION
    of_natten.pop("torch")
    assert {key.rpartition("/")[0] for key in of_natten} == set(natten_cases.NAMES)


@pytest.mark.parametrize("name", natten_cases.NAMES)
def test_the_answers_of_natten_itself(name, of_natten):
    check_answers(name, of_natten)


# ------------------------------------------------------------------------------------------------------------ split calls

SPLIT = {
    "one axis": ((13,), {"kernel_size": 5}),
    "two axes": ((7, 11), {"kernel_size": 3}),
    "three axes": ((3, 5, 4), {"kernel_size": (2, 3, 3)}),
    "even": ((7, 6), {"kernel_size": (4, 2)}),
    "dilated": ((9, 11), {"kernel_size": 3, "dilation": (2, 3)}),
    "dilated, phases of unlike length": ((7, 10), {"kernel_size": (3, 2), "dilation": (2, 4)}),
    "causal": ((9, 5), {"kernel_size": (4, 3), "is_causal": (True, False)}),
    "causal and dilated": ((11,), {"kernel_size": 3, "dilation": 2, "is_causal": True}),
    "small map": ((3, 8), {"kernel_size": 5}),
    "large": ((17, 19), {"kernel_size": 7}),
}


def check_split(name: str, dtype: torch.dtype = torch.float32) -> None:
    size, options = SPLIT[name]
    rank = len(size)
    sizes = natten_oracle.each(options["kernel_size"], rank)
    query, key = torch.randn(2, 2, 3, *size, 8)
    maps = {"query": query, "key": key, "additional_keys": torch.randn(2, 3, 4, 8)}
    maps["rpb"] = torch.randn(3, *(2 * k - 1 for k in sizes))
    qk = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}[rank]
    check(qk, natten_oracle.qk, {part: tensor.to(dtype) for part, tensor in maps.items()}, linear=True, **options)

    cells = natten_oracle.table(size, sizes)[0].shape[1]
    maps = {"attn": torch.randn(2, 3, *size, cells + 4), "value": torch.randn(2, 3, *size, 5)}
    maps["additional_values"] = torch.randn(2, 3, 4, 5)
    av = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}[rank]
    check(av, natten_oracle.av, {part: tensor.to(dtype) for part, tensor in maps.items()}, linear=True, **options)


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("way", ["windows are copied", "blocks"])
def test_split_calls(name, way, monkeypatch):
    """As on a small map and as on a large one."""
    monkeypatch.setattr(windows, "GATHERED", 0 if way == "blocks" else 1 << 30)
    check_split(name)


@pytest.mark.parametrize("name", ["dilated", "causal"])
@pytest.mark.parametrize("limit", [0, windows.GATHERED])
def test_split_calls_in_float64(name, limit, monkeypatch):
    monkeypatch.setattr(windows, "GATHERED", limit)
    check_split(name, torch.float64)


def test_what_is_kept_of_a_window_serves_inference_and_training():
    """Made first in inference mode, whose tensors autograd does not take."""
    query = torch.randn(1, 2, 37, 4)
    with torch.inference_mode():
        expected = functional.na1d_qk(query, query, 3)
    query.requires_grad_()
    found = functional.na1d_qk(query, query, 3)
    torch.testing.assert_close(found, expected.clone())
    (grad,) = torch.autograd.grad(found.square().sum(), query)
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_small_maps_take_few_steps():
    """An audio network's size: 300 frames; every step of PyTorch takes longer than its numbers do."""
    query, attn = torch.randn(1, 8, 300, 12), torch.randn(1, 8, 300, 5)
    for call in (lambda: functional.na1d_qk(query, query, 5), lambda: functional.na1d_av(attn, query, 5)):
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        assert 0 < sum(event.name.startswith("aten::") for event in profile.events()) < 60  # blocks take 190


def test_split_calls_take_views():
    """Heads first, as seen from a map with heads last: what clients make of one projection."""
    x = torch.randn(2, 7, 6, 3, 4, 8)
    query, key, value = x.permute(3, 0, 4, 1, 2, 5)
    found = functional.na2d_qk(query, key, 3)
    assert torch.equal(found, functional.na2d_qk(query.contiguous(), key.contiguous(), 3))
    assert torch.equal(functional.na2d_av(found, value, 3), functional.na2d_av(found, value.contiguous(), 3))


def test_split_calls_have_derivatives_of_every_order():
    query, key = torch.randn(2, 1, 1, 3, 4, 2).double().requires_grad_()
    weights, value = torch.randn(1, 1, 3, 4, 4).double(), torch.randn(1, 1, 3, 4, 2).double()
    window = (2, (1, 2))
    torch.autograd.gradgradcheck(lambda q, k: functional.na2d_qk(q, k, *window), (query, key), fast_mode=True)
    inputs = (weights.requires_grad_(), value.requires_grad_())
    torch.autograd.gradgradcheck(lambda a, v: functional.na2d_av(a, v, *window), inputs, fast_mode=True)
    torch.autograd.gradcheck(
        lambda q, k: functional.na2d_qk(q, k, *window), (query, key), check_forward_ad=True, fast_mode=True
    )
    torch.autograd.gradcheck(
        lambda a, v: functional.na2d_av(a, v, *window), inputs, check_forward_ad=True, fast_mode=True
    )


def test_split_calls_under_vmap():
    query, keys = torch.randn(1, 2, 5, 6, 4), torch.randn(3, 1, 2, 5, 6, 4)
    one_by_one = torch.stack([functional.na2d_qk(query, key, 3) for key in keys])
    torch.testing.assert_close(torch.vmap(lambda key: functional.na2d_qk(query, key, 3))(keys), one_by_one)


COMPILED = {
    "fused": lambda q: functional.na2d(q, q, q, kernel_size=5, dilation=2),
    "causal, with log-sum-exp": lambda q: functional.na2d(q, q, q, kernel_size=5, is_causal=True, return_lse=True)[1],
    "window stride": lambda q: functional.na2d(q, q, q, kernel_size=6, stride=3),
    "extra keys": lambda q: functional.na2d(
        q, q, q, kernel_size=3, additional_keys=q[:, :2, 0], additional_values=q[:, :2, 0]
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("fused", "extra keys") else pytest.mark.sweep) for name in COMPILED],
)
def test_fused_calls_compile_as_one_graph(name):
    query = torch.randn(2, 12, 13, 2, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], backend="aot_eager", fullgraph=True)
    eager = COMPILED[name](query)
    expected = torch.autograd.grad(eager.square().sum(), query)
    found = compiled(query)
    torch.testing.assert_close(found, eager)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), query), expected)


def test_split_calls_compile_in_pieces():
    query = torch.randn(1, 2, 9, 8, 4, requires_grad=True)

    def attend(query):
        return functional.na2d_av(functional.na2d_qk(query, query, 5, 1).softmax(-1), query, 5, 1)

    torch._dynamo.reset()
    eager, found = attend(query), torch.compile(attend, backend="aot_eager")(query)
    torch.testing.assert_close(found, eager)
    torch.testing.assert_close(*(torch.autograd.grad(one.square().sum(), query) for one in (found, eager)))


def test_autocast_leaves_the_calls_alone():
    query, key, value = torch.randn(3, 1, 2, 6, 7, 8)
    weights = functional.na2d_qk(query, key, 3)
    out, fused = functional.na2d_av(weights, value, 3), functional.na2d(query, key, value, 3, stride=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.na2d_qk(query, key, 3), weights)
        assert torch.equal(functional.na2d_av(weights, value, 3), out)
        assert torch.equal(functional.na2d(query, key, value, 3, stride=2), fused)


def test_weights_are_converted_to_the_dtype_of_the_value():
    """A softmax under autocast is float32, where the value is bfloat16."""
    weights, value = torch.rand(1, 2, 5, 6, 9), torch.randn(1, 2, 5, 6, 4).bfloat16()
    assert functional.na2d_av(weights, value, 3).dtype == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------- older names


@pytest.mark.parametrize("rank", [1, 2])
def test_older_names(rank):
    size, window = (9, 7)[:rank], (3, 2)
    query, key, value = torch.randn(3, 1, 2, *size, 4)
    rpb = torch.randn(2, *[5] * rank)
    scores = natten_oracle.qk(query, key, *window)
    biased = natten_oracle.qk(query, key, *window, rpb=rpb)
    out = natten_oracle.av(biased, value, *window)

    def near(name: str, *arguments, expected: Tensor) -> None:
        call = getattr(functional, name)
        torch.testing.assert_close(getattr(call, "apply", call)(*arguments), expected)

    near(f"natten{rank}dqk", query, key, *window, expected=scores)
    near(f"natten{rank}dqkrpb", query, key, rpb, *window, expected=biased)
    near(f"natten{rank}dqkrpb", query, key, None, *window, expected=scores)
    near(f"na{rank}d_qk_with_bias", query, key, rpb, *window, expected=biased)
    near(f"NATTEN{rank}DQKRPBFunction", query, key, rpb, *window, expected=biased)
    near(f"natten{rank}dav", biased, value, *window, expected=out)
    near(f"NATTEN{rank}DAVFunction", biased, value, *window, expected=out)


def test_the_order_of_arguments_up_to_0_14_5():
    """The dilation alone after the tensors: what the other arguments are of says the kernel's size."""
    query, key, value = torch.randn(3, 1, 2, 9, 7, 4)
    rpb = torch.randn(2, 5, 5)
    biased = functional.na2d_qk(query, key, 3, 2, rpb=rpb)
    out = functional.na2d_av(biased, value, 3, 2)
    for qkrpb, av in (
        (functional.natten2dqkrpb, functional.natten2dav),
        (functional.NATTEN2DQKRPBFunction.apply, functional.NATTEN2DAVFunction.apply),
    ):
        assert torch.equal(qkrpb(query, key, rpb, 2), biased)
        assert torch.equal(qkrpb(query, key, rpb, dilation=2), biased)
        assert torch.equal(av(biased, value, 2), out)
        assert torch.equal(qkrpb(query, key, rpb, 1), functional.na2d_qk(query, key, 3, rpb=rpb))
        # The size of the kernel without a dilation, or the dilation without the size?
        with pytest.raises(
            OptionError, match=r"natten2dqkrpb\(..., 3\) means kernel_size=3, dilation=3 up to NATTEN 0.14.4"
        ):
            qkrpb(query, key, rpb, 3)
        with pytest.raises(
            OptionError, match=r"natten2dav\(..., 3\) means kernel_size=3, dilation=3 up to NATTEN 0.14.5"
        ):
            av(biased, value, 3)
        assert torch.equal(qkrpb(query, key, rpb, kernel_size=3), functional.na2d_qk(query, key, 3, rpb=rpb))
    line = functional.na1d_qk(query[:, :, 0], key[:, :, 0], 3, 2, rpb=rpb[:, 0])
    assert torch.equal(functional.natten1dqkrpb(query[:, :, 0], key[:, :, 0], rpb[:, 0], 2), line)
    assert torch.equal(functional.natten1dav(line, value[:, :, 0], 2), functional.na1d_av(line, value[:, :, 0], 3, 2))
    # 0.14.5 has the new order in the first call and the old one in the second.
    assert torch.equal(functional.natten2dav(functional.natten2dqkrpb(query, key, rpb, 3, 2), value, 2), out)


def test_the_order_of_a_modules_arguments_up_to_0_14_4():
    """dim, kernel_size, num_heads."""
    for layer in (
        LAYERS[2](64, 7, 2),
        LAYERS[2](64, 7, num_heads=2),
        LAYERS[2](64, 2, 7),
        LAYERS[2](64, 2, kernel_size=7),
    ):
        assert (layer.num_heads, layer.kernel_size) == (2, (7, 7))
    assert LAYERS[2](63, 3, num_heads=7).kernel_size == (3, 3)
    with pytest.raises(
        OptionError, match=r"num_heads=7, kernel_size=3 since NATTEN 0.14.5 and .*num_heads=3, kernel_size=7"
    ):
        LAYERS[2](63, 7, 3)
    with pytest.raises(OptionError, match="gets an argument twice"):
        LAYERS[2](64, 2, 7, num_heads=2)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_autograd_functions_by_name(rank):
    """With the arguments of every version that had them."""
    size, kernel_size, dilation = (5, 6, 4)[:rank], 2, (1, 2, 2)[:rank]
    query, key, value = torch.randn(3, 1, 2, *size, 4)
    rpb, more = torch.randn(2, *[3] * rank), torch.randn(1, 2, 3, 4)
    qk, av = (getattr(functional, f"na{rank}d_{part}") for part in ("qk", "av"))
    name = f"NeighborhoodAttention{rank}D"
    qk_function, av_function = (getattr(functional, f"{name}{part}AutogradFunction") for part in ("QK", "AV"))
    of_0_15 = (kernel_size, *((kernel_size, 1) if rank == 3 else ()), dilation if rank < 3 else 2)
    logits, extended = (
        qk(query, key, kernel_size, dilation, rpb=rpb),
        qk(query, key, kernel_size, dilation, more, rpb=rpb),
    )
    causal = qk(query, key, kernel_size, dilation, is_causal=True)
    assert torch.equal(qk_function.apply(query, key, rpb, *of_0_15), logits)
    assert torch.equal(qk_function.apply(query, key, rpb, more, *of_0_15), extended)
    assert torch.equal(qk_function.apply(query, key, rpb, more, kernel_size, dilation, False), extended)
    assert torch.equal(qk_function.apply(query, key, None, None, kernel_size, dilation, True), causal)
    out, wider = av(logits, value, kernel_size, dilation), av(extended, value, kernel_size, dilation, more)
    assert torch.equal(av_function.apply(logits, value, *of_0_15), out)
    assert torch.equal(av_function.apply(extended, value, more, *of_0_15), wider)
    assert torch.equal(av_function.apply(extended, value, more, kernel_size, dilation, False), wider)
    with pytest.raises(OptionError, match="apply takes kernel_size, dilation, is_causal last"):
        qk_function.apply(query, key, rpb, kernel_size)
    fused = getattr(functional, f"FusedNeighborhoodAttention{rank}D")
    maps = [one.movedim(1, -2) for one in (query, key, value)]
    found = fused.apply(*maps, rpb, kernel_size, dilation, False, 0.3, ((8, 8), (8, 8)), None)
    call = getattr(functional, f"na{rank}d")
    expected = call(*maps, kernel_size, dilation=dilation, scale=0.3, rpb=rpb, return_lse=True)
    torch.testing.assert_close(found, expected)
    flex = getattr(functional, f"flex_na{rank}d")
    assert torch.equal(
        flex(*maps, kernel_size, dilation, True), call(*maps, kernel_size, dilation=dilation, is_causal=True)
    )


def test_older_names_over_three_axes_have_arguments_of_their_own_for_the_first():
    query, key, value = torch.randn(3, 1, 2, 4, 7, 6, 4)
    rpb = torch.randn(2, 3, 5, 5)
    window, old = ((2, 3, 3), (1, 2, 2)), (2, 3, 1, 2)
    biased = natten_oracle.qk(query, key, *window, rpb=rpb)
    torch.testing.assert_close(functional.natten3dqk(query, key, *old), natten_oracle.qk(query, key, *window))
    torch.testing.assert_close(functional.natten3dqkrpb(query, key, rpb, *old), biased)
    torch.testing.assert_close(functional.na3d_qk_with_bias(query, key, rpb, *old), biased)
    torch.testing.assert_close(functional.NATTEN3DQKRPBFunction.apply(query, key, rpb, *old), biased)
    torch.testing.assert_close(functional.natten3dav(biased, value, *old), natten_oracle.av(biased, value, *window))
    # In 0.15 na3d_qk and na3d_av had them too, and told from the order since then by the number in the third place.
    more = torch.randn(1, 2, 3, 4)
    extended = functional.na3d_qk(query, key, *window, more)
    assert torch.equal(functional.na3d_qk(query, key, *old), functional.na3d_qk(query, key, *window))
    assert torch.equal(functional.na3d_qk(query, key, *old, more), extended)
    named = dict(zip(("kernel_size_d", "kernel_size", "dilation_d", "dilation"), old, strict=True))
    assert torch.equal(functional.na3d_qk(query, key, **named, additional_keys=more), extended)
    assert torch.equal(
        functional.na3d_av(extended, value, *old, more), functional.na3d_av(extended, value, *window, more)
    )
    with pytest.raises(OptionError, match=r"in the order of 0\.15 there are kernel_size_d"):
        functional.na3d_qk(query, key, *old, more, False)
    assert torch.equal(
        functional.NATTEN3DAVFunction.apply(biased, value, *old), functional.natten3dav(biased, value, *old)
    )


def test_arguments_of_a_window_are_spread_over_the_axes():
    assert utils.check_all_args(2, 7, (1, 2), False) == ((7, 7), (1, 2), (False, False))
    assert utils.check_all_args(1, 7, 2, 3, True) == ((7,), (2,), (3,), (True,))
    with pytest.raises(OptionError, match="check_all_args takes"):
        utils.check_all_args(2, 7)


# --------------------------------------------------------------------------------------------------------------- modules

LAYERS = {1: modules.NeighborhoodAttention1D, 2: modules.NeighborhoodAttention2D, 3: modules.NeighborhoodAttention3D}


def shaken(module: nn.Module) -> nn.Module:
    """Every parameter random: a bias that is zero would hide where it is read from."""
    for parameter in module.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return module


def check_module(module: nn.Module, expected_module: nn.Module, *inputs: Tensor) -> None:
    """Values and the gradients of parameters and inputs; the expected module takes over the state."""
    shaken(module)
    expected_module = expected_module.double()
    assert not any(expected_module.load_state_dict(module.state_dict()))
    names = [name for name, _ in module.named_parameters()]

    def outcome(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = module(*given)
        seen = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
        return [out, *torch.autograd.grad((seen * out).sum(), [*given, *module.parameters()])]

    results = zip(outcome(module, torch.float32), outcome(expected_module, torch.float64), strict=True)
    for name, (found, expected) in zip(["result", *["input"] * len(inputs), *names], results, strict=True):
        # A parameter's gradient is a sum over the map; what rounds is the size of its terms, not of the sum.
        assert_near(name, found, expected.detach().numpy(), 8 + float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    ("rank", "size", "kernel_size", "dilation"),
    [
        (1, (13,), 5, 2),
        (2, (9, 8), 3, (2, 1)),
        (2, (7, 11), (5, 3), 1),
        (2, (3, 9), 5, 1),  # padded along the rows
        (2, (5, 4), 3, 2),  # padded along both
        (3, (4, 5, 3), (2, 3, 3), 1),
        (3, (2, 5, 4), (3, 2, 2), (1, 2, 1)),  # padded along the first
    ],
)
def test_modules(rank, size, kernel_size, dilation):
    x, arguments = torch.randn(2, *size, 12), {"num_heads": 3, "kernel_size": kernel_size, "dilation": dilation}
    for bias in (True, False):
        expected = natten_oracle.Layer(rank, 12, **arguments, bias=bias)
        check_module(LAYERS[rank](12, **arguments, rel_pos_bias=bias), expected, x)


def test_modules_of_every_version():
    def parameters(**options) -> dict[str, tuple[int, ...]]:
        layer = LAYERS[2](num_heads=2, kernel_size=3, **options)
        return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}

    plain = {"qkv.weight": (24, 8), "qkv.bias": (24,), "proj.weight": (8, 8), "proj.bias": (8,)}
    assert parameters(embed_dim=8) == parameters(dim=8) == parameters(dim=8, bias=False) == plain
    assert parameters(dim=8, rel_pos_bias=True) == parameters(dim=8, bias=True) == plain | {"rpb": (2, 5, 5)}
    assert parameters(embed_dim=8, qkv_bias=False) == {name: plain[name] for name in plain if name != "qkv.bias"}
    layer = LAYERS[3](dim=8, num_heads=2, kernel_size=5, kernel_size_d=3, dilation=2, dilation_d=1, bias=True)
    assert (layer.kernel_size, layer.dilation) == ((3, 5, 5), (1, 2, 2))
    assert layer.rpb is not None
    assert layer.rpb.shape == (2, 5, 9, 9)
    assert 0 < float(layer.rpb.abs().max()) < 0.2
    assert "kernel_size=(3, 5, 5)" in repr(layer)
    assert "rel_pos_bias=True" in repr(layer)


def test_both_orders_of_arguments():
    first = LAYERS[2](8, 2, 3)  # dim, num_heads, kernel_size: NATTEN since 0.14
    second = LAYERS[2](8, kernel_size=3, num_heads=2)  # as clients write that began before it
    for layer in (first, second):
        assert (layer.embed_dim, layer.num_heads, layer.kernel_size) == (8, 2, (3, 3))


def test_a_module_attends_the_same_in_one_call_and_in_two():
    layer = shaken(LAYERS[2](12, 3, 3, dilation=2, is_causal=(True, False), rel_pos_bias=True)).double()
    x = torch.randn(1, 9, 7, 12).double()
    results = []
    for mode in (True, False):
        context.use_fused_na(mode)
        given = x.clone().requires_grad_()
        out = layer(given)
        results.append([out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])])
    context.use_fused_na(True)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_dropout_of_the_weights():
    """Everything dropped leaves the second projection's bias. (NATTEN's fused modules leave the dropout out.)"""
    layer, x = shaken(LAYERS[2](12, 3, 3, attn_drop=1.0)), torch.randn(1, 9, 7, 12)
    torch.testing.assert_close(layer(x), layer.proj.bias.expand(1, 9, 7, 12))
    without = LAYERS[2](12, 3, 3)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), without(x))


def test_qk_scale():
    layer, x = LAYERS[1](8, 2, 3, qk_scale=0.3, rel_pos_bias=True), torch.randn(1, 9, 8)
    check_module(layer, natten_oracle.Layer(1, 8, 2, 3, qk_scale=0.3), x)


# --------------------------------------------------------------------------------------------------------------- clients

CLIENTS = {
    "NatLayer": [(1, 5, 6, 24)],
    "OldNatLayer": [(1, 7, 12, 16)],
    "SequenceLayer": [(2, 9, 16)],
    "HydraLayer": [(1, 7, 9, 24)],
    "NewHydraLayer": [(1, 7, 9, 24)],
    "DatLayer": [(1, 16, 7, 9)],
    "NewDatLayer": [(1, 16, 7, 9)],
    "UpsamplerLayer": [(1, 8, 6, 9), (1, 8, 3, 3), (1, 12, 3, 3)],
    "FusedUpsamplerLayer": [(1, 8, 6, 9), (1, 8, 3, 3), (1, 12, 3, 3)],
    "HourglassLayer": [(1, 6, 5, 24)],
    "SplitHourglassLayer": [(1, 6, 5, 24)],
    "BeatLayer": [(1, 2, 10, 13, 12)] * 3,
    "DynamicConvolution": [(1, 8, 5, 6)],
    "VideoLayer": [(1, 3, 4, 7, 2, 8)] * 3,
}


@contextmanager
def clients_of(modules: dict[str, ModuleType] | None):
    """natten_clients.py, imported under the given modules, or under the stand-in."""
    if modules is None:
        stand_in.install(rel_pos_bias=True)
    else:
        sys.modules.update(modules)
    try:
        yield importlib.import_module("natten_clients")
    finally:
        sys.modules.pop("natten_clients", None)
        if modules is None:
            stand_in.uninstall()
        for name in modules or ():
            sys.modules.pop(name, None)


def check_client(name: str) -> None:
    with clients_of(natten_oracle.modules()) as clients:
        expected = getattr(clients, name)()
        size_of_oracle = sys.modules["natten"]
    with clients_of(None) as clients:
        assert sys.modules["natten"] is not size_of_oracle
        client = getattr(clients, name)()
        with_window = [torch.randn(shape) for shape in CLIENTS[name]]
        check_module(client, expected, *with_window)


@pytest.mark.parametrize("name", CLIENTS)
def test_clients(name):
    check_client(name)


# ---------------------------------------------------------------------------------------------------------------- faults


def _flipped(real):
    return lambda *args, bias=None, **kw: real(*args, bias=None if bias is None else bias.flip(-1, -2), **kw)


def _exchanged(real):
    def call(query, key, value, window, **options):
        turned = (tensor.transpose(2, 3).reshape(tensor.shape) for tensor in (query, key, value))
        return real(*turned, window, **options)

    return call


def _table_flipped(real):
    return lambda table, axes, size: real(table.flip(-1, -2), axes, size)


def _kept(real):
    return lambda scale, head_dim: real(scale, head_dim) if scale is None else scale


def check_answers_of(name: str) -> None:
    with np.load(natten_cases.FILE) as file:
        check_answers(name, dict(file))


def _without_stride(real):
    return lambda rank, kernel_size, stride, dilation, is_causal: real(rank, kernel_size, 1, dilation, is_causal)


def _without_phases(real):
    return lambda rank, kernel_size, stride, dilation, is_causal: real(rank, kernel_size, stride, 1, is_causal)


FAULTS = {
    "the fused bias read backwards": (functional, "local_attention", _flipped, check_fused, "bias"),
    "rows and columns exchanged": (functional, "local_attention", _exchanged, check_fused, "two axes"),
    "the split bias read backwards": (split, "_biases", _table_flipped, check_split, "two axes"),
    "no window stride": (functional, "window_of", _without_stride, check_fused, "shared windows"),
    "dilation forgotten, split": (functional, "window_of", _without_phases, check_split, "dilated"),
    "dilation forgotten, fused": (functional, "window_of", _without_phases, check_fused, "dilated"),
    "dilation forgotten by a client's call": (functional, "window_of", _without_phases, check_client, "DatLayer"),
    "no window stride, seen by NATTEN": (functional, "window_of", _without_stride, check_answers_of, "a stride"),
    "a scale of zero, seen by NATTEN": (functional, "scale_of", _kept, check_answers_of, "a scale of zero"),
    "the bias of a client read backwards": (split, "_biases", _table_flipped, check_client, "HydraLayer"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_checks_see_faults(name, monkeypatch):
    where, what, fault, check_it, case = FAULTS[name]
    check_it(case)
    monkeypatch.setattr(where, what, fault(getattr(where, what)))
    with pytest.raises(AssertionError, match=r"elements are off|^result|^gradient"):
        check_it(case)


# ------------------------------------------------------------------------------------------------------ speed and memory

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@needs_native
def test_fused_calls_reach_the_kernel_as_views(monkeypatch):
    """No copy on the way in or out: the kernel reads the client's own memory, and writes heads last."""
    received = []
    attend = native.attend

    def watched(call, problem):
        received.extend((tensor.data_ptr(), tensor.movedim(1, -2).stride()) for tensor in call[:3])
        return attend(call, problem)

    monkeypatch.setattr(native, "attend", watched)
    projected = torch.randn(2, 9, 7, 3, 4, 8, requires_grad=True)
    maps = projected.unbind(3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = functional.na2d(*maps, kernel_size=3)
        out.backward(torch.ones_like(out), inputs=[projected])
    assert received == [(tensor.data_ptr(), tensor.stride()) for tensor in maps]
    assert out.is_contiguous()
    ran = {event.key for event in profile.key_averages()}
    assert {"nearsight::attend", "nearsight::attend_backward"} <= ran
    assert not ran & {"aten::clone", "aten::contiguous", "aten::copy_", "aten::_to_copy"}


@needs_native
def test_grouped_heads_are_not_copied():
    query, key = torch.randn(1, 9, 7, 4, 8), torch.randn(1, 9, 7, 2, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.na2d(query, key, key, kernel_size=3)
    ran = {event.key for event in profile.key_averages()}
    assert "nearsight::attend" in ran
    assert not ran & {"aten::repeat_interleave", "aten::index_select", "aten::repeat"}


def test_split_calls_keep_their_inputs_and_nothing_else():
    query, key, value = (torch.randn(1, 2, 12, 11, 8, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 13, 13, requires_grad=True)
    weights = torch.randn(1, 2, 12, 11, 49, requires_grad=True)

    def kept_by(call) -> set[int]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
            call()
        return {tensor.data_ptr() for tensor in kept if tensor.is_floating_point()}

    assert kept_by(lambda: functional.na2d_qk(query, key, 7, rpb=rpb)) == {query.data_ptr(), key.data_ptr()}
    assert kept_by(lambda: functional.na2d_av(weights, value, 7)) == {weights.data_ptr(), value.data_ptr()}


PEAK = """
import torch
if not {gathered}:
    from nearsight.compat.natten.functional import na2d_av, na2d_qk

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(side):
    query, key, value = (torch.randn(1, 2, side, side, 32, requires_grad=True) for _ in range(3))
    before = peak()
    if {gathered}:
        rows = torch.nn.functional.pad(key, (0, 0, 3, 3, 3, 3)).unfold(2, 7, 1).unfold(3, 7, 1).flatten(-2).contiguous()
        weights = torch.einsum("bnhwd, bnhwdk -> bnhwk", query, rows)
    else:
        weights = na2d_qk(query, key, 7)
        na2d_av(weights, value, 7).sum().backward()
    return (peak() - before) / (4 * weights.numel())

step(16)
print(step({side}))
"""


def peak(gathered: bool, side: int) -> float:
    """Extra memory of two split calls and their backward, in units of the weights that they return."""
    program = PEAK.format(gathered=gathered, side=side)
    environment = {**os.environ, **NOTHING_KEPT}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return float(finished.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.sweep
def test_split_calls_copy_no_windows():
    """The weights, their gradients and slices of blocks; a gathered key would be 32 times the weights."""
    assert peak(gathered=True, side=64) > 30
    assert peak(gathered=False, side=192) < 8


# ---------------------------------------------------------------------------------------------------------- installation


@pytest.fixture
def installed():
    stand_in.install()
    yield importlib.import_module("natten")
    stand_in.uninstall()


def test_every_public_name_is_there_or_written_down(installed):
    """Of every version, in the module that had it."""
    missing = {
        f"{module}.{name}"
        for module, by_version in natten_names.NAMES.items()
        for name in " ".join(by_version.values()).split()
        if not hasattr(importlib.import_module(module), name)
    }
    listed = {name.rpartition(".")[2] for name in missing}
    assert listed == set(natten_names.NOT_THERE.split())


def test_functions_of_both_generations(installed):
    for rank, part in product((1, 2, 3), ("qk", "qkrpb", "av")):
        assert hasattr(installed.functional, f"natten{rank}d{part}")
    for rank, part in product((1, 2, 3), ("QKRPB", "AV")):
        assert hasattr(getattr(installed.functional, f"NATTEN{rank}D{part}Function"), "apply")
    # A module up to 0.17, a function since 0.20; the function is what clients call.
    assert installed.na2d is functional.na2d
    importlib.import_module("natten.na2d")
    assert installed.na2d is not None


def test_it_looks_like_an_installed_package(installed):
    version = f"0.21.7+nearsight.{importlib.metadata.version('nearsight')}"
    spec = importlib.util.find_spec("natten")
    assert spec is not None
    assert spec.name == "natten"
    assert installed.__spec__.name == "natten"
    assert importlib.util.find_spec("natten.functional") is not None
    assert installed.__version__ == importlib.import_module("natten.version").__version__ == version
    assert importlib.metadata.version("natten") == version
    assert importlib.metadata.packages_distributions()["natten"] == ["natten"]
    assert importlib.metadata.version("pytest") == pytest.__version__


def test_installing_twice_and_taking_out():
    stand_in.install()
    first = sys.modules["natten"]
    stand_in.install()
    assert sys.modules["natten"] is first
    stand_in.uninstall()
    stand_in.uninstall()
    assert not [name for name in sys.modules if name.split(".")[0] == "natten"]
    assert importlib.util.find_spec("natten") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten")


def test_the_default_of_the_bias_is_that_of_the_version_asked_for(installed):
    assert installed.NeighborhoodAttention2D(8, 2, 3).rpb is None
    stand_in.install(rel_pos_bias=True)
    assert installed.NeighborhoodAttention2D(8, 2, 3).rpb is not None
    assert installed.NeighborhoodAttention2D(8, 2, 3, bias=False).rpb is None
    stand_in.install()
    assert installed.NeighborhoodAttention2D(8, 2, 3).rpb is None


@pytest.fixture
def another_natten(tmp_path, monkeypatch):
    """A package of that name, installed."""
    package = tmp_path / "natten"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.20.1"\nHAS_LIBNATTEN = True\n')
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield package
    stand_in.uninstall()
    sys.modules.pop("natten", None)


def test_an_installed_natten_is_hidden_only_when_asked(another_natten):
    with pytest.raises(OptionError, match=r"there is a module named natten.*install\(force=True\)"):
        stand_in.install()
    (another_natten.parent / "natten-0.20.1.dist-info").mkdir()
    (another_natten.parent / "natten-0.20.1.dist-info" / "METADATA").write_text("Name: natten\nVersion: 0.20.1\n")
    importlib.invalidate_caches()
    with pytest.raises(OptionError, match=r"natten 0\.20\.1 is installed"):
        stand_in.install()
    real = importlib.import_module("natten")
    assert real.__version__ == "0.20.1"
    stand_in.install(force=True)
    assert sys.modules["natten"] is not real
    assert sys.modules["natten"].__version__ == importlib.metadata.version("natten") == stand_in.natten_version()
    stand_in.uninstall()
    assert sys.modules["natten"] is real
    assert importlib.metadata.version("natten") == "0.20.1"


def test_the_backend_of_that_name_does_not_take_the_stand_in_for_natten(another_natten):
    """Otherwise na2d would call itself without end."""
    real = importlib.import_module("natten")
    natten_backend._natten.cache_clear()
    natten_backend.unavailable.cache_clear()
    try:
        assert natten_backend._natten() is real
        stand_in.install(force=True)
        assert natten_backend._natten() is real
        natten_backend._natten.cache_clear()
        natten_backend.unavailable.cache_clear()
        assert natten_backend.unavailable() is not None
    finally:
        natten_backend._natten.cache_clear()
        natten_backend.unavailable.cache_clear()


@pytest.mark.sweep  # the test of all that is loaded later has it in this process: test_import.py
def test_compat_comes_with_the_package():
    program = "import nearsight as ns\nns.compat.natten.install()\nimport natten\nprint(natten.has_fused_na())"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (0, "True\n"), finished.stderr


PROGRAM = """
import importlib.metadata
import multiprocessing
import sys

import beside
import natten
from natten.functional import na2d


def told(_):
    layer = natten.NeighborhoodAttention2D(8, 2, 3)
    return importlib.metadata.version("natten"), beside.natten is natten, layer.rpb is not None


if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(told(0), pool.map(told, [0]), sys.argv[1:])
    sys.exit(3)
"""


def test_a_program_runs_with_the_stand_in_and_so_do_its_workers(tmp_path):
    """As it is: with the module beside it, its own arguments and its exit code."""
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("import natten\n")
    command = [sys.executable, "-m", "nearsight.compat.natten", "--rel-pos-bias", "train.py", "--epochs", "3", "--help"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    told = (stand_in.natten_version(), True, True)
    assert finished.stdout == f"{told} {[told]} {['--epochs', '3', '--help']}\n", finished.stderr
    assert finished.returncode == 3
    assert not list(tmp_path.glob("nearsight-natten-*"))


@pytest.fixture
def program_of_its_own(monkeypatch):
    """What a program may change stays as it was."""
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    yield
    stand_in.uninstall()


def test_a_module_runs_with_the_stand_in(tmp_path, program_of_its_own, monkeypatch, capsys):
    (tmp_path / "told.py").write_text(
        "import sys, natten, os\nprint(natten.has_fna(), sys.argv[1:], os.environ['PYTHONPATH'])\n"
    )
    monkeypatch.chdir(tmp_path)
    program.main(["-m", "told", "-x"])
    first, _, rest = capsys.readouterr().out.partition(" ['-x'] ")
    assert first == "True"
    assert rest.endswith(f"{os.pathsep}elsewhere\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "there is no file nowhere.py; for a module write -m nowhere.py"),
        (["-m", "nowhere.at_all"], "there is no module nowhere.at_all"),
        ([], "the following arguments are required: PROGRAM"),
    ],
)
def test_mistakes_before_a_program_runs_are_one_line(arguments, message, program_of_its_own, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(arguments)
    assert message in capsys.readouterr().err


def test_a_natten_that_is_installed_is_not_hidden_from_a_program(another_natten, program_of_its_own, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main([__file__])
    assert capsys.readouterr().err.endswith("; here: --force\n")


# -------------------------------------------------------------------------------------------------------------- switches


def test_switches_tell_the_truth(installed):
    assert installed.has_fused_na()
    assert installed.has_fna()
    assert installed.has_half()
    assert installed.has_bfloat()
    assert installed.has_cuda() == torch.cuda.is_available()
    assert not installed.HAS_LIBNATTEN
    for name in context.QUESTIONS:
        assert getattr(installed, name)() is False, name
    for name in context.SWITCHES:
        getattr(installed, name)(True)
    assert not installed.is_autotuner_enabled()
    assert not installed.is_kv_parallelism_in_fused_na_enabled()
    for name in context.CONFIGURATIONS:
        assert getattr(installed, name)(*torch.randn(3, 1, 4, 4, 2, 8)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_call_takes_half_precision(dtype, installed):
    """What has_half and has_bfloat promise."""
    query, key, value = torch.randn(3, 1, 2, 6, 5, 8).to(dtype)
    expected = natten_oracle.qk(query.double(), key.double(), 3)
    found = installed.functional.na2d_qk(query, key, 3)
    assert_near("logits", found, expected.numpy(), 64)
    assert installed.functional.na2d_av(found.softmax(-1), value, 3).dtype == dtype
    assert installed.na2d(query, key, value, kernel_size=3).dtype == dtype


def test_switches_that_are_kept(installed):
    assert installed.context.is_fna_enabled()
    assert installed.functional.disable_fna() is installed.is_fused_na_enabled() is False
    assert installed.functional.enable_fna() is installed.is_fused_na_enabled() is True
    installed.use_fused_na(False, kv_parallel=False)
    assert not installed.is_fused_na_enabled()
    installed.set_memory_usage_preference("unrestricted")
    assert installed.is_memory_usage_unrestricted()
    assert not installed.is_memory_usage_default()
    installed.use_deterministic_algorithms(True)
    assert installed.are_deterministic_algorithms_enabled()
    installed.context.NattenContext.reset()
    assert installed.is_fused_na_enabled()
    assert installed.is_memory_usage_default()
    assert not installed.are_deterministic_algorithms_enabled()
    assert not installed.is_memory_usage_strict()
    with pytest.raises(OptionError, match="must be one of default, strict, unrestricted; received 'none'"):
        installed.set_memory_usage_preference("none")


# ----------------------------------------------------------------------------------------------------------------- flops


def test_flops_by_hand():
    shape, last = (1, 4, 8, 8, 16), (1, 8, 8, 4, 16)
    arguments = ((3, 3), (1, 1), (False, False))
    one = 8 * 8 * 4 * 16 * 9
    assert flops.na_qk_flop_count(shape, shape, *arguments, is_heads_last=False) == 2 * one
    assert flops.na_av_flop_count((1, 4, 8, 8, 9), shape, *arguments, is_heads_last=False, return_macs=True) == one
    assert flops.fna_flop_count(last, last, last, *arguments, is_heads_last=True) == 4 * one
    half = (1, 8, 8, 2, 16)  # fewer heads of keys and values: as many products
    assert flops.fna_flop_count(last, half, half, *arguments, is_heads_last=True) == 4 * one


@pytest.mark.parametrize(("attn_drop", "fused"), [(0.0, True), (0.0, False), (0.5, True)])
def test_a_counter_learns_to_count_the_calls(attn_drop, fused, installed):
    from fvcore.nn import FlopCountAnalysis

    rank, size, kernel = 2, (9, 7), 3
    layer = LAYERS[rank](12, 3, kernel, rel_pos_bias=True, attn_drop=attn_drop).eval()
    x = torch.randn(2, *size, 12)
    installed.use_fused_na(fused)
    counted = installed.flops.add_natten_handle(FlopCountAnalysis(layer, x)).unsupported_ops_warnings(False)
    cells = 2 * 9 * 7
    assert counted.total() == cells * (4 * 12 * 12 + 2 * 12 * kernel**rank)
    assert installed.flops.get_flops(layer, x, disable_warnings=True) == counted.total()
    installed.use_fused_na(True)


def test_counting_changes_nothing():
    """A traced module computes what the module computes, gradients included."""
    layer, x = shaken(LAYERS[2](8, 2, 3, rel_pos_bias=True)), torch.randn(1, 6, 5, 8)
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(x), layer(x))
    for one, two in zip(
        torch.autograd.grad(traced(x).square().sum(), list(layer.parameters())),
        torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


# ---------------------------------------------------------------------------------------------------------------- errors

MAPS = torch.randn(3, 1, 6, 7, 2, 4)
FIRST = torch.randn(3, 1, 2, 6, 7, 4)
ERRORS = {
    "fifth argument": (lambda: functional.na2d(*MAPS, 3, 1), OptionError, "name the arguments after kernel_size"),
    "rank": (
        lambda: functional.na1d(*MAPS, 3),
        ShapeError,
        "query must be a tensor .batch, .map, heads, head_dim. with 1",
    ),
    "key's rank": (lambda: functional.na2d(MAPS[0], FIRST[0, 0], MAPS[2], 3), ShapeError, "key must be a tensor"),
    "stride": (
        lambda: functional.na2d(*MAPS, kernel_size=3, stride=4),
        OptionError,
        "stride must be at most kernel_size",
    ),
    "bias and stride": (
        lambda: functional.na2d(*MAPS, kernel_size=3, stride=2, rpb=torch.zeros(2, 5, 5)),
        OptionError,
        "rpb and stride never met in one NATTEN",
    ),
    "one of two": (
        lambda: functional.na2d(*MAPS, kernel_size=3, additional_keys=torch.zeros(1, 2, 2, 4)),
        ShapeError,
        "additional_keys and additional_values go together",
    ),
    "bias": (lambda: functional.na2d_qk(*FIRST[:2], 3, rpb=torch.zeros(2, 3, 3)), ShapeError, r"received \(2, 3, 3\)"),
    "key": (lambda: functional.na2d_qk(FIRST[0], FIRST[1, ..., :3], 3), ShapeError, "key must have the shape of query"),
    "weights": (
        lambda: functional.na2d_av(torch.zeros(1, 2, 6, 7, 8), FIRST[2], 3),
        ShapeError,
        r"attn must hold a weight per place, \(1, 2, 6, 7, 9\).*received \(1, 2, 6, 7, 8\)",
    ),
    "empty map": (
        lambda: functional.na2d_qk(FIRST[0, :, :, :0], FIRST[1, :, :, :0], 3),
        ShapeError,
        "at least one cell",
    ),
    "heads": (
        lambda: functional.attention(*torch.randn(3, 1, 4, 2, 4)[:2], torch.randn(1, 4, 3, 4)),
        ShapeError,
        "divide",
    ),
    "attention's fourth": (
        lambda: functional.attention(*torch.randn(3, 1, 4, 2, 4), 0.5),
        OptionError,
        "name the arguments after value: the fourth was the scale",
    ),
    "varying lengths": (
        lambda: functional.attention(*torch.randn(3, 1, 4, 2, 4), seqlens_Q=torch.tensor([4])),
        OptionError,
        "lengths that vary are not here",
    ),
    "module's fourth": (lambda: LAYERS[2](8, 2, 3, 1), OptionError, "order is another in every version"),
    "module's input": (lambda: LAYERS[2](8, 2, 3)(torch.zeros(1, 6, 8)), ShapeError, "NeighborhoodAttention2D takes"),
    "module's heads": (lambda: LAYERS[2](8, 3, 3), ShapeError, "num_heads must divide embed_dim"),
    "module's size": (lambda: LAYERS[2](8, 2), OptionError, "NeighborhoodAttention2D needs kernel_size"),
    "two names": (lambda: LAYERS[2](8, 2, 3, bias=True, rel_pos_bias=False), OptionError, "two names of one argument"),
    "dropout and stride": (
        lambda: LAYERS[2](8, 2, 3, stride=2, attn_drop=0.1)(torch.zeros(1, 6, 6, 8)),
        OptionError,
        "a stride needs fused attention without dropout",
    ),
}


TYPOS = {
    "na2d": lambda: functional.na2d(*MAPS, kernel_size=3, dilaton=2),
    "neighborhood_attention_generic": lambda: functional.neighborhood_attention_generic(*MAPS, 3, dilaton=2),
    "na2d_qk": lambda: functional.na2d_qk(*FIRST[:2], 3, dilaton=2),
    "natten2dqkrpb": lambda: functional.natten2dqkrpb(*FIRST[:2], None, 3, dilaton=2),
    "natten2dav": lambda: functional.natten2dav(*FIRST[:2], 3, dilaton=2),
    "natten3dqk": lambda: functional.natten3dqk(*FIRST[:2], 3, 3, dilaton=2),
    "NeighborhoodAttention2D": lambda: LAYERS[2](8, 2, 3, dilaton=2),
    "NeighborhoodAttention3D": lambda: LAYERS[3](8, 2, 3, dilaton=2),
}


@pytest.mark.parametrize("name", TYPOS)
def test_a_typo_in_an_arguments_name_is_named(name):
    """Clients that ask which names a version has catch a TypeError, as Python itself raises one."""
    for kind in (OptionError, TypeError):
        with pytest.raises(kind, match=f"{name} has no argument 'dilaton': did you mean 'dilation'?"):
            TYPOS[name]()
    with pytest.raises(TypeError, match="has no argument 'q'; it has query, key"):
        functional.na1d_qk(q=FIRST[0])


def test_help_shows_the_arguments():
    for call in (functional.na1d, functional.na2d, functional.na3d, functional.neighborhood_attention_generic):
        shown = inspect.signature(call).parameters
        assert list(shown)[:6] == ["query", "key", "value", "kernel_size", "stride", "dilation"]
        assert {"is_causal", "scale", "rpb", "return_lse", "backend"} <= set(shown)
        text = pydoc.render_doc(call, renderer=pydoc.plaintext)
        assert all(word in text for word in (call.__name__, "kernel_size: cells per axis", "Shapes:", "Raises:"))
    for layer in LAYERS.values():
        assert list(inspect.signature(layer).parameters)[:3] == ["embed_dim", "num_heads", "kernel_size"]
        assert "qk_scale" in inspect.signature(layer).parameters
    assert list(inspect.signature(functional.natten2dqkrpb).parameters)[2:] == ["rpb", "kernel_size", "dilation"]


REFUSED = {
    "nested": (lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged), r"a nested one: attend to each"),
    "nested, strided": (lambda x: torch.nested.nested_tensor([*x]), r"a nested one: attend to each"),
    "sparse": (lambda x: x.to_sparse(), r"a sparse one: convert it with .to_dense\(\)"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_without_strides_are_refused_in_a_line(kind):
    make, message = REFUSED[kind]
    maps, first = make(torch.randn(2, 6, 5, 2, 4)), make(torch.randn(2, 2, 6, 5, 4))
    plain = torch.randn(2, 6, 5, 2, 4)
    calls = [
        lambda: functional.na2d(maps, maps, maps, kernel_size=3),
        lambda: functional.na2d(plain, plain, maps, kernel_size=3),
        lambda: functional.na2d(*[plain] * 3, kernel_size=3, additional_keys=maps, additional_values=maps),
        lambda: functional.neighborhood_attention_generic(maps, maps, maps, 3),
        lambda: functional.attention(maps, maps, maps),
        lambda: functional.na2d_qk(first, first, 3),
        lambda: functional.na2d_av(plain, first, 3),
        lambda: functional.na2d_qk_nested(first, first, None, 3, 1),
        lambda: functional.natten2dqkrpb(first, first, None, 3, 1),
        lambda: LAYERS[2](4, 2, 3)(make(torch.randn(2, 6, 5, 4))),
        lambda: ns.local_attention(first, first, first, ns.Window(3)),
        lambda: ns.global_attention(first, first, first),
        lambda: ns.merge_attentions([maps, maps], [maps, maps]),
    ]
    for call in calls:
        with pytest.raises(DtypeError, match=message):
            call()


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_failing_import_leaves_nothing_behind():
    assert "natten" not in sys.modules
    assert ns.backends()["natten"] is not None
