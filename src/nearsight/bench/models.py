# SPDX-License-Identifier: Apache-2.0
"""Whole networks of attention against their yardsticks, each in its better memory format.

A yardstick is the ResNet that a network replaces, or timm's network of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..models import create_model
from .memory import in_fresh_process, peak_memory
from .timing import race

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PAIRS = (  # network, its yardstick, and an image size that both take
    ("sasa_resnet26", "resnet26", 224),  # timm's has stages of 2, 2, 2 and 2 blocks, the paper's of 1, 2, 4 and 1
    ("sasa_resnet26", "sasa_resnet26 of convolutions", 224),
    ("sasa_resnet38", "sasa_resnet38 of convolutions", 224),
    ("sasa_resnet50", "resnet50", 224),
    ("halo_h1", "halonet_h1", 256),
)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Images per second in inference and in a training step without its optimiser, and the peak memory of training."""
    batch, rounds, seconds = (4, 2, 5.0) if quick else (16, 15, 60.0)
    print(f"batch {batch}; faster: median of the rounds' ratios; memory: what training adds to a fresh process's peak")
    speed = f"{'images/s: network':>25}{'yardstick':>25}{'faster':>10}"
    print(f"{'':67}{speed}{'MB: network':>14}{'yardstick':>12}{'smaller':>10}")
    rows: list[dict[str, Any]] = []
    for network, yardstick, size in PAIRS:
        names = {"network": network, "yardstick": yardstick}
        for mode, steps in (("inference", _inference), ("training", _training)):
            row = {"mode": mode, "batch": batch, "size": size}
            row |= _contest(names, partial(steps, batch=batch, size=size), rounds, seconds)
            if mode == "training":
                for who in names:
                    asked = (row[who]["name"], row[who]["format"], batch, size, torch.get_num_threads())
                    row[who]["peak_memory"] = in_fresh_process(training_memory, *asked)
            rows.append(row)
            _print(row)
    return rows


def _contest(names: dict[str, str], steps: Callable[..., Callable], rounds: int, seconds: float) -> dict[str, Any]:
    """A heat, in which each finds its better memory format, and then the two of them in turn."""
    entrants = [(who, layout) for who in names for layout in FORMATS]
    heat = race({f"{who} {layout}": steps(names[who], layout) for who, layout in entrants}, 2, seconds)
    best = {who: min(FORMATS, key=lambda layout: heat[f"{who} {layout}"].median) for who in names}
    final = race({who: steps(name, best[who]) for who, name in names.items()}, rounds, seconds)
    facts = {who: {"name": name, "format": best[who], **final[who].facts()} for who, name in names.items()}
    return {**facts, "faster": final["network"].faster_than(final["yardstick"])}


def training_memory(name: str, layout: str, batch: int, size: int, threads: int) -> int:
    """Bytes that training steps add to the peak of this process, which must have done nothing else.

    These are weights, activations, gradients and what the operators take meanwhile.
    """
    torch.set_num_threads(threads)
    before = peak_memory()
    step = _training(name, layout, batch, size)
    for _ in range(2):  # the second finds what the first left behind
        step()
    return peak_memory() - before


def _inference(name: str, layout: str, batch: int, size: int) -> Callable[[], Any]:
    model, x = _model(name, layout).eval(), _images(layout, batch, size)

    def inference() -> None:
        with torch.no_grad():
            model(x)

    return inference


def _training(name: str, layout: str, batch: int, size: int) -> Callable[[], Any]:
    model, x = _model(name, layout), _images(layout, batch, size)
    parameters = list(model.parameters())

    def training() -> None:
        out = model(x)
        torch.autograd.grad(out, parameters, out.detach())

    return training


def _model(name: str, layout: str) -> nn.Module:
    twin = {"attention_stages": ()} if name.endswith(" of convolutions") else {}
    return create_model(name.split()[0], **twin).to(memory_format=FORMATS[layout])


def _images(layout: str, batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, size, size).to(memory_format=FORMATS[layout])


def _print(row: dict[str, Any]) -> None:
    both = row["network"], row["yardstick"]
    title = f"{both[0]['name']} against {both[1]['name']}, {row['size']}" if row["mode"] == "inference" else ""
    speeds = [row["batch"] * 1e3 / one["median_ms"] for one in both]
    shown = [f"{speed:.1f} ({one['format']})" for speed, one in zip(speeds, both, strict=True)]
    line = f"{title:56}{row['mode']:11}{shown[0]:>25}{shown[1]:>25}{row['faster']:9.2f}x"
    if row["mode"] == "training":
        memory = [one["peak_memory"] / 1e6 for one in both]
        line += f"{memory[0]:14,.0f}{memory[1]:12,.0f}{memory[1] / memory[0]:9.2f}x"
    print(line, flush=True)
