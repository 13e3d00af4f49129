# SPDX-License-Identifier: Apache-2.0
"""examples/quantize.py: the 1x1 convolutions become int8, attention stays as it is, the outputs nearly so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch

import nearsight as ns
from nearsight.attention import native
from nearsight.attention.node import OPERATOR, as_nodes
from nearsight.saved.export import onnx_session, to_onnx, trace

ROOT = Path(__file__).parent.parent
KINDS = ("plain", "native")


@pytest.mark.slow
@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_pointwise_convolutions_alone_become_int8(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from quantize import quantize

    torch.manual_seed(0)
    model = ns.create_model("sasa_nano", depths=(1,), widths=(16,), stem_width=8, num_heads=2, num_classes=5).eval()
    with as_nodes():
        program = trace(model, torch.zeros(2, 3, 16, 24))
    for kind in KINDS:
        (tmp_path / f"{kind}.onnx").write_bytes(to_onnx(program, {}, kind).SerializeToString())
    quantize(tmp_path, iter(torch.randn(4, 8, 3, 16, 16)))

    pictures = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        expected = model(pictures)
    for kind in KINDS:
        before, after = (onnx.load(tmp_path / f"{kind}{ending}.onnx").graph for ending in ("", "-int8"))
        makers = {name: node for node in after.node for name in node.output}
        convolutions = [node for node in after.node if node.op_type == "Conv"]
        whole = [makers[node.input[0]].op_type == "DequantizeLinear" for node in convolutions if kernel(node) == [1, 1]]
        assert len(whole) > 2
        assert all(whole)
        for operator in (OPERATOR, "Softmax"):  # attention's, as many as before
            assert count(after)[operator] == count(before)[operator]
        found = onnx_session((tmp_path / f"{kind}-int8.onnx").read_bytes())(pictures)
        off = (found - expected).abs().max() / expected.abs().max()
        assert 1e-5 < off < 0.1, f"{kind}: it is quantised, and not another network"
    assert count(after)[OPERATOR] == 1


def count(graph: onnx.GraphProto) -> Counter:
    return Counter(node.op_type for node in graph.node)


def kernel(node: onnx.NodeProto) -> list[int]:
    return next(list(one.ints) for one in node.attribute if one.name == "kernel_shape")
