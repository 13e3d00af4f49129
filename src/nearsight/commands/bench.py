# SPDX-License-Identifier: Apache-2.0
"""``nearsight bench``: speed, beside others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import OptionError
from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight bench core               the operation: our backends and the ways of others, beside a convolution
  nearsight bench layers --threads 1 --json layers.json
  nearsight bench models             SASA-ResNets against ResNets, HaloNet against timm's: speed, training memory
  nearsight bench deploy             the same in onnxruntime, OpenVINO and AOTInductor: speed, memory, outputs
  nearsight bench accelerated --threads 2   every family that ns.accelerate knows, before and after: about 8 minutes
  nearsight bench card --output card a CUDA card in five minutes: is it right, how fast is it; one page and one JSON file
"""


CARD = "card"


def run(arguments: list[str]) -> None:
    from ..bench import BENCHES, run

    parser = parser_of("bench", "Measure speed in one process, with peers in the same table.", EXAMPLES)
    parser.add_argument("what", choices=(*BENCHES, CARD), help="what to measure")
    parser.add_argument("--threads", type=int, help="threads to use (default: one, then all)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes and rounds: to see that it works, not to quote"
    )
    parser.add_argument("--network", metavar="NAME", help="deploy: this network alone, such as sasa_resnet50")
    parser.add_argument("--size", type=int, metavar="N", help="deploy: images of N pixels a side")
    parser.add_argument("--json", metavar="FILE", help="write every number to a file")
    parser.add_argument("--output", type=Path, metavar="DIR", help="card: folder for card.json and card.html")
    parser.add_argument("--device", help="card: cuda, or cpu to see that it runs (default: cuda)")
    options = parse(parser, arguments)
    if options.what == CARD:
        _card(options)
        return
    if options.output or options.device:
        raise OptionError(f"--output and --device are for nearsight bench {CARD}; --json takes a file")
    chosen = {"network": options.network, "size": options.size}
    run(options.what, threads=options.threads, quick=options.quick, json_file=options.json, **chosen)


def _card(options: Any) -> None:
    if options.output is None:
        raise OptionError("--output DIR names the folder for card.json and card.html")
    if options.threads or options.quick or options.json or options.network or options.size:
        raise OptionError(f"nearsight bench {CARD} takes --device and --output alone")
    from ..bench.card import run_card

    run_card(options.device or "cuda", options.output)
