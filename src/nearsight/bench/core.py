# SPDX-License-Identifier: Apache-2.0
"""The operation alone: every backend, the textbook's way, FlexAttention and natten-mps, beside the least time for it.

The floor is what the machine needs for the arithmetic (multiply-adds at the best rate that the 3x3 convolution or a
matrix product reaches in the same run, and one exponential per pair of cells) or for reading and writing the tensors once,
whichever is longer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import backends, local_attention, native
from ..attention.problem import describe
from ..window import Window
from .timing import copy_rate, matrix_rate, passes, race

KERNEL_SIZE = 7
# Matrix products over every pair of a query and a cell that it sees: the backward's least number is five, one of them a
# repetition of the forward's.
PRODUCTS = {"forward": 2, "forward+backward": 7}
# Vector instructions of an exponential as good as that of csrc/simd-inl.h, which compete with the multiply-adds, plus
# maximum and sum.
EXP_INSTRUCTIONS = 13
# Tensors as large as the map that have to be read or written once.
TENSORS = {"forward": 4, "forward+backward": 12}


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    head_dim: int
    size: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.heads} x {self.head_dim}, {self.size}x{self.size}"

    def maps(self) -> list[Tensor]:
        """query, key and value heads last, as a channels_last projection leaves them."""
        memory = (self.batch, self.size, self.size, self.heads, self.head_dim)
        return [torch.randn(memory).movedim(-2, 1) for _ in range(3)]

    @property
    def cells(self) -> int:
        return self.batch * self.heads * self.size**2

    def pairs(self, window: Window) -> int:
        """Queries times the cells that each sees."""
        seen = [int((axis.neighbours(self.size)[..., 0] >= 0).sum()) for axis in window.axes(2)]
        return self.batch * self.heads * prod(seen)


QUICK = (Shape(8, 4, 8, 28), Shape(8, 4, 32, 28))
FULL = tuple(
    Shape(batch, 4, head_dim, size)
    for head_dim in (8, 16, 32, 64)
    for size, batch in ((14, 32), (28, 16), (56, 8), (128, 2))
)
PEERS = Shape(8, 4, 32, 64)  # where the ways of others are measured too
LARGE = Shape(1, 4, 32, 512)


def measure(quick: bool) -> list[dict[str, Any]]:
    rounds, seconds = (3, 0.5) if quick else (9, 5.0)
    window = Window(KERNEL_SIZE)
    bandwidth = copy_rate()
    matrix = matrix_rate(rounds)
    print(
        f"matrix product {matrix:.0f} GFLOP/s, copy {bandwidth:.1f} GB/s; k = {KERNEL_SIZE}, border 'mask', no tables"
    )
    print(
        f"{'batch x heads x dim, map':26}{'':30}{'ms: median (min .. max)':>34}{'GFLOP/s':>9}{'of conv':>9}{'of floor':>9}"
    )
    rows = []
    for shape in QUICK if quick else FULL:
        rows += _rows(
            shape,
            window,
            _contenders(shape, window, ("native", "blocked", "dense")),
            rounds,
            seconds,
            matrix,
            bandwidth,
        )
    if not quick:
        contenders = _contenders(PEERS, window, ("native", "blocked", "reference"))
        contenders |= {"unfold": textbook, **_flex(PEERS, window), **_natten_mps(), **_variants(window)}
        rows += _rows(PEERS, window, contenders, rounds, seconds, matrix, bandwidth)
        rows += _rows(LARGE, window, _contenders(LARGE, window, ("native",)), rounds, seconds, matrix, bandwidth)
        _per_cell(rows)
    return rows


def _rows(
    shape: Shape,
    window: Window,
    contenders: dict[str, Callable[..., Tensor]],
    rounds: int,
    seconds: float,
    matrix: float,
    bandwidth: float,
) -> list[dict[str, Any]]:
    maps = shape.maps()
    _check_equal(shape, contenders)
    steps = {"forward 3x3 convolution": passes(*_convolution(shape))["forward"]}
    for name, contender in contenders.items():
        for pass_, step in passes(contender, maps).items():
            if _runs(step):
                steps[f"{pass_} {name}"] = step
    found = race(steps, rounds, seconds)
    convolution = found.pop("forward 3x3 convolution")
    # As for attention, padding does not count.
    rate = 2 * shape.pairs(Window(3)) * shape.head_dim * shape.heads * shape.head_dim / convolution.median / 1e6
    print(f"{shape!s:26}{'3x3 convolution':30}{convolution!s:>34}{rate:9.0f}{1:9.0%}")
    rows = []
    for key, times in found.items():
        pass_, name = key.split(" ", 1)
        floor = _floor(shape, window, pass_, max(rate, matrix), bandwidth)
        flops = 2 * PRODUCTS[pass_] * shape.pairs(window) * shape.head_dim
        row = {
            **vars(shape),
            "pass": pass_,
            "name": name,
            **times.facts(),
            "gflops": flops / times.median / 1e6,
            "of_convolution": flops / times.median / 1e6 / rate,
            "convolution_gflops": rate,
            "floor_ms": floor,
            "gap": times.median / max(floor["fma"] + floor["exp"], floor["bytes"]),
        }
        rows.append(row)
        print(
            f"{'':26}{key:30}{times!s:>34}{row['gflops']:9.0f}{row['of_convolution']:9.0%}{row['gap']:8.1f}x",
            flush=True,
        )
    return rows


def _floor(shape: Shape, window: Window, pass_: str, gflops: float, bandwidth: float) -> dict[str, float]:
    """Milliseconds for the multiply-adds, the exponentials and the memory."""
    pairs = shape.pairs(window)
    exponentials = pairs * (1 if pass_ == "forward" else 2)
    return {
        "fma": 2 * PRODUCTS[pass_] * pairs * shape.head_dim / gflops / 1e6,
        "exp": 2 * EXP_INSTRUCTIONS * exponentials / gflops / 1e6,
        "bytes": 4 * TENSORS[pass_] * shape.cells * shape.head_dim / bandwidth / 1e6,
    }


def _per_cell(rows: list[dict[str, Any]]) -> None:
    for pass_ in PRODUCTS:
        cost = {
            row["size"]: row["median_ms"] / (row["batch"] * row["size"] ** 2)
            for row in rows
            if row["name"] == "native" and row["pass"] == pass_ and row["size"] in (PEERS.size, LARGE.size)
        }
        print(f"{pass_}: a cell at 512x512 costs {cost[LARGE.size] / cost[PEERS.size]:.2f} of one at 64x64")


# ---------------------------------------------------------------------------------------------------------- contenders


def textbook(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As every tutorial has it: gather all windows with F.unfold; cells off the image vote as zeros."""
    batch, heads, height, width, dim = query.shape

    def windows(tensor: Tensor) -> Tensor:
        image = tensor.movedim(-1, 2).reshape(batch, heads * dim, height, width)
        return F.unfold(image, KERNEL_SIZE, padding=KERNEL_SIZE // 2).view(batch, heads, dim, KERNEL_SIZE**2, -1)

    logits = torch.einsum("bnpd,bndkp->bnkp", query.flatten(2, 3) * dim**-0.5, windows(key))
    return torch.einsum("bnkp,bndkp->bnpd", logits.softmax(2), windows(value)).view(query.shape)


def _contenders(shape: Shape, window: Window, names: tuple[str, ...]) -> dict[str, Callable[..., Tensor]]:
    sample = torch.empty(shape.batch, shape.heads, shape.size, shape.size, shape.head_dim, device="cpu")
    why_not = backends(describe(sample, sample, sample, window, None, None))

    def contender(name: str) -> Callable[..., Tensor]:
        return lambda query, key, value: local_attention(query, key, value, window, backend=name)

    return {name: contender(name) for name in names if why_not[name] is None}


def _variants(window: Window) -> dict[str, Callable[..., Tensor]]:
    """The native kernel on every narrower instruction set."""
    if native.unavailable() is not None:
        return {}

    def contender(isa: str) -> Callable[..., Tensor]:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with native.use_variant(isa):
                return local_attention(query, key, value, window, backend="native")

        return attend

    return {f"native {isa}": contender(isa) for isa in native.variants() if isa != native.instruction_set()}


def _flex(shape: Shape, window: Window) -> dict[str, Callable[..., Tensor]]:
    """torch's compiler for such masks; on the CPU it has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, left = shape.size, window.axes(2)[0].left

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = key // size - query // size, key % size - query % size
        return (rows.abs() <= left) & (columns.abs() <= left)

    try:
        mask = create_block_mask(near, None, None, size**2, size**2, device="cpu")
        compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if query.requires_grad:  # to ask it would make it forget what it compiled
                raise NotImplementedError("FlexAttention has no backward on the CPU")
            flat = [tensor.flatten(2, 3).contiguous() for tensor in (query, key, value)]
            return compiled(*flat, block_mask=mask).view(query.shape)

        with torch.no_grad():
            attend(*shape.maps())
    except Exception as error:  # a peer that does not run here is a fact of the table, not an error of ours
        print(f"without FlexAttention: {' '.join(str(error).split())[:120]}")
        return {}
    return {"FlexAttention": attend}


def _natten_mps() -> dict[str, Callable[..., Tensor]]:
    """NATTEN's operation as the package natten-mps has it for the CPU, in plain PyTorch; its windows slide inwards."""
    try:
        from natten_mps import na2d  # pyright: ignore[reportMissingImports]
    except Exception as error:  # as above
        print(f"without natten-mps: {' '.join(str(error).split())[:120]}")
        return {}

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return na2d(*(tensor.movedim(1, -2) for tensor in (query, key, value)), KERNEL_SIZE).movedim(-2, 1)

    return {"natten-mps": attend}


def _runs(step: Callable[[], Any]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()
    except NotImplementedError:
        return False
    return True


def _check_equal(shape: Shape, contenders: dict[str, Callable[..., Tensor]]) -> None:
    """Speeds of different functions do not compare. Borders of others differ, so only whole windows are looked at."""
    query, key, value = (tensor[:1] for tensor in shape.maps())
    inside = slice(KERNEL_SIZE // 2, -(KERNEL_SIZE // 2))
    with torch.no_grad():
        expected = local_attention(query, key, value, Window(KERNEL_SIZE), backend="blocked")[:, :, inside, inside]
        for name, contender in contenders.items():
            if name != "FlexAttention":  # compiled for its own batch
                torch.testing.assert_close(
                    contender(query, key, value)[:, :, inside, inside],
                    expected,
                    msg=lambda text, name=name: f"{name}: {text}",
                )


# ------------------------------------------------------------------------------------------------------ what is possible


def _convolution(shape: Shape):
    """The 3x3 convolution of the same width on the same map: the rate that this processor reaches in practice."""
    channels = shape.heads * shape.head_dim
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(shape.batch, channels, shape.size, shape.size).to(memory_format=torch.channels_last)
    return layer, [x]
