# SPDX-License-Identifier: Apache-2.0
"""A run: from a recipe to a folder with checkpoint, weights, metrics and report."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import nn

from ..attention import backends
from ..errors import DataError, OptionError, TrainingError
from .data import Pictures, View, load_pictures, loader
from .evaluate import Evaluation, evaluate
from .files import write_text
from .recipe import Recipe, read_recipe
from .report import REPORT_FILE, write_report
from .task import GRADIENT_CLIP, Batches, Classifier, Journal, WholeFiles
from .weights import CHECKPOINT_FILE, WEIGHTS_FILE, Blueprint, input_size, read_checkpoint, save_model

CONFIG_FILE = "config.yaml"
MOVABLE = ("data_root", "devices")  # what may change when a run is resumed: where it runs, not what it computes


@dataclass(frozen=True)
class Run:
    """A finished run."""

    recipe: Recipe
    output: Path
    model: nn.Module
    evaluation: Evaluation


class Interrupted(TrainingError):
    """The user stopped the run; the message says how to go on."""


def train(recipe: Recipe, output: Path | None = None, *, download: bool = False) -> Run:
    """Train as the recipe says; leave config, checkpoint, weights, metrics and report in a folder.

    Every file is written whole or not at all. The same recipe gives the same metrics on the same CPU.

    Args:
        output: the run's folder; None takes ``runs/MODEL-DATA``.
        download: fetch data that is missing.

    Raises:
        OptionError: unknown model or data, or a model that cannot take pictures of this size.
        DataError: data that is missing or cannot be read.
        TrainingError: the folder holds a run or cannot be written, the loss is not finite, or the user stopped it.

    Example:
        >>> run = train(Recipe(model="sasa_nano", data="digits", epochs=1), Path("/tmp/run"))
        >>> run.evaluation.count
        360
    """
    output = output or default_output(recipe)
    if _is_main_process() and any((output / file).exists() for file in (CHECKPOINT_FILE, WEIGHTS_FILE)):
        raise TrainingError(f"{output} holds a run already: continue it with --resume, or name another --output")
    return _run(recipe, output, None, download)


def resume(output: Path, given: Mapping[str, Any] | None = None) -> Run:
    """Go on from the last checkpoint of a run that was stopped, to the end that it would have had.

    Args:
        output: the run's folder.
        given: settings asked for again; only data_root and devices may differ from the run's.

    Raises:
        OptionError: a setting that is not the run's.
        DataError: a checkpoint or config that cannot be read.
        TrainingError: no checkpoint in the folder, or what :func:`train` raises it for.
    """
    checkpoint = output / CHECKPOINT_FILE
    if not checkpoint.is_file():
        raise TrainingError(f"there is no checkpoint {checkpoint} to resume from; start the run without --resume")
    recipe = read_recipe(output / CONFIG_FILE)
    for name, value in (given or {}).items():
        if name not in MOVABLE and value != getattr(recipe, name):
            raise OptionError(
                f"a resumed run keeps its settings: {name} is {getattr(recipe, name)} in {output / CONFIG_FILE}; "
                f"received {value}"
            )
    read_checkpoint(checkpoint)
    return _run(replace(recipe, **(given or {})), output, checkpoint, download=False)


def default_output(recipe: Recipe) -> Path:
    """``runs/MODEL-DATA``, with nothing in the names that a folder's name should not hold."""
    return Path("runs") / re.sub(r"[^\w.-]+", "_", f"{recipe.model}-{recipe.data}").strip("_")


def _run(recipe: Recipe, output: Path, checkpoint: Path | None, download: bool) -> Run:
    pictures = load_pictures(recipe.data, recipe.data_root, download)
    recipe = recipe.filled(pictures.defaults)
    assert recipe.batch_size is not None
    view = pictures.view(input_size(recipe.model))
    blueprint = Blueprint(recipe.model, pictures.classes, view, recipe.data)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    model = blueprint.build()
    if _is_main_process():
        _make_folder(output)
        write_text(output / CONFIG_FILE, recipe.to_yaml())
        print(_announcement(recipe, pictures, view, model, output), flush=True)

    start = time.perf_counter()
    journal = Journal(output)
    task = Classifier(model, pictures.augment, blueprint, recipe)
    with _quiet():
        _fit(_trainer(recipe, journal), task, Batches(pictures, view, recipe), checkpoint, output)
    seconds = time.perf_counter() - start

    test = pictures.test.seen(view, training=False)
    evaluation = evaluate(model, loader(test, recipe.batch_size, pictures.test.workers))
    if _is_main_process():
        save_model(output / WEIGHTS_FILE, model, blueprint)
        write_report(output / REPORT_FILE, recipe, blueprint, model, journal.rows, evaluation, test)
        print(_conclusion(evaluation, output, seconds), flush=True)
    return Run(recipe, output, model, evaluation)


def _trainer(recipe: Recipe, journal: Journal) -> L.Trainer:
    return L.Trainer(
        max_epochs=recipe.epochs,
        devices=recipe.devices,
        accelerator="auto",
        strategy="ddp" if recipe.devices > 1 else "auto",
        callbacks=[journal, RichProgressBar(leave=False)],
        plugins=[WholeFiles()],
        gradient_clip_val=GRADIENT_CLIP,
        use_distributed_sampler=False,  # Batches deals out the samples itself
        enable_checkpointing=False,  # Journal writes the checkpoint, after the row that belongs to it
        enable_model_summary=False,
        num_sanity_val_steps=0,
        logger=False,
    )


def _fit(trainer: L.Trainer, task: Classifier, data: Batches, checkpoint: Path | None, output: Path) -> None:
    try:
        trainer.fit(task, data, ckpt_path=checkpoint)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C, after which it ignores all further ones
        signal.signal(signal.SIGINT, signal.default_int_handler)
        advice = (
            "go on with: nearsight train --resume --output"
            if (output / CHECKPOINT_FILE).is_file()
            else ("there is no checkpoint yet; start again with --output")
        )
        raise Interrupted(f"stopped in epoch {trainer.current_epoch + 1}; {advice} {output}") from stop
    except DataError as error:  # from a worker process it comes with that process's traceback around it
        raise DataError(str(error).strip().rsplit("DataError: ", 1)[-1]) from error


def _make_folder(output: Path) -> None:
    """Make the folder, or say why not."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {output}: {error.strerror}; name another --output") from error


def _is_main_process() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0


def _announcement(recipe: Recipe, pictures: Pictures, view: View, model: nn.Module, output: Path) -> str:
    sizes = f"{len(pictures.train)} training, {len(pictures.validation)} validation, {len(pictures.test)} test images"
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    able = [name for name, reason in backends().items() if reason is None]
    return "\n".join(
        (
            f"model    {recipe.model}, {sum(p.numel() for p in model.parameters()):,} parameters",
            f"data     {recipe.data}: {sizes}, {view.size}x{view.size}x{view.channels}",
            f"recipe   {recipe.epochs} epochs, batch {recipe.batch_size}, lr {recipe.lr:g}, seed {recipe.seed}",
            f"device   {device} x {recipe.devices}, {torch.get_num_threads()} threads; attention by {', '.join(able)}",
            f"output   {output}",
        )
    )


def _conclusion(evaluation: Evaluation, output: Path, seconds: float) -> str:
    score = f"{evaluation.accuracy:.2%} ({evaluation.correct} of {evaluation.count})"
    return f"test     accuracy {score} after {seconds:.0f} s\nreport   {output / REPORT_FILE}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's tips (how many workers, which logger) are not about the user's run; its errors still are."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
