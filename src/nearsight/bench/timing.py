# SPDX-License-Identifier: Apache-2.0
"""Taking times fairly: all contenders in one process, in turn, so that a busy moment of the machine hits all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..attention import native
from ..errors import OptionError

SHORTEST = 2e-3  # seconds: what is faster is repeated within a round


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender, one number per round."""

    ms: list[float]

    @property
    def median(self) -> float:
        return median(self.ms)

    def faster_than(self, other: Times) -> float:
        """The median of the rounds' ratios: what a machine does from minute to minute befalls both alike."""
        return median(theirs / ours for ours, theirs in zip(self.ms, other.ms, strict=False))

    def __str__(self) -> str:
        return f"{self.median:9.2f} ({min(self.ms):.2f} .. {max(self.ms):.2f})"

    def facts(self) -> dict[str, Any]:
        return {"median_ms": self.median, "min_ms": min(self.ms), "max_ms": max(self.ms), "ms": self.ms}


def race(
    contenders: dict[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time every contender once per round, after a round to warm up.

    A contender that has used ``seconds`` sits out the rest, so that a slow peer does not decide how long it all takes.
    """
    repeats: dict[str, int] = {}
    for name, contender in contenders.items():
        contender()
        start = clock()
        contender()
        repeats[name] = max(1, int(SHORTEST / max(clock() - start, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    used = dict.fromkeys(contenders, 0.0)
    for _ in range(rounds):
        for name, contender in contenders.items():
            if found[name] and used[name] >= seconds:
                continue
            start = clock()
            for _ in range(repeats[name]):
                contender()
            elapsed = clock() - start
            used[name] += elapsed
            found[name].append(elapsed / repeats[name] * 1e3)
    return {name: Times(ms) for name, ms in found.items()}


def passes(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> dict[str, Callable[[], Any]]:
    """The forward alone, without gradients; and forward with the backward to all inputs and parameters."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def both() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, [*leaves, *parameters], out.detach())

    return {"forward": forward, "forward+backward": both}


def matrix_rate(rounds: int = 5) -> float:
    """GFLOP/s of the convolution that is a large matrix product in oneDNN's hands: what this processor reaches at best."""
    x = torch.randn(16, 512, 28, 28).to(memory_format=torch.channels_last)
    layer = torch.nn.Conv2d(512, 512, 1, bias=False).to(memory_format=torch.channels_last)
    times = race({"product": passes(layer, [x])["forward"]}, max(rounds, 5), 5.0)["product"]
    return 2 * 16 * 28 * 28 * 512 * 512 / min(times.ms) / 1e6


def copy_rate() -> float:
    """GB/s of a copy that no cache holds, both ways counted."""
    source = torch.randn(1 << 25)
    target = torch.empty_like(source)
    times = race({"copy": lambda: target.copy_(source)}, 5, 5.0)["copy"]
    return 2 * source.numel() * 4 / min(times.ms) / 1e6


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Give PyTorch so many threads for a while; None leaves it those it has.

    Raises:
        OptionError: fewer than one.
    """
    if count is not None and count < 1:
        raise OptionError(f"threads must be at least 1; received {count}")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if count is None else count)
        yield
    finally:
        torch.set_num_threads(before)


def setting() -> dict[str, Any]:
    """What a number is worth nothing without."""
    return {
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "kernel": native.unavailable() or native.instruction_set(),
        "torch": torch.__version__,
        "huge pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
