# SPDX-License-Identifier: Apache-2.0
"""``nearsight explore``: a page that shows where a network looks."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..errors import OptionError
from ..extras import need
from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight explore sasa_nano digits:3                       the fourth test image of the digits; weights come along
  nearsight explore runs/photos cat.jpg --output cat.html
  nearsight explore nat_mini,pretrained=false cat.jpg --size 224

The page is one file that needs no network: open it in any browser, or send it to somebody.
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("explore", "See what every layer and head attends to, from each pixel.", EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run, a .safetensors or .ckpt file, or NAME,option=value"
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture, or DATA:N, the test image of that number (from 0)")
    parser.add_argument("--output", default="explore.html", help="the page to write (default: explore.html)")
    parser.add_argument("--size", type=int, help="pixels per side that the network is given (default: its own)")
    parser.add_argument(
        "--background", help="colour that shows where images are transparent (default: its run's, white)"
    )
    parser.add_argument("--data-root", help="folder that holds the data; else the usual places are searched")
    options = parse(parser, arguments)
    if options.size is not None and options.size < 1:
        raise OptionError(f"--size must be at least 1; received {options.size}")

    need(("jinja2",), "`nearsight explore`", "explore")
    from ..inspect.explore import explore
    from ..models.data_config import seen
    from ..picture import read_picture
    from ..saved.opened import open_model

    model = open_model(options.model, options.size, trained=True)
    view = replace(model.view, background=options.background or model.view.background)
    subtitle = model.origin
    if Path(options.image).exists() or not re.fullmatch(r".+:\d+", options.image):
        image, picture = seen(read_picture(options.image, view.channels, view.background), view.data_config())
    else:
        from ..training.data import numbered_picture

        image, picture, said = numbered_picture(options.image, view, options.data_root)
        subtitle += f" Test image {options.image}, of class {said}."
    with model.shown_pictures():
        page = explore(
            model.network, image, picture=picture, classes=model.classes, title=model.title, subtitle=subtitle
        )
    print(f"The page: {page.save(options.output)}")
