# SPDX-License-Identifier: Apache-2.0
"""``nearsight accelerate``: a network as its makers wrote it beside the same with its attention on our operation."""

from __future__ import annotations

from ..errors import OptionError
from .arguments import flag, parse, parser_of

EXAMPLES = """\
examples:
  nearsight accelerate halonet26t --batch-size 8
  nearsight accelerate samvit_base_patch16 --size 512 --threads 1 --rounds 3
  nearsight accelerate sehalonet33ts --batch-size 8 --training --json

In Python it is ns.accelerate(model). Weights are those that the network starts with; tables that are zeros throughout are
drawn, or they would hide a difference. The share is what the accelerated layers take of their step with projections, and
the ceiling how many times as fast the network were without them. On one thread times are the processor's, which other
processes do not stretch. MB are what a step adds to the peak of a fresh process that has made the network.
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("accelerate", "Measure a network before and after its attention is accelerated.", EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run, a .safetensors or .ckpt file, or NAME,option=value"
    )
    parser.add_argument("--size", type=int, help="pixels per side of the images (default: the network's own)")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--training", action="store_true", help="a step forward and backward in place of inference")
    parser.add_argument("--rounds", type=int, default=9, help="of both in turn, to take the median of (default: 9)")
    parser.add_argument("--threads", type=int, help="threads to use (default: PyTorch's own number)")
    parser.add_argument("--json", action="store_true", help="print every number as JSON")
    options = parse(parser, arguments)
    for name in ("size", "batch_size", "rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise OptionError(f"{flag(name)} must be at least 1; received {getattr(options, name)}")

    from ..bench.accelerated import HEADINGS, contest
    from ..bench.timing import setting, using_threads
    from ..pages.brief import text_table
    from ..pages.csv_json import to_json
    from ..telling import telling

    with using_threads(options.threads), telling(f"running {options.model} both ways"):
        found = contest(
            options.model, options.size, options.batch_size, training=options.training, rounds=options.rounds
        )
        machine = setting()
    if options.json:
        print(to_json({"model": options.model, **found.to_dict(), "setting": machine}))
        return
    print(found.report)
    if found.layers:
        rows = [
            (one.name, "x".join(map(str, one.shape)), f"{one.theirs:.3g}", f"{one.ours:.3g}") for one in found.layers
        ]
        print("\n".join(text_table([("layer by itself", "input", "ms", "accelerated"), *rows])))
    print("\n".join(text_table([HEADINGS, found.cells(options.model)])))
    print(f"{machine['processor']}, {machine['threads']} threads")
