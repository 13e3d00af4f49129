# SPDX-License-Identifier: Apache-2.0
"""How a network's parameters become an optimiser's groups, and the learning rate's schedule."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from ..layers import AttentionStem2d, HaloSelfAttention2d
from ..positions import Position
from .recipe import Recipe

FINAL_LR_SHARE = 0.01  # of the peak, and where the warm-up begins
POSITIONS_OF_LAYERS = {HaloSelfAttention2d: ("rows", "columns"), AttentionStem2d: ("row", "column", "mixture")}


def undecayed(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay must not shrink: norms, biases and positions.

    Positions are all parameters of :mod:`nearsight.positions`, the tables of the layers that keep their own, and what the
    network itself names in ``no_weight_decay()``, as timm's do.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1 or name.endswith(".bias")}
    if hasattr(model, "no_weight_decay"):
        names |= set(model.no_weight_decay())  # pyright: ignore[reportCallIssue, reportArgumentType]
    for path, module in model.named_modules():
        if isinstance(module, (Position, nn.LayerNorm)):
            own = [name for name, _ in module.named_parameters()]
        else:
            own = [name for kind, names_ in POSITIONS_OF_LAYERS.items() if isinstance(module, kind) for name in names_]
        names |= {f"{path}.{name}" if path else name for name in own}
    return names


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of the recipe's name, with weight decay on the parameters that :func:`undecayed` leaves."""
    assert recipe.opt is not None
    assert recipe.weight_decay is not None
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=tuple(undecayed(model)))
    return create_optimizer_v2(groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_share: float) -> CosineLRScheduler:
    """Linear warm-up to the peak, then half a cosine down to a hundredth of it, over ``steps`` updates."""
    final = FINAL_LR_SHARE * optimizer.defaults["lr"]
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        warmup_t=math.ceil(warmup_share * steps),
        warmup_lr_init=final,
        lr_min=final,
        t_in_epochs=False,
    )
