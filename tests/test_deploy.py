# SPDX-License-Identifier: Apache-2.0
"""nearsight::LocalAttention in onnxruntime: held to the operation, over the geometries of the contract, and to refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_contract import NAMED, Case, tensors_of
from torch import Tensor, nn

import nearsight as ns
from nearsight import deploy
from nearsight.attention import native, node
from nearsight.attention.problem import Call, describe
from nearsight.deploy import compiled
from nearsight.errors import BackendError, DataError, OptionError
from nearsight.saved.export import export_to_file, onnx_session, to_onnx, trace

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
ELEMENTS = {torch.float32: onnx.TensorProto.FLOAT, torch.bfloat16: onnx.TensorProto.BFLOAT16}


def planar(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 2).flatten(1, 2).contiguous()


def model_of(attributes: dict, inputs: dict[str, Tensor]) -> bytes:
    """One node of float32 inputs and outputs; what is inside is of the dtype of the query."""
    dtype = inputs["query"].dtype
    casts = [name for name in ("query", "key", "value") if dtype != torch.float32]
    nodes = [onnx.helper.make_node("Cast", [name], [f"{name}_"], to=ELEMENTS[dtype]) for name in casts]
    names = [f"{name}_" if name in casts else name for name in inputs]
    names[3:] = [name if inputs[name] is not None else "" for name in names[3:]]
    nodes.append(onnx.helper.make_node(node.OPERATOR, names, ["out_"], domain=node.DOMAIN, **attributes))
    nodes.append(onnx.helper.make_node("Cast", ["out_"], ["out"], to=onnx.TensorProto.FLOAT))
    shapes = {name: list(one.shape) for name, one in inputs.items() if one is not None}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    versions = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(node.DOMAIN, node.VERSION)]
    graph = onnx.helper.make_graph(nodes, "one", values, [out])
    return onnx.helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()


def session_of(attributes: dict, inputs: dict[str, Tensor], threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(deploy.onnxruntime_library())
    return onnxruntime.InferenceSession(model_of(attributes, inputs), options, providers=["CPUExecutionProvider"])


def node_of(inputs: list[Tensor], window: ns.Window, bias=None, relative=None, scale=None) -> tuple[dict, dict]:
    """Attributes and inputs of the node for a call."""
    query, key, value = inputs
    problem = describe(query, key, value, window, bias, relative)
    call = Call(query, key, value, bias, relative, query.shape[-1] ** -0.5 if scale is None else scale)
    named = dict(zip(("query", "key", "value"), map(planar, inputs), strict=True))
    tables = {"bias": bias, **{f"relative{axis}": table for axis, table in enumerate(relative or ())}}
    return node._attributes(call, problem), {
        **named,
        **{k: None if v is None else v.float() for k, v in tables.items()},
    }


def answer(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    numbers = {name: one.float().numpy() for name, one in inputs.items() if one is not None}
    return torch.from_numpy(session.run(None, numbers)[0])


def as_in_pytorch(inputs: list[Tensor], window: ns.Window, **options) -> Tensor:
    return planar(ns.local_attention(*inputs, window, backend="native", **options)).float()


CASES = {name: case for name, case in NAMED.items() if "memory" not in name and "loud" not in name}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_path_through_pytorch(name):
    case = CASES[name]
    dtype = torch.bfloat16 if len(name) % 3 == 0 else torch.float32
    _, inputs, arguments = tensors_of(Case(**{**vars(case), "dtype": dtype}))
    maps, window = [one.detach() for one in inputs[:3]], case.window
    options = {key: None if one is None else one for key, one in arguments.items()}
    attributes, named = node_of(maps, window, **options)
    found = answer(session_of(attributes, named), named)
    expected = as_in_pytorch(maps, window, **options)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) or found.numel() == expected.numel() == 0


def a_call(heads: int = 4, of_key: int = 4, size=(23, 19), **options) -> tuple[list[Tensor], ns.Window]:
    window = ns.Window(5, **options)
    sizes = (window.output_size(size), size, size)
    counts = (heads, of_key, of_key)
    return [torch.randn(2, n, *one, 8) for n, one in zip(counts, sizes, strict=True)], window


@pytest.mark.parametrize("of_key", [1, 2])
def test_heads_that_share_a_key(of_key):
    maps, window = a_call(of_key=of_key)
    bias = torch.randn(4, 5, 5)
    attributes, named = node_of(maps, window, bias=bias)
    expected = planar(ns.local_attention(*maps, window, bias=bias, backend="reference"))
    torch.testing.assert_close(answer(session_of(attributes, named), named), expected)


def test_any_number_of_threads_and_of_sessions_at_once():
    maps, window = a_call()
    attributes, named = node_of(maps, window)
    expected = as_in_pytorch(maps, window)
    sessions = [session_of(attributes, named, threads) for threads in (1, 2, 3)]
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda session: answer(session, named), sessions * 8):
            assert torch.equal(found, expected)


WRONG_ATTRIBUTES = {
    "border of one axis": ({"border": "mask"}, "border must name"),
    "border unknown": ({"border": "mask edge"}, "border must name"),
    "borders too many": ({"border": "mask mask wrap"}, "border must name"),
    "kernel of one axis": ({"kernel_size": [5]}, "kernel_size must have one number for each of 2 axes; it has 1"),
    "rank": ({"rank": 4}, "rank must be 1 to 3; it is 4"),
    "heads": ({"num_heads": 0}, "num_heads must be 1 to"),
    "heads of keys": ({"num_kv_heads": 3}, "3 does not divide 4"),
    "scale": ({"scale": float("nan")}, "scale must be finite"),
    "no stride": ({"stride": None}, "the attribute stride is missing"),
    "no scale": ({"scale": None}, "the attribute scale is missing"),
    "a list of borders": ({"border": ["mask", "mask"]}, "the attribute border is missing, or of another type"),
}


@pytest.mark.parametrize("name", WRONG_ATTRIBUTES)
def test_attributes_are_refused_when_the_session_is_made(name):
    changes, reason = WRONG_ATTRIBUTES[name]
    attributes, named = node_of(*a_call())
    changed = {key: value for key, value in {**attributes, **changes}.items() if value is not None}
    with pytest.raises(Exception, match=reason):
        session_of(changed, named)


WRONG_INPUTS = {
    "rank of the query": ({"query": torch.randn(2, 32, 23)}, {}, "query must have batch, channels and 2 axes"),
    "channels": ({"key": torch.randn(2, 30, 23, 19)}, {}, "num_kv_heads must divide the channels of key"),
    "size": ({"query": torch.randn(2, 32, 23, 18)}, {}, "query must be .2, 32, 23, 19. for this key"),
    "batch": ({"value": torch.randn(3, 32, 23, 19)}, {}, "value must have the batch and axes of key"),
    "bias": ({"bias": torch.randn(4, 5, 4)}, {}, "bias must be .4, 5, 5.; it is .4, 5, 4."),
    "one table of two": ({"relative0": torch.randn(4, 5, 8)}, {}, "relative must be given for every axis or for none"),
    "table": ({f"relative{i}": torch.randn(4, 5, 7) for i in (0, 1)}, {}, "relative of axis 0 must be .4, 5, 8."),
    "shared by more than a window": ({}, {"shared_by": [6, 6]}, "a size is out of range"),
    "kernel of nothing": ({}, {"kernel_size": [0, 5]}, "kernel_size and stride must be at least 1"),
    "kernels whose table would have no end": (
        {},
        {"kernel_size": [2**31 - 1] * 2, "border": "shift shift"},
        "too large",
    ),
    "dilation": ({}, {"dilation": [0, 1]}, "a size is out of range"),
    "causal": ({}, {"causal": [2, 0]}, "causal flag"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_are_refused_in_a_line_when_the_session_runs(name):
    inputs, changes, reason = WRONG_INPUTS[name]
    attributes, named = node_of(*a_call())
    named = {**{k: named.get(k) for k in ("query", "key", "value", "bias")}, **inputs}
    with pytest.raises(Exception, match=reason):
        answer(session_of({**attributes, **changes}, named), named)


def test_registered_twice_with_the_same_options_it_is_refused_by_onnxruntime():
    attributes, named = node_of(*a_call())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for _ in range(2):
        options.register_custom_ops_library(deploy.onnxruntime_library())
    with pytest.raises(Exception, match="Domain already set"):
        onnxruntime.InferenceSession(model_of(attributes, named), options)


@pytest.mark.sweep
def test_under_sanitizers(tmp_path):
    """The operator's own code, in the hands of a driver that stands for onnxruntime: right and wrong nodes."""
    root, library = Path(__file__).parents[1], Path(deploy.onnxruntime_library())
    sources = [
        root / "csrc/node.cpp",
        root / "csrc/onnxruntime/local_attention.cpp",
        root / "tests/onnxruntime_driver.cpp",
    ]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    kernel = [library, f"-Wl,-rpath,{library.parent}"]  # which has a test of its own
    flags = ["-std=c++17", "-g1", "-O1", "-pthread", "-I", root / "csrc"]
    subprocess.run(["g++", *flags, *checks, *sources, *kernel, "-o", tmp_path / "driver"], check=True)
    finished = subprocess.run([tmp_path / "driver", "2000"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-6000:]
    assert "2000 nodes" in finished.stdout


# -------------------------------------------------------------------------------------------------------------- exports


def test_a_network_with_open_sizes_has_a_node_for_each_attention():
    layers = (
        ns.LocalSelfAttention2d(3, 16, 3, num_heads=2),
        ns.HaloSelfAttention2d(16, 16, block_size=4, halo_size=1, num_heads=2),
    )
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    with node.as_nodes():
        program = trace(model, torch.zeros(2, 3, 16, 24))
    proto = to_onnx(program, {})
    kinds = Counter(one.op_type for one in proto.graph.node)
    assert kinds["LocalAttention"] == 2
    assert not {"Transpose", "Softmax", "Expand", "Where"} & {*kinds}
    run = onnx_session(proto.SerializeToString())
    for shape in ((1, 3, 20, 9), (3, 3, 8, 8)):
        pictures = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(pictures), model(pictures), rtol=1e-5, atol=1e-5)


