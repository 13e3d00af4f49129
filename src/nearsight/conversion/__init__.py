# SPDX-License-Identifier: Apache-2.0
"""From convolutions to attention, in any module: with fresh weights, or exactly.

candidates.py  what could be converted, what cannot and why
gpsa.py        the layer that is a convolution until it is trained to be more
fresh.py       fresh attention with a convolution's borders
merging.py     blocks that merge convolutions, which have to do so before
report.py      what became of every layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import NearsightError, OptionError
from ..flops import count_flops
from ..layers import AttentionLayer
from ..modes import evaluating
from ..positions import Factory, name_of, refuse_instance, refuse_shared
from ..private import tree_leaves
from .candidates import (
    CONVOLUTION,
    Convolution,
    candidates,
    kind_of,
    owners_of,
    padded_before,
    reason_to_skip,
    refuse_wrapped,
)
from .fresh import attention_like
from .gpsa import GatedPositionalSelfAttention
from .merging import refuse_to_merge
from .report import ATTENTION, CONVERTED, SKIPPED, ConversionReport, LayerOutcome

__all__ = ["ConversionReport", "GatedPositionalSelfAttention", "LayerOutcome", "convert"]

_STEM_CHANNELS = 4  # what reads at most so many channels reads the picture itself


def convert(
    model: nn.Module,
    *,
    init: str,
    names: str | Iterable[str] | None = None,
    stages: int | Iterable[int] | None = None,
    kernels: int | tuple[int, ...] | Iterable[int | tuple[int, ...]] | None = None,
    where: Callable[[str, Convolution], bool] | None = None,
    stem: bool = False,
    kernel_size: int | tuple[int, ...] | None = None,
    num_heads: int | None = None,
    position: str | Factory | None = None,
    margin: int | None = None,
    locality: float | None = None,
    content: bool | None = None,
    input_size: Sequence[int] | None = None,
) -> ConversionReport:
    """Put attention in the place of a model's spatial convolutions. The model is changed in place.

    ``init="random"`` is the surgery of SASA (Ramachandran et al. 2019, arXiv:1906.05909, section 3.2): every convolution
    with a kernel larger than 1 becomes :class:`LocalSelfAttention2d`, or its sibling of one or three axes, with the same
    channels, stride and dilation, to be trained from the start. Its projections are dense: a depthwise convolution of C
    channels, which has k*k*C weights, becomes 3*C*C of them; ``where=lambda name, conv: conv.groups == 1`` leaves those be.
    Where padding shows that a convolution is causal, attention is; what padding does not show, the report says. All
    parameters are new: an optimiser made before holds the old ones, and its steps move nothing.

    ``init="exact"`` gives :class:`GatedPositionalSelfAttention`, the same function bit for bit in evaluation mode, on
    pictures of every size: what Cordonnier et al. 2020 (arXiv:1911.03584) proved possible and d'Ascoli et al. 2021
    (arXiv:2106.05795) fine-tuned. It takes over the convolution's parameters, so an optimiser made before keeps those it
    has; the new ones, as frozen as the weight, it does not move until it is told of them (``add_param_group``).

    Convolutions that read at most 4 channels, a network's stem, stay unless ``stem=True``: of raw pixels little is to be
    compared, and SASA's best networks keep them. 1 x 1 convolutions always stay. Convolutions whose weights are computed
    (weight norm, spectral norm, pruning), that are not initialised yet, that carry hooks, or are more than their class says
    (a method of their own, also on the instance, a buffer besides) are skipped, as is what is no plain convolution; each has
    its row in the report. What attends already stays, so converting twice changes nothing.

    Convert first and wrap after: DistributedDataParallel and its kind, and what torch.compile made, are refused. Blocks that
    merge their convolutions for inference, as RepVGG's, have to do so before; afterwards they refuse.

    Args:
        model: any module that holds ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``; a layer that is used twice stays one.
        init: ``"random"``, which throws away what the layers have learned, or ``"exact"``. Always to be said.
        names: only layers whose name matches one of these patterns, as ``"layer4.*"`` (``*`` and ``?`` as in a shell).
        stages: only these stages of a timm model, counted as its ``out_indices``: for a ResNet 0 is the stem.
        kernels: only these kernel sizes; ``3`` is 3 along every axis.
        where: only layers for which ``where(name, convolution)`` holds.
        stem: also what reads the picture itself.
        kernel_size, num_heads, position: of random attention, as in :class:`LocalSelfAttention2d`; 7, 8 and "relative" if
            not given. One kernel size is for the axes along which a convolution sees more than a cell, a tuple for all.
            Where the number of heads does not divide the channels, the nearest that does is taken. A position is a name or
            a factory, which makes an encoding for each layer.
        margin: places that exact attention may reach beyond the kernel, on every side (0).
        locality: how hard its heads look (1.0); below 1 the conversion is no longer exact.
        content: False leaves out content, so that heads can only move and widen (True).
        input_size: (C, H, W) of a picture: then FLOPs are counted and the outputs compared.

    Returns:
        What became of every layer. Filters add up: a layer has to pass them all.

    Raises:
        OptionError: the model is itself a convolution, or wrapped; a filter that fits no layer; an option of the other
            ``init``; a position that layers would share.
        ShapeError: a layer that an option does not fit; the message names it.

    Example:
        >>> model = create_model("resnet10t")
        >>> report = convert(model, init="exact", stages=4, input_size=(3, 64, 64))
        >>> report.converted, report.error
        (('layer4.0.conv1', 'layer4.0.conv2'), 0.0)
    """
    refuse_instance(position)
    options = _options(init, kernel_size, num_heads, position, margin, locality, content)
    if isinstance(model, CONVOLUTION):
        raise OptionError(
            "a convolution cannot be replaced inside itself: give the module that holds it, as nn.Sequential"
        )
    refuse_wrapped(model)
    found = list(candidates(model))
    chosen = _Filter(model, found, names, stages, kernels, where, stem)
    around, owners = padded_before(model), owners_of(model)
    new: dict[nn.Module, nn.Module] = {}
    rows: list[LayerOutcome] = []
    for name, module in found:
        reason = reason_to_skip(module) or chosen.reason_to_skip(name, module)
        outcome, after = SKIPPED, module
        if isinstance(module, AttentionLayer):
            outcome, reason = ATTENTION, "attends already"
        elif isinstance(module, CONVOLUTION) and reason is None:
            with _naming(name, module):
                after, reason = (
                    attention_like(module, around.get(module), **options)
                    if init == "random"
                    else _exactly(module, **options)
                )
            reason = "; ".join(filter(None, [reason, _note_on_ties(name, module, owners, init)]))
            outcome, new[module] = CONVERTED, after
        rows.append(LayerOutcome(name, _describe(module), outcome, reason or "", _count(module), _count(after)))

    refuse_shared(layer for after in new.values() for layer in after.modules())
    before = _Measures(model, input_size)
    _replace(model, new)
    refuse_to_merge(model, [row.name for row in rows if row.outcome == CONVERTED])
    after = _Measures(model, input_size)
    return ConversionReport(
        init=init,
        rows=tuple(rows),
        options={
            "init": init,
            "names": [row.name for row in rows if row.outcome == CONVERTED],
            "stem": True,
            **{name: name_of(value) or value if name == "position" else value for name, value in options.items()},
        },
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        flops_before=before.flops,
        flops_after=after.flops,
        flops_with_content=_flops_with_content(model, input_size) if init == "exact" else None,
        error=before.difference(after) if init == "exact" else None,
    )


# ------------------------------------------------------------------------------------------------------------ options


def _options(init: str, *given: Any) -> dict[str, Any]:
    """What the layers of this ``init`` are made with: what was given, and for the rest the default."""
    defaults = {
        "random": {"kernel_size": 7, "num_heads": 8, "position": "relative"},
        "exact": {"margin": 0, "locality": 1.0, "content": True},
    }
    if init not in defaults:
        raise OptionError(f"init must be 'random' or 'exact'; received {init!r}")
    values = dict(zip((name for of_init in defaults.values() for name in of_init), given, strict=True))
    foreign = [name for name, value in values.items() if value is not None and name not in defaults[init]]
    if foreign:
        raise OptionError(
            f"{', '.join(foreign)} cannot be set with init={init!r}; it takes {', '.join(defaults[init])}"
        )
    return {name: default if values[name] is None else values[name] for name, default in defaults[init].items()}


class _Filter:
    """Which of the layers that were found the caller wants converted."""

    def __init__(self, model, found, names, stages, kernels, where, stem) -> None:
        convolutions = [(name, module) for name, module in found if isinstance(module, CONVOLUTION)]
        self.names = None if names is None else [names] if isinstance(names, str) else list(names)
        self.stages = None if stages is None else {stages} if isinstance(stages, int) else set(stages)
        self.kernels = None if kernels is None else [kernels] if isinstance(kernels, (int, tuple)) else list(kernels)
        self.where, self.stem = where, stem
        self.stage_of = {} if stages is None else _stages(model)
        all_names = [name for name, _ in convolutions]
        self._check(
            "names", self.names, lambda pattern: any(fnmatchcase(name, pattern) for name in all_names), all_names
        )
        self._check("stages", self.stages, lambda stage: stage in self.stage_of.values(), self.stage_of.values())
        sizes = {module.kernel_size for _, module in convolutions}
        self._check("kernels", self.kernels, lambda kernel: any(_is_kernel(kernel, size) for size in sizes), sizes)

    @staticmethod
    def _check(what: str, values: Iterable[Any] | None, is_there: Callable[[Any], bool], known: Iterable[Any]) -> None:
        missing = [value for value in values or () if not is_there(value)]
        if missing:
            there = sorted(set(known))
            shown = ", ".join(map(str, there[:8])) + (" ..." if len(there) > 8 else "")
            raise OptionError(
                f"{what}: the model has no spatial convolution for {missing[0]!r}; it has {shown or 'none'}"
            )

    def reason_to_skip(self, name: str, module: nn.Module) -> str | None:
        if not isinstance(module, CONVOLUTION):
            return None
        if self.names is not None and not any(fnmatchcase(name, pattern) for pattern in self.names):
            return "not among names"
        if self.stages is not None and self.stage_of.get(name) not in self.stages:
            return "not in these stages"
        if self.kernels is not None and not any(_is_kernel(kernel, module.kernel_size) for kernel in self.kernels):
            return "not of these kernels"
        if not self.stem and module.in_channels <= _STEM_CHANNELS:
            return f"the stem: it reads {module.in_channels} channels; stem=True converts it"
        if self.where is not None and not self.where(name, module):
            return "where says no"
        return None


def _is_kernel(wanted: int | tuple[int, ...], kernel_size: tuple[int, ...]) -> bool:
    return tuple(kernel_size) == ((wanted,) * len(kernel_size) if isinstance(wanted, int) else tuple(wanted))


def _stages(model: nn.Module) -> dict[str, int]:
    """The stage of every module: the first entry of timm's ``feature_info`` that ends with it or after it."""
    ends = [entry["module"] for entry in getattr(model, "feature_info", [])]
    if not ends:
        raise OptionError(f"{type(model).__name__} does not say where its stages end (timm's feature_info): use names")
    order = [name for name, _ in model.named_modules()]
    last = {
        end: max((i for i, name in enumerate(order) if f"{name}.".startswith(f"{end}.")), default=-1) for end in ends
    }
    return {
        name: stage
        for i, name in enumerate(order)
        if (stage := next((stage for stage, end in enumerate(ends) if i <= last[end]), None)) is not None
    }


