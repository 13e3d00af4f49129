# SPDX-License-Identifier: Apache-2.0
"""The attention layer against the 3x3 convolution that it replaces in a ResNet-50, each in its better memory format."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ..attention import local_attention
from ..layers import LocalSelfAttention2d
from ..layers.projection import split_heads
from .timing import Times, passes, race

BATCH, KERNEL_SIZE, HEADS = 16, 7, 8
STAGES = ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))  # channels, cells per axis, layers in a ResNet-50
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def measure(quick: bool) -> list[dict[str, Any]]:
    rounds, seconds = (3, 1.0) if quick else (15, 20.0)
    print(
        f"LocalSelfAttention2d (relative, k = {KERNEL_SIZE}, {HEADS} heads) and Conv2d (3x3, no bias), batch {BATCH}; ms"
    )
    print(f"{'':26}{'attention: median (min .. max)':>34}{'convolution':>34}{'times faster':>14}")
    rows = []
    for channels, size, count in STAGES:
        for name, row in _stage(channels, size, rounds, seconds).items():
            rows.append({"stage": f"{channels}@{size}", "layers": count, "pass": name, **row})
            _print(f"{channels}@{size}", name, row["attention"]["times"], row["convolution"]["times"])
    for name in ("forward", "forward+backward"):
        sums = {
            who: sum(row["layers"] * row[who]["median_ms"] for row in rows if row["pass"] == name and "layers" in row)
            for who in ("attention", "convolution")
        }
        rows.append({"stage": "sum", "pass": name, **{who: {"median_ms": ms} for who, ms in sums.items()}})
        _print("sum of 16", name, *(Times([ms]) for ms in sums.values()))
    rows.append(_alternation(rounds, seconds))
    for row in rows:
        for who in ("attention", "convolution"):
            row.get(who, {}).pop("times", None)
    return rows


def _stage(channels: int, size: int, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    layers = {
        "attention": LocalSelfAttention2d(channels, channels, KERNEL_SIZE, num_heads=HEADS),
        "convolution": nn.Conv2d(channels, channels, 3, padding=1, bias=False),
    }
    x = torch.randn(BATCH, channels, size, size)
    contenders: dict[str, Callable[[], Any]] = {}
    for who, layer in layers.items():
        for name, memory_format in FORMATS.items():
            laid_out = deepcopy(layer).to(memory_format=memory_format)
            inputs = [x.to(memory_format=memory_format)]
            for pass_, step in passes(laid_out, inputs, list(laid_out.parameters())).items():
                contenders[f"{pass_} {who} {name}"] = step
    found = race(contenders, rounds, seconds)
    rows: dict[str, dict[str, Any]] = {}
    for pass_ in ("forward", "forward+backward"):
        rows[pass_] = {}
        for who in layers:
            times = {name: found[f"{pass_} {who} {name}"] for name in FORMATS}
            best = min(times, key=lambda name: times[name].median)
            rows[pass_][who] = {"times": times[best], "format": best, **times[best].facts()}
    return rows


def _alternation(rounds: int, seconds: float) -> dict[str, Any]:
    """Whether torch's operators and the kernel, taking turns on the same threads, cost more than each on its own."""
    layer = LocalSelfAttention2d(128, 128, KERNEL_SIZE, num_heads=HEADS, out_proj=True).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(BATCH, 128, 28, 28).to(memory_format=torch.channels_last)
    window = layer.window_on(x.shape[2:])
    with torch.no_grad():
        query, key, value = (split_heads(part, HEADS) for part in layer.qkv(x).chunk(3, 1))
        _, relative = layer.position.tables(window, x.shape[2:])
        parts = {
            "qkv": lambda: layer.qkv(x),
            "kernel": lambda: local_attention(query, key, value, window, relative=relative),
            "proj": lambda: layer.proj(x),
            "whole": lambda: layer(x),
        }
        found = race(parts, rounds, seconds)
    whole, alone = found["whole"].median, sum(found[part].median for part in ("qkv", "kernel", "proj"))
    print(
        f"projection + kernel + projection, 128@28: {whole:.2f} together, {alone:.2f} one by one: {whole / alone:.2f}x"
    )
    return {"stage": "alternation 128@28", "pass": "forward", "whole_ms": whole, "sum_of_parts_ms": alone}


def _print(stage: str, pass_: str, attention: Times, convolution: Times) -> None:
    faster = convolution.median / attention.median
    print(f"{stage:10}{pass_:16}{attention!s:>34}{convolution!s:>34}{faster:13.2f}x", flush=True)
