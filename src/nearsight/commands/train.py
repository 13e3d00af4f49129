# SPDX-License-Identifier: Apache-2.0
"""``nearsight train``: a network learns, and a folder tells how."""

from __future__ import annotations

from pathlib import Path

from ..extras import TRAINING, need
from .arguments import add_recipe, parse, recipe_parser, with_config

EXAMPLES = """\
examples:
  nearsight train                                            the defaults: sasa_nano on digits
  nearsight train --data folder:~/photos --epochs 20         one folder of images per class
  nearsight train --model sasa_micro,kernel_size=5 --data wds:~/shards --devices 2
  nearsight train --config recipes/fashion_mnist.yaml
  nearsight train --model resnet18 --data cifar10 --size 64 --download
  nearsight train --resume --output runs/sasa_nano-digits    go on after an interruption
  nearsight train --config runs/a/config.yaml --seed 1 --output runs/b

The output folder then holds config.yaml, last.ckpt, model.safetensors, metrics.csv, timing.csv,
trained.npz and report.html.
"""


def run(arguments: list[str]) -> None:
    description = "Train a network on images, with a checkpoint after every epoch and a report at the end."
    parser = recipe_parser("train", description, EXAMPLES)
    add_recipe(parser)
    parser.add_argument("--output", type=str, help="the run's folder (default: runs/MODEL-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--download", action="store_true", help="fetch data that is missing from the network")

    given = with_config(parser, parse(parser, arguments, defaults=False).as_dict())
    output = Path(given.pop("output")) if "output" in given else None
    goes_on, download = given.pop("resume", False), given.pop("download", False)

    from ..training.recipe import Recipe

    recipe = Recipe(**given)
    need(TRAINING, "`nearsight train`", "train")
    from ..training.train import default_output, resume, train

    if goes_on:
        resume(output or default_output(recipe), given)
    else:
        train(recipe, output, download=download)
