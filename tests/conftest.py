# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the seed, the tolerances, and the backends that are held to the contract."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from zlib import crc32

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nearsight as ns
from nearsight import telling
from nearsight.attention.backend import BACKENDS
from nearsight.attention.problem import describe

# The same examples on every run and machine. `pytest --hypothesis-profile explore` looks for new ones.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, database=None, print_blob=True, max_examples=2000)
hypothesis.settings.load_profile("ci")

# All that is imported for the tests stays: the collector of cyclic garbage does not walk through it, now or later.
gc.disable()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the parallelism

telling.MOMENT = 60.0  # a slow machine adds no lines to those that tests count

# The c in c * eps * max(1, |ref|): how many roundings a result may be away from the oracle. Half precision is held in
# float32 inside, so that only the rounding of the result is left; see `bound`.
TOL = {torch.float64: 24, torch.float32: 24, torch.float16: 1, torch.bfloat16: 1}


def lines_of(page: str, heading: str) -> str:
    """The Python lines of a page of docs/ under a heading, which need more than an empty folder to run."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^```py\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


def projections(layer: nn.Module) -> list[nn.Module]:
    """The modules that project to query, key and value."""
    return [layer.qkv] if hasattr(layer, "qkv") else [layer.q, layer.kv]


def projected(layer: nn.Module, x: Tensor) -> Tensor:
    """Query, key and value of every cell, side by side in the channels."""
    return torch.cat([projection(x) for projection in projections(layer)], 1)


def bound(reference: np.ndarray, dtype: torch.dtype, condition: float = 1.0) -> np.ndarray:
    """How far a result in ``dtype`` may be from the oracle's, element by element.

    ``condition`` says by how much the problem itself amplifies a rounding: a logit of 1e4 carries an error of 1e4 * eps,
    and the softmax turns an error in a logit into the same relative error of a weight.
    """
    wide = torch.promote_types(dtype, torch.float32)
    stored, computed = TOL[dtype] * torch.finfo(dtype).eps, TOL[wide] * torch.finfo(wide).eps
    return (stored if dtype != wide else 0) * np.maximum(1, np.abs(reference)) + (
        computed * condition * np.maximum(1, np.abs(reference))
    )


def assert_near(
    name: str, found: Tensor, reference: np.ndarray, condition: float = 1.0, slack: float | np.ndarray = 0.0
) -> None:
    """Fail unless every element of ``found`` is within :func:`bound` and ``slack`` of the oracle's."""
    assert tuple(found.shape) == reference.shape, f"{name}: shape {tuple(found.shape)}, expected {reference.shape}"
    error = np.abs(found.detach().double().numpy() - reference)
    allowed = bound(reference, found.dtype, condition) + slack
    if not (error <= allowed).all():  # NaN is not <=, so it fails too
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(error), np.inf, error / allowed)), error.shape)
        raise AssertionError(
            f"{name}: {(~(error <= allowed)).sum()} of {error.size} elements are off; the worst, at "
            f"{tuple(map(int, worst))}, is {found[worst].item():.9g}, the oracle says {reference[worst]:.9g} "
            f"(allowed difference {allowed[worst]:.2g})"
        )


class Contestant(NamedTuple):
    """A backend, or one variant of it, that is held to the contract."""

    backend: ModuleType
    variant: str | None = None

    def __str__(self) -> str:
        return self.backend.name if self.variant is None else f"{self.backend.name}[{self.variant}]"

    def attend(self, *args, **kwargs) -> Tensor:
        return self.run(ns.local_attention, *args, **kwargs)

    def attend_globally(self, *args, **kwargs) -> Tensor:
        return self.run(ns.global_attention, *args, **kwargs)

    def run(self, operation: Callable[..., Tensor], *args, **kwargs) -> Tensor:
        chosen = nullcontext() if self.variant is None else self.backend.use_variant(self.variant)
        with chosen:
            return operation(*args, backend=self.backend.name, **kwargs)

    def why_not(self, query, key, value, window, *, bias=None, relative=None, scale=None) -> str | None:
        return self.backend.why_not(describe(query, key, value, window, bias, relative))


def contestants(backends=BACKENDS) -> Iterator[Contestant]:
    """Every backend that runs on this machine, once for each of its variants.

    A backend with several implementations, as a native one for each instruction set, has ``variants()``, the names of those
    that this machine can run, and ``use_variant(name)``, a context manager.
    """
    for backend in backends:
        if backend.unavailable() is None:
            variants = backend.variants() if hasattr(backend, "variants") else [None]
            yield from (Contestant(backend, variant) for variant in variants)


# Those of the CPU. FlexAttention has no backward there: test_flex.py holds its logic to the same oracle, and test_gpu.py
# runs what there is for graphics cards.
ALL = tuple(one for one in contestants() if one.backend.name not in ("flex", "natten"))
every_backend = partial(pytest.mark.parametrize, "contestant", ids=str)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="I/N", help="only the I-th of N shares of the tests that are selected")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that waits for a graphics card, or for a network, is left out where there is none, and counted as such."""
    if not torch.cuda.is_available():
        leave_out(config, items, lambda item: item.get_closest_marker("gpu") is not None)
    if any(item.get_closest_marker("network") for item in items) and not hub_is_there():
        leave_out(config, items, lambda item: item.get_closest_marker("network") is not None)
    if config.option.share:
        share, shares = map(int, config.option.share.split("/"))
        leave_out(config, items, lambda item: crc32(item.nodeid.encode()) % shares != share % shares)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def hub_is_there() -> bool:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def leave_out(config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]) -> None:
    out = [item for item in items if unwanted(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not unwanted(item)]


def pytest_report_header() -> list[str]:
    absent = {backend.name: backend.unavailable() for backend in BACKENDS}
    reasons = [f"not tested: backend {name}: {why}" for name, why in absent.items() if why is not None]
    return [f"backends under test: {', '.join(map(str, ALL))}", *reasons]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = "import sys; sys.path.insert(0, 'csrc'); from build_backend import build_sdist; build_sdist(sys.argv[1])"
    finished = subprocess.run(
        [sys.executable, "-c", program, folder], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    """What it holds is all that is needed, and no build touches the working tree."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / sdist.name.removesuffix(".tar.gz")
