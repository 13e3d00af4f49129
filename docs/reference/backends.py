# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of backends.md, beside it, by asking each backend about a grid of problems:
`python docs/reference/backends.py`.

A backend answers for devices that this machine does not have. tests/test_backends.py holds the page to what this writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

import nearsight as ns
from nearsight.attention.backend import BACKENDS, Backend
from nearsight.attention.problem import Problem, describe

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- from here on written by docs/reference/backends.py -->", "<!-- up to here -->"

DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BORDERS = ("mask", "zeros", "shift", "wrap")
WAYS = {
    "values": {},
    "gradient": {"needs_grad": True},
    "forward mode": {"forward_ad": True, "transformed": True},
    "`vmap`": {"transformed": True},
    "`torch.compile`": {"needs_grad": True, "compiling": True},
    "export": {"compiling": True, "exporting": True},
}


COVERS = ns.Window((9, 11), border="shift")  # the one kind of window that every backend takes


def problem(window: ns.Window = COVERS, size: tuple[int, ...] = (9, 11), **changes) -> Problem:
    """That of a plain call, values alone, with some of its answers changed."""
    key = torch.zeros(1, 2, *size, 16)
    query = torch.zeros(1, 2, *window.output_size(size), 16)
    return replace(describe(query, key, key, window, None, None), **changes)


FEATURES = {
    **{f'`border="{border}"`': problem(ns.Window(3, border=border)) for border in BORDERS},
    "a border per axis": problem(ns.Window(3, border=("mask", "wrap"))),
    "`shared_by`": problem(ns.Window(3, shared_by=3)),
    "a block that covers the map": problem(),
    "a block larger than the map": problem(ns.Window(13, border="shift")),
    "one axis": problem(ns.Window(9, border="shift"), (9,)),
    "three axes": problem(ns.Window((3, 5, 7), border="shift"), (3, 5, 7)),
    "`stride`": problem(replace(COVERS, stride=2)),
    "`dilation`": problem(ns.Window(3, border="shift", dilation=2)),
    "`causal`": problem(replace(COVERS, causal=True)),
    "`bias`": problem(bias=True),
    "`relative`": problem(relative=True),
    "a value of another width": problem(value_dim=8),
    "any `head_dim`": problem(head_dim=5, value_dim=5),
    "fewer heads of key and value": problem(num_heads=1, groups=2),
    "`return_lse`": problem(lse=True),
}


def first_choice(asked: Problem, among: Iterable[Backend] = BACKENDS) -> Backend:
    """The backend that is taken where all of them are installed: the first that can and calls no later one better."""
    for backend in among:
        if backend.why_not(asked) is None and backend.second_best(asked) is None:
            return backend
    raise AssertionError("the reference takes everything")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def choices() -> Iterator[list[str]]:
    for device, dtype in product(DEVICES, DTYPES):
        if (device, dtype) != ("mps", torch.float64):  # which Metal does not have
            asked = problem(ns.Window(3, border="shift"), device=device, dtype=dtype)
            yield [device, _name(dtype), *(_chosen(replace(asked, **way)) for way in WAYS.values())]


def _chosen(asked: Problem) -> str:
    """The first choice, and where NATTEN is that, the one without it."""
    without = first_choice(asked, [backend for backend in BACKENDS if backend.name != "natten"]).name
    first = first_choice(asked).name
    return f"`{first}`" if first == without else f"`{first}`, else `{without}`"


def abilities() -> Iterator[list[str]]:
    """What each backend takes, asked on the last device that it runs on."""
    yield ["devices", *(", ".join(_devices(backend)) for backend in BACKENDS)]
    yield ["dtypes", *(", ".join(_dtypes(backend)) for backend in BACKENDS)]
    for name, asked in {**FEATURES, **{name: problem(**way) for name, way in WAYS.items()}}.items():
        yield [name, *("yes" if _takes(backend, asked) else "-" for backend in BACKENDS)]


def _devices(backend: Backend) -> list[str]:
    return [device for device in DEVICES if backend.why_not(problem(device=device)) is None]


def _dtypes(backend: Backend) -> list[str]:
    return [_name(dtype) for dtype in DTYPES if _takes(backend, problem(dtype=dtype))]


def _takes(backend: Backend, asked: Problem) -> bool:
    return backend.why_not(replace(asked, device=_devices(backend)[-1])) is None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def written() -> str:
    """Everything between the marks of the page."""
    return "\n".join(
        [
            "## What is chosen",
            "",
            'For two axes, `border="shift"` and no position tables, where every backend is installed:',
            "",
            *table(["device", "dtype", *WAYS], choices()),
            "## What each can",
            "",
            "`yes` is what a backend takes when it is named. Most are asked with a block that covers the map, since `dense`",
            "takes no other; what is taken for one feature is taken with the others of its column.",
            "",
            *table(["", *(f"`{backend.name}`" for backend in BACKENDS)], abilities()),
        ]
    )


def page() -> str:
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{written()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
