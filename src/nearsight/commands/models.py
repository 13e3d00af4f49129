# SPDX-License-Identifier: Apache-2.0
"""``nearsight models``: nearsight's own networks."""

from __future__ import annotations

from .arguments import parse, parser_of


def run(arguments: list[str]) -> None:
    parse(parser_of("models", "List nearsight's own networks; every model of timm can be trained too."), arguments)
    import torch

    from ..models import create_model, list_models

    for name in list_models():
        with torch.device("meta"):  # counts parameters without making them
            model = create_model(name)
        print(f"{name:24}{sum(parameter.numel() for parameter in model.parameters()) / 1e6:9.3f} M parameters")
