# SPDX-License-Identifier: Apache-2.0
"""Tests of the tests: every classic fault, planted in a textbook implementation, has to fail the contract.

The textbook below is the equation with gathered windows, right as long as no fault is named. The faults are those found in
published code (design.md, "Why it exists") and those that a rewrite for speed invites.
"""

from __future__ import annotations

from math import prod

import numpy as np
import oracle
import pytest
import torch
from conftest import assert_near
from test_contract import CONTAINED, KINDS, NAMED, Case, check_containment, check_contract, expected_of, tensors_of
from torch import Tensor

FAULTS = {
    # name: the named case that has to catch it
    "softmax over the queries": "plain",
    "softmax over the heads": "plain",
    "padding votes": "plain",
    "padding does not vote": "zeros",
    "torus cut open": "wrap",
    "height and width exchanged in the result": "plain",
    "height and width exchanged in the window": "window not square",
    "relative term dropped": "relative",
    "relative term not scaled": "relative",
    "relative vectors of the key": "relative",
    "row and column tables exchanged": "relative square",
    "tables read backwards": "bias",
    "bias dropped": "bias",
    "bias scaled": "bias",
    "one softmax for all heads": "plain",
    "logits summed over the heads": "plain",
    "no sum over channels": "plain",
    "even block one to the right": "even",
    "zero scale is the default": "scale zero",
    "scale of one ignored": "scale one",
    "scale by value_dim": "value wider",
    "causal block without the query": "causal",
    "causal block with one cell more": "causal",
    "causal axis forgotten": "causal rows",
    "block not slid": "shift",
    "block slid on the undilated map": "shift dilated",
    "table not moved with the block": "shift",
    "stride from the second cell": "stride",
    "dilation ignored": "dilation",
    "naive exponential": "loud",
    "masked with a number": "low bias",
    "half precision inside": "plain",
    "result in float32": "plain",
    "key without gradient": "plain",
    "weights without gradient": "plain",
    "bias without gradient": "bias",
    "key gradient of the first head only": "plain",
    "writes to its input": "plain",
}
IN_HALF = {"half precision inside", "result in float32"}


def textbook(query, key, value, window, *, bias=None, relative=None, scale=None, fault=None) -> Tensor:
    """(B, N, *out, D), (B, N, *in, D), (B, N, *in, E) -> (B, N, *out, E)"""
    size, dtype = key.shape[2:-1], query.dtype
    axes = [
        oracle.Axis(n, a.kernel_size, a.stride, a.dilation, a.border, a.causal, a.shared_by)
        for n, a in zipped(window, size)
    ]
    cells, entries, takes_part = gathered_places(axes, fault)
    if fault not in IN_HALF:
        query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    scale = scale_of(scale, query, value, fault)
    if fault == "key without gradient":
        key = key.detach()
    if fault == "key gradient of the first head only":
        key = torch.cat([key[:, :1], key[:, 1:].detach()], 1)
    q = query.flatten(2, -2)  # B N Q D
    k, v = (with_zero_cell(x, len(size)).flatten(2, -2)[:, :, cells] for x in (key, value))  # B N Q K D
    products = q[..., None, :] * k
    if fault == "no sum over channels":
        weights = (scale * products).masked_fill(~takes_part[..., None], float("-inf")).softmax(-2)
        return (weights * v).sum(-2).view(query.shape).to(dtype)
    logits = scale * products.sum(-1)
    for axis, table in enumerate(relative_tables(relative, fault)):
        vectors = table.to(logits.dtype)[:, entries[axis]]  # N Q K D
        if fault == "relative vectors of the key":
            logits = logits + scale * (k * vectors).sum(-1)
        else:
            logits = logits + (1 if fault == "relative term not scaled" else scale) * (q[..., None, :] * vectors).sum(
                -1
            )
    if bias is not None and fault != "bias dropped":
        table = bias.detach() if fault == "bias without gradient" else bias
        table = table.flip(1) if fault == "tables read backwards" else table
        term = table.to(logits.dtype)[(slice(None), *entries)]  # N Q K
        logits = logits + (scale * term if fault == "bias scaled" else term)
    weights = softmax(logits, takes_part, fault).to(v.dtype)
    if fault == "weights without gradient":
        weights = weights.detach()
    out = (weights[..., None] * v).sum(-2)
    out_size = query.shape[2:-1]
    if fault == "height and width exchanged in the result":
        out = out.unflatten(2, out_size[::-1]).transpose(2, -2)
    out = out.reshape(*query.shape[:-1], value.shape[-1])
    if fault == "writes to its input":
        query.data.mul_(1.5)
    return out.float() if fault == "result in float32" else out.to(dtype)


def zipped(window, size):
    return zip(size, window.axes(len(size)), strict=True)


def gathered_places(axes, fault):
    """For every (query, place in the window): the flattened cell of the padded map, the entries, whether it takes part."""
    wrong = wrong_axes(axes, fault)
    window, padded = [axis.kernel_size for axis in wrong], [axis.cells + 1 for axis in axes]
    queries = list(np.ndindex(*(axis.queries for axis in axes)))
    cells = torch.zeros(len(queries), prod(window), dtype=torch.long)
    entries = torch.zeros(len(axes), *cells.shape, dtype=torch.long)
    takes_part = torch.zeros(cells.shape, dtype=torch.bool)
    for row, query in enumerate(queries):
        for place, cell, entry in oracle.block(wrong, moved(axes, query, fault)):
            column = np.ravel_multi_index(place, window)
            cells[row, column] = int(np.ravel_multi_index(cell, padded))
            entries[:, row, column] = torch.tensor(moved_entry(axes, entry, place, fault))
            takes_part[row, column] = True
    return cells, tuple(entries), takes_part


