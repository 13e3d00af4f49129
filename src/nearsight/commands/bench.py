# SPDX-License-Identifier: Apache-2.0
"""``nearsight bench``: speed, beside others."""

from __future__ import annotations

from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight bench core               the operation: our backends and the ways of others, beside a convolution
  nearsight bench layers --threads 1 --json layers.json
  nearsight bench models             SASA-ResNets against ResNets, HaloNet against timm's: speed, training memory
"""


def run(arguments: list[str]) -> None:
    from ..bench import BENCHES, run

    parser = parser_of("bench", "Measure speed in one process, with peers in the same table.", EXAMPLES)
    parser.add_argument("what", choices=BENCHES, help="what to measure")
    parser.add_argument("--threads", type=int, help="threads to use (default: one, then all)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes and rounds: to see that it works, not to quote"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number to a file")
    options = parse(parser, arguments)
    run(options.what, threads=options.threads, quick=options.quick, json_file=options.json)
