# SPDX-License-Identifier: Apache-2.0
"""``nearsight compare``: several networks by one recipe."""

from __future__ import annotations

from pathlib import Path

from ..errors import OptionError
from ..extras import TRAINING, need
from .arguments import add_recipe, flag, parse, recipe_parser, with_config

EXAMPLES = """\
examples:
  nearsight compare --models sasa_nano conv_nano --data digits --seeds 3 --output runs/twins
  nearsight compare --models sasa_micro "sasa_micro,kernel_size=3" --config recipe.yaml --output runs/kernels
  nearsight compare --models sasa_micro "conv_micro,lr=0.003,opt=sgd" --size 64 --output runs/own-rates
  nearsight compare --preset article --data fashion-mnist --seeds 3 --output runs/article

Stopped at any moment, the same command goes on; models and seeds can be added. The output folder then holds table.csv,
runs.csv, compare.html, plots, compare.yaml and a folder for every run.
"""


def run(arguments: list[str]) -> None:
    from ..training.presets import PRESETS
    from ..training.recipe import PER_RUN, Recipe

    named = [flag for flag in map(flag, PER_RUN) if any(word.split("=")[0] == flag for word in arguments)]
    if named:
        raise OptionError(f"compare takes --models A B ... and --seeds N, and no {named[0]}")
    description = "Train several models with several seeds by one recipe, and hold them against each other."
    parser = recipe_parser("compare", description, EXAMPLES)
    parser.add_argument("--models", nargs="+", type=str, help="two or more, as for train; NAME,option=value works too")
    parser.add_argument("--preset", type=str, help=f"models that belong together: {', '.join(PRESETS)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, 2 ... (default: 3)")
    parser.add_argument("--output", type=str, help="the comparison's folder (required)")
    parser.add_argument("--target", type=float, help="accuracy to take the time to (default: the highest all reach)")
    parser.add_argument("--download", action="store_true", help="fetch data that is missing from the network")
    add_recipe(parser, hidden=PER_RUN)  # a recipe's file may name model and seed, which are not used

    given = with_config(parser, parse(parser, arguments, defaults=False).as_dict())
    models, preset = given.pop("models", None), given.pop("preset", None)
    seeds, output, target = given.pop("seeds", 3), given.pop("output", None), given.pop("target", None)
    download = given.pop("download", False)
    if (models is None) == (preset is None):
        raise OptionError("compare needs either --models A B ... or --preset; see nearsight compare --help")
    if preset is not None and preset not in PRESETS:
        raise OptionError(f"preset must be one of {', '.join(PRESETS)}; received {preset!r}")
    if output is None:
        raise OptionError("compare needs --output DIR, where it keeps its runs; see nearsight compare --help")
    recipe = Recipe(**given)
    need(TRAINING, "`nearsight compare`", "train")
    from ..training.compare import compare

    groups = PRESETS[preset] if preset else {"": models}
    compare(groups, recipe, seeds, Path(output), target=target, download=download)