def wrong_axes(axes, fault):
    """The geometry that a fault mistakes for the right one."""
    if fault == "height and width exchanged in the window":
        sizes = [axis.kernel_size for axis in axes]
        return [axis._replace(kernel_size=k) for axis, k in zip(axes, reversed(sizes), strict=True)]
    changes = {
        "padding votes": {"border": "zeros"},
        "padding does not vote": {"border": "mask"},
        "torus cut open": {"border": "mask"},
        "causal axis forgotten": {"causal": False},
        "block not slid": {"border": "mask"},
        "block slid on the undilated map": {"dilation": 1},
        "dilation ignored": {"dilation": 1},
    }.get(fault, {})
    return [axis._replace(**changes) for axis in axes]


def moved(axes, query, fault):
    """The query whose block is taken instead, one cell off along the axes that a fault is about."""
    if fault == "stride from the second cell":
        return [min(p + 1, axis.queries - 1) for p, axis in zip(query, axes, strict=True)]
    return [p + steps_off(axis, fault) for p, axis in zip(query, axes, strict=True)]


def steps_off(axis, fault):
    return {
        "even block one to the right": int(axis.kernel_size % 2 == 0),
        "causal block without the query": -int(axis.causal),
        "causal block with one cell more": int(axis.causal),
    }.get(fault, 0)


def moved_entry(axes, entry, place, fault):
    if fault == "block not slid":  # the entries of a table of 2k-1 all the same
        return [e + axis.kernel_size // 2 for axis, e in zip(axes, entry, strict=True)]
    return place if fault == "table not moved with the block" else entry


def scale_of(scale, query, value, fault):
    default = (value if fault == "scale by value_dim" else query).shape[-1] ** -0.5
    if fault == "zero scale is the default":
        return scale or default
    if fault == "scale of one ignored":
        return default
    return default if scale is None else scale


def with_zero_cell(tensor, rank):
    return torch.nn.functional.pad(tensor, [0, 0, *[0, 1] * rank])


def relative_tables(relative, fault):
    if relative is None or fault == "relative term dropped":
        return []
    return list(reversed(relative)) if fault == "row and column tables exchanged" else relative


def softmax(logits, takes_part, fault):
    """(B, N, Q, K): over the last axis."""
    if fault == "masked with a number":
        return logits.masked_fill(~takes_part, -1000).softmax(-1)
    if fault == "logits summed over the heads":
        logits = logits.sum(1, keepdim=True).expand(logits.shape)
    logits = logits.masked_fill(~takes_part, float("-inf"))
    if fault == "softmax over the queries":
        return logits.softmax(-2).nan_to_num(0)
    if fault == "softmax over the heads":
        return logits.softmax(1).nan_to_num(0)
    if fault == "naive exponential":
        return logits.exp() / logits.exp().sum(-1, keepdim=True)
    weights = logits.softmax(-1)
    return weights[:, :1].expand(weights.shape) if fault == "one softmax for all heads" else weights


def planted(fault):
    return lambda *args, **kwargs: textbook(*args, fault=fault, **kwargs)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.sweep) for name in NAMED]
)
def test_unbroken_textbook_passes(name):
    check_contract(textbook, NAMED[name])


@pytest.mark.parametrize("fault", FAULTS)
def test_contract_catches(fault):
    case = NAMED[FAULTS[fault]]
    if fault in IN_HALF:
        case = Case((5, 7), loud=4.0, scale=1.0, dtype=torch.bfloat16)
    check_contract(textbook, case)
    with pytest.raises(AssertionError):
        check_contract(planted(fault), case)


def test_no_fault_is_a_typing_error():
    """A fault whose name the textbook does not know would plant nothing; the test above then fails, as here."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"), pytest.raises(AssertionError):
        check_contract(planted("no such fault"), NAMED["plain"])


def leaky(query, key, value, window, **kwargs):
    """A matrix product over the whole map, where 0 * NaN brings a cell that is not finite to all queries."""
    touch = (key.sum() + value.sum()) * 0
    return textbook(query, key, value, window, **kwargs) + touch


def deaf(query, key, value, window, **kwargs):
    """Replaces what is not finite, so that nobody learns of it."""
    return textbook(*(x.nan_to_num() for x in (query, key, value)), window, **kwargs)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_containment_catches(which):
    case = CONTAINED["mask"]
    check_containment(textbook, case, which, "middle", float("nan"))
    with pytest.raises(AssertionError, match="swallowed"):
        check_containment(deaf, case, which, "middle", float("nan"))
    if which > 0:
        for poison in (float("nan"), float("inf")):
            with pytest.raises(AssertionError, match="do not see"):
                check_containment(leaky, case, which, "middle", poison)


def test_comparison_catches():
    """The yardstick: a wrong shape, a NaN, an infinity and an error just above the bound; and not one just below."""
    expected, gradients, *_ = expected_of(NAMED["plain"])
    out = torch.from_numpy(expected)
    assert len(gradients) == 3
    assert_near("itself", out, expected)
    assert_near("a rounding", out.float(), expected)
    for wrong in (out[:1], out * float("nan"), out / 0, out + 1e-13, out.bfloat16().double()):
        with pytest.raises(AssertionError):
            assert_near("wrong", wrong, expected)


def test_every_input_is_compared():
    _, inputs, _ = tensors_of(NAMED["both tables"], grad=True)
    assert len(inputs) == 6
    assert len(expected_of(NAMED["both tables"])[1]) == 6
