# SPDX-License-Identifier: Apache-2.0
"""One contract for all backends: values and every gradient are those of the oracle.

``check_contract(attend, case)`` and its parts take the function under test as an argument: backends go through it here, and
planted faults in test_planted_faults.py, which have to fail.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

import numpy as np
import oracle
import pytest
import torch
from conftest import ALL, Contestant, assert_near, contestants, every_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nearsight as ns
from nearsight.attention.backend import BACKENDS
from nearsight.errors import BackendError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """One problem, with all that decides its numbers. Where an axis differs from the others, give a tuple."""

    size: tuple[int, ...]
    kernel_size: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    border: str | tuple[str, ...] = "mask"
    shared_by: int | tuple[int, ...] = 1
    batch: int = 2
    heads: int = 2
    head_dim: int = 4
    value_dim: int = 4
    bias: bool = False
    relative: bool = False
    scale: float | None = None
    layout: str = "contiguous"
    loud: float = 1.0  # multiplies query and key
    bias_level: float = 0.0  # added to the whole bias table
    dtype: torch.dtype = field(default=torch.float64, repr=False)

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def window(self) -> ns.Window:
        names = ("stride", "dilation", "causal", "border", "shared_by")
        return ns.Window(self.kernel_size, **{name: getattr(self, name) for name in names})

    @property
    def axes(self) -> list[oracle.Axis]:
        values = (self.size, self.kernel_size, self.stride, self.dilation, self.border, self.causal, self.shared_by)
        spread = [value if isinstance(value, tuple) else (value,) * self.rank for value in values]
        return [oracle.Axis(*axis) for axis in zip(*spread, strict=True)]


@lru_cache(maxsize=2048)
def inputs_of(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, tuple]:
    """The gradient that comes in, query, key, value, bias and relative: float64 numbers that ``case.dtype`` can hold."""
    rng = np.random.default_rng(7)
    axes, heads = case.axes, case.heads

    def numbers(*shape, times=1.0, plus=0.0):
        wide = torch.from_numpy(rng.standard_normal(shape) * times + plus)
        return wide.to(case.dtype).double().numpy()

    out_size, table_size = [axis.queries for axis in axes], [axis.table_size for axis in axes]
    grad = numbers(case.batch, heads, *out_size, case.value_dim)
    query = numbers(case.batch, heads, *out_size, case.head_dim, times=case.loud)
    key = numbers(case.batch, heads, *case.size, case.head_dim, times=case.loud)
    value = numbers(case.batch, heads, *case.size, case.value_dim)
    bias = numbers(heads, *table_size, plus=case.bias_level) if case.bias else None
    relative = tuple(numbers(heads, entries, case.head_dim) for entries in table_size) if case.relative else ()
    return grad, query, key, value, bias, relative


@lru_cache(maxsize=2048)
def expected_of(case: Case) -> tuple[np.ndarray, list[np.ndarray], float, float]:
    """The oracle's values and gradients, and how much each of the two amplifies a rounding."""
    grad, *inputs = inputs_of(case)
    query, key, value, bias, relative = inputs
    out, _, largest = oracle.attention(query, key, value, case.axes, bias, relative, case.scale)
    gradients = oracle.gradients(grad, query, key, value, case.axes, bias, relative, case.scale)
    condition = max(1.0, largest)
    # A gradient by the query is a sum over keys, and the other way round.
    return out, gradients, condition, condition * case.loud


