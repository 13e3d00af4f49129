# SPDX-License-Identifier: Apache-2.0
"""Whole networks of attention against their yardsticks, both run in the same way, each in its better memory format.

A yardstick is the ResNet that a network replaces, or timm's network of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from ..models import create_model
from .hosts import HOSTS, TAKES_LAYOUT, Step, prepared
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


DTYPES = (torch.float32, torch.bfloat16)


def measure(quick: bool) -> list[dict[str, Any]]:
    """Images per second in inference, in every host and dtype, and of training steps, with the peak memory of training.

    Both of a pair run in the same way. A training step is eager, in float32, and without its optimiser.
    """
    batch, rounds, seconds = (4, 2, 5.0) if quick else (16, 15, 60.0)
    print(f"batch {batch}; faster: median of the rounds' ratios; memory: what training adds to a fresh process's peak")
    speed = f"{'images/s: network':>25}{'yardstick':>25}{'faster':>10}"
    print(f"{'':34}{speed}{'MB: network':>14}{'yardstick':>12}{'smaller':>10}")
    rows: list[dict[str, Any]] = []
    for network, yardstick, size in PAIRS:
        print(f"{network} against {yardstick}, {size}")
        names = {"network": network, "yardstick": yardstick}
        for host, dtype in product(HOSTS, DTYPES):
            layouts = tuple(FORMATS) if host in TAKES_LAYOUT else ("contiguous",)
            steps = partial(_inference, host=host, dtype=dtype, batch=batch, size=size)
            found = _contest(names, steps, layouts, rounds, seconds)
            rows.append(_row("inference", host, dtype, batch, size, found))
        found = _contest(names, partial(_training, batch=batch, size=size), tuple(FORMATS), rounds, seconds)
        rows.append(_row("training", "eager", torch.float32, batch, size, found))
    return rows


def _row(mode: str, host: str, dtype: torch.dtype, batch: int, size: int, found: dict[str, Any]) -> dict[str, Any]:
    named = {"mode": mode, "host": host, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "size": size}
    row = named | found
    if mode == "training":
        for who in ("network", "yardstick"):
            asked = (row[who]["name"], row[who]["format"], batch, size, torch.get_num_threads())
            row[who]["peak_memory"] = in_fresh_process(training_memory, *asked)
    _print(row)
    return row


def _contest(
    names: dict[str, str], steps: Callable[..., Step | str], layouts: Sequence[str], rounds: int, seconds: float
) -> dict[str, Any]:
    """A heat, in which each finds its better memory format, and then the two of them in turn; or why they do not run."""
    entrants: dict[tuple[str, str], Step] = {}
    for who, layout in product(names, layouts):
        step = steps(names[who], layout)
        if isinstance(step, str):
            return {"why_not": step}
        entrants[who, layout] = step
    heat = race({" ".join(entrant): step for entrant, step in entrants.items()}, 2, seconds)
    best = {who: min(layouts, key=lambda layout: heat[f"{who} {layout}"].median) for who in names}
    final = race({who: entrants[who, layout] for who, layout in best.items()}, rounds, seconds)
    facts = {who: {"name": name, "format": best[who], **final[who].facts()} for who, name in names.items()}
    return {**facts, "faster": final["network"].faster_than(final["yardstick"])}


def training_memory(name: str, layout: str, batch: int, size: int, threads: int) -> float:
    """Bytes that training steps add to the peak of this process, which must have done nothing else.

    These are weights, activations, gradients and what the operators take meanwhile.
    """
    torch.set_num_threads(threads)
    before = peak_memory()
    step = _training(name, layout, batch, size)
    for _ in range(2):  # the second finds what the first left behind
        step()
    return peak_memory() - before


def _inference(name: str, layout: str, *, host: str, dtype: torch.dtype, batch: int, size: int) -> Step | str:
    return prepared(host, _model(name, layout), _images(layout, batch, size).to(dtype))


def _training(name: str, layout: str, batch: int, size: int) -> Step:
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
    title = f"  {row['mode']:10}{row['host']:13}{row['dtype']:9}"
    if "why_not" in row:
        print(f"{title}  {row['why_not']}", flush=True)
        return
    both = row["network"], row["yardstick"]
    speeds = [row["batch"] * 1e3 / one["median_ms"] for one in both]
    shown = [f"{speed:.1f} ({one['format']})" for speed, one in zip(speeds, both, strict=True)]
    line = f"{title}{shown[0]:>25}{shown[1]:>25}{row['faster']:9.2f}x"
    if row["mode"] == "training":
        memory = [one["peak_memory"] / 1e6 for one in both]
        line += f"{memory[0]:14,.0f}{memory[1]:12,.0f}{memory[1] / memory[0]:9.2f}x"
    print(line, flush=True)
