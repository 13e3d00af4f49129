# SPDX-License-Identifier: Apache-2.0
"""``nearsight eval``: a trained network on the images of a data set."""

from __future__ import annotations

from pathlib import Path

from ..extras import need
from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight eval runs/sasa_nano-digits --data digits
  nearsight eval model.safetensors --data folder:~/photos --json
  nearsight eval runs/photos --data folder:~/more-photos --leave-out-trained
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("eval", "Measure a trained network on the images of a data set.", EXAMPLES)
    parser.add_argument("run", metavar="DIR|FILE", help="folder of a run, a .safetensors or a .ckpt file")
    parser.add_argument("--data", required=True, help="as for `nearsight train`: digits, folder:PATH ...")
    parser.add_argument("--data-root", help="folder that holds the data; else the usual places are searched")
    parser.add_argument(
        "--split", help="test, val, train or all (default: test; all of a folder that was not trained on)"
    )
    parser.add_argument("--by-order", action="store_true", help="pair classes by their order, whatever they are called")
    parser.add_argument("--leave-out-trained", action="store_true", help="measure no image that the run was trained on")
    parser.add_argument(
        "--max-broken", type=int, default=10, metavar="N", help="unreadable images to skip (default: 10)"
    )
    parser.add_argument("--background", help="colour that shows where images are transparent (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every class and the confusion matrix")
    options = parse(parser, arguments)

    need(("torchmetrics", "sklearn", "scipy"), "`nearsight eval`", "train")
    from ..pages.csv_json import to_json
    from ..training.assess import assess

    found = assess(
        Path(options.run),
        options.data,
        options.data_root,
        split=options.split,
        by_order=options.by_order,
        leave_out_trained=options.leave_out_trained,
        max_broken=options.max_broken,
        background=options.background,
    )
    print(to_json(found.to_dict()) if options.json else "\n".join(found.summary()))
