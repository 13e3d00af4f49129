# SPDX-License-Identifier: Apache-2.0
"""What a converted layer costs beside the convolution it was made from: at home, moved, with open gates, and in training.

python bench/convert.py [--rounds N] [--threads N]

All contenders run in turn in every round, so that a busy machine is as slow for each; printed is the median of the ratios to
the convolution of the same round, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median

import torch
from torch import Tensor, nn

from nearsight.conversion import GatedPositionalSelfAttention

# batch, channels, side, stride, groups
SHAPES = ((8, 64, 56, 1, 1), (8, 128, 28, 2, 1), (8, 256, 14, 1, 1), (8, 128, 28, 1, 128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="passes of every contender (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads to use (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for batch, channels, side, stride, groups in SHAPES:
        convolution = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups)
        times = rounds(contenders(convolution), torch.randn(batch, channels, side, side), options.rounds)
        print(f"{batch} x {channels} x {side} x {side}, 3x3, stride {stride}, {groups} groups", flush=True)
        for name, taken in times.items():
            yardstick = times["convolution, trained" if name.endswith("trained") else "convolution"]
            ratios = sorted(one / other for one, other in zip(taken, yardstick, strict=True))
            print(f"  {name:22}{median(taken) * 1e3:9.2f} ms{median(ratios):8.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})")


def contenders(convolution: nn.Conv2d) -> dict[str, Callable[[Tensor], object]]:
    home = GatedPositionalSelfAttention(deepcopy(convolution))
    moved, opened = deepcopy(home), deepcopy(home)
    nn.init.uniform_(moved.shift, -0.5, 0.5)
    nn.init.uniform_(opened.gate, 0.2, 0.5)
    still = torch.no_grad()
    x = torch.randn(1, convolution.in_channels, 9, 7)
    assert torch.allclose(still(home.forward)(x), convolution(x))
    return {
        "convolution": still(convolution.forward),
        "at home": still(home.forward),
        "moved": still(moved.forward),
        "gates open": still(opened.forward),
        "convolution, trained": lambda x: convolution(x).sum().backward(),
        "at home, trained": lambda x: home(x).sum().backward(),
    }


def rounds(runs: dict[str, Callable[[Tensor], object]], x: Tensor, count: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            times[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in times.items()}


if __name__ == "__main__":
    main()
