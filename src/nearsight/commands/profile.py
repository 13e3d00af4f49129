# SPDX-License-Identifier: Apache-2.0
"""``nearsight profile``: what each layer of a network costs."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..extras import need
from .arguments import flag, parse, parser_of

EXAMPLES = """\
examples:
  nearsight profile sasa_resnet26 --size 224
  nearsight profile runs/demo --batch-size 32 --output runs/demo-cost
  nearsight profile resnet50 --size 224 --no-growth --csv > resnet50.csv

The floor of a layer is the least time that its operations and bytes could take, by this machine's rates of a large matrix
product and a large copy, which are measured too. The output folder then holds profile.json, and layers and growth as .csv,
.svg and .png.
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("profile", "Measure every layer of a network, and how attention grows.", EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run, a .safetensors or .ckpt file, or NAME,option=value"
    )
    parser.add_argument("--size", type=int, help="pixels per side of the images (default: the network's own)")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="passes to take the median of (default: 7)")
    parser.add_argument("--threads", type=int, help="threads to use (default: PyTorch's own number)")
    parser.add_argument(
        "--no-growth", dest="growth", action="store_false", help="leave out how attention grows with the image"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the numbers and plots")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print every number as JSON")
    form.add_argument("--csv", action="store_true", help="print the layers as CSV")
    options = parse(parser, arguments)
    for name in ("size", "batch_size", "rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise OptionError(f"{flag(name)} must be at least 1; received {getattr(options, name)}")

    need(("rich", *(("matplotlib",) if options.output else ())), "`nearsight profile`", "profile")
    import torch

    from ..bench.growth import geometry_of, growth
    from ..bench.profile import profile
    from ..bench.timing import using_threads
    from ..files import make_folder
    from ..saved.opened import open_model
    from ..telling import telling

    model = open_model(options.model, options.size)
    if options.output is not None:
        make_folder(options.output)
    with using_threads(options.threads):
        x = torch.randn(options.batch_size, model.view.channels, model.view.size, model.view.size)
        with model.shown_pictures(), telling(f"timing the layers of {model.title}"):
            found = profile(model.network, x, rounds=options.rounds)
        with telling("timing how attention grows") if options.growth else nullcontext():
            grown = growth(None, **geometry_of(model.network), rounds=options.rounds) if options.growth else None
    _tell_cost(model.title, found, grown, options)


def _tell_cost(title: str, found: Any, grown: Any, options: argparse.Namespace) -> None:
    from rich.console import Console

    from ..bench import growth, profile
    from ..files import write_text
    from ..pages.charts import write_plot
    from ..pages.csv_json import to_csv, to_json

    facts = {"model": title, "parameters": found.parameters, "flops": found.flops, **asdict(found)}
    text = to_json(facts if grown is None else {**facts, "growth": asdict(grown)})
    if options.output is not None:
        write_plot(options.output / "layers", profile.draw_profile(found, title), to_csv(found.rows))
        if grown is not None:
            write_plot(options.output / "growth", growth.draw_growth(grown), to_csv(grown.points))
        write_text(options.output / "profile.json", text + "\n")
    if options.json or options.csv:
        print(text if options.json else to_csv(found.rows).removesuffix("\n"))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no edge to break lines at
    console.print(profile.profile_table(found))
    if grown is not None:
        console.print(growth.growth_table(grown))
    if options.output is not None:
        print(f"wrote {options.output}")
