# SPDX-License-Identifier: Apache-2.0
"""``nearsight convert``: attention in the place of a network's convolutions."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import OptionError
from ..files import read_text
from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight convert resnet18 --init exact --pretrained --output runs/exact
  nearsight convert resnet18 --init exact --checkpoint mine.pth --names "layer3.*" "layer4.*" --output runs/late
  nearsight convert runs/resnet --init exact --margin 1 --output runs/attends
  nearsight convert resnet18 --init exact --checkpoint mine.pth --classes cat dog --size 64 --mean .5 .5 .5 --std .2 .2 .2 \
      --output runs/pets
  nearsight convert resnet50 --init random --kernel-size 7 --output runs/sasa

Without --pretrained and --checkpoint the weights are fresh. The output folder then holds model.safetensors, which
`nearsight eval` reads, and report.json.
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("convert", "Put attention in the place of a network's spatial convolutions.", EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a name, or a folder or file that nearsight left")
    parser.add_argument("--init", required=True, choices=("exact", "random"), help="the same function, or fresh layers")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the converted network")
    parser.add_argument("--pretrained", action="store_true", help="take the weights that timm offers for MODEL")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="take weights from a .safetensors or .pth file")
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="names of its outputs in their order, or a file with one a line"
    )
    parser.add_argument("--size", type=int, metavar="N", help="pixels per side of the images that it was trained on")
    parser.add_argument(
        "--mean", nargs="+", type=float, metavar="X", help="its images' mean, per channel, between 0 and 1"
    )
    parser.add_argument("--std", nargs="+", type=float, metavar="X", help="and their standard deviation")
    parser.add_argument("--names", nargs="+", metavar="PATTERN", help="only layers whose name matches, as 'layer4.*'")
    parser.add_argument("--stages", nargs="+", type=int, metavar="N", help="only these stages, as timm's out_indices")
    parser.add_argument("--kernels", nargs="+", type=int, metavar="K", help="only kernels of these sizes")
    parser.add_argument("--stem", action="store_true", help="also the layers that read the picture itself")
    parser.add_argument(
        "--kernel-size", nargs="+", type=int, metavar="K", help="random: side of the memory block, or one per axis (7)"
    )
    parser.add_argument("--num-heads", type=int, help="random: heads, or the nearest number that fits (default: 8)")
    parser.add_argument("--position", help="random: the position encoding (default: relative)")
    parser.add_argument("--margin", type=int, help="exact: places that heads may reach beyond the kernel (default: 0)")
    parser.add_argument("--locality", type=float, help="exact: how hard heads look; below 1 is not exact (default: 1)")
    parser.add_argument(
        "--no-content", dest="content", action="store_false", default=None, help="exact: position alone"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = vars(parse(parser, arguments))
    if options["kernel_size"] is not None and len(options["kernel_size"]) == 1:
        options["kernel_size"] = options["kernel_size"][0]

    from ..pages.csv_json import to_json
    from ..saved.converted import Known, convert_to_folder, has_random_weights

    as_json, output = options.pop("json"), options["output"]
    known = {name: options.pop(name) for name in ("classes", "size", "mean", "std")}
    options["known"] = Known(**{**known, "classes": _class_names(known["classes"])})
    report = convert_to_folder(**options)
    if has_random_weights(options["model"], options["pretrained"], options["checkpoint"]):
        print(
            f"nearsight: the weights of {options['model']} are random: --pretrained takes those that timm offers, "
            "--checkpoint those of a file",
            file=sys.stderr,
        )
    if as_json:
        print(to_json(report.to_dict()))
        return
    if find_spec("rich"):
        from rich import print as show
    else:
        show = print
    show(report)
    print(f"wrote {output}")


def _class_names(given: list[str] | None) -> list[str] | None:
    """What was typed, or the lines of the file that was."""
    if given is None or len(given) > 1:
        return given
    try:
        return [line for line in map(str.strip, read_text(given[0]).splitlines()) if line]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OptionError(
            f"--classes takes two names or more, or a file with one a line; {given[0]}: {reason}"
        ) from error
