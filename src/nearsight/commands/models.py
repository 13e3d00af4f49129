# SPDX-License-Identifier: Apache-2.0
"""``nearsight models``: nearsight's own networks, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import OptionError
from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight models                    all of them
  nearsight models 'sasa*' --csv

GFLOP are of one image at the size that is named, two per multiply-add. Every model of timm can be trained too.
"""


def run(arguments: list[str]) -> None:
    parser = parser_of("models", "List nearsight's own networks, and those that the docs compare them with.", EXAMPLES)
    parser.add_argument("filter", nargs="?", default="", metavar="PATTERN", help="only names that match, as 'sasa*'")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV")
    options = parse(parser, arguments)

    from ..models import list_models, list_twins
    from ..pages.csv_json import to_json, write_csv

    ours, twins = list_models(options.filter), list_twins(options.filter)
    if not ours and not twins:
        raise OptionError(f"no network of nearsight matches {options.filter!r}; a pattern has wildcards, as 'sasa*'")
    if not options.json and not options.csv:
        _show(ours, twins)
        return
    rows = [_facts(name) for name in [*ours, *twins]]
    print(to_json(rows) if options.json else write_csv(list(rows[0]), [list(row.values()) for row in rows]).rstrip())


def _facts(name: str) -> dict[str, Any]:
    """What is known of a network without making its weights."""
    import torch

    from ..flops import count_flops
    from ..models import create_model, input_size, pretrained_value

    size = input_size(name)
    with torch.device("meta"):
        model = create_model(name)
    model.to_empty(device="cpu")  # where the native kernel counts as it computes
    source = pretrained_value(name, "paper_ids") or "; ".join(pretrained_value(name, "notes") or ())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": name,
        "parameters": parameters,
        "flops": count_flops(model.eval(), (3, size, size)),
        "image": size,
        "source": source,
    }


def _show(ours: Sequence[str], twins: Sequence[str]) -> None:
    """A line a network, each as soon as it is counted: the largest take a second."""
    from ..attention import native

    print(f"{'model':24}{'M parameters':>12}{'GFLOP':>10}{'image':>7}  source")
    for name in ours:
        _show_one(name)
    if twins:
        print("to compare with:")
    for name in twins:
        _show_one(name)
    if (reason := native.unavailable()) is not None:
        print(f"GFLOP are more than the equation's, those that plain PyTorch computes: {reason}")


def _show_one(name: str) -> None:
    row = _facts(name)
    counts = f"{row['parameters'] / 1e6:12.3f}{row['flops'] / 1e9:10.3f}{row['image']:7}"
    print(f"{name:24}{counts}  {row['source']}", flush=True)
