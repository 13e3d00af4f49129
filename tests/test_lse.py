# SPDX-License-Identifier: Apache-2.0
"""What attention is taken apart into: scores, weights, log-sum-exp and its merging, and groups of query heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from conftest import ALL, Contestant, assert_near, every_backend
from test_contract import NAMED, Case, each_named, expected_of, inputs_of, slack_of, tensors_of

import nearsight as ns
from nearsight.attention import flex
from nearsight.errors import BackendError, ShapeError

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NAMES = (
    "line",
    "volume",
    "even",
    "larger than the map",
    "covers",
    "dilation and stride",
    "causal rows",
    "zeros even dilated",
    "shift dilated strided",
    "wrap dilated causal",
    "value narrower",
    "loud",
    "low bias",
    "memory heads last",
)
FLEX = Contestant(flex)  # its forward runs on the CPU


@pytest.fixture(autouse=True)
def _flex_as_it_stands(monkeypatch):
    """FlexAttention written out, where PyTorch would trace it anew for every case."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def takes(contestant: Contestant, case: Case, *, grad: bool = True) -> bool:
    """Whether a backend takes the case; what it does not take, it has to refuse when it is named."""
    _, inputs, arguments = tensors_of(case, grad=grad)
    problem = ns.attention.problem.describe(
        *inputs[:3], case.window, arguments["bias"], arguments["relative"], lse=True
    )
    reason = contestant.backend.why_not(problem)
    if reason is not None:
        with pytest.raises(BackendError, match="cannot run this"):
            contestant.attend(*inputs[:3], case.window, **arguments, return_lse=True)
    return reason is None


# --------------------------------------------------------------------------------------------------------- log-sum-exp


@each_named(NAMES)
@every_backend((*ALL, FLEX))
def test_log_sum_exp(contestant, name, dtype):
    case = replace(NAMED[name], dtype=dtype)
    _, query, key, _, bias, relative = inputs_of(case)
    if not takes(contestant, case, grad=False):
        return
    _, inputs, arguments = tensors_of(case)
    out, lse = contestant.attend(*inputs[:3], case.window, **arguments, return_lse=True)
    expected, _, condition, _ = expected_of(case)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_near("values", out, expected, condition)
    assert_near("lse", lse, oracle.log_sum_exp(query, key, case.axes, bias, relative, case.scale), condition)


@each_named([name for name in NAMES if name != "loud"], (torch.float64, torch.float32))
@every_backend(ALL)
def test_gradients_of_values_and_log_sum_exp(contestant, name, dtype):
    case = replace(NAMED[name], dtype=dtype)
    if not takes(contestant, case):
        return
    grad, *numbers = inputs_of(case)
    incoming, inputs, arguments = tensors_of(case, grad=True)
    out, lse = contestant.attend(*inputs[:3], case.window, **arguments, return_lse=True)
    grad_lse = torch.randn(lse.shape).to(dtype)
    found = torch.autograd.grad((out, lse), inputs, (incoming, grad_lse))
    *maps, bias, relative = numbers
    wanted = oracle.gradients(grad, *maps, case.axes, bias, relative, case.scale, grad_lse.double().numpy())
    condition = expected_of(case)[3]
    for gradient, reference in zip(found, wanted, strict=True):
        assert_near("gradient", gradient, reference, condition, slack_of(case))


@every_backend(ALL)
def test_gradient_of_the_log_sum_exp_alone(contestant):
    """Its own gradient by the query is the mean key, and by the value nothing."""
    case = replace(NAMED["plain"], dtype=torch.float32)
    if not takes(contestant, case):
        return
    _, (query, key, value), _ = tensors_of(case, grad=True)
    _, lse = contestant.attend(query, key, value, case.window, return_lse=True)
    by_query, by_value = torch.autograd.grad(lse.sum(), (query, value), allow_unused=True)
    mean = ns.local_attention(query, key, key, case.window, backend="reference") * case.head_dim**-0.5
    torch.testing.assert_close(by_query, mean)
    assert by_value is None or not by_value.any()