def slack_of(case: Case) -> float:
    """How far a gradient may move because the backward starts from the output as it was stored, in half precision.

    FlashAttention's does, and so do all that save the output alone: a softmax's backward subtracts the sum of output times
    incoming gradient, and the output's rounding goes into the gradient of every logit of its query.
    """
    if case.dtype not in (torch.float16, torch.bfloat16):
        return 0.0
    grad, query, key, *_ = inputs_of(case)
    rounding = torch.finfo(case.dtype).eps * (np.abs(expected_of(case)[0] * grad).sum(-1))
    scale = case.head_dim**-0.5 if case.scale is None else abs(case.scale)
    largest = max((np.abs(one).max(initial=0) for one in (query, key)), default=0)
    return float(np.sqrt((rounding**2).sum()) * max(1, scale * largest))


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, (B, N, *map, D), at other places in memory."""
    if layout == "channels first":  # a view of (B, N, D, *map), as a convolution makes it
        return tensor.movedim(-1, 2).contiguous().movedim(2, -1)
    if layout == "heads last":  # a view of NATTEN's (B, *map, N, D)
        return tensor.movedim(1, -2).contiguous().movedim(-2, 1)
    if layout == "sliced":  # every second channel of something wider, at an odd address
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
        wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2] = tensor
        return wide[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    if layout == "cropped":  # a part of a larger map
        wide = tensor.new_full([n + 2 for n in tensor.shape], float("nan"))
        inside = [slice(1, 1 + n) for n in tensor.shape]
        wide[tuple(inside)] = tensor
        return wide[tuple(inside)]
    if layout == "transposed":  # width before height
        return tensor.transpose(2, -2).contiguous().transpose(2, -2)
    assert layout == "contiguous", layout
    return tensor.clone()


LAYOUTS = ("contiguous", "channels first", "heads last", "sliced", "cropped", "transposed")


def tensors_of(case: Case, *, grad: bool = False) -> tuple[Tensor, list[Tensor], dict]:
    """The incoming gradient, the differentiable inputs in order, and the arguments of local_attention made of them."""
    numbers = [*inputs_of(case)[:4]]
    gradient, *maps = [laid_out(torch.from_numpy(one).to(case.dtype), case.layout) for one in numbers]
    _, _, _, _, bias, relative = inputs_of(case)
    tables = [torch.from_numpy(table).to(case.dtype) for table in (*([] if bias is None else [bias]), *relative)]
    inputs = [tensor.requires_grad_(grad) for tensor in (*maps, *tables)]
    arguments = {"bias": tables[0] if case.bias else None, "scale": case.scale}
    arguments["relative"] = tables[int(case.bias) :] if case.relative else None
    return gradient, inputs, arguments


# ------------------------------------------------------------------------------------------------------- the contract


def check_contract(attend, case: Case) -> None:
    check_values(attend, case)
    check_gradients(attend, case)


def check_values(attend, case: Case) -> None:
    _, inputs, arguments = tensors_of(case)
    before = [tensor.clone() for tensor in inputs]
    out = attend(*inputs[:3], case.window, **arguments)
    expected, _, condition, _ = expected_of(case)
    assert out.dtype == case.dtype
    assert not out.requires_grad
    assert_near("values", out, expected, condition)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy), "an input was written to"
    assert out.data_ptr() not in [tensor.data_ptr() for tensor in inputs] or out.numel() == 0, "the result is an input"


def check_gradients(attend, case: Case) -> None:
    incoming, inputs, arguments = tensors_of(case, grad=True)
    out = attend(*inputs[:3], case.window, **arguments)
    expected, gradients, condition, gradient_condition = expected_of(case)
    assert_near("values with gradients on", out, expected, condition)
    found = torch.autograd.grad(out, inputs, incoming, allow_unused=True)
    names = ["query", "key", "value", *["bias"] * case.bias, *[f"relative[{axis}]" for axis in range(case.rank)]]
    names = names[: len(inputs)]
    compared = 0
    for name, gradient, reference in zip(names, found, gradients, strict=True):
        assert gradient is not None, f"no gradient by {name}"
        assert gradient.dtype == case.dtype
        assert_near(f"gradient by {name}", gradient, reference, gradient_condition, slack_of(case))
        compared += 1
    assert compared == 3 + case.bias + case.rank * case.relative


def check_or_refusal(contestant: Contestant, case: Case) -> str:
    """Hold a backend to the contract, or to its refusal: it has to raise, with the reason that it gave."""
    _, inputs, arguments = tensors_of(case, grad=True)
    reason = contestant.why_not(*inputs[:3], case.window, **arguments)
    if reason is None:
        check_contract(contestant.attend, case)
        return "ran"
    with pytest.raises(BackendError, match=re.escape(reason)):
        contestant.attend(*inputs[:3], case.window, **arguments)
    return "refused"


# -------------------------------------------------------------------------------------------------------- named cases

# H and W differ and are prime, N, D, K differ: no two axes can be exchanged unnoticed.
TABLES = {"bias": True, "relative": True}
NAMED = {
    "plain": Case((5, 7)),
    "window not square": Case((5, 7), (3, 5)),
    "line": Case((11,), 5, **TABLES),
    "volume": Case((3, 5, 2), (3, 1, 2), **TABLES),
    "bias": Case((5, 7), (3, 5), bias=True),
    "relative": Case((5, 7), (3, 5), relative=True),
    "relative square": Case((5, 7), 3, relative=True),
    "both tables": Case((7, 5), (5, 3), **TABLES),
    "even": Case((5, 7), (2, 4), **TABLES),
    "one cell": Case((5, 7), 1, **TABLES),
    "as large as the map": Case((5, 7), (5, 7), **TABLES),
    "larger than the map": Case((3, 2), (11, 8), **TABLES),
    "covers": Case((3, 5), (5, 9), **TABLES),
    "covers without tables": Case((3, 5), (7, 9), value_dim=3),
    "covers strided": Case((3, 5), (5, 9), stride=(2, 3), **TABLES),
    "covers by shift": Case((3, 5), (3, 6), border="shift", **TABLES),
    "map of one cell": Case((1, 1), 3, **TABLES),
    "one row": Case((1, 13), 3, **TABLES),
    "one column": Case((13, 1), 3, **TABLES),
    "stride": Case((7, 5), 3, stride=(2, 3), **TABLES),
    "stride beyond the kernel": Case((13,), 2, stride=5, **TABLES),
    "stride beyond the map": Case((3, 5), 3, stride=7, **TABLES),
    "dilation": Case((11, 7), 3, dilation=(2, 3), **TABLES),
    "dilation beyond the map": Case((5,), 3, dilation=9, **TABLES),
    "dilation and stride": Case((13, 11), (3, 4), dilation=(2, 4), stride=(3, 2), **TABLES),
    "causal": Case((5, 7), (3, 4), causal=(True, True), **TABLES),
    "causal rows": Case((5, 7), (3, 4), causal=(True, False), **TABLES),
    "causal line": Case((11,), 4, causal=True, dilation=2, **TABLES),
    "zeros": Case((5, 7), 3, border="zeros", **TABLES),
    "zeros even dilated": Case((5, 7), (4, 2), border="zeros", dilation=2, stride=2, **TABLES),
    "zeros causal": Case((5, 7), (4, 2), border="zeros", causal=(False, True), **TABLES),
    "shift": Case((5, 7), 3, border="shift", **TABLES),
    "shift even": Case((5, 7), (4, 2), border="shift", **TABLES),
    "shift dilated": Case((11, 8), (3, 2), border="shift", dilation=(2, 3), **TABLES),
    "shift dilated strided": Case((11, 8), (3, 2), border="shift", dilation=(2, 3), stride=(3, 2), **TABLES),
    "shift causal": Case((7, 5), 3, border="shift", causal=(True, False), dilation=(2, 1), **TABLES),
    "shift larger than the map": Case((3, 5), (7, 4), border="shift", **TABLES),
    "shift larger than a phase": Case((7,), 4, border="shift", dilation=3, **TABLES),
    "wrap": Case((5, 7), 3, border="wrap", **TABLES),
    "wrap more than once around": Case((3, 2), (7, 5), border="wrap", **TABLES),
    "wrap dilated causal": Case((5, 7), (3, 2), border="wrap", dilation=(3, 4), causal=(True, False), **TABLES),
    "wrap dilated beyond the map": Case((5, 7), 3, border="wrap", dilation=(6, 9), **TABLES),
    "mask and wrap": Case((5, 7), (3, 4), border=("mask", "wrap"), **TABLES),
    "wrap and zeros": Case((5, 7), (4, 3), border=("wrap", "zeros"), dilation=(1, 2), **TABLES),
    "shift and mask": Case((7, 5), 3, border=("shift", "mask"), stride=(1, 2), **TABLES),
    "zeros and shift": Case((5, 7), (3, 4), border=("zeros", "shift"), causal=(True, False), **TABLES),
    "all borders": Case((3, 4, 5), (2, 3, 3), border=("wrap", "mask", "zeros"), batch=1, **TABLES),
    "shared": Case((7, 11), (5, 4), shared_by=(2, 3), **TABLES),
    "shared blocks": Case((7, 8), (3, 4), shared_by=(3, 4), **TABLES),
    "shared halos": Case((13, 7), (8, 5), shared_by=(4, 3), relative=True),
    "shared line": Case((17,), 5, shared_by=4, **TABLES),
    "shared volume": Case((3, 5, 4), (2, 3, 3), shared_by=(2, 1, 3), batch=1, **TABLES),
    "shared strided": Case((11, 13), (5, 6), shared_by=(3, 4), stride=(2, 3), **TABLES),
    "shared dilated": Case((13, 11), (3, 4), shared_by=(2, 3), dilation=(3, 2), **TABLES),
    "shared dilated strided": Case((17, 13), (4, 3), shared_by=(3, 2), dilation=(2, 3), stride=(3, 2), **TABLES),
    "shared, blocks begin in a group": Case((61,), 4, shared_by=2, dilation=2, stride=3, border="wrap", **TABLES),
    "shared causal": Case((7, 11), (4, 5), shared_by=(3, 2), causal=(True, False), **TABLES),
    "shared causal dilated strided": Case((23,), 4, shared_by=3, causal=True, dilation=2, stride=3, **TABLES),
    "shared causal zeros": Case((7, 6), 4, shared_by=3, causal=(True, False), border="zeros", **TABLES),
    "shared causal wrap": Case((7, 5), (4, 7), shared_by=(2, 3), causal=True, border="wrap", **TABLES),
    "shared causal shift": Case((7, 9), (4, 3), shared_by=2, causal=(False, True), border="shift", **TABLES),
    "shared zeros": Case((7, 5), (4, 3), shared_by=(3, 2), border="zeros", **TABLES),
    "shared shift": Case((9, 7), (5, 4), shared_by=(2, 3), border="shift", **TABLES),
    "shared shift larger than a phase": Case((9,), 5, shared_by=3, dilation=2, border="shift", **TABLES),
    "shared wrap": Case((5, 7), (4, 3), shared_by=(3, 2), border="wrap", **TABLES),
    "shared, one axis each way": Case((6, 8), (3, 5), shared_by=(1, 5), border=("shift", "wrap"), **TABLES),
    "shared by more than the map": Case((3, 2), (7, 5), shared_by=(6, 5), **TABLES),
    "shared covers": Case((3, 4), (7, 4), shared_by=(2, 4), **TABLES),
    "scale zero": Case((5, 7), scale=0.0, **TABLES),
    "scale one": Case((5, 7), scale=1.0, **TABLES),
    "scale negative": Case((5, 7), scale=-0.7, **TABLES),
    "value wider": Case((5, 7), head_dim=3, value_dim=5, **TABLES),
    "value narrower": Case((5, 7), head_dim=5, value_dim=1, **TABLES),
    "one channel": Case((5, 7), head_dim=1, value_dim=1, **TABLES),
    "many channels": Case((3, 5), head_dim=33, value_dim=17, **TABLES),
    "one head": Case((5, 7), heads=1, batch=1, **TABLES),
    "batch 0": Case((5, 7), batch=0, **TABLES),
    "batch 0 covers": Case((3, 2), 5, batch=0, **TABLES),
    "wide map": Case((2, 37), (3, 5), batch=1, head_dim=8, value_dim=8, **TABLES),
    "high map": Case((53, 2), (5, 3), batch=1, head_dim=8, value_dim=8, **TABLES),  # the kernel shares it out in parts
    "vector widths": Case((3, 17), (3, 7), batch=1, heads=3, head_dim=16, value_dim=16, **TABLES),
    "loud": Case((5, 7), loud=70.0, scale=1.0),  # logits up to 1e4: a naive exp overflows
    "loud covers": Case((3, 2), (5, 3), loud=70.0, scale=1.0),
    "loud zeros": Case((5, 7), border="zeros", loud=70.0, scale=1.0, **TABLES),
    "high bias": Case((5, 7), bias=True, bias_level=1e4),  # large logits that differ by little
    "low bias": Case((5, 7), bias=True, bias_level=-1e4),
    "low bias covers": Case((3, 2), (5, 3), bias=True, bias_level=-1e4),
    "narrow images": Case((2, 5), 3, batch=17, head_dim=2, value_dim=2, **TABLES),  # the kernel lays some side by side
    "memory channels first strided": Case((5, 13), (3, 4), stride=(1, 2), layout="channels first", **TABLES),
    **{f"memory {layout}": Case((5, 7), (3, 4), layout=layout, value_dim=3, **TABLES) for layout in LAYOUTS[1:]},
    **{f"memory {layout} covers": Case((3, 2), 5, layout=layout, relative=True) for layout in LAYOUTS[1:]},
}


# These in every dtype; the others in float32, which every backend takes, and in the rest where the sweeps run.
KINDS = (
    "both tables",
    "covers",
    "dilation and stride",
    "causal rows",
    "zeros even dilated",
    "shift dilated strided",
    "wrap dilated causal",
    "mask and wrap",
    "shared dilated strided",
    "shared causal wrap",
    "value narrower",
    "loud",
    "memory sliced",
)


def each_named(names: Iterable[str] = NAMED, dtypes: Iterable[torch.dtype] = DTYPES) -> pytest.MarkDecorator:
    """The cases as ``name`` and ``dtype`` of a test."""
    pairs = [
        pytest.param(
            name,
            dtype,
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[] if dtype == torch.float32 or name in KINDS else pytest.mark.sweep,
        )
        for name, dtype in product(names, dtypes)
    ]
    return pytest.mark.parametrize(("name", "dtype"), pairs)


def named(name: str, dtype: torch.dtype) -> Case:
    return replace(NAMED[name], dtype=dtype)


@each_named()
@every_backend(ALL)
def test_named_case(contestant, name, dtype):
    check_or_refusal(contestant, named(name, dtype))


@every_backend(ALL)
def test_no_backend_refuses_everything(contestant):
    """A backend that refused every case would pass the test above with nothing compared."""
    ran = Counter()
    for name, dtype in product(NAMED, DTYPES):
        ran[dtype] += not refuses(contestant, named(name, dtype))
    assert ran[torch.float32] >= 10, ran
    # The dtypes that it takes at all, it takes as often as float32.
    assert {count for count in ran.values() if count} == {ran[torch.float32]}, ran


def test_reference_and_blocked_take_everything():
    """They are what is left when the others refuse, so there is always someone to call."""
    for contestant in ALL:
        if contestant.backend.name in ("reference", "blocked"):
            assert not [name for name, dtype in product(NAMED, DTYPES) if refuses(contestant, named(name, dtype))]
    assert {"reference", "blocked"} <= {contestant.backend.name for contestant in ALL}


def test_required_backends_are_here():
    """NEARSIGHT_REQUIRE=native,flex makes their absence an error: for machines that are known to have them."""
    required = [name for name in os.environ.get("NEARSIGHT_REQUIRE", "").split(",") if name]
    reasons = {backend.name: backend.unavailable() for backend in BACKENDS}
    assert {name: reasons.get(name, "unknown backend") for name in required} == dict.fromkeys(required)


def test_every_variant_is_a_contestant():
    class Fake:
        name = "fake"
        unavailable = staticmethod(lambda: None)
        variants = staticmethod(lambda: ("scalar", "avx2"))

    class Absent:
        name = "absent"
        unavailable = staticmethod(lambda: "no such thing here")

    assert [str(one) for one in contestants([Fake, Absent])] == ["fake[scalar]", "fake[avx2]"]


# --------------------------------------------------------------------------------------------------------- hypothesis


@st.composite
def cases(draw) -> Case:
    rank = draw(st.integers(1, 3))
    longest = {1: 17, 2: 6, 3: 4}[rank]
    size = tuple(draw(st.integers(1, longest)) for _ in range(rank))
    borders = st.sampled_from(["mask", "zeros", "shift", "wrap"])
    border = draw(st.one_of(borders, st.tuples(*[borders] * rank)))
    causal, dilation = (False,) * rank, (1,) * rank
    covers = draw(st.booleans())
    if covers:
        border = draw(st.sampled_from(["mask", "shift"]))
        least = [n if border == "shift" else 2 * n - 1 for n in size]
        kernel_size = tuple(k + draw(st.integers(0, 2)) for k in least)
    else:
        kernel_size = tuple(draw(st.integers(1, {1: 2 * longest, 2: 8, 3: 4}[rank])) for _ in range(rank))
        causal = tuple(draw(st.booleans()) for _ in range(rank))
        dilation = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    shared = not covers and draw(st.booleans())
    return Case(
        size,
        kernel_size,
        shared_by=tuple(draw(st.integers(1, k)) for k in kernel_size) if shared else 1,
        stride=tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        dilation=dilation,
        causal=causal,
        border=border,
        batch=draw(st.sampled_from([1, 2, 0])),
        heads=draw(st.integers(1, 2)),
        head_dim=draw(st.integers(1, 5)),
        value_dim=draw(st.integers(1, 5)),
        bias=draw(st.booleans()),
        relative=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 1.0, -0.7])),
        layout=draw(st.sampled_from(LAYOUTS)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@every_backend(ALL)
def test_any_geometry(contestant):
    outcomes = Counter()

    @settings(max_examples=120)
    @given(cases())
    def run(case):
        outcomes[check_or_refusal(contestant, case)] += 1

    run()
    assert outcomes["ran"] >= 10, outcomes


@pytest.mark.sweep
@every_backend(ALL)
def test_any_geometry_many_times(contestant):
    settings(max_examples=2000)(given(cases())(lambda case: check_or_refusal(contestant, case) and None))()


# ---------------------------------------------------------------------------------------------------- what else holds


@every_backend(ALL)
@pytest.mark.parametrize("border", ["mask", "shift"])
def test_by_hand(contestant, border):
    """The image of 1 x 2 cells worked out in test_oracle.py: weights 2/3 1/3 and 4/5 1/5 of the values 3 and 9."""
    query, key, value = (
        torch.tensor(pair).view(1, 1, 1, 2, 1) for pair in ([1.0, 2.0], [float(np.log(2)), 0.0], [3.0, 9.0])
    )
    out = contestant.attend(query, key, value, ns.Window((1, 3), border=border), scale=1.0)
    assert_near("values", out.flatten(), np.array([5, 4.2]))


@by_dtype
@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 2)], ids=str)
@every_backend(ALL)
def test_global_attention(contestant, size, dtype):
    """Its own oracle: all cells, tables of 2n-1 entries indexed by offset + n - 1."""
    case = Case(size, tuple(2 * n - 1 for n in size), value_dim=3, dtype=dtype, **TABLES)
    incoming, inputs, arguments = tensors_of(case, grad=True)
    if contestant.why_not(*inputs[:3], case.window, **arguments) is not None:
        with pytest.raises(BackendError):
            contestant.attend_globally(*inputs[:3], **arguments)
        return
    axes = [oracle.Axis(n, n, border="global") for n in size]
    grad, *numbers = inputs_of(case)
    out = contestant.attend_globally(*inputs[:3], **arguments)
    reference, _, condition = oracle.attention(*numbers[:3], axes, *numbers[3:])
    assert_near("values", out, reference, condition)
    found = torch.autograd.grad(out, inputs, incoming)
    for gradient, wanted in zip(found, oracle.gradients(grad, *numbers[:3], axes, *numbers[3:]), strict=True):
        assert_near("gradient", gradient, wanted, condition, slack_of(case))


@pytest.mark.parametrize("name", NAMED)
def test_attention_weights(name):
    case = NAMED[name]
    _, inputs, arguments = tensors_of(case)
    _, expected, largest = oracle.attention(*inputs_of(case)[1:4], case.axes, *inputs_of(case)[4:], case.scale)
    found = ns.attention_weights(*inputs[:2], case.window, **arguments)
    assert_near("weights", found, expected, max(1, largest))
    queries = torch.cartesian_prod(*(torch.arange(axis.queries) for axis in case.axes)).view(-1, case.rank)
    some = queries[torch.randperm(len(queries))[:4]]
    chosen = ns.attention_weights(*inputs[:2], case.window, queries=some, **arguments)
    assert_near("chosen", chosen, expected[(slice(None), slice(None), *some.T.numpy())], max(1, largest))


def refuses(contestant: Contestant, case: Case) -> bool:
    _, inputs, arguments = tensors_of(case, grad=True)
    return contestant.why_not(*inputs[:3], case.window, **arguments) is not None


def able(contestant: Contestant, case: Case) -> Case:
    """The case, or one that covers the map for a backend that takes no other."""
    if not refuses(contestant, case):
        return case
    options = {"border": "mask", "dilation": 1, "causal": False, "shared_by": 1}
    covering = replace(case, kernel_size=tuple(2 * n - 1 for n in case.size), **options)
    assert not refuses(contestant, covering)
    return covering


SMALL = Case((3, 5), (3, 4), value_dim=3, dtype=torch.float32, **TABLES)


@every_backend(ALL)
def test_each_input_alone_gets_its_gradient(contestant):
    """An autograd function that asks which gradients are needed must not mix up the answers."""
    case = able(contestant, SMALL)
    expected = expected_of(case)[1]
    for wanted in range(len(expected)):
        incoming, inputs, arguments = tensors_of(case)
        inputs[wanted].requires_grad_()
        out = contestant.attend(*inputs[:3], case.window, **arguments)
        (found,) = torch.autograd.grad(out, inputs[wanted], incoming)
        assert_near(f"gradient by input {wanted} alone", found, expected[wanted], expected_of(case)[3], slack_of(case))


@every_backend(ALL)
def test_gradient_of_a_sum(contestant):
    """``out.sum()`` hands back a gradient whose strides are all zero."""
    case = able(contestant, SMALL)
    _, inputs, arguments = tensors_of(case, grad=True)
    found = torch.autograd.grad(contestant.attend(*inputs[:3], case.window, **arguments).sum(), inputs)
    _, *numbers = inputs_of(case)
    ones = np.ones((*numbers[0].shape[:-1], case.value_dim))
    expected = oracle.gradients(ones, *numbers[:3], case.axes, *numbers[3:])
    for gradient, reference in zip(found, expected, strict=True):
        assert_near("gradient", gradient, reference, expected_of(case)[3])


@every_backend(ALL)
def test_one_tensor_as_query_key_and_value(contestant):
    """Gradients by the three places add up."""
    case = replace(able(contestant, SMALL), value_dim=4, bias=False, relative=False)
    grad, _, key, *_ = inputs_of(case)
    tensor = torch.from_numpy(key).float().requires_grad_()
    out = contestant.attend(tensor, tensor, tensor, case.window)
    (found,) = torch.autograd.grad(out, tensor, torch.from_numpy(grad).float())
    assert_near("values", out, oracle.attention(key, key, key, case.axes)[0], 10)
    assert_near("gradient", found, sum(oracle.gradients(grad, key, key, key, case.axes)), 10)


@every_backend(ALL)
def test_packed_and_expanded_inputs(contestant):
    """Query, key and value as slices of one projection; one key and value for the whole batch, with stride 0."""
    case = replace(able(contestant, SMALL), value_dim=4, bias=False, relative=False)
    _, query, key, value, *_ = inputs_of(case)
    packed = torch.from_numpy(np.stack([query, key, value], axis=2)).float()  # B N 3 H W D
    out = contestant.attend(*packed.unbind(2), case.window)
    assert_near("packed", out, expected_of(case)[0], 10)
    shared = [torch.from_numpy(one[:1]).float().expand(one.shape).requires_grad_() for one in (key, value)]
    out = contestant.attend(torch.from_numpy(query).float(), *shared, case.window)
    repeated = [np.repeat(one[:1], case.batch, axis=0) for one in (key, value)]
    assert_near("expanded", out, oracle.attention(query, *repeated, case.axes)[0], 10)


@every_backend(ALL)
def test_the_same_twice(contestant):
    """Bit for bit, gradients included."""
    case = able(contestant, replace(SMALL, size=(3, 17), batch=3))
    results = []
    for _ in range(2):
        incoming, inputs, arguments = tensors_of(case, grad=True)
        out = contestant.attend(*inputs[:3], case.window, **arguments)
        results.append([out, *torch.autograd.grad(out, inputs, incoming)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@every_backend(ALL)
def test_any_number_of_threads(contestant):
    case = able(contestant, replace(SMALL, size=(3, 17), batch=3))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            check_contract(contestant.attend, case)
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------- NaN and inf

CONTAINED = {
    "mask": Case((7, 11), 3, batch=2, heads=2, dtype=torch.float32, **TABLES),
    "zeros": Case((7, 11), 3, border="zeros", dtype=torch.float32, **TABLES),
    "shift": Case((7, 11), (3, 4), border="shift", dilation=(1, 2), dtype=torch.float32, **TABLES),
    "wrap": Case((7, 11), 3, border="wrap", dtype=torch.float32, **TABLES),
    "stride": Case((7, 11), 3, stride=2, dtype=torch.float32, **TABLES),
    "causal": Case((19,), 4, causal=True, dtype=torch.float32, **TABLES),
    "shared": Case((7, 11), (4, 3), shared_by=(2, 3), causal=(True, False), dtype=torch.float32, **TABLES),
    "mask and wrap": Case((7, 11), 3, border=("mask", "wrap"), dtype=torch.float32, **TABLES),
    "covers": Case((3, 2), (5, 3), dtype=torch.float32, **TABLES),
    "half": Case((7, 11), 3, dtype=torch.bfloat16),
}
POISON = {"NaN": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
# A corner, an edge, the middle: where padding, clamping and repeating the last cell could bring the poison elsewhere.
SPOTS = {"first": lambda n: 0, "last": lambda n: n - 1, "middle": lambda n: n // 2}


def touched_by(case: Case, which: int, cell: tuple[int, ...]) -> np.ndarray:
    """Which results (B, N, *out) may know about one cell of the query (0), the key (1) or the value (2) of [0, 1]."""
    touched = np.zeros((case.batch, case.heads, *(axis.queries for axis in case.axes)), dtype=bool)
    for query in [cell] if which == 0 else oracle.queries_that_see(case.axes, cell):
        touched[(0, 1, *query)] = True
    return touched


def check_containment(attend, case: Case, which: int, spot: str, poison: float) -> None:
    """A cell that is not finite changes nothing for the queries that do not see it, and NaN is seen by those that do."""
    _, inputs, arguments = tensors_of(case)
    clean = attend(*inputs[:3], case.window, **arguments)
    cell = tuple(SPOTS[spot](n) for n in inputs[which].shape[2:-1])
    inputs[which][(0, 1, *cell, 0)] = poison
    out = attend(*inputs[:3], case.window, **arguments)
    touched = torch.from_numpy(touched_by(case, which, cell))
    expected = clean[~touched].double().numpy()
    assert_near("results that do not see the cell", out[~touched], expected, 4)
    if np.isnan(poison):
        assert out[touched].isnan().any(-1).all(), "a NaN was swallowed"


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("name", CONTAINED)
@every_backend(ALL)
def test_poison_stays_where_it_is_seen(contestant, name, which):
    case, index = CONTAINED[name], ("query", "key", "value").index(which)
    if refuses(contestant, case):
        return
    for spot, poison in product(SPOTS, POISON):
        check_containment(contestant.attend, case, index, spot, POISON[poison])
