# SPDX-License-Identifier: Apache-2.0
"""A network as its makers wrote it beside the same with its attention accelerated: speed, memory and how far they differ."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration import AccelerationReport, accelerate
from ..modes import trying_to_train
from ..saved.opened import OpenedModel, open_model
from ..saved.view import View
from .memory import in_fresh_process, peak_memory
from .timing import race

# What `nearsight bench accelerated` runs: a network of every family that is known, its image size, batch and modes.
INFERENCE, BOTH = (False,), (False, True)
FAMILIES: tuple[tuple[str, int | None, int, tuple[bool, ...]], ...] = (
    ("samvit_base_patch16", 1024, 1, INFERENCE),
    ("halonet26t", None, 8, BOTH),
    ("halonet50ts", None, 8, BOTH),
    ("sehalonet33ts", None, 8, BOTH),
    ("haloregnetz_b", None, 8, BOTH),
    ("botnet26t_256", None, 8, INFERENCE),
    ("swin_tiny_patch4_window7_224", None, 8, INFERENCE),
    ("swinv2_tiny_window8_256", None, 8, INFERENCE),
    ("torchvision:swin_t", 224, 8, INFERENCE),
    ("natten:NeighborhoodAttention2D", 56, 2, INFERENCE),
)
HEADINGS = ("model", "images/s", "accelerated", "times", "share", "ceiling", "MB", "accelerated", "difference")


@dataclass(frozen=True)
class LayerTimes:
    """An attention layer by itself, with the input that it has in the network: the least milliseconds, theirs and ours."""

    name: str
    shape: tuple[int, ...]
    theirs: float
    ours: float


@dataclass(frozen=True)
class Contest:
    """What was measured of both.

    images_per_second, memory   theirs and ours; memory in bytes above the weights, in a process of its own
    faster                      the median of the rounds' ratios
    share                       of their step, what their attention takes that was accelerated, projections included
    difference                  the largest of the outputs in evaluation mode, relative to the largest output
    layers                      each accelerated attention by itself
    report                      what was accelerated
    """

    images_per_second: tuple[float, float]
    memory: tuple[int, int]
    faster: float
    share: float
    difference: float
    layers: tuple[LayerTimes, ...]
    report: AccelerationReport

    @property
    def ceiling(self) -> float:
        """How many times as fast the network were with this attention for nothing."""
        return 1 / (1 - self.share)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        layers = [asdict(layer) for layer in self.layers]
        return found | {"layers": layers, "ceiling": self.ceiling, "report": self.report.to_dict()}

    def cells(self, model: str) -> tuple[str, ...]:
        """Its row under ``HEADINGS``."""
        (theirs, ours), (before, after) = self.images_per_second, self.memory
        speeds = (f"{theirs:.3g}", f"{ours:.3g}", f"{self.faster:.2f}", f"{self.share:.2f}", f"{self.ceiling:.2f}")
        return (model, *speeds, f"{before / 1e6:,.0f}", f"{after / 1e6:,.0f}", f"{self.difference:.1e}")


def measure(quick: bool) -> list[dict[str, Any]]:
    """A row for each family in inference, and for halo attention in training."""
    rounds, seconds = (1, 1.0) if quick else (9, 12.0)
    print(f"batch 1 to 8; times: median of up to {rounds} rounds' ratios; share: of their step, what attention takes")
    print("ceiling: times as fast with attention for nothing; MB: what a step adds to a fresh process's peak")
    widths = (34, 9, 12, 7, 7, 9, 8, 12, 12)
    print("".join(f"{one:{'<' if not place else '>'}{widths[place]}}" for place, one in enumerate(HEADINGS)))
    rows = []
    for given, size, batch, modes in FAMILIES:
        for training in modes:
            name = f"{given}, training" if training else given
            reason = why_not_there(given)
            if reason is not None:
                print(f"{name:{widths[0]}}{reason}", flush=True)
                rows.append({"model": given, "training": training, "why_not": reason})
                continue
            found = contest(given, size, batch, training=training, rounds=rounds, seconds=seconds)
            cells = enumerate(found.cells(name))
            print("".join(f"{one:{'<' if not at else '>'}{widths[at]}}" for at, one in cells), flush=True)
            rows.append({"model": given, "size": size, "batch": batch, "training": training, **found.to_dict()})
    return rows


def why_not_there(given: str) -> str | None:
    """Why a network of the list cannot be made here."""
    package = given.partition(":")[0]
    return (
        f"{package} is not installed" if package in ("natten", "torchvision") and find_spec(package) is None else None
    )


def contest(
    given: str, size: int | None, batch: int, *, training: bool, rounds: int, seconds: float = 120.0
) -> Contest:
    """Run both in turn, in float32, in the memory format that the network comes in.

    On one thread times are those of the processor, which other processes do not stretch; on several, those of the clock.

    Args:
        given, size: as :func:`nearsight.saved.opened.open_model`; also ``torchvision:NAME`` and NATTEN's ``natten:CLASS``.
        training: a step forward and backward, without an optimizer; otherwise inference.
        seconds: that each may use; then it sits out the rest of the rounds.
    """
    opened = _open(given, size)
    model, x = opened.network, torch.randn(batch, opened.view.channels, opened.view.size, opened.view.size)
    draw_zeros(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    ours = copy.deepcopy(model, shared)
    report = accelerate(ours)
    with opened.shown_pictures(), torch.no_grad():
        expected = model(x)
        difference = ((ours(x) - expected).abs().max() / expected.abs().max()).item()
    with trying_to_train(model):  # for its batch norms, which ours shares
        ours.train(training)
        model.train(training)
        parameters = list(model.parameters())
        steps = {name: _step(one, [x], parameters, training) for name, one in (("theirs", model), ("ours", ours))}
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        times = race(steps, rounds, seconds, clock)
        layers = _layers(model, ours, report.accelerated, x, training, clock)
    asked = (given, size, batch, training, torch.get_num_threads())
    memory = in_fresh_process(memory_of, False, *asked), in_fresh_process(memory_of, True, *asked)
    speeds = batch * 1e3 / times["theirs"].median, batch * 1e3 / times["ours"].median
    share = min(sum(layer.theirs for layer in layers) / min(times["theirs"].ms), 0.99)
    return Contest(speeds, memory, times["ours"].faster_than(times["theirs"]), share, difference, layers, report)


def memory_of(accelerated: bool, given: str, size: int | None, batch: int, training: bool, threads: int) -> int:
    """Bytes that a step adds to the peak of this process, which must have done nothing else, above the weights."""
    torch.set_num_threads(threads)
    opened = _open(given, size)
    model = opened.network.train(training)
    if accelerated:
        accelerate(model)
    before = peak_memory()
    x = torch.randn(batch, opened.view.channels, opened.view.size, opened.view.size)
    _step(model, [x], list(model.parameters()), training)()
    return int(max(peak_memory() - before, 0))


def _layers(
    theirs: nn.Module, ours: nn.Module, names: Sequence[str], x: Tensor, training: bool, clock: Callable[[], float]
) -> tuple[LayerTimes, ...]:
    """Each accelerated attention by itself, theirs and ours in turn; a block around one that is accelerated too is none."""
    innermost = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, inputs: seen.update({name: inputs})

    hooks = [theirs.get_submodule(name).register_forward_pre_hook(keep(name)) for name in innermost]
    with torch.no_grad():
        theirs(x)
    for hook in hooks:
        hook.remove()
    found = []
    for name in innermost:
        inputs = [one.detach() if isinstance(one, Tensor) else one for one in seen.pop(name)]
        inputs[0].requires_grad_(training)
        pair = {"theirs": theirs.get_submodule(name), "ours": ours.get_submodule(name)}
        steps = {who: _step(one, inputs, [inputs[0], *one.parameters()], training) for who, one in pair.items()}
        times = race(steps, 5, 2.0, clock)
        found.append(LayerTimes(name, tuple(inputs[0].shape), *(min(times[who].ms) for who in pair)))
    return tuple(found)


def _open(given: str, size: int | None) -> OpenedModel:
    """One that :func:`open_model` knows, torchvision's, or a module of NATTEN's as a network of maps."""
    package, _, name = given.partition(":")
    if package == "torchvision":
        from torchvision.models import get_model

        network, channels = get_model(name, weights=None), 3
    elif package == "natten":
        import natten  # pyright: ignore[reportMissingImports]

        network, channels = _OfMaps(getattr(natten, name)(64, 2, 7)), 64
    else:
        return open_model(given, size)
    view = View(channels, size or 224, (0.5,) * channels, (0.5,) * channels)
    return OpenedModel(given, network.eval(), view, None, given, "")


class _OfMaps(nn.Module):
    """A layer of channels-last maps, of channels-first ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


def draw_zeros(model: nn.Module) -> None:
    """Parameters that are zeros throughout, as position tables that were never trained: they would hide what differs."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def _step(model: nn.Module, inputs: Sequence[Any], wanted: Sequence[Tensor], training: bool) -> Any:
    """A call, in training with the gradients of ``wanted``."""

    def infer() -> None:
        with torch.no_grad():
            model(*inputs)

    def train() -> None:
        out = model(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        torch.autograd.grad(out, wanted, out.detach(), allow_unused=True)

    return train if training else infer
