# SPDX-License-Identifier: Apache-2.0
"""Local attention against the version that every tutorial copies: gather all windows with F.unfold, then a softmax.

    python bench/unfold.py                      batch 8, 4 heads x 32, 64x64, k = 7, one thread
    python bench/unfold.py --threads 2 --json unfold.json

Query, key and value are given, as three 1x1 convolutions leave them: (B, C, H, W) in memory. Both contenders take them
without a copy made beforehand, and their results are compared before any time is taken.

Times are wall-clock, of interleaved rounds in one process, so that a busy moment of the machine hits all alike. Memory
is what a fresh process adds to its peak resident set for one call: outputs and gradients included, inputs not.
"""

from __future__ import annotations

import os

# Large tensors on huge pages, for every contender: otherwise page faults cost more than some of the arithmetic. PyTorch
# reads the variable when it is loaded.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nearsight as ns
from nearsight.errors import BackendError

TEXTBOOK = "unfold"
SLOW_ON_PURPOSE = {"reference"}
PASSES = ("forward", "forward+backward")
MIB = 1 << 20


def textbook(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Attention over k x k windows by gathering every window; cells off the image vote as zeros. Odd k only.

    Shapes: query, key, value and the result are (B, N, H, W, D).
    """
    batch, heads, height, width, dim = query.shape

    def windows(tensor: Tensor) -> Tensor:  # (B, N, D, K, H*W): k*k times the memory of the map
        image = tensor.permute(0, 1, 4, 2, 3).reshape(batch, heads * dim, height, width)
        columns = F.unfold(image, kernel_size, padding=kernel_size // 2)
        return columns.reshape(batch, heads, dim, kernel_size**2, height * width)

    pixels = query.permute(0, 1, 4, 2, 3).reshape(batch, heads, dim, height * width)
    logits = torch.einsum("bndp,bndkp->bnkp", pixels * dim**-0.5, windows(key))
    out = torch.einsum("bnkp,bndkp->bndp", logits.softmax(2), windows(value))
    return out.reshape(batch, heads, dim, height, width).permute(0, 1, 3, 4, 2)


def contenders(
    args: argparse.Namespace, border: str, announce: bool = False
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The textbook version, then every backend that takes the problem and its gradients, as functions of q, k, v."""
    window = ns.Window(args.kernel_size, border=border)

    def run(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda query, key, value: ns.local_attention(query, key, value, window, backend=backend)

    chosen: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        TEXTBOOK: lambda query, key, value: textbook(query, key, value, args.kernel_size)
    }
    sample = [tensor.requires_grad_() for tensor in inputs(args, batch=1)[:3]]
    for name, why_not in ns.backends().items():
        if name not in (args.backends or ns.backends().keys() - SLOW_ON_PURPOSE):
            continue
        if why_not is None:
            try:
                run(name)(*sample)
            except BackendError as error:
                why_not = str(error)
        if why_not is None:
            chosen[name] = run(name)
        elif announce:
            print(f"without {name}: {why_not}")
    return chosen


def inputs(args: argparse.Namespace, batch: int | None = None) -> list[Tensor]:
    """query, key, value and the gradient of the output, (B, N, H, W, D) as views of (B, N, D, H, W)."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch if batch is None else batch, args.heads, args.head_dim, args.size, args.size)
    return [torch.randn(shape, generator=generator).permute(0, 1, 3, 4, 2) for _ in range(4)]


def call(run: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and the three input gradients if asked for."""
    query, key, value, grad = tensors
    if not backward:
        with torch.no_grad():
            return [run(query, key, value)]
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_equal(args: argparse.Namespace) -> None:
    """Speeds of different functions do not compare: with zeros off the image, results and gradients must agree."""
    tensors = inputs(args, batch=1)
    runs = contenders(args, border="zeros", announce=True)
    expected = call(runs[TEXTBOOK], tensors, backward=True)
    for name, run in runs.items():
        for received, wanted in zip(call(run, tensors, backward=True), expected, strict=True):
            gap = (received - wanted).abs().max().item()
            if not gap <= 1e-4 * max(1.0, wanted.abs().max().item()):
                sys.exit(f"{name} differs from {TEXTBOOK} by up to {gap:.2g}: no times taken")


def measure_times(args: argparse.Namespace, backward: bool) -> dict[str, list[float]]:
    """Milliseconds of every contender, `args.rounds` times each, in turn."""
    tensors = inputs(args)
    runs = contenders(args, args.border)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            call(run, tensors, backward)
            if round_ > 0:  # the first warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def peak_memory() -> float:
    """The highest resident set of this process so far, in MiB."""
    if sys.platform == "linux":  # where getrusage begins with the peak of the process that started this one
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak * 1024 / MIB


def measure_memory_here(args: argparse.Namespace, name: str, backward: bool) -> float:
    """What one call adds to this process's peak; to be run in a process of its own."""
    run = contenders(args, args.border)[name]
    tensors = inputs(args)
    small = argparse.Namespace(**{**vars(args), "size": args.kernel_size})
    call(run, inputs(small, batch=1), backward)  # libraries and threads are set up before the count begins
    before = peak_memory()
    call(run, tensors, backward)
    return peak_memory() - before


def measure_memory(name: str, pass_: str) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name, pass_]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(answer.splitlines()[-1])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="rows and columns of the map")
    parser.add_argument("--kernel-size", type=int, default=7, help="odd")
    parser.add_argument("--border", choices=("mask", "zeros"), default="mask", help="of nearsight; F.unfold has zeros")
    parser.add_argument("--backends", nargs="+", help="all that can but reference, if not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write every number there as well")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "PASS"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.kernel_size % 2 == 0:
        parser.error(f"--kernel-size must be odd, F.unfold pads both sides alike; received {args.kernel_size}")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        name, pass_ = args.memory_of
        print(measure_memory_here(args, name, pass_ == PASSES[1]))
        return
    check_equal(args)
    print(
        f"batch {args.batch}, {args.heads} heads x {args.head_dim}, {args.size}x{args.size}, k = {args.kernel_size}, "
        f"float32, border {args.border!r}, {args.threads} thread(s), {args.rounds} rounds; "
        f"torch {torch.__version__}, {platform.machine()}"
    )
    print(f"{'':28}{'median ms':>10}{'min':>9}{'max':>9}{'faster':>9}{'extra MiB':>11}{'smaller':>9}")
    rows = []
    for pass_ in PASSES:
        times = measure_times(args, backward=pass_ == PASSES[1])
        memory = {name: measure_memory(name, pass_) for name in times}
        for name, all_ms in times.items():
            row = {
                "pass": pass_,
                "name": name,
                "median_ms": statistics.median(all_ms),
                "ms": all_ms,
                "times_faster": statistics.median(times[TEXTBOOK]) / statistics.median(all_ms),
                "extra_mib": memory[name],
                "times_smaller": memory[TEXTBOOK] / max(memory[name], 1e-9),
            }
            rows.append(row)
            print(
                f"{pass_:18}{name:10}{row['median_ms']:10.1f}{min(all_ms):9.1f}{max(all_ms):9.1f}"
                f"{row['times_faster']:8.1f}x{row['extra_mib']:11.0f}{row['times_smaller']:8.1f}x"
            )
    if args.json:
        setting = {key: value for key, value in vars(args).items() if key not in ("json", "memory_of")}
        report = {"setting": setting, "torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
