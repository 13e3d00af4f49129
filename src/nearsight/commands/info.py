# SPDX-License-Identifier: Apache-2.0
"""``nearsight info``: versions, backends, and what this machine offers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from .arguments import parse, parser_of


def run(arguments: list[str]) -> None:
    parser = parser_of("info", "Versions, attention backends (and why not), and what this machine offers.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parse(parser, arguments)
    from ..pages.csv_json import to_json

    facts = _facts()
    if options.json:
        print(to_json(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, reason in value.items():
                print(f"  {key:14}{'can run' if reason is None else reason}")
        else:
            print(f"{name:16}{value}")


def _facts() -> dict[str, Any]:
    import platform

    import timm
    import torch

    from ..attention import backends, native

    return {
        "nearsight": version("nearsight"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "kernel": native.instruction_set() if native.unavailable() is None else "none",
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backends": backends(),
    }
