# SPDX-License-Identifier: Apache-2.0
"""Whether a network still has the weights that it was made with: what it then shows is chance."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_MADE: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


def note(model: nn.Module) -> None:
    """Remember the weights of a network that was just made, by two numbers of each."""
    _MADE[model] = {name: numbers.cpu() for name, numbers in _sampled(model).items()}


def is_untrained(model: nn.Module) -> bool:
    """Whether it is known that a network was never trained, nor given weights.

    Known is that of what :func:`nearsight.create_model` made without weights and what has not changed since; not of a copy,
    of one that was brought to another precision, or of what others made.

    Example:
        >>> from nearsight import create_model
        >>> is_untrained(create_model("sasa_nano")), is_untrained(nn.Linear(2, 2))
        (True, False)
    """
    made, now = _MADE.get(model), _sampled(model)
    return bool(made) and made.keys() == now.keys() and all(torch.equal(made[name], now[name].cpu()) for name in made)


def _sampled(model: nn.Module) -> dict[str, Tensor]:
    """The first and the last number of every parameter that holds any: training changes some of them."""
    weights = {name: one.detach() for name, one in model.named_parameters() if one.numel() and not one.is_meta}
    return {name: torch.stack([one[(0,) * one.ndim], one[(-1,) * one.ndim]]) for name, one in weights.items()}