# --------------------------------------------------------------------------------------------------- scores and weights


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_logarithms_of_the_weights(name):
    """exp(score - lse) is the oracle's weight at every place, zero where a cell takes no part."""
    case = NAMED[name]
    _, *numbers = inputs_of(case)
    _, (query, key, *_), arguments = tensors_of(case)
    scores = ns.attention_scores(query, key, case.window, **arguments)
    _, weights, condition = oracle.attention(*numbers[:3], case.axes, *numbers[3:], case.scale)
    lse = oracle.log_sum_exp(*numbers[:2], case.axes, *numbers[3:], case.scale)
    apart = (scores - torch.from_numpy(lse).view(*lse.shape, *[1] * case.rank)).exp()
    assert_near("weights of scores", apart, weights, condition)
    assert_near("weights", ns.attention_weights(query, key, case.window, **arguments), weights, condition)
    assert ((scores == float("-inf")).numpy() == (weights == 0)).all() or name == "loud"


# ------------------------------------------------------------------------------------------------------------- merging


def parts_of(rows: int, columns: int, seen: int):
    """A local attention, registers that every query sees, and a sink: float64, all with gradients."""
    query, key, value = (torch.randn(2, 3, rows, columns, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keys, values = (torch.randn(3, seen, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sink = torch.randn(3, dtype=torch.float64, requires_grad=True)
    return query, key, value, keys, values, sink


def merged(query, key, value, keys, values, sink, backend):
    near = ns.local_attention(query, key, value, ns.Window(3), return_lse=True, backend=backend)
    scores = torch.einsum("bnhwd, nrd -> bnhwr", query, keys) / 2
    registers = torch.einsum("bnhwr, nrd -> bnhwd", scores.softmax(-1), values), scores.logsumexp(-1)
    nothing = torch.zeros_like(query), sink[:, None, None].expand(query.shape[:-1])
    return ns.merge_attentions(*zip(near, registers, nothing, strict=True))


def in_one_softmax(query, key, value, keys, values, sink):
    """The same from the window's scores, cell by cell."""
    b, n, h, w, _ = query.shape
    out, lse = torch.empty_like(query), query.new_empty(b, n, h, w)
    for i in range(h):
        for j in range(w):
            rows, columns = slice(max(i - 1, 0), i + 2), slice(max(j - 1, 0), j + 2)
            seen = torch.cat([key[:, :, rows, columns].flatten(2, 3), keys.expand(b, -1, -1, -1)], 2)
            carried = torch.cat([value[:, :, rows, columns].flatten(2, 3), values.expand(b, -1, -1, -1)], 2)
            logits = (seen @ query[:, :, i, j, :, None])[..., 0] / 2
            logits = torch.cat([logits, sink.expand(b, n)[..., None]], -1)
            weights = logits.softmax(-1)[..., :-1]
            out[:, :, i, j], lse[:, :, i, j] = (weights[..., None] * carried).sum(2), logits.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_registers_and_sinks_join_in_one_softmax(backend):
    inputs = parts_of(3, 5, 2)
    found, wanted = merged(*inputs, backend), in_one_softmax(*inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    incoming = [torch.randn_like(one) for one in wanted]
    for one, other in zip(*(torch.autograd.grad(pair, inputs, incoming) for pair in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def test_windows_that_do_not_overlap_merge_to_their_union():
    """On a line: the cells before the query, and those from it on, through two causal windows of a map and its mirror."""
    q, k, v = torch.randn(3, 1, 2, 11, 4, dtype=torch.float64)
    before = ns.local_attention(q, k, v, ns.Window(3, causal=True), return_lse=True)
    mirrored = (one.flip(2) for one in (q, k, v))
    after = [one.flip(2) for one in ns.local_attention(*mirrored, ns.Window(3, causal=True), return_lse=True)]
    itself = v, (q * k).sum(-1) / 2
    twice, _ = ns.merge_attentions(*zip(before, after, strict=True))
    out, lse = ns.local_attention(q, k, v, ns.Window(5), return_lse=True)
    # The query's own cell votes in both; with it the union votes once more.
    joined, total = ns.merge_attentions([out, itself[0]], [lse, itself[1]])
    torch.testing.assert_close(twice, joined)
    assert (total > lse).all()


def test_query_without_keys_gets_nothing():
    outputs = [torch.full((2, 3), float("nan"), requires_grad=True), torch.ones(2, 3, requires_grad=True)]
    lses = [
        torch.tensor([float("-inf")] * 2, requires_grad=True),
        torch.tensor([0.5, float("-inf")], requires_grad=True),
    ]
    out, lse = ns.merge_attentions(outputs, lses)
    assert out.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert lse.tolist() == [0.5, float("-inf")]
    gradients = torch.autograd.grad(out.sum() + lse[0], (*outputs, *lses))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_half_precision_is_merged_in_float32():
    out, lse = ns.merge_attentions([torch.ones(5, 2).bfloat16()] * 3, [torch.tensor([300.0, 0, -300, 1, 2])] * 3)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse, torch.tensor([300.0, 0, -300, 1, 2]) + np.log(3).astype(np.float32))


@pytest.mark.parametrize("shapes", [([], []), ([(2, 3)], []), ([(2, 3)], [(3,)]), ([(2, 3), (3, 3)], [(2,), (3,)])])
def test_what_does_not_fit_together_is_refused(shapes):
    outputs, lses = ([torch.zeros(shape) for shape in some] for some in shapes)
    with pytest.raises(ShapeError, match="one log-sum-exp"):
        ns.merge_attentions(outputs, lses)


# ------------------------------------------------------------------------------------------------ fewer keys than queries


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("name", ["volume", "covers without tables", "shift dilated strided", "zeros even dilated"])
@every_backend((*ALL, FLEX))
def test_grouped_query_attention(contestant, name, kept):
    """Keys and values of fewer heads: values as if they were repeated, gradients summed over each group."""
    case = replace(NAMED[name], heads=4, dtype=torch.float32)
    grad, query, key, value, bias, relative = inputs_of(case)
    key, value = (np.repeat(one[:, :kept], 4 // kept, 1) for one in (key, value))
    needs_grad = contestant is not FLEX
    incoming, inputs, arguments = tensors_of(case, grad=False)
    inputs[1:3] = [one[:, :kept].clone() for one in inputs[1:3]]
    for one in inputs:
        one.requires_grad_(needs_grad)
    problem = ns.attention.problem.describe(*inputs[:3], case.window, arguments["bias"], arguments["relative"])
    if contestant.backend.why_not(problem) is not None:
        with pytest.raises(BackendError, match="cannot run this"):
            contestant.attend(*inputs[:3], case.window, **arguments)
        return
    out = contestant.attend(*inputs[:3], case.window, **arguments)
    expected, _, condition = oracle.attention(query, key, value, case.axes, bias, relative, case.scale)
    assert_near("values", out, expected, condition)
    if not needs_grad:
        return
    wanted = oracle.gradients(grad, query, key, value, case.axes, bias, relative, case.scale)
    for place in (1, 2):
        repeated = wanted[place]
        wanted[place] = repeated.reshape(repeated.shape[0], kept, 4 // kept, *repeated.shape[2:]).sum(2)
    for gradient, reference in zip(torch.autograd.grad(out, inputs, incoming), wanted, strict=True):
        assert_near("gradient", gradient, reference, 4 * condition)


def test_log_sum_exp_weights_and_scores_of_groups():
    q = torch.randn(2, 6, 5, 7, 4)
    k = torch.randn(2, 2, 5, 7, 4)
    repeated = k.repeat_interleave(3, 1)
    for operation in (ns.attention_weights, ns.attention_scores):
        torch.testing.assert_close(operation(q, k, ns.Window(3)), operation(q, repeated, ns.Window(3)))
    found, wanted = (ns.local_attention(q, one, one, ns.Window(3), return_lse=True) for one in (k, repeated))
    torch.testing.assert_close(found, wanted)
