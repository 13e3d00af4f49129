# SPDX-License-Identifier: Apache-2.0
"""Evaluation for a while, and what was compiled as it was written.

A network may hold modules in several modes, as frozen batch norms in one that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .private import is_compiled


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode that it was in before, whatever happens meanwhile.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with keeping_modes(model):
        ...     model = model.train()
        >>> [module.training for module in model]
        [True, False]
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards in the mode that it was in before.

    Sets the modules' own flags: ``train`` and ``eval`` of some modules do more, as merging weights, than can be undone so.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     model.training
        False
    """
    with keeping_modes(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def trying_to_train(model: nn.Module) -> Iterator[None]:
    """Every module in training mode; afterwards modes, weights and buffers, as batch norms', are what they were before."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with keeping_modes(model):
            model.train()
            yield
    finally:
        model.load_state_dict(state)


@contextmanager
def as_written(model: Any) -> Iterator[None]:
    """Where a module was compiled, as a whole or in parts, it runs as it is written: compiled code calls no hooks."""
    if not isinstance(model, nn.Module) or not any(map(is_compiled, model.modules())):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
