# SPDX-License-Identifier: Apache-2.0
"""A network as its makers wrote it beside the same with its attention accelerated: speed, memory and how far they differ."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import AccelerationReport, accelerate
from ..modes import trying_to_train
from ..saved.opened import open_model
from .memory import in_fresh_process, peak_memory
from .timing import race


@dataclass(frozen=True)
class Contest:
    """What was measured of both.

    images_per_second, memory   theirs and ours; memory in bytes above the weights, in a process of its own
    faster                      the median of the rounds' ratios
    difference                  the largest of the outputs in evaluation mode, relative to the largest output
    report                      what was accelerated
    """

    images_per_second: tuple[float, float]
    memory: tuple[int, int]
    faster: float
    difference: float
    report: AccelerationReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"report": self.report.to_dict()}


def contest(
    given: str, size: int | None, batch: int, *, training: bool, rounds: int, seconds: float = 120.0
) -> Contest:
    """Run both in turn, in float32, in the memory format that the network comes in.

    On one thread times are those of the processor, which other processes do not stretch; on several, those of the clock.

    Args:
        given, size: as :func:`nearsight.saved.opened.open_model`.
        training: a step forward and backward, without an optimizer; otherwise inference.
    """
    opened = open_model(given, size)
    model, x = opened.network, torch.randn(batch, opened.view.channels, opened.view.size, opened.view.size)
    _draw_zeros(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    ours = copy.deepcopy(model, shared)
    report = accelerate(ours)
    with opened.shown_pictures(), torch.no_grad():
        expected = model(x)
        difference = ((ours(x) - expected).abs().max() / expected.abs().max()).item()
    with trying_to_train(model):  # for its batch norms, which ours shares
        ours.train(training)
        model.train(training)
        steps = {name: _step(one, x, training) for name, one in (("theirs", model), ("ours", ours))}
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        times = race(steps, rounds, seconds, clock)
    asked = (given, size, batch, training, torch.get_num_threads())
    memory = in_fresh_process(memory_of, False, *asked), in_fresh_process(memory_of, True, *asked)
    speeds = batch * 1e3 / times["theirs"].median, batch * 1e3 / times["ours"].median
    return Contest(speeds, memory, times["ours"].faster_than(times["theirs"]), difference, report)


def memory_of(accelerated: bool, given: str, size: int | None, batch: int, training: bool, threads: int) -> int:
    """Bytes that a step adds to the peak of this process, which must have done nothing else, above the weights."""
    torch.set_num_threads(threads)
    opened = open_model(given, size)
    model = opened.network.train(training)
    if accelerated:
        accelerate(model)
    before = peak_memory()
    x = torch.randn(batch, opened.view.channels, opened.view.size, opened.view.size)
    _step(model, x, training)()
    return int(max(peak_memory() - before, 0))


def _draw_zeros(model: nn.Module) -> None:
    """Parameters that are zeros throughout, as position tables that were never trained: they would hide what differs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def _step(model: nn.Module, x: Tensor, training: bool) -> Any:
    def infer() -> None:
        with torch.no_grad():
            model(x)

    def train() -> None:
        out = model(x)
        torch.autograd.grad(out, parameters, out.detach(), allow_unused=True)

    parameters = list(model.parameters())
    return train if training else infer
