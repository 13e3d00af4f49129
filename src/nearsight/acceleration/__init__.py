# SPDX-License-Identifier: Apache-2.0
"""Attention of other makers, computed by our operation: found in any model, with its weights, and undone again.

known.py    the classes that are known, and what stands in for each
plain.py    what has to hold of a module for another forward to compute the same
report.py   what became of every attention, and the way back
segment_anything.py     Segment Anything's attention, and timm_sam.py, transformers_sam.py, original_sam.py its three forms
timm_halo.py            timm's halo attention
timm_bottleneck.py      timm's bottleneck attention
folding.py              batch norms, folded into convolutions
swin.py                 Swin's windows, and timm_swin.py, torchvision_swin.py its forms
natten_modules.py       NATTEN's modules

What stands in for a class is a subclass of it with a forward of its own, and a module is given that class. So it keeps its
parameters, their names, its hooks and its place in the model. A stand-in says ``why_not(module)``, the reason why a module
stays as it is, and has ``does``, what is done in place of what, for the report. Where its conditions do not hold at a call,
as on a graphics card, it calls the forward that it stands in for.
"""

from __future__ import annotations

from torch import nn

from ..errors import OptionError
from ..private import is_compiled
from .folding import fold_batch_norms
from .known import stand_in_of
from .plain import why_not_plain
from .report import ACCELERATED, ALREADY, LEFT, AccelerationReport, Outcome

__all__ = ["AccelerationReport", "accelerate"]


def accelerate(model: nn.Module, *, inference: bool = False) -> AccelerationReport:
    """Have the attention of other makers in a model computed by nearsight's operation. The model is changed in place.

    What is known stands in docs/howto/accelerate.md, with what was measured: Segment Anything's image encoder and timm's
    halo attention among others. Each is replaced where our operation was measured to be faster, or to take clearly less
    memory, on CPUs in float32 and bfloat16. On other devices, in other dtypes, and where weights of attention are dropped
    in training, the model's own forward runs.

    Outputs and gradients are the same but for rounding. Parameters stay the very same objects with the same names, so
    optimizers, checkpoints, ``copy.deepcopy`` and ``pickle`` go on working. A module that is more than its class says (a
    subclass, a forward of its own, hooks or computed weights where we pass by) stays as it is, and the report says why.

    Args:
        inference: also fold batch norms into the convolutions before them, in any network that torch.fx can follow. Until
            ``restore()`` the model holds other weights, under other names, and is not to be trained.

    Returns:
        What became of every attention that is known; its ``restore()`` undoes all.

    Raises:
        OptionError: the model was compiled already; ``inference=True`` for a model that is not in evaluation mode.

    Example:
        >>> import timm
        >>> model = timm.create_model("halonet26t").eval()
        >>> report = accelerate(model)
        >>> report.accelerated
        ('stages.2.1.self_attn', 'stages.3.1.self_attn')
        >>> report.restore()
    """
    if any(map(is_compiled, model.modules())):
        raise OptionError("the model is compiled already, which would not hear of another forward: accelerate it first")
    if inference and any(module.training for module in model.modules()):
        raise OptionError("inference=True is for a model in evaluation mode, all of it: model.eval() first")
    found = [(name, module, *_judge(module)) for name, module in model.named_modules()]
    rows, originals = [], []
    for name, module, stand_in, outcome in found:
        if outcome is None:
            continue
        rows.append(Outcome(name, type(module).__name__, *outcome))
        if outcome[0] == ACCELERATED:
            originals.append((module, type(module), stand_in))
            module.__class__ = stand_in  # pyright: ignore[reportAttributeAccessIssue]
    folded, undo, unfolded = fold_batch_norms(model) if inference else ([], [], None)
    return AccelerationReport(tuple(rows), tuple(folded), unfolded, originals, undo)


def _judge(module: nn.Module) -> tuple[type | None, tuple[str, str] | None]:
    """What would stand in for a module, and its outcome with a note; None for what is no attention that is known."""
    known = stand_in_of(module)
    if known is None:
        return None, None
    stand_in, original = known
    if isinstance(module, stand_in):
        return None, (ALREADY, "")
    if type(module) is not original:
        return None, (LEFT, f"a subclass of {original.__name__}, and what it changes is not known")
    reason = why_not_plain(module) or stand_in.why_not(module)
    return (stand_in, (ACCELERATED, stand_in.does)) if reason is None else (None, (LEFT, reason))
