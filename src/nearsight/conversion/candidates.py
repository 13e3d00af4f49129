# SPDX-License-Identifier: Apache-2.0
"""What of a model could be converted, what cannot and why, and models that have to be converted before they are wrapped."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ..errors import OptionError
from ..layers import AttentionLayer
from ..layers.projection import OVERRIDES
from ..private import has_hooks, is_compiled, noted_padding
from .geometry import padding_of

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters"}

# What took note of a model's parameters or modules, and would not hear of new ones. By name, as most may not be installed.
# DataParallel is not among them: it copies the module that it finds at every call.
WRAPPERS = {
    "DeepSpeedEngine",
    "DistributedDataParallel",
    "FSDPModule",
    "FullyShardedDataParallel",
    "OptimizedModule",
    "ShardedDataParallel",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Attention put into what is wrapped already would not be trained, or would not run.

    Raises:
        OptionError: the model is, holds or lies in a wrapper that has to come after the conversion.
    """
    for name, module in model.named_modules():
        wrapper = _wrapper(module)
        if wrapper is not None:
            raise OptionError(
                f"{name or 'the model'} is wrapped already ({wrapper}), which would not know of the new layers and their "
                "parameters: convert first, wrap after"
            )
    held = set(model.modules())
    if not all(held.isdisjoint(reducer.modules()) for reducer in _reducers()):
        raise OptionError(
            "the model lies in a DistributedDataParallel, which would never reduce the gradients of the new parameters: "
            "convert first, wrap after"
        )


def _wrapper(module: nn.Module) -> str | None:
    kinds = WRAPPERS & {base.__name__ for base in type(module).__mro__}
    return min(kinds, default="compiled" if is_compiled(module) else None)


def _reducers() -> list[nn.Module]:
    """Every DistributedDataParallel that there is. Nothing in the module that it holds tells of it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    kind = nn.parallel.DistributedDataParallel
    return [one for one in gc.get_objects() if issubclass(type(one), kind)]


def candidates(
    model: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Spatial convolutions, attention layers, and what looks like a convolution: each once, in the model's order."""
    seen = {model} if seen is None else seen
    if not prefix and _looks_like_one(model):
        yield "", model
    for name, module in model.named_children():
        if module in seen or (name == "parametrizations" and is_parametrized(model)):
            continue
        seen.add(module)
        path = f"{prefix}{name}"
        if isinstance(module, AttentionLayer):
            yield path, module
            continue
        if _looks_like_one(module):
            yield path, module
        yield from candidates(module, f"{path}.", seen)


def _looks_like_one(module: nn.Module) -> bool:
    """Whether it is a convolution of more than a cell, is called one, or holds a kernel or a graph of its own."""
    sides = getattr(module, "kernel_size", None)
    if isinstance(sides, tuple) and all(side == 1 for side in sides):
        return False
    if isinstance(module, CONVOLUTION):
        return True
    is_leaf = next(module.children(), None) is None
    if isinstance(module, torch.jit.ScriptModule):
        return is_leaf and "conv" in str(getattr(module, "inlined_graph", ""))
    if isinstance(module, torch.fx.GraphModule):
        return any(node.op == "call_function" and "conv" in str(node.target) for node in module.graph.nodes)
    is_called_one = "Conv" in kind_of(module)
    return (is_called_one and (is_leaf or is_parametrized(module))) or _holds_a_kernel(
        module, 3 if is_called_one else 4
    )


def _holds_a_kernel(module: nn.Module, axes: int) -> bool:
    """Matrices, more than one, for every place of a block; a picture that is a parameter has a first axis of one."""
    own = [one for one in module.parameters(recurse=False) if not is_lazy(one)]
    return any(one.ndim >= axes and len(one) > 1 and prod(one.shape[2:]) > 1 for one in own)


def kind_of(module: nn.Module) -> str:
    """The name of its class, or of that which was scripted or traced."""
    return getattr(module, "original_name", None) or type(module).__name__


def reason_to_skip(module: nn.Module) -> str | None:
    """Why a layer cannot be converted at all."""
    kind = kind_of(module)
    if isinstance(module, AttentionLayer):
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted or traced: convert the model before that"
    if isinstance(module, torch.fx.GraphModule):
        return "a graph that convolves by itself: convert the model that it was made from"
    if not isinstance(module, CONVOLUTION):
        return f"{kind} is no plain convolution"
    if any(is_lazy(parameter) for parameter in module.parameters()):
        return "not initialised yet: run the model once"
    if is_parametrized(module) or "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is computed (weight norm, spectral norm, pruning): make that permanent first"
    if (replaced := _replaced(module)) is not None:
        return f"{kind} has a {replaced} of its own"
    if has_hooks(module):
        return "it carries hooks, which would be lost: remove them first"
    if more := sorted(dict(_parts(module)).keys() - {"weight", "bias"}):
        return f"it holds {more[0]} besides, which would be lost"
    if module.padding_mode != "zeros" and noted_padding(module) not in (None, padding_of(module)):
        return "its padding was changed after it was made, which only the mode 'zeros' heeds"
    return _reason_of_weight(module.weight)


def _reason_of_weight(weight: Tensor) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, no plain parameter"
    return None if weight.is_floating_point() else f"its weight is {weight.dtype}, not floating point"


def _parts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
    yield from module.named_children()


def _replaced(module: Convolution) -> str | None:
    """What of PyTorch's class is replaced, below it or on the instance, so that calling it is more than the class says.

    A kind of its own may be made and described as it likes.
    """
    base = next(base for base in CONVOLUTION if isinstance(module, base))
    below = type(module).__mro__[: type(module).__mro__.index(base)]
    own = {name for owner in (module, *below) for name, value in vars(owner).items() if callable(value)}
    replaced = sorted(name for name in own - HARMLESS if callable(getattr(base, name, None)))
    return "forward" if OVERRIDES & set(replaced) else replaced[0] if replaced else None


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """By the id of every parameter, the modules that hold it: more than one where weights are tied."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    return owners


def padded_before(model: nn.Module) -> dict[nn.Module, tuple[tuple[int, int], ...]]:
    """What a padding layer adds before and after each axis of the convolution that follows it in an ``nn.Sequential``.

    A convolution that follows several that differ is left out.
    """
    found: dict[nn.Module, set] = defaultdict(set)
    for sequence in model.modules():
        layers = list(sequence) if type(sequence) is nn.Sequential else []
        for before, layer in zip([None, *layers], layers, strict=False):
            if isinstance(layer, CONVOLUTION):
                found[layer].add(_cells_of_pad(before, len(layer.kernel_size)))
    return {layer: around for layer, (around, *others) in found.items() if around and not others}


def _cells_of_pad(layer: nn.Module | None, rank: int) -> tuple[tuple[int, int], ...] | None:
    if layer is None or type(layer).__module__ != nn.ConstantPad1d.__module__:
        return None
    cells = tuple(getattr(layer, "padding", ()))
    return tuple(zip(cells[::2], cells[1::2], strict=True))[::-1] if len(cells) == 2 * rank else None
