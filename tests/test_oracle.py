# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against numbers worked out by hand, and its gradients against finite differences."""

from math import log

import numpy as np
import oracle
import pytest

# An image of 1 x 2 cells, one head, one channel, a block of 1 x 3 cells, scale 1.
QUERY = np.array([1.0, 2.0]).reshape(1, 1, 1, 2, 1)
KEY = np.array([log(2), 0.0]).reshape(1, 1, 1, 2, 1)
VALUE = np.array([3.0, 9.0]).reshape(1, 1, 1, 2, 1)


def strip(border="mask", causal=False, kernel_size=3):
    return [oracle.Axis(1, 1), oracle.Axis(2, kernel_size, border=border, causal=causal)]


BY_HAND = {
    # Query 1 has logits ln 2 and 0, weights 2/3 and 1/3: 2/3*3 + 1/3*9 = 5.
    # Query 2 has logits 2 ln 2 = ln 4 and 0, weights 4/5 and 1/5: 12/5 + 9/5 = 21/5.
    "mask": (strip(), [5, 21 / 5]),
    # The block slides onto the only two cells there are: the same.
    "shift": (strip("shift"), [5, 21 / 5]),
    "global": (strip("global"), [5, 21 / 5]),
    # One more cell with logit 0 and value 0. Weights 2/4, 1/4: 6/4 + 9/4. Weights 4/6, 1/6: 12/6 + 9/6.
    "zeros": (strip("zeros"), [15 / 4, 7 / 2]),
    # Query 1 sees cells 2 1 2: weights 1/4 2/4 1/4, 6/4 + 18/4. Query 2 sees 1 2 1: weights 4/9 1/9 4/9, 24/9 + 9/9.
    "wrap": (strip("wrap"), [6, 11 / 3]),
    # Query 1 sees itself, query 2 sees both.
    "causal": (strip(causal=True, kernel_size=2), [3, 21 / 5]),
    # An even block has its extra cell on the left.
    "even": (strip(kernel_size=2), [3, 21 / 5]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(name):
    axes, expected = BY_HAND[name]
    out, _, _ = oracle.attention(QUERY, KEY, VALUE, axes, scale=1.0)
    np.testing.assert_allclose(out.ravel(), expected, rtol=1e-14)


def test_gradients_by_hand():
    # dlogit = weight * (value - out). Query 1: 2/3*(3-5) = -4/3 and 1/3*(9-5) = 4/3. Query 2: 4/5*(3-4.2) = -0.96 and 0.96.
    bias, rows, columns = np.zeros((1, 1, 3)), np.zeros((1, 1, 1)), np.zeros((1, 3, 1))
    found = oracle.gradients(np.ones_like(QUERY), QUERY, KEY, VALUE, strip(), bias, [rows, columns], 1.0)
    expected = [
        [-4 / 3 * log(2), -0.96 * log(2)],  # query: sum of dlogit * key
        [-4 / 3 * 1 - 0.96 * 2, 4 / 3 * 1 + 0.96 * 2],  # key: sum of dlogit * query
        [2 / 3 + 4 / 5, 1 / 3 + 1 / 5],  # value: sum of weights
        # Offset -1 is query 2 looking at cell 1; offset 0 is each at itself; offset +1 is query 1 looking at cell 2.
        [-0.96, -4 / 3 + 0.96, 4 / 3],  # bias
        [0],  # the only row offset: every softmax's dlogits sum to zero
        [-0.96 * 2, -4 / 3 * 1 + 0.96 * 2, 4 / 3 * 1],  # columns: as the bias, times the query
    ]
    for gradient, numbers in zip(found, expected, strict=True):
        np.testing.assert_allclose(gradient.ravel(), numbers, atol=1e-14)


def seen(*axis, query):
    return [cell for _, cell, _ in oracle.places(oracle.Axis(*axis), query)]


def test_places_by_hand():
    # cells, kernel, stride, dilation, border, causal
    assert seen(7, 3, 1, 1, "mask", False, query=0) == [0, 1]
    assert seen(7, 4, 1, 1, "mask", False, query=3) == [1, 2, 3, 4]
    assert seen(7, 3, 2, 1, "mask", False, query=1) == [1, 2, 3]
    assert seen(7, 3, 1, 2, "zeros", False, query=1) == [7, 1, 3]
    assert seen(7, 3, 1, 2, "wrap", False, query=0) == [5, 0, 2]
    assert seen(7, 3, 1, 1, "shift", False, query=6) == [4, 5, 6]
    assert seen(7, 3, 1, 2, "shift", False, query=1) == [1, 3, 5]
    assert seen(7, 3, 1, 3, "shift", False, query=1) == [1, 4]
    assert seen(7, 3, 1, 1, "shift", True, query=1) == [0, 1]
    assert oracle.places(oracle.Axis(7, 3, border="shift"), 0) == [(0, 0, 2), (1, 1, 3), (2, 2, 4)]
    assert oracle.places(oracle.Axis(3, 3, border="global"), 2) == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]


TINY = {
    "mask": [oracle.Axis(3, 2), oracle.Axis(2, 3)],
    "zeros stride": [oracle.Axis(3, 3, stride=2, border="zeros"), oracle.Axis(2, 3, border="zeros")],
    "wrap repeats": [oracle.Axis(3, 5, border="wrap")],
    "shift dilation": [oracle.Axis(5, 2, dilation=2, border="shift")],
    "causal shift": [oracle.Axis(4, 3, border="shift", causal=True)],
    "global": [oracle.Axis(2, 2, border="global"), oracle.Axis(2, 2, border="global")],
}


@pytest.mark.parametrize("name", TINY)
def test_gradients_are_those_of_finite_differences(name):
    axes, rng = TINY[name], np.random.default_rng(0)
    inputs = [rng.standard_normal((1, 2, *(axis.queries for axis in axes), 2))]
    inputs += [rng.standard_normal((1, 2, *(axis.cells for axis in axes), dim)) for dim in (2, 3)]
    inputs += [rng.standard_normal((2, *(axis.table_size for axis in axes)))]
    inputs += [rng.standard_normal((2, axis.table_size, 2)) for axis in axes]
    grad = rng.standard_normal((*inputs[0].shape[:-1], 3))

    def objective():
        query, key, value, bias, *relative = inputs
        return (grad * oracle.attention(query, key, value, axes, bias, relative, 0.8)[0]).sum()

    query, key, value, bias, *relative = inputs
    found = oracle.gradients(grad, query, key, value, axes, bias, relative, 0.8)
    for tensor, gradient in zip(inputs, found, strict=True):
        np.testing.assert_allclose(gradient, central_differences(objective, tensor), atol=1e-8)


def central_differences(objective, tensor, step=1e-5):
    """The derivative by every element of ``tensor``, which is changed in place and restored."""
    gradient = np.empty_like(tensor)
    for where in np.ndindex(tensor.shape):
        kept = tensor[where]
        tensor[where] = kept + step
        above = objective()
        tensor[where] = kept - step
        gradient[where] = (above - objective()) / (2 * step)
        tensor[where] = kept
    return gradient
