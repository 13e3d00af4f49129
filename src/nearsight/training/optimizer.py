# SPDX-License-Identifier: Apache-2.0
"""How a network's parameters become an optimiser's groups, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from ..positions import no_weight_decay_in
from .recipe import Recipe

FINAL_LR_SHARE = 0.01  # of the peak, and where the warm-up begins


def undecayed(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay must not shrink: norms, biases and positions.

    Positions are what the network, its layers and their encodings name in ``no_weight_decay()``, as timm's networks do.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.ndim <= 1 or name.endswith(".bias")}
    if hasattr(model, "no_weight_decay"):
        names |= set(model.no_weight_decay())  # pyright: ignore[reportCallIssue, reportArgumentType]
    norms = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    names |= {f"{path}.{name}" if path else name for path, norm in norms for name, _ in norm.named_parameters()}
    return names | no_weight_decay_in(model)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser of the recipe's name, with weight decay on the parameters that :func:`undecayed` leaves."""
    assert recipe.opt is not None
    assert recipe.weight_decay is not None
    groups = param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=tuple(undecayed(model)))
    return create_optimizer_v2(groups, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)


def state_apart(
    saved: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module, gone: Collection[str]
) -> dict[str, Any]:
    """An optimiser's state from a run whose layers held one ``qkv`` each, for those of a network that hold ``q`` and ``kv``.

    Args:
        saved: of ``optimizer.state_dict()`` then.
        optimizer: of the network now, in groups like those then.
        gone: the names of parameters that the network had then and has not now.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    states, groups, count = {}, [], 0
    for group, before in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        left, whole = iter(before["params"]), {}
        for number, parameter in enumerate(group["params"], start=count):
            layer, part, kind = ("", "", *names[parameter].rsplit(".", 2))[-3:]
            joined, rows = f"{layer}.qkv.{kind}", slice(None)
            if part == "q" and joined in gone:
                old = whole[joined] = next(left)
                rows = slice(len(parameter))
            elif part == "kv" and joined in gone:
                old, rows = whole[joined], slice(-len(parameter), None)
            else:
                old = next(left)
            if old in saved["state"]:
                state = saved["state"][old].items()
                states[number] = {key: value[rows].clone() if _has_rows(value) else value for key, value in state}
        groups.append({**before, "params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    return {**saved, "state": states, "param_groups": groups}


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_share: float) -> CosineLRScheduler:
    """Linear warm-up to the peak, then half a cosine down to a hundredth of it, over ``steps`` updates.

    lr(t) = final + (peak - final) * t / w                                        for the first w = ceil(share * steps)
    lr(t) = final + (peak - final) * (1 + cos(pi * (t - w) / (steps - w))) / 2    for the others, the first at the peak
    """
    final = FINAL_LR_SHARE * optimizer.defaults["lr"]
    warmup = min(math.ceil(warmup_share * steps), steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        warmup_t=warmup,
        warmup_prefix=True,
        warmup_lr_init=final,
        lr_min=final,
        t_in_epochs=False,
    )
