# SPDX-License-Identifier: Apache-2.0
"""Whole networks of attention against the ResNets that they replace, 224 x 224, each in its better memory format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models import create_model
from .timing import race

SIZE = 224
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PAIRS = {  # network: its yardstick
    "sasa_resnet26": "sasa_resnet26 of convolutions",
    "sasa_resnet38": "sasa_resnet38 of convolutions",
    "sasa_resnet50": "resnet50",
}


def measure(quick: bool) -> list[dict[str, Any]]:
    """Images per second in inference, without gradients, and in a training step without its optimiser."""
    batch, rounds, seconds = (4, 2, 5.0) if quick else (16, 5, 60.0)
    print(f"images per second at {SIZE}x{SIZE}, batch {batch}; in brackets the memory format; yardstick: convolutions")
    rows = []
    for name, yardstick in PAIRS.items():
        for mode, row in _pair(name, yardstick, batch, rounds, seconds).items():
            rows.append({"model": name, "yardstick": yardstick, "mode": mode, "batch": batch, **row})
            attention, convolution = row["attention"], row["convolution"]
            speed = batch * 1e3 / attention["median_ms"], batch * 1e3 / convolution["median_ms"]
            print(
                f"{name:16}{mode:12}{speed[0]:8.1f} ({attention['format']}){speed[1]:8.1f} ({convolution['format']})"
                f"{speed[0] / speed[1]:8.2f}x",
                flush=True,
            )
    return rows


def _pair(name: str, yardstick: str, batch: int, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    contenders: dict[str, Callable[[], Any]] = {}
    for who, model in (("attention", name), ("convolution", yardstick)):
        for layout in FORMATS:
            for mode, step in _steps(model, layout, batch).items():
                contenders[f"{mode} {who} {layout}"] = step
    found = race(contenders, rounds, seconds)
    rows: dict[str, dict[str, Any]] = {"inference": {}, "training": {}}
    for mode, row in rows.items():
        for who in ("attention", "convolution"):
            times = {layout: found[f"{mode} {who} {layout}"] for layout in FORMATS}
            best = min(times, key=lambda layout: times[layout].median)
            row[who] = {"format": best, **times[best].facts()}
    return rows


def _steps(name: str, layout: str, batch: int) -> dict[str, Callable[[], Any]]:
    x = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=FORMATS[layout])
    trained, asked = (_model(name).to(memory_format=FORMATS[layout]) for _ in range(2))
    asked.eval()
    parameters = list(trained.parameters())

    def inference() -> None:
        with torch.no_grad():
            asked(x)

    def training() -> None:
        out = trained(x)
        torch.autograd.grad(out, parameters, out.detach())

    return {"inference": inference, "training": training}


def _model(name: str) -> nn.Module:
    twin = {"attention_stages": ()} if name.endswith(" of convolutions") else {}
    return create_model(name.split()[0], **twin)
