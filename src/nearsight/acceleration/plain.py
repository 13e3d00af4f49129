# SPDX-License-Identifier: Apache-2.0
"""What has to hold of a module for another forward to compute the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..private import has_hooks

DTYPES = (torch.float32, torch.bfloat16)


def why_not_plain(module: nn.Module) -> str | None:
    """Why a module of a class that is known is more than that class; its own hooks do no harm, as they run as before."""
    if "forward" in vars(module):
        return "its forward was replaced"
    return None


def why_not_passed_by(module: nn.Module, names: str, kind: type[nn.Module] | None = None) -> str | None:
    """Why children cannot be passed by, their numbers read and they themselves not called.

    Args:
        names: of the children, with spaces between them.
        kind: what they have to be, as their class says what they compute.
    """
    for name in names.split():
        child = getattr(module, name)
        if kind is not None and type(child) is not kind:
            return f"its {name} is a {type(child).__name__}, no plain {kind.__name__}"
        if "forward" in vars(child):
            return f"the forward of its {name} was replaced"
        if has_hooks(child):
            return f"its {name} carries hooks, which would be passed by: remove them first"
    return None


def is_measured(x: Tensor) -> bool:
    """Whether our operation was measured on what such a tensor asks for: CPUs, in float32 and bfloat16."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def is_inference(module: nn.Module, x: Tensor) -> bool:
    """Whether a call is inference on what was measured, for attention that gains nothing in training."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in module.parameters()))
    return is_measured(x) and not recorded and not module.training