class Stripes(nn.Sequential):
    """A network of someone's own, which says how it sees pictures."""

    pretrained_cfg = MappingProxyType(
        {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,), "label_names": ["a", "b"]}
    )

    def __init__(self) -> None:
        attention = ns.LocalSelfAttention2d(1, 8, 3, num_heads=2)
        super().__init__(attention, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_a_network_of_one_s_own_is_exported(tmp_path):
    model = Stripes()
    done = ns.export_onnx(model, str(tmp_path / "own.onnx"), operators="native", sizes=(16, 24))
    assert done.shape == ("batch", 1, 16, 24)
    assert model.training
    proto = onnx.load(done.file)
    assert [one.op_type for one in proto.graph.node].count("LocalAttention") == 1
    known = json.loads({note.key: note.value for note in proto.metadata_props}["nearsight"])
    assert known["classes"] == ["a", "b"]
    assert known["view"]["mean"] == [0.5]
    pictures = torch.randn(3, 1, 16, 24)
    with torch.no_grad():
        expected = model.eval()(pictures)
    torch.testing.assert_close(onnx_session((tmp_path / "own.onnx").read_bytes())(pictures), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"path": "own.pt"}, OptionError, "the file must end in .onnx; received own.pt"),
        ({"path": "nowhere/own.onnx"}, DataError, "there is no folder nowhere to write own.onnx into"),
        ({"sizes": "all"}, OptionError, "sizes must be 'open' or height and width; received 'all'"),
        ({"sizes": (16, 0)}, OptionError, "--size must be N or HxW"),
        ({"operators": "fast"}, OptionError, "must be one of plain, native"),
        ({"model": Stripes().to("meta")}, OptionError, "exported on the CPU; this one is on meta"),
    ],
)
def test_what_cannot_be_exported_is_told_before(changes, error, message):
    with pytest.raises(error, match=message):
        ns.export_onnx(**{"model": Stripes(), "path": "own.onnx", **changes})