# ------------------------------------------------------------------------------------------------------------- layers


def _exactly(convolution: Convolution, **options: Any) -> tuple[nn.Module, str]:
    layer = GatedPositionalSelfAttention(convolution, **options)
    return layer, f"{layer.num_heads} heads"


@contextmanager
def _naming(name: str, module: nn.Module) -> Iterator[None]:
    """What a layer refuses is said of that layer."""
    try:
        yield
    except NearsightError as error:
        raise type(error)(f"layer {name} ({_describe(module)}): {error}") from error


def _note_on_ties(name: str, module: Convolution, owners: dict[int, list[str]], init: str) -> str | None:
    others = [other for other in owners[id(module.weight)] if other != name]
    if not others:
        return None
    return f"its weight is that of {others[0]}, too; " + (
        "that stays so, and shift, spread and gate are its own" if init == "exact" else "the fresh ones are its own"
    )


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    for old, layer in new.items():
        layer.train(old.training)
    for path, child in list(model.named_modules(remove_duplicate=False)):
        if child in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[child])


def _describe(module: nn.Module) -> str:
    channels = [getattr(module, name, None) for name in ("in_channels", "out_channels")]
    text = kind_of(module) + (" {} -> {}".format(*channels) if None not in channels else "")
    if isinstance(module, CONVOLUTION):
        text += ", " + "x".join(map(str, module.kernel_size))
        defaults = {"stride": 1, "dilation": 1}
        for name, default in defaults.items():
            values = getattr(module, name)
            text += f", {name} {'x'.join(map(str, values))}" if any(value != default for value in values) else ""
        text += f", {module.groups} groups" if module.groups > 1 else ""
    return text


