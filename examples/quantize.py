# SPDX-License-Identifier: Apache-2.0
"""Quantises the 1x1 convolutions of a trained network to int8 and measures what that costs, all in onnxruntime.

make demo
.venv/bin/python examples/quantize.py runs/demo --data digits

Attention stays in float32: as the node nearsight::LocalAttention, or written out in ONNX's own operators. What the
convolutions see is measured on training images with the second, which onnxruntime's calibration can run; both files name
it alike.
Needs an onnxruntime whose quantize_static has calibration_cache_path.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor

from nearsight.saved.export import export_to_file, onnx_session
from nearsight.saved.weights import load_model
from nearsight.training.data import load_pictures, loader

OPERATORS = ("plain", "native")
IMAGES = 256  # that the ranges are measured on


class Images(CalibrationDataReader):
    """Batches (B, C, H, W) as they go into the network."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self.batches = batches

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"pictures": batch.numpy()}


def quantize(folder: Path, batches: Iterator[Tensor]) -> None:
    """plain.onnx and native.onnx of one network -> plain-int8.onnx and native-int8.onnx beside them."""
    for operators in OPERATORS:
        file = folder / f"{operators}.onnx"
        pointwise = [node.name for node in onnx.load(file).graph.node if is_pointwise(node)]
        quantize_static(
            file,
            folder / f"{operators}-int8.onnx",
            Images(batches) if operators == "plain" else None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            nodes_to_quantize=pointwise,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibration_cache_path=folder / "ranges.json",
        )


def is_pointwise(node: onnx.NodeProto) -> bool:
    kernels = [list(one.ints) for one in node.attribute if one.name == "kernel_shape"]
    return node.op_type == "Conv" and bool(kernels) and set(kernels[0]) == {1}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run, or its weights")
    parser.add_argument("--data", required=True, help="what it was trained on, such as digits")
    options = parser.parse_args()
    _, blueprint = load_model(options.run)
    pictures = load_pictures(options.data)
    seen, tested = (
        loader(split.dataset(blueprint.view, training=False, max_broken=0), 64, workers=0)
        for split in (pictures.train, pictures.test)
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        for operators in OPERATORS:
            export_to_file(options.run, "onnx", folder / f"{operators}.onnx", operators=operators)
        quantize(folder, (batch[0] for batch in islice(seen, IMAGES // 64)))
        for operators, kind in ((one, kind) for one in OPERATORS for kind in ("", "-int8")):
            run = onnx_session((folder / f"{operators}{kind}.onnx").read_bytes())
            found = torch.cat([run(images).argmax(1) == labels for images, labels, *_ in tested])
            print(f"{operators + kind:12} {int(found.sum())} of {len(found)} right, {found.float().mean():.2%}")


if __name__ == "__main__":
    main()