def test_operators_are_plain_or_native_and_native_are_of_onnx(tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="--operators must be one of plain, native; received 'own'"):
        export_to_file(tmp_path, "onnx", operators="own")
    with pytest.raises(OptionError, match="--operators native is for --format onnx and aoti"):
        export_to_file(tmp_path, "pt2", operators="native")
    monkeypatch.setattr(compiled, "built", lambda package, stem: None)
    with pytest.raises(BackendError, match="there is no operator for onnxruntime"):
        export_to_file(tmp_path, "onnx", operators="native")


def test_a_process_without_pytorch(tmp_path):
    maps, window = a_call(size=(5, 6))
    attributes, named = node_of(maps, window)
    np.savez(tmp_path / "inputs.npz", **{name: one.numpy() for name, one in named.items() if one is not None})
    nodes = [onnx.helper.make_node(node.OPERATOR, ["query", "key", "value"], ["out"], domain=node.DOMAIN, **attributes)]
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("query", "key", "value")
    ]
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    versions = [onnx.helper.make_opsetid(node.DOMAIN, node.VERSION)]
    graph = onnx.helper.make_graph(nodes, "one", values, [out])
    onnx.save(onnx.helper.make_model(graph, opset_imports=versions, ir_version=10), tmp_path / "one.onnx")
    program = """
import sys, numpy, onnxruntime, nearsight
for _ in range(2):  # a second session finds the library loaded
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(nearsight.deploy.onnxruntime_library())
    session = onnxruntime.InferenceSession("one.onnx", options)
numpy.save("out.npy", session.run(None, dict(numpy.load("inputs.npz")))[0])
assert "torch" not in sys.modules
"""
    environment = {**os.environ, "LD_PRELOAD": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), as_in_pytorch(maps, window).numpy())