def _count(module: nn.Module) -> int:
    return sum(0 if is_lazy(parameter) else parameter.numel() for parameter in module.parameters())


# ------------------------------------------------------------------------------------------------------------ numbers


class _Measures:
    """A model's parameters, and on a picture of ``input_size`` its FLOPs and what it says."""

    def __init__(self, model: nn.Module, input_size: Sequence[int] | None) -> None:
        self.parameters = _count(model)
        self.flops = None if input_size is None else _flops(model, input_size)
        self.outputs = [] if input_size is None else _outputs(model, input_size)

    def difference(self, other: _Measures) -> float | None:
        """The largest difference of the outputs, relative to the largest output."""
        pairs = zip(self.outputs, other.outputs, strict=True)
        errors = [
            ((one - two).abs().max() / one.abs().max().clamp(min=torch.finfo(one.dtype).tiny)).item()
            for one, two in pairs
        ]
        return torch.tensor(errors).max().item() if errors else None  # NaN if one is: Python's max may lose it


def _outputs(model: nn.Module, input_size: Sequence[int]) -> list[Tensor]:
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, *input_size, generator=generator, dtype=torch.float32, device="cpu").to(like)
    with evaluating(model), torch.no_grad():
        leaves = tree_leaves(model(picture))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _flops(model: nn.Module, input_size: Sequence[int]) -> int:
    with evaluating(model):
        return count_flops(model, input_size)


def _flops_with_content(model: nn.Module, input_size: Sequence[int] | None) -> int | None:
    layers = [
        module for module in model.modules() if isinstance(module, GatedPositionalSelfAttention) and module.content
    ]
    if input_size is None or not layers:
        return None
    gates = [layer.gate.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            layer.gate.fill_(1)
        try:
            return _flops(model, input_size)
        finally:
            for layer, gate in zip(layers, gates, strict=True):
                layer.gate.copy_(gate)
