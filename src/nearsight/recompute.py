# SPDX-License-Identifier: Apache-2.0
"""Less memory in training: what the backward can make again is not kept for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def keep_in_place_of(
    made: Sequence[Tensor], make: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None]
) -> Iterator[None]:
    """Within, autograd keeps ``inputs`` where it would keep one of ``made``; the backward calls ``make(*inputs)``.

    All is kept as autograd keeps tensors: one that has been changed in place by then is an error of the backward, and hooks
    for saved tensors that were set around this, such as those of checkpoints, see the inputs and whatever else is saved.
    Every backward through a retained graph makes it once more.

    Args:
        made: equal to ``make(*inputs)``, to the bit.
        make: without side effects or chance. It runs without gradients and autocast.

    Example:
        >>> x = torch.randn(3, requires_grad=True)
        >>> y = x.exp()
        >>> with keep_in_place_of([y], lambda x: [x.exp()], [x]):
        ...     z = y.square().sum()
        >>> torch.equal(torch.autograd.grad(z, x)[0], 2 * y * y)
        True
    """
    again = _Again(make, made)
    with saved_tensors_hooks(again.pack, lambda packed: packed.unpack()):
        yield
    # Out here, where the hooks set around this are in force.
    again.inputs = _keep(*inputs)
    while again.others:
        again.others.pop(0).keep()


class _Again:
    """Makes tensors again, all at once, and hands each out where it is asked for."""

    def __init__(self, make: Callable[..., Sequence[Tensor]], made: Sequence[Tensor]) -> None:
        self.make = make
        self.device = made[0].device.type
        self.places = {_memory(tensor): place for place, tensor in enumerate(made)}
        self.asked: list[int] = []  # the place of every tensor that was packed
        self.ready: dict[int, Tensor] = {}
        self.others: list[_Other] = []
        self.inputs: Any = None

    def pack(self, tensor: Tensor) -> _Made | _Other:
        place = self.places.get(_memory(tensor))
        if place is None:
            self.others.append(_Other(tensor))
            return self.others[-1]
        self.asked.append(place)
        return _Made(self, len(self.asked) - 1)

    def get(self, nth: int) -> Tensor:
        if nth not in self.ready:
            with torch.no_grad(), torch.autocast(self.device, enabled=False):
                made = self.make(*self.inputs.saved_tensors)
            self.ready = {other: made[place] for other, place in enumerate(self.asked)}
        return self.ready.pop(nth)


class _Made(NamedTuple):
    """The ``nth`` packed of those that can be made again."""

    again: _Again
    nth: int

    def unpack(self) -> Tensor:
        return self.again.get(self.nth)


class _Other:
    """What is none of them: kept as it would be without us, as soon as it is not us who would be asked to."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.kept: Any = None

    def keep(self) -> None:
        self.kept, self.tensor = _keep(self.tensor), None

    def unpack(self) -> Tensor:
        return self.kept.saved_tensors[0]


def _memory(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _keep(*tensors: Tensor | None) -> Any:
    """An object whose ``saved_tensors`` autograd keeps, checks for changes in place, and shows to hooks."""
    detached = (None if tensor is None else tensor.detach() for tensor in tensors)
    return _Keep.apply(torch.empty(0, dtype=torch.float32, device="cpu", requires_grad=True), *detached).grad_fn


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorded, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*tensors)
        return recorded.new_empty(0)
