# SPDX-License-Identifier: Apache-2.0
"""What a run says before it starts and when it has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

import torch
from torch import nn

from ..attention.backend import BACKENDS
from ..flops import count_flops
from ..modes import evaluating, trying_to_train
from ..saved.view import View
from .batchnorm import PLAIN
from .data import Pictures, told
from .evaluate import Evaluation
from .recipe import Recipe


def announcement(recipe: Recipe, pictures: Pictures, view: View, model: nn.Module, output: str | PathLike[str]) -> str:
    """Model, data, recipe, device, and where the results will be."""
    assert recipe.batch_size is not None
    assert recipe.epochs is not None
    shape = (view.channels, view.size, view.size)
    sizes = f"{len(pictures.train)} training, {len(pictures.validation)} validation, {len(pictures.test)} test images"
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    processes = f"{recipe.devices} processes" + (f" on each of {recipe.nodes} hosts" if recipe.nodes > 1 else "")
    steps = max(1, len(pictures.train) // recipe.batch_size)
    used = ", ".join(backends_used(model, torch.zeros(2, *shape))) or "none of ours"
    return "\n".join(
        (
            f"model    {recipe.model}, {sum(p.numel() for p in model.parameters()):,} parameters{_flops(model, shape)}",
            f"data     {recipe.data}: {sizes}, {view.size}x{view.size}x{view.channels}{_scaled(pictures, view)}, "
            f"{len(pictures.classes)} classes",
            f"recipe   {recipe.epochs} epochs of {steps} steps, batch {recipe.batch_size}, {recipe.opt}, "
            f"lr {recipe.lr:g}, seed {recipe.seed}, {_extras(recipe)}",
            f"augment  {told(pictures)}",
            f"device   {device}, {'one process' if recipe.processes == 1 else processes}, "
            f"{torch.get_num_threads()} threads; attention by {used}",
            *_remarks(recipe, pictures, model),
            f"output   {output}",
        )
    )


def _remarks(recipe: Recipe, pictures: Pictures, model: nn.Module) -> list[str]:
    """What a number that the run leaves is not, though one could think so."""
    assert recipe.batch_size is not None
    remarks = []
    if recipe.mixup or recipe.cutmix:
        remarks.append("mixed    train_accuracy is of mixed images: how often the class with the larger share is named")
    if recipe.accumulate > 1 and any(isinstance(module, (*PLAIN, nn.SyncBatchNorm)) for module in model.modules()):
        images = min(recipe.batch_size, len(pictures.train)) // recipe.accumulate
        remarks.append(
            f"parts    of {images} images: batch norms see one part at a time, so the results are not those of a whole "
            "step, and worse where parts are small"
        )
    return remarks


def _scaled(pictures: Pictures, view: View) -> str:
    """What the pictures were before they were brought to the size that the model sees."""
    return "" if pictures.size in (None, view.size) else f" (scaled from {pictures.size}x{pictures.size})"


def conclusion(evaluation: Evaluation, seconds: float) -> str:
    """The accuracy, and how long it took."""
    score = f"{evaluation.accuracy:.2%} ({evaluation.correct} of {evaluation.count})"
    return f"test     accuracy {score} after {seconds:.0f} s"


def backends_used(model: nn.Module, images: torch.Tensor) -> list[str]:
    """The backends that a training step of the network calls, in their order; found by trying one without a loss."""
    with _heard() as names, trying_to_train(model):
        model(images)
    return [backend.name for backend in BACKENDS if backend.name in names]


@contextmanager
def _heard() -> Iterator[set[str]]:
    """The names of the backends that are called meanwhile."""
    names: set[str] = set()
    originals = [backend.attend for backend in BACKENDS]

    def listening(backend, attend):
        def call(*args, **kwargs):
            names.add(backend.name)
            return attend(*args, **kwargs)

        return call

    try:
        for backend, attend in zip(BACKENDS, originals, strict=True):
            setattr(backend, "attend", listening(backend, attend))  # noqa: B010 (a module)
        yield names
    finally:
        for backend, attend in zip(BACKENDS, originals, strict=True):
            setattr(backend, "attend", attend)  # noqa: B010


def _flops(model: nn.Module, shape: tuple[int, ...]) -> str:
    try:
        with evaluating(model):
            return f", {count_flops(model, shape) / 1e6:,.1f} MFLOPs per image"
    except Exception:  # a network that the counter cannot follow trains all the same
        return ""


def _extras(recipe: Recipe) -> str:
    """What is on beyond the plainest training, by the recipe's names."""
    names = (
        "weight_decay",
        "clip_grad",
        "label_smoothing",
        "mixup",
        "cutmix",
        "random_erasing",
        "drop_path",
        "ema_decay",
    )
    values = [f"{name.replace('_', '-')} {getattr(recipe, name):g}" for name in names if getattr(recipe, name)]
    if recipe.precision != "32":
        values.append(recipe.precision)
    if recipe.compile:
        values.append("compiled")
    return ", ".join(values)
