# SPDX-License-Identifier: Apache-2.0
"""``nearsight export``: a trained network as one file that runs without nearsight."""

from __future__ import annotations

from pathlib import Path

from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight export runs/demo --format onnx                   writes runs/demo/model.onnx
  nearsight export runs/demo --format onnx --operators native
  nearsight export runs/demo/last.ckpt --format pt2 --output sasa.pt2
  nearsight export runs/demo --format aoti                   writes runs/demo/model-aoti.pt2, compiled for this machine

The file takes batches and pictures of any size, where the network does, else of its own or of --size N or HxW, and runs
without nearsight. Before it is written
it has run on sizes other than the one it was made with, and computed what the network does.
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("export", "Write a trained network as one file that runs without nearsight.", EXAMPLES)
    parser.add_argument("run", metavar="DIR|FILE", type=Path, help="folder of a run, a .safetensors or a .ckpt file")
    parser.add_argument(
        "--format", required=True, choices=("onnx", "pt2", "aoti"), help="ONNX, a torch.export program, or AOTInductor"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it (default: beside the weights)")
    parser.add_argument(
        "--operators",
        choices=("plain", "native"),
        help="the format's own, or one for each attention, which nearsight's kernel runs (default: plain; aoti: native)",
    )
    parser.add_argument("--size", metavar="N|HxW", help="take pictures of this size alone (default: any, where it can)")
    options = parse(parser, arguments)

    from ..saved.export import export_to_file

    exported = export_to_file(options.run, options.format, options.output, options.size, options.operators)
    tried = " and ".join("x".join(map(str, shape)) for shape in exported.tried)
    print(f"{exported.file}: takes {' x '.join(map(str, exported.shape))}")
    if exported.fixed is not None:
        print(f"height and width are fixed, --size N|HxW takes others; any would be taken but for: {exported.fixed}")
    print(f"run on {tried}: at most {exported.difference:.0e} from the network")
    if options.format == "onnx" and options.operators != "native":
        print(
            "any onnxruntime runs it; --operators native is faster there, with nearsight's library (docs/howto/deploy.md)"
        )
