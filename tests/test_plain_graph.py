# SPDX-License-Identifier: Apache-2.0
"""Attention written out in ONNX's own operators computes the operation, on sizes that were open when it was written."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_contract import NAMED, Case, tensors_of
from torch import Tensor

import nearsight as ns
from nearsight.attention import node
from nearsight.attention.plain_graph import FLOOR, write_out
from nearsight.attention.problem import Call, describe
from nearsight.saved import export

ONCE = (
    "line",
    "volume",
    "both tables",
    "larger than the map",
    "dilation and stride",
    "zeros even dilated",
    "shift dilated strided",
    "wrap dilated causal",
    "all borders",
    "shared causal shift",
    "shared, blocks begin in a group",
    "loud",
)
CASES = [
    pytest.param(name, marks=() if name in ONCE else pytest.mark.sweep)
    for name in NAMED
    if "memory" not in name and "batch 0" not in name  # a reshape to -1 has no meaning without elements
]


def planar(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 2).flatten(1, 2)


def written(maps: list[Tensor], window: ns.Window, bias=None, relative=None, scale=None, elements="FLOAT"):
    """A model of one attention in plain operators, with open sizes, and what goes into it."""
    query, key, value = maps
    problem = describe(query, key, value, window, bias, relative)
    call = Call(query, key, value, bias, relative, query.shape[-1] ** -0.5 if scale is None else scale)
    tables = {"bias": bias, **{f"relative{axis}": table for axis, table in enumerate(relative or ())}}
    named = {name: None if one is None else one.float().numpy() for name, one in tables.items()}
    named = {
        **dict(zip(("query", "key", "value"), (planar(one).float().numpy() for one in maps), strict=True)),
        **named,
    }
    kind, inner = getattr(onnx.TensorProto, elements), [f"{name}_" for name in ("query", "key", "value")]
    nodes = [onnx.helper.make_node("Cast", [name[:-1]], [name], to=kind) for name in inner]
    names = [*inner, *(name if one is not None else "" for name, one in [*named.items()][3:])]
    attributes = node._attributes(call, problem)
    nodes.append(onnx.helper.make_node(node.OPERATOR, names, ["out_"], domain=node.DOMAIN, **attributes))
    nodes.append(onnx.helper.make_node("Cast", ["out_"], ["out"], to=onnx.TensorProto.FLOAT))

    def value_of(name: str, shape, kind: int):
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    sizes = {
        name: [f"{name}{axis}" if axis != 1 else n for axis, n in enumerate(named[name[:-1]].shape)] for name in inner
    }
    inputs = [value_of(name[:-1], shape, onnx.TensorProto.FLOAT) for name, shape in sizes.items()]
    inputs += [
        value_of(name, one.shape, onnx.TensorProto.FLOAT) for name, one in [*named.items()][3:] if one is not None
    ]
    out = value_of("out", [None] * (2 + problem.rank), onnx.TensorProto.FLOAT)
    inside = [value_of(name, shape, kind) for name, shape in sizes.items()]
    graph = onnx.helper.make_graph(nodes, "one", inputs, [out], value_info=inside)
    versions = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(node.DOMAIN, node.VERSION)]
    model = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    write_out(model)
    onnx.checker.check_model(model, full_check=True)
    return model, {name: one for name, one in named.items() if one is not None}


def answer(model: onnx.ModelProto, named: dict[str, np.ndarray]) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, named)[0])


@pytest.mark.parametrize("name", CASES)
def test_the_operation(name):
    case = NAMED[name]
    _, inputs, arguments = tensors_of(Case(**{**vars(case), "dtype": torch.float32}))
    maps = [one.detach() for one in inputs[:3]]
    model, named = written(maps, case.window, **arguments)
    assert {one.domain for one in (*model.graph.node, *model.opset_import)} == {""}
    assert "Expand" not in {one.op_type for one in model.graph.node}
    expected = planar(ns.local_attention(*maps, case.window, backend="reference", **arguments))
    assert (answer(model, named) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def a_call(heads: int = 4, of_key: int = 4, size: tuple[int, ...] = (9, 6)) -> tuple[list[Tensor], ns.Window]:
    generator = torch.Generator().manual_seed(0)
    counts = (heads, of_key, of_key)
    return [torch.randn(2, n, *size, 8, generator=generator) for n in counts], ns.Window(3)


@pytest.mark.parametrize("of_key", [1, 2])
def test_heads_that_share_a_key(of_key):
    maps, window = a_call(of_key=of_key)
    expected = planar(ns.local_attention(*maps, window, backend="reference"))
    torch.testing.assert_close(answer(*written(maps, window)), expected)


def test_bfloat16_is_computed_in_float32():
    maps, window = a_call()
    maps = [one.bfloat16() for one in maps]
    expected = planar(ns.local_attention(*maps, window, backend="reference")).float()
    torch.testing.assert_close(answer(*written(maps, window, elements="BFLOAT16")), expected, rtol=8e-3, atol=8e-3)


def test_bias_that_hides():
    maps, window = a_call()
    bias = torch.zeros(4, 3, 3)
    bias[0], bias[1, 1] = -torch.inf, -torch.inf  # no key at all; none of the own row
    found = answer(*written(maps, window, bias=bias))
    assert (found[:, :8] == 0).all()
    torch.testing.assert_close(found, planar(ns.local_attention(*maps, window, bias=bias, backend="reference")))


def test_logits_far_apart():
    """What is not hidden keeps its weight, however far the largest logit is from zero, and what is hidden has none."""
    maps, window = a_call()
    maps[0], maps[1] = maps[0] * 100, maps[1] * 100 - 300
    expected = planar(ns.local_attention(*maps, window, backend="reference"))
    assert ns.attention_scores(*maps[:2], window).nan_to_num(neginf=0).abs().max() > 1000 * FLOOR
    torch.testing.assert_close(answer(*written(maps, window)), expected, rtol=1e-4, atol=1e-4)


def test_attentions_on_maps_of_one_size_share_their_geometry():
    """Written twice, the second attention has no Range and no Clip of its own."""
    maps, window = a_call()
    model, _ = written(maps, window)
    one = sum(node.op_type in ("Range", "Clip") for node in model.graph.node)
    assert one > 0
    layers = torch.nn.Sequential(*(ns.LocalSelfAttention2d(4, 4, 3, num_heads=2) for _ in range(2))).eval()
    with node.as_nodes():
        program = export.trace(layers, torch.zeros(2, 4, 8, 12))
    model = export.to_onnx(program, {}, "plain")
    assert sum(node.op_type in ("Range", "Clip") for node in model.graph.node) == one
    pictures = torch.randn(1, 4, 11, 5)
    with torch.no_grad():
        torch.testing.assert_close(answer(model, {"pictures": pictures.numpy()}), layers(pictures))
