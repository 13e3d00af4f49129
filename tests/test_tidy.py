# SPDX-License-Identifier: Apache-2.0
"""What surrounds attention in a graph is made simple, and the graph computes what it did."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from nearsight.attention import native, node
from nearsight.saved.export import onnx_session
from nearsight.saved.tidy import tidy

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
HEADS, WIDTH, SIZE = 2, 8, 6
ATTRIBUTES = {
    "num_heads": HEADS,
    "num_kv_heads": HEADS,
    "rank": 2,
    "border": "mask mask",
    "scale": 0.5,
    "kernel_size": [3, 3],
    "stride": [1, 1],
    "dilation": [1, 1],
    "causal": [0, 0],
    "shared_by": [1, 1],
}


def network(*, pool: dict[str, Any] | None = None, bias: np.ndarray | None = None, taken: str = "", **attributes: Any):
    """Convolution, split, attention between reshapes that change nothing, perhaps a pool, batch norm; batch open."""
    rng = np.random.default_rng(0)
    constants = {
        "weight": rng.standard_normal((3 * WIDTH, WIDTH, 1, 1)),
        "shift": rng.standard_normal(3 * WIDTH),
        **{name: rng.standard_normal(WIDTH) for name in ("gain", "offset", "mean")},
        "variance": rng.uniform(0.5, 2, WIDTH),
        **({} if bias is None else {"bias": bias}),
    }
    numbers = {"sizes": [WIDTH] * 3, "heads": [0, HEADS, -1, SIZE, SIZE], "flat": [0, WIDTH, SIZE, SIZE]}
    nodes = [
        helper.make_node("Conv", ["x", "weight", "shift"], ["qkv"], name="project"),
        helper.make_node("Split", ["qkv", "sizes"], ["q0", "k0", "v0"], axis=1),
    ]
    shapes = {f"{name}0": ["batch", WIDTH, SIZE, SIZE] for name in "qkvy"}
    for name in "qkvy":
        nodes.append(helper.make_node("Reshape", [f"{name}0", "heads"], [f"{name}1"]))
        nodes.append(helper.make_node("Reshape", [f"{name}1", "flat"], [f"{name}2"]))
        shapes[f"{name}2"] = shapes[f"{name}0"]
    inputs = ["q2", "k2", "v2", *(["bias"] if bias is not None else [])]
    nodes.insert(-2, helper.make_node(node.OPERATOR, inputs, ["y0"], domain=node.DOMAIN, **ATTRIBUTES | attributes))
    if pool is not None:
        nodes.append(helper.make_node("AveragePool", ["y2"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2], **pool))
    normed = ["y2" if pool is None else "pooled", "gain", "offset", "mean", "variance"]
    nodes.append(helper.make_node("BatchNormalization", normed, ["normed"], epsilon=0.1))
    nodes.append(helper.make_node("Relu", ["normed"], ["out"]))
    floats = onnx.TensorProto.FLOAT
    open_sizes = {
        name: shapes.get(name, [f"{name} {axis}" for axis in range(5 if name == "q1" else 4)])
        for name in ("out", taken)
    }
    outputs = [helper.make_tensor_value_info(name, floats, shape) for name, shape in open_sizes.items() if name]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", floats, ["batch", WIDTH, SIZE, SIZE])],
        outputs,
        [
            *(numpy_helper.from_array(one.astype(np.float32), name) for name, one in constants.items()),
            *(numpy_helper.from_array(np.array(one, dtype=np.int64), name) for name, one in numbers.items()),
        ],
        value_info=[helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()],
    )
    versions = [helper.make_opsetid("", 20), helper.make_opsetid(node.DOMAIN, node.VERSION)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10)


def kinds(model) -> dict[str, int]:
    return dict(Counter(one.op_type for one in model.graph.node))


def tidied(model):
    """It, tidied, which computes the same."""
    pictures = torch.from_numpy(np.random.default_rng(1).standard_normal((3, WIDTH, SIZE, SIZE)).astype(np.float32))
    expected = onnx_session(model.SerializeToString())(pictures)
    tidy(model)
    onnx.checker.check_model(model)
    torch.testing.assert_close(onnx_session(model.SerializeToString())(pictures), expected, rtol=1e-5, atol=1e-5)
    return model


SIMPLE = {"Conv": 3, node.OPERATOR: 1, "Relu": 1}


@pytest.mark.parametrize("border", ["mask mask", "shift wrap"])
def test_three_convolutions_and_attention_remain(border):
    model = tidied(network(border=border))
    assert kinds(model) == SIMPLE
    made = {"x"}.union(*(one.output for one in model.graph.node))
    assert {one.name for one in model.graph.initializer} == {
        name for one in model.graph.node for name in one.input
    } - made


@pytest.mark.parametrize("pool", [{}, {"ceil_mode": 1, "pads": [1, 1, 0, 0]}, {"count_include_pad": 1}])
def test_a_norm_moves_past_a_mean(pool):
    assert kinds(tidied(network(pool=pool))) == {**SIMPLE, "AveragePool": 1}


@pytest.mark.parametrize(
    "given",
    [
        {"border": "mask zeros"},
        {"pool": {"count_include_pad": 1, "pads": [1, 1, 0, 0]}},
        {"bias": np.full((HEADS, 3, 3), -np.inf)},
        {"shared_by": [3, 1], "dilation": [7, 1]},
        {"taken": "y0"},
        {"taken": "v0"},
        {"taken": "normed"},
    ],
    ids=str,
)
def test_a_norm_stays_where_weights_do_not_sum_to_one_or_others_look(given):
    assert kinds(tidied(network(**given)))["BatchNormalization"] == 1


def test_a_norm_goes_where_a_bias_hides_nothing():
    assert kinds(tidied(network(bias=np.ones((HEADS, 3, 3))))) == SIMPLE


def test_a_projection_that_others_look_at_stays_whole():
    assert kinds(tidied(network(taken="qkv")))["Split"] == 1


def test_a_reshape_that_changes_the_shape_stays():
    model = network(taken="q1")
    assert kinds(tidied(model))["Reshape"] == 1
